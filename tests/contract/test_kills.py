"""SIGKILL at random moments: the weights are those of an undisturbed run, the records have no gap and nothing twice.

`nox -s soak` kills one run 50 times; the ordinary tests a few times, at the moments that matter most.
"""

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import start
from running import client, history, network, runs, same, train

LOG = 5
Moment = Callable[[Path], object]


def settings(steps: int) -> list[str]:
    return [
        "model=prior", f"trainer.max_steps={steps}", f"trainer.log_every={LOG}", f"validation.every={steps // 4}",
        "checkpoint.every=5", "trainer.ema_decay=0.9", "validation.prompts=[a red heart]", "data.max_samples=null",
    ]  # fmt: skip


def attempt(root: Path, moment: Moment | None, steps: int) -> tuple[int, str]:
    """Start the run `killed` and kill it at a moment; its exit code, and what it printed."""
    process = start(root, *settings(steps), "name=killed")
    if moment is not None and process.lives_until(lambda: moment(root)):
        process.kill()
    output = process.finish()
    assert process.code is not None
    return process.code, output


class Training:
    """Whether this start trains yet, and whether it has come to a new checkpoint: else no start would get anywhere."""

    def __init__(self) -> None:
        self.size: int | None = None
        self.newest = ""
        self.begun: float | None = None

    def lines(self, root: Path) -> int:
        """How often the log has spoken of a step."""
        log = root / "killed" / "train.log"
        text = log.read_text() if log.is_file() else ""
        if self.size is None:
            self.size, self.newest = len(text), newest(root)
        return text[self.size :].count("step ")

    def seconds(self, root: Path, lines: int = 1) -> float:
        """Since the log has spoken of a step so often; negative before."""
        if self.begun is None and self.lines(root) >= lines:
            self.begun = time.monotonic()
        return -1.0 if self.begun is None else time.monotonic() - self.begun

    def advanced(self, root: Path) -> bool:
        return self.seconds(root) >= 0 and newest(root) > self.newest


def newest(root: Path) -> str:
    return max((path.name for path in root.glob("killed/checkpoints/step-*")), default="")


def after(seconds: float, lines: int = 1) -> Moment:
    """So long after the log has spoken of a step so often."""
    training = Training()
    return lambda root: training.seconds(root, lines) >= seconds


def finds(pattern: str) -> Moment:
    """As soon as there is such a file."""
    return lambda root: any(root.glob(pattern))


def finds_later(pattern: str) -> Moment:
    """As soon as there is such a file, and a checkpoint more than there was."""
    training = Training()
    return lambda root: training.advanced(root) and any(root.glob(pattern))


ENCODING = finds("cache/*.partial/.00000.*/images.arrow")
RECORDED = finds("killed/run.json")
CHECKPOINT = "killed/checkpoints/.step-*.part/*"
WRITING = "killed/outbox/*/*"


def killed_over_and_over(root: Path, moments: list[Moment], steps: int) -> int:
    """How many of the kills met a run that was alive."""
    undisturbed(root, steps)
    codes = []
    for moment in moments:
        code, output = attempt(root, moment, steps)
        assert code in (-signal.SIGKILL, 0), output[-3000:]
        codes.append(code)
    code, output = attempt(root, None, steps)
    assert code == 0, output[-3000:]
    check(root, steps)
    return codes.count(-signal.SIGKILL)


def undisturbed(root: Path, steps: int) -> None:
    """The run `whole`; the killed one encodes for itself."""
    train(root, *settings(steps), "name=whole")
    (root / "cache").rename(root / "spare")


def check(root: Path, steps: int) -> None:
    parts = [root / name / "pipeline" / "prior" for name in ("whole", "killed")]
    assert same(*map(network, parts))
    (run,) = [found for found in runs(root) if found.info.run_name == "killed"]
    assert {found.info.status for found in runs(root)} == {"FINISHED"}
    assert json.loads((root / "killed" / "run.json").read_text())["status"] == "FINISHED"
    assert not (root / "killed" / "outbox").exists()
    whole = next(found for found in runs(root) if found.info.run_name == "whole").info.run_id
    for key in run.data.metrics:
        points = client(root).get_metric_history(run.info.run_id, key)
        expected = range(0, steps + 1, steps // 4) if key == "validation/loss" else range(LOG, steps + 1, LOG)
        found = [point.step for point in points]
        assert len(found) == len(set(found)), f"{key}: twice"
        if not key.startswith("train/loss_t"):  # a quarter of the timesteps may be missing from a few steps
            assert sorted(found) == list(expected), key
        if "loss" in key or key == "train/grad_norm":
            assert history(root, run.info.run_id, key) == history(root, whole, key), key
    files = [file.path for file in client(root).list_artifacts(run.info.run_id, "images")]
    images = ["+".join(path.split("+")[:3]) for path in files if path.endswith(".png")]
    assert sorted(images) == sorted(set(images)), "an image twice"
    assert len(images) == 2 * 5  # the prompt's and the grid


@pytest.mark.slow
def test_killed_where_it_hurts(tmp_path: Path) -> None:
    moments = [RECORDED, ENCODING, finds(CHECKPOINT), finds_later(CHECKPOINT), finds_later(WRITING),
               after(0.05, lines=2)]  # fmt: skip
    assert killed_over_and_over(tmp_path, moments, steps=60) >= 5


@pytest.mark.slow
@pytest.mark.soak
def test_killed_fifty_times(tmp_path: Path) -> None:
    chance = random.Random(0)
    moments: list[Moment] = [RECORDED, ENCODING]
    while len(moments) < 50:
        # By lines, a checkpoint and a log point every few steps: by seconds, a quick machine comes to the end before.
        anywhere = [after(chance.uniform(0, 0.1), chance.randint(1, 5)) for _ in range(4)]
        some = [finds_later(CHECKPOINT), finds_later(WRITING), *anywhere]
        moments.append(chance.choice(some))
    assert killed_over_and_over(tmp_path, moments, steps=800) == 50
