"""Nested frozen dataclasses to and from plain dicts, and overrides by dotted path, both type-checked."""

import ast
import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from baichuan_omni_jax.errors import ConfigError

T = TypeVar("T")

# Keys of a run, and of an answer, that have been renamed: the old one is refused with the new one's name.
RENAMED = {
    "eval.sound_every": "eval.audio_every",
    "eval.sounds": "eval.audio_samples",
    "tokenizer.quantizer.quantised_share": "tokenizer.quantizer.quantized_share",
    "tokenizer.quantizer.quantised_steps": "tokenizer.quantizer.quantized_steps",
    "first_piece": "first_segment",
    "piece": "segment",
    "piece_tokens": "segment_tokens",
    "piece_frames": "segment_frames",
    "piece_seconds": "segment_seconds",
    "max_pieces": "max_segments",
}


def to_dict(config: Any) -> Any:
    """Turns dataclasses to dicts and tuples to lists, ready for JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    return config


def from_dict(cls: type[T], values: Any, where: str = "") -> T:
    """Makes a `cls` of its `to_dict`. Raises ConfigError on an unknown or renamed key, or a value of another type."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where or cls.__name__} must be a mapping, not {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    for key in values:
        _check_key(key, hints, where)
    return cls(**{key: convert_value(hints[key], value, f"{where}{key}") for key, value in values.items()})


def apply_overrides(config: T, overrides: Sequence[str]) -> T:
    """Applies `a.b=value` strings in order.

    >>> apply_overrides(RunConfig(name="x"), ["train.steps=20", "data.budgets.tokens=1024"]).train.steps
    20

    Raises ConfigError when a key does not exist, naming the nearest known one, or the new one of a key that was
    renamed, and when a value has another type.
    """
    for item in overrides:
        path, text = split_override(item)
        config = _replace(config, path.split("."), text, path)
    return config


def split_override(item: str) -> tuple[str, str]:
    """Splits `a.b=value` into key and value. Raises ConfigError where one of them is not there."""
    path, equals, text = (part.strip() for part in item.partition("="))
    if not path or not equals:
        raise ConfigError(f"--set {item!r} is not of the form key=value")
    return path, text


def check_types(config: Any, where: str = "") -> None:
    """Raises ConfigError naming the first field, of any depth, whose value is not of its annotation's type.

    Configurations are Python, where nothing else looks at what a field is given.
    """
    for name, kind in typing.get_type_hints(type(config)).items():
        value, path = getattr(config, name), f"{where}{name}"
        if dataclasses.is_dataclass(value):
            check_types(value, f"{path}.")
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            for place, item in enumerate(value):
                check_types(item, f"{path}[{place}].")
        else:
            convert_value(kind, value, path)


def check_ranges(config: Any, where: str, ranges: Mapping[str, tuple[float | int, float | int]]) -> None:
    """Raises ConfigError naming the first of these fields of a dataclass whose number lies outside of its range.

    Args:
        config: the dataclass.
        where: what its fields are called: "watch.".
        ranges: field -> the least and the largest number that it may be.
    """
    hints = typing.get_type_hints(type(config))
    for name, (least, most) in ranges.items():
        value = convert_value(hints[name], getattr(config, name), f"{where}{name}")
        # A word in a number's place ("auto") is one of those that the field may have.
        if not isinstance(value, str) and not least <= value <= most:
            upper = "" if math.isinf(most) else f" and at most {most:g}"
            raise ConfigError(f"{where}{name} must be at least {least:g}{upper}, not {value}")


def _replace(config: Any, keys: Sequence[str], text: str, path: str) -> Any:
    key, rest = keys[0], keys[1:]
    hints = typing.get_type_hints(type(config))
    _check_key(key, hints, path[: len(path) - len(".".join(keys))])
    if not rest:
        value = convert_value(hints[key], _parse(text, hints[key]), path)
    elif dataclasses.is_dataclass(getattr(config, key)):
        value = _replace(getattr(config, key), rest, text, path)
    else:
        raise ConfigError(f"{path}: {key} is a {type(getattr(config, key)).__name__} and has no field {rest[0]!r}")
    return dataclasses.replace(config, **{key: value})


def _check_key(key: str, known: Any, where: str) -> None:
    if key not in known:
        if new := RENAMED.get(f"{where}{key!s}"):
            raise ConfigError(f"config key {where}{key!s} is now {new}")
        near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
        raise ConfigError(f"unknown config key {where}{key!s}; the nearest known one is {where}{near[0]}")


def _parse(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def convert_value(kind: Any, value: Any, where: str) -> Any:
    """Returns `value` as an instance of the annotation `kind`; ints pass as floats, lists as tuples.

    Raises ConfigError, naming `where`, for a value of another type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        # A number or one of a few words: the words first, since they say which values they are.
        words = [word for each in args if typing.get_origin(each) is Literal for word in typing.get_args(each)]
        if isinstance(value, str) and value in words:
            return value
        kind = next(a for a in args if a is not type(None) and typing.get_origin(a) is not Literal)
        if words and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ConfigError(f"{where} must be {kind.__name__} or {', '.join(map(repr, words))}, not {value!r}")
        return convert_value(kind, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} must be one of {', '.join(map(str, args))}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, not {value!r}")
        return tuple(convert_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_dict(kind, value, f"{where}.")
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        # Integers of any size, and what a configuration computed.
        if not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{where} must be a number, not {value if isinstance(value, float) else 'one so large'}")
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where} must be {kind.__name__}, not {value!r}")
    return value
