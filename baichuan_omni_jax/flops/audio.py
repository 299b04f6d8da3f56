"""Model FLOPs of the tasks that train on audio: what a clip holds at every rate, and the products that read it.

The rules are those of `flops/terms.py`. Rates of a clip of 3000 mel frames, released sizes:

    mel frames 3000 -> encoder 1500 -> codes 375 -> decoder 1499 (4 x 375 - 1) -> decoded mel 1873 (5/8 of 2 x 1499)
                                                    flow  1499

The encoder sees 1500^2 pairs, the decoder and the pre-net 1499 x 1500 / 2, the estimator (causal by chunks of 100)
100^2 x (1 + ... + 14) + 99 x 1499. The search of a code counts a product with every code of its level; no gradient
passes there.
"""

import math
from typing import Any

import numpy as np

from baichuan_omni_jax.branches import BRANCHES
from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.config.mel_targets import run_mel_targets
from baichuan_omni_jax.flops.terms import FlopTerm, language_terms

# Those of `audio/decoder.py` and `flow/model.py`, which import jax; tests/flops holds them equal.
POST_NET_KERNEL, FLOW_KERNEL, ATTENTION_CHUNK = 5, 3, 100

_TOKENIZER, _DECODER = BRANCHES["audio_encoder"].path(), BRANCHES["audio_decoder"].path()
_ENCODER, _BRIDGE = (BRANCHES["audio_encoder"].path(part) for part in ("encoder", "bridge"))
_PRENET, _ESTIMATOR = (BRANCHES["flow"].path(part) for part in ("prenet", "estimator"))

# Integers (any shape), of numpy on the host or of jax on device; naming jax's type would import it.
Lengths = Any


def count_clips(mel_lengths: Lengths, omni: OmniConfig, flow_lengths: Lengths | None = None) -> dict[str, Any]:
    """Counts what clips of so many mel frames (0: an unused slot) hold, summed as fp32.

    `clips`, `mel_frames`, `encoder_frames`, `code_frames`, `decoder_frames`, `decoded_mel_frames`; pairs that attention
    sees: `encoder_pairs`, `decoder_pairs`. With `flow_lengths`, the frames of the 24 kHz mels, also `flow_frames`,
    `flow_pairs` of the pre-net and `flow_chunk_pairs` of the estimator.
    """
    audio = omni.audio
    # Lengths along the way, each from the one before: mel, encoder, codes, decoder states.
    encoder = (mel_lengths - 1) // audio.stride_size + 1
    codes = encoder // audio.avg_pooler
    hidden = _upsampled(codes, audio.decoder_kernel_size, audio.avg_pooler)
    found = {
        "clips": mel_lengths > 0,
        "mel_frames": mel_lengths,
        "encoder_frames": encoder,
        "encoder_pairs": encoder**2,
        "code_frames": codes,
        "decoder_frames": hidden,
        "decoder_pairs": _causal(hidden),
        "decoded_mel_frames": _decoded_mel(hidden, omni),
    }
    if flow_lengths is not None:
        flow = hidden.__array_namespace__().minimum(hidden, flow_lengths)
        # Causal by chunks: a frame sees its own chunk and those before, the last chunk perhaps cut.
        whole, rest = flow // ATTENTION_CHUNK, flow % ATTENTION_CHUNK
        chunked = ATTENTION_CHUNK**2 * _causal(whole) + rest * flow
        found |= {"flow_frames": flow, "flow_pairs": _causal(flow), "flow_chunk_pairs": chunked}
    # fp32, as pairs of many clips exceed an int32.
    return {name: count.astype(np.float32).sum() for name, count in found.items()}


def full_mel_slots(run: RunConfig, omni: OmniConfig, mel_slot_frames: int) -> dict[str, float]:
    """Counts a global batch whose mel slots, of `mel_slot_frames`, are all full."""
    # Every slot of every row, full; the target's frames by the ratio of the two rates.
    clips = np.full(run.data.rows * run.data.budgets.mel_windows, mel_slot_frames, np.int64)
    target = run_mel_targets(run, omni).get("flow")
    samples = clips * omni.audio.hop_length
    flow = samples * target.rate // omni.audio.sampling_rate // target.hop if target else None
    return {name: float(count) for name, count in count_clips(clips, omni, flow).items()}


def tokenizer_terms(omni: OmniConfig, reads: bool) -> tuple[FlopTerm, ...]:
    """Lists every matrix product of a step of the audio tokenizer, those of the frozen LM only if it `reads`."""
    terms = (*_encoder(omni), *_states(omni), *_mel(omni))
    if not reads:
        return terms
    adapter = BRANCHES["transcript_adapter"].path()
    sizes = {f"{adapter}proj.weight": omni.audio.code_dim * omni.llm.hidden_size}
    return (
        *terms,
        FlopTerm("llm", "adapter", (_TOKENIZER, f"{adapter}norm."), "code_frames", sizes),
        *language_terms(omni),
    )


def flow_terms(omni: OmniConfig) -> tuple[FlopTerm, ...]:
    """Lists every matrix product of a flow-matching step: the frozen tokenizer up to the decoder's states, the flow."""
    return (*_encoder(omni), *_states(omni), *_prenet(omni), *_estimator(omni))


def _encoder(omni: OmniConfig) -> tuple[FlopTerm, ...]:
    cfg = omni.audio
    d, f, k = cfg.d_model, cfg.code_dim, cfg.kernel_size
    conv1, conv2, layers = (f"{_ENCODER}{name}." for name in ("conv1", "conv2", "layers"))
    gate, up, down = (f"{_BRIDGE}{name}_proj." for name in ("gate", "up", "down"))
    # The search compares with every code: a product of a frame with the whole codebook.
    levels = {f"{_TOKENIZER}quantizer.levels.{q}.embed": size * f for q, size in enumerate(cfg.codebook_sizes)}
    return (
        FlopTerm("encoder", "mel", (), "mel_frames", {f"{conv1}linear.weight": k * cfg.num_mel_bins * d}),
        FlopTerm("encoder", "convolution", (conv1,), "encoder_frames", {f"{conv2}linear.weight": k * d * d}),
        FlopTerm(
            "encoder",
            "layers",
            (conv1, conv2, layers),
            "encoder_frames",
            _layers(layers, cfg.encoder_layers, d, d, cfg.encoder_ffn_dim),
            pairs="encoder_pairs",
            attention=cfg.encoder_layers * 2 * d,
        ),
        FlopTerm("encoder", "bridge in", (_ENCODER,), "code_frames", {f"{x}weight": f * f for x in (gate, up)}),
        FlopTerm("encoder", "bridge out", (_ENCODER, gate, up), "code_frames", {f"{down}weight": f * f}),
        FlopTerm("quantizer", "codes", (), "code_frames", levels),
    )


def _states(omni: OmniConfig) -> tuple[FlopTerm, ...]:
    """Lists the decoder up to its states at 50 Hz."""
    cfg = omni.audio
    d, k = cfg.d_model, cfg.decoder_kernel_size
    proj, dconv, layers = (f"{_DECODER}{name}." for name in ("proj_decoder", "dconv1", "layers"))
    return (
        FlopTerm("decoder", "in", (_TOKENIZER,), "code_frames", {f"{proj}weight": cfg.code_dim * d}),
        FlopTerm("decoder", "upsampling", (_TOKENIZER, proj), "code_frames", {f"{dconv}conv.weight": k * d * d}),
        FlopTerm(
            "decoder",
            "layers",
            (_TOKENIZER, proj, dconv, layers),
            "decoder_frames",
            _layers(layers, cfg.decoder_layers, d, d, cfg.decoder_ffn_dim),
            pairs="decoder_pairs",
            attention=cfg.decoder_layers * 2 * d,
        ),
    )


def _mel(omni: OmniConfig) -> tuple[FlopTerm, ...]:
    """Lists what leads from the decoder's states to coarse and refined mel. The post-net is taken as one."""
    cfg, post = omni.audio, omni.post_net
    d, mels, before = cfg.d_model, post.num_mel_bins, (_TOKENIZER, _DECODER)
    # A convolution of kernel k is k products of the width in with the width out.
    widths = (mels, *post.channels[:-1])
    blocks = {
        f"{_DECODER}post_net.blocks.{i}.conv.linear.weight": POST_NET_KERNEL * widths[i] * widths[i + 1]
        for i in range(len(widths) - 1)
    }
    last = {f"{_DECODER}post_net.out.linear.weight": widths[-1] * mels}
    coarse = {f"{_DECODER}dconv2.conv.weight": cfg.decoder_kernel_size * d * mels}
    return (
        FlopTerm("decoder", "coarse mel", before, "decoder_frames", coarse),
        FlopTerm("decoder", "post-net", before, "decoded_mel_frames", blocks | last),
    )


def _prenet(omni: OmniConfig) -> tuple[FlopTerm, ...]:
    cfg = omni.flow
    d, layers = cfg.prenet_d_model, f"{_PRENET}layers."
    fc1, fc2 = f"{_PRENET}in_fc1.", f"{_PRENET}in_fc2."
    return (
        FlopTerm("flow", "pre-net in", (), "flow_frames", {f"{fc1}weight": cfg.prenet_in_dim * 4 * d}),
        FlopTerm("flow", "pre-net in", (fc1,), "flow_frames", {f"{fc2}weight": 4 * d * d}),
        FlopTerm(
            "flow",
            "pre-net layers",
            (fc1, fc2, layers),
            "flow_frames",
            _layers(layers, cfg.prenet_layers, d, d, cfg.prenet_ffn_dim),
            pairs="flow_pairs",
            attention=cfg.prenet_layers * 2 * d,
        ),
        FlopTerm(
            "flow", "pre-net out", (_PRENET,), "flow_frames", {f"{_PRENET}out_proj.weight": d * cfg.prenet_out_dim}
        ),
    )


def _estimator(omni: OmniConfig) -> tuple[FlopTerm, ...]:
    """Lists the velocity estimator: gradients pass from it into the pre-net, not into the noisy mel or the time."""
    cfg, whole = omni.flow, (_PRENET, _ESTIMATOR)
    w, heads, k = cfg.channels[0], cfg.num_heads * cfg.attention_head_dim, FLOW_KERNEL
    # Blocks of a stage, and the channels that come in: noisy mel and mu, then the skip beside the current ones.
    stages = {"down": (1, 2 * cfg.in_channels), "mid": (cfg.num_mid_blocks, w), "up": (1, 2 * w)}
    convs, layers, first = {}, {}, {}
    for name, (count, width_in) in stages.items():
        # The first convolution reads the input, through which no gradient passes but to mu.
        into = first if name == "down" else convs
        resnet = f"{_ESTIMATOR}{name}.resnet."
        into[f"{resnet}block1.conv.linear.weight"] = count * k * width_in * w
        into[f"{resnet}shortcut.linear.weight"] = count * width_in * w
        convs[f"{resnet}block2.conv.linear.weight"] = count * k * w * w
        layers |= _layers(f"{_ESTIMATOR}{name}.layers.", count * cfg.n_blocks, w, heads, 4 * w)
    convs |= {f"{_ESTIMATOR}{name}.linear.weight": k * w * w for name in ("down_conv", "up_conv", "final_block.conv")}
    convs[f"{_ESTIMATOR}final_proj.linear.weight"] = w * cfg.in_channels
    count = sum(count for count, _ in stages.values())
    # The time is embedded once a clip and projected into every stage.
    times = {f"{_ESTIMATOR}{name}.resnet.time_proj.weight": 4 * w * w * n for name, (n, _) in stages.items()}
    time1, time2 = f"{_ESTIMATOR}time_fc1.", f"{_ESTIMATOR}time_fc2."
    return (
        FlopTerm("flow", "estimator in", (_PRENET,), "flow_frames", first),
        FlopTerm("flow", "estimator convolutions", whole, "flow_frames", convs),
        FlopTerm(
            "flow",
            "estimator layers",
            whole,
            "flow_frames",
            layers,
            pairs="flow_chunk_pairs",
            attention=count * cfg.n_blocks * 2 * heads,
        ),
        FlopTerm("flow", "time", (), "clips", {f"{time1}weight": 2 * cfg.in_channels * 4 * w}),
        FlopTerm("flow", "time", (time1,), "clips", {f"{time2}weight": (4 * w) ** 2}),
        FlopTerm("flow", "time of stages", (time1, time2), "clips", times),
    )


def _layers(path: str, count: int, d: int, heads: int, ffn: int) -> dict[str, int]:
    """Counts multiply-adds a frame of `count` transformer layers of width d."""
    layer = {f"attention.{x}_proj.weight": d * heads for x in "qkvo"}
    layer |= {"mlp.fc1.weight": d * ffn, "mlp.fc2.weight": ffn * d}
    return {f"{path}{name}": count * size for name, size in layer.items()}


def _upsampled(frames: Lengths, kernel: int, stride: int) -> Lengths:
    """Counts the frames that `UpsampleBlock` makes."""
    return (frames > 0) * ((frames - 1) * stride + kernel - max(0, kernel - stride))


def _decoded_mel(hidden: Lengths, omni: OmniConfig) -> Lengths:
    audio, post = omni.audio, omni.post_net
    # The decoder makes 100 Hz, the post-net's mel is resampled to its own rate, rounded down.
    rise, fall = audio.hop_length * post.sampling_rate, audio.sampling_rate * post.hop_length
    common = math.gcd(rise, fall)
    frames = _upsampled(hidden, audio.decoder_kernel_size, audio.decoder_stride_size)
    return frames * (rise // common) // (fall // common)


def _causal(frames: Lengths) -> Lengths:
    return frames * (frames + 1) // 2
