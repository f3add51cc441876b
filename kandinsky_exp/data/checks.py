"""Check the rows of a data set before any weights load."""

from collections import Counter
from dataclasses import dataclass

from kandinsky_exp.data import tally
from kandinsky_exp.data.examples import Example, Indexed, Source, in_threads
from kandinsky_exp.data.pictures import NOTE
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.data.splits import Splits, told_of
from kandinsky_exp.data.tally import Tally, first_few
from kandinsky_exp.errors import DataError


@dataclass(frozen=True)
class DataSummary:
    """Counts over both splits; None for what is only known once a stream has been read.

    Args:
        sets: of the further held-out ones, by name.
        notes: what a user should know, a line each, such as what lies where the pictures do and is not used.
    """

    images: int | None
    validation_images: int | None
    captions: int | None
    notes: tuple[str, ...] = ()
    sets: tuple[tuple[str, int | None], ...] = ()

    def __str__(self) -> str:
        sets = "".join(
            f"; {name}: {'a stream' if count is None else f'{count:,} held out'}" for name, count in self.sets
        )
        return self._trained() + sets

    def _trained(self) -> str:
        if self.images is None:
            return "images in shards, read as a stream"
        held_out = f" + {self.validation_images:,} held out" if self.validation_images else ""
        captions = f", {self.captions:,} captions" if self.captions is not None else ""
        return f"{self.images:,} images{held_out}{captions}"


def check(splits: Splits, requires_captions: bool, *, skip: bool = False) -> DataSummary:
    """Look at the rows of a data set, not at the images. Of a stream only the first example is read.

    Args:
        requires_captions: whether a row without a caption is an error.
        skip: let bad rows pass, unless there is no good one.

    Raises:
        DataError: listing the first rows without an image file, or with a missing or empty caption.
    """
    problems = [problem for source in splits.both for problem in _problems(source, requires_captions, skip)]
    for name, source in splits.sets.items():
        problems += [told_of(name, problem) for problem in _problems(source, requires_captions, skip)]
    if problems:
        raise DataError(first_few(problems))
    known = [source for source in splits.both if isinstance(source, Indexed)]
    captions = sum(int(source.caption_counts().sum()) for source in known)
    held_out = _count(splits.validation) if splits.validation is not None else 0
    sets = tuple((name, _count(source)) for name, source in splits.sets.items())
    unused: Tally = {}
    for part in (*splits.both, *splits.sets.values(), splits.class_images):
        tally.add(unused, part.left_out() if part is not None else {})
    captions_known = captions if len(known) == len(splits.both) else None
    return DataSummary(_count(splits.train), held_out, captions_known, tuple(tally.lines(unused)), sets)


def _count(source: Source) -> int | None:
    """Not `count` of a stream, which would read the headers of all shards at every start."""
    return len(source) if isinstance(source, Indexed) else None


def _problems(source: Source, requires_captions: bool, skip: bool) -> list[str]:
    """One line a row, but one line in all where a wrong column makes every row the same."""
    if not isinstance(source, Indexed):
        problem = problem_of(source[0], requires_captions)
        return [problem] if problem and not skip else []
    bad = [source[int(row)] for row in source.suspects(requires_captions)]
    if skip and len(bad) < len(source):
        return []
    reasons = Counter(_reason(example, requires_captions) for example in bad)
    if len(reasons) == 1 and len(bad) == len(source) > 1:
        return [f"{bad[0].where} and every other row: {next(iter(reasons))}"]
    return [f"{example.where}: {_reason(example, requires_captions)}" for example in bad]


def _reason(example: Example, requires_captions: bool) -> str:
    return example.problem or (example.caption_problem if requires_captions else "")


def problem_of(example: Example, requires_captions: bool) -> str | None:
    """Why an example cannot be used, as far as its row tells; None where nothing is wrong."""
    reason = _reason(example, requires_captions)
    return f"{example.where}: {reason}" if reason else None


def find_bad(
    source: Indexed, requires_captions: bool, noted: Tally | None = None, preprocess: Preprocess | None = None
) -> list[tuple[int, str]]:
    """Decode every image, several at a time: (row, problem) of every row that cannot be used.

    Args:
        noted: gets what of the others' files was not used.
        preprocess: tells what belongs to an image, and has to be readable too.
    """

    def decode(row: int) -> tuple[str | None, str]:
        example = source[row]
        try:
            image = example.image()
            if preprocess is not None and preprocess.read_beside:
                preprocess.beside(image, example.companions())
        except DataError as error:
            return str(error), ""
        except ValueError as error:
            return f"{example.where}: image {example.id}: {error}", ""
        return problem_of(example, requires_captions), image.info.get(NOTE, "")

    bad = []
    for row, (problem, note) in enumerate(in_threads(decode, len(source))):
        if problem:
            bad.append((row, problem))
        elif note and noted is not None:
            tally.count(noted, note, source[row].id)
    return bad
