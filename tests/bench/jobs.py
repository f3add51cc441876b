"""What a further job of a sweep costs, beside the same run as a command: `python tests/bench/jobs.py FOLDER`.

Runs of one step of the tiny prior without a tracker: nearly all of it is what a start costs. Let nothing else run.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

RUN = ["model=prior", "weights=tiny", "data=emoji", "data.max_samples=8", "trainer.max_steps=1", "tracker=none"]
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local"],
    "ray": ["hydra/launcher=ray"],
}
FEW, MANY = 2, 8


def seconds(root: Path, *words: str) -> float:
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "kandinsky_exp", *words, *RUN, f"output_root={root}"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.monotonic() - began


def main() -> None:
    root = Path(sys.argv[1])
    seconds(root, "name=first")  # it encodes
    alone = seconds(root, "name=second")
    print(f"one run, by a command of its own: {alone:.1f} s")
    for name, settings in LAUNCHERS.items():
        taken = [
            seconds(root, "--multirun", f"seed=range({count})", f"name={name}{count}", *settings)
            for count in (FEW, MANY)
        ]
        each = (taken[1] - taken[0]) / (MANY - FEW)
        print(f"{name}: a sweep of {FEW} jobs {taken[0]:.1f} s, each further job {each:.2f} s")


if __name__ == "__main__":
    main()
