"""The rules of the code base that a reader relies on, checked over the syntax tree."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kandinsky_exp"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
CONFIGS = sorted((ROOT / "conf").rglob("*.yaml"))

# The rooms of the package and which others they may import; every room may import itself and `errors`. A folder's name
# stands for all modules in it.
ROOMS = {
    "errors": set(),
    "hydra_adapter": set(),
    "optimizers": set(),
    "schedules": set(),
    "tiny": set(),
    "system": set(),
    "data": {"system"},
    "models": {"data.file_hashes", "system", "tiny"},
    "stages": {"data.buckets", "data.companions", "data.edges", "data.preprocess", "models"},
    "config": {"data.source_facts", "hydra_adapter", "models", "system"},
    "tracking": {"system"},
    "reports": {"system", "tracking"},
    "runs": {"config", "models", "system", "tracking"},
    "training": {"data", "models", "runs", "stages", "system", "tracking"},
    "run_settings": {"models", "system", "training"},
    "build": {"config", "data", "models", "run_settings", "stages", "system", "training"},
    "evaluation": {"data", "models", "reports", "system", "tracking", "training"},
    "sweeps": {"build", "config", "hydra_adapter", "reports", "runs", "system", "tracking"},
    "memory": {"build", "config", "data", "evaluation", "models", "run_settings", "stages", "system", "training"},
}
# The story of a run and what is typed: they may import all of the above, and what is named.
OUTER = {
    "records": set(),
    "results": {"records"},
    "preflight": {"records"},
    "run": {"preflight", "records", "results"},
    "verbs": {"records", "results"},
    "cli": set(),
    "__main__": {"cli"},
}
KNOW_OMEGACONF = {
    *("config", "sweeps", "memory", "runs.lookup", "runs.model_sources", "runs.subjects", "verbs"),
    *("cli", "hydra_adapter", "run", "preflight", "results", "records", "build", "run_settings"),
}
CLEAR_OF_FRAMEWORKS = ("stages", "data", "models")
FRAMEWORKS = {"accelerate", "mlflow", "hydra", "omegaconf"}
LAZY = {"mlflow", "datasets"}  # optional at run time: imported by the functions that use them
HEAVY = {"torch", "numpy", "diffusers", "transformers", "accelerate", "mlflow", "datasets", "peft", "PIL", "pyarrow"}


@dataclass(frozen=True)
class Import:
    """One imported name.

    Args:
        module: dotted; our own modules without the package's name.
        name: what is taken from it, None for the module itself.
        lazy: inside a function, or for type checkers only.
    """

    module: str
    name: str | None
    own: bool
    lazy: bool


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in SOURCES}


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def imports(file: Path) -> Iterator[Import]:
    tree = parse(file)
    at_import = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        lazy = id(node) not in at_import
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, None, alias.name.split(".")[0] == PACKAGE.name, lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: relative import"
            for alias in node.names:
                yield resolved(node.module or "", alias.name, lazy)


def resolved(module: str, name: str, lazy: bool) -> Import:
    if module.split(".")[0] != PACKAGE.name:
        return Import(module, name, False, lazy)
    inner = module.removeprefix(PACKAGE.name).lstrip(".")
    submodule = f"{inner}.{name}".lstrip(".")
    return Import(submodule, None, True, lazy) if submodule in MODULES else Import(inner, name, True, lazy)


IMPORTS = {name: list(imports(file)) for name, file in MODULES.items()}


def own_imports(name: str) -> set[str]:
    return {item.module for item in IMPORTS[name] if item.own}


def third_party(name: str, lazy: bool = True) -> set[str]:
    return {item.module.split(".")[0] for item in IMPORTS[name] if not item.own and (lazy or not item.lazy)}


def covers(entries: set[str], module: str) -> bool:
    return any(module == entry or module.startswith(f"{entry}.") for entry in entries)


def reachable(name: str) -> set[str]:
    found, todo = {name}, [name]
    while todo:
        for module in own_imports(todo.pop()) - found:
            found.add(module)
            todo.append(module)
    return found


def test_imports_run_one_way() -> None:
    order = TopologicalSorter({name: own_imports(name) for name in MODULES})
    order.prepare()  # raises CycleError with the modules of a cycle


def room_of(module: str) -> str:
    return module.split(".")[0]


def beyond_its_room(name: str) -> set[str]:
    room = room_of(name)
    allowed = {room, "errors"} | (ROOMS[room] if room in ROOMS else ROOMS.keys() | OUTER[room])
    return {module for module in own_imports(name) if not covers(allowed, module)}


@pytest.mark.parametrize("room", [*ROOMS, *OUTER])
def test_a_room_imports_only_what_lies_below(room: str) -> None:
    members = [name for name in MODULES if room_of(name) == room]
    assert members, "an empty room"
    arrows = {(name, module) for name in members for module in beyond_its_room(name)} - {("verbs.demo", "cli")}
    assert not arrows


def test_every_module_has_a_room() -> None:
    assert {room_of(name) for name in MODULES} - {"__init__"} == ROOMS.keys() | OUTER.keys()


def test_no_arrow_between_rooms_runs_back_up() -> None:
    arrows = {(name, module) for name in MODULES for module in own_imports(name)} - {("verbs.demo", "cli")}
    between = {(room_of(name), room_of(module)) for name, module in arrows}
    order = TopologicalSorter({room: {b for a, b in between if a == room != b} for room in ROOMS.keys() | OUTER.keys()})
    order.prepare()


def test_nobody_imports_a_verb() -> None:
    assert not [(name, module) for name in MODULES for module in own_imports(name) if room_of(module) == "verbs"]


def test_the_loop_knows_the_seam_and_the_trackers_protocol_only() -> None:
    taken = {
        (item.module, item.name) for item in IMPORTS["training.loop"] if room_of(item.module) in ("stages", "tracking")
    }
    assert taken <= {("stages.base", "DiffusionStage"), ("stages.base", "Features"), ("tracking.tracker", "Tracker")}


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] in CLEAR_OF_FRAMEWORKS])
def test_stages_data_and_adapters_are_clear_of_the_frameworks(name: str) -> None:
    for module in reachable(name):
        assert not third_party(module) & FRAMEWORKS, f"{name} reaches {module}"


def test_only_the_outer_modules_know_the_config_object() -> None:
    knowing = {name for name in MODULES if "omegaconf" in third_party(name)}
    assert not [name for name in knowing if not covers(KNOW_OMEGACONF, name)]


@pytest.mark.parametrize("name", MODULES)
def test_nothing_asks_a_library_to_run_what_it_loads(name: str) -> None:
    for node in ast.walk(parse(MODULES[name])):
        if isinstance(node, ast.Call):
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert words.get("trust_remote_code", "False") == "False", f"line {node.lineno}"
            if ast.unparse(node.func) == "torch.load":
                assert words.get("weights_only") == "True", f"line {node.lineno}"
            assert ast.unparse(node.func) not in ("pickle.load", "pickle.loads", "yaml.unsafe_load", "eval", "exec")


def test_hydra_instantiates_in_one_place() -> None:
    """Hydra 1.4 changes `instantiate`."""
    users = {name for name in MODULES for item in IMPORTS[name] if item.name in ("instantiate", "call")}
    assert users == {"build"}
    assert not any(item.name is None for name in MODULES for item in IMPORTS[name] if item.module == "hydra.utils")


@pytest.mark.parametrize("name", MODULES)
def test_optional_libraries_are_imported_where_they_are_used(name: str) -> None:
    assert not third_party(name, lazy=False) & LAZY


@pytest.mark.parametrize("name", ["errors", "config.validation", "cli"])
def test_the_outside_imports_without_torch(name: str) -> None:
    code = f"import sys, kandinsky_exp.{name}; print(*({HEAVY!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_are_short(file: Path) -> None:
    lines = file.read_text("utf-8").count("\n")
    assert lines <= 300
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 60, node.name
            if (file.name, node.name) == ("run.py", "run"):  # the architecture, at a glance
                assert node.end_lineno - node.lineno + 1 <= 40


def test_half_of_all_functions_fit_in_fifteen_lines() -> None:
    nodes = [node for file in SOURCES for node in ast.walk(parse(file)) if isinstance(node, ast.FunctionDef)]
    lengths = sorted((node.end_lineno or 0) - node.lineno + 1 for node in nodes)
    assert lengths[len(lengths) // 2] <= 15


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_yaml_opens_with_the_command_that_uses_it(file: Path) -> None:
    lines = [line for line in file.read_text("utf-8").splitlines() if not line.startswith("# @package")]
    comment = " ".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert comment.startswith("# kandinsky-exp ")
    if file.parent.name != "conf":
        assert file.parent.name in comment, "the command does not name the group"


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_tests_use_the_real_thing(file: Path) -> None:
    for node in ast.walk(parse(file)):
        assert not is_attribute(node, "monkeypatch", "setattr"), f"line {node.lineno}: a mock"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not any("mock" in name for name in names), f"line {node.lineno}: a mock"


def is_attribute(node: ast.AST, owner: str, attribute: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == attribute
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
    )
