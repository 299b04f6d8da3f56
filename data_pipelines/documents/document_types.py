"""The words for what a document is, as its `type`. Any other may be used; the builder tells that it is not of these."""

DOCUMENT_TYPES: dict[str, str] = {
    "text": "text without media",
    "caption": "a picture and its description",
    "qa": "a picture, questions and answers",
    "ocr": "a picture of text, and the text",
    "chart": "a picture of a chart or table, and what it shows",
    "interleaved": "text with pictures in between",
    "asr": "speech, and its text",
    "aqa": "a spoken question, and its answer",
    "s2tt": "speech, and its text in another language",
    "tts": "text, and its speech to be generated",
    "intlv": "text and speech in turns, loss on the text",
    "itts": "text and speech in turns, loss on the speech",
    "pure_audio": "sound alone",
    "dialogue": "a conversation that is answered aloud, piece by piece",
    "video_caption": "a video and its description",
    "video_qa": "a video, questions and answers",
    "temporal_grounding": "a video, and when something happens in it",
    "cross_modal": "pictures or video, with part of the text spoken",
    "instruction": "turns of any of these, answered as told",
}


def is_known_type(word: str) -> bool:
    """Whether `word` is one of `DOCUMENT_TYPES`, written with any of space, `-`, `_` and in either case."""
    return word.lower().replace("-", "_").replace(" ", "_") in DOCUMENT_TYPES
