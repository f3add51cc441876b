"""The validation images of several runs, small enough for one file: prompt × run × step."""

import base64
import hashlib
import io
import json
import math
import re
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from kandinsky_exp.reports.run_data import Run
from kandinsky_exp.tracking import artifact_folders
from kandinsky_exp.tracking.mlflow_names import IMAGE, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_IMAGES = 2400
MAX_BYTES = 13_000_000  # of all images together; in a page they take a third more
SIDES = ((400, 256), (900, 192), (MAX_IMAGES, 128))  # (up to so many images, longest side in pixels)
FETCHERS = 8  # images at a time: a server takes its time for each
SMALL_FILE = 60_000  # bytes: a PNG that is fetched as it is, where MLflow's own reduced copy would not be smaller
MAX_PIXELS = 64_000_000
WANTED = re.compile(r"(validation|reconstruction)/\d+")

Prompts = list[tuple[int, dict[str, str]]]  # (from this step on, by key)


@dataclass(frozen=True, order=True)
class Row:
    """What is drawn: a key of the image grid, with the prompt that it had."""

    key: str
    prompt: str


@dataclass(frozen=True)
class Stored:
    """An image in the store."""

    run: int
    row: Row
    step: int
    path: str


@dataclass
class ImageGrid:
    """Images by row, run and step.

    Args:
        images: WebP files; equal ones are there once.
        cells: {(row, run): {step: index of the image}}.
        notes: what is not shown, and why.
    """

    rows: list[Row] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    cells: dict[tuple[int, int], dict[int, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def last(self, row: int, run: int) -> tuple[int, bytes] | None:
        """(step, image) of a cell's last step."""
        cell = self.cells.get((row, run))
        if not cell:
            return None
        step = max(cell)
        return step, self.images[cell[step]]


def collect(client: "MlflowClient", runs: Sequence[Run], max_bytes: int = MAX_BYTES) -> ImageGrid:
    """Fetch and reduce as many images as one file can hold; a store that has none or gives none is only noted."""
    grid = ImageGrid()
    with tempfile.TemporaryDirectory() as folder:
        stored: list[Stored] = []
        for index, run in enumerate(runs):
            try:
                stored += _listed(client, run.run_id, index, Path(folder))
                if (gone := artifact_folders.what_is_gone(client, run.run_id)) is not None:
                    grid.notes.append(f"The images of {run.label} are not on this machine: there is no {gone}.")
            except Exception as error:  # of whatever kind of artifact store it is
                grid.notes.append(f"The images of {run.label} could not be read ({reason(error)}).")
        if stored:
            _fill(client, runs, by_importance(stored), grid, Path(folder), max_bytes)
    return grid


def _listed(client: "MlflowClient", run_id: str, index: int, folder: Path) -> list[Stored]:
    """A run's images, of each key and step the newest: a reduced copy where the picture is large."""
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    listed = [
        (file, match) for file in client.list_artifacts(run_id, "images") if (match := IMAGE.fullmatch(file.path))
    ]
    for file, match in sorted(listed, key=lambda item: int(item[1]["time"])):
        if WANTED.fullmatch(key := match["key"].replace("~", "/")):
            newest.setdefault((key, int(match["step"])), {})[match["kind"]] = file
    prompts = read_prompts(client, run_id, folder) if newest else []
    return [Stored(index, Row(key, prompt_at(prompts, key, step)), step, _choice(kinds))
            for (key, step), kinds in newest.items()]  # fmt: skip


def _choice(kinds: dict[str, Any]) -> str:
    picture, copy = kinds.get(".png"), kinds.get("+compressed.webp")
    is_small = picture is not None and 0 < (picture.file_size or 0) <= SMALL_FILE
    return str(kinds[".png" if copy is None or is_small else "+compressed.webp"].path)


def read_prompts(client: "MlflowClient", run_id: str, folder: Path) -> Prompts:
    """A run's `prompts/step-*.json`, by step."""
    found: Prompts = []
    for file in client.list_artifacts(run_id, "prompts"):
        if match := re.fullmatch(r"prompts/step-(\d+)\.json", file.path):
            texts = json.loads(_fetched(client, run_id, file.path, folder).decode("utf-8"))
            found.append((int(match[1]), {str(key): str(text) for key, text in texts.items()}))
    return sorted(found, key=lambda item: item[0])


def prompt_at(prompts: Prompts, key: str, step: int) -> str:
    texts = [known[key] for since, known in prompts if since <= step and key in known]
    return texts[-1] if texts else ""


def _fetched(client: "MlflowClient", run_id: str, path: str, folder: Path) -> bytes:
    file = Path(client.download_artifacts(run_id, path, str(folder)))
    data = file.read_bytes()
    if file.is_relative_to(folder):
        file.unlink()
    return data


def _fill(
    client: "MlflowClient", runs: Sequence[Run], stored: list[Stored], grid: ImageGrid, folder: Path, max_bytes: int
) -> None:
    kept = stored[:MAX_IMAGES]
    side = next((side for count, side in SIDES if len(kept) <= count), SIDES[-1][1])
    grid.rows = sorted({image.row for image in kept}, key=lambda row: (row.key.split("/")[0] != "validation", row))
    numbers = {row: number for number, row in enumerate(grid.rows)}
    known: dict[bytes, int] = {}
    fetched = size = unread = 0

    def load(image: Stored) -> bytes | None:
        try:
            return reduced(_fetched(client, runs[image.run].run_id, image.path, folder), side)
        except Exception:  # damaged, or gone meanwhile
            return None

    with ThreadPoolExecutor(FETCHERS, "images") as pool:
        while fetched < len(kept) and size <= max_bytes:
            some = kept[fetched : fetched + 4 * FETCHERS]
            fetched += len(some)
            for image, data in zip(some, pool.map(load, some), strict=True):
                if data is None:
                    unread += 1
                    continue
                digest = hashlib.sha256(data).digest()
                if digest not in known:
                    known[digest] = len(grid.images)
                    grid.images.append(data)
                    size += len(data)
                grid.cells.setdefault((numbers[image.row], image.run), {})[image.step] = known[digest]
    grid.steps = sorted({step for cell in grid.cells.values() for step in cell})
    if unread:
        grid.notes.append(f"{unread} images could not be read.")
    if left_out := len(stored) - fetched:
        others = " and of the last prompts" if fetched < len({(image.row, image.run) for image in stored}) else ""
        grid.notes.append(f"{left_out} images of steps in between{others} are left out, so that this file stays small.")


def by_importance(images: Iterable[Stored]) -> list[Stored]:
    """The last image of every run and row first, then the others from step to step, ever closer together."""
    every = sorted(images, key=lambda image: (image.step, image.row, image.run))
    last = {(image.row, image.run): image.step for image in every}
    steps = sorted({image.step for image in every})
    order = {step: number for number, step in enumerate(_halved(steps))}

    def rank(image: Stored) -> tuple[int, Row, int]:
        return -1 if image.step == last[image.row, image.run] else order[image.step], image.row, image.run

    return sorted(every, key=rank)


def _halved(steps: Sequence[int]) -> list[int]:
    """First, last, the middle, the quarters, …"""
    levels, last = math.ceil(math.log2(max(2, len(steps)))) + 1, len(steps) - 1
    parts = [part / 2**level for level in range(levels) for part in range(2**level + 1)]
    return list(dict.fromkeys(steps[round(part * last)] for part in parts))


def reduced(data: bytes, side: int) -> bytes:
    """An image file as WebP, its longer side at most `side` pixels.

    Raises:
        ValueError: it is too large; and whatever Pillow says of a damaged one.
    """
    with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("too many pixels")
        return thumbnail(image, side)


def thumbnail(image: Image.Image, side: int) -> bytes:
    """An image as WebP, its longer side at most `side` pixels."""
    picture = image.convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    is_tiny = max(picture.size) <= 96  # each pixel is seen
    picture.save(buffer, "WEBP", lossless=is_tiny, quality=82)
    return buffer.getvalue()


def data_uri(image: bytes) -> str:
    """A WebP file as the address of an image in a page that needs no other file."""
    return f"data:image/webp;base64,{base64.b64encode(image).decode()}"
