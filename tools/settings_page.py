"""Write docs/settings.md: every setting with its allowed values, its default and its meaning.

    python tools/settings_page.py

Keys, defaults and meanings are those of the yaml files in conf/, allowed values those of the schema. What stands above
the marker in the page is kept.
"""

import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kandinsky_exp import cli
from kandinsky_exp.config import types, verb_schemas

PROJECT = Path(__file__).parents[1]
CONF = PROJECT / "conf"
PAGE = PROJECT / "docs" / "settings.md"
MARKER = "<!-- From here on the page is made by tools/settings_page.py: change conf/ or the schema instead. -->\n"
KEY = re.compile(r"( *)(\w+):(?: +(.*))?")
EXAMPLE = re.compile(r"kandinsky-exp .*?(?:  +(.*))?")
NOT_SHOWN = ("defaults", "hydra", "_partial_", "_target_")
LISTED = ("experiment", "sweep")  # groups whose files choose among settings and have none of their own


@dataclass
class Setting:
    """One line of a yaml file."""

    key: str  # dotted
    default: str
    meaning: str


@dataclass
class ConfigFile:
    """A yaml file as its reader sees it."""

    about: str = ""  # the header, without its example commands
    settings: list[Setting] = field(default_factory=list)
    target: str | None = None


def read(file: Path) -> ConfigFile:
    found, above, before = ConfigFile(), [], ""
    parents: dict[int, str] = {}
    for line in file.read_text("utf-8").splitlines():
        if line.startswith("#") and not found.settings and found.target is None and not parents:
            above.append(line.lstrip("# "))
        elif line.startswith("#"):
            before += line.lstrip("# ") + " "
        elif line.lstrip().startswith("#"):
            found.settings[-1].meaning += " " + line.lstrip("# ")
        elif match := KEY.fullmatch(line):
            indent, name, rest = len(match[1]), match[2], match[3] or ""
            value, _, comment = (f" {rest}").partition(" #")
            parents = {depth: key for depth, key in parents.items() if depth < indent} | {indent: name}
            if name == "_target_":
                found.target = value.strip()
            found.settings.append(Setting(".".join(parents.values()), value.strip(), before + comment.strip()))
            before = ""
    found.settings = [one for one in found.settings if not set(one.key.split(".")) & set(NOT_SHOWN)]
    found.about = " ".join(filter(None, map(_without_example, above)))
    return found


def _without_example(line: str) -> str:
    example = EXAMPLE.fullmatch(line)
    return "" if line.startswith("@package") else (example[1] or "") if example else line


def page() -> str:
    """All below the marker."""
    return "\n".join([MARKER, *_training(), *_named(), *_verbs(), *_optuna()])


def _training() -> Iterator[str]:
    hints = typing.get_type_hints(verb_schemas.Train, include_extras=True)
    yield "## A run\n"
    yield from _table(_of_root("train"), hints, "")
    for group, chosen in _groups():
        base = read(CONF / group / f"{chosen}.yaml")
        yield f"## `{group}`\n"
        yield from _option(group, chosen, base, base.settings, hints[group], " (the default)")
        for file in sorted((CONF / group).glob("*.yaml")):
            if file.stem != chosen:
                other = read(file)
                yield from _option(group, file.stem, other, _changed(other, base), hints[group])
                yield from _missing(other, base, group)


def _groups() -> Iterator[tuple[str, str]]:
    """The groups of a run with the option that is chosen where none is typed."""
    for group, chosen in re.findall(r"^  - (\w+): (\w+)$", (CONF / "train.yaml").read_text("utf-8"), re.MULTILINE):
        if group != "hydra" and group not in LISTED:
            yield group, chosen


def _changed(other: ConfigFile, base: ConfigFile) -> list[Setting]:
    """What an option sets differently, or explains differently."""
    known = {one.key: one for one in base.settings}

    def is_new(one: Setting) -> bool:
        before = known.get(one.key)
        return before is None or one.default != before.default or one.meaning not in ("", before.meaning)

    return [one for one in other.settings if is_new(one)]


def _missing(other: ConfigFile, base: ConfigFile, group: str) -> Iterator[str]:
    own = {one.key for one in other.settings}
    if missing := [f"`{group}.{one.key}`" for one in base.settings if one.key not in own]:
        yield f"It has no {', '.join(missing)}.\n"


def _of_root(verb: str) -> list[Setting]:
    return read(CONF / f"{verb}.yaml").settings


def _option(
    group: str, option: str, file: ConfigFile, settings: list[Setting], schema: Any, note: str = ""
) -> Iterator[str]:
    if option != "default":
        yield f"### `{group}={option}`{note}\n"
    yield from _about(file)
    if len(settings) < len(file.settings):
        yield "Like the default, but for:\n" if settings else "Its settings are those of the default.\n"
    hints = {**_of_target(file.target), **typing.get_type_hints(schema, include_extras=True)}
    yield from _table(settings, hints, f"{group}.")


def _about(file: ConfigFile) -> Iterator[str]:
    if file.about:
        yield f"{_escaped(file.about)}\n"
    if file.target:
        yield f"Builds `{file.target}`.\n"


def _of_target(target: str | None) -> dict[str, Any]:
    """Annotations of the arguments of our own targets; those of others need packages that may not be installed."""
    if target is None or not target.startswith("kandinsky_exp."):
        return {}
    module, _, name = target.rpartition(".")
    signature = inspect.signature(getattr(import_module(module), name), eval_str=True)
    return {key: parameter.annotation for key, parameter in signature.parameters.items()}


def _named() -> Iterator[str]:
    for group in LISTED:
        yield f"## `{group}`\n"
        yield f"| `{group}=` | what it is |\n| --- | --- |"
        for file in sorted((CONF / group).glob("*.yaml")):
            varied = re.findall(r"^      ([\w.]+): (.*?)(?:  #.*)?$", file.read_text("utf-8"), re.MULTILINE)
            values = ", ".join(f"`{key}={value}`" for key, value in varied) if group == "sweep" else ""
            yield f"| `{file.stem}` | {' '.join(filter(None, [values, _escaped(read(file).about)]))} |"
        yield ""


def _verbs() -> Iterator[str]:
    for verb, row in cli.VERBS.items():
        if verb != "train":
            hints = typing.get_type_hints(getattr(verb_schemas, verb.title()), include_extras=True)
            yield f"## `kandinsky-exp {verb}`\n"
            yield f"{row.purpose[0].upper()}{row.purpose[1:]}.\n"
            if shared := [f"`{name}`" for name in _shared(verb) if name not in ("hydra", "_self_")]:
                yield f"{'All settings of a run' if '`train`' in shared else ', '.join(shared)}, as above, and:\n"
            typed = {key: name for name, key in row.plain.items()}
            yield from _table(_of_root(verb), hints, "", typed)


def _shared(verb: str) -> list[str]:
    """The groups of a run that a verb takes too, or `train` for all of them."""
    return re.findall(r"^  - (\w+)(?:: \w+)?\b", (CONF / f"{verb}.yaml").read_text("utf-8"), re.MULTILINE)


def _optuna() -> Iterator[str]:
    yield "## `hydra/sweeper=optuna`\n"
    folder = CONF / "hydra" / "sweeper"
    yield from _table(read(folder / "optuna.yaml").settings, {}, "hydra.sweeper.")
    for group in ("sampler", "pruner"):
        for file in sorted((folder / group).glob("*.yaml")):
            yield f"### `hydra/sweeper/{group}={file.stem}`\n"
            yield from _about(read(file))
            yield from _table(read(file).settings, {}, f"hydra.sweeper.{group}.")


def _table(
    settings: list[Setting], hints: dict[str, Any], prefix: str, typed: Mapping[str, str] = MappingProxyType({})
) -> Iterator[str]:
    """The settings, by the keys that are typed for them where these are others."""
    rows = [one for one in settings if one.default]  # others are the heads of the keys below them
    if rows:
        yield "| key | allowed | default | meaning |\n| --- | --- | --- | --- |"
        for one in rows:
            default = "required" if one.default == "???" else f"`{one.default}`"
            meaning = _escaped(one.meaning.removeprefix("required: "))
            yield f"| `{prefix}{typed.get(one.key, one.key)}` | {_allowed(one, hints)} | {default} | {meaning} |"
        yield ""


def _allowed(one: Setting, hints: dict[str, Any]) -> str:
    first, _, rest = one.key.partition(".")
    hint = hints.get(first)
    if rest and hint is not None:
        hint = typing.get_type_hints(hint, include_extras=True).get(rest)
    if hint not in (None, inspect.Parameter.empty):
        return _escaped(types.words(hint))
    return _kind(one.default)


def _kind(default: str) -> str:
    """What a value has to be that only a library judges, by its default."""
    if default in ("true", "false"):
        return types.words(bool)
    if re.fullmatch(r"-?[\d.]+(e-?\d+)?", default):
        return types.words(int if default.isdigit() else float)
    return "a list" if default.startswith("[") else ""


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table too."""
    return re.sub(r"([*|\\])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def whole(head: str) -> str:
    return f"{head.partition(MARKER)[0]}{page().rstrip()}\n"


if __name__ == "__main__":
    PAGE.write_text(whole(PAGE.read_text("utf-8")), "utf-8")
