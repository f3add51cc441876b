"""Checkpoint integrity: `state.json` holds size and SHA-256 of every other file, and its own checksum.

sha256 tells bits that flipped on a disk or on the way from one; whoever can write the folder can also write the sums.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kandinsky_exp.errors import CheckpointError, cause_of
from kandinsky_exp.system.files import flush

STATE = "state.json"
SUM = "sha256"


def seal(folder: Path, state: dict[str, Any]) -> None:
    """Write `state.json`, with what is needed to tell later that nothing has changed; then all is on the disk."""
    files = {name: {"bytes": path.stat().st_size, SUM: _digest(path)} for name, path in _files(folder)}
    content = {**state, "files": files}
    (folder / STATE).write_text(json.dumps({**content, SUM: _sum(content)}, indent=2) + "\n", "utf-8")
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def read_state(folder: Path) -> dict[str, Any]:
    """The loop state of a checkpoint, whose other files nobody has looked at yet.

    Raises:
        CheckpointError: the file is missing, damaged, or is no such state.
    """
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
        if state.pop(SUM) != _sum(state):
            raise ValueError("its checksum differs")
        if not isinstance(state["files"], dict) or type(state["step"]) is not int:
            raise TypeError("it lacks its step or the list of its files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint.resume: {folder} is no complete checkpoint ({STATE}: {cause_of(error)}); give a "
            "checkpoints/step-… folder, or a run's"
        ) from error
    return dict(state)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if it is as it was written. Reads all of it."""
    try:
        expected = read_state(folder)["files"]
        found = dict(_files(folder))
        if strangers := sorted(found.keys() - expected.keys()):
            return f"{strangers[0]} is none of its files"
        if missing := sorted(expected.keys() - found.keys()):
            return f"{missing[0]} is missing"
        for name, facts in expected.items():
            if (size := found[name].stat().st_size) != facts["bytes"]:
                return f"{name} has {size:,} bytes instead of {facts['bytes']:,}"
        for name, facts in expected.items():
            if _digest(found[name]) != facts[SUM]:
                return f"the checksum of {name} differs"
    except CheckpointError as error:
        return f"{STATE}: {error.__cause__ or error}"
    except (OSError, KeyError, TypeError, ValueError) as error:
        return f"it cannot be read: {error}"
    return None


def newest_good(root: Path, on_damaged: Callable[[str], None]) -> Path | None:
    """The last checkpoint that is whole; None where there is none at all.

    Args:
        on_damaged: gets a line for each damaged one on the way.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    problems: list[str] = []
    for folder in sorted(filter(Path.is_dir, root.glob("step-*")), reverse=True):
        problem = damage(folder)
        if problem is None:
            return folder
        problems.append(f"{folder.name}: {problem}")
        on_damaged(f"checkpoint {folder} is damaged and was passed over: {problem}")
    if problems:
        raise CheckpointError(
            f"checkpoint.resume: none of the {len(problems)} checkpoints in {root} is whole ({problems[0]}); bring one "
            "back from a copy, or remove that folder to start from the beginning"
        )
    return None


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """All files but `state.json`, by their names relative to the checkpoint."""
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and path != folder / STATE:
            yield path.relative_to(folder).as_posix(), path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
