"""Frozen dataclasses from nested dicts, and one clear line for whatever does not fit."""

import difflib
import math
import types
import typing
from dataclasses import fields, is_dataclass


def build(cls, values: dict, prefix: str = ""):
    """A frozen dataclass from nested dicts; unknown keys and wrong types raise ValueError with the valid choices."""
    hints, known = typing.get_type_hints(cls), [f.name for f in fields(cls)]
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'config'}={values!r} should be a group of keys: {', '.join(known)}")
    for key in values:
        if key not in known:
            raise ValueError(unknown(f"{prefix}{key}", [f"{prefix}{name}" for name in known]))
    made = {}
    for key, value in values.items():
        hint = hints[key]
        made[key] = build(hint, value, f"{prefix}{key}.") if is_dataclass(hint) else _typed(value, hint, prefix + key)
    return cls(**made)


def _typed(value, hint, name: str):
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for choice in choices:
        if choice is type(None) and value is None:
            return None
        if choice is float and isinstance(value, int | float) and not isinstance(value, bool):
            if math.isnan(value):
                raise ValueError(f"{name}={value} is not a number")
            return float(value)
        if choice is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if choice in (bool, str, dict) and isinstance(value, choice):
            return value
        if is_dataclass(choice) and isinstance(value, dict):  # a group of keys that may be absent
            return build(choice, value, f"{name}.")
        if typing.get_origin(choice) is dict and isinstance(value, dict):  # groups of keys by names that the user gives
            (_, group) = typing.get_args(choice)
            return {str(key): build(group, item, f"{name}.{key}.") for key, item in value.items()}
        if choice is str and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)  # a name that reads like a number
        if typing.get_origin(choice) is tuple and isinstance(value, list | tuple):
            return tuple(_typed(item, typing.get_args(choice)[0], f"{name}[{i}]") for i, item in enumerate(value))
        if typing.get_origin(choice) is tuple and isinstance(value, str | int | float):
            return (_typed(value, typing.get_args(choice)[0], name),)  # a list of one
    words = {type(None): "null", tuple: "a list, as in [a,b]", dict: "a mapping, as in {name: {key: value}}"}
    spelled = " or ".join(words.get(typing.get_origin(c) or c) or getattr(c, "__name__", str(c)) for c in choices)
    raise ValueError(f"{name}={value!r} is {type(value).__name__}, but should be {spelled}")


def plain(value):
    """The nested dict of a dataclass, of what YAML and JSON can hold."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def keys(cls, prefix: str = "") -> list[str]:
    """All keys of a dataclass and of those nested in it, dotted."""
    hints = typing.get_type_hints(cls)
    return [
        key
        for f in fields(cls)
        for key in (keys(hints[f.name], f"{prefix}{f.name}.") if is_dataclass(hints[f.name]) else [f"{prefix}{f.name}"])
    ]


def mappings(cls, prefix: str = "") -> list[str]:
    """The keys, dotted, that hold groups of keys by names that the user gives, such as data.mixture, or that may be
    absent, such as task."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        if is_dataclass(hint):
            found += mappings(hint, f"{prefix}{name}.")
        elif any(typing.get_origin(c) is dict or is_dataclass(c) for c in typing.get_args(hint)):
            found.append(f"{prefix}{name}")
    return found


def unknown(key: str, near: list[str], valid: list[str] | None = None) -> str:
    """The message for a key that there is not, with the nearest that there is."""
    guess = difflib.get_close_matches(key, valid or near, 1)
    hint = f"; did you mean {guess[0]}?" if guess else ""
    names = near if len(near) < 60 else sorted({name.partition(".")[0] for name in near})
    return f"unknown {key}{hint} valid: {', '.join(names)}" if hint else f"unknown {key}; valid: {', '.join(names)}"


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())
