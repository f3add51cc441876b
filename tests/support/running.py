"""Runs in this process: composed configs with small defaults, and what they leave behind."""

import contextlib
import copy
import functools
import gc
import io
import logging
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import kandinsky_exp.conf
import mlflow
import pytest
import torch
from filelock import FileLock
from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from mlflow import MlflowClient
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from kandinsky_exp import hydra_adapter
from kandinsky_exp.config import validation
from kandinsky_exp.errors import Interrupted
from kandinsky_exp.run import run
from kandinsky_exp.tiny import pipelines
from kandinsky_exp.tracking import store
from kandinsky_exp.verbs.encode import encode

SMALL = [
    "weights=tiny",
    "data=emoji",
    "data.max_samples=12",
    "trainer.max_steps=4",
    "trainer.batch_size=4",
    "trainer.log_every=2",
    "optimizer.lr=1e-3",
    "validation.every=2",
    "validation.inference_steps=2",
    "validation.draws=1",
    "validation.reconstructions=1",
    "checkpoint.every=2",
]
CONF = Path(kandinsky_exp.conf.__path__[0])
PROMPTS = "validation.prompts=[a red heart, a dog]"


def composed(root: Path, *overrides: str, verb: str = "train", small: list[str] | None = None) -> DictConfig:
    """A root config with everything under `root`."""
    return quick_compose(verb, [*(SMALL if small is None else small), f"output_root={root}", *overrides])


def quick_compose(verb: str, words: Sequence[str]) -> DictConfig:
    """What Hydra composes. It reads yaml files once for the same groups; values alone are set as it does it."""
    if any(re.match(r"[+~]|[^=]*[@/]", word) for word in words):  # what is more than a value
        return hydra_compose(verb, words)
    values = [word for word in words if is_value(word)]
    cfg = copy.deepcopy(of_groups(verb, tuple(word for word in words if not is_value(word))))
    try:
        for override in OverridesParser.create().parse_overrides(values):
            assert not override.is_sweep_override()
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
    except Exception:
        return hydra_compose(verb, words)  # the error has to be Hydra's
    return cfg


def problems_of(cfg: DictConfig, verb: str = "train", trusted: Sequence[str] = ()) -> list[str]:
    """What is wrong with a config, as it is printed."""
    return [str(problem) for problem in validation.problems(cfg, verb, trusted)]


def is_value(word: str) -> bool:
    """Whether it sets a value, and chooses no yaml file of a group."""
    key = word.partition("=")[0]
    return "." in key or not (CONF / key).is_dir()


@functools.cache
def of_groups(verb: str, words: tuple[str, ...]) -> DictConfig:
    return hydra_compose(verb, words)


def hydra_compose(verb: str, words: Sequence[str]) -> DictConfig:
    """As a command does, which remembers what files it has read."""
    flags = hydra_adapter.parse([], refuse=pytest.fail)
    with hydra_adapter.composing(flags, check=lambda _: None):
        return compose(verb, list(words))


def train(root: Path, *overrides: str) -> float:
    prepare(root, overrides, encoded=True)
    gc.collect()  # what the run before left: frozen, it would stay for ever
    gc.freeze()  # a run collects garbage at its end, and goes through all the libraries for it
    return run(composed(root, *overrides))


def prepare(root: Path, overrides: Sequence[str], encoded: bool = False) -> None:
    """Put there what a first run would make, and what takes longer than its steps: the tiny weights, an empty store.

    Args:
        encoded: the features of both stages as well, for the settings of `SMALL`.
    """
    made = first_run()
    if not (root / "cache").exists():
        copied(encoded_cache() if encoded else made / "cache", root / "cache")
    if not (root / "mlflow.db").exists() and not any(text.startswith("tracker") for text in overrides):
        shutil.copyfile(made / "mlflow.db", root / "mlflow.db")


def copied(source: Path, target: Path) -> None:
    """A copy whose weights are links where the disk allows it: nobody writes into them."""

    def copy(one: str, other: str) -> None:
        with contextlib.suppress(OSError):
            if one.endswith(".safetensors"):
                os.link(one, other)
                return
        shutil.copy2(one, other)

    shutil.copytree(source, target, copy_function=copy)


@functools.cache
def first_run() -> Path:
    """What a first run makes, once for all workers."""

    def make(folder: Path) -> None:
        pipelines.build(folder / "cache")
        store.connect(store.default_uri(folder))

    return shared("first-run", make)


@functools.cache
def encoded_cache() -> Path:
    """The tiny weights and what runs with `SMALL` encode first."""

    def make(folder: Path) -> None:
        copied(first_run() / "cache", folder / "cache")
        data = [text for text in SMALL if text.startswith(("weights", "data"))]
        for stage in ("prior", "decoder"):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                encode(composed(folder, f"model={stage}", verb="encode", small=data))

    return shared("encoded", make) / "cache"


def shared(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first of all workers makes, and that lasts as long as their tests.

    It is made where it stays, for runs record absolute paths.
    """
    folder = Path(os.environ["TESTS_SHARE"]) / name  # from conftest.py
    whole = folder.with_name(f"{name}.whole")
    with FileLock(f"{folder}.lock"):
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)  # a try that failed
            make(folder)
            whole.touch()
    return folder


def client(root: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{root}/mlflow.db")


def runs(root: Path) -> list[Any]:
    experiment = client(root).get_experiment_by_name("kandinsky-2-2")
    return list(client(root).search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]))


def history(root: Path, run_id: str, key: str) -> dict[int, float]:
    return {metric.step: metric.value for metric in client(root).get_metric_history(run_id, key)}


def network(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a diffusers model folder."""
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class At(logging.Handler):
    """Raises a signal in this very thread when the run logs a text: a stop at an exact point."""

    def __init__(self, text: str, number: signal.Signals = signal.SIGTERM) -> None:
        super().__init__()
        self.text, self.number = text, number

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self.text = "\0"  # once
            signal.raise_signal(self.number)


@contextlib.contextmanager
def stopped_at(text: str, number: signal.Signals = signal.SIGTERM) -> Iterator[Any]:
    """The block ends as a run that was stopped, by a signal that came when it logged a text."""
    handler = At(text, number)
    logging.getLogger("kandinsky_exp").addHandler(handler)
    try:
        with pytest.raises(Interrupted) as caught:
            yield caught
    finally:
        logging.getLogger("kandinsky_exp").removeHandler(handler)


__all__ = [
    "PROMPTS", "SMALL", "client", "composed", "history", "hydra_compose", "mlflow", "network", "prepare",
    "quick_compose", "runs", "same", "stopped_at", "train",
]  # fmt: skip
