"""Publishing: who may, what goes to the hub, uploads that break off, and the card, whose code is run."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoPipelineForText2Image
from hub_server import Hub, Repository, read_again, running
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from running import PROMPTS, client, composed, mlflow, network, runs, same, stopped_at, train
from safetensors.torch import load_file

from kandinsky_exp import cli
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.runs import hub as publishing
from kandinsky_exp.runs.model_card import Result, model_card
from kandinsky_exp.runs.model_sources import find_origins
from kandinsky_exp.runs.run_folder import Record, read_record

pytestmark = [  # how huggingface_hub calls httpx, and how diffusers calls huggingface_hub
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`callback:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]
BASES = {side: f"kandinsky-community/kandinsky-2-2-{side}" for side in ("prior", "decoder")}
ON_HUB = [f"weights.{side}={repo}" for side, repo in BASES.items()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Hub]:
    """A hub with both halves of the tiny Kandinsky under the names of the real ones."""
    folder = tmp_path_factory.mktemp("hub")
    pipeline = AutoPipelineForText2Image.from_pretrained(tiny_folder)
    pipeline.prior_pipe.save_pretrained(folder / "prior")
    pipeline.decoder_pipe.save_pretrained(folder / "decoder")
    (folder / "decoder" / "README.md").write_text(f"---\nprior:\n- {BASES['prior']}\n---\n")
    (folder / "prior" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    with running(folder / "home") as server:
        for side, repo in BASES.items():
            server.hold(repo, folder / side)
        yield server


@pytest.fixture(scope="module")
def published(root: Path, hub: Hub) -> dict[str, Path]:
    """Four runs whose results are on the hub, by repository."""
    kinds = {
        "me/p": ["model=prior"],
        "me/d": ["model=decoder"],
        "club/lp": ["model=prior", "adapter=lora", "adapter.rank=2"],
        "ld": ["model=decoder", "adapter=lora", "adapter.rank=2", "hub.private=false"],
    }
    for repo, overrides in kinds.items():
        name = repo.rpartition("/")[2]
        short = ["trainer.max_steps=1", PROMPTS, "tracker=none", "hub.push=true", f"hub.repo_id={repo}", f"name={name}"]
        train(root, *overrides, *ON_HUB, *short)
    return {repo if "/" in repo else f"me/{repo}": root / repo.rpartition("/")[2] for repo in kinds}


def card_of(hub: Hub, repo: str) -> tuple[dict, str]:
    _, head, body = re.split(r"^---$", hub.repositories[repo].files["README.md"].decode(), maxsplit=2, flags=re.M)
    return yaml.safe_load(head), body


def executed(body: str) -> dict:
    """What the card's code leaves behind."""
    found: dict = {}
    torch.manual_seed(0)
    (code,) = re.findall(r"^```python\n(.*?)^```$", body, flags=re.M | re.S)
    exec(code, found)
    return found


def test_each_result_is_there_whole_and_at_once(hub: Hub, published: dict[str, Path]) -> None:
    own = {"unet", "movq", "scheduler"}
    expected = {
        "me/d": own,
        "me/p": {path.name for path in (published["me/p"] / "pipeline").iterdir() if path.is_dir()},
    }
    for repo, folder in published.items():
        held = hub.repositories[repo]
        assert len(held.commits) == 1, "weights and card belong together"
        assert held.commits[0] == sorted(held.files)
        assert held.private == (repo != "me/ld")
        assert {path.partition("/")[0] for path in held.files if "/" in path} == expected.get(repo, set()) | {"images"}
        assert ("images/grid.png" in held.files) == held.private
        source = folder / ("adapter" if repo in ("club/lp", "me/ld") else "pipeline")
        weights = [path for path in held.files if path.endswith(".safetensors")]
        assert weights
        assert all(held.files[path] == (source / path).read_bytes() for path in weights)
        assert read_record(folder).status == "FINISHED"
    assert json.loads(hub.repositories["me/d"].files["model_index.json"])["_class_name"] == "KandinskyV22Pipeline"


def test_the_cards_say_what_was_made_from_what(hub: Hub, root: Path, published: dict[str, Path]) -> None:
    for repo in published:
        head, body = card_of(hub, repo)
        stage, is_adapter = ("prior" if repo.endswith("p") else "decoder"), "/l" in repo
        assert head["base_model"] == [BASES[stage]]
        assert head["base_model_relation"] == ("adapter" if is_adapter else "finetune")
        assert head.get("prior") == ([BASES["prior"]] if repo == "me/d" else None)
        assert head["license"] == "apache-2.0"
        assert [shown["text"] for shown in head["widget"]] == ["a red heart", "a dog"]
        assert all(shown["output"]["url"] in hub.repositories[repo].files for shown in head["widget"])
        assert f"]({'https://huggingface.co'}/{BASES[stage]}) at {hub.repositories[BASES[stage]].sha}" in body
        for text in (
            "the emoji that ship",
            "| `optimizer.lr` | 0.001 |",
            "| optimizer steps | 1 |",
            "![a dog](images/01",
        ):
            assert text in body
        assert ("`adapter.rank` | 2" in body) == is_adapter
        assert str(root) not in body


def test_the_code_of_the_cards_runs(hub: Hub, published: dict[str, Path]) -> None:
    made = {repo: executed(card_of(hub, repo)[1]) for repo in published}
    for repo, found in made.items():
        assert found["image"].size == (64, 64), repo
    loaded, local = made["me/d"]["pipeline"], published["me/d"] / "pipeline"
    assert type(loaded).__name__ == "KandinskyV22CombinedPipeline", "connected with its prior"
    assert same(loaded.unet.state_dict(), network(local / "unet"))
    assert same(made["me/p"]["prior"].prior.state_dict(), network(published["me/p"] / "pipeline" / "prior"))
    again = AutoPipelineForText2Image.from_pretrained(local)
    torch.manual_seed(0)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "prior_num_inference_steps": 2}
    image = again("a red fox in the snow", **settings).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(made["me/d"]["image"]))
    for repo, part in (("club/lp", made["club/lp"]["prior"].prior), ("me/ld", made["me/ld"]["decoder"].unet)):
        saved = load_file(published[repo] / "adapter" / "pytorch_lora_weights.safetensors")
        loaded = {key.replace(".default_0", ""): value for key, value in part.state_dict().items() if "lora_" in key}
        assert same(saved, loaded), repo
    assert not hub.unknown, "the stand-in lacks something"


@pytest.mark.parametrize("adapter", [[], ["adapter=lora", "adapter.rank=2"]], ids=["whole", "lora"])
@pytest.mark.parametrize(
    ("model", "tag", "files"),
    [
        ("inpaint", "inpainting", {"conv_in.safetensors"}),
        ("control", "controlnet", {"conv_in.safetensors", "input_hint_block.safetensors"}),
    ],
)
def test_a_result_that_is_drawn_from_pictures(
    model: str, tag: str, files: set[str], adapter: list[str], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"model={model}", *adapter, *ON_HUB, "trainer.max_steps=1", "tracker=none"]
    repo = f"me/{model}{len(adapter)}"
    train(tmp_path, *words, "hub.push=true", f"hub.repo_id={repo}", "name=fill")
    held = hub.repositories[repo]
    head, body = card_of(hub, repo)
    assert tag in head["tags"]
    assert head["pipeline_tag"] == "image-to-image"
    if adapter:
        assert files <= held.files.keys()
        monkeypatch.chdir(tmp_path)
        verb = next(line for line in body.splitlines() if "kandinsky-exp export" in line).partition("kandinsky-exp ")[2]
        cli.main([*verb.split(), *ON_HUB])
    for name, mode in (("picture", "RGB"), ("hole", "L"), ("hint", "RGB")):
        Image.new(mode, (64, 64), "white").save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    assert executed(body)["image"].size == (64, 64)


def test_generate_takes_an_adapter_by_its_repository(hub: Hub, published: dict[str, Path], tmp_path: Path) -> None:
    names = ["prior_adapter=club/lp", "decoder_adapter=me/ld"]
    origins = find_origins(composed(tmp_path, "weights=tiny", "prompts=[a]", *names, verb="generate", small=[]))
    for side, repo in (("prior", "club/lp"), ("decoder", "me/ld")):
        (found,) = origins[side].adapters
        file = "pytorch_lora_weights.safetensors"
        assert same(load_file(found.folder / file), load_file(published[repo] / "adapter" / file))
    with pytest.raises(ConfigError, match=r"decoder_adapter: 'me/d' on the hub has no pytorch_lora_weights"):
        find_origins(composed(tmp_path, "prompts=[a]", "decoder_adapter=me/d", verb="generate", small=[]))


def finished(root: Path, name: str, *overrides: str) -> Path:
    train(root, "tracker=none", "trainer.max_steps=1", f"name={name}", *overrides)
    return root / name.strip("'")


def state(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "train.log"}


def test_an_upload_that_breaks_off_is_repeated_by_the_command_that_it_names(
    root: Path, hub: Hub, capfd: pytest.CaptureFixture
) -> None:
    """The run is finished all the same, and what has arrived is not sent again. The prior is local: all parts go."""
    hub.objects.clear()
    hub.takes = len(hub.puts) + 1
    folder = finished(root, "'a=1,b'", ON_HUB[1], "weights.prior=tiny", "hub.push=true", "hub.repo_id=me/x")
    hub.takes = None
    assert read_record(folder).status == "FINISHED"
    before, log = state(folder), capfd.readouterr().err
    typed = f"""kandinsky-exp push 'run="{folder}"' hub.repo_id=me/x"""
    assert "was not uploaded to me/x: Error while uploading" in log
    assert "storage is full" in log
    assert typed in log
    assert hub.repositories["me/x"].files == {}, "no card and no weights before all is there"
    arrived = len(hub.puts)
    cli.main(shlex.split(typed)[1:])
    sent, held = hub.puts[arrived - 1 :], hub.repositories["me/x"]
    assert len(sent) == len(set(sent)) == len({path for path in held.files if path.endswith((".safetensors", ".png"))})
    assert {"prior_prior/config.json", "unet/config.json", "README.md"} <= held.files.keys()
    assert "prior" not in card_of(hub, "me/x")[0]
    cli.main(["push", f"run='{folder}'"])
    assert len(held.commits) == 1, "nothing has changed: nothing is committed"
    assert state(folder) == before


REFUSED = [
    ("hf_mine", "other/x", True, "hub.repo_id: 'other/x' is other's, and you may write for me, club; take me/x"),
    ("hf_mine", "archive/x", True, "hub.repo_id: 'archive/x' is archive's, and you may write for me, club; take me/x"),
    ("hf_mine", "club/locked", False, "hub.repo_id: you may not write to 'club/locked'; choose another"),
    ("hf_mine", "club/locked", True, "hub.private: 'club/locked' exists and is public; choose another, or set"),
    ("hf_mine", "me/x--y", True, "hub.repo_id: Cannot have -- or .. in repo_id"),
    ("hf_reader", "me/x", True, "hub.push: the token may only read; make one that may write"),
    ("hf_unknown", "me/x", True, "hub.push: the hub does not take this token; run `hf auth login`, or renew HF_TOKEN"),
]


@pytest.mark.parametrize(("token", "repo", "private", "message"), REFUSED)
def test_who_may_not_write_there_is_told(
    token: str, repo: str, private: bool, message: str, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["club/locked"] = Repository(private=False)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=re.escape(message)):
        publishing.check_access(repo, private)
    assert "me/x--y" not in hub.repositories


def exit_code(*typed: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(typed))
    return int(stop.value.code)


def test_a_refusal_comes_before_anything_is_made(tmp_path: Path, hub: Hub, capfd: pytest.CaptureFixture) -> None:
    typed = ["weights=tiny", "data=emoji", f"output_root={tmp_path}", "tracker=none", "name=run", "hub.push=true"]
    assert exit_code(*typed, "hub.repo_id=other/x") == 2
    err = capfd.readouterr().err
    assert err.startswith("error: hub.repo_id: 'other/x' is other's")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_verb_refuses_what_is_no_finished_run(
    tmp_path: Path, root: Path, hub: Hub, published: dict[str, Path], capfd: pytest.CaptureFixture
) -> None:
    shutil.copytree(published["me/ld"], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"status": "KILLED"}))
    for typed, message in (
        (["push"], "run: is not set; give the folder of a finished run, run=outputs/my_decoder"),
        (["push", f"run={tmp_path}"], "is not the folder of a run"),
        (["push", f"run={tmp_path}/run"], "was stopped and left no result; go on with it first, by the command that"),
        (["push", f"run={published['me/p']}", "hub.repo_id=other/x"], "hub.repo_id: 'other/x' is other's"),
        (["push", f"run={published['me/p']}", "hub.repo_id=a/b/c"], "hub.repo_id: 'a/b/c' is no <user>/<name>"),
    ):
        assert exit_code(*typed) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: ")
        assert message in err
    assert not any(repo.startswith("other/") for repo in hub.repositories)


def test_the_runs_own_command_goes_on_with_an_upload(
    root: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """A hub that is away stops no training; a signal ends an upload, and what is finished stays finished."""
    typed = ["model=prior", "weights=tiny", "hub.push=true", "hub.repo_id=me/later"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    read_again()
    try:
        folder = finished(root, "later", *typed)
        log = capfd.readouterr().err
        assert exit_code("push", f"run={folder}") == 2
    finally:
        monkeypatch.undo()
        read_again()
    assert "hub.push: the hub could not be asked" in log
    assert "was not uploaded to me/later" in log
    assert "hub: it could not be asked" in capfd.readouterr().err
    with stopped_at("uploading"):
        finished(root, "later", *typed)
    assert read_record(folder).status == "FINISHED"
    assert hub.repositories["me/later"].commits == []
    finished(root, "later", *typed)
    assert len(hub.repositories["me/later"].commits) == 1


def test_texts_of_others_break_no_card() -> None:
    evil = "a | b\n---\n```\n# <b>x</b> [y](z) hf_abcdefghijklmnopqrstuv"
    params = {
        "weights.prior": "/secret/place",
        "weights.decoder": evil,
        "optimizer._target_": evil,
        "data.path": "/mine",
    }
    params |= {"data.resolution": "8); exit(", "data.name": "me/set", "data._target_": "kandinsky_exp.data.sources.hub"}
    for is_adapter in (True, False):
        record = Record(stage="prior", step=3, validation_loss=0.25, rows=7, revision=evil)
        card = model_card(
            "me/it", Result(params, record, is_adapter), [("images/00.png", evil), ("images/grid.png", "")]
        )
        _, head, body = re.split(r"^---$", card, maxsplit=2, flags=re.M)
        found = yaml.safe_load(head)
        assert found["datasets"] == ["me/set"]
        assert "base_model" not in found
        assert "prior" not in found
        assert len(found["widget"]) == 1
        assert body.count("```") == 2
        assert len(re.findall(r"^# ", body, flags=re.M)) == 1
        assert not any(text in card for text in ("/secret", "/mine", "abcdefgh"))
        assert "<b>" not in body
        table = [line for line in body.splitlines() if line.startswith("|")]
        assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table)
        (code,) = re.findall(r"^```python\n(.*?)^```$", body, flags=re.M | re.S)
        compile(code, "card", "exec")
        assert "height='8); exit('" in code


@pytest.mark.parametrize("folder", ["outputs/run", "a b", "x=1,y=[2]", "it's", "back\\slash"])
def test_the_command_that_repeats_is_understood(folder: str) -> None:
    typed = shlex.split(publishing.command(Path(folder), "me/x", False))
    assert typed[:2] == ["kandinsky-exp", "push"]
    parsed = OverridesParser.create().parse_overrides(typed[2:])
    values = {item.key_or_group: getattr(item.value(), "text", item.value()) for item in parsed}
    assert values == {"run": folder, "hub.repo_id": "me/x", "hub.private": False}


# --- the registry of models


def test_a_result_becomes_a_version_of_a_model_where_it_lies(tmp_path: Path) -> None:
    typed = ["model=prior", "name=p", "tracker.register=my prior"]
    train(tmp_path, *typed, "trainer.max_steps=1")
    train(tmp_path, *typed, "trainer.max_steps=1")
    (version,) = client(tmp_path).search_model_versions("name = 'my prior'")
    assert version.version in (1, "1")
    assert version.run_id == runs(tmp_path)[0].info.run_id
    assert version.tags == {"stage": "prior"}
    result = tmp_path / "p" / "pipeline"
    assert version.source == result.as_uri()
    assert client(tmp_path).get_model_version_download_uri("my prior", str(version.version)) == result.as_uri()
    assert not list((tmp_path / "mlartifacts").rglob("*.safetensors"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        found = mlflow.artifacts.download_artifacts("models:/my prior/1")
    assert Path(found).resolve() == result
