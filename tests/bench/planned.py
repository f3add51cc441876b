"""What `kandinsky-exp plan` says of the memory of runs, and what is measured, each run in a process of its own.

    python tests/bench/planned.py FOLDER [ROW ...]

FOLDER takes the bench-size pipelines and the runs. Batches are large, so that tensors and not Python take the memory.
A row has the phases of its run; the exit code is 1 if one is further off than the plan says.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from networks import write_pipelines

sys.path.append(str(Path(__file__).parents[1] / "support"))
import phase_peaks

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
TITLES = ("GB", "together", "accuracy on a CPU")
COMMON = ["data=emoji", "data.max_samples=8", "data.resolution=256", "tracker=none", "trainer.max_steps=2"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "kandinsky_exp", *words]


def planned(words: list[str]) -> dict[str, tuple[float, float]]:
    """(GB, by which part of it that may be wrong) of each phase of the plan."""
    text = subprocess.run(command("plan", *words), check=True, capture_output=True, text=True).stdout
    rows = [re.search(rf"^{title} +(.*)$", text, re.MULTILINE)[1].split() for title in TITLES]
    return {name: (float(gb), float(share.strip("±%")) / 100) for name, gb, share in zip(*rows, strict=True)}


def measured(words: list[str], log: Path) -> dict[str, float]:
    """GB of the process at most in each phase."""
    found = log.with_suffix(".json")
    with log.open("w") as file:
        child = [sys.executable, phase_peaks.__file__, str(found), *words]
        code = subprocess.run(child, stdout=file, stderr=file).returncode
    assert code == 0, log.read_text()
    return {phase: peak / 1e9 for phase, peak in json.loads(found.read_text()).items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", nargs="*", default=list(ROWS))
    arguments = parser.parse_args()
    places = write_pipelines(arguments.folder)
    weights = [f"weights.{side}={place}" for side, place in places.items()]
    print(f"{'GB':<42}{'planned':>9}{'measured':>10}")
    good = True
    for row in arguments.rows:
        words = [*COMMON, *weights, *ROWS[row], f"output_root={arguments.folder / row}"]
        phases = planned(words)
        for phase, found in measured(words, arguments.folder / f"{row}.txt").items():
            said, accuracy = max(phases[name] for name in phase_peaks.ENDS[phase][1] if name in phases)
            good = good and abs(said / found - 1) <= accuracy
            print(f"{f'{row}, {phase}':<42}{said:>9.2f}{found:>10.2f}{said / found - 1:>+8.0%}", flush=True)
    if not good:
        sys.exit("not as near as the plan says")


if __name__ == "__main__":
    main()
