"""What a run trains: the omni model, the audio tokenizer or the flow-matching decoder, all by the same loop."""

from baichuan_omni_jax.config import OmniConfig, RunConfig
from baichuan_omni_jax.errors import ConfigError
from baichuan_omni_jax.nn.param import ComputePolicy
from baichuan_omni_jax.train.tasks.audio import AudioTokenizerTask, FlowMatchingTask
from baichuan_omni_jax.train.tasks.omni import OmniTask
from baichuan_omni_jax.train.tasks.task import NonGradientUpdates, Task

TASKS: dict[str, type[Task]] = {
    "omni": OmniTask,
    "audio_tokenizer": AudioTokenizerTask,
    "flow_matching": FlowMatchingTask,
}

__all__ = ["TASKS", "NonGradientUpdates", "Task", "make_task"]


def make_task(run: RunConfig, omni: OmniConfig, compute: ComputePolicy) -> Task:
    """Makes the task that `run.task` names. Raises ConfigError on an unknown one."""
    if run.task not in TASKS:
        raise ConfigError(f"task {run.task!r} is not one of {', '.join(TASKS)}")
    return TASKS[run.task](run, omni, compute)
