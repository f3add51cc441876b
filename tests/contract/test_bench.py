"""The benchmarks at toy size: that they measure what they say, not what comes out."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doors
import machine
import networks
import pictures
import pytest
import report
import rows
import run
import torch
import turns
from PIL import Image

from kandinsky_exp.data import sources
from kandinsky_exp.data.encoded.table import FeatureTable
from kandinsky_exp.models.components import PARTS
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages.prior import PriorStage

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


# What the machine of a GPU may lack.
ABSENT = ["datasets", "matplotlib", "mlflow", "optuna", "plotly", "sqlalchemy", "torchvision"]

# As much of a published script as the measurement meets.
SCRIPT = """
import argparse, accelerate
from datasets import load_dataset
parser = argparse.ArgumentParser()
for name in ("train_data_dir", "max_train_steps", "mixed_precision"):
    parser.add_argument(f"--{name}")
given, _ = parser.parse_known_args()
assert given.mixed_precision == "bf16"
rows = load_dataset("imagefolder", data_files={"train": f"{given.train_data_dir}/**"})["train"]
rows = rows.with_transform(lambda some: some)
accelerator = accelerate.Accelerator(log_with="tensorboard")
for step in range(int(given.max_train_steps)):
    assert rows[step]["text"]
    accelerator.log({"train_loss": 1.0}, step=step)
raise SystemExit("nobody stopped it")
"""


def gpu_arguments(**given: Any) -> argparse.Namespace:
    plain = {"device": "cpu", "quick": True, "architecture": None, "reference": None, "peak_tflops": 0.1}
    return argparse.Namespace(**plain | given)


def test_rows_are_on_disk_when_they_are_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu

    chosen = [gpu.Row("prior", 2, 64, "cached"), gpu.Row("decoder", 2, 65, "cached"), gpu.Row("prior", 2, 64, "lora")]
    answer, on_disk = tmp_path / "out.json", []

    class Noting(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for row in super().__iter__():
                yield row
                on_disk.append([one["row"] for one in json.loads(answer.read_text("utf-8"))["rows"]])

    gpu.measure_all(Noting(chosen), gpu_arguments(json=answer), tmp_path)
    names = [row.name for row in chosen]
    assert on_disk == [names[:1], names[:2], names]
    first, wrong, last = json.loads(answer.read_text("utf-8"))["rows"]
    assert "multiple of 64" in wrong["problem"]
    for row in (first, last):
        assert row["samples_per_second"] > 0
        assert row["utilisation"] == pytest.approx(row["tflops"] / 0.1)
    assert first["tflop_per_step"] > last["tflop_per_step"], "an adapter has no gradients of the other weights"
    assert len(FeatureTable(tmp_path / "tables" / "prior")) == gpu.ROWS


def test_the_compiled_rows_come_last() -> None:
    import gpu

    kinds = [row.kind for row in gpu.rows(quick=False, published=True)]
    assert kinds.index("compiled") == len(kinds) - kinds.count("compiled") > 0
    assert "published" not in {row.kind for row in gpu.rows(quick=False, published=False)}
    assert networks.config(gpu.TRUE_SIZE, "prior")["num_layers"] == 20


def test_the_published_scripts_own_loop_is_timed(tmp_path: Path) -> None:
    import gpu

    (tmp_path / "train_text_to_image_prior.py").write_text(SCRIPT)
    plan = gpu.Plan(networks.BENCH, torch.device("cpu"), 2, 1, None, tmp_path, tmp_path)
    found = gpu.measure(gpu.Row("prior", 2, 64, "published"), plan)
    assert found.get("problem") is None
    assert found["ms_per_step"] > 0


def test_parts_of_the_first_minutes_note_what_they_find(tmp_path: Path) -> None:
    import gpu
    import gpu_first

    found: dict[str, dict[str, Any]] = {}
    plan = gpu.Plan(networks.BENCH, torch.device("cpu"), 1, 1, None, tmp_path)
    work = gpu_first.Work(plan, True, lambda name, **result: found.update({name: result}))
    gpu_first.attention(work)
    gpu_first.waits(work)
    gpu_first.planned(work, work.row("prior"))
    gpu_first.measured(work, work.row("decoder"), "norms", prepare=lambda stage: gpu_first.bf16_norms(stage.network))
    with work.caught("mine"):
        raise ValueError("of mine")
    assert found["attention masked 81"]["ms"] > 0
    assert found["prior-cached: no wait for the device"] == {"problem": gpu_first.NEEDS_CUDA}
    assert found["prefetched batches"] == {"batches": 20, "wrong": 0}
    assert found["prior-b2-cached: planned memory"]["planned_gb"] > 0.1
    assert "problem" not in found["decoder-64px-b2-cached norms"]
    assert found["mine"] == {"problem": "ValueError: of mine"}


def test_a_part_that_is_over_its_time_is_ended(tmp_path: Path) -> None:
    import gpu_first

    arguments = gpu_arguments(out=tmp_path, limit=0.01 - gpu_first.STARTS)
    gpu_first.limited(5, arguments, tmp_path)
    ended, done = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert "ended after" in ended["problem"]
    assert done["what"] == "done"


@pytest.mark.slow
def test_the_first_minutes_need_no_more_than_the_package_trains_with(tmp_path: Path) -> None:
    program = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); import gpu_first; gpu_first.main()"
    command = [sys.executable, "-c", program, str(tmp_path), "--quick", "--parts", "1,4"]
    environment = {**os.environ, "PYTHONPATH": str(BENCH)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [one for one in found if "problem" in one] == []
    assert {one["what"] for one in found} >= {"prior-bf16-full-cached", "decoder-bf16-lora-online", "prior-b2-cached"}


def test_true_size_weights_are_numbers_that_a_picture_gets_through(tmp_path: Path) -> None:
    import filled

    folder = filled.write(networks.BENCH, tmp_path / "weights")
    stage = PriorStage(Weights(str(folder / "prior"), str(folder / "decoder"), cache_folder=tmp_path))
    given = stage.preprocess(Image.new("RGB", (64, 64), "red"), "a red square")
    features = stage.encode({name: value.unsqueeze(0) for name, value in given.items()})
    assert all(bool(value.isfinite().all()) for value in features.values())
    assert features["text_embeds"].std() > 0.1
    assert bool((stage.network.clip_std == 1).all())


@pytest.mark.slow
@pytest.mark.soak
def test_the_program_writes_its_table(tmp_path: Path) -> None:
    flags = ["--quick", "--only", "1", "--stages", "prior", "--json", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, str(BENCH / "run.py"), *flags], check=False, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    found = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert [result["what"] for result in found["results"]] == [
        f"prior, batch {batch}: our step / bare step" for batch in (4, 16)
    ]
    assert done.returncode == (0 if all(result["ok"] for result in found["results"]) else 1)
    assert "1     prior, batch 4: our step / bare step" in done.stdout
    assert str(tmp_path) not in (tmp_path / "out.json").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.soak
def test_a_cold_epoch_is_the_commands_own(tmp_path: Path) -> None:
    seconds, megabytes = run.our_epoch(run.Bench(tmp_path, None, run.QUICK), "prior", "none")
    assert seconds > 1
    assert megabytes > 100
