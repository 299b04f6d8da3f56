"""Task prompts of the new documents, in English and in Chinese. The released ASR prompt comes first, as it is."""

import random

from data_pipelines.documents.prompt_writing import ASR_PROMPT

TRANSCRIBE = {
    "zh": (ASR_PROMPT, "请把听到的话写下来：", "请转写这段语音："),
    "en": ("Transcribe the speech into text:", "Write down what you hear:", "What is said in this recording?"),
}
READ_ALOUD = {
    "zh": ("将文本转换为语音：", "请朗读下面的文字：", "请把这句话读出来："),
    "en": ("Convert the text into speech: ", "Read this aloud: ", "Say the following: "),
}
CONTINUE_IMAGES = {
    "zh": (
        "文中有些句子是语音。请看图、听语音，把文字补充完整。",
        "请结合图片和听到的内容，写出其余的文字。",
        "请听其中的语音，再结合图片补充其他信息。",
    ),
    "en": (
        "Some of the sentences are spoken. Look at the pictures, listen, and complete the text.",
        "Write the rest of the text from the pictures and from what you hear.",
        "Listen to the spoken sentences, and add what else the pictures show.",
    ),
}
"""Sentences about pictures are heard; the others are to be written."""
ANSWER_IMAGES = {
    "zh": ("对话中有些话是语音。请看图、听语音，然后回答。", "请结合图片和听到的内容回答。", "请先听，再看图回答。"),
    "en": (
        "Some of this conversation is spoken. Look at the pictures, listen, and answer.",
        "Answer from the pictures and from what you hear.",
        "Listen first, then look and answer.",
    ),
}
"""The same for a conversation."""


DESCRIBE_IMAGE = {
    "en": (
        "Describe the picture.",
        "Describe this image in one or two sentences.",
        "What can be seen in the picture?",
        "Write a caption for this photo.",
        "Give a detailed description of the image.",
    ),
    "zh": (
        "描述这张图片。",
        "用一两句话描述这张图。",
        "图片里有什么？",
        "为这张照片写一句说明。",
        "详细描述这张图片的内容。",
    ),
}
READ_PAGE = {
    "en": (
        "Read the text in the picture.",
        "What does the picture say?",
        "Transcribe all text of this page.",
        "Extract the text from this image.",
    ),
    "zh": ("读出图片中的文字。", "图片上写了什么？", "请转写这一页的全部文字。", "提取这张图片里的文字。"),
}
DESCRIBE_CHART = {
    "en": ("Describe the chart.", "What does this chart show?", "Summarise the figure."),
    "zh": ("描述这张图表。", "这张图表说明了什么？", "概括这张图的内容。"),
}
TRANSCRIBE_CHART = {
    "en": ("Write the data of the chart as a table.", "Turn the chart into comma-separated values."),
    "zh": ("把图表中的数据写成表格。", "将这张图表转换为逗号分隔的数据。"),
}


def choose_prompt(prompts: dict[str, tuple[str, ...]], language: str, rng: random.Random) -> str:
    """Chooses a prompt in the language of the text; for a text in another one, in either."""
    return rng.choice(prompts.get(language) or [prompt for choices in prompts.values() for prompt in choices])
