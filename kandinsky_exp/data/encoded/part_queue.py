"""Which parts of a table this process makes, and the examples of them, as they are read ahead."""

from collections import deque
from collections.abc import Iterator
from itertools import chain, count, islice

from kandinsky_exp.data.encoded.catalog import writing
from kandinsky_exp.data.encoded.claims import Claims
from kandinsky_exp.data.encoded.layout import part_folder
from kandinsky_exp.data.encoded.making import Making
from kandinsky_exp.data.examples import Example, Indexed, Source

SWEEP = "sweep"  # the one claim on a source that is read in one sweep: one process makes all parts


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
        self._reading: deque[tuple[int, bool]] = deque()

    def is_done(self) -> bool:
        """Whether all that is wanted is there, whoever made it."""
        return self.ended if self.plan.parts is None else self.wanted <= self.making.there()

    def take(self) -> int | None:
        """A part, now claimed by this process; None where there is none to take."""
        self.there = self.making.there()
        if not isinstance(self.source, Indexed):
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
            yield from self._part(taken, (self.source[row] for row in self.plan.rows_of(taken)))
            taken = self.take()

    def _swept(self, first: int) -> Iterator[list[Example]]:
        rest = iter(self.source.examples(self.plan.rows_of(first).start))
        for number in count(first):
            following = list(islice(rest, 1))
            if not following:
                break
            rest = chain(following, rest)
            yield from self._part(number, islice(rest, self.plan.part_rows))
        self.ended = True

    def _part(self, number: int, examples: Iterator[Example]) -> Iterator[list[Example]]:
        held: list[Example] = []
        while some := list(islice(examples, self.plan.batch_size)):
            if held:
                self._reading.append((number, False))
                yield held
            held = some
        self._reading.append((number, True))
        yield held

    def read(self) -> tuple[int, bool]:
        """Of the next list that comes back from the readers: its part, and whether it is the part's last."""
        return self._reading.popleft()

    def finished(self, number: int) -> None:
        """A part of this process is there."""
        self.there.add(number)
        if isinstance(self.source, Indexed):
            self.claims.release(str(number))
