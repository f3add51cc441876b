"""Where the benchmarks touch what is inside the package: the one file to follow it when that changes.

All else goes through `run(cfg)`, the command, and the stages' own `encode` and `loss`. Imports torch only inside: the
process that starts the others stays small.
"""

import re
from pathlib import Path
from typing import Any

OWN_MODULES = ("cheap", "schedule")  # of the benchmarks, which a config may not name unless they are typed
TABLE_FILE = "table.json"  # one per encoded table


def compose(overrides: list[str], verb: str = "train") -> Any:
    """A config of a verb."""
    import hydra

    with hydra.initialize_config_module("kandinsky_exp.conf", version_base="1.3"):
        return hydra.compose(verb, overrides)


def train(config: Any) -> None:
    """A run."""
    from kandinsky_exp.run import run

    run(config, trusted_modules=OWN_MODULES)


def encode_table(source: Any, stage: Any, folder: Path, processes: int = 1) -> None:
    """All of a source's images and captions into a new table, as a run of so many processes does it by default."""
    from kandinsky_exp.data.encoded.cache import encode_table as encode
    from kandinsky_exp.data.encoded.encode_loop import EncodeSettings

    encode(source, stage, folder, EncodeSettings(beside=processes), lambda line: None)


def tables(output_root: Path) -> int:
    """How many tables a cache holds."""
    return len(list((output_root / "cache").rglob(TABLE_FILE)))


def encodings(output_root: Path) -> int:
    """How many times runs under this root encoded a table, by their logs."""
    logs = [log.read_text("utf-8") for log in sorted(output_root.rglob("train.log"))]
    return sum(len(re.findall(r"encoded [\d,]+ images.* in \d", log)) for log in logs)
