"""Every yaml of conf/ composed and bound, the defaults of the contract, and the check of a config."""

import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from running import SMALL, hydra_compose, problems_of, quick_compose

from kandinsky_exp.config import saved_config, suggestions, targets, validation
from kandinsky_exp.config.schema import Optimizer
from kandinsky_exp.config.types import at_least, fits, type_problem
from kandinsky_exp.errors import ConfigError

CONF = Path(__file__).parents[2] / "conf"
PROJECT = tomllib.loads((CONF.parent / "pyproject.toml").read_text("utf-8"))["project"]
YAMLS = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml"))
GROUPED = [name for name in YAMLS if "/" in name and not name.startswith("hydra/")]
TINY = ["data=emoji", "weights=tiny", "tracker=none"]
EXTRAS = {
    "optimizer/adamw_8bit": "bitsandbytes",
    "optimizer/prodigy": "prodigyopt",
    "optimizer/schedule_free": "schedulefree",
}


def composed(*overrides: str, verb: str = "train") -> DictConfig:
    return quick_compose(verb, overrides)


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        (
            "train",
            [*SMALL, "model=prior", "adapter=lora", "adapter.rank=3", "optimizer=sgd", "validation.prompts=[a, b]"],
        ),
        ("train", ["experiment=demo_prior", "name=${seed}", "optimizer.betas=[0.1,0.2]", "model.snr_gamma=null"]),
        ("generate", ["weights=tiny", "prompts=[a]", "height=64"]),
    ],
)
def test_what_the_tests_compose_is_what_hydra_composes(verb: str, words: list[str]) -> None:
    expected = hydra_compose(verb, words)
    for _ in range(2):
        made = quick_compose(verb, words)
        assert made == expected
        assert OmegaConf.is_struct(made)


@pytest.mark.parametrize("word", ["modle=prior", "model=pior", "trainer.stepz=3", "optimizer.lr=1,2", "name=["])
def test_what_hydra_refuses_is_refused_as_hydra_does_it(word: str) -> None:
    messages = []
    for way in (quick_compose, hydra_compose):
        with pytest.raises(HydraException) as caught:
            way("train", [word])
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def problems(*overrides: str) -> list[str]:
    return problems_of(composed(*TINY, *overrides))


# --- conf/


@pytest.mark.parametrize("name", YAMLS)
def test_opens_with_a_command_that_uses_it(name: str) -> None:
    lines = (CONF / f"{name}.yaml").read_text().removeprefix("# @package _global_\n").splitlines()
    assert lines[0].startswith("# kandinsky-exp ")
    group, _, option = name.rpartition("/")
    if group and option != "default":
        assert f"{group}={option}" in lines[0]


@pytest.mark.parametrize("name", GROUPED)
def test_every_option_composes_and_binds(name: str, tmp_path: Path) -> None:
    group, _, option = name.rpartition("/")
    overrides = [f"{group}={option}"]
    if group not in ("data", "experiment"):
        overrides += ["data=emoji"]
    if name in ("data/folder", "data/webdataset"):
        overrides += [f"data.path={tmp_path}"]
    if name == "data/list":
        (tmp_path / "list.csv").touch()
        overrides += [f"data.path={tmp_path / 'list.csv'}"]
    if "dreambooth" in name:
        overrides += [f"data.instance_path={tmp_path}", "data.instance_prompt=a sks dog"]
    if name == "data/hub":
        overrides += ["data.name=someone/something"]
    found = problems_of(composed(*overrides))
    if name in EXTRAS and find_spec(EXTRAS[name]) is None:
        assert [text for text in found if f"'{EXTRAS[name]}', which is not installed; pip install" in text] == found
        assert len(found) == 1
    else:
        assert found == []


@pytest.mark.parametrize("name", [name for name in YAMLS if name.startswith("sweep/")])
def test_every_value_of_a_sweep_is_good(name: str) -> None:
    params = OmegaConf.load(CONF / f"{name}.yaml").hydra.sweeper.params
    overrides = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    assert overrides
    for override in overrides:
        values = list(override.sweep_string_iterator())
        assert len(values) > 1
        sweep = f"sweep={name.partition('/')[2]}"  # it may choose what its values need
        assert [problem for value in values for problem in problems(sweep, f"{override.key_or_group}={value}")] == []


def test_generate_composes_and_binds() -> None:
    assert problems_of(composed("weights=tiny", "prompts=[a fox]", verb="generate"), "generate") == []


def test_defaults_of_the_contract() -> None:
    values = saved_config.flatten(composed())
    expected = {
        "name": None,
        "output_root": str(Path("outputs").absolute()),
        "seed": 0,
        "model._target_": "kandinsky_exp.stages.decoder.DecoderStage",
        "model.snr_gamma": None,
        "model.condition_dropout": 0.1,
        "model.vlb_weight": 0.001,
        "weights.prior": "kandinsky-community/kandinsky-2-2-prior",
        "weights.decoder": "kandinsky-community/kandinsky-2-2-decoder",
        "weights.prior_revision": None,
        "weights.decoder_revision": None,
        "weights.variant": None,
        "data._target_": "kandinsky_exp.data.sources.folder",
        "data.path": "???",
        "data.image_column": "image",
        "data.caption_column": "text",
        "data.resolution": 512,
        "data.max_samples": None,
        "data.num_workers": 0,
        "data.cache": True,
        "optimizer._target_": "torch.optim.AdamW",
        "optimizer.lr": 1e-5,
        "optimizer.weight_decay": 0.0,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.eps": 1e-8,
        "scheduler._target_": "kandinsky_exp.schedules.constant",
        "scheduler.warmup_steps": 0,
        "precision.mixed_precision": "no",
        "adapter.name": "none",
        "trainer.max_steps": 15000,
        "trainer.max_epochs": None,
        "trainer.batch_size": 1,
        "trainer.grad_accumulation": 1,
        "trainer.max_grad_norm": 1.0,
        "trainer.gradient_checkpointing": False,
        "trainer.compile": False,
        "trainer.attention": "sdpa",
        "trainer.ema_decay": None,
        "trainer.log_every": 10,
        "checkpoint.every": 500,
        "checkpoint.keep": 3,
        "checkpoint.resume": "auto",
        "validation.every": 500,
        "validation.prompts": [],
        "validation.inference_steps": 25,
        "validation.guidance_scale": 4.0,
        "validation.seed": 0,
        "validation.fraction": 0.05,
        "tracker.name": "mlflow",
        "tracker.experiment": "kandinsky-2-2",
        "hub.push": False,
        "hub.repo_id": None,
    }
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_naruto_is_the_guides_command(stage: str) -> None:
    values = saved_config.flatten(composed(f"experiment=naruto_{stage}"))
    expected = {
        f"weights.{stage}": f"kandinsky-community/kandinsky-2-2-{stage}",
        "data.name": "lambdalabs/naruto-blip-captions",
        "data.resolution": 768,
        "trainer.batch_size": 1,
        "trainer.grad_accumulation": 4,
        "trainer.gradient_checkpointing": stage == "decoder",
        "trainer.max_steps": 15000,
        "trainer.max_epochs": None,
        "trainer.max_grad_norm": 1.0,
        "trainer.ema_decay": None,
        "optimizer._target_": "torch.optim.AdamW",
        "optimizer.lr": 1e-5,
        "optimizer.weight_decay": 0.0,
        "optimizer.betas": [0.9, 0.999],
        "optimizer.eps": 1e-8,
        "scheduler._target_": "kandinsky_exp.schedules.constant",
        "scheduler.warmup_steps": 0,
        "precision.mixed_precision": "fp16",
        "precision.tf32": False,
        "model.snr_gamma": None,
        "model.condition_dropout": 0.0,
        "checkpoint.every": 500,
        "checkpoint.keep": 3,
        "validation.prompts": ["A robot naruto, 4k photo"],
        "hub.push": False,
    }
    assert {key: values[key] for key in expected} == expected
    assert values.get("model.vlb_weight", 0.0) == 0.0
    assert stage in values["model._target_"]


# --- the check


def test_everything_wrong_is_listed_at_once() -> None:
    found = problems(
        "trainer.max_steps=-1",
        "optimizer.lr=abc",
        "+modle=decoder",
        "hub.push=true",
        "+model.gamma=5",
        "validation.prompts=nowhere.txt",
        "optimizer._target_=no_such_package.Adam",
    )
    keys = [text.partition(":")[0] for text in found]
    assert sorted(keys) == sorted(
        [
            "trainer.max_steps",
            "optimizer.lr",
            "modle",
            "hub.repo_id",
            "model.gamma",
            "validation.prompts",
            "optimizer._target_",
        ]
    )
    with pytest.raises(ConfigError) as caught:
        validation.validate(composed(*TINY, "trainer.max_steps=-1", "seed=x"), "train")
    assert len(caught.value.problems) == 2


GOOD = [
    "model.snr_gamma=5",
    "trainer.max_grad_norm=null",
    "trainer.ema_decay=0.999",
    "adapter=lora adapter.rank=8",
    "adapter=lora adapter.target_modules=[to_q,to_v]",
    "optimizer=sgd +optimizer.dampening=0.1",
    "optimizer=adafactor optimizer.beta1=0.9",
    "optimizer._target_=torch.optim.RMSprop ~optimizer.betas",
    "scheduler=cosine_with_restarts scheduler.num_cycles=4",
    "tracker=mlflow tracker.uri=postgresql+psycopg2://me:secret@host/db",
    "tracker=mlflow tracker.uri=http://localhost:5000",
    "validation.fraction=0",
    "validation.prompts=[]",
    "name=run_1",
    "model.condition_dropout=1",
    "data.num_workers=2",
    "weights.decoder=someone/some-model",
]


@pytest.mark.parametrize("line", GOOD)
def test_accepts(line: str) -> None:
    assert problems(*line.split(" ")) == []


BAD = [  # (override, the message)
    ("seed=-1", "seed: has to be a whole number, between 0 and 2^32 - 1, not -1"),
    ("seed=1.5", "seed: has to be a whole number, between 0 and 2^32 - 1, not 1.5"),
    ("trainer.max_steps=1e3", "trainer.max_steps: has to be a whole number, at least 1, not 1000.0; write 1000"),
    ("trainer.max_steps=true", "trainer.max_steps: has to be a whole number, at least 1, not true"),
    ("trainer.compile=yes", "trainer.compile: has to be true or false, or one of regional, not 'yes'"),
    ("trainer.compile=1", "trainer.compile: has to be true or false, or one of regional, not 1"),
    ("trainer.batch_size=null", "trainer.batch_size: has to be a whole number, at least 1, not null"),
    ("optimizer.lr=0", "optimizer.lr: has to be a number, above 0, not 0"),
    ("optimizer.lr=inf", "optimizer.lr: has to be a number, above 0, not inf"),
    ("optimizer.lr=nan", "optimizer.lr: has to be a number, above 0, not nan"),
    ("name=2024", "as text it needs quotes inside the shell's: '\"2024\"'"),
    ("name=a/b", "name: has to be text, without any of /"),
    ("checkpoint.resume=", "checkpoint.resume: has to be text"),
    ("data.cache_dtype=int8", "data.cache_dtype: has to be one of fp16, fp32, not 'int8'"),
    ("optimizer.betas=[0.9]", "optimizer.betas: has to be a list of numbers, two of them, each at least 0 and below 1"),
    ("adapter.rank=8", "adapter.rank: is set, but adapter=none trains all weights; add adapter=lora"),
    ("~trainer.max_steps", "trainer.max_steps: is missing"),
    ("+trainer.max_step=3", "trainer.max_step: nothing reads this key; remove it; did you mean trainer.max_steps?"),
    ("+device_memory=24", "device_memory: nothing reads this key; remove it"),  # it is of another verb
    ("tracker.uri=runs", "tracker.uri: 'runs' is no address"),
    ("validation.prompts=a fox", "there is no text file 'a fox'; a list of prompts is written 'validation.prompts="),
    ("weights.prior=not/a/folder", "weights.prior: there is no folder 'not/a/folder'"),
    ("+optimizer.foo=1", "optimizer.foo: torch.optim.AdamW takes no such argument, it takes lr, betas"),
    ("+optimizer.params=[]", "optimizer.params: is handed over by the run itself; remove it"),
    ("+optimizer.amsgrad=3", "optimizer.amsgrad: has to be true or false, not 3"),
    ("+optimizer._partail_=true", "optimizer._partail_: no such key; did you mean _partial_?"),
    ("optimizer._target_=torch.optim.adamw", "optimizer._target_: torch.optim.adamw cannot be called"),
    ("optimizer._target_=torch.optim.AdamX", "optimizer._target_: there is no 'AdamX' in torch.optim; did you mean"),
    ("optimizer._target_=AdamW", "optimizer._target_: has to be package.module.name, not 'AdamW'"),
    ("optimizer._target_=null", "optimizer._target_: has to be text, not null"),
    ("seed=${sed}", "seed: Interpolation key 'sed' not found"),
]


@pytest.mark.parametrize(("override", "message"), BAD)
def test_refuses(override: str, message: str) -> None:
    found = problems(override)
    assert len([text for text in found if message in text]) == 1, found
    assert all(override.lstrip("+~").split("=")[0] in text for text in found)


def test_missing_path_says_what_to_give() -> None:
    (found,) = problems_of(composed())
    assert found.startswith("data.path: is not set; give the folder of your images")


def test_packages_that_are_not_installed() -> None:
    if find_spec("xformers") is None:
        (found,) = problems("trainer.attention=xformers")
        assert 'xformers is not installed; pip install "kandinsky-exp[xformers]"' in found


@pytest.mark.parametrize(("version", "refused"), [("0.47.2", True), ("0.48.0", False), ("0.49.0.dev0", False)])
@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_bitsandbytes_that_moves_no_8_bit_weights(
    bits: str, version: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that name and version, as pip leaves it."""
    assert PROJECT["optional-dependencies"]["bitsandbytes"] == ["bitsandbytes>=0.48"]
    about = tmp_path / f"bitsandbytes-{version}.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: bitsandbytes\nVersion: {version}\n")
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = problems("adapter=lora", f"adapter.base_precision={bits}", "precision=bf16")
    what = f"adapter.base_precision: bitsandbytes {version} does not move 8-bit weights to a device, 0.48 does; pip"
    assert [text.startswith(what) for text in found] == ([True] if refused else [])


@pytest.mark.parametrize(
    ("option", "package", "extra"),
    [
        ("adamw_8bit", "bitsandbytes", "bitsandbytes"),
        ("prodigy", "prodigyopt", "prodigy"),
        ("schedule_free", "schedulefree", "schedulefree"),
    ],
)
def test_an_optimizer_that_is_not_installed(
    option: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert extra in PROJECT["optional-dependencies"]
    monkeypatch.setitem(sys.modules, package, None)  # as Python notes what must not be found
    (found,) = problems(f"optimizer={option}")
    assert found.startswith("optimizer._target_: ")
    assert f"'{package}', which is not installed; pip install \"kandinsky-exp[{extra}]\"" in found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("optimizer=schedule_free", []),
        ("optimizer=schedule_free trainer.ema_decay=0.9", ["trainer.ema_decay: a schedule-free optimizer averages"]),
        ("optimizer=schedule_free scheduler=cosine", ["scheduler._target_: a schedule-free optimizer keeps its rate"]),
        (
            "optimizer=schedule_free scheduler.warmup_steps=20",
            ["scheduler.warmup_steps: a schedule-free optimizer warms up by itself; set optimizer.warmup_steps=20"],
        ),
        (
            "optimizer=schedule_free optimizer.warmup_steps=20 trainer.max_steps=10",
            ["optimizer.warmup_steps: 20 is more than trainer.max_steps, 10"],
        ),
        ("optimizer=prodigy scheduler=cosine scheduler.warmup_steps=5", []),
        ("optimizer=prodigy optimizer.lr=1e-4", ["optimizer.lr: 0.0001 is a factor on the rate that Prodigy finds"]),
        ("optimizer=muon trainer.ema_decay=0.9 scheduler=linear", []),
    ],
)
def test_what_goes_with_an_optimizer(line: str, expected: list[str]) -> None:
    found = problems(*line.split(" "))
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True)), found


def test_files_are_looked_for(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox, in snow\n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    assert problems(f"validation.prompts={prompts}") == []
    assert "is empty" in problems(f"validation.prompts={empty}")[0]
    assert "not a text file" in problems(f"validation.prompts={binary}")[0]
    assert "is a file" in problems(f"output_root={prompts}")[0]
    assert "there is no folder" in problems_of(composed(f"data.path={tmp_path / 'nowhere'}"))[0]
    assert "no folder" in problems(f"checkpoint.resume={tmp_path / 'nowhere'}")[0]


@pytest.mark.parametrize(
    "name", ["cache", "generate", "export", "compare", "data", "evaluate", "mlartifacts", "mlflow.db", "Cache"]
)
def test_a_name_that_the_outputs_folder_needs(name: str, tmp_path: Path) -> None:
    settings = [f"name={name}", f"output_root={tmp_path}"]
    assert problems("data=emoji", "weights=tiny", *settings) == [
        f"name: '{name}' is what all runs share in output_root; give another name"
    ]
    for begun in ("run.json", ".jobs/seed=1.json"):  # a run, or a sweep, from before
        (file := tmp_path / name / begun).parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        assert problems("data=emoji", "weights=tiny", *settings) == []
        file.unlink()


def test_generate_wants_prompts() -> None:
    found = problems_of(composed("weights=tiny", verb="generate"), "generate")
    assert found == ["prompts: is empty; give a list, or a text file with one prompt per line"]


def test_a_users_own_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_parts.py").write_text("class Mine:\n    def __init__(self, params, lr: float, **other): ...\n")
    (tmp_path / "own_broken.py").write_text("import no_such_thing\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = ["optimizer._target_=own_parts.Mine", "+optimizer.anything=goes"]
    trusted = ["own_parts", "own_broken"]
    assert problems_of(composed(*TINY, *mine), trusted=trusted) == []
    (found,) = problems_of(composed(*TINY, "model._target_=own_parts.Mine", "+model.lr=1"), trusted=trusted)
    assert found.startswith("model._target_: own_parts.Mine is no stage; derive it from kandinsky_exp.stages.base.")
    (found,) = problems_of(composed(*TINY, "optimizer._target_=own_broken.Mine"), trusted=trusted)
    assert "importing own_broken failed: ModuleNotFoundError: No module named 'no_such_thing'" in found


@pytest.mark.parametrize("name", ["weights", "pipelines", "adapters"])
@pytest.mark.parametrize("line", ["from kandinsky_exp.{} import anything", "from kandinsky_exp import {}"])
def test_an_import_from_a_former_place_is_told_the_new_one(
    line: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"my_old_{name}_{len(line)}"
    (tmp_path / f"{module}.py").write_text(f"import {module}_beside\n")
    (tmp_path / f"{module}_beside.py").write_text(line.format(name))
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = problems_of(composed(*TINY, f"model._target_={module}.Mine"), trusted=[module])
    moved = f"kandinsky_exp.{name} is kandinsky_exp.models.{name} now; change that import"
    assert found == f"model._target_: importing {module} failed: {moved}"


def test_nested_targets_are_found() -> None:
    values = {"a": {"_target_": "x.Y", "b": [{"_target_": "z.Z"}]}, "c": 1}
    assert [key for key, _ in targets.nodes(values)] == ["a", "a.b.0"]
    assert targets.check("a", {"_target_": "fractions.Fraction", "numerator": 1}, added=["fractions"]) == []
    assert targets.check("optimizer", {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1}, Optimizer) == []


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, True),
        (True, int, False),
        (True, float, False),
        ("1e-5", float, False),
        (None, float | None, True),
        ([0.9, 0.99], tuple[float, float], True),
        ([0.9], tuple[float, float], False),
        (["a"], list[str], True),
        ([1], list[str], False),
        ("a", Literal["a", "b"], True),
        (1, Literal[True], False),
        (0, Annotated[int, at_least(1)], False),
        ("abc", Any, True),
        ({}, dict[str, int], True),
        ("x", Path, True),
    ],
)
def test_fits(value: Any, annotation: Any, expected: bool) -> None:
    assert fits(value, annotation) is expected
    assert (type_problem(value, annotation) is None) is expected


# --- forms


def test_flat_and_written_forms_hide_passwords() -> None:
    cfg = composed(*TINY, "tracker.uri=postgresql+psycopg2://me:pa55w0rd@host/db", "validation.prompts=[a, b]")
    flat = saved_config.flatten(cfg)
    assert flat["tracker.uri"] == "postgresql+psycopg2://***@host/db"
    assert flat["validation.prompts"] == ["a", "b"]
    assert "pa55w0rd" not in saved_config.to_yaml(cfg)
    assert cfg.tracker.uri.count("pa55w0rd") == 1  # the run itself still has it


def test_the_token_of_a_signed_address_is_hidden() -> None:
    address = "https://host/{000..007}.tar"
    cfg = composed(*TINY[1:], "data=webdataset", f'data.path="{address}?token=pa55w0rd&x=1"')
    assert saved_config.flatten(cfg)["data.path"] == f"{address}?***"
    assert cfg.data.path.endswith("pa55w0rd&x=1")


def test_a_list_is_a_file_and_shards_are_found_by_their_reader(tmp_path: Path) -> None:
    for data, path in (("list", tmp_path), ("list", tmp_path / "nowhere.csv")):
        assert f"data.path: there is no file '{path}'" in problems_of(composed(f"data={data}", f"data.path={path}"))[0]
    (tmp_path / "list.csv").touch()
    good = ["data=list", f"data.path={tmp_path / 'list.csv'}"]
    assert problems_of(composed(*good, *TINY[1:])) == []
    found = problems_of(composed(*good, "data.validation_path=nowhere", *TINY[1:]))
    assert [problem.partition(":")[0] for problem in found] == ["data.validation_path"]
    assert problems_of(composed("data=webdataset", "data.path=[a.tar, b.tar]", *TINY[1:])) == []


def test_written_form_is_resolved_and_loads_again() -> None:
    cfg = composed("weights=tiny", "prompts=[a]", "output_root=/somewhere", verb="generate")  # paths become absolute
    text = saved_config.to_yaml(cfg)
    assert "${" not in text
    assert OmegaConf.to_container(OmegaConf.create(text)) == OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", "optimizer.lr"),
        ("trainer.lr", "optimizer.lr"),
        ("trainer.stepz", "trainer.max_steps"),
        ("learning_rate", "optimizer.lr"),
        ("mixed_precision", "precision"),
        ("optimiser.lr", "optimizer.lr"),
        ("validation.prompt", "validation.prompts"),
        ("epochs", "trainer.max_epochs"),
    ],
)
def test_suggestions(typed: str, meant: str) -> None:
    assert suggestions.suggest(typed, validation.all_keys()) == f"; did you mean {meant}?"


def test_no_far_fetched_suggestion() -> None:
    assert suggestions.suggest("foo.bar.baz", validation.all_keys()) == ""


def test_imports_no_torch() -> None:
    code = (
        "import sys, kandinsky_exp.cli, kandinsky_exp.config.validation, kandinsky_exp.errors\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'mlflow', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
