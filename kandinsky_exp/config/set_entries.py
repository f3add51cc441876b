"""Check the entries of `validation.sets`: what each of them reads, and what its curve is called."""

import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

from kandinsky_exp.config import companions, schema
from kandinsky_exp.config.suggestions import did_you_mean
from kandinsky_exp.config.types import type_problem
from kandinsky_exp.errors import cut
from kandinsky_exp.system.files import is_file, is_folder

KEY = "validation.sets"
NAME = re.compile(r"[A-Za-z0-9_-]+")


class Entry(schema.Group):
    """What every entry may say."""

    source: Literal["folder", "list", "webdataset", "hub"] = "folder"
    image_column: schema.Text | None = None
    caption_column: schema.Text | None = None
    hole_column: schema.Text | None = None
    holes: schema.Text | None = None
    hint_column: schema.Text | None = None
    hints: schema.Text | None = None


class Local(Entry):
    path: schema.Text


class Shards(Entry):
    path: schema.Text | list[schema.Text]


class Hub(Entry):
    name: schema.Text
    split: schema.Text = "train"
    validation_split: schema.Text | None = None
    revision: schema.Text | None = None
    subset: schema.Text | None = None


KINDS = {"folder": Local, "list": Local, "webdataset": Shards, "hub": Hub}


def entries(good: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name, from {dotted key: value}; what is no mapping has no keys."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in good.items():
        if key.startswith(f"{KEY}."):
            name, _, setting = key.removeprefix(f"{KEY}.").partition(".")
            found.setdefault(name, {}).update({setting: value} if setting else {})
    return found


def problems(good: dict[str, Any], stage: Callable[[], Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong; what to do).

    Args:
        good: {dotted key: value}.
        stage: gives the class of the stage, None where there is none that is good.
    """
    for name, entry in entries(good).items():
        key = f"{KEY}.{name}"
        if not NAME.fullmatch(name):
            yield KEY, f"'{cut(name)}' is no name for a curve; take letters, digits, - and _"
        elif _is_metric(name, stage):
            yield KEY, f"'{cut(name)}' is the name of a metric; take another"
        elif not entry:
            yield key, f"is no set of pictures; write '{KEY}={{{name}: {{path: my_pictures}}}}'"
        else:
            yield from _problems(key, entry)
            yield from _companions(key, entry, good, stage)


def _is_metric(name: str, stage: Callable[[], Any]) -> bool:
    judged = getattr(stage(), "judges", ())
    return name == "loss" or name.startswith("loss_") or name in (*judged, *get_args(schema.DrawnMetric))


def _problems(key: str, entry: dict[str, Any]) -> Iterator[tuple[str, str]]:
    source = entry.get("source", "folder")
    if problem := type_problem(source, Entry.annotations()["source"]):
        yield f"{key}.source", problem
        return
    kind = KINDS[source]
    hints = kind.annotations()
    for name, value in entry.items():
        if name not in hints:
            names = ", ".join(hints)
            yield f"{key}.{name}", f"source={source} takes no such thing; it takes {names}{did_you_mean(name, hints)}"
        elif problem := type_problem(value, hints[name]):
            yield f"{key}.{name}", problem
        elif name == "path" and kind is Local and not (is_folder if source == "folder" else is_file)(value):
            what = source if source == "folder" else "file"
            yield f"{key}.path", f"there is no {what} '{cut(value)}' here; check the path"
    for name in hints:
        if not hasattr(kind, name) and name not in entry:
            yield f"{key}.{name}", f"is not set; give it, {KEY}={{…: {{{name}: …}}}}"


def _companions(
    key: str, entry: dict[str, Any], good: dict[str, Any], stage: Callable[[], Any]
) -> Iterator[tuple[str, str]]:
    """Of holes and hints, which the stage has to read."""
    named = {f"data.{name}": value for name, value in entry.items() if name.startswith(("hole", "hint"))}
    if named:
        shared = {"data.hint": good.get("data.hint", "canny")} if any("hint" in name for name in named) else {}
        for name, problem in companions.problems({**named, **shared}, stage):
            yield name.replace("data.", f"{key}.", 1), problem
