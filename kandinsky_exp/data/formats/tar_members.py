"""Which members of a tar make one example: those of one name up to the first dot, as WebDataset reads it.

Where dots are part of the name, as in `shot v1.0.png`, no member has an ending behind the first dot that is asked for.
Then the name goes up to the last dot.
"""

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO

from kandinsky_exp.data import tally
from kandinsky_exp.data.formats.folders import HEAD, OTHERS, SYSTEM, begins_as_picture, is_systems
from kandinsky_exp.data.tally import Tally
from kandinsky_exp.system.picture_names import PICTURES

MANY = 16  # pictures with names that share their beginning up to the first dot: no example has so many
BESIDE = "not used, members beside the picture of an example"
LONELY = "not used, texts without a picture of their name"
OTHER = "not used, members of other endings"


@dataclass
class Group:
    """The members of one example by ending, and why some were not taken."""

    base: str
    members: dict[str, bytes] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)  # endings with dots that might be meant

    def __contains__(self, key: str) -> bool:
        return key in self.members or key in self.refused

    def __bool__(self) -> bool:
        return bool(self.members or self.refused or self.beside)


@dataclass
class Member:
    """One file of an archive, whose bytes are read in order, as a stream gives them.

    Args:
        refused: why it cannot be taken.
    """

    archive: tarfile.TarFile
    header: tarfile.TarInfo
    refused: str
    is_needed: bool
    begun: bytes = b""

    @cached_property
    def file(self) -> IO[bytes]:
        file = self.archive.extractfile(self.header)
        assert file is not None  # a regular file  # nosec B101
        return file

    def head(self) -> bytes:
        """How it begins."""
        self.begun = self.file.read(HEAD)
        return self.begun

    def content(self) -> bytes:
        """All of it, or nothing where that is not needed."""
        return self.begun + self.file.read() if self.is_needed else b""


class Grouping:
    """Takes the members of an archive one by one, and gives the groups that are complete by then.

    Args:
        image_keys: endings of pictures that are asked for.
        text_key: ending of captions.
        any_picture: whether pictures of other endings are examples, too.
        unused: gets the members that are in no example.
    """

    def __init__(self, image_keys: tuple[str, ...], text_key: str, any_picture: bool, unused: Tally) -> None:
        self.image_keys, self.text_key, self.any_picture, self.unused = image_keys, text_key, any_picture, unused
        self.plain = Group("")
        self.dotted: dict[str, Group] = {}
        self.base = self.other = ""  # up to the first dot: of what waits; of the last member that is not asked for
        self.dots_are_names = False

    def take(self, member: Member) -> Iterator[Group]:
        folder, file = posixpath.split(member.header.name.encode(errors="surrogateescape").decode(errors="replace"))
        base, _, key = file.partition(".")
        if not base or is_systems(file) or any(part.lower() in SYSTEM for part in folder.split("/")):
            return
        base, key = posixpath.join(folder, base), key.lower()
        ending = key.rpartition(".")[2]
        if self._is_wanted(key) or (key == ending and self._claims(member, key)):
            yield from self._begin(base)
            if key in self.plain:  # the next example of that name
                yield from self.finish()
            self._put(self.plain, member, key)
        elif key != ending and self._is_wanted(ending):
            yield from self._begin(base)
            yield from self._take_dotted(member, key, ending)
        elif not member.refused:  # a folder, for one
            self.other = base if key and key == ending else self.other
            tally.count(self.unused, OTHER, member.header.name)

    def finish(self) -> Iterator[Group]:
        """What still waits."""
        has_picture, own = self._has_picture(self.plain), []
        is_example = bool(self.plain) or self.other == self.base
        for group in self.dotted.values():
            names = [f"{group.base}.{ending}" for ending in (*group.members, *group.refused)]
            if not self._has_picture(group):
                self._pass_over(LONELY, names)
            elif self.dots_are_names or not (has_picture or is_example) or (self.text_key in group and not has_picture):
                own.append(group)
            elif has_picture:
                self._pass_over(BESIDE, names)
            else:
                self.plain.beside += [name.removeprefix(f"{self.base}.") for name in names]
        yield from [self.plain, *own] if self.plain else own
        self.plain, self.dotted = Group(self.base), {}

    def _is_wanted(self, key: str) -> bool:
        return key in self.image_keys or key == self.text_key or (self.any_picture and f".{key}" in PICTURES)

    def _claims(self, member: Member, key: str) -> bool:
        """Whether a picture has an ending that no picture has."""
        if not self.any_picture or not key or f".{key}" in OTHERS or member.refused:
            return False
        return begins_as_picture(member.head())

    def _begin(self, base: str) -> Iterator[Group]:
        if base != self.base:
            yield from self.finish()
            self.plain, self.base, self.dots_are_names = Group(base), base, False

    def _take_dotted(self, member: Member, key: str, ending: str) -> Iterator[Group]:
        if self._has_picture(self.plain) and not self.dots_are_names:
            self._pass_over(BESIDE, [member.header.name])
            return
        name = f"{self.base}.{key.removesuffix(f'.{ending}')}"
        if ending in self.dotted.get(name, Group("")):
            yield from self.finish()
        if name not in self.dotted and (self.dots_are_names or len(self.dotted) == MANY):
            self.dots_are_names = True
            yield from self.finish()
        self._put(self.dotted.setdefault(name, Group(name)), member, ending)

    def _put(self, group: Group, member: Member, key: str) -> None:
        if member.refused:
            group.refused[key] = member.refused
        else:
            group.members[key] = member.content()

    def _has_picture(self, group: Group) -> bool:
        return any(key != self.text_key for key in (*group.members, *group.refused))

    def _pass_over(self, reason: str, names: list[str]) -> None:
        for name in names:
            tally.count(self.unused, reason, name)
