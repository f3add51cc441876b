"""Items 1 and 2, the warm step: a real run from cached features against the bare step, in one process by turns."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import turns


def runner(
    stage: str,
    pipelines: str,
    pictures: str,
    root: str,
    batch: int,
    resolution: int,
    blocks: int,
    block: int,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Seconds of our step and of the bare one: `run(cfg)` with its defaults, MLflow and log points included.

    The default objective too: conditions are dropped, and the decoder has its variational term, neither of which the
    bare step computes.
    """
    import doors
    from bare import BareStep

    measured = turns.Turns(BareStep(stage, pipelines, pictures, batch, resolution), block, block // 2)
    turns.hook(measured)
    steps = turns.steps_for(blocks, block, block // 2) + 1  # the last one, which checkpoints, is in no block
    settings = [*overrides_for(stage, pipelines, pictures, batch, resolution), *overrides]
    overrides = [*settings, f"trainer.max_steps={steps}", f"output_root={root}", "name=steps"]
    doors.train(doors.compose(overrides))
    return measured.summary()


def overrides_for(stage: str, pipelines: str, pictures: str, batch: int, resolution: int) -> list[str]:
    """What a comparison fixes; all else is as a user gets it. The schedule tells `turns` of every step."""
    return [
        f"model={stage}",
        f"weights.prior={Path(pipelines) / 'prior'}",
        f"weights.decoder={Path(pipelines) / 'decoder'}",
        f"data.path={pictures}",
        f"data.resolution={resolution}",
        f"trainer.batch_size={batch}",
        "scheduler._target_=schedule.constant",
    ]
