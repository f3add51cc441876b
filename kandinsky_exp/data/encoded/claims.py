"""Who makes which part of a table: claims, files that name a process and that it touches as long as it lives."""

import contextlib
import json
import os
import platform
import threading
import time
from functools import cache
from pathlib import Path
from uuid import uuid4

from kandinsky_exp.system.files import json_object, write_atomically

CLAIM = ".claim"
CLOCK = ".clock"
BEAT_SECONDS = 5.0
# Without a beat, a process of another machine counts as gone; network file systems show times up to a minute late.
GONE_SECONDS = 120.0


class Claims:
    """The claims of one process on parts of a table in the making. A thread touches them until they are released.

    Args:
        folder: of the table in the making.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, uuid4().hex[:12]
        self._held: set[Path] = set()
        self._over = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._beating.start()

    def take(self, name: str) -> bool:
        """Claim what no living process has. Only for who has the table locked: nobody else claims meanwhile.

        Raises:
            OSError: the disk cannot be written.
        """
        claim = self.folder / f"{name}{CLAIM}"
        if claim.exists() and is_alive(claim, disk_time(self.folder)):
            return False
        own = {"machine": _machine(), "process": os.getpid(), "began": _began(os.getpid())}
        write_atomically(claim, json.dumps(own))
        self._held.add(claim)
        return True

    def release(self, name: str) -> None:
        """Give one back."""
        claim = self.folder / f"{name}{CLAIM}"
        self._held.discard(claim)
        with contextlib.suppress(OSError):  # its folder may have become the table
            claim.unlink(missing_ok=True)

    def close(self) -> None:
        """Give all back."""
        self._over.set()
        for claim in list(self._held):
            self.release(claim.name.removesuffix(CLAIM))
        self._beating.join()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            for claim in list(self._held):
                with contextlib.suppress(OSError):
                    os.utime(claim)


def is_anyone_at(folder: Path) -> bool:
    """Whether a living process has a claim on any part of a table in the making."""
    claims = list(folder.glob(f"*{CLAIM}"))
    return bool(claims) and any(is_alive(claim, disk_time(folder)) for claim in claims)


def is_alive(claim: Path, now: float) -> bool:
    """Whether the process that holds a claim lives: on this machine the process is looked for, elsewhere its beat.

    Args:
        now: `disk_time` of its folder.
    """
    try:
        age = now - claim.stat().st_mtime
    except OSError:
        return False
    held = json_object(claim) or {}
    if held.get("machine") == _machine():  # it may stand still, and go on later
        return held.get("began") == _began(held.get("process", 0))
    return age < GONE_SECONDS


def disk_time(folder: Path) -> float:
    """Now, by the clock that stamps the files of a folder: machines that share a disk may not agree on the time."""
    clock = folder / f"{CLOCK}.{uuid4().hex[:12]}"
    try:
        clock.touch()
        now = clock.stat().st_mtime
        clock.unlink()
    except OSError:
        return time.time()
    return now


@cache
def _machine() -> str:
    """This machine since it was started, and what tells its processes apart: containers may share a name."""
    names = [platform.node()]
    with contextlib.suppress(OSError):
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip())
        names.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(names)


def _began(process: int) -> str | None:
    """When a process of this machine began, so that another one of its number is told apart; None if it is gone."""
    with contextlib.suppress(OSError, IndexError):
        facts = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
        return None if facts[0] in "ZX" else facts[19]
    if Path("/proc/self/stat").exists():
        return None
    try:  # systems without /proc
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "lives"
