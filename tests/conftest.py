"""Fixtures that several test files share. The environment is set before any library reads it."""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test workers share the cores: more threads each are slower

# The CPU, also on a machine with a GPU, where several tests at a time would share it and numbers are others; who wants
# a test to use one names it: CUDA_VISIBLE_DEVICES=0.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def pytest_configure(config: pytest.Config) -> None:
    """A folder for what all workers use and one of them makes: they inherit the variable."""
    if "TESTS_SHARE" not in os.environ:
        os.environ["TESTS_SHARE"] = tempfile.mkdtemp(prefix="tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop("TESTS_SHARE"), ignore_errors=True))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server of `commands.py` first: Python has one at a time, and a sweep in a test would start its own."""
    if (commands := sys.modules.get("commands")) is not None and not session.config.option.collectonly:
        commands.start_server()


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """Each run collects garbage at its end: libraries are passed over, or that takes longer than its steps."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """The tiny Kandinsky 2.2 as a combined diffusers folder, built once for all workers. Do not write into it."""
    from running import first_run

    from kandinsky_exp.tiny.pipelines import build

    return build(first_run() / "cache")


@pytest.fixture(scope="module")
def prior():
    """The prior's encoders, always with the same weights."""
    import torch
    from encoders import PriorEncoders

    torch.manual_seed(0)
    return PriorEncoders()


@pytest.fixture(scope="module")
def decoder():
    """The decoder's encoders, always with the same weights."""
    import torch
    from encoders import DecoderEncoders

    torch.manual_seed(0)
    return DecoderEncoders()
