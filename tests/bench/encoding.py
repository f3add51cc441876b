"""Item 3: encoding a folder of pictures, all told, against the encoders alone in large batches on tensors in memory."""

import statistics
import time
from pathlib import Path
from typing import Any


def throughput(
    stage: str, pipelines: str, pictures: str, root: str, resolution: int, batch: int, rounds: int
) -> dict[str, Any]:
    """Images per second of both, by turns.

    Encoding reads, decodes, crops and tokenizes, runs the encoders and writes the table. The encoders alone see as many
    images, with one caption each, whose tensors were made before.
    """
    from bare import examples
    from bare import stage as make_stage
    from doors import encode_table

    from kandinsky_exp.data import sources
    from kandinsky_exp.data.encoded.workers import collate

    made, source = make_stage(stage, pipelines, resolution), sources.folder(pictures).train
    rows = examples(made, pictures, len(source))
    batches = [collate(rows[start : start + batch]) for start in range(0, len(rows), batch)]
    whole, alone = [], []
    made.encode(batches[0])  # warms up
    for round_number in range(rounds):
        since = time.perf_counter()
        encode_table(source, made, Path(root) / f"table-{round_number}")
        whole.append(len(source) / (time.perf_counter() - since))
        since = time.perf_counter()
        for tensors in batches:
            made.encode(tensors)
        alone.append(len(source) / (time.perf_counter() - since))
    return {
        "encode": statistics.median(whole),
        "encoders": statistics.median(alone),
        "ratio": statistics.median(one / other for one, other in zip(whole, alone, strict=True)),
    }
