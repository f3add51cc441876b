"""Check a whole config before anything is loaded, and find all that is wrong at once.

Only `targets.check` may import torch, and only for a config that is good otherwise, or has arguments that no schema
knows: a misspelt number is answered at once.
"""

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any, TypeGuard

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kandinsky_exp.config import allowlist, consistency, saved_config, targets
from kandinsky_exp.config.saved_config import Values
from kandinsky_exp.config.schema import Group, OpenNode
from kandinsky_exp.config.suggestions import suggest
from kandinsky_exp.config.types import type_problem
from kandinsky_exp.config.verb_schemas import SCHEMAS
from kandinsky_exp.errors import ConfigError, Problem, first_line

NEEDED = {  # what to do about a key that is not set
    "run": "give the folder of a finished run, run=outputs/my_decoder",
    "data.path": "give the folder of your images (or the list, or the shards), data.path=<folder>, or take data=hub",
    "adapter.source": "give the folder of a run with adapter=lora or dora, adapter=<folder>",
    "data.name": "give the data set's id on the hub, e.g. data.name=lambdalabs/naruto-blip-captions",
    "data.instance_path": "give the folder with the pictures of your subject",
    "data.instance_prompt": "give what they show, with a rare word for it, such as a photo of sks dog",
}


def validate(cfg: DictConfig, verb: str, trusted: Collection[str] = ()) -> None:
    """Check the composed root config of a verb; load no weights and read no images.

    Args:
        trusted: modules that the user lets `_target_` name too; noted in the config, which alone cannot add any.

    Raises:
        ConfigError: with every problem, each as `key: what is wrong; what to do`.
    """
    if found := problems(cfg, verb, trusted):
        raise ConfigError(found)
    allowlist.remember(cfg, trusted)


def problems(cfg: DictConfig, verb: str, trusted: Collection[str] = (), *, quick: bool = False) -> list[Problem]:
    """All that is wrong with the composed root config of a verb.

    Args:
        trusted: modules that the user lets `_target_` name too.
        quick: something is wrong already: import targets only for arguments that no schema knows.
    """
    try:
        values = saved_config.resolved(cfg)
    except OmegaConfBaseException as error:
        return [Problem(error.full_key or "config", f"{first_line(error)}; name a key that exists")]
    schema = SCHEMAS[verb]
    lists = verb == "encode" and (values.get("list") or values.get("remove"))
    if lists or (verb == "evaluate" and values.get("run") is not None):
        # It reads no data then, or the run's: what has to be given need not be.
        values["data"] = {key: "." if value == "???" else value for key, value in values["data"].items()}
    quick = quick or bool(lists)  # it builds nothing, and a second is long
    found = [*_check_group(values, schema)]
    wrong = {problem.key for problem in found}
    good = {key: value for key, value in saved_config.leaves(values) if key not in wrong and value != "???"}
    modules = allowlist.user_modules(cfg, trusted)
    stage = partial(targets.stage_of, values.get("model"), modules)
    source = targets.source_facts(good.get("data._target_"), modules)
    beyond = [*consistency.files(good, stage, source), *consistency.together(good, stage, source)]
    if names := allowlist.refused(cfg, trusted):
        type_it = f"type trusted_modules=[{','.join(names)}], or hand it to the function from Python"
        untrusted = f"a config file may not add {', '.join(names)}; if you trust that code, {type_it}"
        beyond.append((allowlist.KEY, untrusted))
    found += [Problem(key, text) for key, text in beyond if key not in wrong]
    return found + targets.problems(values, schema, modules, quick=quick or bool(found))


# --- the schema


def _is_group(annotation: Any) -> TypeGuard[type[Group]]:
    return isinstance(annotation, type) and issubclass(annotation, Group)


def _check_group(values: Values, schema: type[Group], prefix: str = "") -> Iterator[Problem]:
    """What is wrong with a mapping and the mappings in it."""
    annotations = schema.annotations()
    for name, annotation in annotations.items():
        if name in values:
            yield from _check_value(f"{prefix}{name}", values[name], annotation)
        elif not hasattr(schema, name):
            yield Problem(f"{prefix}{name}", "is missing; it was deleted from the config, put it back")
    if not issubclass(schema, OpenNode):
        for name in (name for name in values if name not in annotations):
            known = [f"{prefix}{text}" for text in annotations] if prefix else [*annotations, *all_keys()]
            yield Problem(f"{prefix}{name}", f"nothing reads this key; remove it{suggest(f'{prefix}{name}', known)}")


def _check_value(key: str, value: Any, annotation: Any) -> Iterator[Problem]:
    if not _is_group(annotation):
        if value == "???":
            yield Problem(key, f"is not set; {NEEDED.get(key, f'give it a value, {key}=...')}")
        elif problem := type_problem(value, annotation):
            yield Problem(key, problem)
    elif isinstance(value, dict):
        yield from _check_group(value, annotation, f"{key}.")
    else:
        yield Problem(key, f"has to be a group of settings, not {value!r}; choose one with {key}=<option>")


def annotation(key: str) -> Any:
    """What the schema says that a dotted key of a run has to be; None for a key that it does not know."""
    return dict(_schema_keys(SCHEMAS["train"])).get(key)


def all_keys() -> list[str]:
    """The dotted keys of all verbs."""
    return [key for schema in SCHEMAS.values() for key, _ in _schema_keys(schema)]


def _schema_keys(schema: type[Group], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, annotation in schema.annotations().items():
        yield f"{prefix}{name}", annotation
        if _is_group(annotation):
            yield from _schema_keys(annotation, f"{prefix}{name}.")
