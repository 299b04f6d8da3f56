"""The runs that come before the recipe's stages, as data: the audio tokenizer, and flow matching on its codes.

The tokenizer's losses and the shares of its data are the paper's (arXiv:2502.17239); what it does not say is ours.
Sizes for a machine are those of `config/machines.py`, as of the stages.
"""

from typing import Literal, get_args

from baichuan_omni_jax.config.audio import FlowTrainConfig, QuantizerConfig, TokenizerTrainConfig
from baichuan_omni_jax.config.machines import Layout, audio_layout_of, fit_of
from baichuan_omni_jax.config.run import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    EvalMixture,
    GroupConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from baichuan_omni_jax.config.stages import held_out_of, mixture_of, path_in

# By their tasks' names, in the order they train in.
AudioRun = Literal["audio_tokenizer", "flow_matching"]
AUDIO_RUNS: tuple[AudioRun, ...] = get_args(AudioRun)

_CLIPS = 4  # of a row
_TOKENS = 2048  # of a row: its clips' code frames, and the text that goes with them
# Thousands of hours of ASR, spoken questions, translation of speech, text and speech in turns.
_HOURS = {"asr": 135.0, "aqa": 11.0, "s2tt": 9.0, "intlv": 52.0}
# The language model that reads the features stays as it is, so that they learn to be read.
_TOKENIZER_BRANCHES = ("audio_encoder", "audio_decoder", "transcript_adapter", "llm")
_LANGUAGE_MODEL = GroupConfig(name="language model", pattern=r"llm\.", learning_rate=None)
# The tokenizer that flow matching reads the codes of is frozen.
_FLOW_BRANCHES = ("audio_encoder", "audio_decoder", "flow")
_FROZEN_TOKENIZER = GroupConfig(name="tokenizer", pattern=".*", learning_rate=None)


def audio_tokenizer_run(*, model: str = "baichuan_omni_7b", machine: str = "v5p:2x2x2", home: str = "") -> RunConfig:
    """Returns the run that trains the audio tokenizer: encoder, codebooks and mel decoder, beside a frozen LLM.

    Args:
        model: a variant of `OmniConfig`, or the path of a Hugging Face config.json.
        machine: one of `MACHINES`, which decides the mesh, and the rows of a step where it does not hold all 32.
        home: the folder or URL that holds `data/speech` and `weights/omni`, as of `stage_run`.

    Raises:
        ConfigError: an unknown model or machine, or more chips than its rows can be split over.
    """
    steps = 100000
    # In which the share of quantized clips grows to all, and the noise on the choice of codes falls to none.
    growing = steps // 5
    layout = audio_layout_of(machine, _TOKENS, fit_of(model, machine, encoder=True).tokenizer_rows, _CLIPS)
    weights = path_in(home, "weights/omni")
    return RunConfig(
        name="audio_tokenizer",
        model=model,
        machine=machine,
        task="audio_tokenizer",
        branches=_TOKENIZER_BRANCHES,
        mesh=layout.mesh,
        # Tokens, 12.5 a second of audio, are the nearest to hours.
        data=_speech(_HOURS, layout, home, weights_by="tokens"),
        optimizer=OptimizerConfig(
            groups=(
                _LANGUAGE_MODEL,
                GroupConfig(name="encoder", pattern=r"audio_encoder\.encoder\.", learning_rate=1e-5),
                GroupConfig(name="tokenizer", pattern=".*", learning_rate=2e-4),
            ),
            warmup_steps=1000,
            decay_steps=steps,
        ),
        compute=ComputeConfig(remat="full", mlp_chunk=0, loss_chunk=512),
        train=TrainConfig(steps=steps),
        checkpoint=CheckpointConfig(
            every=1000,
            init_from=f"audio_encoder={weights},llm={weights},audio_decoder=random,transcript_adapter=random",
        ),
        tokenizer=TokenizerTrainConfig(
            commitment_start=0.05,
            quantizer=QuantizerConfig(
                decay=0.99,
                shrink=0.01,
                restart_after=200,
                init_steps=20,
                temperature=(0.05, 0.0),
                temperature_steps=growing,
                quantized_steps=growing,
            ),
        ),
    )


def flow_matching_run(*, model: str = "baichuan_omni_7b", machine: str = "v5p:2x2x2", home: str = "") -> RunConfig:
    """Returns the run that trains the flow-matching decoder on what `runs/audio_tokenizer`, frozen, makes of speech.

    Args:
        model: a variant of `OmniConfig`, or the path of a Hugging Face config.json.
        machine: one of `MACHINES`, which decides the mesh, and the rows of a step where it does not hold all 64.
        home: the folder or URL that holds `data/speech` and `runs/audio_tokenizer`, as of `stage_run`.

    Raises:
        ConfigError: an unknown model or machine, or more chips than its rows can be split over.
    """
    steps = 200000
    layout = audio_layout_of(machine, _TOKENS, fit_of(model, machine, encoder=True).flow_rows, _CLIPS)
    return RunConfig(
        name="flow_matching",
        model=model,
        machine=machine,
        task="flow_matching",
        branches=_FLOW_BRANCHES,
        mesh=layout.mesh,
        data=_speech({"tts": 0.5, "pure_audio": 0.5}, layout, home),
        optimizer=OptimizerConfig(
            groups=(GroupConfig(name="flow", pattern=r"flow\.", learning_rate=1e-4), _FROZEN_TOKENIZER),
            warmup_steps=1000,
            decay_steps=steps,
        ),
        compute=ComputeConfig(remat="full"),
        train=TrainConfig(steps=steps),
        checkpoint=CheckpointConfig(every=1000, init_from=_tokenizer_of(path_in(home, "runs/audio_tokenizer"))),
    )


def _speech(
    shares: dict[str, float], layout: Layout, home: str, weights_by: Literal["documents", "tokens"] = "documents"
) -> DataConfig:
    """Rows of at most four clips of 30 s, 376 code frames each."""
    return DataConfig(
        root=path_in(home, "data/speech"),
        mixture=mixture_of(shares),
        weights_by=weights_by,
        rows=layout.rows,
        budgets=Budgets(tokens=layout.tokens, patches=0, audio_frames=1504, audio_targets=1504, mel_windows=_CLIPS),
        mel_frames=(504, 1000, 2000, 3000),
    )


def _tokenizer_of(workdir: str) -> str:
    """`CheckpointConfig.init_from` of flow matching: from that tokenizer, and a random decoder."""
    return f"audio_encoder={workdir},audio_decoder={workdir},flow=random"


def tiny_audio_tokenizer() -> RunConfig:
    """Returns the tokenizer's run on the tiny model and the sample data's speech."""
    steps = 600
    return RunConfig(
        name="audio_tokenizer_tiny",
        model="tiny",
        task="audio_tokenizer",
        branches=_TOKENIZER_BRANCHES,
        data=_sample_speech(mel_frames=(256, 512)),
        optimizer=OptimizerConfig(
            groups=(_LANGUAGE_MODEL, GroupConfig(name="tokenizer", pattern=".*", learning_rate=2e-3)),
            warmup_steps=20,
            decay_steps=steps,
        ),
        compute=ComputeConfig(dtype="float32", remat="none", loss_chunk=256, attention_block=128),
        train=TrainConfig(steps=steps, frozen_dtype="float32"),
        checkpoint=CheckpointConfig(every=200, keep=1),
        eval=_held_out_speech(every=100, steps=12),
        tokenizer=TokenizerTrainConfig(
            transcript=0.1,
            commitment_start=0.05,
            quantizer=QuantizerConfig(
                decay=0.9,
                shrink=0.01,
                restart_after=20,
                init_steps=10,
                temperature=(0.05, 0.0),
                temperature_steps=steps // 3,
                quantized_share=0.1,
                quantized_steps=steps // 3,
            ),
        ),
    )


def tiny_flow_matching() -> RunConfig:
    """Returns the run of flow matching on the tiny model, behind the tokenizer of `runs/audio_tokenizer_tiny`."""
    steps = 1200
    return RunConfig(
        name="flow_matching_tiny",
        model="tiny",
        task="flow_matching",
        branches=_FLOW_BRANCHES,
        data=_sample_speech(mel_frames=(256,)),
        optimizer=OptimizerConfig(
            groups=(GroupConfig(name="flow", pattern=r"flow\.", learning_rate=1e-3), _FROZEN_TOKENIZER),
            warmup_steps=20,
            decay_steps=steps,
        ),
        compute=ComputeConfig(dtype="float32", remat="none", attention_block=128),
        train=TrainConfig(steps=steps, frozen_dtype="float32"),
        checkpoint=CheckpointConfig(every=500, keep=1, init_from=_tokenizer_of("runs/audio_tokenizer_tiny")),
        eval=_held_out_speech(every=300, steps=8),
        flow=FlowTrainConfig(ema=0.99),
    )


def _sample_speech(mel_frames: tuple[int, ...]) -> DataConfig:
    return DataConfig(
        root="data/sample",
        sample=True,
        mixture=mixture_of({"audio": 1.0}),
        rows=2,
        # Held-out documents have images, which take room and which nothing reads.
        budgets=Budgets(tokens=384, patches=256, audio_frames=256, audio_targets=256, mel_windows=_CLIPS),
        mel_frames=mel_frames,
        workers=1,
    )


def _held_out_speech(*, every: int, steps: int) -> EvalConfig:
    # No clip of omni.jsonl is in audio.jsonl; those of held_out/ are new sentences by new voices.
    sources = (SourceConfig(name="omni", manifest="omni.jsonl"),)
    mixtures = (
        EvalMixture(name="speech", sources=sources),
        held_out_of(("asr", "tts"), mixture="new_voices"),
    )
    return EvalConfig(every=every, steps=steps, mixtures=mixtures)
