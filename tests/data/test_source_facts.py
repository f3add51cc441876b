"""What a source of one's own declares counts as it does for the sources of the package."""

import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict
from running import composed

from kandinsky_exp.config import validation
from kandinsky_exp.runs import model_card
from kandinsky_exp.verbs import plan

MINE = """
from kandinsky_exp.data import sources
from kandinsky_exp.data.source_facts import Announced, AnnouncedSplits

def ask(repo, limit):
    return AnnouncedSplits(Announced(f"{repo}/all", min(limit or 500, 500)), None)

@sources.declares(folders=(), files=("path",))
def database(path): return sources.emoji()

@sources.declares(streamed="records")
def stream(): return sources.emoji()

@sources.declares(hub_id="repo", announced=ask)
def mirror(repo): raise AssertionError("fetched")

@sources.declares(title="butterflies")
def butterflies(): return sources.emoji()

def plain(path): return sources.emoji()
"""


@pytest.fixture(autouse=True)
def _my_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "my_code"
    home.mkdir()
    (home / "my_sources.py").write_text(MINE)
    monkeypatch.syspath_prepend(home)
    sys.modules.pop("my_sources", None)


def reading(root: Path, function: str, **settings: Any) -> DictConfig:
    cfg = composed(root, "data=emoji")
    with open_dict(cfg):
        OmegaConf.update(cfg, "data", {"_target_": f"my_sources.{function}", **settings}, force_add=True)
    return cfg


def problems(root: Path, function: str, **settings: Any) -> list[str]:
    return [str(found) for found in validation.problems(reading(root, function, **settings), "train", ["my_sources"])]


def test_paths_are_what_a_source_says(tmp_path: Path) -> None:
    file = tmp_path / "pictures.db"
    file.touch()
    assert problems(tmp_path, "database", path=str(file)) == []
    (found,) = problems(tmp_path, "database", path=str(tmp_path))
    assert found.startswith(f"data.path: there is no file '{tmp_path}' here")
    (found,) = problems(tmp_path, "plain", path=str(file))  # which declares nothing: folders, as ever
    assert found.startswith(f"data.path: there is no folder '{file}' here")
    (found,) = problems(tmp_path, "mirror", repo="./mine")
    assert found.startswith("data.repo: there is no folder './mine' here")


def test_a_stream_is_encoded_first(tmp_path: Path) -> None:
    assert problems(tmp_path, "stream", cache=True) == []
    (found,) = problems(tmp_path, "stream", cache=False)
    assert found.startswith("data.cache: records are read in one sweep, and training visits images in random order")


def test_a_module_that_nobody_trusts_is_not_imported(tmp_path: Path) -> None:
    found = validation.problems(reading(tmp_path, "stream", cache=False), "train")
    assert [problem.key for problem in found] == ["data._target_"]
    assert "my_sources" not in sys.modules


def test_a_plan_asks_instead_of_fetching(tmp_path: Path) -> None:
    cfg = reading(tmp_path, "mirror", repo="me/pictures", max_samples=300)
    validation.validate(cfg, "train", ["my_sources"])
    splits = plan.known(cfg)
    assert (splits.train.name, splits.train.count, splits.both) == ("me/pictures/all", 300, [splits.train])
    assert plan.rows(cfg, splits) == (285, 15)


@pytest.mark.parametrize(
    ("function", "settings", "hub", "title"),
    [("mirror", {"data.repo": "me/pictures"}, "me/pictures", "own pictures"),
     ("butterflies", {}, None, "butterflies"), ("gone", {"data.name": "me/pictures"}, None, "own pictures")],
)  # fmt: skip
def test_a_model_card_names_the_data(function: str, settings: dict[str, str], hub: str | None, title: str) -> None:
    import my_sources  # type: ignore[import-not-found]  # noqa: F401 - as the run has

    params = {"data._target_": f"my_sources.{function}", **settings}
    assert model_card._data(params) == (hub, title)
