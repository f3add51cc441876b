"""The benchmarks at toy size: that they measure what they say, not what comes out."""

import json
import subprocess
import sys
import time
from pathlib import Path

import doors
import machine
import networks
import pictures
import pytest
import report
import rows
import torch
import turns

from kandinsky_exp.data import sources
from kandinsky_exp.parts import PARTS
from kandinsky_exp.weights import Weights

BENCH = Path(machine.HERE)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    networks.write_pipelines(folder)
    return folder


# --- the table


def test_a_table_says_what_misses_its_limit(tmp_path: Path) -> None:
    results = [
        report.Result(1, "ours / bare", {"ours ms": 105.5, "bare ms": 100.0}, 1.055, 1.05),
        report.Result(3, "encode / bare", {}, 0.95, 0.9, at_least=True),
        report.Result(5, "--cfg job", {"median s": 0.5}, 0.5, 1.5, unit="s"),
    ]
    head, first, second, third = report.table(results).splitlines()
    assert head.split() == ["item", "what", "measured", "value", "limit"]
    assert first.endswith("FAIL")
    assert "ours ms 105.5, bare ms 100" in first
    assert second.split()[-4:] == ["0.950×", "≥", "0.9×", "ok"]
    assert third.endswith("0.500 s  ≤ 1.5 s  ok")
    report.write_json(tmp_path / "out.json", machine.facts(), results)
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [line["ok"] for line in found["results"]] == [False, True, True]
    assert found["machine"]["threads per process"] == 1


# --- turns


def test_two_loops_by_turns() -> None:
    taken = []

    def bare() -> None:
        taken.append(1)
        time.sleep(0.002)

    measured = turns.Turns(bare, block=4, offset=2)
    for _ in range(turns.steps_for(3, 4, 2)):
        time.sleep(0.006)
        measured()
    assert len(measured.pairs) == 4  # the first, which warms up, and three
    assert len(taken) == 16
    assert [len(block) for block, _ in measured.pairs] == [1, 4, 4, 4]
    found = measured.summary()
    assert found["pairs"] == 3
    assert 1.5 < found["ratio"] < 6
    assert found["step"] > 0.006 > found["bare"]


def test_only_the_steps_of_a_run_are_stamped(tmp_path: Path) -> None:
    import schedule

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    made = schedule.constant(optimizer, 10, stamps=str(tmp_path / "stamps"))
    assert not (tmp_path / "stamps").exists()
    for _ in range(3):
        optimizer.step()
        made.step()
    turns.hook(None)
    stamps = turns.read_stamps(tmp_path / "stamps")
    assert len(stamps) == 3
    assert stamps == sorted(stamps)
    assert "hook" not in str(made.state_dict())


# --- what is measured on


def test_networks_have_the_size_that_they_are_said_to_have(pipelines: Path) -> None:
    weights = Weights(str(pipelines / "prior"), str(pipelines / "decoder"), cache_folder=pipelines)
    sizes = {"prior": 4.3, "text_encoder": 10.4, "image_encoder": 6.5, "unet": 15.3, "movq": 1.2}
    for part, millions in sizes.items():
        count = sum(parameter.numel() for parameter in weights.load(part).parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.1)
    assert bool((weights.load("prior").clip_std == 1).all())
    assert set(PARTS) >= set(sizes)


def test_generated_pictures(tmp_path: Path) -> None:
    source = sources.folder(pictures.write(tmp_path / "some", 3, (40, 60))).train
    assert len(source) == 3
    assert 40 <= source[0].image().width <= 60
    many = sources.folder(pictures.write_many(tmp_path / "many", 100)).train
    assert len(many) == 100
    assert len({many[row].captions[0] for row in range(100)}) == 100


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_the_bare_step_trains(stage: str, pipelines: Path, tmp_path: Path) -> None:
    from bare import BareStep

    folder = pictures.write(tmp_path / "pictures", 2, (64, 80))
    step = BareStep(stage, str(pipelines), str(folder), 2, 64)
    before = [parameter.detach().clone() for parameter in step.network.parameters()]
    step()
    changed = [not torch.equal(old, new) for old, new in zip(before, step.network.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2


def test_a_cheap_cache_is_the_one_that_a_run_looks_for(tmp_path: Path) -> None:
    few = pictures.write_many(tmp_path / "few", 64)
    many = pictures.write_many(tmp_path / "many", 80)
    root = str(tmp_path / "root")
    assert rows.fill(str(many), root) == {"tables": 1}  # what trains and what is held out
    found = rows.measure(str(many), str(few), root, 5, 2)  # it refuses to go on where a run encodes
    turns.hook(None)
    assert found["step"] > 0
    assert found["start"] > 0
    assert found["memory"] > 100
    assert doors.encodings(Path(root)) == 1


# --- the programs


@pytest.mark.slow
def test_gpu_py_without_a_gpu_and_without_mlflow(tmp_path: Path) -> None:
    answer = tmp_path / "out.json"
    flags = ["--quick", "--device=cpu", "--peak-tflops=0.1", "--rows", "prior-b4-*d", f"--json={answer}"]
    done = subprocess.run([sys.executable, str(BENCH / "gpu.py"), *flags], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(answer.read_text("utf-8"))
    assert [row["row"] for row in found["rows"]] == ["prior-b4-cached", "prior-b4-published"]
    for row in found["rows"]:
        assert row["samples_per_second"] > 0
        assert row["utilisation"] == pytest.approx(row["tflops"] / 0.1)
    assert set(found["over_published"]) == {"prior-b4-cached"}


@pytest.mark.slow
def test_the_program_writes_its_table(tmp_path: Path) -> None:
    flags = ["--quick", "--only", "1", "--stages", "prior", "--json", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, str(BENCH / "run.py"), *flags], check=False, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [result["what"] for result in found["results"]] == ["prior: our step / bare step"]
    assert done.returncode == (0 if all(result["ok"] for result in found["results"]) else 1)
    assert "1     prior: our step / bare step" in done.stdout
    assert str(tmp_path) not in (tmp_path / "out.json").read_text("utf-8")
