"""Flat and written forms of a config, and the `config.yaml` of a run.

That file may be anybody's: it is read as data, of which nothing is resolved and nothing is built.
"""

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from kandinsky_exp.config import recorded_paths
from kandinsky_exp.errors import ConfigError, first_line
from kandinsky_exp.system import redaction

NAME = "config.yaml"
LARGEST = 1 << 18  # bytes
Values = dict[str, Any]


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


def flatten(cfg: DictConfig) -> Values:
    """The resolved config as {dotted key: value}, secrets aside, paths absolute. Lists, empty mappings stay values."""
    return dict(leaves(redaction.redacted(recorded_paths.absolute(resolved(cfg)))))


def flatten_saved(run_folder: Path) -> Values:
    """The config that a run wrote, as `flatten` gives it; nothing where there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    return dict(leaves(read(run_folder))) if (run_folder / NAME).is_file() else {}


def to_yaml(cfg: DictConfig) -> str:
    """The resolved config as yaml, secrets aside, paths absolute."""
    return OmegaConf.to_yaml(OmegaConf.create(redaction.redacted(recorded_paths.absolute(resolved(cfg)))))


def resolved(cfg: DictConfig) -> Values:
    return typing.cast(Values, OmegaConf.to_container(cfg, resolve=True))


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and (node or not key):
        for name, value in node.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def walk(node: Any, key: str = "", name: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted key, last name, value) of a node and of all that is in it; items of lists have their index for a name."""
    yield key, name, node
    for part, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from walk(value, f"{key}.{part}" if key else str(part), str(part))


def dotted_keys(cfg: DictConfig) -> list[str]:
    """The dotted keys of all settings of an unresolved config."""
    return [key for key, _ in leaves(OmegaConf.to_container(cfg, resolve=False))]
