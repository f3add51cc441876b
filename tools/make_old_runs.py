"""Make `tests/runs/old_runs.tar.xz`: what commit f809304 left of its runs, as small as it gets.

    git worktree add /tmp/kandinsky-exp f809304       and an environment whose kandinsky_exp is the one there
    python tools/make_old_runs.py tests/runs/old_runs.tar.xz

Everything lies under /tmp, so that no path of a machine is in it: a run of all weights with EMA, LoRA, a
run whose last records were not delivered, a sweep. What is in the tiny weights too is left out; `facts.json` has where
it was, the commands that made the runs, and the losses that f809304 itself comes to two steps later.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import sys
import tarfile
import threading
import time
from pathlib import Path

from diffusers import PriorTransformer

from kandinsky_exp import cli
from kandinsky_exp.tiny import architecture, pipelines

ROOT = Path("/tmp/outputs")
LATER = "trainer.max_steps=6"
SMALL = [
    "weights=tiny", "data=emoji", "data.max_samples=12", "trainer.max_steps=4", "trainer.batch_size=4",
    "trainer.log_every=1", "optimizer.lr=1e-3", "validation.every=2", "validation.inference_steps=2",
    "validation.draws=1", "validation.reconstructions=0", "checkpoint.every=2", "checkpoint.keep=1",
    f"output_root={ROOT}",
]  # fmt: skip
PRIOR = ["model=prior", f"weights.prior={ROOT}/base"]
RUNS = {
    "full": [*PRIOR, "name=full", "trainer.ema_decay=0.9", "validation.prompts=[a dog]"],
    "lora": ["model=decoder", "name=lora", "adapter=lora", "adapter.rank=1"],
    "waiting": [*PRIOR, "name=waiting", "trainer.max_steps=40", "validation.every=20", "checkpoint.every=20"],
    "rates": ["--multirun", *PRIOR, "name=rates", "optimizer.lr=1e-3,2e-3"],
}


def main(target: Path) -> None:
    shutil.rmtree(ROOT, ignore_errors=True)
    tiny = pipelines.build(ROOT / "cache")
    make_base(tiny)
    for name, overrides in RUNS.items():
        if name == "waiting":
            locked([*SMALL, *overrides])
            assert (ROOT / "waiting" / "outbox").is_dir()
        else:
            cli.main([*SMALL, *overrides])
    left = Path("/tmp/old_runs")
    shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(ROOT, left, ignore=shutil.ignore_patterns("cache", "*.lock", "report", "compare", "lock"))
    commands = {name: [*SMALL, *overrides] for name, overrides in RUNS.items()}
    facts = {"commands": commands, "same": leave_out(left, tiny), "losses": losses_later()}
    (left / "facts.json").write_text(json.dumps(facts, indent=1))
    pack(left, target)


def pack(left: Path, target: Path) -> None:
    with contextlib.closing(sqlite3.connect(left / "mlflow.db")) as store:
        store.execute("VACUUM")
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for path in sorted(left.rglob("*")):
            if path.is_file():
                archive.add(path, path.relative_to(left), recursive=False, filter=anonymous)


def make_base(tiny: Path) -> None:
    """The tiny weights with a prior of a few thousand numbers."""
    shutil.copytree(tiny, ROOT / "base")
    made = PriorTransformer(num_attention_heads=1, attention_head_dim=8, num_layers=1, embedding_dim=64)
    architecture.randomize(made, 0)
    made.clip_std.data.fill_(1)
    made.save_pretrained(ROOT / "base" / "prior_prior")


def locked(words: list[str]) -> None:
    """Train a run whose store is locked from its first step on."""
    done = threading.Event()

    def lock() -> None:
        log = ROOT / "waiting" / "train.log"
        while not (log.is_file() and "step 1 of" in log.read_text()):
            time.sleep(0.005)
        connection = sqlite3.connect(ROOT / "mlflow.db", timeout=60, check_same_thread=False)
        connection.execute("BEGIN EXCLUSIVE")
        done.wait()
        connection.rollback()
        connection.close()

    thread = threading.Thread(target=lock)
    thread.start()
    try:
        cli.main(words)
    finally:
        done.set()
        thread.join()


def leave_out(folder: Path, tiny: Path) -> dict[str, str]:
    """Remove what is in the tiny weights too; {its path: its path there}."""
    known = {digest(path): str(path.relative_to(tiny)) for path in tiny.rglob("*") if path.is_file()}
    found = {path: known[digest(path)] for path in folder.rglob("*") if path.is_file() and digest(path) in known}
    for path in found:
        path.unlink()
    return {str(path.relative_to(folder)): name for path, name in sorted(found.items())}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def losses_later() -> dict[str, float]:
    """The validation losses two steps later; by the runs' folders."""
    for name in ("full", "lora", "rates"):
        cli.main([*SMALL, *RUNS[name], LATER])
    records = [
        *(ROOT / name / "run.json" for name in ("full", "lora", "waiting")),
        *ROOT.glob("rates/optimizer*/run.json"),
    ]
    return {str(path.parent.relative_to(ROOT)): json.loads(path.read_text())["validation_loss"] for path in records}


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    os.environ.update(USER="user", LOGNAME="user")
    main(Path(sys.argv[1]))
