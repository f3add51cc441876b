"""What can be known to be wrong with a data set before any weights load."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from kandinsky_exp.data.examples import Example, Source, Splits, in_threads
from kandinsky_exp.data.metadata import first_few
from kandinsky_exp.errors import DataError

CHUNK = 256


@dataclass(frozen=True)
class Report:
    """Counts over both splits. `truncated`: captions of more than `max_tokens` tokens, None if no tokenizer counted."""

    images: int
    validation_images: int
    captions: int
    truncated: int | None = None
    max_tokens: int | None = None

    def __str__(self) -> str:
        held_out = f" + {self.validation_images:,} held out" if self.validation_images else ""
        parts = [f"{self.images:,} images{held_out}", f"{self.captions:,} captions"]
        if self.truncated:
            parts.append(f"{self.truncated:,} of them longer than {self.max_tokens} tokens and cut")
        return ", ".join(parts)


def check(splits: Splits, requires_captions: bool, tokenizer: Any | None = None, images: bool = True) -> Report:
    """Read every row of a data set once.

    Args:
        requires_captions: whether a row without a caption is an error.
        tokenizer: counts the captions that it will cut; None leaves that out.
        images: decode every image. A set that was encoded before was readable then.

    Raises:
        DataError: listing the first rows with an unreadable image or a missing or empty caption.
    """
    sources = [splits.train] + ([splits.validation] if splits.validation is not None else [])
    problems, captions = [], []
    for source in sources:
        wrong, found = _check_source(source, requires_captions, images)
        problems += wrong
        captions += found
    if problems:
        raise DataError(first_few(problems))
    held_out = len(splits.validation) if splits.validation is not None else 0
    if tokenizer is None:
        return Report(len(splits.train), held_out, len(captions))
    truncated = sum(length > tokenizer.model_max_length for length in _token_counts(tokenizer, captions))
    return Report(len(splits.train), held_out, len(captions), truncated, tokenizer.model_max_length)


def _check_source(source: Source, requires_captions: bool, images: bool) -> tuple[list[str], list[str]]:
    unreadable, wordless, captions = [], [], []
    for example, problem in in_threads(partial(_look, source, images), len(source)):
        if problem:
            unreadable.append(problem)
        if requires_captions and example.caption_problem:
            wordless.append(example)
        captions += example.captions
    return _about_captions(wordless, len(source)) + unreadable, captions


def _look(source: Source, images: bool, index: int) -> tuple[Example, str]:
    example = source[index]
    try:
        if images:
            example.image()
    except DataError as error:
        return example, str(error)
    return example, ""


def _about_captions(wordless: list[Example], rows: int) -> list[str]:
    """One line a row, but one line in all where a wrong column makes every row the same."""
    reasons = Counter(example.caption_problem for example in wordless)
    if len(reasons) == 1 and len(wordless) == rows > 1:
        return [f"{wordless[0].where} and every other row: {wordless[0].caption_problem}"]
    return [f"{example.where}: {example.caption_problem}" for example in wordless]


def _token_counts(tokenizer: Any, captions: list[str]) -> Iterator[int]:
    """Tokens of each caption with both end marks, before anything is cut."""
    for start in range(0, len(captions), CHUNK):
        tokens = tokenizer(captions[start : start + CHUNK], truncation=False, verbose=False)
        yield from map(len, tokens["input_ids"])
