"""`kandinsky-exp compare`: what its report says of runs in a real store."""

import io
import json
import math
import re
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import start_server
from mlflow import MlflowClient
from PIL import Image
from running import PROMPTS, SMALL, first_run, prepare, runs

from kandinsky_exp import cli
from kandinsky_exp.reports import figures, images, png, report, run_data
from kandinsky_exp.reports.images import ImageGrid, Row, Stored
from kandinsky_exp.reports.run_data import Run, Scores
from kandinsky_exp.tracking import mlflow_names
from kandinsky_exp.tracking.store import default_uri
from kandinsky_exp.tracking.tracker import MlflowTracker

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")
EVIL = """</script><script>document.title="stolen"</script>, 'q' & $x^2$ %{x} <b>"""
PARAMS = {"optimizer.lr": 1e-5, "model.snr_gamma": None, "seed": 0, "name": "s", "model._target_": "x.DecoderStage"}


@dataclass
class Sweep:
    """A store with a parent and its runs, by what they are called."""

    root: Path
    parent: str
    ids: dict[str, str] = field(default_factory=dict)

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(default_uri(self.root))

    def track(self, name: str, **options: Any) -> MlflowTracker:
        outbox = self.root / f"outbox-{len(self.ids)}"
        made = MlflowTracker.open(default_uri(self.root), "tests", name, self.root / "mlartifacts", outbox, **options)
        self.ids[name] = str(made.run_id)
        return made


def square(colour: str, size: int = 32) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Finished runs, one that never validated, one that failed before it told anything, one that was killed."""
    root = tmp_path_factory.mktemp("compare")
    shutil.copyfile(first_run() / "mlflow.db", root / "mlflow.db")
    made = Sweep(root, "")
    parent = made.track("my sweep")
    parent.finish("FINISHED")
    made.parent = str(parent.run_id)
    for place, (name, lr, colour) in enumerate((("good", 1e-4, "red"), (EVIL, 1e-5, "red"), ("killed", 1e-3, "blue"))):
        one = made.track(name, parent_run_id=made.parent, tags={"stage": "decoder"})
        one.log_params(PARAMS | {"optimizer.lr": lr, "model.snr_gamma": (None, 5.0, 1.0)[place]})
        for step in (10, 20, 30):
            by_part = {f"train/loss_t{part}": 1 / (step + part) for part in range(4)}
            one.log_metrics({"train/loss": 1 / step + place, "train/samples_per_second": step, **by_part}, step)
        for step in (0, 20) if name == "killed" else (0, 20, 30):
            one.log_metrics({"validation/loss": [1.0, 0.5, 0.75][min(2, step // 10 - (step > 0))] + place}, step)
            one.log_image("validation/00", square("white" if step == 0 else colour), step, EVIL)
            one.log_image("reconstruction/00", square(colour, 300), step, "held-out image 0")
            one.log_image("validation/grid", square(colour), step)
        one.finish("KILLED" if name == "killed" else "FINISHED")
    silent = made.track("failed", parent_run_id=made.parent)
    silent.finish("FAILED")
    unmeasured = made.track("no validation", parent_run_id=made.parent, tags={"stage": "decoder"})
    unmeasured.log_params(PARAMS | {"optimizer.lr": 3e-5})
    unmeasured.log_metrics({"train/loss": 0.25}, 10)
    unmeasured.finish("FINISHED")
    return made


class Page(HTMLParser):
    """What a report holds: tables as texts with what they sort by, scripts, and all that is named by an address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.heads: list[str] = []
        self.rows: list[list[tuple[str, str | None]]] = []
        self.notes: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, Any] = {}
        self._into: str | None = None
        self._collected = ""
        self._sort: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th", "script") or (tag == "p" and found.get("class") == "note"):
            self._into = "data" if found.get("id") == "data" else tag
            self._collected, self._sort = "", found.get("data-sort")

    def handle_data(self, data: str) -> None:
        self._collected += data

    def handle_endtag(self, tag: str) -> None:
        if self._into == "data" and tag == "script":
            self.data = json.loads(self._collected)
        elif tag == "p" and self._into == "p":
            self.notes.append(self._collected)
        elif tag in ("td", "th") and self._into in ("td", "th"):
            self.rows[-1].append((self._collected, self._sort))
        else:
            return
        self._into = None

    def column(self, head: str) -> dict[str, tuple[str, str | None]]:
        """A column of the table of runs, by run."""
        heads = [text for text, _ in self.rows[0]]
        rows = [row for row in self.rows[1:] if len(row) == len(heads)]
        return {row[0][0]: row[heads.index(head)] for row in rows}

    def traces(self, name: str) -> list[dict[str, Any]]:
        return next(list(figure["spec"]["data"]) for figure in self.data["figures"] if figure["name"] == name)


@pytest.fixture(scope="module")
def page(sweep: Sweep) -> Page:
    file = report.write_report(
        sweep.client, run_data.children(sweep.client, sweep.parent), sweep.root / "out", EVIL, sweep.parent
    )
    return Page(file.read_text("utf-8"))


# What it says


def test_the_table_says_what_differed_and_how_it_went(page: Page, sweep: Sweep) -> None:
    heads = [text for text, _ in page.rows[0]]
    assert heads == ["run", "status", "stage", "lr", "snr", *report.SCORES, "MLflow run id"]
    assert list(page.column("run")) == ["good", EVIL, "killed", "failed", "no validation"]
    statuses = [text for text, _ in page.column("status").values()]
    assert statuses == ["FINISHED", "FINISHED", "KILLED", "FAILED", "FINISHED"]
    assert page.column("lr")[EVIL] == ("1e-05", "1e-05")
    assert page.column("snr")["good"] == ("null", "null")
    assert page.column("best val. loss")["good"] == ("0.5", "0.5")
    assert page.column("at step")["good"] == ("20", "20")
    assert page.column("last val. loss")["good"] == ("0.75", "0.75")
    assert page.column("last train loss")["good"][0] == f"{1 / 30:.5g}"
    assert page.column("samples/s")["good"] == ("20", "20.0")
    assert float(str(page.column("time")["good"][1])) > 0
    assert page.column("MLflow run id")["good"][0] == sweep.ids["good"]


def test_what_a_run_does_not_have_is_left_open(page: Page) -> None:
    for head in ("stage", "lr", *[*report.SCORES][:4], "samples/s"):
        assert page.column(head)["failed"] == ("–", None), head
    assert page.column("best val. loss")["no validation"] == ("–", None)
    assert page.column("last train loss")["no validation"][0] == "0.25"


def test_curves_are_overlaid_and_smoothed(page: Page) -> None:
    traces = page.traces("train")
    drawn = [trace for trace in traces if trace.get("showlegend", True)]
    assert [trace["meta"] for trace in drawn] == [0, 1, 2, 4]
    assert len({trace["line"]["color"] for trace in drawn}) == 4
    raw, smooth = (trace for trace in traces if trace["meta"] == 0)
    assert raw["y"] == pytest.approx([1 / 10, 1 / 20, 1 / 30], rel=1e-5)
    weights = np.array([0.81, 0.9, 1.0])
    assert smooth["y"][2] == pytest.approx(np.average([1 / 10, 1 / 20, 1 / 30], weights=weights), rel=1e-5)
    colours = {trace["meta"]: trace["line"]["color"] for trace in page.traces("validation")}
    assert colours == {trace["meta"]: trace["line"]["color"] for trace in drawn if trace["meta"] != 4}
    quarters = page.traces("quarters")
    assert {trace["xaxis"] for trace in quarters} == {"x", "x2", "x3", "x4"}
    legend = [trace["meta"] for trace in quarters if trace["showlegend"]]
    assert legend == [0, 1, 2], "each run is in the legend once"


def test_hyper_parameters_are_set_against_the_score_of_finished_runs(page: Page) -> None:
    (parallel,) = page.traces("parallel")
    labels = [one["label"] for one in parallel["dimensions"]]
    assert labels == ["lr", "snr", "best validation loss"]
    assert parallel["dimensions"][0]["values"] == pytest.approx([-4, -5])
    assert parallel["dimensions"][0]["ticktext"] == ["1e-05", "0.0001"]
    assert parallel["dimensions"][1]["ticktext"] == ["null", "5"]
    assert parallel["dimensions"][2]["values"] == pytest.approx([0.5, 1.5])
    assert any(note.startswith("3 of 5 runs are left out here") for note in page.notes)
    assert [trace["x"] for trace in page.traces("scatter-0")] == [pytest.approx([-4]), pytest.approx([-5])]


def test_images_are_there_by_prompt_run_and_step(page: Page, sweep: Sweep) -> None:
    assert page.data["steps"] == [0, 20, 30]
    keys = {text for text, _ in (row[0] for row in page.rows if row)}
    assert f"{EVIL}validation/00" in keys
    assert "held-out image 0reconstruction/00" in keys
    assert not any("grid" in key for key in keys)
    cells = page.data["cells"]
    assert [step for step, _ in cells["0,0"]] == [0, 20, 30]
    assert [step for step, _ in cells["0,2"]] == [0, 20], "killed before the third"
    assert cells["0,0"][0][1] == cells["0,1"][0][1] == cells["0,2"][0][1], "equal images are there once"
    assert len(page.data["images"]) == 5  # white, red, blue; red and blue in large
    sizes = {decoded(uri).size for uri in page.data["images"]}
    assert sizes == {(32, 32), (256, 256)}


def decoded(uri: str) -> Image.Image:
    import base64

    kind, _, text = uri.partition(";base64,")
    assert kind == "data:image/webp"
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_nothing_in_a_name_or_prompt_becomes_code(page: Page) -> None:
    assert page.text.count('document.title="stolen"') == 0
    scripts = [attrs for tag, attrs in page.elements if tag == "script"]
    assert len(scripts) == 3
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    names = [trace["name"] for trace in page.traces("train")]
    assert all("<" not in name and "%{" not in name for name in names)
    assert page.data["labels"][1] == EVIL


def test_the_file_needs_nothing_else(page: Page, sweep: Sweep) -> None:
    policy = next(attrs["content"] for tag, attrs in page.elements if attrs.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'")
    assert "http" not in str(policy)
    named = [attrs.get(name) for _, attrs in page.elements for name in ("src", "href") if name in attrs]
    assert named == ["data:,"]
    logged = {file.path for file in sweep.client.list_artifacts(sweep.parent, "compare")}
    assert logged == {"compare/report.html", "compare/curves.png", "compare/images.png"}


def test_the_pictures_show_something(page: Page, sweep: Sweep) -> None:
    for name in ("curves.png", "images.png"):
        with Image.open(sweep.root / "out" / name) as picture:
            assert min(picture.size) > 300
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 20
    assert (pixels == (0, 0, 255)).all(1).sum() > 1000, "the killed run's blue square"


# Details


def test_scores_pass_over_what_is_not_finite() -> None:
    curves = {"validation/loss": [(0, math.nan), (5, 2.0), (9, math.inf)], "train/loss": [(1, math.nan)]}
    assert run_data.scores(curves, None) == Scores(best=2.0, best_step=5, last=2.0)
    assert figures.smoothed([(0, math.nan), (1, 3.0), (2, 3.0)]) == [(1, 3.0), (2, pytest.approx(3.0))]
    page = Page(report.page("t", [Run("0" * 32, "one", "FINISHED", curves=curves)], ImageGrid()))
    assert page.traces("validation")[0]["y"] == [None, 2.0, None]


def test_a_step_that_was_done_twice_has_its_later_value() -> None:
    @dataclass
    class Point:
        step: int
        value: float
        timestamp: int

    assert run_data.in_order([Point(2, 5.0, 9), Point(1, 1.0, 1), Point(2, 3.0, 2)]) == [(1, 1.0), (2, 5.0)]


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["optimizer.lr", "seed"], ["lr", "seed"]),
        (["a.x.rank", "b.x.rank", "c.rate"], ["a.x.rank", "b.x.rank", "rate"]),
        (["data.path", "weights.path"], ["data.path", "weights.path"]),
        (["optimizer._target_", "precision.name", "adapter.name"], ["optimizer", "precision", "adapter"]),
        (["adapter.name", "x.adapter"], ["adapter", "x.adapter"]),
    ],
)
def test_columns_have_the_shortest_names_that_tell_them_apart(keys: list[str], names: list[str]) -> None:
    assert list(mlflow_names.short_names(keys).values()) == names


def test_runs_of_one_name_are_told_apart(sweep: Sweep) -> None:
    ids = [str(sweep.track("twin").run_id) for _ in range(2)]
    assert [run.label for run in run_data.read(sweep.client, ids)] == [f"twin ({run_id[:6]})" for run_id in ids]


def test_a_prompt_is_that_of_its_step() -> None:
    prompts = [(0, {"a": "first", "b": "other"}), (100, {"a": "second"})]
    found = [images.prompt_at(prompts, "a", step) for step in (0, 99, 100, 500)]
    assert found == ["first", "first", "second", "second"]
    assert images.prompt_at(prompts, "b", 500) == "other"
    assert images.prompt_at(prompts, "c", 500) == ""


def stored(count: int, rows: int, steps: int) -> list[Stored]:
    return [
        Stored(run, Row(f"validation/{row:02d}", ""), step * 10, f"{run}-{row}-{step}")
        for run in range(count)
        for row in range(rows)
        for step in range(steps)
    ]


def test_too_many_images_are_thinned_out_steps_first() -> None:
    kept = images.by_importance(stored(3, 2, 50))[:60]
    assert len({image.step for image in kept}) == 10
    assert {0, 490} <= {image.step for image in kept}
    few = images.by_importance(stored(30, 10, 4))[:90]
    assert ({image.step for image in few}, len({image.run for image in few})) == ({30}, 30)
    assert {image.row.key for image in few} == {f"validation/{row:02d}" for row in range(3)}


def test_the_last_images_come_first() -> None:
    order = [image.step for image in images.by_importance(stored(2, 1, 9))]
    assert order == [80, 80, 0, 0, 40, 40, 20, 20, 60, 60, 10, 10, 30, 30, 50, 50, 70, 70]


def test_images_stay_below_their_size(sweep: Sweep, caplog: pytest.LogCaptureFixture) -> None:
    """Noise, which nothing compresses."""
    one = sweep.track("noise")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 256, 256, 3), np.uint8)
    for step, picture in enumerate(pixels):
        one.log_image("validation/00", Image.fromarray(picture), step)
    one.finish("FINISHED")
    found = images.collect(sweep.client, run_data.read(sweep.client, [sweep.ids["noise"]]), max_bytes=500_000)
    assert sum(map(len, found.images)) < 2_000_000
    assert 0 in found.steps
    assert 39 in found.steps
    (note,) = found.notes
    assert note.startswith(f"{40 - len(found.steps)} images of steps in between are left out")


def test_a_damaged_image_is_only_noted(sweep: Sweep) -> None:
    one = sweep.track("damaged")
    one.log_image("validation/00", square("red"), 0)
    one.finish("FINISHED")
    (name,) = (sweep.root / "mlartifacts").glob(f"{one.run_id}/artifacts/images/*.png")
    name.write_bytes(b"no picture")
    folder = sweep.root / "damaged"
    text = report.write_report(sweep.client, [str(one.run_id)], folder, "x").read_text("utf-8")
    assert "1 images could not be read." in Page(text).notes
    assert [path.name for path in report.files(folder)] == ["report.html", "curves.png"]


def made(count: int, points: int, **params: Any) -> list[Run]:
    curve = [(step, 1 / (step + 1) + index) for index in [0.0] for step in range(points)]
    curves = dict.fromkeys(("train/loss", *run_data.QUARTILES), curve) | {"validation/loss": curve[::10]}
    return [
        Run(f"{index:032x}", f"run {index}", "FINISHED", "decoder", {"optimizer.lr": f"{10.0**-(index % 5)}"}, curves,
            Scores(best=float(index), train=1.0))
        for index in range(count)
    ]  # fmt: skip


def test_hundreds_of_long_runs_make_a_file_that_opens(tmp_path: Path) -> None:
    every = made(300, 2000)
    text = report.page("many", every, ImageGrid())
    assert len(text.encode()) + images.MAX_BYTES * 4 / 3 < 30_000_000
    page = Page(text)
    assert len(page.column("run")) == 300
    assert len(page.traces("train")) == 300, "no unsmoothed curves"
    assert all(trace["x"][-1] == 1999 for trace in page.traces("train"))
    png.curves(every, tmp_path / "curves.png")
    width, height = struct.unpack(">II", (tmp_path / "curves.png").read_bytes()[16:24])
    assert max(width, height) < 3000


def test_one_parameter_is_a_scatter_and_none_is_said() -> None:
    kinds = [figure.kind for figure in figures.scores(made(3, 2))]
    assert kinds == ["scatter"]
    same = made(2, 2)
    same[1].params = same[0].params
    assert "no two finished runs that differ" in report.page("t", same, ImageGrid())


def test_the_best_of_each_stage_are_marked() -> None:
    every = made(5, 2)
    for run, (stage, best) in zip(every, [("a", 2.0), ("a", 1.0), ("b", 9.0), ("a", 1.0), ("b", None)], strict=True):
        run.stage, run.scores = stage, Scores(best=best)
    text = report.page("t", every, ImageGrid())
    marked = [index for index, row in enumerate(text.split("<tr>")[2:7]) if 'class="number best"' in row]
    assert marked == [1, 2, 3]


def test_the_picture_shows_the_best_of_each_stage() -> None:
    every = made(4, 2)
    for run, (stage, best) in zip(every, [("a", 0.1), ("a", 0.2), ("b", 9.0), ("b", 8.0)], strict=True):
        run.stage, run.scores = stage, Scores(best=best)
    assert [run_data.rank(every, run) for run in every] == [0, 1, 1, 0]


def test_a_single_point_is_seen() -> None:
    (trace,) = (trace for trace in figures.losses(made(1, 1))[0].spec["data"] if "opacity" not in trace)
    assert trace["mode"] == "lines+markers"


def test_stages_are_said_not_to_compare() -> None:
    both = made(2, 2)
    both[0].stage = "prior"
    page = Page(report.page("t", both, ImageGrid()))
    assert "Losses of different stages (decoder, prior) do not compare with each other." in page.notes
    assert page.column("stage")["run 0"][0] == "prior"
    (parallel,) = page.traces("parallel")
    assert parallel["dimensions"][0]["ticktext"] == ["decoder", "prior"]


def test_runs_that_never_validated_are_compared_by_their_training(sweep: Sweep) -> None:
    two = made(2, 3)
    for run, train in zip(two, (0.5, 0.25), strict=True):
        run.curves = {"train/loss": [(1, train)]}
        run.scores = Scores(train=train)
    page = Page(report.page("t", two, ImageGrid()))
    assert page.notes[0] == "No run has validated: what counts as the score is the last training loss."
    assert [trace["y"] for trace in page.traces("scatter-0")] == [[0.5], [0.25]]


def test_runs_without_anything(sweep: Sweep) -> None:
    file = report.write_report(sweep.client, [sweep.ids["failed"]], sweep.root / "nothing", "nothing")
    page = Page(file.read_text("utf-8"))
    assert page.data["figures"] == []
    assert "No run has recorded a loss." in page.notes
    assert not (file.parent / "images.png").exists()


# The command


@pytest.mark.slow
def test_a_sweep_made_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path, [], encoded=True)
    start_server()  # the process that jobs are forked from
    varied = ["name=s", "optimizer.weight_decay=0.0,0.5", "trainer.max_steps=2", PROMPTS]
    cli.main(["--multirun", *SMALL, f"output_root={tmp_path}", *varied])
    capsys.readouterr()
    cli.main(["compare", "sweep=s", f"output_root={tmp_path}"])
    folder = tmp_path / "compare" / "s"
    out = capsys.readouterr().out.splitlines()
    assert out == [str(folder / name) for name in ("report.html", "curves.png", "images.png")]
    page = Page((folder / "report.html").read_text("utf-8"))
    assert [text for text, _ in page.column("weight_decay").values()] == ["0", "0.5"]
    prompts = {"a red heart", "a dog", "held-out image 0"}
    assert prompts <= {re.sub(r"(validation|reconstruction)/\d+$", "", row[0][0]) for row in page.rows if row}
    assert len(page.data["steps"]) == 2
    jobs = [run for run in runs(tmp_path) if "mlflow.parentRunId" in run.data.tags]
    names = ",".join(f'"s/{Path(run.data.tags["run_folder"]).name}"' for run in jobs)
    cli.main(["compare", f"runs=[{names},{jobs[0].info.run_id}]", f"output_root={tmp_path}", "name=two"])
    again = Page((tmp_path / "compare" / "two" / "report.html").read_text("utf-8"))
    assert sorted(again.column("run")) == sorted(page.column("run")), "each once"


def test_what_cannot_be_compared(sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, record in (("plain", {"run_id": "e" * 32}), ("group", {"stage": "sweep"}), ("untold", {}), ("odd", [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    shutil.copyfile(first_run() / "mlflow.db", tmp_path / "mlflow.db")
    here = f"output_root={tmp_path}"
    cases = [
        ([here], ["runs: give either runs=<run>,<run> or sweep=<sweep>; nothing is named"]),
        ([here, "runs=[]"], ["runs: give either"]),
        ([here, "runs=[a]", "sweep=b"], ["or sweep=<sweep>, not both"]),
        ([here, "runs=[a]", "tracker=none"], ["tracker: none has recorded nothing"]),
        (
            [here, "runs=[nowhere,group,untold,odd]"],
            [
                "error: 4 settings are wrong",
                "runs: 'nowhere' is no run; give its folder, its name under",
                "runs: 'group' is a sweep; give it as sweep=",
                "runs: 'untold' was never recorded in MLflow",
                "runs: 'odd': its run.json cannot be read",
            ],
        ),
        ([here, "runs=x/lr=1e-05,b c"], ["runs: 'x/lr=1e-05' is no run", "runs: 'b c' is no run"]),
        ([here, f"runs=[plain,{'f' * 32}]"], [f"has no run {'e' * 32}", f"has no run {'f' * 32}"]),
        ([here, "sweep=plain"], ["sweep: 'plain' is one run; give it in runs="]),
        ([here, "sweep=group"], ["sweep: 'group' was never recorded"]),
        ([f"output_root={sweep.root}", f"sweep={sweep.ids['good']}"], ["has no jobs in MLflow"]),
        ([f"output_root={tmp_path}/none", f"sweep={'e' * 32}"], ["output_root: there is no MLflow store in"]),
        ([here, f"sweep={'e' * 32}", "tracker.uri=http://127.0.0.1:9"], ["tracker.uri: http://127.0.0.1:9"]),
        ([here, "sweeps=x"], ["sweeps: no such setting"]),
    ]
    for typed, messages in cases:
        with pytest.raises(SystemExit) as caught:
            cli.main(["compare", *typed])
        told = capsys.readouterr().err
        assert caught.value.code == 2, told
        assert "Traceback" not in told
        for message in messages:
            assert message in told
    assert not (tmp_path / "compare").exists()
    assert not (tmp_path / "none").exists()


def test_an_artifact_store_that_is_gone_costs_the_images_only(
    sweep: Sweep, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The parent's artifacts cannot be written, those of a run not be read."""
    one = MlflowTracker.open(default_uri(sweep.root), "elsewhere", "one", tmp_path / "gone", tmp_path / "outbox")
    one.log_metrics({"train/loss": 1.0}, 1)
    one.finish("FINISHED")
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    (tmp_path / "gone").write_text("a file")
    file = report.write_report(sweep.client, [str(one.run_id)], tmp_path / "out", "x", str(one.run_id))
    assert "train" in {figure["name"] for figure in Page(file.read_text("utf-8")).data["figures"]}
    assert "the report was not added to the artifacts" in caplog.text
