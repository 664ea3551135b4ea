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
        if kinds := kinds_of(hint):
            hint = _kind(kinds, value, prefix + key)
        made[key] = build(hint, value, f"{prefix}{key}.") if is_dataclass(hint) else _typed(value, hint, prefix + key)
    return cls(**made)


def kinds_of(hint) -> dict[str, type]:
    """The dataclasses of a group that is one of several, by the value of `kind` that chooses each; else none."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else ()
    if not choices or not all(is_dataclass(choice) for choice in choices):
        return {}
    return {choice.kind: choice for choice in choices}


def _kind(kinds: dict[str, type], value, name: str) -> type:
    """The dataclass that the values of a group ask for; the first where they do not say."""
    default = next(iter(kinds))
    kind = value.get("kind", default) if isinstance(value, dict) else default
    if kind not in kinds:
        raise ValueError(f"{name}.kind={kind} is not one of {', '.join(kinds)}")
    named = {kind: {f.name for f in fields(cls)} for kind, cls in kinds.items()}
    for key in value if isinstance(value, dict) else ():
        having = [f"{name}={other}" for other in kinds if key in named[other]]
        if key not in named[kind] and having:
            raise ValueError(f"{name}={kind} has no {name}.{key}; it is a key of {', '.join(having)}")
    return kinds[kind]


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


def keys(cls, prefix: str = "", *, every_kind: bool = False) -> list[str]:
    """All keys of a dataclass and of those nested in it, dotted; of a group of several kinds those of the first, or of
    every one.
    """
    hints, found = typing.get_type_hints(cls), []
    for f in fields(cls):
        kinds = list(kinds_of(hints[f.name]).values()) or [hints[f.name]]
        for hint in kinds if every_kind else kinds[:1]:
            own = keys(hint, f"{prefix}{f.name}.", every_kind=every_kind) if is_dataclass(hint) else []
            found += [key for key in own or [f"{prefix}{f.name}"] if key not in found]
    return found


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
