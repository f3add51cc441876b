"""Find what a user names: a run's folder, a checkpoint, a job of a sweep, an MLflow run id; or say what is there."""

import contextlib
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from kandinsky_exp.config import recorded_paths, saved_config
from kandinsky_exp.errors import CheckpointError, ConfigError, cut
from kandinsky_exp.models.components import NETWORKS, SHIPPED, PipelineHalf, is_hub_id
from kandinsky_exp.models.weight_files import alone, untrusted
from kandinsky_exp.runs import integrity
from kandinsky_exp.runs.run_folder import Record, read_record
from kandinsky_exp.system import files, redaction
from kandinsky_exp.tracking import store, store_probe

RUN_ID = re.compile(r"[0-9a-f]{32}")


def names_of(value: Any) -> list[str]:
    """What a setting names: nothing, one thing, or a list."""
    return [] if value is None else list(value) if isinstance(value, ListConfig) else [value]


def located(cfg: DictConfig, key: str, source: str, side: PipelineHalf | None) -> Path:
    """The folder of what is no hub id."""
    if RUN_ID.fullmatch(source) and not Path(source).exists():
        source = folder_of_run(cfg, source, key)
    folder = Path(source).expanduser()
    return _job(folder, key, side) if is_sweep(folder) else folder


def is_sweep(folder: Path) -> bool:
    return (read_record(folder) or Record()).stage == "sweep"


def _job(sweep: Path, key: str, side: PipelineHalf | None) -> Path:
    """The one job of a sweep that trained a side.

    Raises:
        ConfigError: there is none, or there are several.
    """
    records = {folder: read_record(folder) for folder in sorted(sweep.iterdir())}
    jobs = [folder for folder, record in records.items() if record is not None and side in (None, record.half)]
    if len(jobs) != 1:
        listed = ", ".join(f"'{folder.name}'" for folder in jobs[:5]) or "none"
        raise ConfigError(f"{key}: {sweep} is a sweep with {len(jobs)} such jobs ({listed}); give the folder of one")
    return jobs[0]


def run_of(folder: Path) -> Path | None:
    """The run that a folder is, or lies in: itself, its `adapter/`, a checkpoint, or a network in a checkpoint."""
    around = [folder, *folder.absolute().parents[:3]]
    return next((place for place in around if read_record(place) is not None), None)


def recorded_id(run_folder: Path | None) -> str | None:
    """The MLflow run of a run's folder."""
    return None if run_folder is None else (read_record(run_folder) or Record()).run_id


def trained_network(folder: Path, side: PipelineHalf) -> Path:
    """The network or adapter in a run folder or checkpoint.

    Raises:
        ConfigError: it holds the other stage, or nothing yet.
    """
    name = NETWORKS[side]
    # A checkpoint's averaged weights are what its run validates with and would leave behind.
    for candidate in (folder / "adapter", folder / f"{name}_ema", folder / name):
        if candidate.is_dir() and (candidate.name != "adapter" or half_of(folder) == side):
            if problem := untrusted(candidate) or alone(candidate):
                raise ConfigError(f"{side}: {folder}: {problem}")
            return candidate
    if read_record(folder) is None:  # a checkpoint, or what else lies in a run
        raise ConfigError(f"{side}: {folder} holds no trained {side}; give a run, or one of its checkpoints")
    if (trained := half_of(folder)) != side:
        other = files.setting(trained, folder)
        raise ConfigError(f"{side}: {folder} holds no trained {side}, it is of the {trained}; give it as {other}")
    raise ConfigError(f"{side}: {no_result(folder, side, name)}")


def source_of(run_folder: Path, side: PipelineHalf) -> str:
    """The weights that a run started from, also where they have moved together with the run.

    Raises:
        ConfigError: none are recorded, or those were a folder, which is not there any more.
    """
    source = saved_config.value(run_folder, f"weights.{side}")
    if source is None:
        raise ConfigError(f"{run_folder / 'config.yaml'} has no weights.{side}; mend it, or give other sources")
    if source in SHIPPED or (Path(source).is_absolute() and files.exists(source)):
        return source
    root = run_folder.absolute().parents[1 if is_sweep(run_folder.parent) else 0]
    place = recorded_paths.moved(source, saved_config.value(run_folder, "output_root") or "", root)
    if place is not None and files.exists(place):
        return str(place)
    if not is_hub_id(source) and not files.exists(source):
        raise ConfigError(
            f"{side}: {run_folder} started from the weights in '{cut(source)}', which are not there any more; put them "
            f"back, or write where they are now into {run_folder / 'config.yaml'} (weights.{side})"
        )
    return source


def folder_of_run(cfg: DictConfig, run_id: str, key: str) -> str:
    """The folder of an MLflow run, which its tags name."""
    uri = store.chosen_uri(cfg.tracker.uri, cfg.output_root)
    store_probe.probe(uri)
    client, _ = store.connect(uri)
    with store.explained(uri):
        run = store.find_run(client, run_id)
    if run is None:
        raise ConfigError(f"{key}: the store {redaction.masked(uri)} has no run {run_id}; set tracker.uri")
    folder = run.data.tags.get("run_folder")
    place = None if folder is None else _here(files.output_root(cfg.output_root), Path(folder), run_id)
    if place is None:
        raise ConfigError(f"{key}: the folder of run {run_id} ({folder}) is not on this machine; give a folder")
    return str(place)


def _here(root: Path, recorded: Path, run_id: str) -> Path | None:
    """The folder of a run, in `root` first: the outputs may have been moved or copied since it was recorded."""
    within = [root / Path(*recorded.parts[-depth:]) for depth in (1, 2)]  # a run, a job of a sweep
    moved = next((place for place in within if recorded_id(place) == run_id), None)
    return moved or (recorded if recorded.is_dir() else None)


# --- what became of a run


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
    fates = {"FAILED": f"failed ({files.LOG} says why)", "KILLED": "was stopped", "RUNNING": "was killed"}
    return f"{run_folder} {fates.get(str(status), 'is not finished')} and left no result", again


def is_running(run_folder: Path) -> bool:
    """Whether a process is training there now; what a killed one has written of itself is no answer."""
    try:
        with files.occupied(run_folder):
            return False
    except ConfigError:
        return True
    except OSError:  # a folder that cannot be written
        return False


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The last one whose state can be read; its other files nobody has looked at."""
    for step in sorted((run_folder / "checkpoints").glob("step-*"), reverse=True):
        with contextlib.suppress(CheckpointError):
            integrity.read_state(step)
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
