"""The seam: a stage in one python file and one yaml, both beside this test, does all that those of the package do."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import start_server
from PIL import Image
from running import PROMPTS, SMALL, history, prepare, runs
from safetensors import safe_open

import kandinsky_exp
from kandinsky_exp import cli
from kandinsky_exp.data.encoded.table import FeatureTable

HERE = Path(__file__).parent
FOCUS = [0.25 * number for number in range(8)]
MINE = [f"--config-dir={HERE / 'conf'}", "model=focus", "trusted_modules=[third_stage]"]
SETTINGS = [word for word in SMALL if not word.startswith(("data", "trainer.max_steps", "trainer.batch_size"))]
SETTINGS += ["data=folder", "data.resolution=64", "data.cache_dtype=fp32", "trainer.batch_size=2"]
QUIET = ["validation.every=100", "validation.reconstructions=0"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with pictures, and outputs with the features that the command has encoded."""
    made = tmp_path_factory.mktemp("third")
    (made / "pictures").mkdir()
    for number, focus in enumerate(FOCUS):
        Image.new("RGB", (80, 64), (30 * number, 90, 200)).save(made / "pictures" / f"{number}.png")
        row = {"file_name": f"{number}.png", "text": f"picture {number}", "focus": focus}
        with (made / "pictures" / "metadata.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    prepare(made / "out", [])
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
        assert command(made, "encode", *MINE, *(word for word in SETTINGS if word.startswith(("data", "weights")))) == 0
        yield made


def command(root: Path, verb: str, *words: str) -> int:
    """The exit code of a verb."""
    pictures = [f"data.path={root / 'pictures'}"] if "data=folder" in words else []
    try:
        cli.main([verb, *words, *pictures, f"output_root={root / 'out'}"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else -1
    return 0


def train(root: Path, *words: str) -> int:
    return command(root, "train", *MINE, *SETTINGS, *words)


def tables(root: Path) -> list[Path]:
    return [file.parent for file in (root / "out" / "cache").glob("*/table.json")]


def of_run(root: Path, name: str) -> dict[str, object]:
    return dict(json.loads((root / "out" / name / "run.json").read_text()))


def test_it_is_small_and_nobody_knows_it() -> None:
    assert (HERE / "third_stage.py").read_text().count("\n") <= 130
    package = Path(kandinsky_exp.__file__).parent
    for file in [*package.rglob("*.py"), *(package.parent / "conf").rglob("*.yaml")]:
        assert "focus" not in file.read_text("utf-8").lower(), file


def test_it_encodes_the_column_beside_the_pictures(root: Path) -> None:
    (folder,) = tables(root)
    table = FeatureTable(folder)
    assert [float(table.row(row)["focus"]) for row in range(len(table))] == FOCUS
    assert table.row(0).keys() == {"image_embeds", "latents", "focus"}


def test_it_trains_draws_stops_and_goes_on(root: Path) -> None:
    words = ["name=one", PROMPTS, "validation.batch_size=2", "validation.every=1"]
    assert train(root, *words, "trainer.max_steps=1") == 0
    assert len(tables(root)) == 1, "what was encoded is found"
    assert train(root, *words, "trainer.max_steps=2") == 0
    run, folder = of_run(root, "one"), root / "out" / "one"
    assert (run["stage"], run["part"], run["status"], run["step"]) == ("focus", "unet", "FINISHED", 2)
    losses = history(root / "out", str(run["run_id"]), "validation/loss")
    assert list(losses) == [0, 1, 2]
    assert losses[2] != losses[0]
    for step in losses:
        names = {file.name for file in (folder / "samples" / f"step-{step:08d}").iterdir()}
        assert names == {"00.png", "01.png", "reconstruction-00.png", "grid.png", "prompts.txt"}
    assert (folder / "checkpoints" / "step-00000002" / "unet").is_dir()
    index = json.loads((folder / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "KandinskyV22CombinedPipeline"


def test_what_it_trained_draws(root: Path) -> None:
    words = ["weights=tiny", "prompts=[a red heart]", "inference_steps=2", "prior_inference_steps=2", "name=drawn"]
    assert command(root, "generate", *words, f"decoder={root / 'out' / 'one'}") == 0
    assert (root / "out" / "generate" / "drawn" / "00.png").is_file()


def test_it_is_planned(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(root, "plan", *MINE, *SETTINGS, PROMPTS, "trainer.max_steps=2") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("focus, all weights, batches of 2 at 64 px, fp32")
    assert "encoded features are there already" in printed
    assert "drawing" in printed


def test_it_trains_an_adapter(root: Path) -> None:
    words = ["adapter=lora", "adapter.rank=2", "trainer.max_steps=2", "data.cache=false"]
    assert train(root, "name=lora", *words, *QUIET) == 0
    with safe_open(root / "out" / "lora" / "adapter" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert any(torch.any(file.get_tensor(name)) for name in file.keys() if ".lora_B." in name)  # noqa: SIM118


def test_it_is_swept(root: Path) -> None:
    start_server()
    assert train(root, "--multirun", "name=swept", "trainer.max_steps=1", "optimizer.lr=1e-3,1e-4", *QUIET) == 0
    jobs = [run for run in runs(root / "out") if run.data.tags.get("mlflow.parentRunId")]
    assert sorted(run.data.tags["override.optimizer.lr"] for run in jobs) == ["0.0001", "0.001"]
    assert {(run.info.status, run.data.tags["stage"]) for run in jobs} == {("FINISHED", "focus")}


def test_a_source_without_the_column_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*MINE, "data=emoji", "weights=tiny", "tracker=none"]
    assert command(root, "train", *words) == 2
    assert "metadata.jsonl: it has no column 'focus', which this model reads" in capsys.readouterr().err


def test_a_bad_cell_is_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "pictures", tmp_path / "pictures")
    shutil.copytree(root / "out" / "cache", tmp_path / "out" / "cache")
    file = tmp_path / "pictures" / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for wrong, said in (
        ({"focus": "much"}, "'focus' holds 'much', not a number"),
        ({}, "'focus' holds None, not a number"),
    ):
        changed = {name: value for name, value in rows[0].items() if name != "focus"} | wrong
        file.write_text("".join(json.dumps(row) + "\n" for row in [changed, *rows[1:]]))
        assert train(tmp_path, "name=bad", "tracker=none") == 2
        assert "metadata.jsonl, line 1: " in (printed := capsys.readouterr().err)
        assert said in printed
