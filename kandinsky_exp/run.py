"""One run, from a config to a trained network: the story of the whole package in one function."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from kandinsky_exp import (
    adapters,
    build,
    checkpoint,
    config,
    hub,
    loop,
    pipelines,
    processes,
    records,
    tracking,
    workspace,
)
from kandinsky_exp.behind import CheckpointWriter
from kandinsky_exp.data import sources
from kandinsky_exp.errors import Interrupted, UserError
from kandinsky_exp.randomness import NoiseSource
from kandinsky_exp.readers import FeatureReader, open_readers
from kandinsky_exp.validation import Validator
from kandinsky_exp.weights import PARTS, Weights

logger = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float:
    """Train as the config says.

    Returns:
        The last fixed-noise validation loss, lower is better; the last `train/loss` where nothing is held out.

    Raises:
        UserError: the config, data, weights, checkpoint or store is not usable; nothing was trained.
        NonFiniteLoss: training diverged.
        Interrupted: a signal came; a checkpoint was written.
    """
    config.validate(cfg)
    processes.quiet_libraries()
    with (
        processes.stop_signals() as stop,
        processes.accelerated(lambda: build.accelerator(cfg, cfg.trainer.grad_accumulation)) as accelerator,
        contextlib.ExitStack() as held,
    ):
        weights = build.weights(cfg)
        splits = build.data(cfg)
        space = processes.on_main_process(lambda: prepare(cfg, weights, splits, held))
        with workspace.logging_to(space.folder / "train.log", accelerator.is_main_process):
            if is_finished(cfg, accelerator, space):
                records.deliver_left(cfg, accelerator, space)
                return nothing_left(space)
            tracker = records.start_tracker(cfg, accelerator, space)
            with tracking.tracked(tracker), recorded(space, accelerator, tracker):
                set_seed(cfg.seed)
                stage = build.stage(cfg, weights)
                settings = build.read_settings(cfg, accelerator.device)
                data = open_readers(splits, stage, settings, accelerator, logger.info)
                if settings.cached:  # what draws images takes what it needs by itself
                    weights.release(stage.encoders)
                steps = build.total_steps(cfg, len(data.train), accelerator.num_processes)
                space.record.rows = len(data.train)
                training = build.training(cfg, stage, accelerator, steps)
                if space.start is not None:
                    checkpoint.load(training, space.start, stage.part, accelerator)
                    logger.info("going on from %s: step %d of %d", space.start, training.step, steps)
                records.note_data(space, data.train.fingerprint)
                records.describe(cfg, accelerator, tracker, space, weights, data)
                events = Events(cfg, accelerator, space, training, tracker, data.held_out)
                if training.step == 0:
                    events.validate(0)
                train_loss = loop.train(
                    training,
                    data.train.stream(training.step, steps, accelerator),
                    NoiseSource(cfg.seed, accelerator.process_index, accelerator.device),
                    accelerator=accelerator,
                    tracker=tracker,
                    settings=build.loop_settings(cfg, steps, accelerator),
                    events=events,
                    stop=stop,
                    identify=data.train.id,
                )
                if train_loss is None:  # no step was left: an earlier start was stopped while it saved its result
                    events.validate(training.step)
                save_result(cfg, accelerator, space, training, weights)
                result = events.validator.loss if data.held_out is not None else train_loss
                space.record.validation_loss = result
        return float("nan") if result is None else result


def prepare(
    cfg: DictConfig, weights: Weights, splits: sources.Splits, held: contextlib.ExitStack
) -> workspace.Workspace:
    """All that can be found wrong before weights load: store, files, data, the run's folder. Main process only.

    Args:
        held: keeps the folder to this run.
    """
    workspace.make_root(Path(cfg.output_root).expanduser())
    if cfg.tracker.name == "mlflow":
        tracking.probe(records.tracker_uri(cfg))
    if cfg.hub.push:
        hub.check_login()
    build.fetch(cfg, weights)
    report = build.check_data(cfg, splits)
    if splits.validation is None and isinstance(splits.train, sources.Indexed):
        sources.held_out(len(splits.train), cfg.validation.fraction, cfg.seed)  # too few images are told now
    root, name = place(cfg)
    space = workspace.claim(root, name, build.stage_class(cfg).name, cfg.checkpoint.resume)
    held.enter_context(workspace.occupied(space.folder))
    if not space.is_resumed:  # the config of a resumed run stays until it is known to fit
        workspace.write_atomically(space.folder / "config.yaml", config.to_yaml(cfg))
        space.write_record()
    print(f"{space.folder}\n{report}", file=sys.stderr)
    return space


def place(cfg: DictConfig) -> tuple[Path, str | None]:
    """(folder, name): a job of a sweep goes into the sweep's folder, under what it varies."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        sweep = HydraConfig.get().sweep
        return Path(sweep.dir).expanduser().absolute(), str(sweep.subdir)
    return Path(cfg.output_root).expanduser().absolute(), cfg.name


@contextlib.contextmanager
def recorded(space: workspace.Workspace, accelerator: Accelerator, tracker: tracking.Tracker) -> Iterator[None]:
    """The run folder's own record of how the run ended, true without any tracker."""
    before = space.record.status
    space.record.status = "RUNNING"
    try:
        if accelerator.is_main_process:
            space.write_record()
        yield
        space.record.status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        space.record.status = "KILLED"
        raise
    except UserError:  # nothing was trained: what the run was before, it still is
        space.record.status = before if space.is_resumed and before != "RUNNING" else "FAILED"
        tracker.finish(space.record.status)
        raise
    except BaseException:
        space.record.status = "FAILED"
        raise
    finally:
        if accelerator.is_main_process:
            space.write_record()


def is_finished(cfg: DictConfig, accelerator: Accelerator, space: workspace.Workspace) -> bool:
    """Whether an earlier start has done all that is asked for, as far as that is known without the data."""
    steps = build.total_steps(cfg, space.record.rows, accelerator.num_processes)
    return space.is_resumed and space.record.status == "FINISHED" and space.record.step >= steps


def nothing_left(space: workspace.Workspace) -> float:
    logger.info(
        "%s is finished: nothing left to do. Raise trainer.max_steps to train on, or choose another name", space.folder
    )
    loss = space.record.validation_loss
    return float("nan") if loss is None else loss


class Events:
    """What happens between steps: validation, checkpoints."""

    def __init__(
        self,
        cfg: DictConfig,
        accelerator: Accelerator,
        space: workspace.Workspace,
        training: loop.Training,
        tracker: tracking.Tracker,
        reader: FeatureReader | None,
    ) -> None:
        self.accelerator, self.space, self.training, self.tracker = accelerator, space, training, tracker
        self.writer = CheckpointWriter(space.checkpoints, cfg.checkpoint.keep, cfg.checkpoint.behind, self.recorded)
        self.settled = self.writer.settled
        self.validator = Validator(
            training,
            accelerator,
            tracker,
            space.folder / "samples",
            reader,
            build.prompts(cfg.validation.prompts),
            build.sample_settings(cfg),
            draws=cfg.validation.draws,
            reconstructions=cfg.validation.reconstructions,
        )

    def validate(self, step: int) -> None:
        self.validator(step)

    def checkpoint(self, step: int) -> None:
        measured = self.validator.loss if self.validator.loss_step == step else None
        part = self.training.stage.part
        processes.on_main_process(
            lambda: self.writer.save(checkpoint.snapshot(self.training, part, self.accelerator, measured))
        )

    def wait(self) -> None:
        processes.on_main_process(self.writer.wait)

    def recorded(self, folder: Path, step: int) -> None:
        self.space.record.step = step
        self.space.write_record()
        self.tracker.flush()
        logger.info("step %d: checkpoint %s", step, folder)


def save_result(
    cfg: DictConfig,
    accelerator: Accelerator,
    space: workspace.Workspace,
    training: loop.Training,
    weights: Weights,
) -> None:
    """`adapter/` or `pipeline/`, with the averaged weights where there are any; then, if asked, the hub."""
    if accelerator.is_main_process:
        network = accelerator.unwrap_model(training.network)
        with loop.averaged_weights(training):
            if adapters.has_adapter(network):
                result = space.folder / "adapter"
                training.stage.save(network, result)
            else:
                result = space.folder / "pipeline"
                side = PARTS[training.stage.part][0]
                pipelines.save_result(weights, side, result, lambda folder: training.stage.save(network, folder))
        logger.info("result: %s", result)
        if cfg.hub.push:
            hub.push(result, cfg.hub.repo_id, config.flatten(cfg))
    accelerator.wait_for_everyone()
