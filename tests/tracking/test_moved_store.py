"""An outputs folder that was moved or copied; how to bring back what was deleted; which store it is."""

import contextlib
import os
import re
import shlex
import shutil
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils
from PIL import Image
from running import first_run

from kandinsky_exp.errors import ConfigError, TrackingError
from kandinsky_exp.reports import images, run_data
from kandinsky_exp.runs import lookup, run_folder
from kandinsky_exp.tracking import store
from kandinsky_exp.tracking.store import default_uri
from kandinsky_exp.tracking.tracker import MlflowTracker

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An outputs folder with a run that has an image."""
    made = tmp_path / "first é%"
    made.mkdir()
    shutil.copyfile(first_run() / "mlflow.db", made / "mlflow.db")
    record(made)
    return made


def record(root: Path, run_id: str | None = None, step: int = 1, experiment: str = "tests") -> MlflowTracker:
    """A run with an image, new or gone on with."""
    utils._artifact_repos_cache.clear()  # as in a new process
    tracker = MlflowTracker.open(default_uri(root), experiment, "a run", root / "mlartifacts", root / "outbox", run_id)
    tracker.log_image("validation/00", Image.new("RGB", (8, 8), "red"), step, "a prompt")
    tracker.finish("FINISHED")
    return tracker


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in (root / "mlartifacts").rglob("*") if path.is_file()}


def only_run(root: Path) -> str:
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as connection:
        ((run_id,),) = connection.execute("SELECT run_uuid FROM runs")
    return str(run_id)


def collected(root: Path, run_id: str) -> images.ImageGrid:
    """What a report finds in a store that is opened anew."""
    utils._artifact_repos_cache.clear()
    client, _ = store.connect(default_uri(root))
    return images.collect(client, run_data.read(client, [run_id]))


def test_images_of_a_folder_that_was_moved_are_found(root: Path, tmp_path: Path) -> None:
    run_id = only_run(root)
    moved = root.rename(tmp_path / "second")
    found = collected(moved, run_id)
    assert found.steps == [1]
    assert not found.notes


def test_what_is_recorded_after_a_move_lies_at_the_new_place(root: Path, tmp_path: Path) -> None:
    run_id = only_run(root)
    moved = root.rename(tmp_path / "second")
    record(moved, run_id, step=2)
    new = record(moved)
    assert not root.exists()
    assert collected(moved, run_id).steps == [1, 2]
    assert any(str(new.run_id) in name for name in files(moved))
    assert not (moved / "outbox").exists()


def test_a_copy_leaves_the_original_alone(root: Path, tmp_path: Path) -> None:
    run_id, before = only_run(root), files(root)
    shutil.copytree(root, tmp_path / "copy")
    record(tmp_path / "copy", run_id, step=2)
    record(tmp_path / "copy")
    assert files(root) == before
    assert collected(tmp_path / "copy", run_id).steps == [1, 2]
    assert collected(root, run_id).steps == [1]


def test_a_store_without_its_artifacts_says_what_it_lacks(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_id, before = only_run(root), files(root)
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copyfile(root / "mlflow.db", copy / "mlflow.db")
    record(copy, run_id, step=2)
    assert files(root) == before
    assert "up to now lie in" in caplog.text
    assert str(root) in caplog.text
    assert collected(copy, run_id).steps == [2]
    shutil.rmtree(copy / "mlartifacts")
    assert f"not on this machine: there is no {copy}" in "".join(collected(copy, run_id).notes)


def test_a_run_without_images_lacks_nothing(root: Path) -> None:
    tracker = MlflowTracker.open(default_uri(root), "tests", "bare", root / "mlartifacts", root / "outbox")
    tracker.finish("FINISHED")
    assert not collected(root, str(tracker.run_id)).notes


@pytest.mark.parametrize(("location", "is_kept"), [("chosen", True), ("gone", False), ("", False)])
def test_where_an_experiment_keeps_artifacts(location: str, is_kept: bool, root: Path, tmp_path: Path) -> None:
    """A folder that somebody chose stays; MLflow's own relative one, and one that is gone, do not."""
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    uri = (tmp_path / location).as_uri() if location else "mlruns"
    client = MlflowClient(default_uri(root))
    client.create_experiment("another", artifact_location=uri)
    record(root, experiment="another")
    assert any(chosen.iterdir()) == is_kept
    assert (len([name for name in files(root) if name.endswith(".png")]) == 1) == is_kept


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    (tmp_path / "mlartifacts").mkdir()
    (tmp_path / "mlflow.db").touch()
    client, _ = store.connect(default_uri(tmp_path))
    assert client.get_experiment("0").name == "Default"


def test_a_run_is_found_by_its_id_after_a_move(root: Path, tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    run_id = only_run(root)
    folder = root / "a run"
    folder.mkdir()
    run_folder.RunFolder(folder, run_folder.Record(run_id=run_id)).write_record()
    MlflowClient(default_uri(root)).set_tag(run_id, "run_folder", str(folder))
    moved = root.rename(tmp_path / "second")
    cfg = OmegaConf.create({"output_root": str(moved), "tracker": {"uri": None}})
    assert lookup.folder_of_run(cfg, run_id, "decoder") == str(moved / "a run")
    shutil.rmtree(moved / "a run")
    with pytest.raises(ConfigError, match="not on this machine"):
        lookup.folder_of_run(cfg, run_id, "decoder")


# --- what was deleted


def run_as_printed(message: str) -> None:
    """Run the command of MLflow at the end of a message."""
    from mlflow import experiments, runs  # its whole command line warns while it is imported

    found = re.search(r"MLFLOW_TRACKING_URI=.* mlflow .*", message)
    assert found is not None
    variable, program, group, *words = shlex.split(found[0])
    assert program == "mlflow"
    commands = {"experiments": experiments.commands, "runs": runs.commands}[group]
    done = CliRunner().invoke(commands, words, env=dict([variable.split("=", 1)]))
    assert done.exit_code == 0, done.output


def refusal(root: Path, run_id: str | None) -> str:
    with pytest.raises(TrackingError) as caught:
        record(root, run_id)
    return str(caught.value)


def test_printed_commands_bring_back_what_was_deleted(root: Path) -> None:
    run_id, client = only_run(root), MlflowClient(default_uri(root))
    client.delete_run(run_id)
    run_as_printed(refusal(root, run_id))
    record(root, run_id)
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    client.restore_run(run_id)  # of an experiment that stays deleted
    run_as_printed(refusal(root, run_id))
    record(root, run_id)
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    run_as_printed(refusal(root, None))
    record(root, run_id)


def test_a_password_is_not_printed() -> None:
    assert "secret" not in store.restore_command("postgresql://me:secret@host/db", "runs restore --run-id 1")


# --- which store it is


def test_a_store_that_is_named_by_the_environment_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "sqlite:////data/mlflow.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert store.unused_variable(uri) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert store.unused_variable(uri) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@tracking:5000")
    note = str(store.unused_variable(uri))
    assert "tracker.uri='${oc.env:MLFLOW_TRACKING_URI}'" in note
    assert "secret" not in note


def test_a_store_that_is_written_to_all_the_time(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="Another program") as caught, store.explained(default_uri(tmp_path)):
        raise sqlite3.OperationalError("database is locked")
    assert "start the server" not in str(caught.value)
    assert os.path.sep in str(caught.value)
