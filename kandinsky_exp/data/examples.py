"""One image with its captions, and sequences of them."""

import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.pool import ThreadPool
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from kandinsky_exp.data.preprocess import to_rgb
from kandinsky_exp.errors import DataError


@dataclass(frozen=True)
class Example:
    """One image with its captions.

    Args:
        id: file or row, what an error names.
        captions: none, one or several.
        read: gives the bytes of the image file.
        where: the line that speaks of it.
        caption_problem: why `captions` is empty.
    """

    id: str
    captions: tuple[str, ...]
    read: Callable[[], bytes]
    where: str
    caption_problem: str = ""

    def image(self) -> Image.Image:
        """The picture, RGB, upright, transparency over white.

        Raises:
            DataError: naming the file or row, if it is missing or no picture.
        """
        try:
            return to_rgb(Image.open(io.BytesIO(self.read())))
        except UnidentifiedImageError:
            reason = "not an image that Pillow can read"
        except OSError as error:
            reason = error.strerror or str(error)
        except Exception as error:  # Pillow's format plug-ins raise whatever a damaged file makes them raise
            reason = str(error) or type(error).__name__
        raise DataError(f"{self.where}: image {self.id}: {reason}; mend it or take the row out")


class Source(Protocol):
    """A sequence of examples, picklable for the workers of a DataLoader. `fingerprint` changes with its content."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


@dataclass
class Splits:
    """A data set: what trains and, if there is one, what is held out."""

    train: Source
    validation: Source | None


@dataclass(frozen=True)
class Hashed(ABC):
    """A source whose fingerprint covers ids, captions and image bytes in order, whatever folder they lie in."""

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example: ...

    @cached_property
    def fingerprint(self) -> str:
        total = hashlib.sha256()
        for digest in in_threads(self._digest, len(self)):
            total.update(digest)
        return total.hexdigest()

    def _digest(self, index: int) -> bytes:
        example = self[index]
        try:
            content = hashlib.sha256(example.read()).hexdigest()
        except (OSError, ValueError) as error:
            raise DataError(f"{example.where}: image {example.id} cannot be read: {error}") from None
        return hashlib.sha256(json.dumps([example.id, example.captions, content]).encode()).digest()


@dataclass(frozen=True)
class Rows(Hashed):
    """Examples in a list."""

    examples: Sequence[Example]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


@dataclass(frozen=True)
class Subset(Hashed):
    """Some rows of another source, in the order of `indices`."""

    parent: Source
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.parent[int(self.indices[index])]


def in_threads(function: Callable[[int], Any], rows: int) -> Iterator[Any]:
    """`function(0), function(1), …` in order, several at a time: reading and decoding release the interpreter lock."""
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.imap(function, range(rows), chunksize=16)
