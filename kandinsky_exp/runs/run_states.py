"""The state of a run that left no result, and what it can be used for all the same."""

from pathlib import Path

from kandinsky_exp.config import saved_config
from kandinsky_exp.errors import CheckpointError, ConfigError
from kandinsky_exp.models.components import NETWORKS, PipelineHalf
from kandinsky_exp.runs import integrity
from kandinsky_exp.runs.run_folder import Record, read_record
from kandinsky_exp.system import files
from kandinsky_exp.system.files import LOG, occupied


def no_result(run_folder: Path, key: str | None, part: str) -> str:
    """Why there is no result, and what to do, as `...; ...`.

    Args:
        key: of the setting that a checkpoint could be given to; None where only a result will do.
        part: that the checkpoint has to have.
    """
    fate, go_on = _fate(run_folder)
    step = newest_checkpoint(run_folder)
    if step is None:
        return f"{fate}, and there is no checkpoint of it; {go_on}"
    if key is None:
        return f"{fate}; {go_on}"
    if not (step / part).is_dir():
        return f"{fate}, and it trained the other stage; give another"
    return f"{fate}; give its newest checkpoint, {files.setting(key, step)}, or {go_on}"


def _fate(run_folder: Path) -> tuple[str, str]:
    """(what has become of a run, what brings it to its result)."""
    record, again = read_record(run_folder), "go on with it first, by the command that started it"
    status = None if record is None else record.status
    if status == "RUNNING" and is_running(run_folder):
        return f"{run_folder} is running, and has no result yet", "wait for its end"
    if status == "FINISHED":
        return f"{run_folder} is finished, but its result is gone", "train it once more under another name"
    fates = {"FAILED": f"failed ({LOG} says why)", "KILLED": "was stopped", "RUNNING": "was killed"}
    return f"{run_folder} {fates.get(str(status), 'is not finished')} and left no result", again


def is_running(run_folder: Path) -> bool:
    """Whether a process is training there now; what a killed one has written of itself is no answer."""
    try:
        with occupied(run_folder):
            return False
    except ConfigError:
        return True
    except OSError:  # a folder that cannot be written
        return False


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The last one whose state can be read; its other files nobody has looked at."""
    for step in sorted((run_folder / "checkpoints").glob("step-*"), reverse=True):
        try:
            integrity.read_state(step)
        except CheckpointError:
            continue
        return step
    return None


def no_adapter(run_folder: Path, key: str) -> str:
    """Why a run holds no adapter, and what to do, as `...; ...`."""
    if saved_config.value(run_folder, "adapter.name") in (None, "none"):
        drawn = files.setting(half_of(run_folder), run_folder)
        return f"{run_folder} trained all weights, no adapter; it is drawn with by {drawn}"
    return no_result(run_folder, key, NETWORKS[half_of(run_folder)])


def half_of(run_folder: Path) -> PipelineHalf:
    """The half of Kandinsky that a run trains."""
    return (read_record(run_folder) or Record()).half
