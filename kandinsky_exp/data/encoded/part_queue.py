"""Which parts of a table this process makes, and the examples of them, as they are read ahead."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

from kandinsky_exp.data.encoded.catalog import writing
from kandinsky_exp.data.encoded.claims import Claims
from kandinsky_exp.data.encoded.layout import part_folder
from kandinsky_exp.data.encoded.making import Making
from kandinsky_exp.data.examples import Example, Indexed, Source

SWEEP = "sweep"  # the one claim on a source that is read in one sweep: one process makes all parts


@dataclass(frozen=True)
class Place:
    """Where a list of examples belongs.

    Args:
        part: its number.
        ends_part: whether it is the last list of it.
        ends_sweep: whether it is the last list of a source that is read in one sweep.
    """

    part: int
    ends_part: bool
    ends_sweep: bool = False


class PartQueue:
    """Takes parts that no other process makes.

    Args:
        only: the one part to take; None = all of them.
    """

    def __init__(self, source: Source, making: Making, claims: Claims, only: int | None = None) -> None:
        self.source, self.making, self.claims, self.plan = source, making, claims, making.plan
        self.wanted = set(range(self.plan.parts or 0)) if only is None else {only}
        self.ended = False  # a sweep is over
        self.there = set(making.found)
        self._reading: deque[Place] = deque()

    def is_done(self) -> bool:
        """Whether all that is wanted is there, whoever made it."""
        return self.ended if self.plan.parts is None else self.wanted <= self.making.there()

    def take(self) -> int | None:
        """A part, now claimed by this process; None where there is none to take."""
        with self.making.locked():
            self.there = self.making.there()
            if self.plan.parts is None:
                first = next(number for number in count() if number not in self.there)
                return first if self._claim(SWEEP) else None
            for number in sorted(self.wanted - self.there):
                if self._claim(str(number)):
                    if not part_folder(self.making.folder, number).exists():
                        return number
                    self.claims.release(str(number))  # it was finished a moment ago
        return None

    def _claim(self, name: str) -> bool:
        with writing(self.making.folder):
            return self.claims.take(name)

    def lists(self, first: int) -> Iterator[list[Example]]:
        """The examples of a part that was taken, and of those that are taken then, in lists as long as a batch.

        A sweep goes on to the end of the source.
        """
        if not isinstance(self.source, Indexed):
            yield from self._swept(first)
            return
        taken: int | None = first
        while taken is not None:
            for examples, is_last in self._batches(self.source[row] for row in self.plan.rows_of(taken)):
                self._reading.append(Place(taken, is_last))
                yield examples
            taken = self.take()

    def _swept(self, first: int) -> Iterator[list[Example]]:
        of_part = self.plan.part_rows // self.plan.batch_size
        batches = self._batches(iter(self.source.examples(self.plan.rows_of(first).start)))
        for number, (examples, is_last) in enumerate(batches, 1):
            self._reading.append(Place(first + (number - 1) // of_part, is_last or number % of_part == 0, is_last))
            yield examples
        self.ended = True

    def _batches(self, examples: Iterator[Example]) -> Iterator[tuple[list[Example], bool]]:
        """Lists as long as a batch, and whether there is none after it: by then the walk has come to its end."""
        held = list(islice(examples, self.plan.batch_size))
        while held:
            following = list(islice(examples, self.plan.batch_size))
            yield held, not following
            held = following

    def read(self) -> Place:
        """Of the next list that comes back from the readers."""
        return self._reading.popleft()

    def finished(self, number: int) -> None:
        """A part of this process is there."""
        self.there.add(number)
        if isinstance(self.source, Indexed):
            self.claims.release(str(number))
