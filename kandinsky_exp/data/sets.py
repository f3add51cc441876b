"""Sets of pictures by name, each from a source of its own: the entries of `validation.sets`."""

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

from kandinsky_exp.data import source_facts, sources
from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.source_facts import Announced
from kandinsky_exp.data.splits import Splits, told_of
from kandinsky_exp.errors import DataError
from kandinsky_exp.system.files import is_folder

SOURCES: dict[str, Callable[..., Splits]] = {
    "folder": sources.folder,
    "list": sources.listing,
    "webdataset": sources.webdataset,
    "hub": sources.hub,
}


def fitted(
    splits: Splits,
    settings: Mapping[str, Any],
    *,
    columns: Sequence[str],
    companions: Mapping[str, type[Any]],
    seed: int,
) -> Splits:
    """A data set as a stage reads it: with its columns and the pictures that belong to others, cut down.

    Args:
        settings: of `data`: `max_samples`, and the columns or folders of `companions`, see `sources.with_companions`.

    Raises:
        DataError: these are not there.
    """
    read = sources.with_companions(sources.with_columns(splits, columns), companions, settings)
    return sources.subset(read, settings["max_samples"], seed)


def held_out(
    entries: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any], fit: Callable[..., Splits]
) -> dict[str, Source]:
    """Further held-out sets: of each entry the validation split where it has one, and else all of it.

    Args:
        entries: by name; arguments of its `source`, one of `SOURCES`, and settings of its own for `fit`.
        settings: of `data`, which hold where an entry has none; but a folder of holes or hints is one set's alone.
        fit: see `fitted`.

    Raises:
        DataError: one cannot be read; the message begins with its name.
    """
    found = {}
    shared = {key: value for key, value in settings.items() if key not in ("holes", "hints")}
    for name, entry in entries.items():
        function, asked = _asked(entry)
        try:
            splits = function(**asked)
            only = Splits(splits.train if splits.validation is None else splits.validation, None)
            found[name] = fit(only, {**shared, **entry}).train
        except DataError as error:
            raise DataError(told_of(name, str(error))) from error
    return found


def announced(entries: Mapping[str, Mapping[str, Any]], limit: int | None) -> dict[str, Announced]:
    """Of the entries on the hub what is known before anything of them is fetched.

    Args:
        limit: `data.max_samples`.

    Raises:
        DataError: the hub cannot be asked; the message begins with the entry's name.
    """
    found = {}
    for name, entry in entries.items():
        function, asked = _asked(entry)
        facts = vars(function).get("facts", source_facts.SourceFacts())
        if facts.announced is None or is_folder(str(asked[facts.hub_id])):
            continue
        try:
            splits = facts.announced(**source_facts.arguments(facts.announced, asked), limit=limit)
        except DataError as error:
            raise DataError(told_of(name, str(error))) from error
        found[name] = splits.train if splits.validation is None else splits.validation
    return found


def _asked(entry: Mapping[str, Any]) -> tuple[Callable[..., Splits], dict[str, Any]]:
    """The function of an entry's source with its arguments; where a split is named, no other one counts."""
    function = SOURCES[entry.get("source", "folder")]
    defaults = {
        name: one.default for name, one in signature(function).parameters.items() if one.default is not one.empty
    }
    whole = {"validation_split": None} if "split" in entry else {}
    return function, source_facts.arguments(function, {**defaults, **whole, **entry})
