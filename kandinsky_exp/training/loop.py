"""The training loop: Accelerate's mechanics and nothing of diffusion."""

import logging
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from kandinsky_exp.errors import Interrupted, NonFiniteLoss, RunFailure, UserError
from kandinsky_exp.stages.base import DiffusionStage, Features
from kandinsky_exp.system.distributed import Agreement
from kandinsky_exp.system.signals import Stop
from kandinsky_exp.tracking.tracker import Tracker
from kandinsky_exp.training.clipping import clip
from kandinsky_exp.training.metrics import Meter, StepResult
from kandinsky_exp.training.seeding import NoiseSource

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

logger = logging.getLogger(__name__)


@dataclass
class Training:
    """All that changes while a run trains, and so all that a checkpoint holds.

    Args:
        network: the stage's network as Accelerate prepared it.
        scheduler: the learning-rate schedule, stepped once per optimizer step.
        step: optimizer steps done.
        is_whole: False while a step changes weights, optimizer and schedule: what is saved then is of no step.
        used: the schedule's rate in the last of them, and Prodigy's factor on it, `d`.
        unread: of the meter, at the last checkpoint: what was measured and not reported yet.
    """

    stage: DiffusionStage
    network: nn.Module
    optimizer: Any
    scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: "EMAModel | None"
    step: int = 0
    is_whole: bool = True
    used: tuple[Any, Any] = (0.0, 1.0)
    unread: dict[str, Any] = field(default_factory=dict)

    def note_rate(self) -> None:
        """Before a step: optimizer and schedule both move on in it."""
        self.used = (self.scheduler.get_last_lr()[0], self.optimizer.param_groups[0].get("d", 1.0))

    def rate(self) -> float:
        """The rate that the last step trained with."""
        return float(self.used[0] * self.used[1])

    @cached_property
    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class LoopSettings:
    """How long and how often, in optimizer steps; `total_batch` is samples per step over all processes."""

    max_steps: int
    grad_accumulation: int
    max_grad_norm: float | None
    log_every: int
    validate_every: int
    checkpoint_every: int
    total_batch: int
    progress: bool


class Callbacks(Protocol):
    """What happens between steps. All are called on every process."""

    def validate(self, step: int) -> None: ...

    def checkpoint(self, step: int) -> None: ...

    def trained(self, loss: float) -> None:
        """Told of each training loss that is logged."""

    @property
    def wants_checkpoint(self) -> bool:
        """Whether the step that was just validated is to be saved, whatever `checkpoint_every` says."""

    @property
    def ended(self) -> bool:
        """Whether the step that was just validated is the last one."""

    def wait(self) -> None:
        """Until what these began in the background is done; raises what went wrong with it."""

    def settled(self) -> AbstractContextManager[None]:
        """On the way out, wait for what these began in the background, and raise what went wrong with it."""


def train(
    training: Training,
    batches: Generator[Features],
    noise: NoiseSource,
    *,
    accelerator: Accelerator,
    tracker: Tracker,
    settings: LoopSettings,
    events: Callbacks,
    stop: Stop,
    identify: Callable[[int], str] = str,
) -> float | None:
    """Train up to `settings.max_steps`; the last `train/loss` that was logged, None when there was none ever.

    Args:
        identify: what a user calls the row of a batch's `index`, for messages.

    Raises:
        NonFiniteLoss: a loss or gradient was NaN or infinite; no checkpoint was written after it.
        RunFailure: the data could not be read any more; a checkpoint was written.
        Interrupted: `stop` was set; a checkpoint was written.
    """
    meter = Meter(accelerator, settings.total_batch, training.stage.num_timesteps, identify)
    meter.restore(training.unread)
    training.network.train()
    saver = Saver(training, meter, events, training.step)
    save_alone = saver.save_whole_step if accelerator.num_processes == 1 else None  # other processes would not know
    agreement = Agreement(stop, accelerator.num_processes)
    quiet = not settings.progress
    bar = tqdm(total=settings.max_steps, initial=training.step, unit="step", disable=quiet, dynamic_ncols=True)
    with bar, stop.deferred(), events.settled(), closing(batches), failing(training):
        while training.step < settings.max_steps and not events.ended:
            with saved_on_failure(save_alone):
                meter.add(optimizer_step(training, batches, noise, accelerator, settings))
            training.step += 1
            step, last = training.step, training.step == settings.max_steps
            bar.update()
            validates, saves = due(step, settings.validate_every, last), due(step, settings.checkpoint_every, last)
            logs = due(step, settings.log_every, last)
            if logs or validates or saves:
                agreement.now()  # reading would wait for the device, for ever where a process is gone
            if logs:
                events.trained(report(meter.read(step, training.rate()), step, settings.max_steps, tracker, bar))
            elif validates or saves:
                meter.check(step, training.rate())
            stopping = agreement.now() if logs or validates or saves else agreement.ahead()
            with meter.paused():
                if validates and stopping is None:
                    with saved_on_failure(saver.save_whole_step):
                        stopping = validated_or_stopped(events, step, stop, agreement, accelerator)
                    saves = saves or (stopping is None and events.wants_checkpoint)
                if saves or (stopping is not None and saver.saved != step):
                    saver.save()
            if stopping is not None:
                # All processes: a launcher kills the others as soon as one is gone, the one that writes as well.
                events.wait()
                raise Interrupted(stopping)
    return meter.last_loss


@dataclass
class Saver:
    """Checkpoints of steps that were checked to be finite.

    Args:
        saved: the last step of which there is one.
    """

    training: Training
    meter: Meter
    events: Callbacks
    saved: int

    def save(self) -> None:
        self.meter.check(self.training.step, self.training.rate())
        self.training.unread = self.meter.state()
        self.events.checkpoint(self.training.step)
        self.saved = self.training.step

    def save_whole_step(self) -> None:
        """Save what is there after a failure, unless a step broke off half-way."""
        if self.training.is_whole and self.saved != self.training.step:
            self.save()
            self.events.wait()  # a launcher ends all processes as soon as one is gone


@contextmanager
def failing(training: Training) -> Iterator[None]:
    """What a user can put right is, once training has begun, still the failure of a run that did train."""
    try:
        yield
    except UserError as error:
        advice = "once that is put right, the same command goes on from there"
        raise RunFailure(f"{error}\n(training stopped after step {training.step}; {advice})") from error


@contextmanager
def saved_on_failure(save: Callable[[], None] | None) -> Iterator[None]:
    """Save what was trained up to here where what is done inside fails, for want of memory for example.

    Raises:
        NonFiniteLoss: it is not worth saving.
    """
    try:
        yield
    except Exception as error:
        traceback.clear_frames(error.__traceback__)  # what they hold on the device would be in the way
        try:
            if save is not None:
                save()
        except NonFiniteLoss:
            raise
        except Exception as second:  # the first is what the run fails of
            logger.error("%s", second)
        raise


def due(step: int, every: int, last: bool) -> bool:
    return last or step % every == 0


def optimizer_step(
    training: Training,
    batches: Iterator[Features],
    noise: NoiseSource,
    accelerator: Accelerator,
    settings: LoopSettings,
) -> StepResult:
    """One optimizer step; nothing in it waits for the device."""
    losses, rows, samples, measured = [], [], [], []
    norm: Any = None
    waited = 0.0
    for micro in range(settings.grad_accumulation):
        asked = time.monotonic()
        features = next(batches)
        waited += time.monotonic() - asked
        rows.append(features.pop("index"))
        with accelerator.accumulate(training.network):
            result = training.stage.loss(training.network, features, noise.at(training.step, micro))
            accelerator.backward(result.loss)
            if accelerator.sync_gradients:
                norm = clip(training.trainable, training.optimizer.optimizer, accelerator, settings.max_grad_norm)
        losses.append(result.loss.detach())
        samples.append((result.per_sample, result.timesteps))
        measured.append(result.measured)
    # Accelerate's own `step` looks for a package on the disk whenever it is called; only a loss scaler needs it.
    training.note_rate()
    training.is_whole = False
    optimizer = training.optimizer.optimizer if accelerator.scaler is None else training.optimizer
    optimizer.step()
    optimizer.zero_grad()
    training.scheduler.step()
    if training.ema is not None:
        training.ema.step(training.trainable)
    training.is_whole = True
    return StepResult(torch.stack(losses).mean(), norm, rows, samples, waited, measured)


def validated_or_stopped(
    events: Callbacks, step: int, stop: Stop, agreement: Agreement, accelerator: Accelerator
) -> int | None:
    """Validate; the signal to stop for, if one came meanwhile.

    A validation may take longer than a machine that is preempted has left: one process breaks it off, and the
    resumed run repeats it. Several processes would wait for each other.
    """
    if accelerator.num_processes > 1:
        events.validate(step)
        return agreement.now()
    try:
        with stop.at_once():
            events.validate(step)
    except Interrupted as interrupted:
        return interrupted.signal_number
    return stop.signal_number


def report(metrics: dict[str, float], step: int, total: int, tracker: Tracker, bar: "tqdm[Any]") -> float:
    """Metrics to the tracker; a bar with steps/s, ETA and loss on a terminal, lines elsewhere. Returns the loss."""
    tracker.log_metrics(metrics, step)
    bar.set_postfix(loss=f"{metrics['train/loss']:.4f}", lr=f"{metrics['train/lr']:.1e}")
    if bar.disable:
        logger.info(
            "step %d of %d: loss %.4f, lr %.2e, gradient norm %.3f, %.1f samples/s, about %s left",
            step,
            total,
            metrics["train/loss"],
            metrics["train/lr"],
            metrics["train/grad_norm"],
            metrics["train/samples_per_second"],
            tqdm.format_interval((total - step) * metrics["train/step_seconds"]),
        )
    return metrics["train/loss"]
