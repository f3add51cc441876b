"""The splits of a data set: what trains, class images that train beside it, what is held out."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from kandinsky_exp.data.dreambooth import ClassImages
from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.file_hashes import FileDigests


@dataclass
class Splits:
    """A data set: what trains and, if there is one, what is held out.

    Args:
        class_images: pictures that train beside the others, so that what they show stays as it was.
        dividable: whether a part of `train` may be held out where there is no validation split.
        sets: further ones that are held out, by name.
    """

    train: Source
    validation: Source | None
    class_images: ClassImages | None = None
    dividable: bool = True
    sets: dict[str, Source] = field(default_factory=dict)

    @property
    def both(self) -> Sequence[Source]:
        return [self.train] + ([self.validation] if self.validation is not None else [])

    @property
    def is_divided(self) -> bool:
        """Whether `validation.fraction` decides which images train."""
        return self.validation is None and self.dividable

    def known_held_out(self, fraction: float) -> int | None:
        """How many rows are held out, as far as that is known before they are read.

        Args:
            fraction: of a set that is divided.
        """
        if self.validation is not None:
            return self.validation.count
        return None if self.dividable and fraction else 0

    def fingerprint(self, digests: FileDigests) -> str | None:
        """Follows the content of all that trains; None while class images are missing."""
        train = self.train.fingerprint(digests)
        if self.class_images is None:
            return train
        return None if self.class_images.missing() else together(train, self.class_images.source().fingerprint(digests))


def told_of(name: str, message: str) -> str:
    """What is wrong with a further set: in place of the settings of `data` it has those of its entry."""
    own = re.sub(
        r"\bdata\.(?=path|name|split|image_column|caption_column|hole|hint)", f"validation.sets.{name}.", message
    )
    return own if own.startswith(f"validation.sets.{name}") else f"validation.sets.{name}: {own}"


def together(train: str, beside: str) -> str:
    """The fingerprint of a set that trains beside another."""
    return hashlib.sha256(f"{train} beside {beside}".encode()).hexdigest()
