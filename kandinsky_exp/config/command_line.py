"""What was typed after the verb: flags and overrides, and whether they make one run or a sweep."""

import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from hydra import initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig
from yaml import YAMLError

from kandinsky_exp.config import allowlist, grammar, suggestions, validation
from kandinsky_exp.errors import ConfigError, UserError, cut
from kandinsky_exp.system import files

SEARCH_PATH = "hydra.searchpath"
OF_SWEEPS = re.compile(r"hydra[./](sweeper|launcher)\b.*")  # keys that a single run does not read


@dataclass(frozen=True)
class CommandLine:
    """The arguments after the verb. `arguments` has the flags first, then the overrides, as argparse likes them."""

    arguments: list[str]
    overrides: list[str]
    sweeps: bool
    shows_something: bool  # --help, --cfg, --info, completion: nothing runs
    config_dir: str | None
    trusted: tuple[str, ...]  # modules that `_target_` may name too
    notes: tuple[str, ...] = ()  # what the user should know, a line each
    config_name: str | None = None  # a root config of the user's, in place of the verb's

    def root(self, verb: str) -> str:
        """The name of the root config."""
        return self.config_name or verb

    @property
    def search_path(self) -> list[str]:
        """The typed search path, for what is composed without the other overrides."""
        return [text for text in self.overrides if SEARCH_PATH in grammar.keys([text])]

    def with_override(self, text: str, note: str) -> "CommandLine":
        """The line with one more override, which has the last word, and a note on it."""
        return replace(
            self,
            arguments=[*self.arguments, text],
            overrides=[*self.overrides, text],
            notes=(*self.notes, note),
        )


def parse(arguments: list[str], verbs: Iterable[str]) -> CommandLine:
    """Checks the flags with Hydra's own parser; raises ConfigError where that would print its usage."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        flag = message.partition("unrecognized arguments: --")[2].replace("=", " ").partition(" ")[0]
        meant = suggestions.suggest(flag, validation.all_keys()) if flag else ""
        raise ConfigError(f"{message}; settings are written key=value, without dashes; see kandinsky-exp --help{meant}")

    vars(parser)["error"] = refuse
    known = parser.parse_intermixed_args(arguments)
    overrides = [_expand_home(text) for text in known.overrides]
    problems = [
        _not_a_setting(text, verbs, arguments) for text in overrides if "=" not in text and not text.startswith("~")
    ]
    problems += _missing_folders(known.config_dir, overrides)
    if problems:
        raise ConfigError(problems)
    flags = [text for text in arguments if text not in known.overrides]
    return CommandLine(
        arguments=[*flags, *overrides],
        overrides=overrides,
        sweeps=known.multirun,  # `settled` knows of other ways to ask for it
        shows_something=bool(known.help or known.hydra_help or known.cfg or known.info or known.shell_completion),
        config_dir=known.config_dir,
        config_name=known.config_name,
        trusted=tuple(dict.fromkeys(grammar.names(overrides, allowlist.KEY))),  # typed: a file cannot add any
    )


def _missing_folders(config_dir: str | None, overrides: list[str]) -> Iterator[str]:
    """Hydra passes over what is not there in its search path."""
    if config_dir is not None and not files.is_folder(config_dir):
        yield f"--config-dir: folder '{cut(config_dir)}' not found; give the one of your yaml files"
    for override in grammar.readable(overrides):
        if override.key_or_group == SEARCH_PATH and not isinstance(override.value(), list):
            yield f"{SEARCH_PATH}: has to be a list; write {SEARCH_PATH}=[{cut(override.get_value_string())}]"
    for place in grammar.names(overrides, SEARCH_PATH):
        scheme, _, path = place.rpartition("://")
        if scheme in ("", "file") and not files.is_folder(path):
            yield f"{SEARCH_PATH}: folder '{cut(path)}' not found; give the one of your yaml files"


@contextmanager
def composing(line: CommandLine) -> Iterator[ConfigLoaderImpl]:
    """Hydra ready to compose, with the search path that it has for this line."""
    GlobalHydra.instance().clear()
    with initialize_config_module("kandinsky_exp.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        if line.config_dir is not None:
            place = f"file://{Path(line.config_dir).resolve()}"
            loader.config_search_path.prepend("command-line", place, SearchPathQuery(provider="schema"))
            loader.repository.initialize_sources(loader.config_search_path)
        yield loader


def settled(verb: str, line: CommandLine, trains: bool = True) -> tuple[CommandLine, list[str]]:
    """(the line, knowing whether it sweeps; what is typed of a sweep and does not go with this).

    Hydra takes `hydra.mode=MULTIRUN`, typed or from a file, for --multirun, which wins over `hydra.mode=RUN`.

    Raises:
        UserError: Hydra may not act on what a file says.
    """
    section = _of_hydra(line.root(verb), line)
    mode = None if section is None else section.mode
    problems = []
    if not trains and section is not None and "n_trials" in section.sweeper:
        problems.append(f"hydra/sweeper: it learns from what jobs have trained, and {verb} trains none; list values")
    if line.sweeps and mode == RunMode.RUN:
        note = "hydra.mode=RUN: --multirun was given too, and wins; leave one of them out"
        return line.with_override("hydra.mode=MULTIRUN", note), problems
    if line.sweeps or mode == RunMode.MULTIRUN:
        return replace(line, sweeps=True), problems
    if mode == RunMode.RUN:  # it was said that a single run is meant
        return line, []
    found = [key for key in sorted(grammar.keys(line.overrides)) if OF_SWEEPS.fullmatch(key)]
    problems = [f"{key}: is for a sweep, and this is a single run; add --multirun, or leave it out" for key in found]
    params = None if section is None or found else section.sweeper.get("params")
    if params:
        note = f"hydra.sweeper.params: {', '.join(params)} would vary with --multirun; this is a single run"
        line = replace(line, notes=(*line.notes, note))
    return line, problems


def _of_hydra(verb: str, line: CommandLine) -> Any:
    """Hydra's own section, of as many overrides as can be composed; None where there is none."""
    with composing(line) as loader:

        def composed(texts: list[str]) -> DictConfig | None:
            try:
                cfg = loader.load_configuration(verb, texts, RunMode.MULTIRUN, validate_sweep_overrides=False)
                cfg.hydra.mode  # noqa: B018 - a file may set it by an interpolation that leads nowhere
                section: DictConfig = cfg.hydra
                return section
            except UserError:
                raise
            except Exception:  # whatever it is, `mistakes.explain` will say it
                return None

        section = composed(line.overrides)
        if section is None:  # what chooses files, and is for Hydra, one by one
            good: list[str] = []
            for override in grammar.readable(line.overrides):
                is_group = override.is_hydra_override() or bool(group_options(loader, override.key_or_group, verb))
                if is_group and (tried := composed([*good, str(override.input_line)])) is not None:
                    section = tried
                    good.append(str(override.input_line))
        return section


def group_options(loader: ConfigLoaderImpl, group: str, verb: str, search_path: Iterable[str] = ()) -> list[str]:
    """The files of a group; none for what is no group."""
    try:
        return loader.get_group_options(group, config_name=verb, overrides=list(search_path))
    except (OSError, ValueError, YAMLError):  # no name of a folder: too long, say; or the root config is no yaml
        return []


def unknown_verb(word: str, verbs: Iterable[str]) -> str:
    """The message for a first word that is neither a verb nor a setting."""
    names = list(verbs)
    return (
        f"{cut(word)}: no such verb, the verbs are {', '.join(names)}; a setting is written key=value, without spaces "
        f"around the = sign{did_you_mean(word, names)}"
    )


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


def _not_a_setting(text: str, verbs: Iterable[str], arguments: list[str]) -> str:
    if text in verbs:
        return f"{text}: the verb comes first: {shlex.join(['kandinsky-exp', text, *without(arguments, text)])}"
    return f"{cut(text)}: not a setting; settings are written key=value, without spaces around the = sign"


def without(words: list[str], word: str) -> list[str]:
    """All but the first of such a word."""
    place = words.index(word)
    return [*words[:place], *words[place + 1 :]]


def did_you_mean(word: Any, choices: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    close = get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
