"""The machines that the recipe has sizes for, and what of a stage each of them takes of a model.

Rows, rates and the tokens of an update are the recipe's everywhere but on `v6e:16x16`, which takes twice as many tokens
in half the updates. A machine decides how many tokens a chip holds at a time, from which mesh, row length and
accumulation follow (`layout_of`), and where that is not enough what has to give: fp32 moments, then the parts of the
language model that train. `baichuan-omni preflight` says whether it fits.
"""

from dataclasses import dataclass
from typing import Literal

from baichuan_omni_jax.config.architecture import AudioConfig, LLMConfig
from baichuan_omni_jax.config.hf import resolve_model
from baichuan_omni_jax.config.model import MODELS, OmniConfig
from baichuan_omni_jax.config.run import Dtype, MeshConfig
from baichuan_omni_jax.errors import ConfigError

# Parts of the language model that train where a stage trains it: `layers` is all but its two tables of text.
Language = Literal["all", "layers", "attention"]
# As `preflight --topology` names them: JAX devices of each. Google's names are v5litepod-8 for v5e:2x4, v5p-8 for
# v5p:2x2x1 (of v5p it counts cores), v5p-16, v5p-128; v6e-8, v6e-32, v6e-256.
MACHINES: dict[str, int] = {
    "h100:1": 1,
    "v5e:2x4": 8,
    "v6e:2x4": 8,
    "v5p:2x2x1": 4,
    "v5p:2x2x2": 8,
    "v6e:4x8": 32,
    "v5p:4x4x4": 64,
    "v6e:16x16": 256,
}
# Of an update.
STEP_TOKENS = 2**20
RELEASED_MACHINE = "v5p:4x4x4"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What a machine takes of a model.

    A chip of 16384 tokens holds two rows of 8192 tokens or a quarter of one of 65536.
    """

    chip_tokens: int = 8192  # of rows, on one chip at a time
    moments: Dtype = "float32"  # `OptimizerConfig.moments_dtype`
    loss_chunk: int = 1024  # `ComputeConfig.loss_chunk`
    remat: str = "full"  # `ComputeConfig.remat`
    language: Language = "all"
    # Of a step, all at once, of the audio tokenizer and of flow matching: the recipe's where they fit.
    tokenizer_rows: int = 32
    flow_rows: int = 64


# Everything that a layer may keep (`nn/remat.py`): 67 of 95.7 GiB of a v5p with the 7 B model, and nothing of its
# products is made twice.
_KEPT = "attention_out+kv_gathered+qkv+mlp_in+mlp_gate_up"
# What preflight found to fit, and where it has not compiled for that, what is predicted to (docs/how-to/preflight.md).
# Of 14 B not all stages fit on h100:1 and v5e:2x4, whatever gives.
_FITS: dict[str, dict[str, Fit]] = {
    "h100:1": {
        "omni_0b5": Fit(chip_tokens=65536, flow_rows=32),
        "omni_1b5": Fit(chip_tokens=32768, flow_rows=32),
        "omni_3b": Fit(moments="bfloat16", tokenizer_rows=16, flow_rows=32),
        "baichuan_omni_7b": Fit(language="attention", tokenizer_rows=16, flow_rows=32),
        "omni_14b": Fit(moments="bfloat16", language="attention", tokenizer_rows=8, flow_rows=32),
    },
    "v5e:2x4": {
        "omni_0b5": Fit(),
        "omni_1b5": Fit(),
        "omni_3b": Fit(moments="bfloat16", language="layers"),
        "baichuan_omni_7b": Fit(chip_tokens=4096, language="attention"),
        "omni_14b": Fit(chip_tokens=4096, moments="bfloat16", language="attention", tokenizer_rows=16),
    },
    "v6e:2x4": {
        "omni_0b5": Fit(chip_tokens=16384),
        "omni_1b5": Fit(chip_tokens=16384),
        "omni_3b": Fit(),
        "baichuan_omni_7b": Fit(moments="bfloat16"),
        "omni_14b": Fit(chip_tokens=4096, moments="bfloat16", language="attention"),
    },
    "v5p:2x2x1": {name: Fit(chip_tokens=16384) for name in MODELS}
    | {"omni_14b": Fit(moments="bfloat16", language="layers")},
    "v5p:2x2x2": {name: Fit(chip_tokens=16384) for name in MODELS} | {"omni_14b": Fit()},
    "v6e:4x8": {name: Fit() for name in MODELS},
    "v5p:4x4x4": {name: Fit(chip_tokens=16384, loss_chunk=0, remat=_KEPT) for name in MODELS}
    | {"omni_14b": Fit(chip_tokens=16384, loss_chunk=0)},
    "v6e:16x16": {name: Fit(loss_chunk=0) for name in MODELS},
}
# The models that the recipe has sizes for, from the smallest to the largest.
SIZED_MODELS = tuple(_FITS["h100:1"])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a step's rows lie on a machine."""

    mesh: MeshConfig
    tokens: int  # of a row
    rows: int  # of a step
    accumulate: int


def fit_of(model: str, machine: str, *, encoder: bool = False) -> Fit:
    """Finds what `machine` takes of `model`: a named model, or one of a `config.json`.

    The latter is taken for the smallest named one whose language model has at least as many parameters, with `encoder`
    its audio encoder too: that is no part of the stages' step, and most of the audio tokenizer's.

    Raises:
        ConfigError: an unknown machine or model, or a model larger than every named one.
    """
    if machine not in MACHINES:
        raise ConfigError(
            f"machine {machine!r} is not one that the recipe has sizes for ({', '.join(MACHINES)}): "
            "leave it out, and set mesh, data.budgets and train.accumulate"
        )
    if model not in MODELS:
        model = _named_like(resolve_model(model), model, encoder)
    return _FITS[machine].get(model, Fit())


def _named_like(omni: OmniConfig, model: str, encoder: bool) -> str:
    """The smallest named model that has no smaller part than `omni`, which `model` names in errors."""
    size, heard = language_parameters(omni.llm), encoder_parameters(omni.audio)
    for name, make in MODELS.items():
        named = make()
        if language_parameters(named.llm) >= size and not (encoder and encoder_parameters(named.audio) < heard):
            return name
    parts = f"{size / 1e9:.1f} B parameters" + f" and an audio encoder of {heard / 1e9:.1f} B" * encoder
    raise ConfigError(f"model {model}: {parts} are more than the recipe has sizes for")


def step_tokens_of(fit: Fit, machine: str) -> int:
    """Counts the tokens of an update: `STEP_TOKENS`, or what all chips hold at a time where that is more.

    With fewer tokens a chip, rows would be split into parts that have no room for the largest image.
    """
    return max(STEP_TOKENS, MACHINES[machine] * fit.chip_tokens)


def layout_of(fit: Fit, machine: str, tokens: int) -> Layout:
    """Lays out rows of at most `tokens` tokens, `step_tokens_of` a step.

    Rows longer than a chip holds are split over `context`, and cut to what all chips hold together.
    """
    chips, step_tokens = MACHINES[machine], step_tokens_of(fit, machine)
    tokens = min(tokens, chips * fit.chip_tokens)
    context = max(1, tokens // fit.chip_tokens)
    fsdp, rows = chips // context, step_tokens // tokens
    at_once = fsdp * max(1, fit.chip_tokens // tokens)
    return Layout(
        mesh=MeshConfig(fsdp=fsdp, context=context), tokens=tokens, rows=rows, accumulate=max(1, rows // at_once)
    )


def audio_layout_of(machine: str, tokens: int, rows: int, clips: int) -> Layout:
    """Lays out rows of `clips` clips, all of a step at once: codebooks are updated from whole batches.

    Where there are more chips than rows, a row's tokens and clips are split over `context`.

    Raises:
        ConfigError: more chips than clips in a step.
    """
    chips = MACHINES[machine]
    fsdp = min(chips, rows)
    if chips > rows * clips:
        raise ConfigError(f"machine {machine} has {chips} chips, and a step {rows} rows of {clips} clips: fewer chips")
    return Layout(mesh=MeshConfig(fsdp=fsdp, context=chips // fsdp), tokens=tokens, rows=rows, accumulate=1)


def language_parameters(llm: LLMConfig) -> int:
    """Counts the parameters of a language model, its untied head included.

    >>> language_parameters(resolve_model("baichuan_omni_7b").llm)
    7615616512
    """
    d, heads, groups = llm.hidden_size, llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
    attention = 2 * d * heads + heads + 2 * (d + 1) * groups
    layer = attention + 3 * d * llm.intermediate_size + 2 * d
    return 2 * llm.vocab_size * d + llm.num_layers * layer + d


def encoder_parameters(audio: AudioConfig) -> int:
    """Counts the matrices of an audio encoder's layers, which are nearly all of it.

    >>> encoder_parameters(resolve_model("baichuan_omni_7b").audio)
    629145600
    """
    return audio.encoder_layers * audio.d_model * (4 * audio.d_model + 2 * audio.encoder_ffn_dim)
