"""What a run's page in MLflow says."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from running import composed

from kandinsky_exp.config import saved_config
from kandinsky_exp.runs import description


@pytest.fixture
def typed(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Hydra's settings as they are while a run of these overrides goes on."""
    overrides: list[str] = request.param
    with initialize_config_module("kandinsky_exp.conf", version_base="1.3"):
        cfg = compose("train", overrides, return_hydra_config=True)
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(cfg)
    yield overrides
    HydraConfig.instance().cfg = before


def test_what_nobody_compares_by_is_a_tag(tmp_path: Path) -> None:
    flat = saved_config.flatten(
        composed(tmp_path, "data=dreambooth", "data.instance_path=.", "data.instance_prompt=a sks dog")
    )
    params, tags = description.split(flat | {"sweep.devices": "auto"})
    assert {
        "config.output_root",
        "config.hub.push",
        "config.tracker.uri",
        "config.sweep.devices",
        "config.name",
    } <= set(tags)
    assert tags["config.optimizer._partial_"] == "true"
    assert tags["config.output_root"] == str(tmp_path)
    groups = (
        "model.",
        "weights.",
        "data.",
        "optimizer.",
        "scheduler.",
        "precision.",
        "adapter.",
        "trainer.",
        "validation.",
    )
    trains = {key for key in flat if key.startswith(groups) and not key.endswith("_partial_")}
    assert trains | {"seed", "checkpoint.every", "checkpoint.behind", "checkpoint.result"} == set(params)


def test_a_run_from_python_says_nothing() -> None:
    HydraConfig.instance().cfg = None  # an earlier test's
    assert description.command() is None
    assert description.tags(None) == {}


@pytest.mark.parametrize(
    "typed", [["data=emoji", 'validation.prompts=["a dog, red", "it\'s"]', "name=a"]], indirect=True
)
def test_the_command_can_be_pasted(typed: list[str]) -> None:
    assert shlex.split(description.command() or "") == ["kandinsky-exp", "train", *typed]


SECRETS = [
    "tracker.uri=postgresql+psycopg2://me:hidden1@host/db",
    "+hub.token=hidden2",
    "data.name='https://host/a?sig=hidden3'",
]


@pytest.mark.parametrize("typed", [["data=hub", *SECRETS]], indirect=True)
def test_the_command_holds_no_secrets(typed: list[str]) -> None:
    command = description.command() or ""
    assert "hidden" not in command
    assert "postgresql+psycopg2://***@host/db" in command


@pytest.mark.parametrize("typed", [["sweep=lr", "data=emoji", "name=all", "optimizer.lr=1e-6"]], indirect=True)
def test_a_job_of_a_sweep_is_made_alone(typed: list[str]) -> None:
    words = ["kandinsky-exp", "train", "sweep=lr", "data=emoji", "optimizer.lr=1e-6", "hydra.mode=RUN"]
    assert shlex.split(description.command() or "") == words


def test_the_description_is_markdown() -> None:
    note = description.tags("kandinsky-exp 'name=a```b'", ["[report](report.html)", "more"])[description.NOTE]
    assert note == "````sh\nkandinsky-exp 'name=a```b'\n````\n\n[report](report.html)\n\nmore"
