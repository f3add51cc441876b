"""What an encoded table holds: features of images and of their captions, in two files.

`images.arrow` has a row per view of an image (the image; its mirror, if mirrors are encoded): id, row of the source,
where its captions start and how many they are, a digest of its file, and what the image encoders gave. `captions.arrow`
has a row per caption, its states only up to the end of its mask. Floats are stored in the table's dtype.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kandinsky_exp.data.encoded.columns import SHAPE, Array, MappedColumns, head_checksum
from kandinsky_exp.data.encoded.layout import CAPTIONS, IMAGES, MASK, META
from kandinsky_exp.data.tally import Tally

NO_FEATURES = ("id", "source_row", "caption_start", "caption_count", "picture")
FORMAT = 2  # a new one must not find old tables


class FeatureTable:
    """Encoded images and captions; row i is the i-th image of the source that could be read.

    Tensors come in the dtype of the table (float16 or float32): the stage casts them on its device.
    """

    def __init__(self, folder: Path) -> None:
        """Open a table.

        Raises:
            OSError, ValueError, KeyError, TypeError, AttributeError: the folder holds no complete table.
        """
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / META).read_text("utf-8"))
        for name, size in self.meta["bytes"].items():
            if (found := (folder / name).stat().st_size) != size:
                raise ValueError(f"{name} has {found:,} bytes instead of {size:,}")
            if head_checksum(folder / name) != self.meta["heads"][name]:
                raise ValueError(f"the head of {name} is not as it was written")
        self.views: int = self.meta["views"]
        self._images = MappedColumns(folder / IMAGES)
        self._captions = MappedColumns(folder / CAPTIONS) if self.meta["captions"] else None
        if len(self._images) != self.meta["images"] * self.views:
            raise ValueError(f"{IMAGES} holds {len(self._images)} rows instead of {self.meta['images'] * self.views}")

    def __reduce__(self) -> tuple[type["FeatureTable"], tuple[Path]]:
        return FeatureTable, (self.folder,)  # workers map the files again

    def __len__(self) -> int:
        return len(self._images) // self.views

    @property
    def skipped(self) -> list[str]:
        """What was wrong with the examples that were left out."""
        return [str(problem) for problem in self.meta["skipped"]]

    @property
    def noted(self) -> Tally:
        """What else was not used; tables of before did not count it."""
        return dict(self.meta.get("noted", {}))

    def id(self, index: int) -> str:
        return str(self._image(index)["id"])

    def source_row(self, index: int) -> int:
        """The row of the source that was encoded; it differs from `index` where examples were left out."""
        return int(self._image(index)["source_row"])

    def shapes(self) -> Array:
        """Shape of what differs in shape of each image, (n, 3): of the latents."""
        return self._images.column(f"{self._images.ragged[0]}{SHAPE}")[:: self.views]

    def pictures(self) -> Array | None:
        """(n, 2), equal where two images are the same file; None in a table from before that was stored."""
        return self._images.column("picture")[:: self.views] if self._images.has("picture") else None

    def row(self, index: int, choose: Callable[[int], int] = lambda count: 0, view: int = 0) -> dict[str, Tensor]:
        """Features of an image and of one of its captions, without a batch axis.

        What the stage's encoders gave: of a caption's states only those of its n tokens, and `text_mask` (n,), true.

        Args:
            choose: draws one of so many captions.
            view: 1 for the mirrored image, where it was encoded.

        Raises:
            IndexError: there is no such row, caption or view.
            DataError: what is stored does not agree with its checksum.
        """
        cells = self._image(index, view)
        start, count = int(cells["caption_start"]), int(cells["caption_count"])
        features = {name: _tensor(cell) for name, cell in cells.items() if name not in NO_FEATURES}
        if self._captions is None:
            return features
        if not 0 <= (caption := choose(count)) < count:
            raise IndexError(f"caption {caption} of {count} of {cells['id']}")
        text = self._captions.row(start + caption)
        features |= {name: _tensor(cell) for name, cell in text.items()}
        if ragged := self._captions.ragged:
            features[MASK] = torch.ones(len(text[ragged[0]]), dtype=torch.bool)
        return features

    def tokens(self, index: int, choose: Callable[[int], int]) -> int:
        """How many the caption of a row has, of a table whose captions have a length."""
        assert self._captions is not None  # nosec B101 # narrows the type
        first, count = (int(self._images.cell(name, index * self.views)) for name in NO_FEATURES[2:4])
        return int(self._captions.cell(f"{self._captions.ragged[0]}{SHAPE}", first + choose(count))[0])

    def _image(self, index: int, view: int = 0) -> dict[str, Any]:
        if not (0 <= index < len(self) and 0 <= view < self.views):
            raise IndexError(f"row {index} of {len(self)}, view {view} of {self.views}")
        return self._images.row(index * self.views + view)


def _tensor(view: Array) -> Tensor:
    """A copy: the map is read-only, and pages it in here and now."""
    return torch.from_numpy(np.array(view))
