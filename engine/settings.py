"""Sections of settings from plain values: `section.key=value` overrides, and every mistake named by its dotted key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from engine.optimizer_config import Section

# pydantic's names for what YAML calls otherwise.
_SHAPES = {
    "tuple_type": "a list, [...]", "model_type": "a mapping, {key: value, ...}",
    "model_attributes_type": "a name, or a mapping {name: ..., ...}",
    "union_tag_not_found": "a name, or a mapping {name: ..., ...}",
}  # fmt: skip


class ConfigError(ValueError):
    """A bad configuration: one line an error, each with the dotted key, what was given and what is allowed."""


def overridden(tree: Any, overrides: Sequence[str]) -> Any:
    """A tree of plain values with `section.key=value` overrides; raises ConfigError: a malformed one."""
    tree = OmegaConf.create(tree)
    for override in overrides:
        _override(tree, override)
    return OmegaConf.to_container(tree, resolve=True)


S = TypeVar("S", bound=Section)


def parse_section(kind: type[S], plain: Any) -> S:
    """Checks a tree of plain values against a section of any kind; raises ConfigError."""
    try:
        return kind.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(_describe_all(error, kind)) from None


def _override(tree: Any, override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.removeprefix("--")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{override}: an override is section.key=value")
    parent, _, _ = key.rpartition(".")
    held = OmegaConf.select(tree, parent, throw_on_missing=False) if parent else None
    if isinstance(held, str | int | float):
        raise ConfigError(f"{key}: cannot be set here, {parent} is {held!r} and no mapping; give {parent} as a mapping")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        OmegaConf.update(tree, key, value["value"], merge=False, force_add=True)  # type: ignore[index, call-overload]
    except YAMLError:
        raise ConfigError(f"{key}: {text!r} is not a YAML value") from None
    except (OmegaConfBaseException, ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"{key}: cannot be set here ({one_line(error)})") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _describe_all(error: ValidationError, kind: type[BaseModel]) -> str:
    """One line a key; the branches of a union, each with its own complaint, share theirs."""
    lines: list[str] = []
    errors = error.errors()
    inner = {e["loc"][:i] for e in errors for i in range(len(e["loc"]))}
    # A list with a mistake in it reads as one that lacks the entry, too.
    errors = [e for e in errors if e["type"] != "too_short" or e["loc"] not in inner]
    for line in dict.fromkeys(_describe(e, kind) for e in errors):
        head, allowed, alternative = line.partition(", allowed: ")
        if allowed and lines and lines[-1].startswith(head + allowed):
            lines[-1] += f"; or {alternative}"
        else:
            lines.append(line)
    return "\n".join(lines)


def _describe(error: Any, section: type[BaseModel]) -> str:
    """One line for one pydantic error: dotted key, what was given, what is allowed."""
    # Union branches appear in the location by their type names; only keys and indices are part of the dotted key.
    kind, given = error["type"], error["input"]
    known = _all_keys(section)
    last = error["loc"][-1:] if kind == "extra_forbidden" else ()
    location = [part for part in error["loc"] if isinstance(part, int) or part in known or (part,) == last]
    key = ".".join(map(str, location))
    if kind == "extra_forbidden":
        allowed = _keys_at(section, error["loc"][:-1])
        near = difflib.get_close_matches(str(location[-1]), allowed, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"allowed: {', '.join(allowed)}"
        return f"{key}: unknown key; {hint}"
    if kind == "missing":
        return f"{key}: is required"
    if kind == "union_tag_invalid":
        return f"{key}: found {error['ctx']['tag']!r}, allowed: {error['ctx']['expected_tags']}"
    if kind == "value_error":
        text = str(error["ctx"]["error"])
        return text if not key or text.startswith(("exactly", key)) else f"{key}: {text}"
    if kind in _SHAPES:
        return f"{key}: found {given!r}, allowed: {_SHAPES[kind]}"
    if kind == "too_short":
        return f"{key}: found {given!r}, allowed: at least {error['ctx']['min_length']}"
    message = error["msg"].removeprefix("Input should be ").replace("Input should", "should")
    return f"{key}: found {given!r}, allowed: {message}"


def _sections(section: type[BaseModel]) -> dict[str, list[type[BaseModel]]]:
    """Names of the fields that hold sections (alone or in a list), and the kinds of section that each takes."""
    found: dict[str, list[type[BaseModel]]] = {}
    for name, field in section.model_fields.items():
        for kind in _leaf_types(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found.setdefault(name, []).append(kind)
    return found


def _leaf_types(annotation: Any) -> list[Any]:
    arguments = get_args(annotation)
    return [leaf for argument in arguments for leaf in _leaf_types(argument)] if arguments else [annotation]


def _keys_at(section: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Keys of the section at a location in which, behind a field of several kinds, the kind's tag stands."""
    kinds = [section]
    for part in location:
        if isinstance(part, str):
            tagged = [kind for kind in kinds if part in (kind.__name__, _tag(kind))]
            kinds = tagged or [inner for kind in kinds for inner in _sections(kind).get(part, [])] or kinds
    return list(dict.fromkeys(key for kind in kinds for key in kind.model_fields))


def _tag(kind: type[BaseModel]) -> Any:
    """What its `name` says where that can be one thing alone."""
    return kind.model_fields["name"].default if "name" in kind.model_fields else None


@cache
def _all_keys(section: type[BaseModel]) -> set[str]:
    return set(section.model_fields).union(*(_all_keys(s) for kinds in _sections(section).values() for s in kinds))
