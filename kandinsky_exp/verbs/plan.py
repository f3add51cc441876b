"""The verb `plan`: will it fit? Memory, disk and steps of a run, told before anything is loaded."""

import math
import sys
from collections.abc import Collection, Iterator, Sequence

import psutil  # type: ignore[import-untyped]  # Accelerate brings it
import torch
from accelerate import Accelerator
from omegaconf import DictConfig

from kandinsky_exp import build, run_settings
from kandinsky_exp.config import allowlist, targets, validation
from kandinsky_exp.data import sets, source_facts, sources
from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.splits import Splits
from kandinsky_exp.memory import device_limits, disk, savings
from kandinsky_exp.memory.dry_run import DryRun
from kandinsky_exp.memory.estimate import MAPPED, Estimate, Phase
from kandinsky_exp.system import distributed, files, host_memory, logs

GB = 1e9
SHOWN = 5e5  # bytes, the least that a table shows


def plan(cfg: DictConfig, trusted_modules: Collection[str] = ()) -> float:
    """Print what a run of these settings needs; the GB of memory of its largest phase.

    Args:
        trusted_modules: what `_target_` may name beside torch and the like; the config alone cannot add any.

    Raises:
        UserError: the config or the data is not usable.
    """
    validation.validate(cfg, "plan", trusted_modules)
    logs.quiet_libraries()
    with distributed.accelerated(lambda: build.accelerator(cfg, cfg.trainer.grad_accumulation)) as accelerator:
        return distributed.on_main_process(lambda: tell(cfg, accelerator))


def tell(cfg: DictConfig, accelerator: Accelerator) -> float:
    if cfg.device_memory is None:  # else it is planned for a device that is not here
        device_limits.check_training(cfg, accelerator.device, "; device_memory=24 plans for a GPU of 24 GB elsewhere")
    planner = Planner(cfg, accelerator)
    for line in planner.lines():
        print(line)
    sys.stdout.flush()
    return planner.peak.total / GB


class Planner:
    """What a plan says, line by line."""

    def __init__(self, cfg: DictConfig, accelerator: Accelerator) -> None:
        self.cfg, self.accelerator = cfg, accelerator
        self.python = psutil.Process().memory_info().rss  # before anything is made, with all that a run imports
        self.capacity = capacity(cfg, accelerator.device, accelerator.num_processes)
        splits = known(cfg)
        self.train, self.held_out = rows(cfg, splits)
        self.dry_run = DryRun(cfg, accelerator)  # what is learned from it counts for other settings, too
        self.caches = list(disk.of_caches(cfg, self.dry_run, splits, known_sets(cfg))) if cfg.data.cache else []
        self.draws_class = splits.class_images is not None and bool(splits.class_images.missing())
        self.estimate = self._estimate(cfg, self.dry_run)
        self.steps = run_settings.total_steps(cfg, self.train, accelerator.num_processes)
        self.phases = list(self.estimate.phases())
        self.peak = max(self.phases, key=lambda phase: phase.total)

    def _estimate(self, cfg: DictConfig, dry_run: DryRun) -> Estimate:
        encodes = not all(found.is_there for found in self.caches) or not self.caches
        counts = (self.train, self.held_out)
        return Estimate(cfg, dry_run, *counts, encodes, self.draws_class, self.python, self.capacity)

    def lines(self) -> Iterator[str]:
        yield from self._run()
        yield from table(self.phases)
        yield self._memory()
        yield from self._disk()
        yield self._steps()
        yield from self._warnings()

    def _run(self) -> Iterator[str]:
        cfg, sizes = self.cfg, self.dry_run.sizes()
        what = "all weights" if cfg.adapter.name == "none" else f"{cfg.adapter.name} of rank {cfg.adapter.rank}"
        how = f"batches of {run_settings.shown(cfg)} at {cfg.data.resolution} px, {cfg.precision.name}"
        yield f"{self.dry_run.stage.name}, {what}, {how}"
        encoders = sum(self.dry_run.part(part)[0] for part in self.dry_run.stage.encoders)
        yield (
            f"parameters  {sizes.trained:,} train, {sizes.frozen:,} of the network are frozen, {encoders:,} in encoders"
        )

    def _memory(self) -> str:
        device = self.accelerator.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this process, on the CPU"
        limit = "may use" if self.cfg.device_memory is not None else "can have"
        mapped = self.peak.parts.get(MAPPED, 0)
        dropped = f", {gb(mapped)} of it weight files, dropped where memory is short" if mapped else ""
        peak = f"{gb(self.peak.total)} at most, in {self.peak.name}{dropped}"
        return f"memory      {peak}; {name}, {limit} {gb(self.capacity)}"

    def _disk(self) -> Iterator[str]:
        checkpoint, kept = self.estimate.checkpoint_bytes(), self.cfg.checkpoint
        written_ones = math.ceil(self.steps / kept.every) + (kept.result == "best")
        count = min(written_ones, kept.keep + 2)  # with the best, and one that is being written
        result = self.dry_run.sizes().saved
        written = sum(found.bytes for found in self.caches)
        free = disk.free(files.output_root(self.cfg.output_root))
        total = written + checkpoint * count + result
        what = [self._features(written), f"{count} checkpoints of {gb(checkpoint)}", f"{gb(result)} result"]
        yield f"disk        {gb(total)}: {', '.join(what)}"
        if free is not None and free < total:
            yield f"warning: the disk of output_root has {gb(free)} left; set output_root, or checkpoint.keep"

    def _features(self, written: int) -> str:
        if not self.caches:
            return "no encoded features"
        if unknown := [found for found in self.caches if found.images is None]:
            known = f"{gb(written)} encoded features and " if written > len(unknown) * disk.OF_A_TABLE else ""
            return f"{known}encoded features of {unknown[0].each / 1e3:,.1f} kB an image"
        return f"{gb(written)} encoded features" if written else "encoded features are there already"

    def _steps(self) -> str:
        steps, per_step = self.steps, run_settings.total_batch(self.cfg, self.accelerator.num_processes)
        if self.train is None:
            return f"steps       {steps:,} of {per_step} images; how many images there are is known once they are read"
        epochs = steps * per_step / self.train
        return (
            f"steps       {math.ceil(self.train / per_step):,} an epoch ({self.train:,} images, {per_step} a step); "
            f"{steps:,} in all, {epochs:,.4g} epochs"
        )

    # --- what to do where it does not fit

    def _warnings(self) -> Iterator[str]:
        needed = max(phase.needed for phase in self.phases)
        if needed <= self.capacity:
            if max(phase.needed * (1 + phase.accuracy) for phase in self.phases) > self.capacity:
                yield "note: it fits, but not by more than the estimate may be wrong"
            return
        yield f"warning: {gb(needed)} are needed, and there are {gb(self.capacity)}"
        settings = savings.cheapest(self.cfg, self.accelerator.device, self._fits)
        if settings is None:
            yield "none of the settings that save memory makes it fit, nor do all of them together"
        else:
            needed = max(phase.needed for phase in self._with(savings.changed(self.cfg, settings)).phases())
            yield f"the cheapest setting that fits: {' '.join(settings)} ({gb(needed)})"

    def _with(self, cfg: DictConfig) -> Estimate:
        return self._estimate(cfg, DryRun(cfg, self.accelerator, self.dry_run.answers))

    def _fits(self, cfg: DictConfig) -> bool:
        estimate = self._with(cfg)
        return estimate.least() <= self.capacity and all(one.needed <= self.capacity for one in estimate.phases())


def capacity(cfg: DictConfig, device: torch.device, processes: int) -> int:
    """Bytes that each of a run's processes may use."""
    if cfg.device_memory is not None:
        return int(cfg.device_memory * GB)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    here = int(psutil.Process().memory_info().rss)  # the run has that in this one's place
    return host_memory.available() // processes + here


def known(cfg: DictConfig) -> Splits | source_facts.AnnouncedSplits:
    """The data set, without fetching one from the hub."""
    settings = build.target_settings(cfg, "data")
    source = targets.source_facts(settings["_target_"], allowlist.user_modules(cfg))
    if source.announced is None or files.is_folder(settings[source.hub_id]):
        return build.main_set(cfg)
    return source.announced(**source_facts.arguments(source.announced, settings), limit=cfg.data.max_samples)


def known_sets(cfg: DictConfig) -> list[Source | source_facts.Announced]:
    """Those of `validation.sets`, likewise."""
    entries = run_settings.further_sets(cfg)
    on_hub = sets.announced(entries, cfg.data.max_samples)
    here = build.further_sets(cfg, {name: entry for name, entry in entries.items() if name not in on_hub})
    return [*here.values(), *on_hub.values()]


def rows(cfg: DictConfig, splits: Splits | source_facts.AnnouncedSplits) -> tuple[int | None, int | None]:
    """How many images train and are held out; None where that is known once they are read."""
    count = splits.train.count
    if not splits.is_divided:
        return count, 0 if splits.validation is None else splits.validation.count
    if count is None:
        return None, None
    train, held_out = sources.held_out(count, cfg.validation.fraction, cfg.seed)
    return len(train), len(held_out)


def table(phases: Sequence[Phase]) -> Iterator[str]:
    """Parts by phase, in GB, and how far off they may be."""
    names = dict.fromkeys(name for phase in phases for name, size in phase.parts.items() if size >= SHOWN)
    yield "".join([f"{'GB':<18}", *(f"{phase.name:>12}" for phase in phases)])
    for name in names:
        cells = (f"{phase.parts[name] / GB:>12.3f}" if phase.parts.get(name) else f"{'–':>12}" for phase in phases)
        yield "".join([f"{name:<18}", *cells])
    yield "".join([f"{'together':<18}", *(f"{phase.total / GB:>12.3f}" for phase in phases)])
    yield "".join([f"{'accuracy on a CPU':<18}", *(f"{f'±{phase.accuracy:.0%}':>12}" for phase in phases)])


def gb(size: int) -> str:
    return f"{size / GB:,.3g} GB"
