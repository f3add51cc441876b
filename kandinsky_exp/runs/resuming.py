"""Check the settings, data and weights of a resumed run against what it was so far."""

from dataclasses import dataclass
from typing import Any

from kandinsky_exp.config import recorded_paths
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.runs import integrity
from kandinsky_exp.runs.run_folder import RunFolder
from kandinsky_exp.system import files

Values = dict[str, Any]

# Data sets and weights count by what they hold, wherever that lies now: their paths are not among these.
FIXED = (
    "seed",
    "model",
    "adapter",
    "optimizer._target_",
    "data.resolution",
    "data.flip",
    "data.buckets",
    "data.class_prompt",  # this and the next two are of images that may be drawn later
    "data.num_class_images",
    "data.prior_loss_weight",
    "trainer.group_by_length",
)
ABSENT = {"trainer.group_by_length": False}  # what an earlier version did, which had no such setting
# Of these, what no checkpoint fits that was made with others: not even one that a new run begins at.
OF_STATE = (
    "adapter.name",
    "adapter.rank",
    "adapter.alpha",
    "adapter.use_rslora",
    "adapter.target_modules",
    "optimizer._target_",
)
# Of a run that does the steps after its last checkpoint again, these change nothing that is measured.
PLACE = ("name", "output_root")
NEUTRAL = (
    *PLACE,
    "checkpoint",
    "tracker",
    "hub",
    "validation.every",
    "trainer.log_every",
    "trainer.max_minutes",
    "data.path",
    "data.instance_path",
    "data.class_path",
    "data.num_workers",
    "data.encode_workers",
    "data.on_error",
    "weights",
)
MORE_IS_READ = (
    "; more counts as a picture than when it began (.jfif, .jp2 and others, folders that are links): move what was not "
    "used then out of the folder"
)
LENGTH = ("trainer.max_steps", "trainer.max_epochs")  # neutral to a schedule that does not look at it


@dataclass(frozen=True)
class Facts:
    """What a start trains, beyond its settings.

    Args:
        source: fingerprint of the data set; None = not compared.
        encoders: of the frozen encoders' files; None = not compared.
        holds_out: whether `validation.fraction` decides which images train.
        total_batch: samples per optimizer step, over all processes.
        rules: by which pictures are read, `PICTURE_RULES`.
    """

    source: str | None
    encoders: str | None
    holds_out: bool
    total_batch: int
    processes: int
    rules: int


def check(space: RunFolder, before: Values, now: Values, facts: Facts) -> None:
    """Compare a start with what the run was so far; says what changed in `space.changed` and `space.notes`.

    Args:
        before, now: flat settings. Keys that only one of them has are of another version.

    Raises:
        ConfigError: listing what may not change, and how to start anew.
    """
    before = {**ABSENT, **before} if before else before
    same = recorded_paths.as_before(now, before)
    different = {key: (value, now[key]) for key, value in before.items() if key in now and value != same[key]}
    of_sets = [key for key in before.keys() ^ now.keys() if before and _is_in(key, ("validation.sets",))]
    different |= {key: (was, is_now) for key in sorted(of_sets) if (was := before.get(key)) != (is_now := now.get(key))}
    if space.start is None or space.is_fork:  # it begins anew, whatever it was
        space.changed = different
        return
    state = integrity.read_state(space.start)
    fixed = (*FIXED, "validation.fraction") if facts.holds_out else FIXED
    problems = [f"{key}: was {was}, is {now}" for key, (was, now) in different.items() if _is_in(key, fixed)]
    more = MORE_IS_READ if is_of_old_rules(space, facts.rules) else ""
    for found, recorded, problem in (
        (facts.source, space.record.source, f"data: not the images and captions that it trains on{more}"),
        (facts.encoders, space.record.encoders, "weights: not the encoders that it trains with"),
    ):
        if None not in (found, recorded) and found != recorded:
            problems.append(problem)
    if state["total_batch"] != facts.total_batch:
        problems.append(
            f"trainer.batch_size × trainer.grad_accumulation × processes: was {state['total_batch']}, is "
            f"{facts.total_batch}; images would be left out or seen twice"
        )
    if problems:
        listed = "\n  ".join(problems)
        weights = f"weights.{space.record.half}" if any(_is_in(key, OF_STATE) for key in different) else None
        way, what = (weights, "result") if weights else ("checkpoint.resume", "weights")
        raise ConfigError(
            f"name: {space.folder} cannot go on with other\n  {listed}\nSet these as they were; or start anew under "
            f"another name, with {files.setting(way, space.folder)} from the {what} of this run"
        )
    space.changed = different
    space.notes += _notes(different, state["processes"], facts.processes)


def order_of_visits(space: RunFolder) -> Any:
    """By which a run that goes on visits its rows; None where it begins. An earlier version had one order only."""
    if space.start is None or space.is_fork:
        return None
    return integrity.read_state(space.start).get("order", "permutation")


def is_of_old_rules(space: RunFolder, rules: int) -> bool:
    """Whether a run began when pictures were read by other rules."""
    return space.is_resumed and space.start is not None and space.record.rules != rules


def notes_on_rules(space: RunFolder, rules: int) -> list[str]:
    """What is to be known of a run that goes on with pictures that are read by other rules than before."""
    if not is_of_old_rules(space, rules):
        return []
    return [
        "since this run began, colour profiles of pictures count, and so do transparent colours of 16-bit pictures and "
        "names with dots in shards: all are encoded anew. Losses from before and from now on compare if there are "
        f"none of these; if there are, start anew under another name, with checkpoint.resume={space.folder} from the "
        "weights of this run"
    ]


def _notes(different: dict[str, tuple[Any, Any]], processes_before: int, processes: int) -> list[str]:
    notes = []
    listed = ", ".join(f"{key} {was} → {now}" for key, (was, now) in different.items() if key not in PLACE)
    if listed:
        notes.append(f"going on with changed settings: {listed}")
    if processes_before != processes:
        notes.append(
            f"going on with {processes} processes instead of {processes_before}: the order of the data stays the same, "
            "but noise and rounding differ, so that the last bits may too"
        )
    elif any(_is_in(key, ("trainer.batch_size", "trainer.grad_accumulation")) for key in different):
        notes.append("the order of the data stays the same, but noise and rounding differ: the last bits may too")
    return notes


def repeats(space: RunFolder, now: Values, facts: Facts) -> bool:
    """Whether the steps that are done again, after the last checkpoint, come to the very numbers that they came to."""
    steady = str(now.get("scheduler._target_", "")).endswith(".constant")
    neutral = (*NEUTRAL, *LENGTH) if steady else NEUTRAL
    if space.start is not None and integrity.read_state(space.start)["processes"] != facts.processes:
        return False
    return space.is_resumed and all(_is_in(key, neutral) for key in space.changed)


def _is_in(key: str, groups: tuple[str, ...]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)
