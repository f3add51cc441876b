"""Check the entries of `validation.sets`: what each of them reads, and what its curve is called."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

from kandinsky_exp.config import companions, schema
from kandinsky_exp.config.suggestions import did_you_mean
from kandinsky_exp.config.types import type_problem
from kandinsky_exp.errors import cut
from kandinsky_exp.system.files import is_file, is_folder

KEY = "validation.sets"


class Entry(schema.Group):
    """What every entry may say."""

    source: Literal["folder", "list", "webdataset", "hub"] = "folder"
    image_column: schema.Text = ""
    caption_column: schema.Text = ""
    hole_column: schema.Text = ""
    holes: schema.Text = ""
    hint_column: schema.Text = ""
    hints: schema.Text = ""


class Local(Entry):
    path: schema.Text


class Shards(Entry):
    path: schema.Text | list[schema.Text]


class Hub(Entry):
    name: schema.Text
    split: schema.Text = "train"
    validation_split: schema.Text = ""
    revision: schema.Text = ""
    subset: schema.Text = ""


KINDS = {"folder": Local, "list": Local, "webdataset": Shards, "hub": Hub}


def entries(good: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name, from {dotted key: value}, without what is null."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in good.items():
        if key.startswith(f"{KEY}.") and value is not None:
            name, _, setting = key.removeprefix(f"{KEY}.").partition(".")
            found.setdefault(name, {})[setting] = value
    return found


def problems(good: dict[str, Any], stage: Callable[[], Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong; what to do).

    Args:
        good: {dotted key: value}.
        stage: gives the class of the stage, None where there is none that is good.
    """
    for name, entry in entries(good).items():
        if _is_metric(name, stage):
            yield KEY, f"'{cut(name)}' is the name of a metric; take another"
        else:
            yield from _problems(f"{KEY}.{name}", entry)
            yield from _companions(f"{KEY}.{name}", entry, good, stage)
            if entry.get("source") == "webdataset" and good.get("data.cache") is False:
                yield f"{KEY}.{name}", "shards are read as a stream; set data.cache=true, or leave it out"


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
    """Of holes and hints: given for a set where they are given for what trains."""
    for name, model in companions.WITH.items():
        folder, column = good.get(f"data.{name}s"), good.get(f"data.{name}_column")
        is_given = good.get("data.hint") == "column" if name == "hint" else bool(folder or column)
        own = [setting for setting in (f"{name}s", f"{name}_column") if setting in entry]
        made = stage()
        if own and made is not None and name not in made.companions({f"{name}s": "x", "hint": "column"}):
            yield f"{key}.{own[0]}", f"model={made.name} reads no {name}s; take model={model}, or leave it out"
        elif own and not is_given:
            yield f"{key}.{own[0]}", f"what trains has no {name}s of its own; set them in data, or leave it out"
        elif len(own) == 2:
            yield f"{key}.{own[0]}", f"and {own[1]} are both set; give one of them"
        elif is_given and folder and not own:
            yield f"{key}.{name}s", f"is not set; give the folder with a {name} for each of its pictures"
        elif f"{name}s" in own and not is_folder(entry[f"{name}s"]):
            yield f"{key}.{name}s", f"'{cut(str(entry[f'{name}s']))}' is no folder"
