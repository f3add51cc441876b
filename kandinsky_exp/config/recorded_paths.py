"""Paths in the configs of runs: recorded as absolute ones, and compared after a project was moved."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky_exp.system import files

PATHS = frozenset(
    {"output_root", "data.path", "data.validation_path", "data.instance_path", "data.class_path"}
    | {"data.holes", "data.hints", "image", "mask", "hint", "encoder"}
    | {"validation.prompts.image", "validation.prompts.mask", "validation.prompts.hint"}
)
# What may be something else as well (a hub id, `auto`, a list of prompts): paths where there is such a file or folder.
WHERE_THERE = frozenset(
    {"weights.prior", "weights.decoder", "data.name", "checkpoint.resume", "validation.prompts", "prompts", "base"}
    | {"prior", "decoder", "prior_adapter", "decoder_adapter", "adapter.source", "mix", "run"}
)
WORDS = frozenset({"tiny", "tiny_control", "auto", "never", "???"})
OF_A_SET = re.compile(r"^validation\.sets\.[^.]+\.")
Values = Mapping[str, Any]


def _is_among(key: str, paths: frozenset[str]) -> bool:
    """Whether a dotted key names a path; what an entry of `validation.sets` says means what it means of `data`."""
    return OF_A_SET.sub("data.", key) in paths


def absolute(values: Any, key: str = "") -> Any:
    """Nested settings with absolute paths."""
    if isinstance(values, dict):
        return {name: absolute(value, f"{key}.{name}" if key else str(name)) for name, value in values.items()}
    if isinstance(values, list) and _is_among(key, PATHS | WHERE_THERE):
        texts = not key.endswith("prompts")  # prompts are no paths, but mappings among them name some
        return [absolute(value, key) if texts or isinstance(value, dict) else value for value in values]
    if not isinstance(values, str) or values in WORDS or "://" in values or values.startswith("pipe:"):
        return values
    is_path = _is_among(key, PATHS) or (_is_among(key, WHERE_THERE) and files.exists(values))
    return str(_whole(values)) if is_path else values


def _whole(path: str) -> Path:
    found = files.expanded(path).absolute()
    return found.resolve() if ".." in found.parts else found


def moved(path: str, old_root: str, new_root: Path) -> Path | None:
    """Where what was at a path is now, whether it was taken along or not; None for what lay elsewhere.

    Args:
        old_root: an output folder, which tells from where to where its project has moved, by what the two places do
            not share; relative where its run recorded no absolute paths.
        new_root: where that folder is now.
    """
    old, new, place = files.expanded(old_root), new_root.absolute(), files.expanded(path)
    while old.name and old.name == new.name:
        old, new = old.parent, new.parent
    return _whole(str(new / place.relative_to(old))) if place.is_relative_to(old) else None


def as_before(now: Values, before: Values) -> dict[str, Any]:
    """Flat settings, the same paths written as they were: relative, or at the place from which all has moved."""
    roots = str(before.get("output_root", "")), Path(str(now.get("output_root", "")))
    known = _known(before)
    return {
        key: before[key] if key in known and _alike(before[key], value, roots) else value for key, value in now.items()
    }


def news(now: Values, before: Values) -> dict[str, Any]:
    """Flat settings without the paths that mean what they meant before."""
    same = as_before(now, before)
    known = _known(before)
    return {key: value for key, value in now.items() if key not in known or same[key] != before[key]}


def _known(before: Values) -> set[str]:
    return {key for key in before if _is_among(key, PATHS | WHERE_THERE)}


def _alike(was: Any, now: Any, roots: tuple[str, Path]) -> bool:
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(_alike(*pair, roots) for pair in zip(was, now, strict=True))
    if isinstance(was, dict) and isinstance(now, dict):
        return was.keys() == now.keys() and all(_alike(was[key], now[key], roots) for key in was)
    if was == now or not (isinstance(was, str) and isinstance(now, str)) or now in WORDS or "://" in now:
        return bool(was == now)
    return _whole(now) in (_whole(was), moved(was, *roots))
