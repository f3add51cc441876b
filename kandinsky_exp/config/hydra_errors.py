"""A plain explanation of what Hydra refuses.

Hydra stops at the first thing it cannot compose and answers a misspelt key with "use +modle=decoder", which
then would be silently ignored. `explain` looks at every override and names all that is wrong.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from kandinsky_exp.config import grammar, saved_config, set_entries, suggestions, validation
from kandinsky_exp.config.command_line import SEARCH_PATH, CommandLine, group_options
from kandinsky_exp.errors import ConfigError, Problem, cut
from kandinsky_exp.hydra_adapter import condense

# Hydra's plugins, and the extra that installs each.
EXTRAS = {"hydra/launcher": {"joblib": "sweep", "submitit_local": "sweep", "submitit_slurm": "sweep", "ray": "ray"}}


def explain(error: Exception, line: CommandLine) -> ConfigError:
    """All that is wrong with a command line for which Hydra raised `error`, as one error to show."""
    try:
        found = find_problems(line) or [Problem("config", f"{condense(error)}; see kandinsky-exp --help")]
    except Exception:  # whatever it is, the config cannot be composed at all: a yaml file of the user's
        mend = Problem("config", f"{condense(error)}; mend the file, or choose another")
        found = [next(_not_utf8(line), mend)]
    return ConfigError(found)


def _not_utf8(line: CommandLine) -> Iterator[Problem]:
    """Of a file that is no text, the parser does not say which."""
    folder = line.flags.config_dir
    for file in sorted(Path(folder).rglob("*.yaml")) if folder else []:
        try:
            file.read_text("utf-8")
        except UnicodeDecodeError:
            yield Problem(str(file), "not UTF-8 text; save the file as UTF-8")
        except OSError as error:
            yield Problem(str(file), f"cannot be read ({error.strerror}); mend it")


def find_problems(line: CommandLine) -> list[Problem]:
    """What is wrong with the overrides; if anything is, all else that is wrong with the config too.

    Raises:
        Exception: whatever Hydra, OmegaConf or the yaml parser raise for a config that cannot be composed.
    """
    with line.composing() as loader:
        overrides, problems = _parsed(line, loader)
        groups, keys = [], []
        for override in overrides:
            options = group_options(loader, override.key_or_group, line.root, line.search_path)
            if not options:
                keys.append(override)
            elif problem := _wrong_option(override, options):
                problems.append(problem)
            else:
                groups.append(override)
        cfg, chosen, wrong_groups = _with_groups(groups, line)
        problems += wrong_groups
        good = []
        for override in keys:
            if problem := _wrong_key(override, cfg, line, loader):
                problems.append(problem)
            elif not override.is_sweep_override():
                good.append(_text(override))
        if not problems:
            return []
        problems = [*dict.fromkeys(problems)]
        known = {problem.key.partition("=")[0] for problem in problems}  # of what cannot be read, all is its key
        cfg = compose(line.root, [*chosen, *good])
        further = validation.problems(cfg, line.verb, line.trusted, quick=True)
        return problems + [problem for problem in further if problem.key not in known]


def _parsed(line: CommandLine, loader: ConfigLoader) -> tuple[list[Override], list[Problem]]:
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
            problems.append(Problem(cut(text), f"cannot be read: {cut(why)}; {_quoted(text)}"))
        elif override.is_sweep_override() and not line.sweeps:
            several = f"several values need --multirun; if this is one text, {_quoted(text)}"
            problems.append(Problem(cut(text), several))
        elif override.is_sweep_override() and grammar.count(override) == 0:
            problems.append(Problem(override.key_or_group, _no_values(override, loader)))
        elif override.key_or_group != SEARCH_PATH:
            overrides.append(override)
    return overrides, problems


def _no_values(override: Override, loader: ConfigLoader) -> str:
    text = cut(override.get_value_string())
    if override.value_type != ValueType.GLOB_CHOICE_SWEEP:
        return f"{text} has no value in it; write range(start,stop,step), with a step that leads to stop"
    if options := loader.get_group_options(override.key_or_group):
        return f"{text} fits none of its files; choose from {', '.join(options)}"
    return "glob is for the files of a group, and this is none; list the values"


def _text(override: Override) -> str:
    return str(override.input_line)


def _exists(override: Override, cfg: DictConfig) -> bool:
    key = override.key_or_group
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return isinstance(node, DictConfig) and last in node.keys()  # noqa: SIM118 (`in node` is false for ???)


def _wrong_option(override: Override, options: list[str]) -> Problem | None:
    value, group = override.value(), override.key_or_group
    chosen: list[Any] = value if isinstance(value, list) else [value]
    if override.is_discrete_sweep():
        chosen = list(override.sweep_iterator())
    if override.is_delete() or all(choice in options for choice in chosen):
        return None
    if not all(isinstance(choice, str) for choice in chosen):
        names = ", ".join(options)
        return Problem(group, f"needs a name; choose one of {names}, or set one of its keys, {group}.<key>=...")
    wrong = next(choice for choice in chosen if choice not in options)
    if wrong in (extras := EXTRAS.get(group, {})):
        return Problem(group, f'{wrong} is not installed; pip install "kandinsky-exp[{extras[wrong]}]"')
    meant = suggestions.did_you_mean(wrong, options, 0.5)
    return Problem(group, f"there is no {group}={cut(wrong)}; the choices are {', '.join(options)}{meant}")


def _with_groups(groups: list[Override], line: CommandLine) -> tuple[DictConfig, list[str], list[Problem]]:
    """The config with those groups that can be chosen, what chooses them, and what is wrong with the others.

    What a sweep varies is not in that config, only tried.
    """
    swept = [override for override in groups if override.is_sweep_override()]
    fixed = [override for override in groups if not override.is_sweep_override()]
    wrong = [problem for override in swept if (problem := _wrong_group(override, line))]
    chosen = [*line.search_path, *map(_text, fixed)]
    try:
        return compose(line.root, chosen), chosen, wrong
    except HydraException:  # one by one: each compose takes a tenth of a second
        found = {_text(override): _wrong_group(override, line) for override in fixed}
        chosen = [*line.search_path, *(text for text, problem in found.items() if problem is None)]
        return compose(line.root, chosen), chosen, [*wrong, *filter(None, found.values())]


def _wrong_group(override: Override, line: CommandLine) -> Problem | None:
    """What is wrong with choosing a group's file by an override; of a sweep the first value is tried."""
    text = _text(override)
    if override.is_sweep_override():
        text = f"{override.get_key_element()}={grammar.values(override, 1)[0]}"
    error = _refused(text, line)
    if error is None:
        return None
    group = override.key_or_group
    if override.is_delete():
        return Problem(cut(_text(override)), f"{error}; write ~{group}")
    if "No match in the defaults list" in error:
        return Problem(group, f"{line.verb} has no such group; remove it")
    if _refused(f"{group}={text.partition('=')[2]}", line) is not None:
        return Problem(group, f"{error}; mend the file")
    # Without the + or the package it is right.
    right = f"{group}={override.get_value_string()}"
    return Problem(cut(_text(override)), f"there is a place for {group} already; write {right}")


def _refused(text: str, line: CommandLine) -> str | None:
    try:
        compose(line.root, [*line.search_path, text])
    except HydraException as error:
        return condense(error)
    return None


def _wrong_key(override: Override, cfg: DictConfig, line: CommandLine, loader: ConfigLoader) -> Problem | None:
    key, exists = override.key_or_group, _exists(override, cfg)
    if override.is_hydra_override():
        return None  # Hydra judges them itself, and the plugins for which they are
    if override.is_add() and exists:
        return Problem(key, f"exists already; write {cut(_text(override).lstrip('+'))}, without the +")
    if exists or override.is_add() or override.is_force_add():
        return None  # `validation.problems` looks at what was added
    if key.startswith(f"{set_entries.KEY}."):
        return Problem(cut(key), f"write the sets in one: '{set_entries.KEY}={{night: {{path: night_pictures}}}}'")
    group, _, _ = key.partition(".")
    options = group_options(loader, group, line.root) if "." in key and group in cfg else []
    others = options if len(options) > 1 else []
    if having := [name for name in others if _exists(override, compose(line.root, [f"{group}={name}"]))]:
        return Problem(key, f"not a setting of the {group} that is chosen; it is one of {group}={', '.join(having)}")
    groups = [name for name in loader.list_groups("") if name != "hydra"]
    meant = suggestions.suggest(key, [*saved_config.dotted_keys(cfg), *groups])
    return Problem(cut(key), f"no such setting{meant or f'; for all of them: kandinsky-exp {line.verb} --cfg job'}")


def _quoted(text: str) -> str:
    """How to write a text that has signs of Hydra's grammar in it."""
    key, _, value = text.partition("=")
    key, value = key if len(key) <= 100 else "key", value if len(value) <= 100 else "..."
    if key.endswith("prompts") or "[" in value or '"' in value or "'" in value:
        return f'quote each text: \'{key}=["a fox, in snow", "a house"]\', or give a text file with one prompt per line'
    return f"quote it twice: '{key}=\"{value}\"'"
