"""Retired words stay out: the glossary (docs/glossary.md) has what is said instead."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("baichuan_omni_jax", "data_pipelines", "configs", "launch", "benchmarks", "tools", "docs", ".github")
SUFFIXES = {".py", ".md", ".sh", ".yml", ".toml", ".cff"}

# Regular expression -> what to say. Identifiers are whole words; `\b` stands around each.
IDENTIFIERS = {
    r"open_or_fill": "open_or_build",
    r"(?:Listening|Hearing|Speaks|Speaker)(?= *[\[(:.|,)\]=])": "PromptAudioEncoder, AudioSampleLogger, SpeechDecoder",
    r"VoiceModel": "FlowMatchingModel",
    r"TextPiece": "TextDelta",
    r"new_row|next_items": "init_slot, advance",
    r"FEW": "MAX_FAST_TOP_K",
    r"sound_every|SoundConfig|sound_samples": "audio_every, AudioConfig, audio_samples",
    r"go_on": "continue_from, resume_state",
    r"is_leader": "is_process_zero",
    r"Studio": "MediaPlan",
}
WORDS = {
    r"quantis\w*|resynthesis\w*|normalis\w*|recognis\w*|initialis\w*|optimis(?:e|er|ing|ation)\w*|serialis\w*": "…iz…",
    r"neighbour\w*|colour\w*|behaviour\w*|centre[sd]?|labelled|favour\w*|grey": "American spelling",
    r"MODEL\.md|HOUSE\.md|DESIGN\.md": "the fact itself, or the paper",
    r"\.\./shared": "nothing outside the repository",
    r"learnt": "learned",
}
RETIRED = IDENTIFIERS | WORDS
# Where an old word is refused or quoted, and the changes of released versions.
ALLOWED = {
    "docs/glossary.md",
    "CHANGELOG.md",
    "baichuan_omni_jax/config/overrides.py",
    # Texts of the sample data are data.
    "data_pipelines/sample/photographs.py",
    "data_pipelines/sample/scenes.py",
    "data_pipelines/sample/texts.py",
}


def sources() -> list[Path]:
    """Lists the files whose words count."""
    files = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*")) if p.suffix in SUFFIXES]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    generated = ROOT / "docs" / "reference" / "api"
    return [p for p in files if generated not in p.parents and "_build" not in p.parts]


@pytest.mark.parametrize("pattern", sorted(RETIRED))
def test_a_retired_word_stays_out(pattern):
    word = re.compile(rf"\b(?:{pattern})(?!\w)")
    found = []
    for path in sources():
        name = str(path.relative_to(ROOT))
        if name not in ALLOWED:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                match = word.search(line)
                # A key that was renamed stands beside its new name.
                if match and match[0].replace("is", "iz") not in line.replace(match[0], ""):
                    found.append(f"{name}:{number}: {match[0]}")
    assert not found, f"say {RETIRED[pattern]}:\n" + "\n".join(found[:40])
