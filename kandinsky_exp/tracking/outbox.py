"""The outbox of a run: what MLflow has not taken yet, on disk. It outlives the process, and a store that is away.

    <run>/outbox/
      records/00000001.jsonl      metrics, parameters, tags and data sets, a JSON object a line
      artifacts/00000001.jsonl    one image, text or file each
      artifacts/files/<id>/       what it holds, named as it is to be called
      status.json                 how the run ended: delivered last
      refused.jsonl, refused/     what the store will never take, and why

The folder is there only while something waits.
"""

import contextlib
import json
import threading
from pathlib import Path

from kandinsky_exp.tracking.disk_queue import DiskQueue, Record, fsync
from kandinsky_exp.tracking.mlflow_names import reason


class Outbox:
    """Two queues, so that an artifact store that refuses holds up no metrics; and the status.

    Args:
        folder: of one MLflow run, and of one process at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self.records = DiskQueue(folder / "records", self._lock)
        self.artifacts = DiskQueue(folder / "artifacts", self._lock, limit=0)
        self._status: Record | None = None

    def open(self) -> None:
        """Go on with what an earlier process left."""
        self.artifacts.remove_orphans()
        self.tidy()

    def set_status(self, record: Record) -> None:
        """Note how the run ended. It takes no lock: a signal's handler may call it amid `append`."""
        self._status = record
        with contextlib.suppress(OSError):  # then it is in memory only
            for _ in range(3):  # the thread that delivers may remove the empty folder just now
                self.folder.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):
                    (self.folder / "status.json").write_text(json.dumps(record), "utf-8")
                    return

    def status(self) -> Record | None:
        if self._status is None:
            with contextlib.suppress(OSError, ValueError):
                self._status = json.loads((self.folder / "status.json").read_bytes())
        return self._status

    def remove_status(self) -> None:
        self._status = None
        (self.folder / "status.json").unlink(missing_ok=True)

    def refuse(self, queue: DiskQueue, record: Record, error: BaseException) -> None:
        """Put a record aside that the store will never take."""
        line = json.dumps({"reason": reason(error), "record": record}, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            if "files" in record and queue.files(record).exists():
                aside = self.folder / "refused" / str(record["files"])
                aside.parent.mkdir(exist_ok=True)
                queue.files(record).rename(aside)
            with (self.folder / "refused.jsonl").open("ab", buffering=0) as file:
                file.write(line)

    def waiting(self) -> int:
        """How many records wait, the status among them."""
        return self.records.waiting() + self.artifacts.waiting() + (self.status() is not None)

    def held(self) -> int:
        return self.records.held() + self.artifacts.held()

    def sync(self) -> None:
        self.artifacts.sync()
        self.records.sync()
        if self.folder.exists():
            for path in (self.folder / "status.json", self.folder, self.folder.parent):
                fsync(path)

    def tidy(self) -> None:
        """Remove the folders that hold nothing."""
        with self._lock:
            for folder in (self.records.folder, self.artifacts.folder / "files", self.artifacts.folder, self.folder):
                with contextlib.suppress(OSError):
                    folder.rmdir()
