"""Item 4: the cost of a step, of memory and of a start does not grow with the number of rows.

A tiny prior trains on a folder of small pictures whose features are cached already: see `cheap.py`.
"""

import time
from pathlib import Path
from typing import Any

import machine
import turns


def overrides_for(pictures: str, root: str) -> list[str]:
    """10 of 100,000 rows are held out: validating thousands would be most of the time, and tell nothing."""
    return [
        "model=prior",
        "weights=tiny",
        f"data.path={pictures}",
        "data.resolution=64",
        "validation.fraction=0.0001",
        "trainer.batch_size=4",
        "tracker=none",
        f"output_root={root}",
    ]


def fill(pictures: str, root: str) -> dict[str, Any]:
    """Cache features of all the pictures: random ones, through the run itself."""
    import doors

    cheap = ["model._target_=cheap.CheapPrior", "trainer.max_steps=1", "name=fill", "data.encode_batch=64"]
    doors.train(doors.compose([*overrides_for(pictures, root), *cheap]))
    return {"tables": doors.tables(Path(root))}


def measure(pictures: str, few_pictures: str, root: str, steps: int, block: int) -> dict[str, Any]:
    """A step, memory at the last step, and seconds from `run` to the end of the first step, all imports done.

    Returns:
        `step`, in units of a bare step of the same network that is measured by turns: processes, and the moods of the
        machine, compare that way. `memory` in MB. `start` in seconds.
    """
    import doors
    from bare import BareStep

    hooked = ["scheduler._target_=schedule.constant", "checkpoint.resume=never"]
    few = [*overrides_for(few_pictures, f"{root}-few"), *hooked, "trainer.max_steps=3", f"name=few-{time.time_ns()}"]
    doors.train(doors.compose(few))
    before = doors.tables(Path(root))
    timer, memory = turns.Turns(BareStep("prior", None, few_pictures, 4, 64), block, block // 2), []

    def after_step() -> None:
        timer()
        if len(timer.ends) == steps:
            memory.append(machine.anonymous_mb())

    turns.hook(after_step)
    many = [*overrides_for(pictures, root), *hooked, f"trainer.max_steps={steps}", f"name=rows-{time.time_ns()}"]
    config = doors.compose(many)
    since = time.time()
    doors.train(config)
    if doors.tables(Path(root)) != before:
        raise RuntimeError(f"the cache under {root} was not warm: the run encoded")
    found = timer.summary()
    return {"step": found["ratio"], "ms": 1e3 * found["step"], "memory": memory[0], "start": timer.ends[0] - since}
