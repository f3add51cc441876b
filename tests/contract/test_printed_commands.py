"""Every command that a message prints, run as it is printed; where that costs too much, its settings are checked."""

import ast
import errno
import logging
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from alembic.script import ScriptDirectory
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement
from running import composed

import hydra_plugins.kandinsky_optuna
import kandinsky_exp
from kandinsky_exp import cli
from kandinsky_exp.config import allowlist, command_line, hydra_errors, targets, validation
from kandinsky_exp.data.encoded import catalog, layout
from kandinsky_exp.data.encoded.layout import META
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.models import components
from kandinsky_exp.sweeps import outcomes, session
from kandinsky_exp.tracking import store_schema

PACKAGE = Path(kandinsky_exp.__file__).parent
PLUGIN = Path(hydra_plugins.kandinsky_optuna.__path__[0])
EXTRAS = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
PROGRAMS = "kandinsky-exp|mlflow|hf|huggingface-cli|pip|accelerate"
COMMAND = re.compile(rf"(?<![\w/-])(?:{PROGRAMS}) (?:-|\0|[a-z]+\b)[^;,`()\n]*")
HOLE = "\0"  # what a message fills in
PROSE = re.compile(r"mlflow (cannot|is|or)\b|accelerate launch:|mlflow(_|\.)")  # begins like a command, and is none


def printed(file: Path) -> Iterator[str]:
    """The commands in a module's texts, docstrings aside, with a hole for what is filled in."""
    if not re.search(rf"\b({PROGRAMS})\b", text := file.read_text("utf-8")):
        return
    tree = ast.parse(text)
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (docs | inner):
            text = node.value
        else:
            continue
        yield from (found.strip() for found in COMMAND.findall(text) if not PROSE.match(found))


FOUND = sorted(
    {
        (file.relative_to(root.parent).as_posix(), command)
        for root in (PACKAGE, PLUGIN)
        for file in root.rglob("*.py")
        for command in printed(file)
    }
)
WHOLE = sorted({command for _, command in FOUND if HOLE not in command})
FILLED_IN = {place for place, command in FOUND if HOLE in command}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- what runs a command of each program


def run(command: str) -> None:
    words = shlex.split(command)
    programs = {"kandinsky-exp": run_ours, "pip": check_pip, "hf": run_hf, "mlflow": check_mlflow}
    {**programs, "accelerate": check_accelerate}[words[0]](words[1:])


def run_ours(words: list[str]) -> None:
    code: object = None
    try:
        cli.main(words)
    except SystemExit as end:
        code = end.code
    assert not code, words


def check_pip(words: list[str]) -> None:
    """What is installed would change: only that there is such an extra, or such a name of a package."""
    assert words[0] == "install"
    wanted = [Requirement(word) for word in words[1:] if word != "-U"]
    assert wanted
    for requirement in wanted:
        if requirement.name == "kandinsky-exp":
            assert requirement.extras
            assert requirement.extras <= EXTRAS.keys()


def run_hf(words: list[str]) -> None:
    """It would ask for a token."""
    code = f"from huggingface_hub.cli.hf import main; import sys; sys.argv = {['hf', *words, '--help']!r}; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def check_accelerate(words: list[str]) -> None:
    """It would ask for settings, or launch: only that there is such a command, with these options."""
    from accelerate.commands.config import get_config_parser
    from accelerate.commands.launch import launch_command_parser

    command, *options = words
    parser, rest = {"config": (get_config_parser(), []), "launch": (launch_command_parser(), ["script.py"])}[command]
    parser.parse_args([*options, *rest])


def check_mlflow(words: list[str]) -> None:
    """A store of an older MLflow is not at hand: only that there is such a command, with these arguments."""
    from mlflow import db

    assert words[0] == "db"
    command = db.commands.commands[words[1]]
    assert command.make_context(words[1], words[2:]).params["url"] == words[2]


# --- what is printed


@pytest.mark.parametrize("command", WHOLE)
def test_a_command_runs_as_printed(command: str) -> None:
    run(command)


def only_command(message: object) -> str:
    (found,) = [text.strip() for text in COMMAND.findall(str(message)) if not PROSE.match(text)]
    return found


def verb_first(root: Path) -> str:
    typed = ["list=true", f"output_root={root}/my out", "encode"]
    with pytest.raises(ConfigError) as error:
        command_line.parse("train", typed, cli.VERBS)
    return only_command(error.value)


def unknown_setting(root: Path) -> str:
    line = command_line.parse("train", ["weights=tiny", "data=emoji", "zzzzzz=1"], cli.VERBS)
    return only_command(*hydra_errors.find_problems(line))


def full_disk(root: Path) -> str:
    with pytest.raises(Exception, match="is full") as error, catalog.writing(root / "my, out" / "cache" / "t1"):
        raise OSError(errno.ENOSPC, "No space left on device")
    return only_command(error.value.args[0].replace("my, out", "my out"))


def no_room(root: Path) -> str:
    folder = root / "my out" / "cache" / "t1"
    folder.mkdir(parents=True)
    with pytest.raises(Exception, match="GB left") as error:
        catalog.refuse_if_no_room(folder, 10**18)
    return only_command(error.value)


def no_report(root: Path) -> str:
    """The report of a sweep whose store does not know its jobs."""
    cfg = composed(root / "my out", "name=s")
    folder = root / "my out" / "s"
    outcomes.JobFolder(folder).write(outcomes.Outcome(0, "seed=1", "seed=1", run_id="nobody"))
    started = session.Session(folder, 1, is_study=True)
    started.tracker = SimpleNamespace(run_id="nobody")  # type: ignore[assignment]
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("kandinsky_exp.sweeps.session").addHandler(handler)
    try:
        session.report(cfg, started)
    finally:
        logging.getLogger("kandinsky_exp.sweeps.session").removeHandler(handler)
    return texts[0].rpartition(": ")[2]


def remove_table(root: Path) -> str:
    """As it is printed of a table from before pictures were told apart."""
    folder = root / "my out" / "cache" / "t1"
    folder.mkdir(parents=True)
    (folder / META).write_text("{}")
    return layout.command(folder, f"remove={folder.name}")


def adapter_as_weights(root: Path) -> str:
    folder = root / "out" / "optimizer.lr=1e-4,my seed=1"
    (folder / "adapter").mkdir(parents=True)
    (folder / "config.yaml").write_text("weights: {prior: tiny}\nmodel: {_target_: x}\n")
    return str(components.check_source(str(folder), "prior")).rpartition("make one: ")[2]


def older_store(root: Path) -> str:
    import mlflow

    script = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    older = [known.revision for known in script.walk_revisions()][3]
    return only_command(store_schema.problem(older, f"sqlite:///{root}/my store.db"))


def not_installed(root: Path) -> Iterator[str]:
    yield from map(targets.how_to_install, [name for name in allowlist.MODULES if name != "kandinsky_exp"])


def launcher(root: Path) -> Iterator[str]:
    for group, options in hydra_errors.EXTRAS.items():
        for option in options:
            override = OverridesParser.create().parse_override(f"{group}={option}")
            yield only_command(hydra_errors._wrong_option(override, ["basic"]))


@pytest.mark.parametrize("message", [verb_first, unknown_setting, full_disk, no_room, remove_table, older_store])
def test_a_command_with_what_was_filled_in_runs_as_printed(
    message: Callable[[Path], str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(message(tmp_path))


def composed_as_printed(command: str) -> DictConfig:
    """The config of a command that would need a run, or a sweep, first."""
    program, *words = shlex.split(command)
    assert program == "kandinsky-exp"
    verb, rest = cli._split_verb(words)
    line = command_line.parse(verb, [cli._plain(text, cli.VERBS[verb]) for text in rest], cli.VERBS)
    with line.composing() as loader:
        cfg = loader.load_configuration(verb, line.overrides, run_mode=RunMode.RUN)
    cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    assert validation.problems(cfg, verb) == []
    return cfg


def test_the_command_of_an_adapter_takes_it(tmp_path: Path) -> None:
    cfg = composed_as_printed(adapter_as_weights(tmp_path))
    assert cfg.adapter.source == str(tmp_path / "out" / "optimizer.lr=1e-4,my seed=1")


def test_the_command_of_a_report_takes_the_sweep_and_its_store(tmp_path: Path) -> None:
    cfg = composed_as_printed(no_report(tmp_path))
    assert cfg.sweep.source == str(tmp_path / "my out" / "s")
    assert cfg.output_root == str(tmp_path / "my out")


@pytest.mark.parametrize("messages", [not_installed, launcher])
def test_what_is_to_be_installed_can_be(messages: Callable[[Path], Iterator[str]], tmp_path: Path) -> None:
    commands = list(messages(tmp_path))
    assert commands
    for command in commands:
        run(re.sub(r" \(.*", "", command))


def test_no_command_is_left_out() -> None:
    """A message that fills in a part of a command needs a row here, or a test of its own file."""
    assert len(WHOLE) > 5
    here = {
        "kandinsky_exp/config/command_line.py",
        "kandinsky_exp/config/hydra_errors.py",
        "kandinsky_exp/config/targets.py",
        "kandinsky_exp/data/encoded/layout.py",
        "kandinsky_exp/models/components.py",
        "kandinsky_exp/sweeps/session.py",
        "kandinsky_exp/tracking/store_schema.py",
    }
    elsewhere = {
        "kandinsky_exp/tracking/store.py",  # tests/tracking/test_moved_store.py
        "kandinsky_exp/runs/hub.py",  # tests/runs/test_hub.py, and the next one
        "kandinsky_exp/runs/model_card.py",
        "kandinsky_exp/cli.py",  # --version
    }
    assert sorted(FILLED_IN - here - elsewhere) == []
