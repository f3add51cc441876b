"""Prompts of which the text encoder reads only the beginning."""

from collections.abc import Iterable
from typing import Any

from kandinsky_exp.data.long_texts import ending
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.errors import cut


def notes(tokenizer: Any, prompts: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each prompt that is too long, once.

    Args:
        prompts: (setting, text).
    """
    asked = list(dict.fromkeys(prompts))
    read = Preprocess(None, tokenizer, None).tokenize([text for _, text in asked]) if asked else []
    return [
        f"{key}: '{cut(text)}' is longer than {tokenizer.model_max_length} tokens: it is read up to "
        f"'{ending(kept)}', and what follows counts for nothing; shorten it"
        for (key, text), (_, kept) in zip(asked, read, strict=True)
        if kept is not None
    ]
