"""Processes to measure in, and what machine it is. Imports nothing large: a child inherits its parent's peak memory."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Finished:
    """A process that ran.

    Args:
        started: when, in seconds since 1970.
        seconds: from its start to its end.
        peak_mb: highest resident memory, in MB (10⁶ bytes).
        output: all it printed.
    """

    started: float
    seconds: float
    peak_mb: float
    output: str


def process(command: Sequence[str], log: Path, wanted: Sequence[int] = (0,)) -> Finished:
    """Run a command with one thread per process, offline; its output goes to `log`.

    Raises:
        RuntimeError: it ended with another code than those wanted.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    with log.open("w") as output:
        started, since = time.time(), time.perf_counter()
        # Elsewhere than here: `python -m` looks for the package in the current folder first.
        running = subprocess.Popen(command, env=environment, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(running.pid, 0)
        seconds = time.perf_counter() - since
    running.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text("utf-8", "replace")
    if running.returncode not in wanted:
        raise RuntimeError(f"{' '.join(command[:6])} … ended with {running.returncode}:\n{text[-3000:]}")
    return Finished(started, seconds, usage.ru_maxrss * 1024 / 1e6, text)


def runner(overrides: Sequence[str], log: Path) -> Finished:
    """The command itself."""
    return process([sys.executable, "-m", "kandinsky_exp", *overrides], log)


def child(function: str, settings: dict[str, Any], work: Path) -> dict[str, Any]:
    """What `module.function(**settings)` returns in a process of its own, with `peak_mb` and `started` beside it."""
    place = work / "children" / f"{function}-{time.time_ns()}"
    place.mkdir(parents=True)
    answer = place / "answer.json"
    command = [sys.executable, str(HERE / "child.py"), function, json.dumps(settings, default=str), str(answer)]
    done = process(command, place / "log")
    found: dict[str, Any] = json.loads(answer.read_text("utf-8"))
    return {"peak_mb": done.peak_mb, "started": done.started, **found}


def anonymous_mb() -> float:
    """Memory of this process that no file backs (`RssAnon`), in MB: pages of a memory map that were read count not."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("this system tells no RssAnon")


def facts() -> dict[str, Any]:
    """What a reader needs to know of the machine; nothing that names it."""
    cpu = ""
    if (info := Path("/proc/cpuinfo")).is_file():
        lines = info.read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    packages = ("torch", "diffusers", "transformers", "accelerate", "mlflow")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "threads per process": int(ENVIRONMENT["OMP_NUM_THREADS"]),
        "cpu": cpu or platform.machine(),
        "load at the start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
