"""One run, from a config to a trained network: the story of the whole package in one function."""

import contextlib
import functools
import logging
import os
import sys
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from kandinsky_exp import build, records, results, run_settings
from kandinsky_exp.config import saved_config, validation
from kandinsky_exp.data import sources
from kandinsky_exp.data.encoded.layout import PICTURE_RULES
from kandinsky_exp.data.file_hashes import FileDigests
from kandinsky_exp.errors import Interrupted, Pruned, UserError, reason_of
from kandinsky_exp.memory import device_limits, savings
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.runs import forking, hub, resuming, run_folder
from kandinsky_exp.sweeps import pruning
from kandinsky_exp.system import distributed, files, launch_environment, logs, signals, terminal
from kandinsky_exp.tracking.store_probe import probe
from kandinsky_exp.tracking.tracker import Tracker, tracked
from kandinsky_exp.training import checkpoint, class_images, loop, nonfinite
from kandinsky_exp.training.callbacks import Callbacks
from kandinsky_exp.training.feature_loader import open_readers
from kandinsky_exp.training.seeding import NoiseSource

logger = logging.getLogger(__name__)


def run(cfg: DictConfig, trusted_modules: Collection[str] = ()) -> float:
    """Train as the config says.

    Args:
        trusted_modules: modules of one's own that `_target_` may name too; the config alone cannot add any.

    Returns:
        The last fixed-noise validation loss, lower is better; the last `train/loss` where nothing is held out.

    Raises:
        UserError: the config, data, weights, checkpoint or store is not usable; nothing was trained.
        NonFiniteLoss: training diverged.
        Interrupted: a signal came; a checkpoint was written.
    """
    validation.validate(cfg, trusted_modules)
    logs.quiet_libraries()
    with (
        terminal.lasting(),
        signals.stop_signals() as stop,
        stop.after(cfg.trainer.max_minutes),
        distributed.accelerated(lambda: build.accelerator(cfg, cfg.trainer.grad_accumulation)) as accelerator,
        contextlib.ExitStack() as held,
    ):
        distributed.on_all_processes(lambda: device_limits.check_training(cfg, accelerator.device))
        optimizer = distributed.on_all_processes(lambda: build.try_optimizer(cfg, accelerator.device))
        weights = build.weights(cfg)
        splits = distributed.on_all_processes(lambda: build.data(cfg))
        count, how = accelerator.num_processes, class_images.settings(cfg.seed, cfg.data.resolution)
        space = distributed.on_main_process(lambda: prepare(cfg, weights, splits, count, optimizer, held))
        with logs.logging_to(space.folder / files.LOG, accelerator.is_main_process):
            tell(cfg, accelerator, space)
            if is_finished(cfg, count, space):
                return nothing_left(cfg, accelerator, space)
            tracker = distributed.on_all_processes(lambda: records.start_tracker(cfg, accelerator, space))
            with tracked(tracker), recorded(space, accelerator, tracker, stop):
                splits.class_images = distributed.on_main_process(
                    lambda: class_images.complete(splits.class_images, weights, how, accelerator.device)
                )
                set_seed(cfg.seed)
                stage = build.bare_stage(cfg, weights)
                settings = build.read_settings(cfg, stage, accelerator.device, by_row=space.record.split is None)
                data = open_readers(splits, stage, settings, accelerator, logger.info)
                if settings.cached:  # what draws images takes what it needs by itself
                    weights.release(stage.encoders)
                build.load_network(cfg, stage)  # now, so that there is room for the encoders before
                steps = run_settings.total_steps(cfg, len(data.train), count)
                space.record.rows = len(data.train)
                data.notes.extend(records.notes_on_shapes(data.train, steps, count))
                if space.start is not None and space.is_fork:  # once more, for now epochs are steps
                    forking.check_length(space.start, steps)
                with savings.explain_out_of_memory(cfg, accelerator.device, stage):
                    training = build.training(cfg, stage, accelerator, steps)
                    judge = pruning.judge(cfg, steps)
                    events = Callbacks(cfg, accelerator, space, training, tracker, data.held_out, judge)
                    if space.start is not None:
                        events.restored(checkpoint.load(training, space.start, stage.part, accelerator))
                        logger.info("going on from %s: step %d of %d", space.start, training.step, steps)
                    records.note_data(space, data)
                    records.describe(cfg, accelerator, tracker, space, weights, data)
                    if events.owes_validation(training.step, steps):
                        events.validate(training.step)
                    with nonfinite.batch_kept(space.folder, data.train, accelerator, tracker):
                        train_loss = loop.train(
                            training,
                            data.train.stream(training.step, steps, accelerator),
                            NoiseSource(cfg.seed, accelerator.process_index, accelerator.device),
                            accelerator=accelerator,
                            tracker=tracker,
                            settings=run_settings.loop_settings(cfg, steps, accelerator),
                            events=events,
                            stop=stop,
                            identify=data.train.id,
                        )
                distributed.on_main_process(lambda: results.save(accelerator, space, training, weights))
                result = events.validator.loss if data.held_out is not None else train_loss
                space.record.validation_loss = result
            stop.last_words.clear()  # what is recorded stays true, whatever ends the upload
            if accelerator.is_main_process:
                results.share(cfg, space)
        return float("nan") if result is None else result


def tell(cfg: DictConfig, accelerator: Accelerator, space: run_folder.RunFolder) -> None:
    """What a user should know before it begins."""
    for note in space.notes:
        logger.warning("%s", note)
    if slow := device_limits.cost_of(cfg, accelerator.device):
        logger.info("%s", slow)


def prepare(
    cfg: DictConfig, weights: Weights, splits: sources.Splits, count: int, optimizer: str, held: contextlib.ExitStack
) -> run_folder.RunFolder:
    """All that can be found wrong before weights load: store, files, data, the run's folder. Main process only.

    Args:
        count: processes of the run.
        optimizer: name of the class that trains.
        held: keeps the folder to this run.
    """
    files.make_root(Path(cfg.output_root).expanduser())
    if cfg.tracker.name == "mlflow":
        probe(records.tracker_uri(cfg))
    note = hub.check_access(cfg.hub.repo_id, cfg.hub.private) if cfg.hub.push else None
    notes = build.fetch(cfg, weights, class_images.needed_parts(splits.class_images, weights))
    how = class_images.settings(cfg.seed, cfg.data.resolution)
    splits.class_images = class_images.placed(splits.class_images, weights, how)
    class_images.refuse_others(splits.class_images, weights, how, lambda: has_trained_on(cfg, splits))
    report = build.check_data(cfg, splits)
    if splits.is_divided and isinstance(splits.train, sources.Indexed):
        sources.held_out(len(splits.train), cfg.validation.fraction, cfg.seed)  # too few images are told now
    root, name = place(cfg)
    cls = build.stage_class(cfg)
    space = run_folder.claim(root, name, cls.name, cfg.checkpoint.resume, held)
    space.record.part = cls.part
    space.notes += notes
    with run_folder.given_back(space):
        if space.start is not None and space.is_fork:
            part = build.stage_class(cfg).part
            # The others of an adapter's inits read the weights, and have the same shapes.
            attach = functools.partial(build.attach, cfg, init="default")
            forking.check(space.start, weights, part, cfg.adapter, attach, optimizer)
            forking.check_length(space.start, run_settings.total_steps(cfg, space.record.rows, count))
        compare(cfg, weights, splits, count, space)
    if space.start is None or space.is_fork:  # what goes on keeps the split that it began with
        space.record.split = "picture"
    space.notes += report.notes
    if note is not None:
        space.notes.append(f"hub.push: the hub could not be asked ({note}); it is tried again once the result is there")
    space.notes += launch_environment.passed_over(
        os.environ, cfg.precision.mixed_precision, cfg.trainer.grad_accumulation
    )
    if not space.is_resumed:  # the config of a resumed run stays until it is known to fit
        space.record.token = records.noted_token(space.folder) or uuid.uuid4().hex
        space.record.status = "KILLED"  # true for whoever never comes to the first step
        space.write_record()  # first: from now on the folder is a run
        files.write_atomically(space.folder / "config.yaml", saved_config.to_yaml(cfg))
    print(f"{space.folder}\n{report}", file=sys.stderr)
    return space


def has_trained_on(cfg: DictConfig, splits: sources.Splits) -> bool:
    """Whether an earlier start of this very run had this data set, as far as all of it is there."""
    root, name = place(cfg)
    record = run_folder.read_record(root / name) if name is not None else None
    if record is None or record.source is None:
        return False
    return splits.fingerprint(FileDigests(build.cache_folder(cfg))) in (None, record.source)


def compare(cfg: DictConfig, weights: Weights, splits: sources.Splits, count: int, space: run_folder.RunFolder) -> None:
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


def place(cfg: DictConfig) -> tuple[Path, str | None]:
    """(folder, name): a job of a sweep goes into the sweep's folder, under what it varies."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        sweep = HydraConfig.get().sweep
        return Path(sweep.dir).expanduser().absolute(), str(sweep.subdir)
    return Path(cfg.output_root).expanduser().absolute(), cfg.name


@contextlib.contextmanager
def recorded(
    space: run_folder.RunFolder, accelerator: Accelerator, tracker: Tracker, stop: signals.Stop
) -> Iterator[None]:
    """The run folder's own record of how the run ended, true without any tracker."""
    before = space.record.status

    def killed() -> None:
        space.record.status = "KILLED"
        space.write_record()

    if accelerator.is_main_process:
        stop.last_words += [killed, lambda: tracker.abandon("KILLED")]
    space.record.status = "RUNNING"
    try:
        if accelerator.is_main_process:
            space.write_record()
        yield
        space.record.status = "FINISHED"
    except (Interrupted, Pruned, KeyboardInterrupt):
        space.record.status = "KILLED"
        raise
    except BaseException as error:
        space.record.status = "FAILED"
        if isinstance(error, UserError) and space.is_resumed and before != "RUNNING":
            space.record.status = before  # nothing was trained: what the run was before, it still is
        if space.record.status == "FAILED":
            tracker.set_tags({"error": reason_of(error)})
        if isinstance(error, UserError):
            tracker.finish(space.record.status)
        raise
    finally:
        if accelerator.is_main_process:
            space.write_record()


def is_finished(cfg: DictConfig, count: int, space: run_folder.RunFolder) -> bool:
    """Whether an earlier start has done all that is asked for, as far as that is known without the data."""
    steps = run_settings.total_steps(cfg, space.record.rows, count)
    return space.is_resumed and space.record.status == "FINISHED" and space.record.step >= steps


def nothing_left(cfg: DictConfig, accelerator: Accelerator, space: run_folder.RunFolder) -> float:
    if accelerator.is_main_process:
        records.deliver_left(cfg, space)
        results.share(cfg, space)  # an earlier start may have been stopped in the middle of it
    logger.info(
        "%s is finished: nothing left to do. Raise trainer.max_steps to train on, or choose another name", space.folder
    )
    loss = space.record.validation_loss
    return float("nan") if loss is None else loss
