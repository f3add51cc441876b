"""Asynchronous checkpoints: copy to host memory, write in a thread."""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

from kandinsky_exp.errors import CheckpointFailure, NonFiniteLoss, RunFailure
from kandinsky_exp.system import distributed, host_memory, threads
from kandinsky_exp.training import checkpoint

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
        self._writing: futures.Future[None] | None = None

    def save(self, snapshot: checkpoint.Snapshot) -> None:
        """Copy a snapshot and begin to write it, once the one before is written.

        Raises:
            CheckpointFailure: that of the checkpoint before; or of this one, where it is not written behind.
        """
        self.wait()
        copy = self._copy(snapshot) if self.behind else None
        if copy is None:
            self._write(snapshot)
        else:  # a second signal ends the process at once, and what is half-written then was never there
            self._writing = threads.started(lambda: self._write(copy), "checkpoint")

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointFailure: the last checkpoint could not be written.
        """
        if self._writing is not None:
            futures.wait([self._writing])  # a signal may interrupt it: then the next one waits
            writing, self._writing = self._writing, None
            writing.result()

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """On the way out wait for what is being written; its failure is raised unless something else went wrong."""
        try:
            yield
        except BaseException as error:
            try:
                # This one stops all processes at once, and none may be gone before the write is done; a failure of one
                # process alone is nothing that the others would answer.
                distributed.on_main_process(self.wait) if isinstance(error, NonFiniteLoss) else self.wait()
            except RunFailure as failure:
                logger.error("%s", failure)
            raise
        distributed.on_main_process(self.wait)

    def _copy(self, snapshot: checkpoint.Snapshot) -> checkpoint.Snapshot | None:
        """A copy in host memory, None where it does not fit."""
        needed, available = snapshot.size(), host_memory.available()
        if needed > ROOM * available:
            logger.info(
                "host memory has no room for a copy of %.1f GB (%.1f GB are available): training waits for the "
                "checkpoint",
                needed / 1e9,
                available / 1e9,
            )
            return None
        try:
            return snapshot.on_host()
        except (RuntimeError, MemoryError) as error:  # torch has no error of its own for a host that is out of memory
            logger.warning("no copy of the checkpoint in host memory (%s): training waits for it", error)
            return None

    def _write(self, snapshot: checkpoint.Snapshot) -> None:
        try:
            folder = snapshot.write(self.root)
            checkpoint.prune(self.root, self.keep)
            self.recorded(folder, snapshot.step)
        except RunFailure:
            raise
        except Exception as error:
            raise CheckpointFailure(
                f"the checkpoint of step {snapshot.step} could not be written to {self.root} ({error})"
                f"{self._room(snapshot)}; the one before is whole: make room, and run the same command again"
            ) from error

    def _room(self, snapshot: checkpoint.Snapshot) -> str:
        """What it needs and what there is, where the disk can say so."""
        try:
            free = shutil.disk_usage(self.root).free
        except OSError:
            return ""
        return f": it needs {snapshot.size() / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB left"
