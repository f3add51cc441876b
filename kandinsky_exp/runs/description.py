"""The description of a run in MLflow: its parameters, its tags, and the command that makes it again."""

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from kandinsky_exp.config import grammar
from kandinsky_exp.system import redaction
from kandinsky_exp.tracking.mlflow_names import value_text

NOTE = "mlflow.note.content"  # the tag that MLflow's UI shows as a run's description, in Markdown
# Where a run lies and who is told of it: none of these changes what is trained or how it is judged, so that runs are
# not compared by them. In MLflow's tables every parameter is a column.
BOOKKEEPING = re.compile(
    r"(name|output_root|trusted_modules|checkpoint\.(keep|resume)|(hub|sweep|tracker)\..*|.*\._(partial|convert|recursive)_)"
)


def split(flat: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(parameters, tags) of a flattened config; the tags are called `config.<key>`."""
    tags = {f"config.{key}": value_text(value) for key, value in flat.items() if BOOKKEEPING.fullmatch(key)}
    return {key: value for key, value in flat.items() if not BOOKKEEPING.fullmatch(key)}, tags


def command() -> str | None:
    """The command line that makes this run again, for a shell, secrets aside; None for a run from Python.

    A job of a sweep is made alone: neither the sweep's choices nor its name are in it.
    """
    if not HydraConfig.initialized():
        return None
    settings = HydraConfig.get()
    overrides = list(settings.overrides.task)
    if settings.mode == RunMode.MULTIRUN:
        overrides = [text for text in overrides if not grammar.keys([text]) & {"name", "sweep.trial"}]
    of_hydra = list(settings.overrides.hydra)
    overrides += [text for text in of_hydra if "hydra.searchpath" in grammar.keys([text])]
    # One of its files makes a sweep of it. Where nobody says a mode, Hydra does, behind all that was typed.
    said = grammar.keys(of_hydra if settings.mode == RunMode.MULTIRUN else of_hydra[:-1])
    if ("hydra.mode" not in said) == (settings.mode == RunMode.MULTIRUN):
        overrides.append("hydra.mode=RUN")
    folders = [source.path for source in settings.runtime.config_sources if source.provider == "command-line"]
    words = ["kandinsky-exp", "train", *(f"--config-dir={folder}" for folder in folders)]
    if settings.job.config_name not in (None, "train"):
        words.append(f"--config-name={settings.job.config_name}")
    return shlex.join([*words, *map(redacted_override, overrides)])


def tags(made_by: str | None, lines: Iterable[str] = ()) -> dict[str, str]:
    """The tag with a run's description in Markdown; nothing where there is nothing to say.

    Args:
        made_by: the command.
        lines: further paragraphs, such as a link to a report.
    """
    paragraphs = list(lines)
    if made_by is not None:
        ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", made_by)), default=0))
        paragraphs.insert(0, f"{ticks}sh\n{made_by}\n{ticks}")
    return {NOTE: "\n\n".join(paragraphs)} if paragraphs else {}


def redacted_override(override: str) -> str:
    """An override without what is secret in it."""
    key, equals, value = override.partition("=")
    return f"{key}{equals}{redaction.redacted({key.rpartition('.')[2]: value})[key.rpartition('.')[2]]}"
