"""Logging: to `train.log` and to the terminal."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from kandinsky_exp.errors import RunFailure, UserError, reason_of
from kandinsky_exp.system import redaction, terminal


class _Terminal(logging.Handler):
    """Lines on stderr that leave a progress bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def logging_to(file: Path | None, is_main: bool) -> Iterator[None]:
    """Our own log records, in a file such as `train.log` and on stderr, from the main process only.

    What ends the block is in the file too, with the traceback of what nobody expected; stderr gets it from the command.
    """
    root = logging.getLogger("kandinsky_exp")
    level, propagate = root.level, root.propagate
    root.setLevel(logging.INFO if is_main else logging.ERROR)
    root.propagate = False
    handlers: list[logging.Handler] = []
    if is_main:
        handlers = [_Terminal()]
        handlers[0].setFormatter(redaction.Formatter("%(message)s"))
    if is_main and file is not None:
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
        handlers[1].setFormatter(redaction.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for handler in handlers:
        root.addHandler(handler)
    if terminal.Lasting.lost is not None:
        root.warning(terminal.MESSAGE, terminal.Lasting.lost)
    try:
        yield
    except Exception as error:
        for handler in handlers[1:]:
            trace = None if isinstance(error, (UserError, RunFailure)) else sys.exc_info()
            handler.handle(root.makeRecord(root.name, logging.ERROR, __file__, 0, reason_of(error), (), trace))
        raise
    finally:
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
        root.propagate = propagate


Log = Callable[[str], None]


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries that load weights: a run says itself what it does."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
