"""Checkpoints written behind: training waits for the copy to host memory, and a thread does the rest."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # Accelerate brings it

from kandinsky_exp import checkpoint, processes
from kandinsky_exp.errors import CheckpointFailure

logger = logging.getLogger(__name__)

ROOM = 0.9  # of the memory that is available: the copy may take no more


class CheckpointWriter:
    """Writes one checkpoint at a time, each whole before the next begins. For the main process alone.

    Args:
        root: the run's `checkpoints/`.
        keep: how many stay, besides the best one.
        behind: False = `save` returns when the checkpoint is written.
        recorded: called with each folder and step once it is whole; by the thread.
    """

    def __init__(self, root: Path, keep: int, behind: bool, recorded: Callable[[Path, int], None]) -> None:
        self.root, self.keep, self.behind, self.recorded = root, keep, behind, recorded
        self._thread: threading.Thread | None = None
        self._failure: CheckpointFailure | None = None

    def save(self, snapshot: checkpoint.Snapshot) -> None:
        """Copy a snapshot and begin to write it, once the one before is written.

        Raises:
            CheckpointFailure: that of the checkpoint before; or of this one, where it is not written behind.
        """
        self.wait()
        if not self.behind or not self._has_room(snapshot):
            self._write(snapshot)
            self.wait()
            return
        # A daemon: a second signal ends the process at once, and what is half-written then was never there.
        self._thread = threading.Thread(target=self._write, args=(snapshot.on_host(),), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointFailure: the last checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """On the way out wait for what is being written; its failure is raised unless something else went wrong."""
        try:
            yield
        except BaseException:
            try:
                self.wait()
            except CheckpointFailure as failure:
                logger.error("%s", failure)
            raise
        processes.on_main_process(self.wait)

    def _has_room(self, snapshot: checkpoint.Snapshot) -> bool:
        needed, available = snapshot.size(), psutil.virtual_memory().available
        if needed <= ROOM * available:
            return True
        logger.info(
            "host memory has no room for a copy of %.1f GB (%.1f GB are available): training waits for the checkpoint",
            needed / 1e9,
            available / 1e9,
        )
        return False

    def _write(self, snapshot: checkpoint.Snapshot) -> None:
        try:
            folder = snapshot.write(self.root)
            checkpoint.prune(self.root, self.keep)
            self.recorded(folder, snapshot.step)
        except Exception as error:  # whatever it is, it is raised where the run can stop
            self._failure = CheckpointFailure(
                f"the checkpoint of step {snapshot.step} could not be written to {self.root} ({error}); the one before "
                "is whole: make room, and run the same command again"
            )
            self._failure.__cause__ = error
