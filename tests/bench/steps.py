"""Items 1 and 2, the warm step: a real run from cached features against the bare step, in one process by turns."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import turns


def runner(blocks: int, block: int, overrides: Sequence[str] = (), **case: Unpack[turns.Case]) -> dict[str, Any]:
    """Seconds of our step and of the bare one: `run(cfg)` with its defaults, MLflow and log points included.

    The default objective too: conditions are dropped, and the decoder has its variational term, neither of which the
    bare step computes.
    """
    import doors

    measured = turns.against_bare(block, case)
    turns.hook(measured)
    steps = turns.steps_for(blocks, block, block // 2) + 1  # the last one, which checkpoints, is in no block
    doors.train(doors.compose([*overrides_for(**case), *overrides, f"trainer.max_steps={steps}", "name=steps"]))
    return measured.summary()


def overrides_for(**case: Unpack[turns.Case]) -> list[str]:
    """What a comparison fixes; all else is as a user gets it. The schedule tells `turns` of every step."""
    return [
        f"model={case['stage']}",
        f"weights.prior={Path(case['pipelines']) / 'prior'}",
        f"weights.decoder={Path(case['pipelines']) / 'decoder'}",
        f"data.path={case['pictures']}",
        f"data.resolution={case['resolution']}",
        f"trainer.batch_size={case['batch']}",
        f"output_root={case['root']}",
        "scheduler._target_=schedule.constant",
    ]
