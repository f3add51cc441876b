"""How far long work is: a bar with the time left on a terminal, a line about every ten seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from kandinsky_exp.system.logs import Log

EVERY_SECONDS = 10.0
Part = TypeVar("Part")


def told(
    parts: Sequence[Part], what: str, done: str, log: Log, size: Callable[[Part], int] = lambda part: 1
) -> Iterator[Part]:
    """The parts one by one.

    Args:
        what: they are made of, `pictures`.
        done: to them, `drew`.
        size: of a part.
    """
    total, so_far = sum(map(size, parts)), 0
    started = said = time.monotonic()
    with tqdm(total=total, unit="", desc=what, disable=not sys.stderr.isatty()) as bar:
        for part in parts:
            yield part
            so_far += size(part)
            bar.update(size(part))
            now = time.monotonic()
            if bar.disable and now - said > EVERY_SECONDS and so_far < total:
                said = now
                left = tqdm.format_interval((now - started) / so_far * (total - so_far))
                log(f"{done} {so_far:,} of {total:,} {what}, about {left} left")
