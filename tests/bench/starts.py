"""The start of two checkouts, by turns: `python tests/bench/starts.py OLD NEW FOLDER [--repeats 5] [--jobs]`.

OLD and NEW are interpreters, each of an environment that has one of the checkouts. Measured is what a user waits for:
from the command to the end of the first and of the second step of a tiny run whose features are cached; with `--jobs`,
a further job of a sweep by Hydra's own launcher, without a tracker. CPU seconds are steadier where other work runs.
"""

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import machine
import turns
from jobs import FEW, MANY, RUN
from startup import TINY

REAPS = 36  # PR_SET_CHILD_SUBREAPER: a process that its parent has left behind becomes this one's
Figures = dict[str, float]


def first_step(python: str, folder: Path, name: str, settings: Sequence[str]) -> Figures:
    """Seconds to the end of the first step, wall clock and CPU of the process, and to the end of the second."""
    stamps = folder / f"stamps-{name}"
    hook = ["scheduler._target_=schedule.constant", "trusted_modules=[schedule]", f"+scheduler.stamps={stamps}"]
    words = [*TINY, f"output_root={folder / 'root'}", f"name={name}", "trainer.max_steps=2", *settings, *hook]
    done = machine.process([python, "-m", "kandinsky_exp", *words], folder / f"{name}.log")
    first, second = turns.read_stamps(stamps)
    cpu = float(stamps.read_text().split()[1])
    return {"first step s": first - done.started, "CPU s": cpu, "second step s": second - done.started}


def further_job(python: str, folder: Path, name: str, settings: Sequence[str]) -> Figures:
    """Seconds of one more job of a sweep, wall clock and CPU of all processes."""
    taken = []
    for count in (FEW, MANY):
        words = ["--multirun", f"seed=range({count})", *RUN, f"output_root={folder / 'root'}", f"name={name}-{count}"]
        before = os.times()
        done = machine.process([python, "-m", "kandinsky_exp", *words, *settings], folder / f"{name}-{count}.log")
        _await_left()
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        taken.append((done.seconds, cpu))
    wall, cpu = ((many - few) / (MANY - FEW) for few, many in zip(*taken, strict=True))
    return {"further job s": wall, "CPU s": cpu}


def _await_left() -> None:
    """The server that a sweep's jobs are forked from ends after the command."""
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.05)
        except ChildProcessError:
            return


def by_turns(
    measure: Callable[..., Figures], pythons: Sequence[str], folder: Path, repeats: int, settings: Sequence[str]
) -> None:
    """Print the median figures of both checkouts and the median of their ratios."""
    places = [folder / side for side in ("old", "new")]
    for python, place in zip(pythons, places, strict=True):
        measure(python, place, "warm", settings)  # it encodes, and writes what Python compiles
    rounds = [
        [measure(python, place, f"run-{number}", settings) for python, place in zip(pythons, places, strict=True)]
        for number in range(repeats)
    ]
    for figure in rounds[0][0]:
        old, new = (statistics.median(one[side][figure] for one in rounds) for side in (0, 1))
        ratio = statistics.median(new[figure] / old[figure] for old, new in rounds)
        print(f"{figure}: old {old:.2f}, new {new:.2f}, ratio {ratio:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("folder", type=Path)
    parser.add_argument("settings", nargs="*", help="more settings of the runs, e.g. tracker=none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", action="store_true", help="a further job of a sweep")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(REAPS, 1, 0, 0, 0)
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True)  # a new one: runs that are there would be gone on with
    measure = further_job if arguments.jobs else first_step
    by_turns(measure, [arguments.old, arguments.new], folder, arguments.repeats, arguments.settings)


if __name__ == "__main__":
    main()
