"""WebDataset shards: tar files whose members of one base name, `000.jpg` and `000.txt`, make one example.

They are read in order, member by member. No list of what they hold is ever in memory.
"""

import hashlib
import json
import lzma
import posixpath
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Self

from kandinsky_exp.data import tally
from kandinsky_exp.data.examples import MAX_BYTES, Example, Source, nothing
from kandinsky_exp.data.file_hashes import FileDigests, update
from kandinsky_exp.data.formats import download
from kandinsky_exp.data.formats.file_rows import Captions, parse_captions
from kandinsky_exp.data.formats.tar_members import BESIDE, MANY, Group, Grouping, Member
from kandinsky_exp.data.tally import Tally
from kandinsky_exp.errors import DataError, cause_of
from kandinsky_exp.system.text_files import decode

MAX_TEXT = 4 << 20  # bytes of a member with a caption, or with the JSON around it
APART = "or pack them side by side (tar --sort=name)"  # the way out where the rest lies further on in the file
BOMB = 100  # bytes unpacked for each one read; pictures hardly shrink at all
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
MAX_HEADER = 1 << 20
EXTENDED = (*tarfile.GNU_TYPES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, zlib.error, lzma.LZMAError)


class _Member(tarfile.TarInfo):
    """A tar header. `tarfile` takes a damaged or missing one for the end of the archive, and drops what follows."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if not header.isreg() and header.type in EXTENDED and header.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")  # it would be read at once, as a whole
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the block of zeros that ends an archive
                raise
            raise tarfile.ReadError(f"damaged or cut off ({error})") from None


@dataclass(frozen=True)
class Shards(Source):
    """Examples of tar files, local or by URL.

    Args:
        name: what the data set is called.
        shards: paths and URLs, in order.
        image_keys: extensions of images, the preferred one first.
        caption_key: extension of the caption's text, or `json.<key>` for a key of the object in a `.json`.
        limit: take the first so many examples.
        any_picture: whether pictures of other endings than these are examples, too.
        beside: files of the shards' folder that are no shards.
        unused: the members that are in no example, as far as the last walk came.
    """

    name: str
    shards: tuple[str, ...]
    image_keys: tuple[str, ...]
    caption_key: str
    limit: int | None = None
    any_picture: bool = False
    beside: Tally = field(default_factory=dict)
    unused: Tally = field(default_factory=dict, compare=False)

    @cached_property
    def count(self) -> int | None:
        """By the headers alone; None for compressed shards and those by URL."""
        if any(download.is_url(shard) or _is_compressed(shard) for shard in self.shards):
            return None
        return sum(1 for _ in islice(self._groups(sys.maxsize), self.limit))

    def examples(self, start: int = 0) -> Iterator[Example]:
        """The examples from row `start` on, each with its bytes.

        Raises:
            DataError: for a shard that is missing, damaged, cut off or without images.
        """
        self.unused.clear()
        for shard, group in islice(self._groups(start, self.unused), start, self.limit):
            yield self._example(shard, group)

    def __getitem__(self, row: int) -> Example:
        for example in self.examples(row):
            return example
        raise IndexError(f"row {row} of {self.name}")

    @property
    def provenance(self) -> tuple[str, str]:
        first = download.shown(self.shards[0])
        where = first if download.is_url(first) else str(Path(first).absolute())
        return f"{Path(first).name}{self.name.removeprefix(first)}", where

    def limited(self, count: int, seed: int) -> Source:
        """The first ones."""
        return replace(self, limit=count)

    def left_out(self) -> Tally:
        return self.beside

    def passed_over(self) -> Tally:
        return self.unused

    def fingerprint(self, digests: FileDigests) -> str:
        """Local shards count by content, the others by what their server says of them."""
        total = hashlib.sha256(repr(["shards", self.image_keys, self.caption_key, self.limit]).encode())
        total.update(repr([_file_name(shard) for shard in self.shards]).encode())
        local = [str(Path(shard).absolute()) for shard in self.shards if not download.is_url(shard)]
        update(total, digests.required(f"shards {local}", local))
        with ThreadPool(8) as pool:
            for identity in pool.imap(download.identity, filter(download.is_url, self.shards)):
                total.update(identity.encode())
        return total.hexdigest()

    def _groups(self, start: int, unused: Tally | None = None) -> Iterator[tuple[str, Group]]:
        """(shard, group) of every example; those before row `start` come without their contents."""
        row = 0
        for shard in self.shards:
            before = row
            with _reading(shard) as (archive, end):
                for group in self._walk(archive, end, start - row, {} if unused is None else unused):
                    row += 1
                    yield shard, group
            if row == before:
                raise DataError(f"{download.shown(shard)} holds no images ({', '.join(self.image_keys)})")

    def _walk(self, archive: tarfile.TarFile, end: int | None, start: int, unused: Tally) -> Iterator[Group]:
        grouping, number = Grouping(self.image_keys, self._text_key, self.any_picture, unused), 0
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # kept for random access, a header for each image
            _refuse_bomb(member, end)
            limit = MAX_TEXT if member.name.lower().endswith(f".{self._text_key}") else MAX_BYTES
            is_needed = number + MANY >= start  # it is known later which row it belongs to
            for group in grouping.take(Member(archive, member, _problem(member, limit), is_needed)):
                yield group
                number += 1
        yield from grouping.finish()

    def _example(self, shard: str, group: Group) -> Example:
        where = f"{download.shown(shard)}, {group.base}"
        captions, wordless = self._captions(group)
        found = {**group.refused, **group.members}
        others = sorted(found.keys() - {self._text_key}) if self.any_picture else []
        key = next((key for key in (*self.image_keys, *others) if key in found), None)
        if key not in group.members:
            problem = group.refused[key] if key is not None else self._no_image(group)
            return Example(f"{_file_name(shard)}/{group.base}", captions, nothing, where, wordless, problem)
        for other in found.keys() - {key, self._text_key}:
            tally.count(self.unused, BESIDE, f"{group.base}.{other}")
        name = f"{_file_name(shard)}/{group.base}.{key}"
        return Example(name, captions, partial(bytes, group.members[key]), where, wordless)

    @property
    def _text_key(self) -> str:
        return "json" if self.caption_key.startswith("json.") else self.caption_key

    def _no_image(self, group: Group) -> str:
        there = f"; there are {', '.join(group.beside)}" if group.beside else ""
        way_out = "set data.image_column" + ("" if there else f", {APART}")
        return f"no image ({', '.join(self.image_keys)}) has this name{there}; {way_out}"

    def _captions(self, group: Group) -> Captions:
        key, is_json = self._text_key, self.caption_key.startswith("json.")
        if key not in group.members:
            return (), group.refused.get(key, f"no .{key} has this name; set data.caption_column, {APART}")
        try:
            text = decode(group.members[key]).strip()
            row = json.loads(text) if is_json else {key: text}
            json.dumps(row, ensure_ascii=False).encode()  # half of a pair of escapes is no character
        except (ValueError, RecursionError) as error:
            return (), f"its .{key} cannot be read: {error}"
        if not isinstance(row, dict):
            return (), f"its .{key} is not a JSON object"
        return parse_captions(row, self.caption_key.removeprefix("json.") if is_json else key)


def _refuse_bomb(member: tarfile.TarInfo, end: int | None) -> None:
    """Whatever is not wanted of a compressed archive is unpacked all the same.

    Args:
        end: bytes of the archive as it is stored; None where that is not known.
    """
    if end is not None and member.offset_data + member.size > MAX_BYTES + BOMB * end:
        raise tarfile.ReadError(f"{end:,} bytes that unpack to more than {BOMB} times as many; no pictures do")


@contextmanager
def _reading(shard: str) -> Iterator[tuple[tarfile.TarFile, int | None]]:
    """The archive and its size; a stream if it comes by URL, while a local one is read with jumps over the unwanted."""
    try:
        if download.is_url(shard):
            with (
                download.open_url(shard) as stream,
                tarfile.open(mode="r|*", fileobj=stream, tarinfo=_Member) as archive,
            ):
                yield archive, getattr(stream.raw, "end", None)
        else:
            # of a file that is none of the kinds "r:*" tries, it does not say why
            with tarfile.open(shard, "r:*" if _is_compressed(shard) else "r:", tarinfo=_Member) as archive:
                yield archive, Path(shard).stat().st_size
    except DAMAGE as error:
        reason = cause_of(error).rstrip(":")
        raise DataError(
            f"{download.shown(shard)}: no tar file that can be read to its end: {reason}; copy it again"
        ) from None


def _is_compressed(shard: str) -> bool:
    try:
        with Path(shard).open("rb") as file:
            return file.read(8).startswith(COMPRESSED)
    except OSError:
        return False  # what is wrong with it is said when it is read


def _problem(member: tarfile.TarInfo, limit: int) -> str:
    if not member.isreg():
        return f"{member.name} is a link or no file; store the content"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"{member.name} leads out of the archive"
    if member.size > limit:
        return f"{member.name} has {member.size >> 20:,} MB; the limit is {limit >> 20} MB"
    return ""


def _file_name(shard: str) -> str:
    return posixpath.basename(download.shown(shard))
