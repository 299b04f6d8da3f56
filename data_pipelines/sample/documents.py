"""The documents of every type as source prompts in the released form, and how many of each the data set holds.

A maker takes the plan (which names the media) and a random generator, and returns one prompt. Text and speech between
`<trainable_start>` and `<trainable_end>` carry loss; end-of-text is added by the pipeline.

Held-out documents are questions, a manifest for each ability (`HELD_OUT`). Their sentences, voices, crops and videos
are in no training document: sentences and questions of words by `texts.is_held_out`, the rest by the plan.
"""

import functools
import random
from collections.abc import Callable

from data_pipelines.documents.prompt_writing import (
    ASR_PROMPT,
    Source,
    audio_tag,
    conversation,
    image_tag,
    join,
    speech_tag,
    spoken_answer,
    trainable,
    turn,
    video_tag,
)
from data_pipelines.sample import scenes, texts
from data_pipelines.sample.media import MediaPlan, VideoFile
from data_pipelines.sample.photographs import Crop
from data_pipelines.text.spoken_text import split_text

LANGUAGES = ("en", "zh")
SYSTEM = {"en": "You are a helpful assistant.", "zh": "你是一个乐于助人的助手。"}
DESCRIBE = {"en": "Describe the picture.", "zh": "描述这张图片。"}
DESCRIBE_VIDEO = {"en": "Describe the video.", "zh": "描述这段视频。"}

Maker = Callable[[MediaPlan, random.Random], Source]


def _system(rng: random.Random, language: str) -> str:
    return SYSTEM[language] if rng.random() < 0.2 else ""


def text(plan: MediaPlan, rng: random.Random) -> Source:
    """Writes a paragraph, all of it trainable."""
    return trainable(texts.paragraph(rng, rng.choice(LANGUAGES)))


def text_qa(plan: MediaPlan, rng: random.Random) -> Source:
    """Asks a written question, answered in writing."""
    language = rng.choice(LANGUAGES)
    question, answer = texts.dialogue(rng, plan.held_out)[LANGUAGES.index(language)]
    return turn(question, answer, _system(rng, language))


def caption(plan: MediaPlan, rng: random.Random) -> Source:
    """Shows an image and describes it, with a request before it or without."""
    language = rng.choice(LANGUAGES)
    path, crop = plan.add_image(rng)
    words = scenes.caption(rng, crop, language)
    if rng.random() < 0.5:
        return image_tag(path) + trainable(words)
    return turn(image_tag(path) + DESCRIBE[language], words)


def qa(plan: MediaPlan, rng: random.Random) -> Source:
    """Shows an image and asks one to three questions about it, a turn each."""
    language = rng.choice(LANGUAGES)
    path, crop = plan.add_image(rng)
    # The image stands before the first question alone; later turns refer back to it.
    (question, answer), *others = rng.sample(scenes.questions(crop, language), rng.choice([1, 2, 3]))
    return conversation([(image_tag(path) + question, answer), *others], _system(rng, language))


def image_qa(plan: MediaPlan, rng: random.Random) -> Source:
    """Shows an image and asks one question about it, whose answer is short."""
    language = rng.choice(LANGUAGES)
    path, crop = plan.add_image(rng)
    # The first question asks for a list of all there is.
    question, answer = rng.choice(scenes.questions(crop, language)[1:])
    return turn(image_tag(path) + question, answer)


def interleaved(plan: MediaPlan, rng: random.Random) -> Source:
    """Shows several images in running text, all of it trainable."""
    language = rng.choice(LANGUAGES)
    index = LANGUAGES.index(language)
    # Sentences of one story, so that the text runs on over the images between them.
    story = texts.sentences(rng, 3)
    prompt = trainable(story[0][index])
    for pair in story[1:]:
        path, crop = plan.add_image(rng)
        shown = texts.join([scenes.short_caption(crop, language), pair[index]], language)
        prompt += image_tag(path) + trainable(shown)
    return prompt


def asr(plan: MediaPlan, rng: random.Random) -> Source:
    """Asks for the words of a clip of speech, in the released form."""
    language = rng.choice(LANGUAGES)
    words = texts.sentence(rng, plan.held_out)[LANGUAGES.index(language)]
    return join([ASR_PROMPT, audio_tag(plan.add_speech(rng, words, language)), trainable(words)])


def tts(plan: MediaPlan, rng: random.Random) -> Source:
    """Writes text, then speaks it, without an instruction: the released form."""
    language = rng.choice(LANGUAGES)
    words = texts.sentence(rng, plan.held_out)[LANGUAGES.index(language)]
    return join([words, trainable(speech_tag(plan.add_speech(rng, words, language)))])


def s2tt(plan: MediaPlan, rng: random.Random) -> Source:
    """Pairs speech in one language with its translation in the other."""
    # Every sentence is known in both languages, so either can be the spoken one.
    source, target = rng.choice([(0, 1), (1, 0)])
    pair = texts.sentence(rng, plan.held_out)
    ask = ("将语音翻译成英文：", "将语音翻译成中文：")[target]
    return join([ask, audio_tag(plan.add_speech(rng, pair[source], LANGUAGES[source])), trainable(pair[target])])


def aqa(plan: MediaPlan, rng: random.Random) -> Source:
    """Asks a spoken question, answered in writing."""
    language = rng.choice(LANGUAGES)
    question, answer = texts.dialogue(rng, plan.held_out)[LANGUAGES.index(language)]
    return turn(audio_tag(plan.add_speech(rng, question, language)), answer, _system(rng, language))


def dialogue(plan: MediaPlan, rng: random.Random) -> Source:
    """Asks one or two spoken questions, answered in speech: each piece of an answer is written, then spoken."""
    language = rng.choice(LANGUAGES)
    question, answer = texts.dialogue(rng)[LANGUAGES.index(language)]
    # Copies of the generator where each voice is drawn: whoever speaks again draws the same voice.
    asks, answers = random.Random(), random.Random()
    asks.setstate(rng.getstate())
    heard = audio_tag(plan.add_speech(rng, question, language))
    answers.setstate(rng.getstate())
    turns = [(heard, _speak_answer(plan, rng, answer, language))]
    # A second turn, in the same two voices, is drawn apart: the documents that follow do not depend on it.
    apart = random.Random(f"{question}/{len(plan.speech)}")
    if apart.random() < 0.3:
        question, answer = texts.dialogue(apart)[LANGUAGES.index(language)]
        turns.append(
            (audio_tag(plan.add_speech(asks, question, language)), _speak_answer(plan, answers, answer, language))
        )
    return conversation(turns, _system(rng, language))


def _speak_answer(plan: MediaPlan, rng: random.Random, answer: str, language: str) -> Source:
    """Speaks the answer in pieces, all in one voice."""
    # The state is set back before each piece: all pieces draw the same voice.
    voice = rng.getstate()

    def say(piece: str) -> str:
        rng.setstate(voice)
        return plan.add_speech(rng, piece.strip(), language)

    return spoken_answer(split_text(answer), say)


def _story(rng: random.Random, count: int) -> tuple[list[str], str]:
    language = rng.choice(LANGUAGES)
    return [pair[LANGUAGES.index(language)] for pair in texts.sentences(rng, count)], language


def intlv(plan: MediaPlan, rng: random.Random) -> Source:
    """Tells audio_1 text_2 audio_3 text_4: one story, heard and written in turns; loss on the written parts."""
    # An even number: every piece that is heard is followed by one that is written.
    words, language = _story(rng, rng.choice([2, 4]))
    parts = zip(words[::2], words[1::2], strict=True)
    return join(audio_tag(plan.add_speech(rng, heard, language)) + trainable(written) for heard, written in parts)


def itts(plan: MediaPlan, rng: random.Random) -> Source:
    """Tells text_1 audio_1 text_2 audio_2: every sentence is followed by its speech; loss on all but the first text."""
    words, language = _story(rng, 2)
    first, second = (speech_tag(plan.add_speech(rng, sentence, language)) for sentence in words)
    return join([words[0], trainable(first + words[1] + second)])


def pure_audio(plan: MediaPlan, rng: random.Random) -> Source:
    """Speaks a story without any text; loss on the audio."""
    words, language = _story(rng, 2)
    return trainable(join(speech_tag(plan.add_speech(rng, sentence, language)) for sentence in words))


def _choose_video(plan: MediaPlan, rng: random.Random, cuts: bool = True) -> VideoFile:
    return rng.choice([clip for clip in plan.videos if cuts or clip.video.move != "cut"])


def video_caption(plan: MediaPlan, rng: random.Random) -> Source:
    """Shows a video and describes it, with a request before it or without."""
    language, clip = rng.choice(LANGUAGES), _choose_video(plan, rng)
    words = scenes.video_caption_text(clip.video, language)
    if rng.random() < 0.5:
        return video_tag(clip.path) + trainable(words)
    return turn(video_tag(clip.path) + DESCRIBE_VIDEO[language], words)


def video_qa(plan: MediaPlan, rng: random.Random) -> Source:
    """Shows a video and asks a question about it."""
    language, clip = rng.choice(LANGUAGES), _choose_video(plan, rng)
    question, answer = rng.choice(scenes.video_questions(clip.video, language))
    return turn(video_tag(clip.path) + question, answer, _system(rng, language))


def image_audio_text(plan: MediaPlan, rng: random.Random) -> Source:
    """Shows an image and asks a spoken question about it; a held-out one has a short answer."""
    language = rng.choice(LANGUAGES)
    path, crop = plan.add_image(rng)
    question, answer = rng.choice(scenes.questions(crop, language)[int(plan.held_out) :])
    return turn(image_tag(path) + audio_tag(plan.add_speech(rng, question, language)), answer)


def video_audio_text(plan: MediaPlan, rng: random.Random) -> Source:
    """Shows a video with its own audio track and asks a written question about either."""
    clip = _choose_video(plan, rng)
    spoken = {"en": ("What does the voice say?", clip.track.text), "zh": ("视频里的声音说了什么？", clip.track.text)}
    question, answer = rng.choice([spoken[clip.language], *scenes.video_questions(clip.video, clip.language)])
    return turn(video_tag(clip.path) + audio_tag(clip.path) + question, answer)


def _same_place(crop: Crop, clip: VideoFile, language: str) -> scenes.Answer:
    same = crop.photo == clip.video.first.photo
    if language == "zh":
        return "图片和视频拍的是同一个地方吗？", "是的，是同一个地方。" if same else "不是，是两个不同的地方。"
    question = "Do the picture and the video show the same place?"
    return question, "Yes, they show the same place." if same else "No, they show two different places."


def mixed(plan: MediaPlan, rng: random.Random, *, modalities: str) -> Source:
    """Mixes any of image (i), video (v), spoken question (a) and spoken answer (s) in one turn, with text."""
    language = rng.choice(LANGUAGES)
    media, pair = Source(), ("", "")
    crop: Crop | None = None
    clip: VideoFile | None = None
    # The last medium is what the question is about; an image and a video together are compared.
    if "i" in modalities:
        path, crop = plan.add_image(rng)
        media += image_tag(path)
        pair = rng.choice(scenes.questions(crop, language))
    if "v" in modalities:
        clip = _choose_video(plan, rng, cuts="i" not in modalities)
        media += video_tag(clip.path)
        pair = rng.choice(scenes.video_questions(clip.video, language))
    if crop and clip:
        pair = _same_place(crop, clip, language)
    # Then either side of the turn is spoken, or both.
    question, answer = pair
    if "a" in modalities:
        question = audio_tag(plan.add_speech(rng, question, language))
    if "s" in modalities:
        answer = _speak_answer(plan, rng, answer, language)
    return turn(media + question, answer, _system(rng, language))


MIXED_SUBSETS = ("iv", "is", "vs", "iva", "ivs", "ias", "vas", "ivas")
"""Subsets of the modalities that no other type covers."""

RECIPES: dict[str, list[tuple[str, int, Maker]]] = {
    "text": [("text", 190, text), ("text_qa", 40, text_qa)],
    "image": [("caption", 80, caption), ("qa", 80, qa), ("interleaved", 20, interleaved)],
    "video": [("video_caption", 30, video_caption), ("video_qa", 30, video_qa)],
    "audio": [
        ("asr", 60, asr),
        ("tts", 50, tts),
        ("aqa", 40, aqa),
        ("s2tt", 20, s2tt),
        ("dialogue", 24, dialogue),
        ("intlv", 20, intlv),
        ("itts", 20, itts),
        ("pure_audio", 16, pure_audio),
    ],
    "omni": [
        ("image_audio_text", 36, image_audio_text),
        ("video_audio_text", 36, video_audio_text),
        *(("mixed", 6, functools.partial(mixed, modalities=subset)) for subset in MIXED_SUBSETS),
    ],
}
"""Source -> (document type, how many, maker)."""

HELD_OUT: dict[str, list[tuple[str, int, Maker]]] = {
    "asr": [("asr", 32, asr)],
    "tts": [("tts", 24, tts)],
    "text_qa": [("text_qa", 32, text_qa)],
    "aqa": [("aqa", 32, aqa)],
    "image_qa": [("qa", 40, image_qa)],
    "video_qa": [("video_qa", 28, video_qa)],
    "image_aqa": [("image_audio_text", 32, image_audio_text)],
}
"""Ability -> (document type, how many, maker)."""

VIDEOS, HELD_OUT_VIDEOS = 36, 14


def plan_documents(seed: int) -> tuple[MediaPlan, dict[str, list[dict[str, str]]]]:
    """Plans every document of the data set, and the media they need: the same for a seed.

    Returns:
        The media, and the documents in manifest order, by source and by `held_out/ABILITY`.
    """
    # Held-out documents first: training avoids their crops.
    held_out, manifests = MediaPlan(held_out=True), {}
    held_out.add_videos(random.Random(f"{seed}/held-out films"), HELD_OUT_VIDEOS, scenes.video_caption_text)
    _plan_sources(held_out, {f"held_out/{name}": recipes for name, recipes in HELD_OUT.items()}, seed, manifests)
    # Videos first: documents refer to them, while images and speech are planned by the document that needs them.
    plan = MediaPlan(reserved=list(held_out.images.values()))
    plan.add_videos(random.Random(f"{seed}/films"), VIDEOS, scenes.video_caption_text)
    _plan_sources(plan, RECIPES, seed, manifests)
    return plan.join(held_out), manifests


def _plan_sources(
    plan: MediaPlan, sources: dict[str, list[tuple[str, int, Maker]]], seed: int, manifests: dict[str, list[dict]]
) -> None:
    """Adds the documents of these sources to `manifests`."""
    for source, recipes in sources.items():
        # A generator for each source: a change to one leaves the others' documents as they are.
        rng = random.Random(f"{seed}/{source}")
        documents, made = [], {}
        for kind, count, maker in recipes:
            for _ in range(count):
                number = made[kind] = made.get(kind, 0) + 1
                name = f"{source}-{number:04d}" if plan.held_out else f"{kind}-{number:04d}"
                documents.append({"id": name, "type": kind, "text": maker(plan, rng)})
        # Shuffled: a reader that takes the first documents of a manifest sees every type.
        rng.shuffle(documents)
        manifests[source] = documents
