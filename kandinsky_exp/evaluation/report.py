"""What an evaluation leaves: one HTML file that needs nothing else, a picture, and `metrics.json`."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from kandinsky_exp.evaluation.encoders import OWN
from kandinsky_exp.evaluation.measuring import Result
from kandinsky_exp.reports import images
from kandinsky_exp.reports.report import rendered
from kandinsky_exp.system import files
from kandinsky_exp.system.image_grid import labelled_grid

REPORT, METRICS, GRID = "report.html", "metrics.json", "grid.png"
UNFIT = re.compile(r"[^\w.\- ]")  # in the name of a metric
SHOWN = 24  # captions of which pictures are in the report
MOST_SHOWN = 400  # of all models together, so that the file stays small
SIDE = 192  # pixels of a picture in it

MEANINGS = {
    "clip_score": "100 x cosine of picture and caption: how well pictures show their captions. Higher is better.",
    "clip_score_heldout": "The same of the held-out pictures themselves.",
    "cmmd": "How far the drawn pictures are from the held-out ones, as two sets; 0 = not to be told apart. "
    "Lower is better.",
    "cmmd_floor": "The same between two halves of the held-out pictures: as low as it gets with so many.",
    "precision": "Share of the drawn pictures that look like held-out ones. Higher is better.",
    "recall": "Share of the held-out pictures that look like drawn ones. Higher is better.",
    "diversity": "How different the pictures of one caption are: 1 - cosine, mean over pairs.",
    "nearest_train": "Distance of a drawn picture to the nearest training picture: 1 - cosine, mean.",
    "nearest_heldout": "The same of a held-out picture. Where drawn ones are clearly nearer, the model copies.",
}
JUDGE = (
    f"{OWN} judges: it is what the decoder is conditioned on, and so no independent judge. With encoder=<folder> "
    "another one judges besides."
)


@dataclass(frozen=True)
class Shown:
    """Pictures side by side."""

    pictures: Sequence[Image.Image]
    label: str


@dataclass(frozen=True)
class Row:
    """One model that was evaluated.

    Args:
        results: by encoder, Kandinsky's own first.
        closest: drawn pictures and their nearest training pictures.
        drawn: held-out pictures and what was drawn from their captions.
        facts: what it was drawn with, for `metrics.json`.
    """

    name: str
    results: Mapping[str, Result]
    closest: Sequence[Shown]
    drawn: Sequence[Shown]
    facts: Mapping[str, Any]

    @property
    def own(self) -> Result:
        return self.results[OWN]

    @property
    def verdict(self) -> str:
        near, real = self.own.metrics["nearest_train"], self.own.metrics["nearest_heldout"]
        told = f"Drawn pictures lie {near} from the nearest training picture, held-out pictures {real}: "
        if near.high is None or real.low is None:
            return f"{told}too few pictures to tell whether it copies."
        if self.own.copies:
            return f"{told}it copies training pictures, more than held-out pictures resemble them."
        return f"{told}no sign of copying."


def write(folder: Path, title: str, rows: Sequence[Row], notes: Sequence[str]) -> list[Path]:
    """Write all of it, the rows by CMMD, the best first; what was there is replaced.

    Returns:
        The files.
    """
    ranked = sorted(rows, key=lambda row: row.own.metrics["cmmd"].value)
    files.write_atomically(folder / METRICS, json.dumps(numbers(ranked, notes), indent=2, ensure_ascii=False) + "\n")
    page = rendered(
        "evaluation.html",
        title=title,
        summary=_summary(ranked),
        notes=[JUDGE, *notes],
        tables=[_table(name, ranked) for name in ranked[0].results],
        meanings=MEANINGS,
        rows=[_section(row, max(4, MOST_SHOWN // len(ranked))) for row in ranked],
    )
    files.write_atomically(folder / REPORT, page)
    best = ranked[0]
    shown = [(picture, one.label) for one in best.drawn for picture in one.pictures]
    labels = [label if number % 2 else "held out" for number, (_, label) in enumerate(shown)]
    labelled_grid([picture for picture, _ in shown], labels, 8).save(folder / GRID)
    return [folder / name for name in (REPORT, METRICS, GRID)]


def numbers(rows: Sequence[Row], notes: Sequence[str]) -> dict[str, Any]:
    """What `metrics.json` holds."""
    return {
        "notes": list(notes),
        "models": [
            {
                "name": row.name,
                **row.facts,
                "encoders": {
                    name: {
                        "metrics": {key: asdict(value) for key, value in result.metrics.items()},
                        "copies": result.copies,
                        "closest": [asdict(pair) for pair in result.closest],
                    }
                    for name, result in row.results.items()
                },
            }
            for row in rows
        ],
    }


def flat(row: Row) -> dict[str, float]:
    """The metrics of a run's record, by key: those of another encoder than Kandinsky's have its name within."""
    found = {}
    for encoder, result in row.results.items():
        prefix = "evaluation" if encoder == OWN else f"evaluation/{UNFIT.sub('_', encoder)}"
        for key, value in result.metrics.items():
            found[f"{prefix}/{key}"] = value.value
            if value.low is not None and value.high is not None:
                found |= {f"{prefix}/{key}_low": value.low, f"{prefix}/{key}_high": value.high}
    return found


def _summary(rows: Sequence[Row]) -> str:
    count = rows[0].own.metrics["nearest_train"].count
    models = "one model" if len(rows) == 1 else f"{len(rows)} models, by CMMD, the best first"
    return f"{models}; {count:,} held-out captions were drawn"


def _table(encoder: str, rows: Sequence[Row]) -> dict[str, Any]:
    names = list(rows[0].results[encoder].metrics)
    cells = [{"name": row.name, "cells": [row.results[encoder].metrics[name] for name in names]} for row in rows]
    return {"encoder": encoder, "metrics": names, "rows": cells}


def _section(row: Row, most: int) -> dict[str, Any]:
    return {
        "name": row.name,
        "verdict": row.verdict,
        "count": row.own.metrics["nearest_train"].count,
        "closest": [_pair(shown) for shown in row.closest[:most]],
        "drawn": [_pair(shown) for shown in row.drawn[:most]],
    }


def _pair(shown: Shown) -> dict[str, Any]:
    small = [images.data_uri(images.thumbnail(picture, SIDE)) for picture in shown.pictures]
    return {"images": small, "label": shown.label, "tiny": max(max(one.size) for one in shown.pictures) <= 96}
