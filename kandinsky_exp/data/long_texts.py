"""Texts that are longer than the text encoder's 77 tokens: which they are, and up to where they are read."""

import numpy as np
from numpy.typing import NDArray

from kandinsky_exp.data.examples import Indexed
from kandinsky_exp.data.preprocess import Preprocess


def ending(kept: str) -> str:
    """The last words of what is read of a text."""
    return f"…{kept[-40:].strip()}" if len(kept) > 40 else kept


def cut_caption(name: str, kept: str) -> str:
    """Which caption was cut, and where."""
    return f"{name}: read up to '{ending(kept)}'"


def cut_captions(source: Indexed, rows: NDArray[np.int64] | None, preprocess: Preprocess) -> list[str]:
    """All that are, of some rows; None = of every row."""
    if preprocess.tokenizer is None:
        return []
    examples = source.examples() if rows is None else (source[int(row)] for row in rows)
    return [
        cut_caption(example.id, kept)
        for example in examples
        for _, kept in preprocess.tokenize(example.captions)
        if kept is not None
    ]
