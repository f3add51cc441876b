"""`kandinsky-exp evaluate`: runs, checkpoints, sweeps and pairs, measured on held-out captions."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from commands import Forked, command, launched
from PIL import Image
from running import client, composed, shared, train

from kandinsky_exp.data.examples import Example, Source, nothing
from kandinsky_exp.data.file_hashes import FileDigests
from kandinsky_exp.data.sources import EMOJI
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.evaluation.real_pictures import RealPictures
from kandinsky_exp.reports import report, run_data
from kandinsky_exp.runs.run_folder import RECORD, Record, read_record
from kandinsky_exp.runs.subjects import find_subjects
from kandinsky_exp.training.feature_reader import FeatureReader
from kandinsky_exp.verbs.evaluate import evaluate

QUICK = ["weights=tiny", "inference_steps=2", "prior_inference_steps=2"]
ALL = ["data.max_samples=null", "validation.every=100", "validation.reconstructions=0"]
METRICS = ["clip_score", "clip_score_heldout", "cmmd", "cmmd_floor", "precision", "recall", "diversity"]
METRICS += ["nearest_train", "nearest_heldout"]


@pytest.fixture(scope="module")
def root() -> Path:
    """A run of each stage and a sweep. A test evaluates there under names that no other test takes."""

    def make(folder: Path) -> None:
        train(folder, "model=decoder", "name=d", *ALL)
        train(folder, "model=prior", "name=p", *ALL, "tracker=none")
        jobs = folder / "s"
        shutil.copytree(folder / "cache", jobs / "cache")
        for rate in ("0.3", "1e-3", "1e-4", "1e-5"):  # the first one spoils the network
            train(jobs, "model=decoder", f"name=lr{rate}", f"optimizer.lr={rate}", *ALL, "tracker=none")
        shutil.copytree(jobs / "lr1e-5", jobs / "lr1e-6")
        shutil.rmtree(jobs / "lr1e-6" / "pipeline")
        (jobs / RECORD).write_text(json.dumps({**vars(Record()), "stage": "sweep"}))

    return shared("evaluate", make)


def evaluated(root: Path, name: str, *overrides: str) -> Any:
    evaluate(composed(root, f"name={name}", *QUICK, *overrides, verb="evaluate", small=[]))
    return json.loads((root / "evaluate" / name / "metrics.json").read_text())


def own(model: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = model["encoders"]["Kandinsky's own image encoder"]
    return found


def test_a_run_is_measured_and_its_record_has_the_numbers(root: Path) -> None:
    (model,) = evaluated(root, "run", f"run={root}/d")["models"]
    metrics = own(model)["metrics"]
    assert list(metrics) == METRICS
    assert all(
        metrics[key]["low"] <= metrics[key]["value"] <= metrics[key]["high"] for key in METRICS if key != "diversity"
    )
    assert metrics["cmmd"]["count"] == 16
    assert len(own(model)["closest"]) == 10
    folder = root / "evaluate" / "run"
    page = (folder / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "a 3d emoji of" in page
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > 500
    assert len(list((folder / "pictures").iterdir())) == 16 + 2 * 3  # two captions are drawn four times
    record = read_record(root / "d")
    assert record is not None
    run = client(root).get_run(record.run_id)
    for key in METRICS:
        assert run.data.metrics[f"evaluation/{key}"] == metrics[key]["value"]
    assert run.data.metrics["evaluation/cmmd_low"] == metrics["cmmd"]["low"]
    assert client(root).get_metric_history(record.run_id, "evaluation/cmmd")[-1].step == 4
    listed = {file.path for file in client(root).list_artifacts(record.run_id, "evaluate/run")}
    assert "evaluate/run/report.html" in listed
    columns = {column.key: column for column in report._columns(run_data.read(client(root), [record.run_id]))}
    assert columns["evaluation/cmmd"].cells[0].text == f"{metrics['cmmd']['value']:.4g}"
    assert "evaluation/cmmd_low" not in columns


def test_stopped_it_goes_on_and_comes_out_the_same(root: Path) -> None:
    words = [f"run={root}/d", "tracker=none", "batch_size=1", "num_images=8", "inference_steps=9"]
    pictures = root / "evaluate" / "stopped" / "pictures"
    process = Forked(command, ["evaluate", *QUICK, *words, f"output_root={root}", "name=stopped"])
    process.wait_until(lambda: (pictures / "00002.png").is_file())
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(ConfigError, match=r"name: another process evaluates in .*stopped"):
        evaluated(root, "stopped", *words)
    process.signal(signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    printed = process.finish()
    assert process.code == 143, printed
    assert not (pictures.parent / "report.html").exists()
    before = {file: file.stat().st_mtime_ns for file in pictures.glob("*.png")}
    assert 2 < len(before) < 11
    assert evaluated(root, "stopped", *words) == evaluated(root, "whole", *words)
    assert before == {file: file.stat().st_mtime_ns for file in before}  # none was drawn again
    for file in pictures.iterdir():
        assert file.read_bytes() == (root / "evaluate" / "whole" / "pictures" / file.name).read_bytes()


def test_two_processes_draw_together(root: Path) -> None:
    words = [f"run={root}/d", "tracker=none", "batch_size=2", "num_images=8"]
    typed = ["evaluate", *QUICK, *words, f"output_root={root}", "name=two"]
    both = [Forked(command, typed, environment=told) for told in launched(2)]
    printed = [process.finish() for process in both]
    assert [process.code for process in both] == [0, 0], printed
    assert all("drawing 6 pictures" in text or "drawing 5 pictures" in text for text in printed[:1])
    two = json.loads((root / "evaluate" / "two" / "metrics.json").read_text())
    assert two == evaluated(root, "alone", *words)


def test_a_run_is_found_by_its_name_and_by_its_id(root: Path, tmp_path: Path) -> None:
    record = read_record(root / "d")
    assert record is not None
    for text in (f"{root}/d", "d", str(record.run_id)):
        cfg = composed(root, "weights=tiny", f"run={text}", verb="evaluate", small=[])
        ((subject,), notes) = find_subjects(cfg, [], [])
        assert (subject.name, subject.step, subject.run_id, notes) == ("d", 4, record.run_id, [])
        assert subject.cfg.data.max_samples is None
        assert subject.origins["decoder"].run_folder == root / "d"
    # Of a run whose result is its best step's, that is the step that is measured.
    shutil.copytree(root / "d", tmp_path / "d")
    (tmp_path / "d" / RECORD).write_text(json.dumps({**vars(record), "result_step": 2}))
    cfg = composed(root, "weights=tiny", f"run={tmp_path}/d", verb="evaluate", small=[])
    assert find_subjects(cfg, [], [])[0][0].step == 2
    config = tmp_path / "d" / "config.yaml"
    config.write_text(config.read_text().replace("resolution: 64", "resolution: ${oc.env:HOME}"))
    with pytest.raises(ConfigError, match=r"run: .*config.yaml has interpolations"):
        find_subjects(cfg, [], [])


def test_of_a_sweep_what_cannot_be_measured_is_left_out(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "s", tmp_path / "s", ignore=shutil.ignore_patterns("lr1e-[36]", "lr0.3", "cache"))
    config = tmp_path / "s" / "lr1e-4" / "config.yaml"
    config.write_text(config.read_text().replace("max_samples: null", "max_samples: 12"))
    found = evaluated(root, "some", f"run={tmp_path}/s", "num_images=8", "tracker=none")
    assert [model["name"] for model in found["models"]] == ["lr1e-5"]
    assert any("lr1e-4 is left out: data: 12 pictures are held out" in note for note in found["notes"])


class Streamed(Source):
    """Is walked, and counts how often."""

    name, count, walks = "stream", 9, 0

    def examples(self, start: int = 0) -> Iterator[Example]:
        self.walks += 1
        yield from (Example(f"{n}", (f"caption {n}",), nothing, "here") for n in range(start, 9))

    def __getitem__(self, row: int) -> Example:
        raise AssertionError("it has to be walked for each row")

    def fingerprint(self, digests: FileDigests) -> str:
        return ""


def test_a_stream_is_walked_once_for_many_rows() -> None:
    source = Streamed()
    dataset = SimpleNamespace(source_row=lambda row: row + 1)
    reader = cast(FeatureReader, SimpleNamespace(source=source, dataset=dataset))
    assert [example.id for example in RealPictures(reader, range(9)).examples([1, 3, 6])] == ["2", "4", "7"]
    assert source.walks == 1


def test_a_checkpoint_is_measured_at_its_step(root: Path) -> None:
    (model,) = evaluated(root, "step", f"run={root}/d/checkpoints/step-00000002", "tracker=none")["models"]
    assert (model["name"], model["step"]) == ("d-step-00000002", 2)


def test_a_prior_is_measured_with_the_decoder_that_it_started_from(root: Path) -> None:
    found = evaluated(root, "prior", f"run={root}/p", "num_images=8")
    assert "8 of 16 held-out captions were drawn (num_images)" in found["notes"]
    (model,) = found["models"]
    assert own(model)["metrics"]["clip_score"]["count"] == 8
    assert own(model)["metrics"]["nearest_heldout"]["count"] == 16


def test_the_jobs_of_a_sweep_are_ranked(root: Path) -> None:
    found = evaluated(root, "sweep", f"run={root}/s", "num_images=8")
    scores = [own(model)["metrics"]["cmmd"]["value"] for model in found["models"]]
    assert scores == sorted(scores)
    assert [model["name"] for model in found["models"]][-1] == "lr0.3"
    assert len(found["models"]) == 4
    assert any(note.startswith("lr1e-6 is left out: run: ") for note in found["notes"])
    page = (root / "evaluate" / "sweep" / "report.html").read_text()
    assert page.index('<th scope="row">lr1e-') < page.index('<th scope="row">lr0.3')


def test_a_pair_is_measured_on_any_data(root: Path) -> None:
    given = [f"prior={root}/p", f"decoder={root}/d", f"data.path={EMOJI}", "data.resolution=64"]
    (model,) = evaluated(root, "pair", *given, "num_images=8")["models"]
    assert model["name"] == "p-d"
    assert own(model)["metrics"]["cmmd"]["count"] == 8


def test_another_encoder_judges_besides(root: Path, tiny_folder: Path, tmp_path: Path) -> None:
    judge = tmp_path / "judge"
    shutil.copytree(tiny_folder / "prior_image_encoder", judge)
    shutil.copy(tiny_folder / "prior_image_processor" / "preprocessor_config.json", judge)
    (model,) = evaluated(root, "judged", f"run={root}/p", f"encoder={judge}", "tracker=none", "num_images=8")["models"]
    beside = model["encoders"]["judge"]["metrics"]
    assert list(beside) == [name for name in METRICS if not name.startswith("clip_score")]
    # It is a copy of Kandinsky's own; a table's features are rounded to half precision.
    assert beside["nearest_train"]["value"] == pytest.approx(own(model)["metrics"]["nearest_train"]["value"], rel=1e-2)


def test_a_name_belongs_to_one_evaluation(root: Path) -> None:
    evaluated(root, "taken", f"run={root}/d", "num_images=8", "tracker=none")
    with pytest.raises(ConfigError, match=r"name: .*taken holds another evaluation \(captions, seed differ\)"):
        evaluated(root, "taken", f"run={root}/d", "num_images=8", "tracker=none", "seed=1")
    (root / "evaluate" / "mine").mkdir()
    (root / "evaluate" / "mine" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"name: .*mine exists already and is no evaluation"):
        evaluated(root, "mine", f"run={root}/d", "num_images=8", "tracker=none")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run={root}/d", "num_images=17"], "num_images: 17 is more than the 16 held-out captions"),
        (["run={root}/nowhere"], "run: '.*nowhere' is no run, checkpoint or sweep"),
        (["run={root}/s/lr1e-6"], "run: .* is finished, but its result is gone"),
        (["run={root}/d", "decoder=tiny"], "decoder: run=.*d is the decoder; leave one of them out"),
        (["run={root}/d", "encoder={root}"], "encoder: .* has no config.json of a vision model"),
        (["data=emoji", "decoder=tiny_control"], "decoder: it draws hints"),
        (["data=emoji", "data.max_samples=12"], "data: 12 pictures are held out, and it takes 16"),
        (["data.path={emoji}/train", "validation.fraction=0"], "data: nothing is held out"),
    ],
)
def test_what_cannot_be_measured_is_told(words: list[str], told: str, root: Path) -> None:
    typed = [word.replace("{root}", str(root)).replace("{emoji}", str(EMOJI)) for word in words]
    with pytest.raises(ConfigError, match=told):
        evaluated(root, "bad", *typed)
    assert not (root / "evaluate" / "bad").exists()
