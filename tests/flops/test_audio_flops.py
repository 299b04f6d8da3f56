"""Model FLOPs of the tasks that train on audio, against every product of the traced gradient; counts of clips."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_omni_jax.audio import decoder as audio_decoder
from baichuan_omni_jax.audio.quantizer_training import CodebookState, quantize_in_training
from baichuan_omni_jax.config import QuantizerConfig, baichuan_omni_7b, load_run_config, resolve_model, tiny
from baichuan_omni_jax.flops.audio import (
    ATTENTION_CHUNK,
    FLOW_KERNEL,
    POST_NET_KERNEL,
    count_clips,
    flow_terms,
    tokenizer_terms,
)
from baichuan_omni_jax.flops.terms import flops_by_branch, flops_by_term
from baichuan_omni_jax.flow import model as flow_model
from baichuan_omni_jax.flow.matching import flow_losses
from baichuan_omni_jax.nn.param import ComputePolicy, named_values, with_values
from baichuan_omni_jax.omni.audio_tokenizer_model import AudioTokenizerModel, Clips
from baichuan_omni_jax.omni.batch import BATCH_AXES
from baichuan_omni_jax.omni.flow_matching_model import FlowMatchingModel
from baichuan_omni_jax.sharding import ShardingRules
from baichuan_omni_jax.train.preflight import Packing
from baichuan_omni_jax.train.state import make_compute, make_task
from tests.flops.test_omni_flops import needed, products
from tests.helpers.micro import REPOSITORY, one_device

CLIPS, FRAMES, TOKENS = 2, 256, 48
CODES = FRAMES // 8


def gradient_products(make_model, loss, frozen: tuple[str, ...]) -> tuple[int, list[str]]:
    """FLOPs of the gradient of `loss(model)` with whole attention matrices, and what trains: all but `frozen`."""
    with jax.set_mesh(one_device()):
        compute = ComputePolicy(rules=ShardingRules(), remat="none", attention="reference")
        model = jax.eval_shape(lambda: make_model(jax.random.key(0), compute))
        values = named_values(model)
        trainable = {name: value for name, value in values.items() if not name.startswith(frozen)}
        still = {name: value for name, value in values.items() if name not in trainable}
        gradient = jax.value_and_grad(lambda trainable, still: loss(with_values(model, still | trainable)))
        return products(needed(jax.make_jaxpr(gradient)(trainable, still))), list(trainable)


def whole(counts: dict[str, float]) -> dict[str, float]:
    """Counts of clips of one length as the trace computes them: every query with every key."""
    pairs = {name: counts[f"{name}_frames"] ** 2 / CLIPS for name in ("encoder", "decoder")}
    found = counts | {f"{name}_pairs": value for name, value in pairs.items()}
    if "flow_frames" in counts:
        found |= dict.fromkeys(("flow_pairs", "flow_chunk_pairs"), counts["flow_frames"] ** 2 / CLIPS)
    return found


def clips(omni) -> Clips:
    return Clips(jnp.zeros((CLIPS, FRAMES, omni.audio.num_mel_bins)), jnp.full(CLIPS, FRAMES, jnp.int32))


def counts_of(omni, flow_lengths=None) -> dict[str, float]:
    found = count_clips(np.full(CLIPS, FRAMES), omni, flow_lengths)
    return whole({name: float(value) for name, value in found.items()})


def test_the_tokenizer_counts_the_products_of_its_gradient():
    """Encoder, bridge, code search, decoder and post-net train; gradients pass the frozen language model."""
    omni = tiny()
    sizes = dict.fromkeys(("tokens", "positions", "segment_ids"), TOKENS) | {"mel_audio": 1, "audio_index": CODES}

    def loss(model):
        spec = lambda name: model.compute.rules.spec(*BATCH_AXES[name])  # noqa: E731
        batch = {n: jax.sharding.reshard(jnp.zeros((CLIPS, k), jnp.int32), spec(n)) for n, k in sizes.items()}
        states = [
            CodebookState(level.embed[...], level.embed_avg[...], level.cluster_size[...], jnp.zeros(size, jnp.int32))
            for level, size in zip(model.audio_encoder.quantizer.levels, omni.audio.codebook_sizes, strict=True)
        ]
        features, valid = model.audio_encoder.features(*clips(omni))
        made = quantize_in_training(
            jax.random.key(0), features, valid, states, jnp.ones((), jnp.int32), QuantizerConfig(), model.compute
        )
        decoded = model.decode(made.features, valid)
        total = decoded.refined_mel.sum() + decoded.coarse_mel.sum() + made.commitment
        return total + model.llm.logits(model.transcript_states(made.features, valid, batch)).sum()

    frozen = ("llm.", "audio_encoder.quantizer.")
    found, trainable = gradient_products(lambda key, compute: AudioTokenizerModel(key, omni, compute), loss, frozen)
    counts = counts_of(omni) | dict.fromkeys(("tokens", "text_targets"), CLIPS * TOKENS)
    counts["causal_pairs"] = CLIPS * TOKENS**2
    expected = flops_by_branch(tokenizer_terms(omni, reads=True), counts, trainable)
    assert sum(expected.values()) == pytest.approx(found, rel=1e-9)
    del expected["llm"]
    assert flops_by_branch(tokenizer_terms(omni, reads=False), counts, trainable) == expected


@pytest.mark.slow
def test_flow_matching_counts_the_products_of_its_gradient():
    """The frozen tokenizer forward only (but the search of codes, a kernel's own matter), the flow both ways."""
    omni = tiny()

    def loss(model):
        features, valid = model.audio_encoder.features(*clips(omni))
        decoded = model.audio_decoder(features, valid.sum(-1, dtype=jnp.int32))
        hidden, lengths = jax.lax.stop_gradient(decoded.hidden), decoded.hidden_lengths
        mel = jnp.zeros((*hidden.shape[:2], omni.flow.in_channels))
        flow, prior = flow_losses(jax.random.key(0), model.flow, hidden, mel, lengths, condition_dropout=0.2)
        return flow + prior

    found, trainable = gradient_products(lambda key, compute: FlowMatchingModel(key, omni, compute), loss, ("audio_",))
    parts = flops_by_term(flow_terms(omni), counts_of(omni, np.full(CLIPS, FRAMES)), trainable)
    del parts["quantizer codes"]
    assert sum(parts.values()) == pytest.approx(found, rel=1e-9)


def test_counts_of_clips_of_several_lengths():
    """By hand at the released rates; pairs against a count of what each query sees. An unused slot counts nothing."""
    omni = baichuan_omni_7b()
    lengths, flow = np.asarray([[3000, 0], [801, 7]]), np.asarray([[1500, 0], [390, 3]])
    found = count_clips(lengths, omni, flow)
    on_device = jax.jit(lambda lengths, flow: count_clips(lengths, omni, flow))(lengths, flow)
    assert {name: float(value) for name, value in on_device.items()} == {
        name: float(value) for name, value in found.items()
    }
    assert found["clips"] == 3
    assert found["encoder_frames"] == 1500 + 401 + 4
    assert found["encoder_pairs"] == 1500**2 + 401**2 + 4**2
    assert found["code_frames"] == 375 + 100 + 1
    hidden = (1499, 399, 3)
    assert found["decoder_frames"] == sum(hidden)
    assert found["decoder_pairs"] == sum(n * (n + 1) / 2 for n in hidden)
    assert found["decoded_mel_frames"] == sum(2 * n * 5 // 8 for n in hidden)
    assert found["flow_frames"] == 1499 + 390 + 3
    seen = sum(min(n, (i // 100 + 1) * 100) for n in (1499, 390, 3) for i in range(n))
    assert found["flow_chunk_pairs"] == seen


def test_kernel_sizes_are_those_of_the_modules():
    """They stand twice, since the formulas import no jax."""
    assert (POST_NET_KERNEL, FLOW_KERNEL, ATTENTION_CHUNK) == (
        audio_decoder.KERNEL,
        flow_model.KERNEL,
        flow_model.ATTENTION_CHUNK,
    )


def test_formulas_need_no_jax():
    """Data pipelines read them in processes that never load it."""
    program = "import sys, baichuan_omni_jax.flops.audio, baichuan_omni_jax.flops.terms; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize("name", ["audio_tokenizer", "flow_matching"])
def test_preflight_states_what_the_parts_count(name):
    """Full slots give a number for every count that a part of the task reads, at the released sizes."""
    run = load_run_config(REPOSITORY / "configs" / f"{name}.py")
    omni = resolve_model(run.model)
    task = make_task(run, omni, make_compute(run))
    counts = Packing().counts(run, omni)
    flops = flops_by_branch(task.flop_terms(), counts, ())
    assert all(value > 0 for value in flops.values())
    assert counts["clips"] == run.data.rows * run.data.budgets.mel_windows
