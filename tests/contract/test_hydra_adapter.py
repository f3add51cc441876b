"""What `hydra_adapter` needs of Hydra is there, and nobody else leans on Hydra's private parts."""

import ast
import importlib
import inspect
from pathlib import Path

import hydra
import pytest

from kandinsky_exp import hydra_adapter

PACKAGE = Path(hydra_adapter.__file__).parent
PRIVATE = ("hydra._internal", "hydra.core.config_store", "hydra.core.global_hydra", "hydra.core.plugins", "hydra.main")
# What is called or overridden, and the arguments by which it is.
USED = {
    "hydra._internal.config_loader_impl:ConfigLoaderImpl.load_configuration": ["config_name", "overrides", "run_mode"],
    "hydra._internal.config_loader_impl:ConfigLoaderImpl.get_group_options": ["group_name", "config_name", "overrides"],
    "hydra._internal.config_loader_impl:ConfigLoaderImpl._compose_config_from_defaults_list": ["defaults", "repo"],
    "hydra._internal.config_repository:ConfigRepository.__init__": ["config_search_path"],
    "hydra._internal.config_repository:ConfigRepository._find_object_source": ["config_path", "object_type"],
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
