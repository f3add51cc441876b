"""Check each `_target_` before anything is built: it may be named, exists, and takes these arguments of these types."""

import contextlib
import inspect
import re
import sys
import typing
from collections.abc import Collection
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from kandinsky_exp.config import allowlist, saved_config
from kandinsky_exp.config.schema import Group, OpenNode
from kandinsky_exp.config.suggestions import did_you_mean
from kandinsky_exp.config.types import type_problem
from kandinsky_exp.data.source_facts import SourceFacts
from kandinsky_exp.errors import Problem

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


def nodes(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """All mappings with a `_target_`, with their dotted keys, the outer ones first."""
    return [(key, node) for key, _, node in saved_config.walk(values) if isinstance(node, dict) and "_target_" in node]


def problems(
    values: dict[str, Any], root: type[Group], added: Collection[str], *, quick: bool = False
) -> list[Problem]:
    """What is wrong with any target in resolved settings.

    Args:
        root: the schema of `values`.
        added: modules that the user trusts beside those that any config may name.
        quick: nodes whose keys the schema has judged already are not looked at beyond their names.
    """
    found = []
    for key, node in nodes(values):
        schema = _schema_of(root, key)
        problem = check_name(key, node, added)
        judged = node.keys() <= schema.annotations().keys()
        found += problem if problem or (quick and judged) else check(key, node, schema, added)
    return found


def _schema_of(root: type[Group], key: str) -> type[OpenNode]:
    annotation = root.annotations().get(key)
    return annotation if isinstance(annotation, type) and issubclass(annotation, OpenNode) else OpenNode


def check_name(key: str, node: dict[str, Any], added: Collection[str] = ()) -> list[Problem]:
    """The part of the check that imports nothing.

    Args:
        added: modules that the user trusts beside those that any config may name.
    """
    target = node["_target_"]
    if not isinstance(target, str):
        return [Problem(f"{key}._target_", f"has to be package.module.name, not {target!r:.200}")]
    if problem := allowlist.name_problem(target, added):
        return [Problem(f"{key}._target_", problem)]
    for place, name, value in saved_config.walk(node, key):
        if "${" in name or (isinstance(value, str) and "${" in value):
            # It was escaped, and would be resolved when the target is built: into anything.
            return [Problem(place, "holds ${ after everything was resolved; write the value itself")]
    package = target.split(".")[0]
    if is_installed(package):
        return []
    missing = f"{target} is in '{package}', which is not installed; {how_to_install(package)}"
    if allowlist.covers(added, target):  # a file of the user's, whose name may be that of a stranger's package
        missing = f"Python does not find {package}; if {package}.py is yours, set PYTHONPATH to its folder"
    return [Problem(f"{key}._target_", missing)]


def check(
    key: str, node: dict[str, Any], schema: type[OpenNode] = OpenNode, added: Collection[str] = ()
) -> list[Problem]:
    """What is wrong with a node whose name is good. Imports the target's module.

    Args:
        key: the node's dotted key.
        schema: tells which keys are not the target's arguments, and what the target has to be.
        added: modules that the user trusts beside those that any config may name.
    """
    name = node["_target_"]
    try:
        target = _locate(name, added)
    except _NotThereError as error:
        return [Problem(f"{key}._target_", str(error))]
    if not callable(target):
        return [Problem(f"{key}._target_", f"{name} cannot be called; give a class or a function")]
    if problem := allowlist.object_problem(name, target, schema.role, added):
        return [Problem(f"{key}._target_", problem)]
    if lacking := sorted(getattr(target, "__abstractmethods__", ())):
        return [Problem(f"{key}._target_", f"{name} lacks {', '.join(lacking)}, which its base class leaves open")]
    if schema.given_later and node.get("_partial_") is not True:
        return [Problem(f"{key}._partial_", "has to be true, for the run hands over the other arguments")]
    try:
        signature = _stage_signature(target) if schema.role == "model" else inspect.signature(target)
    except (TypeError, ValueError):  # it is made in C and does not tell
        return []
    found = {argument: _check_argument(argument, node, target, signature, schema) for argument in node}
    if not any(found.values()) and schema.role == "model":
        found = dict(target.setting_problems(node))
    return [Problem(f"{key}.{argument}", problem) for argument, problem in found.items() if problem]


def _stage_signature(stage: type[Any]) -> inspect.Signature:
    """What a stage takes: where it hands further settings on, those of its base, too."""
    found = dict(inspect.signature(stage).parameters)
    for base in stage.__mro__[1:]:
        further = [name for name, parameter in found.items() if parameter.kind is parameter.VAR_KEYWORD]
        if further and "__init__" in vars(base) and base is not object:
            del found[further[0]]
            of_base = list(inspect.signature(vars(base)["__init__"]).parameters.items())[1:]
            found = {**{name: parameter for name, parameter in of_base if name not in found}, **found}
    return inspect.Signature(sorted(found.values(), key=lambda parameter: parameter.kind))


def stage_of(node: Any, added: Collection[str]) -> type[Any] | None:
    """The class of the stage that a node names, None where `check_name` or `check` finds something wrong with it."""
    if not isinstance(node, dict) or "_target_" not in node or check_name("", node, added):
        return None
    try:
        found = _locate(node["_target_"], added)
    except _NotThereError:
        return None
    return found if inspect.isclass(found) and hasattr(found, "half") else None


def _check_argument(
    name: str, node: dict[str, Any], target: Any, signature: inspect.Signature, schema: type[OpenNode]
) -> str | None:
    value = node[name]
    if str(name).startswith("_"):
        return None if name in HYDRA_KEYS else f"no such key{did_you_mean(name, HYDRA_KEYS)}"
    if name in schema.beside or (value is None and name in schema.by_run):
        return None
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    names = [text for text, parameter in signature.parameters.items() if parameter.kind not in variadic]
    choices = [text for text in names if text not in schema.given_later]
    if name in schema.given_later:
        return f"is handed over by the run itself; remove it{did_you_mean(name, choices)}"
    if name not in names:
        takes = ", ".join([*choices, *schema.beside]) or "no arguments"
        meant = did_you_mean(name, choices)
        return None if takes_any else f"{node['_target_']} takes no such argument, it takes {takes}{meant}"
    if (isinstance(value, dict) and "_target_" in value) or value == "???":
        return None
    return type_problem(value, _annotation(name, target, signature))


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
        is_plain = annotation in (int, float, bool, str)
        return annotation | None if is_plain and parameter.default is None else annotation
    default = parameter.default
    if isinstance(default, bool):
        return bool
    return float if isinstance(default, float) else Any


class _NotThereError(Exception):
    pass


def _locate(path: str, added: Collection[str]) -> Any:
    """The object of a dotted path, or why there is none: Hydra's own message hides the true import error."""
    parts = path.split(".")
    found: Any = None
    for index, part in enumerate(parts):
        name = ".".join(parts[: index + 1])
        if isinstance(found, ModuleType) and not allowlist.covers((*allowlist.MODULES, *added), found.__name__):
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
                meant = did_you_mean(part, [text for text in dir(found) if not text.startswith("_")])
                raise _NotThereError(f"there is no '{part}' in {parent or 'the Python path'}{meant}") from error
            reason = f"{type(error).__name__}: {error}"
            if moved := MOVED.search(reason):
                old = moved[1] or moved[2]
                reason = f"kandinsky_exp.{old} is kandinsky_exp.models.{old} now; change that import"
            raise _NotThereError(f"importing {name} failed: {reason}") from error
    return found
