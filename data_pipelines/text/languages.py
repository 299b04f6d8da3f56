"""Which language a text is in, by its scripts and its commonest words.

Chinese and English share no letters, so that counting scripts tells them apart; a model of a hundred languages would
add megabytes, and mistakes on short texts. Others with the same letters are known by what these two never have (kana,
in Japanese) or never lack (the common words of English).
"""

import re

from data_pipelines.text.speech_segments import HAN

_LETTER = re.compile(r"[^\W\d_]")
_KANA = re.compile(r"[\u3040-\u30ff]")
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+(?:['’][A-Za-z]+)?")
_COMMON = frozenset(
    "the of and to in a is that it for was on are as with his they at be this have from or had by not but what all "
    "were we when your can said there an each which she do how their if will up other about out many then them these "
    "so some her would him into has more two he i you my me its our no yes who where why".split()
)

WORDS = 20  # Latin words from which the common ones count
COMMON_SHARE = 0.1  # of the words: English prose has 0.3 to 0.5
KANA_SHARE = 0.1  # of the letters, from which a text is Japanese
MINOR_SHARE = 0.2  # of the text, from which a second language counts


def detect_language(text: str) -> str:
    """Detects the text's language: "en", "zh", "mixed" for both, "other", or "none" without letters.

    A Chinese character counts as one, an English word as one.

    >>> detect_language("Good morning."), detect_language("早上好。"), detect_language("42!")
    ('en', 'zh', 'none')
    """
    letters, han, kana = (len(pattern.findall(text)) for pattern in (_LETTER, HAN, _KANA))
    words = _LATIN_WORD.findall(text)
    latin = sum(len(_LETTER.findall(word)) for word in words)
    if not letters:
        return "none"
    if kana > KANA_SHARE * letters or han + latin < 0.5 * letters:
        return "other"
    english = len(words) / (len(words) + han)
    if len(words) >= WORDS and english >= MINOR_SHARE:
        common = sum(word.lower() in _COMMON for word in words)
        if common < COMMON_SHARE * len(words):
            return "other"
    return "en" if english > 1 - MINOR_SHARE else "zh" if english < MINOR_SHARE else "mixed"


def language_of(text: str) -> str:
    """Returns the language of the two to speak a text in, "en" or "zh"; "" for a text in another one.

    Chinese voices speak English words, while English ones spell Chinese characters, so a mixed text is "zh".
    """
    return {"mixed": "zh", "none": "en", "other": ""}.get(found := detect_language(text), found)
