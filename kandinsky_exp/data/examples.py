"""One example, an image with its captions, and the base classes of the sources that give many."""

import hashlib
import io
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kandinsky_exp.data.file_hashes import FileDigests
from kandinsky_exp.data.pictures import is_see_through, open_rgb
from kandinsky_exp.data.sampler import order
from kandinsky_exp.data.tally import Tally
from kandinsky_exp.errors import DataError, cause_of
from kandinsky_exp.system.files import on_disk
from kandinsky_exp.system.threads import usable_cores

MAX_BYTES = 256 << 20  # of one image's file


@dataclass(frozen=True)
class Example:
    """One image with its captions, picklable: it travels to worker processes.

    Args:
        id: file or row, what an error names.
        captions: none, one or several.
        read: gives the bytes of the image file.
        where: the line that speaks of it.
        caption_problem: why `captions` is empty.
        problem: why there is no image; `read` has nothing to read then.
        extra: cells of further columns, by name, where a stage reads some.
        beside: likewise, the bytes of pictures that belong to the image.
    """

    id: str
    captions: tuple[str, ...]
    read: Callable[[], bytes]
    where: str
    caption_problem: str = ""
    problem: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)

    def image(self) -> Image.Image:
        """The picture, RGB, upright, transparency over white.

        Raises:
            DataError: naming the file or row, if it is missing, no picture, too small or too large.
        """
        if self.problem:
            raise DataError(f"{self.where}: {self.problem}")
        return self._picture("image", self.read)

    def companions(self) -> dict[str, Image.Image]:
        """The pictures that belong to it, by name, likewise.

        Raises:
            DataError: as above.
        """
        return {name: self._picture(f"{name} of", read, is_opaque=True) for name, read in self.beside.items()}

    def _picture(self, what: str, read: Callable[[], bytes], is_opaque: bool = False) -> Image.Image:
        try:
            content = read()
            picture = open_rgb(io.BytesIO(content))
            if is_opaque and is_see_through(io.BytesIO(content)):
                raise ValueError("it has transparent pixels, which have no colour; save it without them")
            return picture
        except Exception as error:  # Pillow's format plug-ins raise whatever a damaged file makes them raise
            reason = cause_of(error)
        raise DataError(f"{self.where}: {what} {self.id}: {reason}; mend it or take the row out")


def read_file(path: str, limit: int = MAX_BYTES) -> bytes:
    """Content of a file; one of more than `limit` bytes, or a device or pipe that might never end, is refused."""
    file = Path(on_disk(path))
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(0, "not a regular file")
    with file.open("rb") as content:
        read = content.read(limit + 1)
    if len(read) > limit:
        raise OSError(0, f"larger than the limit of {limit >> 10:,} KB")
    return read


def nothing() -> bytes:
    """`Example.read` of an example with a problem."""
    raise FileNotFoundError(2, "the row has no image")


def no_columns(where: str, names: Sequence[str]) -> DataError:
    return DataError(f"{where}: it has no column {', '.join(map(repr, names))}, which this model reads; add it")


class Source(ABC):
    """Examples that can be walked in a fixed order, picklable for the workers of a DataLoader."""

    name: str

    @property
    def provenance(self) -> tuple[str, str]:
        """What a record calls it, and where it comes from: a path, a URL, or a hub id."""
        if Path(self.name).exists():
            return Path(self.name).name, self.name
        return self.name, self.name.rpartition("/")[0]  # <hub id>/<split>

    @property
    @abstractmethod
    def count(self) -> int | None:
        """How many examples there are; None where only reading them all would tell."""

    @abstractmethod
    def examples(self, start: int = 0) -> Iterator[Example]:
        """The examples in order, from row `start` on."""

    @abstractmethod
    def __getitem__(self, row: int) -> Example: ...

    @abstractmethod
    def fingerprint(self, digests: FileDigests) -> str:
        """64 hex digits that follow ids, captions and image bytes in order, not the folder they lie in."""

    def limited(self, count: int, seed: int) -> "Source":
        """At most so many of the examples, where it can be cut."""
        return self

    def with_columns(self, names: Sequence[str]) -> "Source":
        """The same with further columns of its metadata, as `Example.extra`.

        Raises:
            DataError: there are none of these names.
        """
        raise no_columns(self.name, names)

    def with_companions(self, columns: Mapping[str, str], folders: Mapping[str, Path]) -> "Source":
        """The same with pictures that belong to its own, as `Example.beside`.

        Args:
            columns: of its metadata, by the names of the pictures.
            folders: that hold a picture of the same name for each of its own, likewise.

        Raises:
            DataError: there are none, or this kind of source has no such pictures.
        """
        raise DataError(f"{self.name}: pictures that belong to its own cannot be read of it; take data=folder or list")

    def left_out(self) -> Tally:
        """What lies where the examples do and is none."""
        return {}

    def passed_over(self) -> Tally:
        """Of a stream: what the last walk saw and is no part of an example."""
        return {}


class Indexed(Source):
    """Examples by row number."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def count(self) -> int:
        return len(self)

    def examples(self, start: int = 0) -> Iterator[Example]:
        return (self[row] for row in range(start, len(self)))

    def limited(self, count: int, seed: int) -> Source:
        """Drawn by seed; a smaller number draws a subset of a larger one's."""
        if count >= len(self):
            return self
        return Subset(self.name, self, np.sort(order(seed, 0, len(self))[:count]))

    def caption_counts(self) -> NDArray[np.int64]:
        """How many captions each row has, (n,)."""
        return np.fromiter((len(example.captions) for example in self.examples()), np.int64, len(self))

    def suspects(self, captions: bool) -> NDArray[np.int64]:
        """Rows, in order, whose example speaks of a problem, with its captions only if asked for. Reads no image."""
        marked = (bool(example.problem or (captions and example.caption_problem)) for example in self.examples())
        return np.flatnonzero(np.fromiter(marked, np.bool_, len(self)))


@dataclass(frozen=True, eq=False)
class Subset(Indexed):
    """Some rows of another source, in the order of `indices` (n,)."""

    name: str
    parent: Indexed
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> Example:
        return self.parent[int(self.indices[row])]

    def caption_counts(self) -> NDArray[np.int64]:
        return self.parent.caption_counts()[self.indices]

    def suspects(self, captions: bool) -> NDArray[np.int64]:
        return np.flatnonzero(np.isin(self.indices, self.parent.suspects(captions)))

    def left_out(self) -> Tally:
        return self.parent.left_out()

    def fingerprint(self, digests: FileDigests) -> str:
        total = hashlib.sha256(f"subset {self.parent.fingerprint(digests)}".encode())
        total.update(self.indices.astype(np.int64).tobytes())
        return total.hexdigest()


def in_threads(function: Callable[[int], Any], rows: int) -> Iterator[Any]:
    """`function(0), function(1), …` in order, several at a time: reading and decoding release the interpreter lock."""
    with ThreadPool(min(8, usable_cores())) as pool:
        yield from pool.imap(function, range(rows), chunksize=16)
