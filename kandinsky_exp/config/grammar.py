"""Read overrides with Hydra's own grammar; nobody else takes an override apart."""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from decimal import Decimal
from itertools import islice
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString, RangeSweep
from hydra.errors import HydraException

MOST_COUNTED = 10_000  # one by one


def read(text: str, loader: ConfigLoader | None = None) -> Override:
    """One override.

    Args:
        loader: knows the files of a group, for `glob`.

    Raises:
        HydraException, RecursionError: it cannot be read; the latter for brackets by the thousand.
    """
    (override,) = OverridesParser.create(loader).parse_overrides([text])
    return override


def readable(texts: Iterable[str]) -> list[Override]:
    """Those that can be read; of the others, `hydra_errors.explain` tells what is wrong."""
    found = []
    for text in texts:
        with suppress(HydraException, RecursionError):
            found.append(read(text))
    return found


def keys(texts: Iterable[str]) -> set[str]:
    """The groups and dotted keys that overrides are for."""
    return {override.key_or_group for override in readable(texts)}


def why(error: Exception) -> str | None:
    """What a function of the grammar did not like, or None where the signs do not make an override at all."""
    found = re.search(r"while evaluating '.*?': (.*?)\s*(\nSee https|$)", str(error), re.DOTALL)
    return None if found is None else " ".join(found[1].split())


def count(override: Override) -> int | None:
    """How many values a sweep has; None for an interval, which has no end of them."""
    value = override.value()
    if isinstance(value, RangeSweep):
        start, stop, step = (Decimal(number or 0) for number in (value.start, value.stop, value.step))
        if not (start.is_finite() and stop.is_finite() and step.is_finite()):
            return None
        about = 0 if step == 0 else max(0, math.ceil((stop - start) / step))
        return about if step == 0 or about > MOST_COUNTED else sum(1 for _ in value.range())  # fractions are rounded
    return sum(1 for _ in override.sweep_iterator()) if override.is_discrete_sweep() else None


def values(override: Override, limit: int | None = None) -> list[str]:
    """The single values of a sweep as texts, `limit` at most; none of an interval."""
    return [*islice(override.sweep_string_iterator(), limit)] if count(override) else []


def names(texts: Iterable[str], key: str) -> Iterator[str]:
    """What was typed as `key=[...]`, in all overrides of that key, sweeps too."""
    for override in readable(texts):
        if override.key_or_group == key:
            yield from _names(override.value())


def _names(value: Any) -> Iterator[str]:
    choices = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else []
    for choice in choices:
        if isinstance(choice, list):
            yield from _names(choice)
        elif "${" not in str(choice):  # what that becomes is for a file to say
            yield choice.text if isinstance(choice, QuotedString) else str(choice)
