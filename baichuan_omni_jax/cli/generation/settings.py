"""The flags that say how answers are drawn and how long they may grow: shared by the command and the page."""

import argparse
from dataclasses import replace

from baichuan_omni_jax.config import GenerationConfig, apply_overrides
from baichuan_omni_jax.errors import ConfigError


def add_settings_flags(add) -> None:
    """`add` is `add_argument` of a parser or of a group of it."""
    add("--max-tokens", type=int, metavar="N", help="text tokens of one answer at most")
    add("--voice", metavar="NAME", help="who answers aloud, as the system prompt names it; not beside --system")
    add("--greedy", action="store_true", help="always the likeliest, no penalty")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of GenerationConfig, as codes.top_k=3",
    )


def settings_of(options: argparse.Namespace, default: GenerationConfig) -> GenerationConfig:
    """`default` with what the flags change. Raises ConfigError naming the field that cannot be set."""
    settings = apply_overrides(default, options.set)
    if options.max_tokens is not None:
        settings = apply_overrides(settings, [f"max_tokens={options.max_tokens}"])
    if options.voice is not None:
        if options.system:
            raise ConfigError("--system takes the place of the system prompt that names the --voice: name it there")
        settings = replace(settings, voice=options.voice)
    return settings.greedy() if options.greedy else settings
