"""A HiFT vocoder's own file (`hift.pt`) <-> the branch `vocoder`. Weight-norm pairs stay pairs."""

from baichuan_omni_jax.convert.blocks import linear
from baichuan_omni_jax.convert.rules import Rule
from baichuan_omni_jax.vocoder.config import VocoderConfig

# Convolutions of the F0 predictor; activations lie between them there.
F0_CONVS = 5


def vocoder_rules(cfg: VocoderConfig) -> list[Rule]:
    """Most names are the checkpoint's; its convolutions are (out, in, kernel), ours (kernel, in, out)."""
    convs = {f"f0_predictor.condnet.{2 * i}": f"f0_predictor.convs.{i}" for i in range(F0_CONVS)}
    convs |= {name: name for name in ("conv_pre", "conv_post")}
    for blocks in ("resblocks.{n}", "source_resblocks.{n}"):
        convs |= {f"{blocks}.{part}.{{i}}": f"{blocks}.{part}.{{i}}" for part in ("convs1", "convs2")}
    return [
        *[rule for theirs, ours in convs.items() for rule in _normed(theirs, ours, "o i k -> k i o")],
        # Axis 0 of a transposed convolution is its input.
        *_normed("ups.{n}", "ups.{n}", "i o k -> k i o"),
        *linear("f0_predictor.classifier", "f0_predictor.classifier"),
        *linear("m_source.l_linear", "source.linear"),
        Rule("source_downs.{n}.weight", "source_downs.{n}.weight", "o i k -> k i o"),
        Rule("source_downs.{n}.bias", "source_downs.{n}.bias"),
        *[
            Rule(f"{blocks}.{part}.{{i}}.alpha", f"{blocks}.{part}.{{i}}.alpha")
            for blocks in ("resblocks.{n}", "source_resblocks.{n}")
            for part in ("activations1", "activations2")
        ],
    ]


def _normed(theirs: str, ours: str, axes: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.weight_v", f"{ours}.weight_v", axes),
        Rule(f"{theirs}.weight_g", f"{ours}.weight_g", "n 1 1 -> n"),
        Rule(f"{theirs}.bias", f"{ours}.bias"),
    ]
