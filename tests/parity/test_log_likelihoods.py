"""Log-likelihoods of options, in MMLU's form and others, against transformers with the same Qwen2-shaped weights.

Needs the extra `parity`.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from baichuan_omni_jax.checkpoint import with_shardings
from baichuan_omni_jax.config import MeshConfig, tiny
from baichuan_omni_jax.convert import branch_rules, load_branch_from_safetensors
from baichuan_omni_jax.generation.engine import Engine
from baichuan_omni_jax.generation.loglikelihood import ScoringRequest
from baichuan_omni_jax.llm.model import LanguageModel
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.sharding import make_mesh
from data_pipelines.documents.document import encode_ids
from tests.helpers.state_dicts import Arrays

WHY = "the second oracle needs torch and transformers: pip install -e '.[test,parity]'"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

COMPUTE = ComputePolicy(attention_block=32, remat="none")
LENGTH, LETTERS = 160, (65, 66, 67, 68)


def theirs_and_ours():
    """A random Qwen2 of transformers, and an engine with its weights."""
    small = tiny()
    cfg = replace(small, llm=replace(small.llm, qkv_pack=False, vocab_size=400))
    llm = cfg.llm
    sizes = transformers.Qwen2Config(
        vocab_size=llm.vocab_size,
        hidden_size=llm.hidden_size,
        num_hidden_layers=llm.num_layers,
        num_attention_heads=llm.num_heads,
        num_key_value_heads=llm.num_kv_heads,
        intermediate_size=llm.intermediate_size,
        rms_norm_eps=llm.norm_eps,
        rope_theta=llm.rope_theta,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = transformers.Qwen2ForCausalLM(sizes).eval()
    with torch.no_grad():
        # Far from uniform, so that a wrong token or position would show.
        for parameter in theirs.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    tensors = {name: x.detach().numpy() for name, x in theirs.named_parameters()}
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    abstract = jax.eval_shape(lambda: LanguageModel(jax.random.key(0), llm, COMPUTE))
    placed = with_shardings(abstract, mesh, COMPUTE.rules, dtype=np.dtype("float32"), name="llm")
    with jax.set_mesh(mesh):
        ours = load_branch_from_safetensors(Arrays(tensors), branch_rules(cfg)["llm"], placed)
    return theirs, Engine({"llm": ours}, cfg, None, slots=1, length=LENGTH, chunk=32)


def reference(theirs, prompt: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt + continuation[:-1]])).logits[0, len(prompt) - 1 :].double()
    logprobs = logits.log_softmax(-1)
    targets = torch.tensor(continuation)
    return float(logprobs.gather(1, targets[:, None]).sum()), bool((logits.argmax(-1) == targets).all())


def test_options_have_the_log_likelihoods_of_transformers():
    """Sums within 1e-4; the same option wins; what is greedy there is greedy here."""
    theirs, engine = theirs_and_ours()
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(60, 400, n).tolist()  # noqa: E731
    # MMLU: examples that all questions share, a question, one of four letters.
    examples = draw(70)
    asked = [(examples + draw(n), [[letter] for letter in LETTERS]) for n in rng.integers(10, 60, 12)]
    # Other harnesses' form: whole options. And what the model itself would say.
    asked += [(draw(n), [draw(m) for m in (4, 1, 9, 2)]) for n in (1, 30, 90)]
    prompt = draw(20)
    said: list[int] = []
    for _ in range(5):
        with torch.no_grad():
            said.append(int(theirs(torch.tensor([prompt + said])).logits[0, -1].argmax()))
    asked.append((prompt, [said, [*said[:-1], 61]]))

    requests = [ScoringRequest(encode_ids(prompt, engine.cfg), options) for prompt, options in asked]
    worst = 0.0
    for (prompt, options), scores in zip(asked, engine.log_likelihoods(requests), strict=True):
        expected = [reference(theirs, prompt, option) for option in options]
        found = [(score.log_likelihood, score.is_greedy) for score in scores]
        worst = max(worst, *(abs(a[0] - b[0]) for a, b in zip(found, expected, strict=True)))
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert np.argmax([x for x, _ in found]) == np.argmax([x for x, _ in expected])
    print(f"largest difference {worst:.1e}")
    assert worst < 1e-4
    assert scores[0].is_greedy
