"""Python's search for garbage, which goes through all that was ever imported."""

import contextlib
import functools
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """None while modules are imported, a fifth of the time; nor ever in what they leave.

    A process that is forked later shares that memory: a search would have it copied.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        _freeze()
        if was_on:
            gc.enable()


@functools.cache  # once: what a run leaves has to be found; and to count goes through all that is frozen
def _freeze() -> None:
    if gc.get_freeze_count() == 0:
        gc.freeze()
