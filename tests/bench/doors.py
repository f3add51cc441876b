"""Where the benchmarks touch what is inside the package: the one file to follow it when that changes.

All else goes through `run(cfg)`, the command, and the stages' own `encode` and `loss`. Imports torch only inside: the
process that starts the others stays small.
"""

from pathlib import Path
from typing import Any

TABLE_FILE = "images.arrow"  # one per encoded table
BATCH = 8  # data.encode_batch
WORKERS = 0  # data.num_workers


def compose(overrides: list[str]) -> Any:
    """A config of `train`."""
    import hydra

    with hydra.initialize_config_module("kandinsky_exp.conf", version_base="1.3"):
        return hydra.compose("train", overrides)


def encode_table(source: Any, stage: Any, folder: Path) -> None:
    """All of a source's images and captions into a new table, as a run with default settings does it."""
    from kandinsky_exp.data.encode import encode_table as encode

    encode(source, stage, folder, dtype="fp16", batch_size=BATCH, num_workers=WORKERS, log=lambda line: None)


def tables(output_root: Path) -> int:
    """How many tables a cache holds."""
    return len(list((output_root / "cache").rglob(TABLE_FILE)))


def encodings(output_root: Path) -> int:
    """How many times runs under this root encoded a table, by their logs."""
    logs = [log.read_text("utf-8") for log in sorted(output_root.rglob("train.log"))]
    return sum(_is_last_line_of_an_encoding(line) for log in logs for line in log.splitlines())


def _is_last_line_of_an_encoding(line: str) -> bool:
    """`encoded 64 of 64 images, 210.3/s`: the first of the two numbers equals the second on the last line."""
    words = line.partition("encoded ")[2].split()
    return len(words) > 3 and words[1] == "of" and words[0] == words[2] and words[3].startswith("images")
