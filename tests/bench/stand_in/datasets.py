"""As much of the library `datasets` as the published scripts use of it, to read a folder of pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import Image


def _set_verbosity() -> None:
    pass


utils = SimpleNamespace(
    logging=SimpleNamespace(set_verbosity_warning=_set_verbosity, set_verbosity_error=_set_verbosity)
)


class Dataset:
    """Pictures and their captions, in the order of `metadata.jsonl`."""

    column_names = ("image", "text")

    def __init__(self, folder: Path, transform: Callable[[dict[str, list[Any]]], dict[str, Any]] | None = None) -> None:
        self.folder, self.transform = folder, transform
        self.rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]

    def with_transform(self, transform: Callable[[dict[str, list[Any]]], dict[str, Any]]) -> "Dataset":
        return Dataset(self.folder, transform)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert self.transform is not None
        row = self.rows[index]
        made = self.transform({"image": [Image.open(self.folder / row["file_name"])], "text": [row["text"]]})
        return {name: values[0] for name, values in made.items()}


def load_dataset(kind: str, data_files: dict[str, str], cache_dir: Any = None) -> dict[str, Dataset]:
    assert kind == "imagefolder"
    return {split: Dataset(Path(pattern).parent) for split, pattern in data_files.items()}
