"""The MLflow records of a run: its place in a sweep, its parameters and origins, its data sets."""

import logging
from pathlib import Path

from accelerate import Accelerator
from omegaconf import DictConfig

from kandinsky_exp import build, run_settings
from kandinsky_exp.config import recorded_paths, saved_config
from kandinsky_exp.data import long_texts
from kandinsky_exp.data.buckets import notes_on_rare
from kandinsky_exp.data.features import CachedFeatures
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.runs import description, integrity, run_folder
from kandinsky_exp.sweeps import outcomes, parent_run
from kandinsky_exp.system import files
from kandinsky_exp.system.redaction import masked
from kandinsky_exp.tracking import delivery, provenance, store
from kandinsky_exp.tracking.tracker import NullTracker, Tracker
from kandinsky_exp.training.feature_loader import Readers
from kandinsky_exp.training.feature_reader import FeatureReader

logger = logging.getLogger(__name__)


def tracker_uri(cfg: DictConfig) -> str:
    return store.chosen_uri(cfg.tracker.uri, cfg.output_root)


def start_tracker(cfg: DictConfig, accelerator: Accelerator, space: run_folder.RunFolder) -> Tracker:
    """The MLflow run, new or continued; only the main process records."""
    if cfg.tracker.name == "none" or not accelerator.is_main_process:
        return NullTracker()
    tags = {"stage": build.stage_class(cfg).name}
    if space.parent_run_id is not None:
        tags["resumed_from"] = space.parent_run_id
    parent = None if outcomes.hydra_of_job() is None else sweep_parent(cfg, space.folder.parent)
    name, job = space.folder.name, None if parent is None else job_outcome(space.folder)
    if job is not None:
        name, tags = job.name, {**tags, **parent_run.job_tags(job)}
    if space.record.run_id is None:  # later it is the user's, who can write more there
        links = [] if parent is None else [parent_run.report_link(tracker_uri(cfg), parent)]
        tags |= description.tags(description.command(), links)
    tracker = parent_run.open_tracker(
        cfg, space.folder, space.record, name, tags, parent_run_id=parent, redone_from=redone_from(space)
    )
    space.record.run_id = tracker.run_id
    logger.info("MLflow: %s, experiment %s, run %s", masked(tracker.uri), cfg.tracker.experiment, tracker.run_id)
    if (note := store.unused_variable(tracker.uri)) is not None:
        logger.warning("%s", note)
    return tracker


def job_outcome(folder: Path) -> outcomes.Outcome | None:
    """What its sweep knows of a job."""
    return outcomes.JobFolder(folder.parent).read(folder.name)


def redone_from(space: run_folder.RunFolder) -> int | None:
    """The first step that a killed process may have recorded already; a resumed run does not record it twice.

    None where the repeated steps give other numbers: then both are recorded.
    """
    if not space.repeats:
        return None
    return 0 if space.start is None else int(integrity.read_state(space.start)["step"])


def deliver_left(cfg: DictConfig, space: run_folder.RunFolder) -> None:
    """What an earlier start of a finished run could not deliver, and the true status."""
    if cfg.tracker.name != "none" and space.record.run_id is not None:
        delivery.deliver_left(tracker_uri(cfg), space.folder / "outbox", space.record.run_id)


def sweep_parent(cfg: DictConfig, folder: Path) -> str | None:
    """The MLflow run that holds a sweep's jobs together: the command has made it, or else the first job does."""
    with files.locked(folder / ".sweep.lock"):
        record = run_folder.read_record(folder)
        if record is not None and record.run_id is not None:
            return record.run_id
        parent = parent_run.parent_run(cfg, folder)
        # It trains nothing itself: there is nothing that could still go wrong with it.
        parent.finish("FINISHED")
        parent_run.write_status(folder, "FINISHED")
        return parent.run_id


def record_data(space: run_folder.RunFolder, data: Readers) -> None:
    """What trains, in the run's own record; a resumed run says so when it is no longer the same."""
    logger.info("%s", data)
    before, fingerprint = space.record.data, data.train.fingerprint
    if space.is_resumed and space.record.step > 0 and before not in (None, fingerprint):
        logger.warning(
            "the training data has changed since step %d of this run (fingerprint %s, now %s): losses from before and "
            "from now on do not compare; to keep them apart, start anew under another name",
            space.record.step,
            str(before)[:12],
            fingerprint[:12],
        )
    space.record.data, space.record.source = fingerprint, data.source


def notes_on_shapes(reader: FeatureReader, steps: int, processes: int) -> list[str]:
    """What a user should know of batches of one shape each, for a run of so many optimizer steps."""
    dataset, shape = reader.dataset, reader.settings
    if not isinstance(dataset, CachedFeatures) or not dataset.table.meta["buckets"]:
        return []
    per_step = shape.batch_size * shape.grad_accumulation * processes
    return notes_on_rare(dataset.shapes()[:, 1:], per_step, steps)


def describe(
    cfg: DictConfig,
    accelerator: Accelerator,
    tracker: Tracker,
    space: run_folder.RunFolder,
    weights: Weights,
    data: Readers,
) -> None:
    """Record parameters, origins and data sets."""
    asked = run_settings.asked(cfg, build.stage_class(cfg).reads_captions())
    for note in [*data.notes, *(long_texts.prompt_notes(weights.load("tokenizer"), asked) if asked else [])]:
        logger.warning(note)
    side = build.stage_class(cfg).half
    goes_on = accelerator.is_main_process and space.is_resumed and space.start is not None  # its parameters are there
    before = saved_config.flatten_saved(space.folder) if goes_on else {}
    if accelerator.is_main_process:
        files.write_atomically(space.folder / "config.yaml", saved_config.to_yaml(cfg))
        space.record.revision = weights.revision(side)
    if isinstance(tracker, NullTracker):
        return
    flat = saved_config.flatten(cfg)
    bookkeeping = description.split(flat)[1]
    tracker.log_params(description.split(recorded_paths.news(flat, before))[0])
    revision = space.record.revision
    tags = {
        "weights": flat[f"weights.{side}"] + (f"@{revision}" if revision else ""),
        "data_fingerprint": data.train.fingerprint,
        "git_commit": provenance.git_commit() or "unknown",
    }
    tracker.set_tags(bookkeeping | tags)
    tracker.log_artifact(space.folder / "config.yaml")
    tracker.log_text(provenance.pip_freeze(), "pip_freeze.txt")
    for file, lines in (("skipped.txt", data.skipped), ("cut_captions.txt", data.cut)):
        if lines:
            tracker.log_text("\n".join([*lines, ""]), file)
    for context, reader in (
        ("training", data.train),
        ("class", data.train.class_images),
        ("validation", data.held_out),
    ):
        if reader is not None:
            name, origin = reader.source.provenance
            tracker.log_dataset(name, reader.fingerprint, origin, len(reader), context)
    for name, reader in data.sets.items():  # by its own name: MLflow takes equal data of equal name for one
        _, origin = reader.source.provenance
        tracker.log_dataset(name, reader.fingerprint, origin, len(reader), f"validation: {name}")
