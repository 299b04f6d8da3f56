"""A small model, open as harnesses have it, and the same as a checkpoint."""

import pytest

from baichuan_omni_jax.checkpoint import save_branches
from baichuan_omni_jax.generation.chat import ChatModel, OmniChat
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.integrations.harness_model import HarnessModel
from data_pipelines.documents.chat_prompt import ChatPrompts
from data_pipelines.documents.processor import Processor
from tests.helpers.engine_prompts import one_device, small_branches, small_config, tokenizer
from tests.helpers.fake_harnesses import harnesses

LENGTH = 128


@pytest.fixture(scope="session")
def branches():
    return small_branches(one_device(), small_config())


@pytest.fixture(scope="session")
def model(branches) -> HarnessModel:
    cfg, words = small_config(), tokenizer()
    engine = Engine(branches, cfg, words, slots=2, length=LENGTH, chunk=32)
    return HarnessModel(OmniChat(ChatModel(engine, cfg), ChatPrompts(Processor(cfg, words))), engine)


@pytest.fixture(scope="session")
def checkpoint(branches, tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness") / "checkpoint"
    save_branches(folder, branches, small_config(), tokenizer().to_str(), trained=dict.fromkeys(branches, 1))
    return folder


@pytest.fixture(scope="module")
def installed():
    """Doubles of the harnesses that are not here."""
    with harnesses():
        yield
