"""The `config.yaml` of a run, which may be anybody's: data, of which nothing is resolved and nothing is built."""

from pathlib import Path
from typing import Any

import yaml

from kandinsky_exp.errors import ConfigError, first_line

NAME = "config.yaml"
LARGEST = 1 << 18  # bytes


def read(run_folder: Path) -> Any:
    """What it holds: nested mappings, lists, texts and numbers.

    Raises:
        ConfigError: the file cannot be read, or is far larger than a config.
    """
    file = run_folder / NAME
    try:
        with file.open("rb") as content:
            text = content.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"more than {LARGEST >> 10} KB")
        return yaml.load(text, _PlainLoader)  # nosec B506 # a SafeLoader
    except Exception as error:  # yaml raises whatever a damaged file makes it raise
        raise ConfigError(f"{file} cannot be read: {first_line(error)}; mend it, or give other sources") from error


def value(run_folder: Path, key: str) -> str | None:
    """A setting as it is written, None where there is none.

    Raises:
        ConfigError: the file cannot be read, is far larger than a config, or holds no text there.
    """
    found = read(run_folder)
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if isinstance(found, (dict, list)):
        raise ConfigError(f"{run_folder / NAME}: {key} is no text; mend it, or give other sources")
    return None if found is None else str(found)


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, of which a few lines can stand for gigabytes. What a run writes has none."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)
