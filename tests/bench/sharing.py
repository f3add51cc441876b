"""Item 3: two processes that encode one data set, beside one: images per second once all of them have started.

What this imports at its top is small: the process that starts the others stays small.
"""

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import machine


def throughput(settings: dict[str, Any], rows: int, rounds: int, work: Path) -> dict[str, float]:
    """Images per second of one and of two processes, by turns, and their ratio.

    Args:
        settings: of `encode`, but for those of the round.
        rows: examples; each has a caption of its own.
    """
    listed = write_list(Path(settings["pictures"]), rows)
    one, two = [], []
    for number in range(rounds):
        for found, processes in ((one, 1), (two, 2)):
            place = {**settings, "listed": listed, "root": Path(settings["root"]) / f"{processes}-{number}"}
            found.append(rows / seconds(place, processes, work))
    ratio = statistics.median(both / alone for alone, both in zip(one, two, strict=True))
    return {"one": statistics.median(one), "two": statistics.median(two), "ratio": ratio}


def write_list(pictures: Path, rows: int) -> Path:
    """A list that names the pictures of a folder over and over, each time with another caption."""
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text("utf-8").splitlines()]
    named = [lines[row % len(lines)] | {"text": f"{lines[row % len(lines)]['text']}, {row}"} for row in range(rows)]
    file = pictures / f"list-{rows}.jsonl"
    file.write_text("\n".join(json.dumps({"image": one["file_name"], "text": one["text"]}) for one in named), "utf-8")
    return file


def seconds(settings: dict[str, Any], processes: int, work: Path) -> float:
    """From the moment when all processes are ready to the end of the last one."""
    root = Path(settings["root"])
    root.mkdir(parents=True)
    with ThreadPoolExecutor(processes) as pool:
        each = [{**settings, "number": number, "processes": processes} for number in range(processes)]
        answers = [pool.submit(machine.child, "sharing.encode", one, work) for one in each]
        while len(list(root.glob("ready-*"))) < processes:
            assert not any(answer.done() for answer in answers), [answer.result() for answer in answers]
            time.sleep(0.01)
        began = time.time()
        (root / "go").touch()
        return max(float(answer.result()["ended"]) for answer in answers) - began


def encode(
    stage: str, pipelines: str, pictures: str, listed: str, root: str, resolution: int, number: int, processes: int
) -> dict[str, float]:
    """What one process does: it gets ready, waits for the others, and makes parts until all are there."""
    from bare import examples
    from bare import stage as make_stage
    from doors import encode_table

    from kandinsky_exp.data import sources
    from kandinsky_exp.data.encoded.workers import collate

    made = make_stage(stage, pipelines, resolution)
    made.encode(collate(examples(made, pictures, 8)))  # warms up
    (Path(root) / f"ready-{number}").touch()
    while not (Path(root) / "go").exists():
        time.sleep(0.002)
    encode_table(sources.listing(listed).train, made, Path(root) / "table", processes)
    return {"ended": time.time()}
