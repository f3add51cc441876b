"""A plain explanation of what Hydra refuses.

Hydra stops at the first thing it cannot compose and answers a misspelt key with "use +modle=decoder", which
then would be silently ignored. `explain` looks at every override and names all that is wrong.
"""

import re
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from kandinsky_exp.config import grammar, saved_config, suggestions, validation
from kandinsky_exp.config.command_line import SEARCH_PATH, CommandLine, composing, did_you_mean, group_options
from kandinsky_exp.errors import ConfigError, cut

# Hydra's plugins, and the extra that installs each.
EXTRAS = {"hydra/launcher": {"joblib": "sweep", "submitit_local": "sweep", "submitit_slurm": "sweep", "ray": "ray"}}


def explain(error: Exception, verb: str, line: CommandLine) -> ConfigError:
    """All that is wrong with a command line for which Hydra raised `error`, as one error to show."""
    try:
        return ConfigError(find_problems(verb, line) or [f"config: {condense(error)}; see kandinsky-exp --help"])
    except Exception:  # whatever it is, the config cannot be composed at all: a yaml file of the user's
        return ConfigError(_not_utf8(line) or f"config: {condense(error)}; mend the file, or choose another")


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
    search_path = line.search_path
    with composing(line) as loader:
        overrides, problems = _parsed(line, loader)
        groups, keys = [], []
        for override in overrides:
            options = group_options(loader, override.key_or_group, verb, search_path)
            if not options:
                keys.append(override)
            elif problem := _wrong_option(override, options):
                problems.append(problem)
            else:
                groups.append(override)
        cfg, chosen, wrong_groups = _with_groups(groups, verb, search_path)
        problems += wrong_groups
        wrong = {_text(override): problem for override in keys if (problem := _wrong_key(override, cfg, verb, loader))}
        problems += wrong.values()
        if not problems:
            return []
        rest = [
            _text(override) for override in keys if _text(override) not in wrong and not override.is_sweep_override()
        ]
        known = {re.split("[=:]", problem)[0] for problem in problems}
        further = validation.problems(compose(verb, [*chosen, *rest]), trusted=line.trusted, quick=True)
        return problems + [problem for problem in further if problem.split(":")[0] not in known]


def _parsed(line: CommandLine, loader: ConfigLoaderImpl) -> tuple[list[Override], list[str]]:
    """What can be read, but for the search path, and what is wrong with the rest."""
    overrides, problems = [], []
    for text in line.overrides:
        override, reason = None, None
        try:
            override = grammar.read(text, loader)
        except (HydraException, RecursionError) as error:
            reason = grammar.why(error)
        if override is None or not override.key_or_group:
            why = reason or ", : = ( ) [ ] and quotes mean something here"
            problems.append(f"{cut(text)}: cannot be read: {cut(why)}; {_quoted(text)}")
        elif override.is_sweep_override() and not line.sweeps:
            problems.append(f"{cut(text)}: several values need --multirun; if this is one text, {_quoted(text)}")
        elif override.is_sweep_override() and grammar.count(override) == 0:
            problems.append(_no_values(override))
        elif override.key_or_group != SEARCH_PATH:
            overrides.append(override)
    return overrides, problems


def _no_values(override: Override) -> str:
    key, text = override.key_or_group, cut(override.get_value_string())
    if override.value_type != ValueType.GLOB_CHOICE_SWEEP:
        return f"{key}: {text} has no value in it; write range(start,stop,step), with a step that leads to stop"
    assert isinstance(override.config_loader, ConfigLoaderImpl)
    options = override.config_loader.get_group_options(key)
    if options:
        return f"{key}: {text} fits none of its files; choose from {', '.join(options)}"
    return f"{key}: glob is for the files of a group, and this is none; list the values"


def _text(override: Override) -> str:
    return str(override.input_line)


def _exists(override: Override, cfg: DictConfig) -> bool:
    key = override.key_or_group
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return isinstance(node, DictConfig) and last in node.keys()  # noqa: SIM118 (`in node` is false for ???)


def _wrong_option(override: Override, options: list[str]) -> str | None:
    value, group = override.value(), override.key_or_group
    chosen: list[Any] = value if isinstance(value, list) else [value]
    if override.is_discrete_sweep():
        chosen = list(override.sweep_iterator())
    if override.is_delete() or all(choice in options for choice in chosen):
        return None
    if not all(isinstance(choice, str) for choice in chosen):
        return f"{group}: needs a name; choose one of {', '.join(options)}, or set one of its keys, {group}.<key>=..."
    wrong = next(choice for choice in chosen if choice not in options)
    if wrong in (extras := EXTRAS.get(group, {})):
        return f'{group}: {wrong} is not installed; pip install "kandinsky-exp[{extras[wrong]}]"'
    meant = did_you_mean(wrong, options)
    return f"{group}: there is no {group}={cut(wrong)}; the choices are {', '.join(options)}{meant}"


def _with_groups(groups: list[Override], verb: str, search_path: list[str]) -> tuple[DictConfig, list[str], list[str]]:
    """The config with those groups that can be chosen, what chooses them, and what is wrong with the others.

    What a sweep varies is not in that config, only tried.
    """
    wrong = [problem for override in groups if override.is_sweep_override() and (
        problem := _wrong_group(override, _first(override), verb, search_path))]  # fmt: skip
    fixed = [override for override in groups if not override.is_sweep_override()]
    chosen = [*search_path, *map(_text, fixed)]
    try:
        return compose(verb, chosen), chosen, wrong
    except HydraException:  # one by one: each compose takes a tenth of a second
        found = {_text(override): _wrong_group(override, _text(override), verb, search_path) for override in fixed}
        chosen = [*search_path, *(text for text, problem in found.items() if problem is None)]
        return compose(verb, chosen), chosen, [*wrong, *(problem for problem in found.values() if problem is not None)]


def _first(override: Override) -> str:
    return f"{override.get_key_element()}={grammar.values(override, 1)[0]}"


def _wrong_group(override: Override, text: str, verb: str, search_path: list[str]) -> str | None:
    """What is wrong with choosing a group's file by `text`, which is the override or one value of it."""
    error = _refused(verb, [*search_path, text])
    if error is None:
        return None
    group = override.key_or_group
    if override.is_delete():
        return f"{cut(_text(override))}: {error}; write ~{group}"
    if "No match in the defaults list" in error:
        return f"{group}: {verb} has no such group; remove it"
    value = text.partition("=")[2]
    if _refused(verb, [*search_path, f"{group}={value}"]) is not None:
        return f"{group}: {error}; mend the file"
    # Without the + or the package it is right.
    return f"{cut(_text(override))}: there is a place for {group} already; write {group}={override.get_value_string()}"


def _refused(verb: str, overrides: list[str]) -> str | None:
    try:
        compose(verb, overrides)
    except HydraException as error:
        return condense(error)
    return None


def _wrong_key(override: Override, cfg: DictConfig, verb: str, loader: ConfigLoaderImpl) -> str | None:
    key, exists = override.key_or_group, _exists(override, cfg)
    if override.is_hydra_override():
        return None  # Hydra judges them itself, and the plugins for which they are
    if override.is_add() and exists:
        return f"{key}: exists already; write {cut(_text(override).lstrip('+'))}, without the +"
    if exists or override.is_add() or override.is_force_add():
        return None  # `config.problems` looks at what was added
    group, _, _ = key.partition(".")
    options = group_options(loader, group, verb) if "." in key and group in cfg else []
    for option in options if len(options) > 1 else []:
        other = compose(verb, [f"{group}={option}"])
        if _exists(override, other):
            return f"{key}: not a setting of the {group} that is chosen; it is one of {group}={option}"
    groups = [name for name in loader.list_groups("") if name != "hydra"]
    meant = suggestions.suggest(key, [*saved_config.dotted_keys(cfg), *groups])
    return f"{cut(key)}: no such setting{meant or f'; for all of them: kandinsky-exp {verb} --cfg job'}"


def _quoted(text: str) -> str:
    """How to write a text that has signs of Hydra's grammar in it."""
    key, _, value = text.partition("=")
    key, value = key if len(key) <= 100 else "key", value if len(value) <= 100 else "..."
    if key.endswith("prompts") or "[" in value or '"' in value or "'" in value:
        return f'quote each text: \'{key}=["a fox, in snow", "a house"]\', or give a text file with one prompt per line'
    return f"quote it twice: '{key}=\"{value}\"'"


def condense(error: Any) -> str:
    """Hydra's message and the reason below it, without blank lines, search paths and links."""
    lines = [text.strip().rstrip(".") for text in str(error).splitlines()]
    texts = [
        text
        for text in lines
        if text
        and not text.startswith(
            (
                "Config search path",
                "provider=",
                "full_key",
                "object_type",
                "reference_type",
                "Set the env",
                "See https",
                "To append to your config use",
            )  # it would be ignored there
        )
    ]
    cause = getattr(error, "__cause__", None)
    if isinstance(error, HydraException) and cause is not None:
        texts += [text for text in [condense(cause)] if text and text not in "; ".join(texts)]
    return "; ".join(texts)
