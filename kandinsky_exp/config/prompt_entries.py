"""Entries of `validation.prompts` that are mappings: a prompt with settings of its own."""

from collections.abc import Callable, Iterator
from typing import Any

from kandinsky_exp.config import schema
from kandinsky_exp.config.suggestions import did_you_mean
from kandinsky_exp.config.types import type_problem
from kandinsky_exp.errors import cut
from kandinsky_exp.system.files import is_file

KEY = "validation.prompts"
DRAWN_FROM = ("image", "mask", "hint")  # files; not every stage can use each of them


class Entry(schema.Group):
    """What an entry may say; what it does not is as `validation` has it."""

    prompt: schema.Text
    negative: schema.Text | None = None
    seed: schema.Seed | None = None
    guidance_scale: schema.PositiveOrZero | None = None
    inference_steps: schema.Steps | None = None
    height: schema.Side | None = None
    width: schema.Side | None = None
    image: schema.Text | None = None
    mask: schema.Text | None = None
    hint: schema.Text | None = None


def problems(good: dict[str, Any], stage: Callable[[], Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong; what to do) of all entries, which are told by their numbers, the first being 1.

    Args:
        good: {dotted key: value}.
        stage: gives the class of the stage, None where there is none that is good.
    """
    entries = good.get(KEY)
    for number, entry in enumerate(entries if isinstance(entries, list) else [], 1):
        if isinstance(entry, dict):
            for problem in _problems(entry, stage):
                yield KEY, f"entry {number}: {problem}"


def _problems(entry: dict[str, Any], stage: Callable[[], Any]) -> Iterator[str]:
    hints = Entry.annotations()
    for key, value in entry.items():
        if key not in hints:
            names = ", ".join(hints)
            yield f"nothing reads {cut(str(key))}; it takes {names}{did_you_mean(str(key), hints)}"
        elif problem := type_problem(value, hints[key]):
            yield f"{key} {problem}"
        elif value is not None and key in DRAWN_FROM:
            yield from _file(key, value, entry, stage)
    if "prompt" not in entry:
        yield "has no prompt; write {prompt: a fox, …}"


def _file(key: str, path: str, entry: dict[str, Any], stage: Callable[[], Any]) -> Iterator[str]:
    made = stage()
    other = {"image": "mask", "mask": "image"}.get(key, "")
    if made is not None and key not in made.prompt_inputs:
        yield f"{key} is nothing that model={made.name} draws a prompt from; remove it"
    elif not is_file(path):
        yield f"{key}: there is no file '{cut(path)}' here; check the path"
    elif other in getattr(made, "prompt_inputs", ()) and entry.get(other) is None:
        yield f"{key} needs {other} beside it; give both"
