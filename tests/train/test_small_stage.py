"""A stage of the small recipe as it stands, from random weights: minutes of it, and an ability at their end."""

import pytest

from baichuan_omni_jax.cli.main import main
from data_pipelines.small.__main__ import build_small
from data_pipelines.small.documents import Counts
from data_pipelines.small.spoken import SpokenCounts
from tests.helpers.micro import read_metrics

SPOKEN = SpokenCounts(words=4, numbers=4, sentences=4, speech=6, questions=6, dialogue=4, held_out=4)
# All handwritten digits, three copies each, and next to nothing else.
DIGITS = Counts(digits=3, pictures=60, charts=40, motion=12, text=60, spoken=SPOKEN, held_out=100)


@pytest.mark.slow
def test_handwritten_digits_are_named_after_the_first_stage_of_seeing(tmp_path):
    """120 steps, on digits that no step had: most are named, of ten; with another's picture the answer costs more."""
    data = build_small(tmp_path / "data", counts=DIGITS, progress=False)
    given = {
        "data.root": data,
        "data.tokenizer": data / "tokenizer.json",
        # The recipe begins from the tokenizer's reader; the way from image to answer opens without it as well.
        "checkpoint.init_from": "llm=random,vision=random",
    }
    settings = [f"--set={key}={value}" for key, value in given.items()]
    workdir = tmp_path / "run"
    assert (
        main(["train", "--config", "configs/small/image_text_1_digits.py", "--workdir", str(workdir), *settings]) == 0
    )
    last = read_metrics(workdir)[-1]
    assert last["ability/digit/accuracy"] >= 0.5
    assert last["eval/held_out/digit/media_gain"] >= 1.0
