"""Captions and prompts that are longer than the text encoder's 77 tokens, and up to where they are read."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kandinsky_exp.data.examples import Indexed
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.errors import cut


def ending(beginning: str) -> str:
    """The last words of what is read of a text."""
    return f"…{beginning[-40:].strip()}" if len(beginning) > 40 else beginning


def cut_caption(name: str, beginning: str) -> str:
    """Which caption was cut, and where."""
    return f"{name}: read up to '{ending(beginning)}'"


def cut_captions(source: Indexed, rows: NDArray[np.int64], preprocess: Preprocess) -> list[str]:
    """All that are, of some rows."""
    if preprocess.tokenizer is None:
        return []
    examples = (source[int(row)] for row in rows)
    return [
        cut_caption(example.id, beginning)
        for example in examples
        for _, beginning in preprocess.tokenize(example.captions)
        if beginning is not None
    ]


def prompt_notes(tokenizer: Any, prompts: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each prompt that is too long, once.

    Args:
        prompts: (setting, text).
    """
    asked = list(dict.fromkeys(prompts))
    read = Preprocess(None, tokenizer, None).tokenize([text for _, text in asked]) if asked else []
    return [
        f"{key}: '{cut(text)}' is longer than {tokenizer.model_max_length} tokens: it is read up to "
        f"'{ending(beginning)}', and what follows counts for nothing; shorten it"
        for (key, text), (_, beginning) in zip(asked, read, strict=True)
        if beginning is not None
    ]


def captions_note(tokenizer: Any, captions: Sequence[str]) -> list[str]:
    """A line on how many captions are too long, where some are."""
    read = Preprocess(None, tokenizer, None).tokenize(captions)
    count, length = sum(beginning is not None for _, beginning in read), tokenizer.model_max_length
    told = f"{count:,} of {len(captions):,} captions are longer than {length} tokens: what follows counts for nothing"
    return [told] if count else []
