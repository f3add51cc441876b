"""The peak memory of the phases of a run on the CPU, told apart by what the run logs. Linux only.

    python tests/support/phase_peaks.py FILE [OVERRIDE ...]

FILE takes them as JSON, in bytes of the process that trains.
"""

import json
import logging
import re
import sys
from pathlib import Path

from kandinsky_exp import cli
from kandinsky_exp.system import host_memory

# What ends a phase in the log, and the phases of a plan that lie before it: images are drawn after a validation.
ENDS = {
    "encoding": (r"encod(ing|ed) \d+ ", ("loading", "encoding")),
    "training": (r"step \d+ of \d+: ", ("drawing", "training")),
    "validation": (r"step \d+: validation loss", ("validation",)),
    "checkpoint": (r"step \d+: checkpoint", ("drawing", "checkpoint")),
}


class PhasePeaks(logging.Handler):
    """Put on the package's logger, it has the largest resident memory of each phase in `found`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
        for phase, (end, _) in ENDS.items():
            if re.match(end, record.getMessage()):
                self.found[phase] = max(peak, self.found.get(phase, 0))
                if phase == "training":  # what it leaves free, a run gives back next
                    host_memory.give_back_blocks()
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on


def main(file: str, *overrides: str) -> None:
    peaks = PhasePeaks()
    logging.getLogger("kandinsky_exp").addHandler(peaks)
    cli.main(["train", *overrides])
    Path(file).write_text(json.dumps(peaks.found))


if __name__ == "__main__":
    main(*sys.argv[1:])
