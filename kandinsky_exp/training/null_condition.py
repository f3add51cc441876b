"""What stands for «no condition», as the frozen encoders have it, kept on disk beside the encoded features."""

import contextlib
import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kandinsky_exp.errors import DataError, memory_told
from kandinsky_exp.stages.base import DiffusionStage, Features
from kandinsky_exp.system import files


def null_condition(stage: DiffusionStage, cache: Path, encoders: str, device: torch.device) -> Features:
    """The null condition, kept beside the caches: a run from cached features loads no encoder for it.

    It is encoded where the features are: numbers of another device would differ a little from theirs.
    """
    key = hashlib.sha256(f"{encoders} {stage.preprocess.fingerprint}".encode()).hexdigest()[:32]
    file = cache / f"null-{stage.encodes_as}-{key}.safetensors"
    if (features := _kept(file)) is not None:
        return features
    with contextlib.ExitStack() as held:
        # Runs of a parallel sweep ask for it together: one encodes it, where the disk has locks and can be written.
        with contextlib.suppress(OSError, NotImplementedError):  # filelock's own word for a disk without locks
            held.enter_context(files.locked(file.with_suffix(".lock")))
        if (features := _kept(file)) is not None:
            return features
        out_of_memory = memory_told(DataError, "the encoders ran out of memory ({}); set precision=bf16")
        with out_of_memory, stage.weights.on_device(stage.encoders, device):
            features = {key: value.cpu() for key, value in stage.encode_null().items()}
        # On a disk that cannot be written the next run encodes it again.
        with contextlib.suppress(OSError, SafetensorError), files.replacing(file, f".{os.getpid()}") as aside:
            save_file(features, aside)
    return features


def _kept(file: Path) -> Features | None:
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError):
        return None
