"""What was typed: flags and overrides, and a plain explanation where Hydra refuses them.

Hydra stops at the first thing it cannot compose and answers a misspelt key with "use +modle=decoder", which
then would be silently ignored. `explain` looks at every override and names all that is wrong.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from kandinsky_exp import config, paths, trust
from kandinsky_exp.errors import ConfigError, UserError, cut

# Hydra's plugins, and the extra that installs each.
EXTRAS = {"hydra/launcher": {"joblib": "sweep", "submitit_local": "sweep", "submitit_slurm": "sweep", "ray": "ray"}}


@dataclass(frozen=True)
class CommandLine:
    """The arguments after the verb. `arguments` has the flags first, then the overrides, as argparse likes them."""

    arguments: list[str]
    overrides: list[str]
    sweeps: bool
    shows_something: bool  # --help, --cfg, --info, completion: nothing runs
    config_dir: str | None
    trusted: tuple[str, ...]  # modules that `_target_` may name too

    @property
    def search_path(self) -> list[str]:
        """--config-dir, for what Hydra composes without its command line."""
        return [f"hydra.searchpath=[file://{Path(self.config_dir).resolve()}]"] if self.config_dir else []


def parse(arguments: list[str], verbs: Iterable[str]) -> CommandLine:
    """Checks the flags with Hydra's own parser; raises ConfigError where that would print its usage."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        flag = message.partition("unrecognized arguments: --")[2].replace("=", " ").partition(" ")[0]
        meant = config.suggest(flag, config.all_keys()) if flag else ""
        raise ConfigError(f"{message}; settings are written key=value, without dashes; see kandinsky-exp --help{meant}")

    vars(parser)["error"] = refuse
    known = parser.parse_intermixed_args(arguments)
    if known.config_dir is not None and not paths.is_folder(known.config_dir):
        raise ConfigError(f"--config-dir: folder '{cut(known.config_dir)}' not found; give the one of your yaml files")
    overrides = [_expand_home(text) for text in known.overrides]
    problems = [_not_a_setting(text, verbs) for text in overrides if "=" not in text and not text.startswith("~")]
    if problems:
        raise ConfigError(problems)
    flags = [text for text in arguments if text not in known.overrides]
    return CommandLine(
        arguments=[*flags, *overrides],
        overrides=overrides,
        sweeps=known.multirun or any(text.startswith("sweep=") for text in overrides),
        shows_something=bool(known.help or known.hydra_help or known.cfg or known.info or known.shell_completion),
        config_dir=known.config_dir,
        trusted=_typed_modules(overrides),
    )


def _typed_modules(overrides: list[str]) -> tuple[str, ...]:
    """What was typed as `trusted_modules=[...]`. The composed config does not tell: a file can have put it there."""
    parser, names = OverridesParser.create(), []
    for text in overrides:
        if text.lstrip("+").startswith(f"{trust.KEY}="):
            try:
                value = parser.parse_override(text).value()
            except HydraException:
                continue  # `explain` will say it
            names += [*_names(value)]
    return tuple(dict.fromkeys(names))


def _names(value: Any) -> Iterator[str]:
    choices = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else []
    for choice in choices:
        if isinstance(choice, list):
            yield from _names(choice)
        elif "${" not in str(choice):  # what that becomes is for a file to say
            yield choice.text if isinstance(choice, QuotedString) else str(choice)


def unknown_verb(word: str, verbs: Iterable[str]) -> str:
    """The message for a first word that is neither a verb nor a setting."""
    names = list(verbs)
    return (
        f"{cut(word)}: no such verb, the verbs are {', '.join(names)}; a setting is written key=value, without spaces "
        f"around the = sign{_did_you_mean(word, names)}"
    )


def job_naming(overrides: list[str]) -> list[str]:
    """Hydra settings by which a sweep's jobs are named after what they vary, and nothing else."""
    parser = OverridesParser.create()
    try:
        last = {override.key_or_group: override for override in map(parser.parse_override, overrides)}
    except (HydraException, RecursionError):
        return []  # `explain` will say it better
    fixed = {key for key, override in last.items() if not override.is_sweep_override()}  # typed twice: the last counts
    names = sorted(fixed | {"sweep.trial"})  # an optimizing sweeper's
    return [f"hydra.job.config.override_dirname.exclude_keys={names}".replace(" ", "")] if names else []


def explain(error: Exception, verb: str, line: CommandLine) -> UserError:
    """All that is wrong with a command line for which Hydra raised `error`, as one error to show."""
    try:
        return ConfigError(find_problems(verb, line) or [f"config: {_condense(error)}; see kandinsky-exp --help"])
    except Exception:  # whatever it is, the config cannot be composed at all: a yaml file of the user's
        return ConfigError(_not_utf8(line) or f"config: {_condense(error)}; mend the file, or choose another")


def _not_utf8(line: CommandLine) -> str | None:
    """Of a file that is no text, the parser does not say which."""
    for file in sorted(Path(line.config_dir).rglob("*.yaml")) if line.config_dir else []:
        try:
            file.read_text("utf-8")
        except UnicodeDecodeError:
            return f"{file}: not UTF-8 text; save the file as UTF-8"
        except OSError as error:
            return f"{file}: cannot be read ({error.strerror}); mend it"
    return None


def find_problems(verb: str, line: CommandLine) -> list[str]:
    """What is wrong with the overrides; if anything is, all else that is wrong with the config too.

    Raises:
        Exception: whatever Hydra, OmegaConf or the yaml parser raise for a config that cannot be composed.
    """
    GlobalHydra.instance().clear()
    search_path = line.search_path
    with initialize_config_module("kandinsky_exp.conf", version_base="1.3"):
        overrides, problems = _parsed(line)
        groups, keys = [], []
        for override in overrides:
            options = _options(override.key_or_group, verb, search_path)
            if not options:
                keys.append(override)
            elif problem := _wrong_option(override, options):
                problems.append(problem)
            elif not override.is_sweep_override():
                groups.append(override)
        cfg, chosen, wrong_groups = _with_groups(groups, verb, search_path)
        problems += wrong_groups
        wrong = {_text(override): problem for override in keys if (problem := _wrong_key(override, cfg, verb))}
        problems += wrong.values()
        if not problems:
            return []
        rest = [
            _text(override) for override in keys if _text(override) not in wrong and not override.is_sweep_override()
        ]
        known = {re.split("[=:]", problem)[0] for problem in problems}
        further = config.problems(compose(verb, [*chosen, *rest]), trusted=line.trusted, quick=True)
        return problems + [problem for problem in further if problem.split(":")[0] not in known]


def _parsed(line: CommandLine) -> tuple[list[Override], list[str]]:
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())
    overrides, problems = [], []
    for text in line.overrides:
        try:
            override = parser.parse_override(text)
        except (HydraException, RecursionError):  # brackets by the thousand
            override = None
        if override is None or not override.key_or_group:
            problems.append(
                f"{cut(text)}: cannot be read: , : = ( ) [ ] and quotes mean something here; {_quoted(text)}"
            )
        elif override.is_sweep_override() and not line.sweeps:
            problems.append(f"{cut(text)}: several values need --multirun; if this is one text, {_quoted(text)}")
        else:
            overrides.append(override)
    return overrides, problems


def _text(override: Override) -> str:
    return str(override.input_line)


def _options(group: str, verb: str, search_path: list[str]) -> list[str]:
    try:
        return GlobalHydra.instance().config_loader().get_group_options(group, config_name=verb, overrides=search_path)
    except (OSError, ValueError):  # no name of a folder: too long, say
        return []


def _exists(override: Override, cfg: DictConfig) -> bool:
    key = override.key_or_group
    if key.startswith("hydra."):
        return True  # Hydra's own
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return isinstance(node, DictConfig) and last in node.keys()  # noqa: SIM118 (`in node` is false for ???)


def _wrong_option(override: Override, options: list[str]) -> str | None:
    value, group = override.value(), override.key_or_group
    chosen: list[Any] = value if isinstance(value, list) else [value]
    if override.is_sweep_override():
        chosen = list(override.sweep_iterator()) if override.is_discrete_sweep() else []
    if override.is_delete() or all(choice in options for choice in chosen):
        return None
    if not all(isinstance(choice, str) for choice in chosen):
        return f"{group}: needs a name; choose one of {', '.join(options)}, or set one of its keys, {group}.<key>=..."
    wrong = next(choice for choice in chosen if choice not in options)
    if wrong in (extras := EXTRAS.get(group, {})):
        return f'{group}: {wrong} is not installed; pip install "kandinsky-exp[{extras[wrong]}]"'
    meant = _did_you_mean(wrong, options)
    return f"{group}: there is no {group}={cut(wrong)}; the choices are {', '.join(options)}{meant}"


def _with_groups(groups: list[Override], verb: str, search_path: list[str]) -> tuple[DictConfig, list[str], list[str]]:
    """The config with those groups that can be chosen, what chooses them, and what is wrong with the others."""
    chosen = [*search_path, *map(_text, groups)]
    try:
        return compose(verb, chosen), chosen, []
    except HydraException:  # one by one: each compose takes a tenth of a second
        wrong = {_text(override): _wrong_group(override, verb, search_path) for override in groups}
        chosen = [*search_path, *(text for text, problem in wrong.items() if problem is None)]
        return compose(verb, chosen), chosen, [problem for problem in wrong.values() if problem is not None]


def _wrong_group(override: Override, verb: str, search_path: list[str]) -> str | None:
    try:
        compose(verb, [*search_path, _text(override)])
    except HydraException as error:
        group = override.key_or_group
        stranger = "No match in the defaults list" in str(error)
        return (
            f"{group}: {verb} has no such group; remove it"
            if stranger
            else f"{group}: {_condense(error)}; mend the file"
        )
    return None


def _wrong_key(override: Override, cfg: DictConfig, verb: str) -> str | None:
    key, exists = override.key_or_group, _exists(override, cfg)
    if override.is_add() and exists:
        return f"{key}: exists already; write {cut(_text(override).lstrip('+'))}, without the +"
    if exists or override.is_add() or override.is_force_add():
        return None  # `config.problems` looks at what was added
    group, _, _ = key.partition(".")
    options = _options(group, verb, []) if "." in key and group in cfg else []
    for option in options if len(options) > 1 else []:
        other = compose(verb, [f"{group}={option}"])
        if _exists(override, other):
            return f"{key}: not a setting of the {group} that is chosen; it is one of {group}={option}"
    groups = [name for name in GlobalHydra.instance().config_loader().list_groups("") if name != "hydra"]
    meant = config.suggest(key, [*config.dotted_keys(cfg), *groups])
    return f"{cut(key)}: no such setting{meant or f'; kandinsky-exp {verb} --cfg job shows all'}"


def _expand_home(text: str) -> str:
    """`data.path=~/pictures`: shells leave that ~ alone and Hydra's grammar has no place for it."""
    key, equals, value = text.partition("=")
    return f"{key}={Path(value).expanduser()}" if equals and value.startswith("~/") else text


def _quoted(text: str) -> str:
    """How to write a text that has signs of Hydra's grammar in it."""
    key, _, value = text.partition("=")
    key, value = key if len(key) <= 100 else "key", value if len(value) <= 100 else "..."
    if key.endswith("prompts") or "[" in value or '"' in value or "'" in value:
        return f'quote each text: \'{key}=["a fox, in snow", "a house"]\', or give a text file with one prompt per line'
    return f"quote it twice: '{key}=\"{value}\"'"


def _not_a_setting(text: str, verbs: Iterable[str]) -> str:
    if text in verbs:
        return f"{text}: the verb comes first: kandinsky-exp {text} ..."
    return f"{cut(text)}: not a setting; settings are written key=value, without spaces around the = sign"


def _did_you_mean(word: Any, choices: Iterable[str]) -> str:
    close = get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _condense(error: Any) -> str:
    """Hydra's message without its blank lines, search paths and links."""
    lines = [text.strip().rstrip(".") for text in str(error).splitlines()]
    return "; ".join(
        text
        for text in lines
        if text and not text.startswith(("Config search path", "provider=", "full_key", "object_type", "Set the env"))
    )
