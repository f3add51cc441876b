"""Check a value of a config against a type annotation, and put the annotation into words.

Values are what yaml holds: numbers, texts, lists, mappings. An annotation is one of our schema, or of a library's
signature.
"""

import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union

PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
SEQUENCES = (list, tuple, set, frozenset, Sequence, Iterable)
UNIONS = (Union, types.UnionType)
LARGEST = sys.float_info.max  # whole numbers have no end in Python


@dataclass(frozen=True)
class Rule:
    """A condition beside a type, in `Annotated`; `wants` goes on from "has to be"; empty where the type says it."""

    holds: Callable[[Any], bool]
    wants: str


def at_least(low: int) -> Rule:
    return Rule(lambda value: low <= value <= LARGEST, f"at least {low}")


# --- the check


def type_problem(value: Any, annotation: Any) -> str | None:
    """What is wrong with a value, as `has to be ..., not ...`, or None."""
    if fits(value, annotation):
        return None
    hint = ""
    if isinstance(value, float) and value.is_integer() and fits(int(value), annotation):
        hint = f"; write {int(value)}"
    elif isinstance(value, (int, float)) and fits(str(value), annotation):
        hint = f"; as text it needs quotes inside the shell's: '\"{value}\"'"
    elif isinstance(value, str) and fits([value], annotation):
        hint = f"; a list is written [{value}]"
    return f"has to be {words(annotation)}, not {_written(value)}{hint}"


def fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    kind = origin or annotation
    if kind is Annotated:
        return fits(value, arguments[0]) and all(rule.holds(value) for rule in _rules(arguments))
    if kind in UNIONS:
        return any(fits(value, argument) for argument in arguments)
    if kind is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if kind in SEQUENCES:
        if not isinstance(value, list):
            return False
        if _has_fixed_length(annotation):
            return len(value) == len(arguments) and all(map(fits, value, arguments))
        return not arguments or all(fits(item, arguments[0]) for item in value)
    if kind in (dict, Mapping):
        return isinstance(value, dict)
    return _fits_plain(value, annotation)


def _rules(arguments: tuple[Any, ...]) -> list[Rule]:
    return [rule for rule in arguments[1:] if isinstance(rule, Rule)]


def _has_fixed_length(annotation: Any) -> bool:
    """Whether it is a tuple with a type for each of its places."""
    arguments = typing.get_args(annotation)
    return typing.get_origin(annotation) is tuple and bool(arguments) and arguments[-1] is not Ellipsis


def _fits_plain(value: Any, annotation: Any) -> bool:
    if annotation is None:
        return value is None
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    if annotation in PLAIN:
        return isinstance(value, annotation)
    if isinstance(annotation, type) and issubclass(annotation, (Enum, Path)):
        return isinstance(value, str)
    return not _is_elsewhere(annotation) or (isinstance(value, dict) and "_target_" in value)


def _is_elsewhere(annotation: Any) -> bool:
    """A class such as Tensor, of which no yaml can hold an instance, unlike `Any`, a protocol or a type variable."""
    return (
        isinstance(annotation, type)
        and annotation not in (Any, object)
        and not getattr(annotation, "_is_protocol", False)
    )


def is_whole(annotation: Any) -> bool:
    """Whether numbers that fit an annotation are whole ones."""
    return fits(8, annotation) and not fits(8.5, annotation)  # 8 keeps the rules of all whole settings


# --- in words


def words(annotation: Any) -> str:
    """An annotation in the words of a message."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    kind = origin or annotation
    if kind is Annotated:
        plain, rules = words(arguments[0]), " and ".join(rule.wants for rule in _rules(arguments))
        return f"{plain}, {rules}" if rules else plain
    if kind in UNIONS:
        known = [words(argument) for argument in arguments if not _is_elsewhere(argument) or argument in PLAIN]
        return ", or ".join(dict.fromkeys(known)) or str(annotation)
    if kind is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if kind in SEQUENCES:
        if _has_fixed_length(annotation):
            return f"a list of {len(arguments)} ({', '.join(map(words, arguments))})"
        item = words(arguments[0]) if arguments else ""
        items = f"{item.removeprefix('a ')}s" if item in ("text", "a number", "a whole number") else item
        return f"a list of {items}" if items else "a list"
    if kind in (dict, Mapping):
        return "a mapping"
    return PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _written(value: Any) -> str:
    """A value as the user would write it, cut to a line."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
