"""Runs that commit f809304 left go on, are drawn from and compared; `tools/make_old_runs.py` made them."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from commands import start_server
from drawing import drawn
from running import history, runs
from sweeping import family

from kandinsky_exp import cli

ARCHIVE = Path(__file__).parent / "old_runs.tar.xz"
MADE_IN = "/tmp/outputs"
LATER = "trainer.max_steps=6"


class Old(NamedTuple):
    """The outputs folder, which lies elsewhere than where it was made, and what is known of it."""

    root: Path
    facts: dict[str, Any]

    def command(self, name: str, *more: str) -> None:
        """The command that made a run, given again."""
        cli.main([*(word.replace(MADE_IN, str(self.root)) for word in self.facts["commands"][name]), *more])

    def record(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / name / "run.json").read_text())


@pytest.fixture
def old(tmp_path: Path, tiny_folder: Path) -> Old:
    root = tmp_path / "outputs"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    facts = json.loads((root / "facts.json").read_text())
    for path, name in facts["same"].items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tiny_folder / name, root / path)
    return Old(root, facts)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_goes_on_as_if_nothing_had_changed(name: str, old: Old) -> None:
    """The optimizer, the average, the order of the data and the noise: a loss two steps later has them all."""
    before = old.record(name)
    old.command(name, LATER)
    after = old.record(name)
    assert (after["run_id"], after["status"], after["step"]) == (before["run_id"], "FINISHED", 6)
    assert after["validation_loss"] == pytest.approx(old.facts["losses"][name], rel=1e-5)
    assert list(history(old.root, after["run_id"], "train/loss")) == [1, 2, 3, 4, 5, 6]
    log = (old.root / name / "train.log").read_text()
    assert f"going on from {old.root}/{name}/checkpoints/step-00000004: step 4 of 6" in log


def test_what_was_not_delivered_is(old: Old) -> None:
    run_id = old.record("waiting")["run_id"]
    assert len(history(old.root, run_id, "train/loss")) < 40
    old.command("waiting")
    assert not (old.root / "waiting" / "outbox").exists()
    assert list(history(old.root, run_id, "train/loss")) == [*range(1, 41)]
    assert {run.info.run_id: run.info.status for run in runs(old.root)}[run_id] == "FINISHED"


def test_a_sweep_goes_on_and_is_compared(old: Old, capsys: pytest.CaptureFixture[str]) -> None:
    start_server()  # the process that jobs are forked from
    parent, before = family(old.root, "rates")
    old.command("rates", LATER)
    again, after = family(old.root, "rates")
    assert again.info.run_id == parent.info.run_id
    assert {name: run.info.run_id for name, run in after.items()} == {n: run.info.run_id for n, run in before.items()}
    losses = {name: loss for name, loss in old.facts["losses"].items() if name.startswith("rates/")}
    assert len(losses) == 2
    assert {name: old.record(name)["validation_loss"] for name in losses} == pytest.approx(losses, rel=1e-5)
    capsys.readouterr()
    cli.main(["compare", "sweep=rates", f"output_root={old.root}"])
    report = (old.root / "compare" / "rates" / "report.html").read_text("utf-8")
    assert all(run.info.run_id in report for run in after.values())


def test_results_are_drawn_from_and_compared(old: Old) -> None:
    words = [f"prior={old.root}/full", f"decoder_adapter={old.root}/lora"]
    images = drawn(old.root, "old", *words)
    base = drawn(old.root, "base", "weights=tiny")
    assert len(images) == len(base) == 2
    assert not np.array_equal(images, base)
    cli.main(["compare", "runs=full,lora,waiting", f"output_root={old.root}", "name=three"])
    report = (old.root / "compare" / "three" / "report.html").read_text("utf-8")
    assert all(old.record(name)["run_id"] in report for name in ("full", "lora", "waiting"))
    assert "a dog" in report


def test_one_is_evaluated_and_goes_on_to_its_best(old: Old, capfd: pytest.CaptureFixture[str]) -> None:
    """Its config has fewer keys, and its checkpoints know no progress; it held out fewer pictures than it takes."""
    with pytest.raises(SystemExit):
        cli.main(["evaluate", f"run={old.root}/full", "weights=tiny", f"output_root={old.root}"])
    assert "pictures are held out, and it takes 16 to measure" in capfd.readouterr().err
    old.command("full", LATER, "checkpoint.result=best")
    record = old.record("full")
    assert record["status"] == "FINISHED"
    assert record["result_step"] in (4, 6)
