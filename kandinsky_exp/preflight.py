"""Before weights load: check settings, files, data and store, and claim the run's folder."""

import contextlib
import functools
import logging
import math
import os
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from omegaconf import DictConfig

from kandinsky_exp import build, records, run_settings
from kandinsky_exp.config import saved_config
from kandinsky_exp.data import sources
from kandinsky_exp.data.encoded.layout import PICTURE_RULES
from kandinsky_exp.data.examples import Indexed
from kandinsky_exp.data.file_hashes import FileDigests
from kandinsky_exp.data.splits import Splits
from kandinsky_exp.errors import ConfigError, first_line
from kandinsky_exp.memory import device_limits
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.runs import forking, hub, resuming, run_folder
from kandinsky_exp.sweeps.outcomes import hydra_of_job
from kandinsky_exp.system import distributed, files, launch_environment, logs, signals, terminal
from kandinsky_exp.tracking.store_probe import probe
from kandinsky_exp.training import class_images, validation_prompts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenRun:
    """A run whose folder is claimed and whose settings are known to fit; nothing is loaded yet."""

    cfg: DictConfig
    accelerator: Accelerator
    stop: signals.Stop
    weights: Weights
    splits: Splits
    space: run_folder.RunFolder


@contextlib.contextmanager
def open_run(cfg: DictConfig) -> Iterator[OpenRun]:
    """Check all that can be checked before weights load, and hold signals, processes, the folder and its log."""
    with (
        terminal.lasting(),
        signals.stop_signals() as stop,
        stop.after(cfg.trainer.max_minutes),
        distributed.accelerated(lambda: build.accelerator(cfg, cfg.trainer.grad_accumulation)) as accelerator,
        contextlib.ExitStack() as held,
    ):
        distributed.on_all_processes(lambda: device_limits.check_training(cfg, accelerator.device))
        optimizer = distributed.on_all_processes(lambda: try_optimizer(cfg, accelerator.device))
        weights = build.weights(cfg)
        splits = distributed.on_all_processes(lambda: build.data(cfg))
        count = accelerator.num_processes
        space = distributed.on_main_process(lambda: prepare(cfg, weights, splits, count, optimizer, held))
        with logs.logging_to(space.folder / files.LOG, accelerator.is_main_process):
            for note in space.notes:
                logger.warning("%s", note)
            if slow := device_limits.cost_of(cfg, accelerator.device):
                logger.info("%s", slow)
            yield OpenRun(cfg, accelerator, stop, weights, splits, space)


def prepare(
    cfg: DictConfig, weights: Weights, splits: Splits, count: int, optimizer: str, held: contextlib.ExitStack
) -> run_folder.RunFolder:
    """All that can be found wrong before weights load: store, files, data, the run's folder. Main process only.

    Args:
        count: processes of the run.
        optimizer: name of the class that trains.
        held: keeps the folder to this run.
    """
    files.make_root(files.output_root(cfg.output_root))
    if cfg.tracker.name == "mlflow":
        probe(records.tracker_uri(cfg))
    unreachable = hub.check_access(cfg.hub.repo_id, cfg.hub.private) if cfg.hub.push else None
    notes = build.fetch(cfg, weights, class_images.needed_parts(splits.class_images, weights))
    prompts, found = run_settings.drawn_prompts(cfg)
    notes += found
    if any(prompt.is_own for prompt in prompts):
        validation_prompts.check_sizes(prompts, weights.size_multiple())
    how = class_images.settings(cfg.seed, cfg.data.resolution)
    splits = replace(splits, class_images=class_images.placed(splits.class_images, weights, how))
    class_images.refuse_others(splits.class_images, weights, how, lambda: has_trained_on(cfg, splits))
    report = build.check_data(cfg, splits)
    if splits.is_divided and isinstance(splits.train, Indexed):
        sources.held_out(len(splits.train), cfg.validation.fraction, cfg.seed)  # raises where there are too few images
    if (held_out := splits.known_held_out(cfg.validation.fraction)) is not None:
        run_settings.check_held_out(cfg, held_out)
    root, name = location(cfg)
    cls = build.stage_class(cfg)
    space = run_folder.claim(root, name, cls.name, cfg.checkpoint.resume, held)
    space.record.part = cls.part
    space.notes += notes
    with run_folder.given_back(space):
        if space.start is not None and space.is_fork:
            bare = functools.partial(build.network_without_data, cfg, weights)
            forking.check(space.start, cls.part, cfg.adapter, bare, optimizer)
            forking.check_length(space.start, run_settings.total_steps(cfg, space.record.rows, count))
        check_resume(cfg, weights, splits, count, space)
    if space.start is None or space.is_fork:  # a resumed run keeps the split that it began with
        space.record.split = "picture"
    space.notes += report.notes
    if unreachable is not None:
        space.notes.append(
            f"hub.push: the hub could not be asked ({unreachable}); it is tried again once the result is there"
        )
    space.notes += launch_environment.passed_over(
        os.environ, cfg.precision.mixed_precision, cfg.trainer.grad_accumulation
    )
    if not space.is_resumed:  # the config of a resumed run stays until it is known to fit
        job = records.job_outcome(space.folder)  # has a token where the sweep has made the MLflow run of a failed start
        space.record.token = (job and job.token) or uuid.uuid4().hex
        space.record.status = "KILLED"  # true if it never reaches the first step
        space.write_record()  # first: from now on the folder is a run
        files.write_atomically(space.folder / "config.yaml", saved_config.to_yaml(cfg))
    print(f"{space.folder}\n{report}", file=sys.stderr)
    return space


def try_optimizer(cfg: DictConfig, device: torch.device) -> str:
    """One step over one small matrix, so that what cannot work here is told before anything loads.

    Returns:
        The name of its class, by which a checkpoint knows it.

    Raises:
        ConfigError: it has no kernels for this device, wants another torch, or refuses its settings.
    """
    weight = torch.nn.Parameter(torch.ones(64, 64, device=device))  # of smaller ones an 8-bit state would be in 32
    weight.grad = torch.ones_like(weight)
    made = build.make_optimizer(cfg, [weight], device)
    try:
        made.step()
    except Exception as error:  # whatever a library's kernels raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"optimizer: {cfg.optimizer._target_} does not work on this device, {device.type} ({reason}); take "
            "another, e.g. optimizer=adamw"
        ) from error
    return type(made).__name__


def has_trained_on(cfg: DictConfig, splits: Splits) -> bool:
    """Whether an earlier start of this very run had this data set, as far as all of it is there."""
    root, name = location(cfg)
    record = run_folder.read_record(root / name) if name is not None else None
    if record is None or record.source is None:
        return False
    return splits.fingerprint(FileDigests(build.cache_folder(cfg))) in (None, record.source)


def check_resume(cfg: DictConfig, weights: Weights, splits: Splits, count: int, space: run_folder.RunFolder) -> None:
    """Refuse to go on as another run; `space` learns what is different."""
    encoders = weights.content(build.stage_class(cfg).encoders)
    reads = space.is_resumed and not is_finished(cfg, count, space)
    facts = resuming.Facts(
        source=splits.fingerprint(FileDigests(build.cache_folder(cfg))) if reads else None,
        encoders=encoders if reads else None,
        holds_out=splits.is_divided,
        total_batch=run_settings.total_batch(cfg, count),
        processes=count,
        rules=PICTURE_RULES,
    )
    before = saved_config.flatten_saved(space.folder) if space.is_resumed else {}
    resuming.check(space, before, now := saved_config.flatten(cfg), facts)
    space.repeats = resuming.repeats(space, now, facts)
    space.notes += resuming.notes_on_rules(space, PICTURE_RULES) if reads else []
    space.record.encoders = encoders
    if reads or not space.is_resumed:
        space.record.rules = PICTURE_RULES


def location(cfg: DictConfig) -> tuple[Path, str | None]:
    """(folder, name): a job of a sweep goes into the sweep's folder, under what it varies."""
    if (hydra := hydra_of_job()) is not None:
        return files.output_root(hydra.sweep.dir), str(hydra.sweep.subdir)
    return files.output_root(cfg.output_root), cfg.name


def is_finished(cfg: DictConfig, count: int, space: run_folder.RunFolder) -> bool:
    """Whether an earlier start has done all that is asked for, as far as that is known without the data."""
    steps, ended = run_settings.total_steps(cfg, space.record.rows, count), space.record.patience
    is_out_of_patience = ended is not None and (cfg.validation.patience or math.inf) <= ended
    is_at_its_end = space.record.step >= steps or is_out_of_patience
    return space.is_resumed and space.record.status == "FINISHED" and is_at_its_end
