"""What stands for «no condition», as the frozen encoders have it, kept on disk beside the encoded features."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kandinsky_exp.errors import encoding_told
from kandinsky_exp.stages.base import DiffusionStage, Features


def null_condition(stage: DiffusionStage, cache: Path, encoders: str, device: torch.device) -> Features:
    """The null condition, kept beside the caches: a run from cached features loads no encoder for it.

    It is encoded where the features are: numbers of another device would differ a little from theirs.
    """
    key = hashlib.sha256(f"{encoders} {stage.preprocess.fingerprint}".encode()).hexdigest()[:32]
    file = cache / f"null-{stage.name}-{key}.safetensors"
    features = _kept(file)
    if features is None:
        with _alone(file):  # runs of a parallel sweep ask for it together: one encodes it
            features = _kept(file)
            if features is None:
                with encoding_told(), stage.weights.on_device(stage.encoders, device):
                    features = {key: value.cpu() for key, value in stage.encode_null().items()}
                _keep(features, file)
    return features


def _kept(file: Path) -> Features | None:
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError):
        return None


def _keep(features: Features, file: Path) -> None:
    with contextlib.suppress(OSError, SafetensorError):  # a disk that cannot be written: the next run encodes it again
        aside = file.with_suffix(f".{os.getpid()}.part")
        save_file(features, aside)
        aside.replace(file)


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Other processes wait, where the disk has locks and can be written."""
    lock = FileLock(file.with_suffix(".lock"))
    with contextlib.suppress(OSError, NotImplementedError):  # filelock's own word for a disk without locks
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
