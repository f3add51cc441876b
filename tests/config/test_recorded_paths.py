"""Paths in a run's record: absolute, the same after a move of the whole project, never taken for a hub id."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from drawing import STEPS
from PIL import Image
from running import client, composed, problems_of, runs, train

from kandinsky_exp.config import recorded_paths
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.runs import hub
from kandinsky_exp.runs.model_sources import find_origins
from kandinsky_exp.verbs.export import export
from kandinsky_exp.verbs.generate import generate

SHORT = ["model=prior", "name=short", "adapter=lora", "output_root=outputs", "trainer.batch_size=2"]
SHORT += ["validation.every=100", "validation.reconstructions=0", "checkpoint.every=100"]
HERE = ["weights.prior=my/base", "weights.decoder=my/base", "data=folder", "data.path=pictures", "data.resolution=64"]
HERE += ["validation.prompts=prompts.txt", "validation.inference_steps=2"]


@pytest.fixture
def project(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with weights, pictures, prompts and a run from them, as somebody makes it who works in it."""
    folder = tmp_path / "project"
    shutil.copytree(tiny_folder, folder / "my" / "base")
    (folder / "pictures").mkdir()
    for index in range(6):
        Image.new("RGB", (64, 64), (40 * index, 80, 120)).save(folder / "pictures" / f"{index}.png")
        (folder / "pictures" / f"{index}.txt").write_text(f"picture {index}")
    (folder / "prompts.txt").write_text("a red heart\n")
    monkeypatch.chdir(folder)
    train(folder / "outputs", *SHORT, *HERE, "trainer.max_steps=1")
    (tmp_path / "elsewhere").mkdir()
    return folder


def go_on(folder: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Train on, in a project's folder; what the log has of that start."""
    monkeypatch.chdir(folder)
    log = folder / "outputs" / "short" / "train.log"
    before = len(log.read_text())
    train(folder / "outputs", *SHORT, *HERE, f"trainer.max_steps={steps}")
    return log.read_text()[before:]


def bases(folder: Path, source: str) -> set[str]:
    found = find_origins(composed(folder / "outputs", *STEPS, source, verb="generate", small=[]))
    return {origin.base for origin in found.values()}


def test_paths_are_recorded_absolute_and_found_from_anywhere(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = yaml.safe_load((project / "outputs" / "short" / "config.yaml").read_text())
    assert saved["output_root"] == str(project / "outputs")
    assert saved["weights"]["prior"] == saved["weights"]["decoder"] == str(project / "my" / "base")
    assert saved["data"]["path"] == str(project / "pictures")
    assert saved["validation"]["prompts"] == str(project / "prompts.txt")
    (run,) = runs(project / "outputs")
    assert run.data.params["data.path"] == str(project / "pictures")
    assert run.data.tags["weights"] == str(project / "my" / "base")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert bases(project, f"prior={project}/outputs/short") == {str(project / "my" / "base")}
    short = f"{project}/outputs/short"
    for verb, settings, act in (
        ("generate", [*STEPS, f"prior_adapter={short}"], generate),
        ("export", [f"adapter.source={short}"], export),
    ):
        act(composed(project / "outputs", *settings, "name=drawn", verb=verb, small=[]))
    assert hub.read_result(Path(short)).base("prior") is None, "no model card calls it an id on the hub"


def test_a_moved_project_goes_on_as_if_nothing_had_happened(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved" / "here"
    moved.parent.mkdir()
    monkeypatch.chdir(tmp_path)
    project.rename(moved)
    assert bases(moved, f"prior={moved}/outputs/short") == {str(moved / "my" / "base")}
    log = go_on(moved, 2, monkeypatch)
    assert "going on with changed settings: trainer.max_steps 1 → 2\n" in log
    saved = yaml.safe_load((moved / "outputs" / "short" / "config.yaml").read_text())
    assert saved["data"]["path"] == str(moved / "pictures")
    (run,) = client(moved / "outputs").search_runs(
        [client(moved / "outputs").get_experiment_by_name("kandinsky-2-2").experiment_id]
    )
    changed = json.loads(run.data.tags.get("changed_params", "{}"))
    assert [key for key in changed if "path" in key or "weights" in key] == []


def test_a_record_of_old_with_relative_paths(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`my/base` looks like an id on the hub: it is a folder beside the outputs."""
    file = project / "outputs" / "short" / "config.yaml"
    file.write_text(file.read_text().replace(f"{project}/", "").replace(str(project), "."))
    assert "prior: my/base" in file.read_text()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert bases(project, f"prior={project}/outputs/short") == {str(project / "my" / "base")}
    assert "going on with changed settings: trainer.max_steps 1 → 2\n" in go_on(project, 2, monkeypatch)


def test_weights_that_are_gone_are_never_looked_up_on_a_hub(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(project / "my")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(
        ConfigError, match=r"prior: .*started from the weights in '.*/my/base', which are not there any more; put"
    ):
        bases(project, f"prior={project}/outputs/short")


@pytest.mark.parametrize("name", ["./pictures", "../pictures", "/nowhere/pictures", "~/no pictures", "a/b/c"])
def test_what_can_only_be_a_path_is_not_asked_for_on_a_hub(name: str, tmp_path: Path) -> None:
    data = ["model=prior", "weights=tiny", "data=hub", f"data.name='{name}'"]
    found = problems_of(composed(tmp_path, *data, small=[]))
    assert [text for text in found if text.startswith("data.name: there is no folder")]
    found = problems_of(composed(tmp_path, "data=emoji", f"weights.prior='{name}'", small=[]))
    assert [text for text in found if text.startswith("weights.prior: there is no folder")]


def test_a_file_that_is_not_there_is_no_id_on_a_hub(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'loras/mine\.safetensors' holds no .*there is no such run or folder"):
        find_origins(
            composed(tmp_path, "prior_adapter=loras/mine.safetensors", "weights=tiny", verb="generate", small=[])
        )


def test_only_what_is_a_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here", "auto", "tiny", "linear"):
        (tmp_path / name).mkdir()
    values = {
        "output_root": "new",
        "name": "here",
        "weights": {"prior": "here", "decoder": "some/body"},
        "data": {"path": ["here/{0..9}.tar", "https://a.b/c.tar", "pipe:cat here"], "class_path": None, "name": "a/b"},
        "checkpoint": {"resume": "auto"},
        "prompts": ["here"],
        "scheduler": "linear",
    }
    assert recorded_paths.absolute(values) == {
        "output_root": f"{tmp_path}/new",
        "name": "here",
        "weights": {"prior": f"{tmp_path}/here", "decoder": "some/body"},
        "data": {
            "path": [f"{tmp_path}/here/{{0..9}}.tar", "https://a.b/c.tar", "pipe:cat here"],
            "class_path": None,
            "name": "a/b",
        },
        "checkpoint": {"resume": "auto"},
        "prompts": ["here"],
        "scheduler": "linear",
    }


@pytest.mark.parametrize(
    ("old_root", "new_root", "path", "expected"),
    [
        ("/old/project/outputs", "/new/project/outputs", "/old/project/base", "/new/project/base"),
        ("/old/project/outputs", "/mnt/renamed/outputs", "/old/project/base", "/mnt/renamed/base"),
        ("/old/outputs", "/new/results", "/old/outputs/run", "/new/results/run"),
        ("/old/outputs", "/new/results", "/old/base", None),
        ("/same/outputs", "/same/outputs", "/any/base", "/any/base"),
        ("outputs", "/new/outputs", "base", "/new/base"),
        ("outputs", "/new/a/outputs", "../base", "/new/base"),
        ("outputs", "/new/outputs", "/any/base", None),
    ],
)
def test_where_things_are_after_a_move(old_root: str, new_root: str, path: str, expected: str | None) -> None:
    found = recorded_paths.moved(path, old_root, Path(new_root))
    assert (None if found is None else str(found)) == expected
