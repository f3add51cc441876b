"""Settings that name metrics: what a validation measures, and what a sweep ranks by."""

from collections.abc import Callable, Iterator
from typing import Any, get_args

from kandinsky_exp.config import schema, set_entries
from kandinsky_exp.errors import cut

LOSSES = ("validation/loss", "train/loss")  # of every run


def problems(good: dict[str, Any], stage: Callable[[], Any]) -> Iterator[tuple[str, str]]:
    """(key, what is wrong; what to do), see `consistency`."""
    drawn = good.get("validation.metrics") or []
    if drawn and "hint" in getattr(stage(), "prompt_inputs", ()):
        yield "validation.metrics", "captions alone say nothing of a decoder that draws hints; leave it out"
    objective = good.get("sweep.objective", LOSSES[0])
    if objective in LOSSES or (made := stage()) is None:
        return
    losses = [*(f"loss_{name}" for name in made.measures)]
    names = [*losses, *made.judges, *drawn]
    names += [f"{name}/{loss}" for name in set_entries.entries(good) for loss in ("loss", *losses)]
    recorded = [*LOSSES, *(f"validation/{name}" for name in names)]
    if objective not in recorded:
        how = f"it records {', '.join(recorded)}"
        if objective in [f"validation/{name}" for name in get_args(schema.DrawnMetric)]:
            how = f"set validation.metrics=[{objective.partition('/')[2]}]"
        yield "sweep.objective", f"this run does not record {cut(objective)}; {how}"
