"""Does a value from a yaml file or a command line fit a type annotation? And what is that annotation in words?"""

import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from kandinsky_exp.config.rules import Rule

PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
SEQUENCES = (list, tuple, set, frozenset, Sequence, Iterable)


def misfit(value: Any, annotation: Any) -> str | None:
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
    return f"has to be {words(annotation)}, not {shown(value)}{hint}"


def fits(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        rules = [rule for rule in arguments[1:] if isinstance(rule, Rule)]
        return fits(value, arguments[0]) and all(_holds(rule, value) for rule in rules)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if (origin or annotation) in SEQUENCES:
        return _fits_sequence(value, origin, arguments)
    if (origin or annotation) in (dict, Mapping):
        return isinstance(value, dict)
    return _fits_plain(value, annotation)


def _holds(rule: Rule, value: Any) -> bool:
    try:
        return rule.holds(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _fits_plain(value: Any, annotation: Any) -> bool:
    if annotation is None:
        return value is None
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
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


def _fits_sequence(value: Any, origin: Any, arguments: tuple[Any, ...]) -> bool:
    if not isinstance(value, list):
        return False
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    return all(fits(item, arguments[0]) for item in value) if arguments else True


def is_whole(annotation: Any) -> bool:
    """Whether numbers that fit an annotation are whole ones."""
    kinds = set(_kinds(annotation))
    return int in kinds and float not in kinds


def _kinds(annotation: Any) -> Iterator[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from _kinds(arguments[0])
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            yield from _kinds(argument)
    else:
        yield annotation


def words(annotation: Any) -> str:
    """An annotation in the words of a message."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        rules = " and ".join(rule.wants for rule in arguments[1:] if isinstance(rule, Rule))
        kind = words(arguments[0])
        return kind if not rules or (arguments[0] is str and rules.startswith("something")) else f"{kind}, {rules}"
    if origin in (Union, types.UnionType):
        known = [words(argument) for argument in arguments if not _is_elsewhere(argument) or argument in PLAIN]
        return ", or ".join(dict.fromkeys(known)) or str(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if (origin or annotation) in SEQUENCES:
        if origin is tuple and arguments and arguments[-1] is not Ellipsis:
            return f"a list of {len(arguments)} ({', '.join(map(words, arguments))})"
        return f"a list of {_plural(words(arguments[0]))}" if arguments else "a list"
    if (origin or annotation) in (dict, Mapping):
        return "a mapping"
    return PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _plural(kind: str) -> str:
    return f"{kind.removeprefix('a ')}s" if kind in ("text", "a number", "a whole number") else kind


def shown(value: Any) -> str:
    """A value as the user would write it, cut to a line."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
