"""What `hydra_adapter` needs of Hydra is there, and nobody else leans on Hydra's private parts."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from kandinsky_exp import hydra_adapter

PACKAGE = Path(hydra_adapter.__file__).parent
PRIVATE = ("hydra._internal", "hydra.core.config_store", "hydra.core.global_hydra", "hydra.core.plugins", "hydra.main")
# What is called or overridden, and the arguments by which it is.
USED = {
    "hydra._internal.config_loader_impl:ConfigLoaderImpl.load_configuration": ["config_name", "overrides", "run_mode"],
    "hydra._internal.config_loader_impl:ConfigLoaderImpl.get_group_options": ["group_name", "config_name", "overrides"],
    "hydra._internal.config_loader_impl:ConfigLoaderImpl._compose_config_from_defaults_list": ["defaults", "repo"],
    "hydra._internal.config_loader_impl:create_defaults_list": [
        *("repo", "config_name", "overrides_list", "prepend_hydra", "skip_missing"),
    ],
    "hydra._internal.config_repository:CachingConfigRepository.__init__": ["delegate"],
    "hydra._internal.config_repository:ConfigRepository.__init__": ["config_search_path"],
    "hydra._internal.config_repository:ConfigRepository._find_object_source": ["config_path", "object_type"],
    "hydra._internal.defaults_list:Overrides.__init__": ["repo", "overrides_list"],
    "hydra._internal.defaults_list:DefaultsList.__init__": ["defaults_tree", "config_overrides"],
    "hydra._internal.defaults_list:_dfs_walk": ["tree", "operator"],
    "hydra._internal.hydra:Hydra.__init__": ["task_name", "config_loader"],
    "hydra._internal.hydra:Hydra.run": ["config_name", "task_function", "overrides"],
    "hydra._internal.hydra:Hydra.multirun": ["config_name", "task_function", "overrides"],
    "hydra._internal.hydra:Hydra.show_cfg": ["config_name", "overrides", "cfg_type", "package", "resolve"],
    "hydra._internal.hydra:Hydra.show_info": ["info", "config_name", "overrides"],
    "hydra._internal.hydra:Hydra.shell_completion": ["config_name", "overrides"],
    "hydra._internal.hydra:Hydra.app_help": ["config_name", "args_parser", "args"],
    "hydra._internal.hydra:Hydra.hydra_help": ["config_name", "args_parser", "args"],
    "hydra._internal.utils:create_automatic_config_search_path": ["calling_file", "calling_module", "config_path"],
    "hydra._internal.utils:get_args_parser": [],
    "hydra.core.plugins:Plugins.instantiate_sweeper": ["hydra_context", "task_function", "config"],
    "hydra.core.plugins:Plugins.register": ["clazz"],
    "hydra.main:_get_rerun_conf": ["file_path", "overrides"],
}
FLAGS = {
    *("help", "hydra_help", "cfg", "resolve", "package", "run", "multirun", "shell_completion", "info", "overrides"),
    *("config_path", "config_name", "config_dir", "experimental_rerun"),
}


def test_hydra_is_the_version_that_the_adapter_was_made_for() -> None:
    assert hydra.__version__.rpartition(".")[0] == hydra_adapter.MADE_FOR, (
        f"hydra_adapter.py was made for Hydra {hydra_adapter.MADE_FOR}, and {hydra.__version__} is installed: "
        "read there what it needs, compare it with the new version, then raise MADE_FOR and the bound in pyproject.toml"
    )


@pytest.mark.parametrize("name", USED)
def test_what_the_adapter_needs_is_there(name: str) -> None:
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    if path == "_get_rerun_conf":  # of the package, `main` is the function
        found = inspect.getmodule(hydra.main)
    for part in path.split("."):
        found = getattr(found, part, None)
        assert found is not None, f"{name} is gone from Hydra {hydra.__version__}: mend kandinsky_exp/hydra_adapter.py"
    missing = [word for word in USED[name] if word not in inspect.signature(found).parameters]
    assert not missing, f"{name} of Hydra {hydra.__version__} has no {missing}: mend kandinsky_exp/hydra_adapter.py"


def test_hydras_parser_knows_its_flags() -> None:
    flags = hydra_adapter.parse([], refuse=pytest.fail)
    assert not FLAGS - vars(flags).keys(), "Hydra has other flags: mend kandinsky_exp/hydra_adapter.py"


def test_only_the_adapter_knows_hydras_private_parts() -> None:
    for file in PACKAGE.rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        if any((node.module or "").startswith(PRIVATE) for node in nodes):
            assert file.name == "hydra_adapter.py"


# --- what is remembered is what Hydra would find

TYPED = [
    [],
    ["model=prior"],
    ["model=prior", "trainer.max_steps=3"],
    ["model=prior", "trainer.max_steps=4", "optimizer.lr=1"],
    ["trainer.max_steps=4", "model=prior", "optimizer=sgd"],
    ["optimizer=sgd", "model=prior", "optimizer=adamw"],
    ["sweep=lr", "adapter=lora"],
    ["~validation"],
    ["adapter=lora", "adapter={rank: 3}"],
    ["model=decoder,prior", "weights=tiny"],
    ["hydra/launcher=joblib", "hydra.sweep.dir=x"],
    ["experiment=demo_prior"],
    ["+optimizer@other=sgd", "data.resolution=32"],
]
REFUSED = [["model=other"], ["modle=prior"], ["~model=prior"], ["+model=prior"], ["+sweep=lr"], ["model=prior", "x=1"]]


def composed(typed: list[str], *flags: str, root: str = "train") -> Any:
    """With the adapter's loader: all but when and where it was."""
    parsed = hydra_adapter.parse([*flags], refuse=pytest.fail)
    with hydra_adapter.composing(parsed, check=lambda _: None) as ours:
        return plain(ours.config_loader.load_configuration(root, typed, RunMode.MULTIRUN))


def by_hydra(typed: list[str], root: str = "train") -> object:
    with hydra.initialize_config_module("kandinsky_exp.conf", version_base=hydra_adapter.MADE_FOR):
        loader = hydra.core.global_hydra.GlobalHydra.instance().config_loader()
        return plain(loader.load_configuration(root, typed, RunMode.MULTIRUN))


def plain(cfg: object) -> object:
    found = OmegaConf.to_container(cfg, resolve=False)
    del found["hydra"]["runtime"]["config_sources"], found["hydra"]["job"]["name"]
    return found


@pytest.mark.parametrize("typed", TYPED, ids=" ".join)
def test_what_is_remembered_of_files_is_what_hydra_finds(typed: list[str]) -> None:
    expected = by_hydra(typed)
    assert composed(typed) == expected
    assert composed(typed) == expected


def test_values_are_of_the_line_that_was_typed() -> None:
    for typed in [*TYPED, *reversed(TYPED)]:
        composed(typed)
    assert composed(TYPED[3]) == by_hydra(TYPED[3])
    assert composed(["model=prior"], root="plan") == by_hydra(["model=prior"], root="plan")


@pytest.mark.parametrize("typed", REFUSED, ids=" ".join)
def test_what_hydra_refuses_is_refused_each_time(typed: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(HydraException) as expected:
            by_hydra(typed)
        with pytest.raises(HydraException) as found:
            composed(typed)
        assert hydra_adapter.condense(found.value) == hydra_adapter.condense(expected.value)


def test_a_file_of_the_user_is_read_each_time(tmp_path: Path) -> None:
    """Its values, what else it chooses, and that it is gone."""
    flags, file = ["--config-dir", str(tmp_path)], tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()

    def optimizer() -> str:
        return composed(["experiment=mine"], *flags)["optimizer"]["_target_"].rpartition(".")[2]

    file.write_text("# @package _global_\ndefaults: [{override /optimizer: sgd}]\n")
    assert optimizer() == "SGD"
    file.write_text("# @package _global_\ndefaults: [{override /optimizer: adamw}]\n")
    assert optimizer() == "AdamW"
    file.write_text("# @package _global_\noptimizer: {_target_: my.Own}\n")
    assert optimizer() == "Own"
    file.unlink()
    with pytest.raises(HydraException):
        optimizer()


def test_a_choice_that_is_left_open_is_refused_where_it_has_to_be_made() -> None:
    parsed = hydra_adapter.parse([], refuse=pytest.fail)
    for _ in range(2):
        with hydra_adapter.composing(parsed, check=lambda _: None) as ours:
            assert ours.config_loader.load_configuration("train", ["model='???'"], RunMode.MULTIRUN)
            with pytest.raises(HydraException):
                ours.config_loader.load_configuration("train", ["model='???'"], RunMode.RUN)
