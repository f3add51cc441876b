"""What was typed after the verb: flags and overrides, and whether they make one run or a sweep."""

import argparse
import functools
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig
from yaml import YAMLError

from kandinsky_exp import hydra_adapter
from kandinsky_exp.config import allowlist, grammar, suggestions, validation
from kandinsky_exp.errors import ConfigError, Problem, UserError, cut
from kandinsky_exp.system import files

SEARCH_PATH = "hydra.searchpath"
OF_SWEEPS = re.compile(r"hydra[./](sweeper|launcher)\b.*")  # keys that a single run does not read
SHOWING = ("help", "hydra_help", "cfg", "info", "shell_completion")


@dataclass(frozen=True)
class CommandLine:
    """A verb and the arguments after it.

    Args:
        flags: as Hydra's parser reads them.
        arguments: the flags first, then the overrides.
        sweeps: whether --multirun was typed; from `settled`, whether there will be a sweep.
        trusted: modules that `_target_` may name too. They were typed: a file cannot add any.
        check: of Hydra's section of what is composed.
        mode: what Hydra's section says of that, from `settled`.
        notes: what the user should know, a line each.
    """

    verb: str
    flags: argparse.Namespace
    arguments: list[str]
    overrides: list[str]
    sweeps: bool
    trusted: tuple[str, ...]
    check: hydra_adapter.Check
    mode: RunMode | None = None
    notes: tuple[str, ...] = ()

    @property
    def root(self) -> str:
        """The name of the root config: one of the user's, or the verb's."""
        return self.flags.config_name or self.verb

    @property
    def shows_something(self) -> bool:
        """Whether it is for --help, --cfg, --info or completion, so that nothing runs."""
        return any(getattr(self.flags, name) for name in SHOWING)

    @property
    def search_path(self) -> list[str]:
        """The typed search path, for what is composed without the other overrides."""
        return [text for text in self.overrides if SEARCH_PATH in grammar.keys([text])]

    @contextmanager
    def composing(self) -> Iterator[ConfigLoader]:
        """Hydra ready to compose, with the search path that it has for this line."""
        with hydra_adapter.composing(self.flags, self.check) as hydra:
            yield hydra.config_loader

    def start(self, job: Any, *more: str) -> None:
        """Let Hydra do what was typed.

        Args:
            job: called with the config of each run.
            more: further overrides.
        """
        overrides = self.overrides
        if not self.shows_something:
            # Files that ask for a sweep are left to say so: a command that repeats one of its jobs has to undo it.
            mode = [] if self.mode == RunMode.MULTIRUN else [f"hydra.mode={'MULTIRUN' if self.sweeps else 'RUN'}"]
            overrides = [*overrides, *job_naming(overrides), *more, *mode]
        flags = argparse.Namespace(**{**vars(self.flags), "overrides": overrides})
        hydra_adapter.start(flags, self.root, self.sweeps, job, self.check)


def parse(verb: str, arguments: list[str], verbs: Iterable[str]) -> CommandLine:
    """Check the flags with Hydra's own parser; raise ConfigError where that would print its usage."""

    def refuse(message: str) -> NoReturn:
        flag = message.partition("unrecognized arguments: --")[2].replace("=", " ").partition(" ")[0]
        meant = suggestions.suggest(flag, validation.all_keys()) if flag else ""
        raise ConfigError(f"{message}; settings are written key=value, without dashes; see kandinsky-exp --help{meant}")

    flags = hydra_adapter.parse(arguments, refuse)
    overrides = [_expand_home(text) for text in flags.overrides]
    problems = [
        _not_a_setting(text, verbs, arguments) for text in overrides if "=" not in text and not text.startswith("~")
    ]
    if problems := [*problems, *_wrong_flags(flags), *_missing_folders(flags.config_dir, overrides)]:
        raise ConfigError(problems)
    words = [text for text in arguments if text not in flags.overrides]
    trusted = tuple(dict.fromkeys(grammar.names(overrides, allowlist.KEY)))
    check = functools.partial(allowlist.check_hydra, trusted, grammar.keys(overrides))
    return CommandLine(verb, flags, [*words, *overrides], overrides, flags.multirun, trusted, check)


def _wrong_flags(flags: argparse.Namespace) -> Iterator[Problem]:
    """What Hydra's own entry refuses."""
    if flags.help or flags.hydra_help:
        return
    if sum(bool(getattr(flags, name)) for name in ("run", "multirun", "cfg", "info", "shell_completion")) > 1:
        several = "Only one of --run, --multirun, --cfg, --info and --shell_completion can be specified"
        yield Problem("config", f"{several}; see kandinsky-exp --help")
    if flags.resolve and flags.cfg is None:
        alone = "The --resolve flag can only be used in conjunction with --cfg or --help"
        yield Problem("config", f"{alone}; see kandinsky-exp --help")


def _missing_folders(config_dir: str | None, overrides: list[str]) -> Iterator[Problem]:
    """Hydra passes over what is not there in its search path."""
    if config_dir is not None and not files.is_folder(config_dir):
        yield Problem("--config-dir", f"folder '{cut(config_dir)}' not found; give the one of your yaml files")
    for override in grammar.readable(overrides):
        if override.key_or_group == SEARCH_PATH and not isinstance(override.value(), list):
            given = cut(override.get_value_string())
            yield Problem(SEARCH_PATH, f"has to be a list; write {SEARCH_PATH}=[{given}]")
    for place in grammar.names(overrides, SEARCH_PATH):
        scheme, _, path = place.rpartition("://")
        if scheme in ("", "file") and not files.is_folder(path):
            yield Problem(SEARCH_PATH, f"folder '{cut(path)}' not found; give the one of your yaml files")


def settled(line: CommandLine, trains: bool = True) -> tuple[CommandLine, list[Problem]]:
    """(the line, knowing whether it sweeps; what is typed of a sweep and does not go with this).

    Hydra takes `hydra.mode=MULTIRUN`, typed or from a file, for --multirun, which wins over `hydra.mode=RUN`.

    Raises:
        UserError: Hydra may not act on what a file says.
    """
    section = _of_hydra(line)
    line = replace(line, mode=None if section is None else section.mode)
    if line.sweeps or line.mode == RunMode.MULTIRUN:
        notes = ("hydra.mode=RUN: --multirun was given too, and wins; leave one of them out",)
        line = replace(line, sweeps=True, notes=notes if line.mode == RunMode.RUN else ())
        if trains or section is None or "n_trials" not in section.sweeper:
            return line, []
        learns = f"it learns from what jobs have trained, and {line.verb} trains none; list values"
        return line, [Problem("hydra/sweeper", learns)]
    if line.mode == RunMode.RUN:  # it was said that a single run is meant
        return line, []
    found = [key for key in sorted(grammar.keys(line.overrides)) if OF_SWEEPS.fullmatch(key)]
    alone = "is for a sweep, and this is a single run; add --multirun, or leave it out"
    params = None if section is None or found else section.sweeper.get("params")
    if params:
        note = f"hydra.sweeper.params: {', '.join(params)} would vary with --multirun; this is a single run"
        line = replace(line, notes=(note,))
    return line, [Problem(key, alone) for key in found]


def _of_hydra(line: CommandLine) -> Any:
    """Hydra's own section, of as many overrides as can be composed; None where there is none."""
    with line.composing() as loader:
        if (section := _section(loader, line.root, line.overrides)) is not None:
            return section
        choosing = [str(one.input_line) for one in grammar.readable(line.overrides) if _chooses(one, loader, line.root)]
        if (section := _section(loader, line.root, choosing)) is not None:
            return section
        good: list[str] = []
        for text in choosing:  # one by one
            if (tried := _section(loader, line.root, [*good, text])) is not None:
                section, good = tried, [*good, text]
        return section


def _chooses(override: Override, loader: ConfigLoader, root: str) -> bool:
    """Whether it is for Hydra, or chooses a file."""
    return override.is_hydra_override() or bool(group_options(loader, override.key_or_group, root))


def _section(loader: ConfigLoader, root: str, texts: list[str]) -> DictConfig | None:
    try:
        cfg = loader.load_configuration(root, texts, RunMode.MULTIRUN, validate_sweep_overrides=False)
        cfg.hydra.mode  # noqa: B018 - a file may set it by an interpolation that leads nowhere
        section: DictConfig = cfg.hydra
        return section
    except UserError:
        raise
    except Exception:  # whatever it is, `hydra_errors.explain` will say it
        return None


def group_options(loader: ConfigLoader, group: str, root: str, search_path: Iterable[str] = ()) -> list[str]:
    """The files of a group; none for what is no group."""
    try:
        return loader.get_group_options(group, config_name=root, overrides=list(search_path))
    except (OSError, ValueError, YAMLError):  # no name of a folder: too long, say; or the root config is no yaml
        return []


def job_naming(overrides: list[str]) -> list[str]:
    """Hydra settings by which a sweep's jobs are named after what they vary, and nothing else."""
    last = {override.key_or_group: override for override in grammar.readable(overrides)}
    fixed = {key for key, override in last.items() if not override.is_sweep_override()}  # typed twice: the last counts
    names = sorted(fixed | {"sweep.trial"})  # an optimizing sweeper's
    return [f"hydra.job.config.override_dirname.exclude_keys={names}".replace(" ", "")]


def _expand_home(text: str) -> str:
    """`data.path=~/pictures`: shells leave that ~ alone and Hydra's grammar has no place for it."""
    key, equals, value = text.partition("=")
    if not equals or not value.startswith("~/"):
        return text
    return f"{key}={','.join(str(Path(part).expanduser()) for part in value.split(','))}"


def _not_a_setting(text: str, verbs: Iterable[str], arguments: list[str]) -> Problem:
    if text not in verbs:
        return Problem(cut(text), "not a setting; settings are written key=value, without spaces around the = sign")
    rest = list(arguments)
    rest.remove(text)
    return Problem(text, f"the verb comes first: {shlex.join(['kandinsky-exp', text, *rest])}")
