"""Items 5 and 6: how soon the command answers and trains, and how often a sweep encodes."""

import statistics
from pathlib import Path

import doors
import machine
import turns

TINY = ["weights=tiny", "data=emoji", "trainer.batch_size=4", "validation.every=1000"]


def answer(work: Path, repeats: int) -> dict[str, float]:
    """Seconds of `--cfg job`, from the start of the process to its end."""
    command = ["data.path=pictures", "--cfg", "job"]
    times = [machine.runner(command, work / f"cfg-{number}.log").seconds for number in range(repeats)]
    return {"median s": statistics.median(times), "slowest s": max(times)}


def first_step(work: Path, repeats: int) -> dict[str, float]:
    """Seconds from the start of the process to the end of the first step of a run with default logging."""
    root = work / "first-step"
    machine.runner([*TINY, f"output_root={root}", "name=warm", "trainer.max_steps=1"], work / "warm.log")
    times = []
    for number in range(repeats):
        stamps = work / f"stamps-{number}"
        hook = ["scheduler._target_=schedule.constant", "trusted_modules=[schedule]", f"+scheduler.stamps={stamps}"]
        overrides = [*TINY, f"output_root={root}", f"name=step-{number}", "trainer.max_steps=2", *hook]
        done = machine.runner(overrides, work / f"step-{number}.log")
        times.append(turns.read_stamps(stamps)[0] - done.started)
    return {"median s": statistics.median(times), "slowest s": max(times)}


def sweep(work: Path) -> dict[str, float]:
    """Tables and encodings of a sweep of four runs, and of one run alone."""
    counts: dict[str, float] = {}
    short = [*TINY, "trainer.max_steps=2"]
    for name, flags in {"one run": [], "4 runs": ["--multirun", "optimizer.lr=1e-6,1e-5,1e-4,1e-3"]}.items():
        root = work / name.replace(" ", "-")
        machine.runner([*short, f"output_root={root}", "name=sweep", *flags], work / f"{root.name}.log")
        counts |= {f"{name}: tables": doors.tables(root), f"{name}: encodings": doors.encodings(root)}
        runs = len(list(root.rglob("train.log")))
        if runs != (4 if flags else 1):
            raise RuntimeError(f"{name}: {runs} logs of runs under {root}")
    return counts
