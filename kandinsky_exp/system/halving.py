"""Halve the batch size when memory runs out."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from accelerate.utils.memory import clear_device_cache

from kandinsky_exp.errors import first_line, is_out_of_memory

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@dataclass
class Halving:
    """Does work again with half the batch when memory runs out, down to 1; what was found is kept for the next time.

    Args:
        what: it does, for messages.
        size: of a batch.
    """

    what: str
    size: int

    def run(self, work: Callable[[int], Result]) -> Result:
        """`work(size)`, which has to come to the same whatever the size is."""
        emptied = False
        while True:
            try:
                return work(self.size)
            except Exception as error:
                if not is_out_of_memory(error) or (emptied and self.size == 1):
                    raise
                reason = first_line(error)
            # Here, where no traceback keeps what is on the device.
            clear_device_cache(garbage_collection=True)
            emptied, self.size = True, max(1, self.size // 2)
            logger.warning("%s: memory ran out (%s); again in batches of %d", self.what, reason, self.size)
