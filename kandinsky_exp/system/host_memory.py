"""Free host memory, as the machine and its control groups (cgroups) limit it."""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # Accelerate brings it

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
# (limit, usage, what of the usage the kernel gives back when asked): version 2 and version 1.
FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}

# Bytes from which on a freed block goes back to the system at once. glibc begins lower, and learns to cut whatever is
# below 32 MB from one heap, where activations leave holes. To give back more costs time, for the pages come anew: of a
# prior in batches of 64 a step takes a quarter longer.
LEAN, FAST = 4 << 20, 32 << 20
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
KEPT = 64 << 20  # bytes of small blocks that are kept for the next step, free as they are


def give_back_blocks(large: int | None = None) -> None:
    """Give back what is free, where the C library is glibc; and from now on blocks of `large` bytes and more at once.

    Encoders of true size leave up to 0.7 GB between small blocks, the steps of a prior of 4 M in batches of 256 1 GB.

    Measured with `LEAN`: a prior with checkpointed blocks took 1.25 GB instead of 2.26.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is not None and hasattr(library, "mallopt"):
        if large is not None:
            library.mallopt(MMAP_THRESHOLD, large)
            library.mallopt(TRIM_THRESHOLD, KEPT)
        library.malloc_trim(0)


def available() -> int:
    """Bytes; a container's limit counts, of which the machine's own numbers know nothing."""
    machine = int(psutil.virtual_memory().available)
    return min([machine, *limits()])


def limits(root: Path = CGROUPS, own: Path = OWN) -> Iterator[int]:
    """Bytes left under each limit on this process's control groups and on those above them.

    Args:
        root: where they are mounted.
        own: the list of those that this process is in.
    """
    try:
        lines = own.read_text("utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        version, mount = (1, root / "memory") if controllers else (2, root)
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):  # inside a container the path may be the outside's: then its root counts
            left = _left(mount / folder, *FILES[version])
            if left is not None:
                yield left


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """None where there is no limit, or no such group."""
    try:
        allowed, used = ((folder / name).read_text("utf-8").strip() for name in (limit, usage))
        if allowed == "max":
            return None
        stat = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text("utf-8").splitlines())
        # Files that were read once, such as the weights, fill a group up to its limit and are dropped when need be.
        return max(0, int(allowed) - int(used) + int(stat.get(reclaimable, 0)))
    except (OSError, ValueError):
        return None
