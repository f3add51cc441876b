"""Item 2, the other side: the guide's script, as it is, in this process; what it reports to is all that is taken over.

Its learning rate, weight decay and the like are those of our runs; none of them has an influence on its speed. Where
the library `datasets` is not installed, `stand_in/` reads the folder of pictures for it.
"""

import importlib.util
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import turns


class _EnoughError(Exception):
    """Raised out of the script after its last step: its final save would look for files on the hub."""


def warm(references: str, blocks: int, block: int, **case: Unpack[turns.Case]) -> dict[str, Any]:
    """Seconds of the script's step and of the bare one, by turns."""
    measured = turns.against_bare(block, case)
    steps = turns.steps_for(blocks, block, block // 2)
    run_script(references, case["stage"], arguments(steps, **case), measured, steps)
    return measured.summary()


def cold(references: str, steps: int, **case: Unpack[turns.Case]) -> dict[str, Any]:
    """When the last step of the first epoch was done, in seconds since 1970."""
    measured = turns.Turns(None)
    run_script(references, case["stage"], arguments(steps, **case), measured, steps)
    return {"first": measured.ends[0], "last": measured.ends[-1]}


def timed(references: str, steps: int, warm_up: int, on_cpu: bool, **case: Unpack[turns.Case]) -> dict[str, Any]:
    """Seconds of a step in bf16 after those that warm up, whatever its device; peak GB of a GPU."""
    import torch

    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    on_cuda = torch.cuda.is_available() and not on_cpu
    measured = turns.Turns(None)

    def after_step() -> None:
        measured()
        if on_cuda and len(measured.ends) == warm_up:
            torch.cuda.reset_peak_memory_stats()

    flags = [*arguments(warm_up + steps, **case), "--mixed_precision=bf16"]
    run_script(references, case["stage"], flags, after_step, warm_up + steps)
    found = {"seconds": (measured.ends[-1] - measured.ends[warm_up - 1]) / steps}
    return found | ({"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if on_cuda else {})


def run_script(references: str, stage: str, flags: list[str], after_step: Callable[[], None], steps: int) -> None:
    import accelerate

    if importlib.util.find_spec("datasets") is None:
        sys.path.append(str(Path(__file__).parent / "stand_in"))
    done = 0

    class Recording(accelerate.Accelerator):
        def __init__(self, *args: Any, log_with: Any = None, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

        def init_trackers(self, *args: Any, **kwargs: Any) -> None:
            pass

        def log(self, values: dict[str, Any], step: int | None = None, log_kwargs: Any = None) -> None:
            nonlocal done
            done += 1
            after_step()
            if done == steps:
                raise _EnoughError

    accelerate.Accelerator = Recording  # type: ignore[misc]
    script = Path(references) / f"train_text_to_image_{stage}.py"
    sys.argv = [str(script), *flags]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except _EnoughError:
        return
    raise RuntimeError(f"{script} ended after {done} of {steps} steps")


def arguments(steps: int, **case: Unpack[turns.Case]) -> list[str]:
    place = Path(case["root"]) / f"published-{os.getpid()}-{time.time_ns()}"
    settings = {
        "pretrained_prior_model_name_or_path": f"{case['pipelines']}/prior",
        "pretrained_decoder_model_name_or_path": f"{case['pipelines']}/decoder",
        "train_data_dir": case["pictures"],
        "cache_dir": place / "datasets",
        "output_dir": place / "output",
        "resolution": case["resolution"],
        "seed": 0,
        "train_batch_size": case["batch"],
        "max_train_steps": steps,
        "checkpointing_steps": steps + 1,
        "learning_rate": 1e-5,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "adam_weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    return [f"--{name}={value}" for name, value in settings.items()]
