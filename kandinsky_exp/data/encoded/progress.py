"""Progress of an encoding: a bar on a terminal, log lines elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

from kandinsky_exp.system.logs import Log
from kandinsky_exp.system.telling import EVERY_SECONDS


class ProgressBar:
    """A bar with images/s and the time left on a terminal, a line about every ten seconds elsewhere.

    Args:
        total: examples of the source; None where nobody knows.
        done: those that an earlier process encoded.
    """

    def __init__(self, total: int | None, done: int, log: Log) -> None:
        self.total, self.first, self.done, self.log = total, done, done, log
        self.own = 0  # examples of this process
        self.announced = False
        self.started = self.said = time.monotonic()
        self.bar: tqdm[Any] | None = None

    def announce(self, bytes_each: float, seconds_each: float) -> int:
        """Say how much there is to do; returns the bytes that it will write, 0 where the number is not known."""
        self.announced = True
        if self.total is None:
            self.log(
                f"encoding images of an unknown number: {bytes_each / 1e3:.1f} kB and about {seconds_each:.2g} s each"
            )
        else:
            left = self.total - self.first
            going_on = f", after {self.first:,} that are there already" if self.first else ""
            self.log(
                f"encoding {left:,} images{going_on}: {left * bytes_each / 1e6:,.2f} MB to write, about "
                f"{tqdm.format_interval(left * seconds_each)}"
            )
        if sys.stderr.isatty():  # some are done by now: the first batches told the size
            self.bar = tqdm(total=self.total, initial=self.done, unit="image", desc="encoding", dynamic_ncols=True)
        return 0 if self.total is None else int((self.total - self.first) * bytes_each)

    def __call__(self, done: int, more: int) -> None:
        """Show where it stands.

        Args:
            done: examples, by all processes.
            more: examples that this one has encoded since.
        """
        self.own += more
        if self.bar is not None:
            self.bar.update(done - self.done)
        self.done = done
        now = time.monotonic()
        if self.bar is not None or not self.announced or now - self.said < EVERY_SECONDS:
            return
        self.said = now
        seconds = now - self.started
        together = (done - self.first) / seconds
        left = f", about {tqdm.format_interval((self.total - done) / together)} left" if self.total is not None else ""
        of_all = f" of {self.total:,}" if self.total is not None else ""
        self.log(f"encoded {done:,}{of_all} images, {self.own / seconds:.1f} images/s{self._here(done)}{left}")

    def _here(self, done: int) -> str:
        return "" if self.own == done - self.first else " by this process"

    def close(self) -> None:
        """Leave the bar where it is; an error may follow."""
        if self.bar is not None:
            self.bar.close()

    def sum_up(self, images: int, captions: int) -> None:
        """Say what it came to."""
        seconds = time.monotonic() - self.started
        texts = f" and {captions:,} captions" if captions else ""
        rate = f"{self.own / max(seconds, 1e-9):.1f} images/s{self._here(self.done)}"
        self.log(f"encoded {images:,} images{texts} in {tqdm.format_interval(seconds)}, {rate}")
