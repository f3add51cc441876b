"""The check of a whole config before anything is loaded, and its flat and written forms.

Everything that is wrong is found at once. Only `targets.check` may import torch, and only for a config that is good
otherwise, or has arguments that no schema knows: a misspelt number is answered at once.
"""

import typing
from collections.abc import Collection, Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kandinsky_exp.config import allowlist, consistency, targets
from kandinsky_exp.config.saved_config import Values, _leaves, _resolved
from kandinsky_exp.config.schema import OpenNode
from kandinsky_exp.config.suggestions import suggest
from kandinsky_exp.config.types import misfit
from kandinsky_exp.config.verb_schemas import ROOTS
from kandinsky_exp.errors import ConfigError, first_line

NEEDED = {  # what to do about a key that is not set
    "run": "give the folder of a finished run, run=outputs/my_decoder",
    "data.path": "give the folder of your images (or the list, or the shards), data.path=<folder>, or take data=hub",
    "adapter.source": "give the folder of a run with adapter=lora or dora, adapter=<folder>",
    "data.name": "give the data set's id on the hub, e.g. data.name=lambdalabs/naruto-blip-captions",
    "data.instance_path": "give the folder with the pictures of your subject",
    "data.instance_prompt": "give what they show, with a rare word for it, such as a photo of sks dog",
}
TYPE_IT = "if you trust that code, type trusted_modules=[{}], or hand it to the function from Python"


def validate(cfg: DictConfig, trusted: Collection[str] = ()) -> None:
    """Checks a composed root config; loads no weights and reads no images.

    Args:
        trusted: modules that the user lets `_target_` name too; noted in the config, which alone cannot add any.

    Raises:
        ConfigError: with every problem, each as `key: what is wrong; what to do`.
    """
    found = problems(cfg, trusted=trusted)
    if found:
        raise ConfigError(found)
    allowlist.note(cfg, trusted)


def problems(cfg: DictConfig, *, trusted: Collection[str] = (), quick: bool = False) -> list[str]:
    """All that is wrong with a composed root config, each as `key: what is wrong; what to do`.

    Args:
        trusted: modules that the user lets `_target_` name too.
        quick: something is wrong already: import targets only for arguments that no schema knows.
    """
    try:
        values = _resolved(cfg)
    except OmegaConfBaseException as error:
        return [f"{error.full_key or 'config'}: {first_line(error)}; name a key that exists"]
    root = max(ROOTS, key=lambda schema: len(_hints(schema).keys() & values.keys()))
    if values.get("list") or values.get("remove"):  # `encode` reads no data then: what has to be given need not be
        values["data"] = {key: "." if value == "???" else value for key, value in values["data"].items()}
        quick = True  # nor does it build anything, and a second is long for a list
    wrong = dict(_check_schema(values, root))
    good = {key: value for key, value in _leaves(values) if key not in wrong and value != "???"}
    added = allowlist.user_modules(cfg, trusted)
    stage = partial(targets.stage_of, values.get("model"), added)
    source = targets.source_facts(good.get("data._target_"), added)
    beyond = [*consistency.files(good, stage, source), *consistency.together(good, stage, source)]
    found = [f"{key}: {text}" for key, text in [*wrong.items(), *(item for item in beyond if item[0] not in wrong)]]
    if "trusted_modules" not in wrong and (files := allowlist.refused(cfg, trusted)):
        found.append(
            f"trusted_modules: a config file may not add {', '.join(files)}; {TYPE_IT.format(','.join(files))}"
        )
    return found + targets.problems(values, root, allowlist.user_modules(cfg, trusted), quick=quick or bool(found))


# --- the schema


def _hints(schema: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(schema, include_extras=True)


def _check_schema(values: Values, schema: type[Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of a mapping and the mappings in it."""
    hints = _hints(schema)
    for item in fields(schema):
        key, annotation = f"{prefix}{item.name}", hints[item.name]
        if item.name not in values:
            if item.default is MISSING:
                yield key, "is missing; it was deleted from the config, put it back"
        elif is_dataclass(annotation) and isinstance(annotation, type):
            yield from _check_node(key, values[item.name], annotation)
        elif problem := _check_value(key, values[item.name], annotation):
            yield key, problem
    if not issubclass(schema, OpenNode):
        names = [item.name for item in fields(schema)]
        for name in values.keys() - set(names):
            known = [*names, *all_keys()] if not prefix else [f"{prefix}{text}" for text in names]
            yield f"{prefix}{name}", f"nothing reads this key; remove it{suggest(f'{prefix}{name}', known)}"


def _check_node(key: str, value: Any, schema: type[Any]) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        yield from _check_schema(value, schema, f"{key}.")
    else:
        yield key, f"has to be a group of settings, not {value!r}; choose one with {key}=<option>"


def _check_value(key: str, value: Any, annotation: Any) -> str | None:
    if value == "???":
        return f"is not set; {NEEDED.get(key, f'give it a value, {key}=...')}"
    return misfit(value, annotation)


def annotation(key: str) -> Any:
    """What the schema says that a dotted key of a run has to be; None for a key that it does not know."""
    found: Any = ROOTS[0]
    for part in key.split("."):
        found = _hints(found).get(part) if is_dataclass(found) and isinstance(found, type) else None
    return found


def _schema_keys(schemas: Iterable[type[Any]], prefix: str = "") -> Iterator[str]:
    for schema in schemas:
        for name, annotation in _hints(schema).items():
            yield f"{prefix}{name}"
            if isinstance(annotation, type) and is_dataclass(annotation):
                yield from _schema_keys([annotation], f"{prefix}{name}.")


def all_keys() -> list[str]:
    """The dotted keys of all verbs."""
    return list(_schema_keys(ROOTS))
