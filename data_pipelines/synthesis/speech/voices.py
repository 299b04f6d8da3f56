"""The 44 eSpeak voices by name, 22 English and 22 Mandarin: accent x variant x pitch x rate.

`en-us/m3/low/fast` is American English, eSpeak's third male variant, low and fast; `en` is British, `plain` an accent
without a variant. Any name of this form can be asked for; `VOICES` are those that a job draws from.
"""

from dataclasses import dataclass

LANGUAGES = ("en", "zh")
PITCHES = {"low": 35, "mid": 50, "high": 65}
"""eSpeak's pitch, 0-100."""
RATES = {"slow": 150, "medium": 175, "fast": 200}
"""Words a minute."""

_ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbclan", "en-us-nyc")
_VARIANTS = ("plain", "m1", "m2", "m3", "m4", "m6", "m8", "f1", "f2", "f3", "f4")


@dataclass(frozen=True)
class Voice:
    """What eSpeak is told: its name for the voice, pitch 0-100, rate in words a minute."""

    espeak: str
    pitch: int
    rate: int


def _table() -> dict[str, tuple[str, ...]]:
    """Every variant twice in each language: once as it is, once low and fast or high and slow."""
    english, chinese = [], []
    for place, variant in enumerate(_VARIANTS):
        changed = ("low/fast", "high/slow")[place % 2]
        for turn, manner in enumerate(("mid/medium", changed)):
            accent = _ACCENTS[(2 * place + turn) % len(_ACCENTS)]
            english.append(f"{accent}/{variant}/{manner}")
            chinese.append(f"cmn/{variant}/{manner}")
    return {"en": tuple(english), "zh": tuple(chinese)}


VOICES = _table()


def parse_voice(name: str, language: str) -> Voice:
    """The voice called `name`. Raises ValueError when it has another form or speaks another language."""
    parts = name.split("/")
    if len(parts) != 4 or parts[2] not in PITCHES or parts[3] not in RATES:
        raise ValueError(
            f"voice {name!r} is not ACCENT/VARIANT/PITCH/RATE with a pitch of {', '.join(PITCHES)} "
            f"and a rate of {', '.join(RATES)}"
        )
    accent, variant, pitch, rate = parts
    if (language == "zh") != accent.startswith("cmn"):
        raise ValueError(f"voice {name!r} does not speak {language!r}")
    return Voice(accent if variant == "plain" else f"{accent}+{variant}", PITCHES[pitch], RATES[rate])
