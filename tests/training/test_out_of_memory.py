"""Memory that runs out: less is tried where that helps, nothing trained is lost, a message says what to do."""

import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import start_two
from PIL import Image
from running import PROMPTS, composed, history, network, prepare, runs, same, train
from safetensors import SafetensorError
from tight import ABSURD, Failing, SpentPrior
from torch.utils._python_dispatch import TorchDispatchMode

from kandinsky_exp import build
from kandinsky_exp.data import sources
from kandinsky_exp.data.encoded.cache import encode_table
from kandinsky_exp.data.encoded.encode_loop import EncodeSettings
from kandinsky_exp.errors import ConfigError, DataError, OutOfMemory, is_of_host, is_out_of_memory
from kandinsky_exp.memory import savings
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.run import run
from kandinsky_exp.runs import integrity
from kandinsky_exp.system import distributed
from kandinsky_exp.system.halving import Halving
from kandinsky_exp.training import ema
from kandinsky_exp.training.loop import Training
from kandinsky_exp.verbs.generate import generate

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB of which 1.1 GiB is free. "
    "Of the allocated memory 18.10 GiB is allocated by PyTorch, and 3.20 GiB is reserved by PyTorch but unallocated."
)


# --- a validation that fails


class Failure(logging.Handler):
    """Raises an exception, once, in the very thread that logs a text."""

    def __init__(self, text: str, error: Exception) -> None:
        super().__init__()
        self.text, self.error = text, error

    def emit(self, record: logging.LogRecord) -> None:
        if self.text in record.getMessage():
            self.text = "\0"
            raise self.error


@contextlib.contextmanager
def failing_at(text: str, error: Exception) -> Iterator[None]:
    handler = Failure(text, error)
    logging.getLogger("kandinsky_exp").addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger("kandinsky_exp").removeHandler(handler)


@pytest.mark.parametrize(
    ("error", "expected", "every"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), OutOfMemory, 2),
        (ZeroDivisionError("a bug"), ZeroDivisionError, 100),
    ],
)
def test_a_validation_that_fails_costs_nothing(
    error: Exception, expected: type[Exception], every: int, tmp_path: Path
) -> None:
    """What was trained is saved, the validation stays owed, and the run ends as one that never failed."""
    settings = ["model=prior", "trainer.ema_decay=0.9", f"checkpoint.every={every}", "checkpoint.keep=1"]
    train(tmp_path, *settings, "name=whole")
    with failing_at("step 2: validation loss", error), pytest.raises(expected) as caught:
        train(tmp_path, *settings, "name=p")
    if expected is OutOfMemory:
        assert "the device has no memory left (CUDA out of memory" in str(caught.value)
    (folder,) = (tmp_path / "p" / "checkpoints").iterdir()
    state = integrity.read_state(folder)
    assert (state["step"], state["validated"], state["validation_loss"]) == (2, False, None)
    record = json.loads((tmp_path / "p" / "run.json").read_text())
    assert (record["status"], record["step"]) == ("FAILED", 2)
    train(tmp_path, *settings, "name=p")
    whole, mended = runs(tmp_path)
    assert mended.info.status == "FINISHED"
    for key in ("train/loss", "validation/loss"):
        assert history(tmp_path, whole.info.run_id, key) == history(tmp_path, mended.info.run_id, key)
    assert same(*(network(tmp_path / name / "pipeline" / "prior") for name in ("whole", "p")))
    names = {path.name for path in (tmp_path / "p" / "checkpoints").iterdir()}
    assert names == {path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()}


def first_fails_to_validate() -> None:
    """In the first of several processes."""
    if os.environ["RANK"] == "0":
        logging.getLogger("kandinsky_exp").addHandler(Failure("step 2: validation loss", MemoryError()))


def test_of_two_processes_one_fails_to_validate(tmp_path: Path) -> None:
    settings = ["model=prior", "trainer.batch_size=2", "tracker=none", "name=p", "checkpoint.every=100"]
    both = start_two(tmp_path, *settings, limit=first_fails_to_validate)
    outputs = [process.finish() for process in both]
    assert [process.code for process in both] == [1, 1], outputs
    assert "the machine has no memory left (MemoryError)" in outputs[0]
    assert "Warning" not in "".join(outputs)  # of a library, about what no user can change
    (folder,) = (tmp_path / "p" / "checkpoints").iterdir()
    assert integrity.damage(folder) is None
    assert integrity.read_state(folder)["validated"] is False


class NoRoom(TorchDispatchMode):
    """The device has no room for a copy."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "clone":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return func(*args, **(kwargs or {}))


class Averaging(torch.optim.SGD):
    """Has an average as a schedule-free optimizer does: zeros."""

    fails = False

    def train(self) -> None: ...

    def eval(self) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.detach().zero_()
        if self.fails:
            raise MemoryError


@pytest.mark.parametrize("fails", [False, True])
def test_an_average_needs_no_room_on_the_device(fails: bool) -> None:
    network = torch.nn.ParameterList([torch.ones(3), torch.ones(2, 2)])
    optimizer = Averaging(network, lr=1.0)
    optimizer.fails = fails
    training = Training(None, network, optimizer, None, None)  # type: ignore[arg-type]
    judged: list[bool] = []
    with contextlib.suppress(MemoryError), NoRoom(), ema.averaged_weights(training):
        judged += [not weight.any() for weight in network]
    assert judged == ([] if fails else [True, True])
    assert all(bool((weight == 1).all()) for weight in network)


def test_a_step_that_fails_costs_nothing_but_itself(tmp_path: Path) -> None:
    """Before weights, averages and schedule are changed, all is as after the step before."""
    settings = ["model=prior", "tracker=none", "trainer.ema_decay=0.9", "checkpoint.every=100", "validation.every=100",
                "model._target_=tight.SpentPrior", "trusted_modules=[tight]"]  # fmt: skip
    prepare(tmp_path, settings, encoded=True)
    SpentPrior.steps = 1000
    run(composed(tmp_path, *settings, "name=whole"), trusted_modules=["tight"])
    SpentPrior.steps = 3
    with pytest.raises(OutOfMemory, match="the machine has no memory left"):
        run(composed(tmp_path, *settings, "name=p"), trusted_modules=["tight"])
    (folder,) = (tmp_path / "p" / "checkpoints").iterdir()
    assert integrity.read_state(folder)["step"] == 3
    SpentPrior.steps = 1000
    run(composed(tmp_path, *settings, "name=p"), trusted_modules=["tight"])
    assert same(*(network(tmp_path / name / "pipeline" / "prior") for name in ("whole", "p")))


# --- less at a time


def test_validation_halves_its_batch(tmp_path: Path) -> None:
    """The loss is that of a run whose batch was small at once, and so are the pictures."""
    settings = ["model=prior", "trainer.max_steps=2", PROMPTS, "validation.fraction=0.5", "tracker=none"]
    prepare(tmp_path, settings, encoded=True)
    expected = run(composed(tmp_path, *settings, "name=small", "validation.batch_size=2"))
    mine = ["name=tight", "validation.batch_size=8", "model._target_=tight.TightPrior", "trusted_modules=[tight]"]
    assert run(composed(tmp_path, *settings, *mine), trusted_modules=["tight"]) == expected
    log = (tmp_path / "tight" / "train.log").read_text()
    sizes = [line.rpartition(" ")[2] for line in log.splitlines() if "validation loss: memory ran out" in line]
    assert sizes == ["4", "2"]  # once: what was found is kept for the next time
    assert log.count("validation images: memory ran out") == 3
    assert "batch_size" not in log
    for place in ("step-00000000/01.png", "step-00000002/00.png"):
        images = [np.asarray(Image.open(tmp_path / name / "samples" / place), float) for name in ("small", "tight")]
        assert abs(images[0] - images[1]).max() <= 2  # a batch of another size rounds otherwise


def asked(sizes: list[int], enough: int) -> Any:
    def work(size: int) -> int:
        sizes.append(size)
        if size > enough:
            torch.empty(ABSURD, dtype=torch.uint8)
        return size

    return work


def test_one_at_a_time_is_tried_before_it_gives_up() -> None:
    sizes: list[int] = []
    halving = Halving("work", 6)
    with pytest.raises(RuntimeError, match="allocate"):
        halving.run(asked(sizes, 0))
    assert sizes == [6, 3, 1]
    assert Halving("work", 6).run(asked([], 1)) == 1
    alone: list[int] = []
    with pytest.raises(RuntimeError, match="allocate"):
        Halving("work", 1).run(asked(alone, 0))
    assert alone == [1, 1]  # once more, with the cache emptied
    with pytest.raises(ZeroDivisionError):
        halving.run(lambda size: 1 // 0)


# --- what it is called


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 380 MB, max: 18 GB)."),
        RuntimeError("Invalid buffer size: 64.00 GB"),
        RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("UR error: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"),
        torch.distributed.DistBackendError(
            "NCCL error: unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.\n"
            "Last error:\nCuda failure 2 'out of memory'"
        ),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("not enough memory: you tried to allocate 40 bytes."),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        SafetensorError("Cannot allocate memory (os error 12)"),
    ],
    ids=lambda error: str(error)[:40],
)  # fmt: skip
def test_it_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), OSError(errno.ENOSPC, "No space left on device"), DataError("out of memory")],
)
def test_other_errors_are_none(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_a_real_one_is_the_hosts() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(ABSURD, dtype=torch.uint8)
    assert is_of_host(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.AcceleratorError("CUDA error: out of memory"), "the device has no memory left (CUDA error: out"),
        (MemoryError(), "the machine has no memory left (MemoryError). What lowers it most for this run: "),
        (torch.OutOfMemoryError(CUDA), "the environment variable PYTORCH_ALLOC_CONF=expandable_segments:True, for"),
    ],
)
def test_the_message_names_settings(error: Exception, words: str, tiny_folder: Path, tmp_path: Path) -> None:
    cfg = composed(tmp_path, "model=prior", f"weights.prior={tiny_folder}", f"weights.decoder={tiny_folder}")
    with distributed.accelerated(lambda: build.accelerator(cfg)) as accelerator:
        stage = build.stage(cfg, build.weights(cfg))
        with pytest.raises(OutOfMemory) as caught, savings.explain_out_of_memory(cfg, accelerator.device, stage):
            raise error
    assert words in str(caught.value)
    assert ("expandable" in str(caught.value)) == ("unallocated" in str(error))


# --- before anything trains


def test_encoders_that_find_no_room_on_the_device(prior: Any, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "0.png")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a\n")
    source = sources.folder(folder).train
    moving = Failing(torch.AcceleratorError("CUDA error: out of memory"))
    with pytest.raises(DataError, match=r"^the encoders ran out of memory \(CUDA error: out of memory\); set data"):
        encode_table(source, prior, tmp_path / "key", EncodeSettings(), print, encoders=moving)


class Crowded(Weights):
    def _made(self, *arguments: Any) -> Any:
        return torch.empty(ABSURD, dtype=torch.uint8)


def test_weights_that_find_no_room_are_not_called_damaged(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"weights\.decoder: 'movq' does not fit into memory \(.*allocate"):
        Crowded(str(tiny_folder), str(tiny_folder), tmp_path).load("movq")


def test_generate_says_what_helps(tmp_path: Path) -> None:
    """Latents of a picture as large as that would take absurd memory."""
    prepare(tmp_path, [])
    side = 1 << 25
    cfg = composed(tmp_path, "weights=tiny", "inference_steps=1", "prior_inference_steps=2", "prompts=[a dog]",
                   f"height={side}", f"width={side}", verb="generate", small=[])  # fmt: skip
    with pytest.raises(OutOfMemory, match=r"drawing ran out of memory \(.*\); set precision=bf16, or smaller height"):
        generate(cfg)
