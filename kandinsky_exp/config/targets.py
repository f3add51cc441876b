"""Every `_target_` before anything is built: that it may be named, exists, takes these arguments, of these types."""

import contextlib
import inspect
import re
import sys
import typing
from collections.abc import Collection, Iterator
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from kandinsky_exp.config import allowlist
from kandinsky_exp.config.schema import OpenNode
from kandinsky_exp.config.types import misfit
from kandinsky_exp.data.source_facts import SourceFacts

INSTALL = {
    "prodigyopt": 'pip install "kandinsky-exp[prodigy]"',
    "schedulefree": 'pip install "kandinsky-exp[schedulefree]"',
    "bitsandbytes": 'pip install "kandinsky-exp[bitsandbytes]" (it is made for CUDA)',
    "xformers": 'pip install "kandinsky-exp[xformers]" (it needs CUDA)',
}
MOVED = re.compile(
    r"kandinsky_exp\.(weights|pipelines|adapters)\b|import name '(weights|pipelines|adapters)' from 'kandinsky_exp'"
)
HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


def is_installed(package: str) -> bool:
    """Whether a top-level package could be imported, without importing it."""
    return find_spec(package) is not None


def older_than(package: str, least: tuple[int, ...]) -> str | None:
    """The version of an installed package where it is older."""
    with contextlib.suppress(PackageNotFoundError):
        found = version(package)
        if tuple(int(number) for number in re.findall(r"\d+", found)[: len(least)]) < least:
            return found
    return None


def how_to_install(package: str) -> str:
    return INSTALL.get(package, f"pip install {package}")


def source_facts(target: Any, added: Collection[str] = ()) -> SourceFacts:
    """What a source of data declares of itself; the defaults where it declares nothing, or may not be imported.

    Args:
        added: modules that the user trusts.
    """
    module, _, name = str(target).rpartition(".")
    if module == allowlist.FUNCTIONS["data"] or module in sys.modules or allowlist.covers(added, module):
        with contextlib.suppress(Exception, SystemExit):  # `check` says what is wrong
            facts: SourceFacts = vars(getattr(import_module(module), name))["facts"]
            return facts
    return SourceFacts()


def nodes(node: Any, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All mappings with a `_target_`, with their dotted keys, the outer ones first."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield key, node
        for name, value in node.items():
            yield from nodes(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from nodes(value, f"{key}.{index}")


def problems(values: dict[str, Any], root: type[Any], added: Collection[str], *, quick: bool = False) -> list[str]:
    """What is wrong with any target in resolved settings, as `key: ...` messages.

    Args:
        root: the schema of `values`.
        added: modules that the user trusts beside those that any config may name.
        quick: nodes whose keys the schema has judged already are not looked at beyond their names.
    """
    found = []
    for key, node in nodes(values):
        schema = _schema_of(root, key)
        problem = check_name(key, node, added)
        judged = node.keys() <= {item.name for item in fields(schema)}
        found += problem if problem or (quick and judged) else check(key, node, schema, added)
    return found


def _schema_of(root: type[Any], key: str) -> type[OpenNode]:
    annotation = typing.get_type_hints(root, include_extras=True).get(key)
    return annotation if isinstance(annotation, type) and issubclass(annotation, OpenNode) else OpenNode


def check_name(key: str, node: dict[str, Any], added: Collection[str] = ()) -> list[str]:
    """The part of the check that imports nothing.

    Args:
        added: modules that the user trusts beside those that any config may name.
    """
    target = node["_target_"]
    if not isinstance(target, str):
        return [f"{key}._target_: has to be package.module.name, not {target!r:.200}"]
    if problem := allowlist.name_problem(target, added):
        return [f"{key}._target_: {problem}"]
    again = [name for name, text in _texts(node) if "${" in text]
    if again:  # it was escaped, and would be resolved when the target is built: into anything
        return [f"{key}.{again[0]}: holds ${{ after everything was resolved; write the value itself"]
    package = target.split(".")[0]
    if is_installed(package):
        return []
    return [f"{key}._target_: {target} is in '{package}', which is not installed; {how_to_install(package)}"]


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for name, value in node.items():
            yield from _texts(str(name), key)
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _texts(value, f"{key}.{index}")
    elif isinstance(node, str):
        yield key, node


def check(key: str, node: dict[str, Any], schema: type[OpenNode] = OpenNode, added: Collection[str] = ()) -> list[str]:
    """What is wrong with a node whose name is good, as `key: ...` messages. Imports the target's module.

    Args:
        key: the node's dotted key.
        schema: tells which keys are not the target's arguments, and what the target has to be.
        added: modules that the user trusts beside those that any config may name.
    """
    try:
        target = _locate(node["_target_"], added)
        if callable(target) and (problem := allowlist.object_problem(node["_target_"], target, schema.role, added)):
            return [f"{key}._target_: {problem}"]
        signature = inspect.signature(target)
    except _NotThereError as error:
        return [f"{key}._target_: {error}"]
    except (TypeError, ValueError) as error:
        built_in = "not callable" not in str(error) and "not a callable" not in str(error)
        return [] if built_in else [f"{key}._target_: {node['_target_']} cannot be called; give a class or a function"]
    problems = [f"{key}.{name}: no such key{_close(name, HYDRA_KEYS)}" for name in node if _is_odd(name)]
    for name, value in node.items():
        left_out = name in schema.beside or (value is None and name in schema.by_run)
        if not str(name).startswith("_") and not left_out:
            problem = _check_argument(name, node, target, signature, schema)
            problems += [f"{key}.{name}: {problem}"] if problem else []
    return problems


def stage_of(node: Any, added: Collection[str]) -> type[Any] | None:
    """The class of the stage that a node names, None where `check_name` or `check` finds something wrong with it."""
    if not isinstance(node, dict) or "_target_" not in node or check_name("", node, added):
        return None
    try:
        found = _locate(node["_target_"], added)
    except _NotThereError:
        return None
    return found if inspect.isclass(found) and hasattr(found, "half") else None


def _is_odd(name: str) -> bool:
    return str(name).startswith("_") and name not in HYDRA_KEYS


def _check_argument(name: str, node: dict[str, Any], target: Any, signature: inspect.Signature, schema: Any) -> str:
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    names = [text for text, parameter in signature.parameters.items() if parameter.kind not in variadic]
    if name in schema.given_later:
        return f"is handed over by the run itself; remove it{_close(name, set(names) - schema.given_later)}"
    if name not in names:
        choices = [text for text in names if text not in schema.given_later]
        takes = ", ".join([*choices, *schema.beside]) or "no arguments"
        return (
            "" if takes_any else f"{node['_target_']} takes no such argument, it takes {takes}{_close(name, choices)}"
        )
    value = node[name]
    if (isinstance(value, dict) and "_target_" in value) or value == "???":
        return ""
    return misfit(value, _annotation(name, target, signature)) or ""


def _annotation(name: str, target: Any, signature: inspect.Signature) -> Any:
    """The argument's annotation; else the kind of its default; else Any."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception:  # names that exist for type checkers only
        hints = {}
    parameter = signature.parameters[name]
    annotation = hints.get(name, parameter.annotation)
    if annotation is not parameter.empty and not isinstance(annotation, str):
        return annotation | None if parameter.default is None and _is_plain(annotation) else annotation
    default = parameter.default
    if isinstance(default, bool):
        return bool
    return float if isinstance(default, float) else Any


def _is_plain(annotation: Any) -> bool:
    return annotation in (int, float, bool, str)


class _NotThereError(Exception):
    pass


def _locate(path: str, added: Collection[str]) -> Any:
    """The object of a dotted path, or why there is none: Hydra's own message hides the true import error."""
    parts = path.split(".")
    found: Any = None
    for index, part in enumerate(parts):
        name = ".".join(parts[: index + 1])
        if isinstance(found, ModuleType) and not allowlist.is_allowed_module(found.__name__, added):
            raise _NotThereError(
                f"{path:.200} leads out of {parts[0]}, to {found.__name__}; name what is the package's own"
            )
        if index and hasattr(found, part):
            found = getattr(found, part)
            continue
        try:
            if index and not isinstance(found, ModuleType):
                raise ModuleNotFoundError(name=name)
            found = import_module(name)
        except (Exception, SystemExit) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                parent = ".".join(parts[:index])
                close = _close(part, [text for text in dir(found) if not text.startswith("_")])
                raise _NotThereError(f"there is no '{part}' in {parent or 'the Python path'}{close}") from error
            reason = f"{type(error).__name__}: {error}"
            if moved := MOVED.search(reason):
                old = moved[1] or moved[2]
                reason = f"kandinsky_exp.{old} is kandinsky_exp.models.{old} now; change that import"
            raise _NotThereError(f"importing {name} failed: {reason}") from error
    return found


def _close(name: Any, choices: Any) -> str:
    close = get_close_matches(str(name), list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""
