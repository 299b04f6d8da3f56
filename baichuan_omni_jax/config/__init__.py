"""Configuration: what the model is (`OmniConfig`) and what a run does with it (`RunConfig`).

Imports neither jax nor flax, so that data workers can use it.
"""

from baichuan_omni_jax.config.audio import FlowTrainConfig, QuantizerConfig, SpecAugmentConfig, TokenizerTrainConfig
from baichuan_omni_jax.config.audio_runs import (
    AUDIO_RUNS,
    audio_tokenizer_run,
    flow_matching_run,
    tiny_audio_tokenizer,
    tiny_flow_matching,
)
from baichuan_omni_jax.config.generation import READ_AT_LEAST, VOICE, GenerationConfig, SamplingConfig, check_voice
from baichuan_omni_jax.config.hf import from_hf, read_hf, resolve_model, to_hf
from baichuan_omni_jax.config.load import load_run_config
from baichuan_omni_jax.config.machines import MACHINES
from baichuan_omni_jax.config.model import (
    MODELS,
    OmniConfig,
    SpecialTokens,
    baichuan_omni_7b,
    omni_0b5,
    omni_1b5,
    omni_3b,
    omni_14b,
    small,
    tiny,
)
from baichuan_omni_jax.config.overrides import apply_overrides, from_dict, to_dict
from baichuan_omni_jax.config.run import (
    Budgets,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvalConfig,
    EvalMixture,
    GroupConfig,
    ImagesConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    WatchConfig,
    released_images,
)
from baichuan_omni_jax.config.sample_runs import sample_eval, tiny_stage
from baichuan_omni_jax.config.small import SMALL_STAGES, small_stage
from baichuan_omni_jax.config.stages import (
    STAGES,
    Stage,
    mixture_of,
    stage_groups,
    stage_run,
)
from baichuan_omni_jax.errors import ConfigError, RequestError

__all__ = [
    "AUDIO_RUNS",
    "MACHINES",
    "MODELS",
    "READ_AT_LEAST",
    "SMALL_STAGES",
    "STAGES",
    "VOICE",
    "Budgets",
    "CheckpointConfig",
    "ComputeConfig",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "EvalMixture",
    "FlowTrainConfig",
    "GenerationConfig",
    "GroupConfig",
    "ImagesConfig",
    "MeshConfig",
    "OmniConfig",
    "OptimizerConfig",
    "QuantizerConfig",
    "RequestError",
    "RunConfig",
    "SamplingConfig",
    "SourceConfig",
    "SpecAugmentConfig",
    "SpecialTokens",
    "Stage",
    "TokenizerTrainConfig",
    "TrainConfig",
    "WatchConfig",
    "apply_overrides",
    "audio_tokenizer_run",
    "baichuan_omni_7b",
    "check_voice",
    "flow_matching_run",
    "from_dict",
    "from_hf",
    "load_run_config",
    "mixture_of",
    "omni_0b5",
    "omni_1b5",
    "omni_3b",
    "omni_14b",
    "read_hf",
    "released_images",
    "resolve_model",
    "sample_eval",
    "small",
    "small_stage",
    "stage_groups",
    "stage_run",
    "tiny",
    "tiny_audio_tokenizer",
    "tiny_flow_matching",
    "tiny_stage",
    "to_dict",
    "to_hf",
]
