"""What each task of `generate` draws from: which settings it needs, which it can use, and what is wrong with them.

A further task is a row of `TASKS`. Files are opened later: here no picture is read.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kandinsky_exp.errors import cut
from kandinsky_exp.system.files import is_file
from kandinsky_exp.system.picture_names import PICTURES

# By task: the settings that it draws from.
TASKS = {
    "text": ("prompts",),
    "image": ("prompts", "image", "strength"),
    "inpaint": ("prompts", "image", "mask"),
    "mix": ("mix", "mix_weights"),
    "control": ("prompts", "hint", "image"),
}
ONE_OF = {"control": ("hint", "image")}  # by task: of these settings one alone has to be given
NEEDED = {  # and what to do where one of these is not given; the others need not be
    "prompts": "is empty; give a list, or a text file with one prompt per line",
    "image": "is not set; give the file of a picture",
    "mask": "is not set; give a picture of the size of image, white where it is to be drawn anew",
    "mix": "is empty; give pictures and texts, such as 'mix=[photo.jpg, \"a watercolour\"]'",
}
STRENGTH = 0.5  # where none is given
PATH = ("/", "./", "../", "~/")  # how no text begins


def problems(good: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong; what to do) of the settings, as far as their types are right, that name what is drawn from.

    Args:
        good: {dotted key: value}.
    """
    if "task" not in good:
        return
    task = good["task"]
    either = ONE_OF.get(task, ())
    given = [key for key in either if good.get(key) is not None]
    if either and not given and either[0] in good:
        yield either[0], "is not set; give the file of a hint, or image=, a picture whose edges are the hint"
    elif len(given) > 1:
        yield given[0], f"and {given[1]} are both set; give one of them"
    for key in dict.fromkeys(key for keys in TASKS.values() for key in keys):
        is_given = good.get(key) not in (None, [])
        if is_given and key not in TASKS[task]:
            others = ", ".join(f"task={name}" for name, keys in TASKS.items() if key in keys)
            yield key, f"task={task} does not draw from it; remove it, or set {others}"
        elif not is_given and key in NEEDED and key in TASKS[task] and key in good and key not in either:
            yield key, NEEDED[key]
        elif is_given and key in ("image", "mask", "hint") and not is_file(good[key]):
            yield key, _missing(good[key])
    if task == "image":
        yield from _strength(good)
    if task == "mix":
        yield from _mix(good)


def _missing(path: str) -> str:
    return f"there is no file '{cut(path)}' here; check the path ({Path.cwd()} is the working directory)"


def _strength(good: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "strength" not in good or "inference_steps" not in good:
        return
    steps, strength = good["inference_steps"], strength_of(good["strength"])
    if int(steps * strength) == 0:
        whose = "the default, " if good["strength"] is None else ""
        least = math.ceil(10_000 / steps) / 10_000
        wrong = f"{whose}{strength:g}, leaves none of {steps} inference_steps to draw"
        yield "strength", f"{wrong}; give at least {least:g}, or more steps"


def strength_of(value: float | None) -> float:
    """The setting `strength`, or what it is where it was not given."""
    return STRENGTH if value is None else float(value)


def _mix(good: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for entry in good.get("mix", []):
        if not is_file(entry) and (entry.startswith(PATH) or Path(entry).suffix.lower() in PICTURES):
            yield "mix", _missing(entry)
    weights = good.get("mix_weights")
    if weights is None or "mix" not in good:
        return
    if len(weights) != len(good["mix"]):
        yield "mix_weights", f"{len(weights)} for {len(good['mix'])} entries of mix; give one for each, or none at all"
    elif not 0 < sum(weights) < math.inf:
        yield "mix_weights", f"they add up to {sum(weights):g}; give numbers whose sum is above 0, such as [2, 1]"
