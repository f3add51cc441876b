"""The state of a sweep's jobs, as files in its folder: their outcomes, and the signals that stop them.

<sweep>/.jobs/<folder of a job>.json    an `Outcome`
<sweep>/.jobs/stop-<rank>               the signals that came, a number a line

Whoever launches jobs, here or on another machine, sees this folder; more than that no launcher has in common.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from kandinsky_exp.system.files import write_atomically
from kandinsky_exp.tracking.mlflow_names import short_names, shortened

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED", "PRUNED"]
MAX_NAME = 200  # characters of a job's name in MLflow


@dataclass
class Outcome:
    """One job.

    Args:
        number: its place in the sweep, from 0.
        folder: of the run, inside that of the sweep.
        name: what it varies, as MLflow shows it: `lr=1e-05 snr=5`.
        varied: what it varies, as it was typed, by dotted key.
        score: the objective's value, of the validation loss the best one; None where nothing was measured.
        objective, maximizes: what the sweep ranks by, and whether larger is better.
        is_training: nothing was held out: the score is the last training loss.
        stage: that it trained.
        seconds: of all starts together.
        message: why it did not finish.
        is_user_error: nothing was trained, the configuration or the data is wrong.
        session: of the sweep's start that the job belongs to.
        token: marks the MLflow run that was made for a job that failed before it made one.
    """

    number: int
    folder: str
    name: str
    varied: dict[str, str] = field(default_factory=dict)
    status: Status = "RUNNING"
    score: float | None = None
    objective: str = "validation/loss"
    maximizes: bool = False
    is_training: bool = False
    stage: str | None = None
    seconds: float = 0.0
    run_id: str | None = None
    message: str = ""
    is_user_error: bool = False
    session: str = ""
    token: str | None = None


def hydra_of_job() -> Any:
    """Hydra's settings in a job of a sweep; None in other runs."""
    is_job = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return HydraConfig.get() if is_job else None


class JobFolder:
    """What is written of a sweep's jobs.

    Args:
        sweep: the sweep's folder.
    """

    def __init__(self, sweep: Path) -> None:
        self.sweep, self.folder = sweep, sweep / ".jobs"
        self._stop = self.folder / f"stop-{os.environ.get('RANK', '0')}"  # each process of a job hears its own signals

    def write(self, outcome: Outcome) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file(outcome.folder), json.dumps(asdict(outcome), indent=2) + "\n")

    def read(self, folder: str) -> Outcome | None:
        """The outcome of the job in a folder, None where there is none that can be read."""
        try:
            return Outcome(**json.loads(self._file(folder).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def outcomes(self, session: str | None = None) -> list[Outcome]:
        """Those of one start, or all that there ever were, in the order of the jobs."""
        found = [self.read(path.stem) for path in self.folder.glob("*.json")]
        chosen = [outcome for outcome in found if outcome is not None and session in (None, outcome.session)]
        return sorted(chosen, key=lambda outcome: outcome.number)

    def ask_to_stop(self, signal_number: int) -> None:
        """Also called by a signal's handler."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._stop.open("a") as file:
            file.write(f"{signal_number}\n")

    def signals(self) -> list[int]:
        """Those that came since the sweep began."""
        try:
            return [int(line) for line in self._stop.read_text().splitlines()]
        except (OSError, ValueError):
            return []

    def forget_signals(self) -> None:
        self._stop.unlink(missing_ok=True)

    def _file(self, folder: str) -> Path:
        return self.folder / f"{folder}.json"


def job_name(values: Mapping[str, Any]) -> str:
    """What a job varies as one line: `lr=1e-05 snr=5`."""
    short = short_names(values)
    return shortened(" ".join(f"{short[key]}={_value(value)}" for key, value in values.items()), MAX_NAME)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "null" if value is None else str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)
