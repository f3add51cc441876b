"""Runs in this process: composed configs with small defaults, and what they leave behind."""

import atexit
import contextlib
import functools
import gc
import logging
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from hydra import compose, initialize_config_module
from mlflow import MlflowClient
from omegaconf import DictConfig
from safetensors.torch import load_file

from kandinsky_exp import store
from kandinsky_exp.errors import Interrupted
from kandinsky_exp.run import run
from kandinsky_exp.tiny import pipelines

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
PROMPTS = "validation.prompts=[a red heart, a dog]"


def composed(root: Path, *overrides: str, verb: str = "train", small: list[str] | None = None) -> DictConfig:
    """A root config with everything under `root`."""
    base = SMALL if small is None else small
    with initialize_config_module("kandinsky_exp.conf", version_base="1.3"):
        return compose(verb, [*base, f"output_root={root}", *overrides])


def train(root: Path, *overrides: str) -> float:
    prepare(root, overrides)
    gc.freeze()  # a run collects garbage at its end, and goes through all the libraries for it
    return run(composed(root, *overrides))


def prepare(root: Path, overrides: Sequence[str]) -> None:
    """Put there what a first run would make, and what takes longer than its steps: the tiny weights, an empty store."""
    made = first_run()
    if not (root / "cache").exists():
        shutil.copytree(made / "cache", root / "cache")
    if not (root / "mlflow.db").exists() and not any(text.startswith("tracker") for text in overrides):
        shutil.copyfile(made / "mlflow.db", root / "mlflow.db")


@functools.cache
def first_run() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="first-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pipelines.build(folder / "cache")
    store.connect(store.default_uri(folder))
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
    "PROMPTS", "SMALL", "client", "composed", "history", "mlflow", "network", "prepare", "runs", "same", "stopped_at",
    "train",
]  # fmt: skip
