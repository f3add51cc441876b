"""Devices of parallel jobs: each gets a GPU of its own, or its share of the CPU cores."""

import contextlib
import os
import shutil
import subprocess  # nosec B404 # nvidia-smi, found on PATH, without a shell
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import Timeout

from kandinsky_exp.system import files, threads

POLL = 0.5  # seconds
# Whoever set these has shared out the devices already.
SHARED_OUT = ("RANK", "SLURM_JOB_ID")
# Signs of a GPU that nvidia-smi does not show: AMD's, Jetson's, WSL's, or a container without the program.
SIGNS = ("nvidia[0-9]*", "kfd", "nvhost-gpu", "dxg")


@contextlib.contextmanager
def held(
    devices: str | Sequence[int | str] | None, parallel: int, slots: Path, is_cancelled: Callable[[], bool]
) -> Iterator[dict[str, str] | None]:
    """Take a device, waiting while all are in use: variables for a job's process; None where that wait was cancelled.

    What a killed process held is free at once.

    Args:
        devices: `auto` for all that are visible; their numbers or UUIDs; None to leave them alone.
        parallel: jobs at a time.
        slots: folder for what jobs on the same machine know of each other.
    """
    shares = _shares(devices, parallel, slots)
    if not shares:
        yield {}
        return
    while not is_cancelled():
        for file, variables in shares.items():
            lock = files.locked(file)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                yield variables
            finally:
                lock.release()
            return
        time.sleep(POLL)
    yield None


def _shares(devices: str | Sequence[int | str] | None, parallel: int, slots: Path) -> dict[Path, dict[str, str]]:
    """{lock: variables for the job that holds it}; empty where there is nothing to share out."""
    if devices is None or any(name in os.environ for name in SHARED_OUT):
        return {}
    if gpus := visible_gpus() if devices == "auto" else [str(device) for device in devices]:
        # Another sweep on this machine must not take the same one.
        locks = Path(tempfile.gettempdir()) / f"kandinsky_exp-{os.getuid()}"
        return {locks / f"gpu-{gpu}.lock": {"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus}
    count = min(parallel, cores := threads.usable_cores())
    if count <= 1:
        return {}
    each = int(os.environ.get("OMP_NUM_THREADS", max(1, cores // count)))
    return {slots / f"cores-{number}.lock": {"OMP_NUM_THREADS": str(each)} for number in range(count)}


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES says, or else the UUIDs of all NVIDIA GPUs. CUDA itself is not touched: a process that
    has looked for devices can no longer choose one."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1"]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=uuid", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)  # nosec B603
        return answer.stdout.split()
    return []


def problem(devices: str | Sequence[int | str] | None) -> str | None:
    """What is wrong with devices that were named, as far as this machine tells without touching CUDA.

    Args:
        devices: as for `held`.
    """
    if devices is None or isinstance(devices, str) or any(name in os.environ for name in SHARED_OUT):
        return None
    named = [str(device) for device in devices]
    if not named:
        return "names no GPU; give their numbers, auto, or null to leave the choice to the launcher"
    if twice := sorted({name for name in named if named.count(name) > 1}):
        return f"{', '.join(twice)} is there more than once; each parallel job has a GPU of its own"
    known = there = visible_gpus()
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        if not there and any(any(Path("/dev").glob(sign)) for sign in SIGNS):
            return None  # which, only CUDA knows
        known = [*there, *map(str, range(len(there)))]
    # CUDA takes the beginning of a UUID for the whole; nvidia-smi does not list the parts of a GPU.
    strange = [
        name
        for name in named
        if not name.startswith("MIG-")
        and name not in known
        and not any(name.startswith("GPU-") and gpu.startswith(name) for gpu in there)
    ]
    if not strange:
        return None
    has = f"the GPUs here are {', '.join(known)}" if known else "there is no GPU here"
    return f"{', '.join(strange)} is not there, {has} (nvidia-smi, CUDA_VISIBLE_DEVICES); name others, or leave it out"
