"""What encoding at true size takes of the memory, planned and measured: a LoRA run of each stage, bf16, 512 px, CPU.

    python tests/bench/true_size.py FOLDER [prior] [decoder] [--images 6]

FOLDER takes fp16 weights of random numbers, 10 GB, which stay there for the next time. 16 GB of memory have to be free.
The peak of the process until everything is encoded; the run is ended then. Pages of files that are mapped while weights
are read count as its own, and the system drops them where memory is short; so its anonymous memory stands beside it,
measured every 10 ms, and the plan without these pages.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import filled
import planned
from networks import TRUE_SIZE

from kandinsky_exp.system import host_memory

NEEDED = 16e9  # bytes
LIMIT = 0.1
RUN = ["precision=bf16", "adapter=lora", "data=emoji", "data.resolution=512", "trainer.max_steps=1", "tracker=none"]
TABLES = 2  # of what trains and of what is held out
ENCODES = ("loading", "encoding")


# --- a plan and its run


def plan(words: list[str]) -> dict[str, tuple[float, float]]:
    """(GB, GB without mapped files) of each phase."""
    text = subprocess.run(planned.command("plan", *words), check=True, capture_output=True, text=True).stdout
    names = re.search(r"^GB +(.*)$", text, re.MULTILINE)[1].split()
    rows = {
        title: [float(cell.replace("–", "0")) for cell in found[1].split()]
        for title in ("mapped files", "together")
        if (found := re.search(rf"^{title} +(.*)$", text, re.MULTILINE))
    }
    together, mapped = rows["together"], rows.get("mapped files", [0.0] * len(names))
    return {name: (whole, whole - files) for name, whole, files in zip(names, together, mapped, strict=True)}


def run(words: list[str], root: Path) -> tuple[float, float]:
    """(GB at most, GB of anonymous memory at most) until everything is encoded; what comes then is not waited for."""
    with (root / "log.txt").open("w") as log:
        process = subprocess.Popen(planned.command("train", *words), stdout=log, stderr=log)
    peak, anonymous = 0.0, 0.0
    while len(list(root.glob("cache/*/table.json"))) < TABLES:
        assert process.poll() is None, (root / "log.txt").read_text()
        text = Path(f"/proc/{process.pid}/status").read_text()
        status = dict(re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB$", text, re.MULTILINE))
        if len(status) == 2:
            peak = int(status["VmHWM"]) * 1024 / 1e9
            anonymous = max(anonymous, int(status["RssAnon"]) * 1024 / 1e9)
        time.sleep(0.01)
    process.kill()
    process.wait()
    return peak, anonymous


def compare(stage: str, words: list[str], root: Path) -> bool:
    """Prints the lines of a stage; whether all are within the limit."""
    root.mkdir(parents=True, exist_ok=True)
    words = [*words, f"model={stage}", f"output_root={root}"]
    phases, found, good = plan(words), run(words, root), True
    for kind, place in (("", 0), (", anonymous", 1)):
        said = max(phases[name][place] for name in ENCODES)
        good = good and abs(said / found[place] - 1) <= LIMIT
        print(f"{stage + kind:<20}{said:>9.2f}{found[place]:>10.2f}{said / found[place] - 1:>+8.0%}", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="*", default=["prior", "decoder"])
    parser.add_argument("--images", type=int, default=6)
    arguments = parser.parse_args()
    if host_memory.available() < NEEDED:
        sys.exit(f"{NEEDED / 1e9:.0f} GB of memory have to be free, and {host_memory.available() / 1e9:.1f} are")
    weights = filled.settings(filled.write(TRUE_SIZE, arguments.folder / "weights"))
    words = [*RUN, f"data.max_samples={arguments.images}", *weights]
    print(f"{'GB':<20}{'planned':>9}{'measured':>10}")
    roots = {stage: arguments.folder / f"{stage}-{os.getpid()}" for stage in arguments.stages}
    good = [compare(stage, words, root) for stage, root in roots.items()]
    if not all(good):
        sys.exit(f"not within {LIMIT:.0%}")


if __name__ == "__main__":
    main()
