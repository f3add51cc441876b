"""One run: open its folder, build what trains, train it, leave the result."""

import contextlib
import logging
from collections.abc import Collection, Iterator
from dataclasses import replace

from accelerate.utils import set_seed
from omegaconf import DictConfig

from kandinsky_exp import build, records, results, run_settings
from kandinsky_exp.config import validation
from kandinsky_exp.errors import Interrupted, Pruned, UserError, reason_of
from kandinsky_exp.evaluation.in_training import DrawnMetrics
from kandinsky_exp.memory import savings
from kandinsky_exp.preflight import OpenRun, is_finished, open_run
from kandinsky_exp.runs import forking, resuming, run_folder
from kandinsky_exp.stages.base import DiffusionStage
from kandinsky_exp.sweeps import optuna_study
from kandinsky_exp.system import distributed, logs
from kandinsky_exp.tracking.tracker import Status, Tracker, tracked
from kandinsky_exp.training import checkpoint, class_images, loop, nonfinite
from kandinsky_exp.training.callbacks import Callbacks
from kandinsky_exp.training.feature_loader import Readers, open_readers
from kandinsky_exp.training.progress import Progress
from kandinsky_exp.training.seeding import NoiseSource
from kandinsky_exp.training.validation import Validator

logger = logging.getLogger(__name__)


def run(cfg: DictConfig, trusted_modules: Collection[str] = ()) -> float:
    """Train as the config says.

    Args:
        trusted_modules: modules of one's own that `_target_` may name too; the config alone cannot add any.

    Returns:
        What `sweep.objective` names: by default the last fixed-noise validation loss, lower is better, or the last
        `train/loss` where nothing is held out.

    Raises:
        UserError: the config, data, weights, checkpoint or store is not usable; nothing was trained.
        NonFiniteLoss: training diverged.
        Interrupted: a signal came; a checkpoint was written.
    """
    validation.validate(cfg, "train", trusted_modules)
    logs.quiet_libraries()
    with open_run(cfg) as opened:
        if is_finished(cfg, opened.accelerator.num_processes, opened.space):
            nothing_left(opened)
        else:
            with recorded(opened) as tracker:
                stage, data = load(opened)
                with savings.explain_out_of_memory(cfg, opened.accelerator.device, stage):
                    training, callbacks = set_up(opened, tracker, stage, data)
                    train_loss = train(opened, training, callbacks, data)
                finish(opened, training, callbacks, train_loss)
        share(opened)  # also of a finished run: an earlier start may have been stopped in the middle of it
        value = opened.space.record.objective(cfg.sweep.objective)
        return float("nan") if value is None else value


def load(opened: OpenRun) -> tuple[DiffusionStage, Readers]:
    """The stage with its network, and the data as features: drawn and encoded where that was not done yet."""
    cfg, accelerator, weights = opened.cfg, opened.accelerator, opened.weights
    wanted, how = opened.splits.class_images, class_images.settings(cfg.seed, cfg.data.resolution)
    drawn = distributed.on_main_process(lambda: class_images.complete(wanted, weights, how, accelerator.device))
    set_seed(cfg.seed)
    stage = build.bare_stage(cfg, weights)
    by_row, order = opened.space.record.split is None, resuming.order_of_visits(opened.space)
    settings = build.read_settings(cfg, stage, accelerator.device, by_row, order)
    splits = replace(opened.splits, class_images=drawn)
    data = open_readers(splits, stage, settings, accelerator, logger.info)
    if settings.cached:  # what draws images takes what it needs by itself
        weights.release(stage.encoders)
    build.load_network(cfg, stage)  # now, so that there is room for the encoders before
    return stage, data


def set_up(opened: OpenRun, tracker: Tracker, stage: DiffusionStage, data: Readers) -> tuple[loop.Training, Callbacks]:
    """Optimizer, schedule, callbacks, and the state of the checkpoint that the run goes on from."""
    cfg, accelerator, space = opened.cfg, opened.accelerator, opened.space
    steps = run_settings.total_steps(cfg, len(data.train), accelerator.num_processes)
    space.record.rows = len(data.train)
    data.notes.extend(records.notes_on_shapes(data.train, steps, accelerator.num_processes))
    if space.start is not None and space.is_fork:  # once more, for now epochs are steps
        forking.check_length(space.start, steps)
    training = build.training(cfg, stage, accelerator, steps)
    validator = Validator(
        training,
        accelerator,
        tracker,
        space.folder / "samples",
        data.held_out,
        run_settings.drawn_prompts(cfg)[0],
        run_settings.sample_settings(cfg),
        draws=cfg.validation.draws,
        reconstructions=cfg.validation.reconstructions,
        sets=data.sets,
        drawn_metrics=drawn_metrics(opened, data),
    )
    callbacks = Callbacks(
        space,
        validator,
        run_settings.loop_settings(cfg, steps, accelerator),
        keep=cfg.checkpoint.keep,
        behind=cfg.checkpoint.behind,
        order=data.train.order,
        judge=optuna_study.judge(cfg, steps),
        progress=Progress(cfg.validation.patience),
        keeps_best=cfg.checkpoint.result == "best",
    )
    if space.start is not None:
        callbacks.restored(checkpoint.load(training, space.start, accelerator))
        logger.info("going on from %s: step %d of %d", space.start, training.step, steps)
    records.record_data(space, data)
    records.describe(cfg, accelerator, tracker, space, opened.weights, data)
    return training, callbacks


def drawn_metrics(opened: OpenRun, data: Readers) -> DrawnMetrics | None:
    cfg, names = opened.cfg, list(opened.cfg.validation.metrics)
    run_settings.check_held_out(cfg, 0 if data.held_out is None else len(data.held_out))
    if not names or data.held_out is None:
        return None
    count, seed = run_settings.MEASURED, cfg.validation.seed
    return DrawnMetrics(names, count, opened.weights, data.held_out, seed, opened.accelerator.device)


def train(opened: OpenRun, training: loop.Training, callbacks: Callbacks, data: Readers) -> float | None:
    """Train to the last step; the last `train/loss`."""
    accelerator, tracker, settings = opened.accelerator, callbacks.tracker, callbacks.settings
    if callbacks.owes_validation(training.step):
        callbacks.validate(training.step)
    with nonfinite.batch_saved(opened.space.folder, data.train, accelerator, tracker):
        return loop.train(
            training,
            data.train.stream(training.step, settings.max_steps, accelerator),
            NoiseSource(opened.cfg.seed, accelerator.process_index, accelerator.device),
            accelerator=accelerator,
            tracker=tracker,
            settings=settings,
            events=callbacks,
            stop=opened.stop,
            identify=data.train.id,
        )


def finish(opened: OpenRun, training: loop.Training, callbacks: Callbacks, train_loss: float | None) -> None:
    """Write the result, and note how good its weights are: what `run` returns."""
    record, progress, validator = opened.space.record, callbacks.progress, callbacks.validator
    takes_best = opened.cfg.checkpoint.result == "best"
    best = distributed.on_main_process(lambda: results.best(opened.space)) if takes_best else None
    distributed.on_main_process(lambda: results.save(opened.accelerator, opened.space, training, opened.weights, best))
    results.note_end(record, callbacks.tracker, progress, training.step, best)
    last = train_loss if validator.held_out is None else validator.loss
    record.validation_loss = last if best is None else best.loss
    record.metrics = dict(progress.metrics if best is None else best.metrics)
    if train_loss is not None:
        record.metrics["train/loss"] = train_loss


def share(opened: OpenRun) -> None:
    """Hand the result of a finished run on, where that is asked for; its records stay true whatever ends the upload."""
    opened.stop.last_words.clear()
    if opened.accelerator.is_main_process:
        results.share(opened.cfg, opened.space)


def nothing_left(opened: OpenRun) -> None:
    if opened.accelerator.is_main_process:
        records.deliver_left(opened.cfg, opened.space)
    longer = "trainer.max_steps" if opened.space.record.patience is None else "validation.patience"
    logger.info(
        "%s is finished: nothing left to do. Raise %s to train on, or choose another name", opened.space.folder, longer
    )


@contextlib.contextmanager
def recorded(opened: OpenRun) -> Iterator[Tracker]:
    """The tracker's run; and how it ended in the run folder's own record, true without any tracker."""
    accelerator, space = opened.accelerator, opened.space
    tracker = distributed.on_all_processes(lambda: records.start_tracker(opened.cfg, accelerator, space))
    before = space.record.status

    def write(status: run_folder.Status) -> None:
        space.record.status = status
        if accelerator.is_main_process:
            space.write_record()

    status: Status = "FAILED"
    with tracked(tracker):
        try:
            if accelerator.is_main_process:
                opened.stop.last_words += [lambda: write("KILLED"), lambda: tracker.abandon("KILLED")]
            write("RUNNING")
            yield tracker
            status = "FINISHED"
        except (Interrupted, Pruned, KeyboardInterrupt):
            status = "KILLED"
            raise
        except BaseException as error:
            if isinstance(error, UserError) and space.is_resumed and before != "RUNNING":
                status = before  # nothing was trained: what the run was before, it still is
            if status == "FAILED":
                tracker.set_tags({"error": reason_of(error)})
            if isinstance(error, UserError):
                tracker.finish(status)
            raise
        finally:
            write(status)
