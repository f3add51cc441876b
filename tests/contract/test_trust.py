"""What came from elsewhere is data: no target, pickle, script or config of others runs, or leads out of its folder."""

import json
import os
import pickle
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError
from PIL import Image
from running import problems_of, quick_compose

from kandinsky_exp import build, cli
from kandinsky_exp.config import allowlist, saved_config, validation
from kandinsky_exp.data import sources
from kandinsky_exp.errors import ConfigError, DataError
from kandinsky_exp.models import compatibility, components, weight_files, weights
from kandinsky_exp.run import run
from kandinsky_exp.runs import lookup
from kandinsky_exp.verbs import generate
from kandinsky_exp.verbs.encode import encode

TINY = ["data=emoji", "weights=tiny", "tracker=none", "trainer.max_steps=1"]
EVIL = """
import os, pathlib
def mark(*_, **__): pathlib.Path(os.environ["MARKER"]).write_text("ran")
mark()
class Optimizer:
    def __init__(self, *_, **__): mark()
"""


@pytest.fixture(autouse=True)
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What hostile code would write. `evil_parts` does so when it is imported, and when anything in it is called."""
    home = tmp_path / "their_code"
    home.mkdir()
    (home / "evil_parts.py").write_text(EVIL)
    monkeypatch.syspath_prepend(home)
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    sys.modules.pop("evil_parts", None)
    return tmp_path / "marker"


def composed(*overrides: str, verb: str = "train") -> DictConfig:
    small = {"train": TINY, "encode": TINY[:2], "generate": TINY[1:3]}[verb]
    return quick_compose(verb, [*small, *overrides])


def with_node(key: str, node: Any, root: Path, verb: str = "train") -> DictConfig:
    """A config whose `key` is this node, as a file could have it."""
    cfg = composed(f"output_root={root}", verb=verb)
    with open_dict(cfg):
        OmegaConf.update(cfg, key, node, merge=False, force_add=True)
    return cfg


TOUCH = "touch {marker}"
ARGUMENTS = ["touch", "{marker}"]
PROCESS = {
    "_target_": "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
    "entrypoint": "touch",
    "args": ["{marker}"],
    "env": {},
    "stdout": None,
    "stderr": None,
    "local_rank_id": 0,
    "numa_options": None,
}
MARK = {"_target_": "evil_parts.mark"}
ADAM = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.1}
HUB = {"repo_or_dir": "{root}", "model": "make", "source": "local", "trust_repo": True}
CREATED = "${oc.create:{_target_: evil_parts.mark}}"
# What a config could name as its optimizer: {target: its arguments}. {marker} is a file to make, {root} a folder.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "os.system": {"_args_": [TOUCH]},
    "posix.system": {"_args_": [TOUCH]},
    "subprocess.Popen": {"_args_": [ARGUMENTS]},
    "subprocess.run": {"_args_": [ARGUMENTS]},
    "builtins.exec": {"_args_": ["open('{marker}', 'w')"]},
    "builtins.eval": {"_args_": ["open('{marker}', 'w')"]},
    "builtins.open": {"_args_": ["{marker}", "w"]},
    "builtins.__import__": {"_args_": ["evil_parts"]},
    "importlib.import_module": {"_args_": ["evil_parts"]},
    "runpy.run_module": {"_args_": ["evil_parts"]},
    "pathlib.Path.touch": {"_args_": [{"_target_": "pathlib.Path", "_args_": ["{marker}"]}]},
    "shutil.copyfile": {"_args_": [__file__, "{marker}"]},
    "functools.partial": {"_args_": [MARK]},
    "hydra.utils.get_object": {"_args_": ["evil_parts.mark"]},
    "hydra.utils.instantiate": {"_args_": [MARK]},
    "evil_parts.mark": {},
    "evil_parts.Optimizer": {},
    "evil_parts.no_such_thing": {},
    PROCESS["_target_"]: PROCESS,
    "torch.hub.load": HUB,
    "torch.load": {"f": "{root}/evil.pkl", "weights_only": False},
    "torch.jit.load": {"f": "{root}/evil.pkl"},
    "torch.os.system": {"_args_": [TOUCH]},
    "torch.sys.modules": {},
    "torch.serialization.pickle.loads": {"_args_": ["cos\nsystem\n(S'touch {marker}'\ntR."]},
    "torch.optim.AdamW.__init__.__globals__": {},
    "torch.optim.optimizer.functools.partial": {"_args_": [MARK]},
    "torch.utils.data.DataLoader": {"dataset": []},
    "torch.nn.Linear": {"in_features": 1, "out_features": 1},
    "torch.utils.cpp_extension.load": {"name": "x", "sources": []},
    "torchevil.mark": {},
    "diffusers.DiffusionPipeline.from_pretrained": {"_args_": ["{root}"], "custom_pipeline": "{root}"},
    "transformers.AutoModel.from_pretrained": {"_args_": ["{root}"], "trust_remote_code": True},
    "accelerate.utils.os.system": {"_args_": [TOUCH]},
    "kandinsky_exp.tracking.provenance.subprocess.run": {"_args_": [ARGUMENTS]},
    "kandinsky_exp.__main__.main": {},
    "kandinsky_exp.cli.main": {"_args_": [["--version"]]},
    "kandinsky_exp.runs.run_folder.make_root": {"_args_": ["{marker}"]},
    ".evil_parts": {},
    "evil_parts": {},
    "torch..optim.AdamW": {},
    "${evil}": {},
}
# More places in a config: {case: (key, node)}.
PLACES: dict[str, tuple[str, Any]] = {
    "a process as an argument": ("optimizer", ADAM | {"lr": PROCESS}),
    "in a list of an argument": ("optimizer", ADAM | {"betas": [0.9, MARK]}),
    "in positional arguments": ("optimizer", ADAM | {"_args_": [MARK]}),
    "not recursive": ("optimizer", ADAM | {"lr": MARK, "_recursive_": False}),
    "resolved into a target": ("optimizer", ADAM | {"lr": CREATED}),
    "escaped, to be resolved when it is built": ("optimizer", ADAM | {"lr": "\\" + CREATED}),
    "escaped in the data": ("data.flip", "\\" + CREATED),
    "a schedule as optimizer": ("optimizer", {"_target_": "torch.optim.lr_scheduler.LambdaLR", "_partial_": True}),
    "an optimizer as schedule": ("scheduler", ADAM),
    "a schedule": ("scheduler", MARK | {"_partial_": True}),
    "a stage": ("model", {"_target_": "evil_parts.Optimizer", "_partial_": True}),
    "a model as stage": ("model", {"_target_": "torch.nn.Linear", "_partial_": True}),
    "a source": ("data._target_", "evil_parts.mark"),
    "a source that is none": ("data._target_", "kandinsky_exp.runs.hub.push"),
    "borrowed by the sources": ("data._target_", "kandinsky_exp.data.sources.load"),
    "where nothing is built": ("trainer.max_steps", MARK),
    "a key that nobody reads": ("surprise", MARK),
    "a target that is a target": ("optimizer._target_", MARK),
}
CASES = {name: ("optimizer", {**node, "_target_": name, "_partial_": False}) for name, node in OPTIMIZERS.items()}
CASES |= PLACES
# Those that Hydra alone would run: the table has teeth.
LIVE = [
    "evil_parts.mark", "evil_parts.Optimizer", "torch.hub.load", PROCESS["_target_"], "a process as an argument",
    "in a list of an argument", "in positional arguments", "resolved into a target",
    "escaped, to be resolved when it is built",
]  # fmt: skip


def filled(node: Any, **places: Path) -> Any:
    if isinstance(node, dict):
        return {name: filled(value, **places) for name, value in node.items()}
    if isinstance(node, list):
        return [filled(value, **places) for value in node]
    for name, place in places.items() if isinstance(node, str) else ():
        node = node.replace("{" + name + "}", str(place))
    return node


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path(os.environ["MARKER"]),))


@pytest.fixture
def theirs(tmp_path: Path, marker: Path) -> Path:
    """A folder that torch.hub and unpicklers would run code of."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "hubconf.py").write_text("def make():\n    import evil_parts\n    return evil_parts.mark()\n")
    (folder / "evil.pkl").write_bytes(pickle.dumps(Bomb()))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_target_is_refused_and_does_not_run(case: str, theirs: Path, marker: Path, tmp_path: Path) -> None:
    key, node = CASES[case]
    cfg = with_node(key, filled(node, marker=marker, root=theirs), tmp_path)
    found = problems_of(cfg)
    assert any(text.startswith(key.partition(".")[0]) for text in found), found
    for function in (run, lambda cfg: build.target_settings(cfg, key.partition(".")[0])):
        if function is run or key.partition(".")[0] in ("optimizer", "scheduler", "model", "data"):
            with pytest.raises((ConfigError, InterpolationKeyError)):
                function(cfg)
    assert not marker.exists()
    assert "evil_parts" not in sys.modules


@pytest.mark.parametrize("case", LIVE)
def test_hydra_alone_would_run_it(case: str, theirs: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(theirs))
    key, node = CASES[case]
    settings = OmegaConf.to_container(OmegaConf.create(filled({key: node}, marker=marker, root=theirs)), resolve=True)
    made = instantiate(settings[key])
    if hasattr(made, "proc"):
        made.proc.wait()
    for value in made.keywords.values() if hasattr(made, "keywords") else ():
        if hasattr(value, "proc"):
            value.proc.wait()
    assert marker.exists()


GOOD = [
    ("optimizer", {"_target_": "torch.optim.RMSprop", "_partial_": True, "lr": 0.1}),
    ("optimizer", {"_target_": "torch.optim.adam.Adam", "_partial_": True, "lr": 0.1}),
    ("optimizer", {"_target_": "transformers.Adafactor", "_partial_": True, "lr": 0.1, "relative_step": False}),
    ("optimizer", {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.1, "_convert_": "all"}),
    ("scheduler", {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "_partial_": True, "max_lr": 0.1}),
    ("scheduler", {"_target_": "kandinsky_exp.schedules.cosine", "_partial_": True}),
]


@pytest.mark.parametrize(("key", "node"), GOOD, ids=[node["_target_"] for _, node in GOOD])
def test_what_the_packages_offer_is_taken(key: str, node: dict[str, Any], tmp_path: Path) -> None:
    cfg = with_node(key, node, tmp_path)
    assert problems_of(cfg) == []
    assert build.target_settings(cfg, key) == node


# --- what the user adds

MINE = """
import torch, functools
from torch.optim import AdamW
class Mine(AdamW): ...
class Loud(AdamW):
    def __init__(self, params, wrapped=None, **other): super().__init__(params, **other); self.wrapped = wrapped
def make(params, lr): return AdamW(params, lr=lr)
half = functools.partial(make, lr=0.5)
borrowed = functools.partial(torch.hub.load, source="local")
def pictures():
    from kandinsky_exp.data import sources
    return sources.emoji()
"""


@pytest.fixture
def my_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "my_code"
    home.mkdir()
    (home / "my_parts.py").write_text(MINE)
    monkeypatch.syspath_prepend(home)
    monkeypatch.setenv("PYTHONPATH", str(home))
    sys.modules.pop("my_parts", None)


@pytest.mark.parametrize(
    ("target", "taken"),
    [("my_parts.Mine", True), ("my_parts.make", True), ("my_parts.half", True), ("my_parts.AdamW", True),
     ("my_parts.torch.optim.SGD", True), ("my_parts.torch.hub.load", False), ("my_parts.torch.os.system", False),
     ("my_parts.borrowed", False), ("my_parts.functools.partial", False), ("my_parts_too.Mine", False)],
)  # fmt: skip
def test_trust_covers_what_the_users_module_makes(target: str, taken: bool, my_parts: None, tmp_path: Path) -> None:
    """Not what it has imported: a config could reach everything from there."""
    cfg = with_node("optimizer", {"_target_": target, "_partial_": True}, tmp_path)
    found = problems_of(cfg, trusted=["my_parts"])
    assert (found == []) is taken, found


HALF = """
from kandinsky_exp.stages.base import DiffusionStage
from kandinsky_exp.stages.prior import PriorStage

class Half(DiffusionStage):
    part = "prior"

class Whole(PriorStage):
    name = "whole"
"""


@pytest.mark.parametrize(
    ("node", "told"),
    [
        ({"_target_": "half_parts.Half", "_partial_": True}, "model._target_: half_parts.Half lacks clean, enable_gra"),
        ({"_target_": "half_parts.Whole"}, "model._partial_: has to be true"),
        ({"_target_": "nowhere_parts.A"}, "model._target_: Python does not find nowhere_parts; if nowhere_parts.py is"),
    ],
)
def test_what_a_module_of_ones_own_lacks_is_told(
    node: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_parts.py").write_text(HALF)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("half_parts", None)
    (found,) = problems_of(with_node("model", node, tmp_path), trusted=["half_parts", "nowhere_parts"])
    assert found.startswith(told)
    assert "pip install" not in found  # a stranger's package may be called so


def test_a_nested_target_of_the_users(my_parts: None, tmp_path: Path) -> None:
    import torch

    node = {"_target_": "my_parts.Loud", "_partial_": True, "wrapped": {"_target_": "my_parts.make", "_partial_": True}}
    cfg = with_node("optimizer", node, tmp_path)
    assert len(problems_of(cfg)) == 2
    validation.validate(cfg, "train", ["my_parts"])
    made = build.make_optimizer(cfg, [torch.nn.Parameter(torch.zeros(1))], build.accelerator(cfg).device)
    assert (type(made).__name__, made.wrapped.func.__name__) == ("Loud", "make")


def test_a_file_adds_nothing_to_what_is_trusted(my_parts: None, tmp_path: Path) -> None:
    cfg = with_node("optimizer", {"_target_": "my_parts.Mine", "_partial_": True, "lr": 0.1}, tmp_path)
    cfg.trusted_modules = ["my_parts"]
    found = problems_of(cfg)
    assert found[0].startswith("trusted_modules: a config file may not add my_parts; if you trust that code, type")
    assert found[1].startswith("optimizer._target_: my_parts.Mine is outside of the modules that a config may name")
    for refused in (lambda: run(cfg), lambda: validation.validate(cfg, "train", ["others"]), lambda: encode(cfg)):
        with pytest.raises(ConfigError, match="trusted_modules: a config file may not add my_parts"):
            refused()
    with pytest.raises(ConfigError, match="outside of the modules"):
        build.target_settings(cfg, "optimizer")
    assert "my_parts" not in sys.modules


def test_what_was_validated_as_trusted_stays_so_and_is_recorded(my_parts: None, tmp_path: Path) -> None:
    cfg = with_node("optimizer", {"_target_": "my_parts.Mine", "_partial_": True, "lr": 0.1}, tmp_path)
    validation.validate(cfg, "train", ["my_parts"])
    validation.validate(cfg, "train")  # as `run` does once the command has
    assert "trusted_modules:\n- my_parts\n" in saved_config.to_yaml(cfg)
    assert build.target_settings(cfg, "optimizer")["_target_"] == "my_parts.Mine"
    again = OmegaConf.create(saved_config.to_yaml(cfg))
    assert allowlist.refused(again, ()) == ["my_parts"]
    merged = OmegaConf.merge(cfg, {"trusted_modules": ["my_parts", "evil_parts"]})
    assert allowlist.refused(merged, ()) == ["evil_parts"]


def test_without_the_key_all_is_as_before(tmp_path: Path) -> None:
    cfg = composed(f"output_root={tmp_path}")
    with open_dict(cfg):
        del cfg["trusted_modules"]
    validation.validate(cfg, "train")
    for wrong in ("[3]", "[a-b]", "my_parts"):
        (found,) = problems_of(composed(f"trusted_modules={wrong}"))
        assert found.startswith("trusted_modules: has to be")


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of somebody else's configs, `--config-dir`; the working directory is an empty one."""
    folder = tmp_path / "foreign"
    (folder / "experiment").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def answer(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    out, err = capfd.readouterr()
    assert caught.value.code == 2, out + err
    return err


def saved(folder: Path, **more: Any) -> list[str]:
    """The arguments that run a config.yaml as an earlier run has left it, with something more in it."""
    values = OmegaConf.to_container(composed(), resolve=True) | more
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return ["--config-dir", str(folder), "--config-name", "config", "hydra/job_logging=none"]  # no log file left open


CLAIM = {"optimizer": {"_target_": "evil_parts.mark", "_partial_": True, "lr": 0.1}, "trusted_modules": ["evil_parts"]}
REFUSAL = "trusted_modules: a config file may not add evil_parts"


def test_a_downloaded_config_cannot_trust_itself(
    foreign: Path, marker: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert REFUSAL in answer(capfd, *saved(foreign, **CLAIM))
    claimed = {"overrides": {"task": ["trusted_modules=[evil_parts]"]}}
    assert REFUSAL in answer(capfd, *saved(foreign, **CLAIM, hydra=claimed))
    assert REFUSAL in answer(capfd, *saved(foreign, **CLAIM, more=["evil_parts"]), "trusted_modules=${more}")
    (foreign / "experiment" / "e.yaml").write_text(
        "# @package _global_\noptimizer:\n  _target_: evil_parts.mark\ntrusted_modules: [evil_parts]\n"
    )
    assert REFUSAL in answer(capfd, "--config-dir", str(foreign), "experiment=e", *TINY)
    assert REFUSAL in answer(capfd, "--config-dir", str(foreign), "experiment=e", *TINY, "-m", "seed=1,2")
    assert not marker.exists()


def test_a_sweep_in_a_file_types_nothing(foreign: Path, marker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (foreign / "sweep").mkdir()
    (foreign / "sweep" / "s.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      trusted_modules: '[evil_parts]'\n      optimizer._target_: evil_parts.mark\n      seed: 1,2\n"
    )
    message = answer(capfd, "--config-dir", str(foreign), "sweep=s", *TINY, "name=s")
    assert REFUSAL in message
    assert not marker.exists()


def test_the_typed_key_counts(my_parts: None, foreign: Path, tmp_path: Path) -> None:
    mine = ["data._target_=my_parts.pictures", "trusted_modules=[my_parts]", f"output_root={tmp_path / 'out'}"]
    cli.main(["encode", "model=prior", *TINY[:2], "data.max_samples=4", *mine])
    assert list((tmp_path / "out" / "cache").glob("*/table.json"))
    encode(composed("model=prior", "data.max_samples=4", *mine[::2], verb="encode"), ["my_parts"])


# --- Hydra's own section

SECTIONS: dict[str, dict[str, Any]] = {
    "a callback": {"callbacks": {"evil": {"_target_": "evil_parts.Optimizer"}}},
    "a callback of Hydra's that builds": {
        "callbacks": {"evil": {"_target_": "hydra.utils.instantiate", "config": MARK}}
    },
    "a plugin": {"launcher": {"_target_": "evil_parts.Optimizer"}},
    "an argument of a plugin": {"sweeper": {"params": {"seed": MARK}}},
    "a handler": {"job_logging": {"version": 1, "handlers": {"evil": {"()": "evil_parts.Optimizer"}}}},
    "a handler's class": {"job_logging": {"version": 1, "handlers": {"evil": {"class": "evil_parts.Optimizer"}}}},
    "a formatter": {"hydra_logging": {"version": 1, "formatters": {"evil": {"()": "evil_parts.Optimizer"}}}},
    "an object of a module": {"hydra_logging": {"version": 1, "filters": {"evil": {"name": "ext://evil_parts.mark"}}}},
    "the environment": {"job": {"env_set": {"HF_ENDPOINT": "http://localhost:1"}}},
}


@pytest.mark.parametrize("case", SECTIONS)
def test_hydras_own_section_is_judged_before_it_acts(
    case: str, foreign: Path, marker: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    message = answer(capfd, *saved(foreign, hydra=SECTIONS[case]))
    assert "is nothing that Hydra may build" in message or "is no handler" in message or "for a file to set" in message
    assert not marker.exists()
    assert "HF_ENDPOINT" not in os.environ


def test_harmless_sections_pass(foreign: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = {"class": "logging.StreamHandler", "stream": "ext://sys.stderr"}
    section = {
        "callbacks": {"log": {"_target_": "hydra.experimental.callbacks.LogJobReturnCallback"}},
        "job_logging": {"version": 1, "handlers": {"console": logger}, "root": {"handlers": ["console"]}},
        "job": {"env_set": {"OMP_NUM_THREADS": "1"}},
    }
    assert "\nerror: seed: has to be a whole number" in answer(capfd, *saved(foreign, hydra=section, seed=-1))
    typed = ["+hydra.job.env_set.HF_HUB_OFFLINE=1", "hydra/hydra_logging=default"]
    assert answer(capfd, *TINY, "seed=-1", *typed).startswith("error: seed: has to be a whole number")


# --- a run of others, as `generate` reads it


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weights:\n  prior: ${oc.env:HF_TOKEN}\n", "${oc.env:HF_TOKEN}"),
        ("weights:\n  prior: a\n  decoder: {_target_: evil_parts.mark}\n", "a"),
        ("weights:\n  prior: 7\n", "7"),
        ("weights: []\n", None),
        ("weights.prior: a\n", None),
        ("weights:\n  prior: {_target_: evil_parts.mark}\n", "weights.prior is no text"),
        ("weights:\n  prior: !!python/object/apply:evil_parts.mark []\n", "cannot be read"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nweights:\n  prior: x\n", "it has aliases"),
        ("weights:\n  prior: x\n" + "#" * (1 << 18), "more than 256 KB"),
        ("[" * 20000, "cannot be read"),
    ],
    ids=range(10),
)
def test_a_foreign_config_is_plain_data(
    text: str, expected: str | None, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_aaaabbbbccccdddd")
    (tmp_path / "config.yaml").write_text(text)
    if expected is not None and " " in expected:
        with pytest.raises(ConfigError, match=expected):
            saved_config.value(tmp_path, "weights.prior")
    else:
        assert saved_config.value(tmp_path, "weights.prior") == expected
    assert not marker.exists()


def test_a_foreign_interpolation_is_not_expanded_in_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_PLACE", "/what/is/here")
    (tmp_path / "run.json").write_text('{"step": 1}')
    (tmp_path / "config.yaml").write_text("weights:\n  prior: /x/${oc.env:SOME_PLACE}\n  decoder: tiny\n")
    cfg = composed(f"prior={tmp_path}", "prompts=[a]", verb="generate")
    with pytest.raises(ConfigError, match=r"weights in '/x/\$\{oc\.env:SOME_PLACE\}', which are not"):
        generate.find_origins(cfg)


# --- weights


@pytest.fixture
def their_weights(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "weights"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def zipped(file: Path) -> None:
    import torch

    torch.save({"weight": torch.zeros(2)}, file)


PICKLED = {
    "prior_prior/diffusion_pytorch_model.bin": lambda file: file.write_bytes(b""),
    "prior_text_encoder/pytorch_model.PT": lambda file: file.write_bytes(b""),
    "prior_image_encoder/flax_model.msgpack": lambda file: file.write_bytes(b""),
    "prior_tokenizer/words.pkl": lambda file: file.write_bytes(pickle.dumps(Bomb())),
    "prior_prior/more/model.ckpt": lambda file: file.write_bytes(b""),
    "prior_scheduler/tf_model": lambda file: file.write_bytes(b"\x89HDF\r\n\x1a\n"),
}
DISGUISED = {
    "prior_prior/notes.txt": lambda file: file.write_bytes(pickle.dumps(Bomb())),
    "prior_prior/old.safetensors": zipped,
    "prior_tokenizer/merges.txt": lambda file: file.write_bytes(pickle.dumps(Bomb())),
}


def test_pickles_beside_good_weights_are_passed_over_and_named_once(their_weights: Path, marker: Path) -> None:
    """Nothing reads them: neither a check nor what loads the part."""
    for name, write in PICKLED.items():
        (their_weights / name).parent.mkdir(exist_ok=True)
        write(their_weights / name)
    assert components.check_source(str(their_weights), "prior") is None
    validation.validate(composed("model=prior", f"weights.prior={their_weights}"), "train")
    theirs = weights.Weights(str(their_weights), "tiny", their_weights / "cache")
    sides = {part for part, (side, _) in components.PARTS.items() if side == "prior"}
    (note,) = compatibility.check(theirs, sides)
    assert re.search(r"passed over.*prior_image_encoder/flax_model\.msgpack' and 5 more", note)
    for part in sorted(sides):
        theirs.load(part)
    assert not marker.exists()


@pytest.mark.parametrize("name", DISGUISED)
def test_a_pickle_that_calls_itself_a_file_that_is_read_is_refused(
    name: str, their_weights: Path, marker: Path
) -> None:
    DISGUISED[name](their_weights / name)
    problem = components.check_source(str(their_weights), "prior")
    assert problem is not None
    assert f"'{name}' is a pickle or an archive" in problem
    assert "remove it, or convert it to .safetensors" in problem
    with pytest.raises(ConfigError, match=re.escape(f"weights.prior: '{their_weights}': '{name}'")):
        validation.validate(composed("model=prior", f"weights.prior={their_weights}"), "train")
    assert not marker.exists()


def test_a_folder_with_pickles_alone_is_refused(their_weights: Path) -> None:
    (their_weights / "prior_prior" / "diffusion_pytorch_model.bin").write_bytes(b"")
    (their_weights / "prior_prior" / "diffusion_pytorch_model.safetensors").unlink()
    problem = str(components.check_source(str(their_weights), "prior"))
    assert "'prior_prior' has no .safetensors file, but 'diffusion_pytorch_model.bin': it is a pickle" in problem


@pytest.mark.parametrize("length", [0x0280, 0x0480, 0x4B50])  # headers whose length looks like a pickle's beginning
def test_a_length_in_front_of_tensors_is_no_pickle(length: int, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for pad in range(length):
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"x": "y" * (length - 90 + pad)})
        if int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") == length:
            break
    assert int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") == length
    assert weight_files.untrusted(tmp_path) is None


def test_a_foreign_checkpoint_of_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prior").mkdir()
    (tmp_path / "prior" / "adapter.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"prior: .*has no \.safetensors file, but 'adapter\.bin': it is a pickle"):
        lookup.trained_network(tmp_path, "prior")
    (tmp_path / "prior" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert lookup.trained_network(tmp_path, "prior") == tmp_path / "prior"


def test_a_model_that_asks_for_a_repositorys_kernel(their_weights: Path) -> None:
    """transformers would fetch it from the hub and run it, whoever calls from_pretrained."""
    change(their_weights / "prior_text_encoder" / "config.json", _attn_implementation="someone/kernel")
    assert "asks for the code of 'someone/kernel'" in str(components.check_source(str(their_weights), "prior"))
    theirs = weights.Weights(str(their_weights), "tiny", their_weights / "cache")  # as from the hub, without that check
    assert theirs.load("text_encoder").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/dev/zero", "a/b.safetensors", "..\\b.safetensors"])
def test_shards_that_lead_out(name: str, their_weights: Path) -> None:
    index = their_weights / "prior_prior" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    assert "leads out of its folder" in str(components.check_source(str(their_weights), "prior"))
    assert all(file.parent == index.parent for file in weight_files.opened(index.parent, True, None))


def test_custom_code_in_weights_is_not_run_and_not_passed_on(
    their_weights: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto_map = dict.fromkeys(["AutoModel", "AutoTokenizer", "AutoImageProcessor"], "evil_parts.Optimizer")
    for folder in [their_weights, *(path for path in their_weights.iterdir() if path.is_dir())]:
        (folder / "evil_parts.py").write_text(EVIL)
        for file in folder.glob("*config.json"):
            change(file, auto_map=auto_map, trust_remote_code=True, custom_pipeline="evil_parts")
    entries = json.loads((their_weights / "model_index.json").read_text())
    theirs = {name: ["evil_parts", "Optimizer"] for name in entries if not name.startswith(("_", "prior_sch", "sch"))}
    change(their_weights / "model_index.json", **theirs)
    monkeypatch.chdir(their_weights)
    cfg = composed(
        f"weights.prior={their_weights}", f"weights.decoder={their_weights}", f"output_root={tmp_path / 'out'}",
        "name=r", "data.max_samples=4", "validation.every=1", "validation.prompts=[a dog]", "validation.draws=1",
        "validation.inference_steps=2",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys in configs that are not expected
        run(cfg)
    assert not marker.exists()
    result = tmp_path / "out" / "r" / "pipeline"
    index = json.loads((result / "model_index.json").read_text())
    assert {entry[0] for name, entry in index.items() if not name.startswith("_")} == {"diffusers", "transformers"}
    assert "evil" not in (result / "model_index.json").read_text()
    assert {file.suffix for file in result.rglob("*") if file.is_file()} <= {".json", ".safetensors", ".txt", ".model"}


def test_a_loading_script_of_a_data_set_is_not_run(marker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    (folder / "loading.py").write_text(EVIL)
    assert len(sources.hub(str(folder)).train) == 1
    (folder / "pictures.py").write_text(EVIL)
    for name in (folder, folder / "pictures.py"):
        with pytest.raises(DataError, match=r"data\.name: .* cannot be loaded"):
            sources.hub(str(name))
    assert not marker.exists()
