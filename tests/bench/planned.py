"""What `kandinsky-exp plan` says of the memory of runs, and what these runs come to, each in a process of its own.

    python tests/bench/planned.py FOLDER [ROW ...]

FOLDER takes the bench-size pipelines and the runs. Batches are large, so that tensors and not Python take the memory.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from networks import write_pipelines

PRIOR = ["model=prior", "trainer.batch_size=256"]
DECODER = ["model=decoder", "data.resolution=512", "trainer.batch_size=8"]
ROWS = {
    "prior": PRIOR,
    "prior-checkpointing-average": [*PRIOR, "trainer.gradient_checkpointing=true", "trainer.ema_decay=0.9"],
    "prior-adafactor": [*PRIOR, "optimizer=adafactor"],
    "prior-lora-bf16": [*PRIOR, "adapter=lora", "precision=bf16"],
    "decoder": DECODER,
    "decoder-checkpointing": [*DECODER, "trainer.gradient_checkpointing=true"],
    "decoder-lora": [*DECODER, "adapter=lora"],
    "decoder-online": [*DECODER, "data.cache=false"],
}
COMMON = ["data=emoji", "data.max_samples=8", "data.resolution=256", "tracker=none", "trainer.max_steps=2"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "kandinsky_exp", *words]


def planned(words: list[str]) -> float:
    """GB."""
    text = subprocess.run(command("plan", *words), check=True, capture_output=True, text=True).stdout
    found = re.search(r"memory +([\d.,]+) GB at most", text)
    assert found is not None, text
    return float(found[1].replace(",", ""))


def peak(words: list[str], log: Path) -> float:
    """GB of the process at most, as `train/peak_memory_gb` has it."""
    with log.open("w") as file:
        process = subprocess.Popen(command("train", *words), stdout=file, stderr=file)
        _, code, usage = os.wait4(process.pid, 0)
    assert code == 0, log.read_text()
    return usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    arguments = parser.parse_args()
    places = write_pipelines(arguments.folder)
    weights = [f"weights.{side}={place}" for side, place in places.items()]
    print(f"{'':<30}{'planned':>9}{'measured':>10}{'':>8}")
    for row in arguments.rows:
        root = arguments.folder / row
        words = [*COMMON, *weights, *ROWS[row], f"output_root={root}"]
        said, found = planned(words), peak(words, arguments.folder / f"{row}.txt")
        print(f"{row:<30}{said:>9.2f}{found:>10.2f}{said / found - 1:>+8.0%}", flush=True)


if __name__ == "__main__":
    main()
