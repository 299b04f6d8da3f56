"""A run by its file, or one of the recipe by its name, with what the command line changes of it."""

import inspect
import re
import runpy
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from baichuan_omni_jax.config.audio_runs import (
    AUDIO_RUNS,
    audio_tokenizer_run,
    flow_matching_run,
    tiny_audio_tokenizer,
    tiny_flow_matching,
)
from baichuan_omni_jax.config.overrides import RENAMED, apply_overrides, check_types, split_override
from baichuan_omni_jax.config.run import EvalMixture, RunConfig
from baichuan_omni_jax.config.sample_runs import tiny_stage
from baichuan_omni_jax.config.small import SMALL_STAGES, small_stage
from baichuan_omni_jax.config.small_audio import small_flow, small_tokenizer
from baichuan_omni_jax.config.stages import STAGES, stage_run
from baichuan_omni_jax.errors import ConfigError

# Runs that need no file.
_NAMED: dict[str, Callable[..., RunConfig]] = {
    **{stage: partial(stage_run, stage) for stage in STAGES},
    **{f"{stage}_tiny": partial(tiny_stage, stage) for stage in STAGES},
    "audio_tokenizer": audio_tokenizer_run,
    "audio_tokenizer_tiny": tiny_audio_tokenizer,
    "flow_matching": flow_matching_run,
    "flow_matching_tiny": tiny_flow_matching,
    "audio_tokenizer_1_small": partial(small_tokenizer, 1),
    "audio_tokenizer_2_small": partial(small_tokenizer, 2),
    "flow_matching_small": small_flow,
    **{f"{stage}_small": partial(small_stage, stage) for stage in SMALL_STAGES},
}
HELD_OUT = "held_out"  # the mixture of `eval.held_out`
# What a run is sized by, and where its files lie: parameters of `get_config`, not fields to be changed one by one.
_PARAMETERS = ("model", "machine", "home")


def load_run_config(config: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Calls the `get_config()` of the file `config`, or makes the run of that name, and applies `a.b=value` strings.

    Overrides of `model`, `machine` and `home` go to a `get_config` that takes them: the whole run is sized anew, and
    what the other overrides say comes after.

    >>> load_run_config("sft", ["model=omni_0b5", "machine=v5e:2x4", "train.steps=20"]).mesh.context
    8

    Raises ConfigError when there is no such file or name, with the line where the file fails, and for overrides as
    `apply_overrides` does.
    """
    make = _NAMED.get(str(config)) or _of_file(config)
    takes = [name for name in _PARAMETERS if name in inspect.signature(make).parameters]
    sized: dict[str, str] = {}
    others = []
    for item in overrides:
        name, value = split_override(item)
        if name in takes:
            sized[name] = value
        elif name == "machine":
            raise ConfigError(
                f"{config} is not sized by machine: set mesh, data.budgets and train.accumulate instead of {item}"
            )
        elif name == "home":
            raise ConfigError(
                f"{config} has no home: set data.root, data.audio_tokenizer and checkpoint.init_from instead of {item}"
            )
        else:
            others.append(item)
    run = _called(make, config, sized)
    # Much of it is looked at hours later, and a text where a list belongs is a list of letters.
    check_types(run)
    return with_held_out(apply_overrides(run, others))


def with_held_out(run: RunConfig) -> RunConfig:
    """Adds the mixture of `eval.held_out`, a manifest there for every source; takes those of absent sample data away.

    Raises ConfigError where there is a mixture of that name already.
    """
    # Somebody's own data, by a configuration that is made for the sample data: it has no such documents.
    if run.eval.sample and not run.data.sample:
        run = replace(run, eval=replace(run.eval, mixtures=(), abilities=(), sample=False))
    if not run.eval.held_out:
        return run
    if any(mixture.name == HELD_OUT for mixture in run.eval.mixtures):
        raise ConfigError(f"eval.held_out {run.eval.held_out}: eval.mixtures has a mixture {HELD_OUT!r} already")
    # Media lie where those of the source do: beside its own manifest, unless it has a root.
    sources = tuple(
        replace(
            source,
            manifest=f"{run.eval.held_out}/{source.name}.jsonl",
            root=source.root or str(Path(source.manifest).parent),
            weight=1.0,
        )
        for source in run.data.mixture
    )
    mixture = EvalMixture(name=HELD_OUT, sources=sources, swapped=run.task == "omni")
    return replace(run, eval=replace(run.eval, mixtures=(*run.eval.mixtures, mixture)))


def _of_file(path: str | Path) -> Callable[..., RunConfig]:
    """Runs the file and returns its `get_config`."""
    if not Path(path).is_file():
        names = ", ".join((*AUDIO_RUNS, *STAGES))
        raise ConfigError(f"config file {path} does not exist, nor a run of that name ({names})")
    try:
        namespace = runpy.run_path(str(path))
    except ConfigError:
        raise
    # The file is the user's, and so is whatever it does wrong: a misspelled field, a name that is not imported.
    except Exception as error:
        raise ConfigError(_failure(error, path)) from error
    if "get_config" not in namespace:
        raise ConfigError(f"config file {path} defines no get_config()")
    return namespace["get_config"]


def _called(make: Callable[..., RunConfig], path: str | Path, sized: dict[str, str]) -> RunConfig:
    try:
        run = make(**sized)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_failure(error, path)) from error
    if not isinstance(run, RunConfig):
        raise ConfigError(f"get_config() of {path} returned {type(run).__name__}, not RunConfig")
    return run


def _failure(error: Exception, path: str | Path) -> str:
    """One sentence: the file at `path`, the line of it that failed (the innermost, if any), and why."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    why = " ".join(str(error).split()) or "no reason given"
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, why = [error.lineno], f"it is not Python: {error.msg}"
    # A misspelled field may be one that was renamed: Python's error has its last word alone.
    renamed = {old.rpartition(".")[2]: new for old, new in RENAMED.items()}
    if (unknown := re.search(r"unexpected keyword argument '(\w+)'", why)) and unknown[1] in renamed:
        why += f": it is now {renamed[unknown[1]]}"
    place = f", line {lines[-1]}" if lines else ""
    return f"config file {path}{place}: {type(error).__name__}: {why}"
