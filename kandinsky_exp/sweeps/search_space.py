"""Optuna distributions from Hydra's override grammar: choices, `range`, `interval`, `tag(log, …)`."""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from kandinsky_exp.config import grammar, validation
from kandinsky_exp.config.types import is_whole, type_problem
from kandinsky_exp.errors import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

LOG = "tag(log,interval(1e-6,1e-3))"


def space(overrides: Mapping[str, Override]) -> "dict[str, BaseDistribution]":
    """What each of a sweep's overrides draws from.

    Raises:
        ConfigError: all that Optuna could not draw from.
    """
    found, problems = {}, []
    for key, override in overrides.items():
        try:
            found[key] = distribution(override)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return found


def distribution(override: Override) -> "BaseDistribution":
    """What an override draws from; an interval of a setting that has to be whole draws whole numbers.

    Raises:
        ConfigError: Optuna could not draw from it.
    """
    from optuna.distributions import CategoricalDistribution

    value, key = override.value(), override.key_or_group
    tags = set(getattr(value, "tags", ()))
    if strange := sorted(tags - {"log"}):
        raise ConfigError(f"{key}: the tag {', '.join(strange)} means nothing to Optuna; log does, {LOG}")
    if isinstance(value, IntervalSweep):
        return _interval(key, value, is_log="log" in tags)
    if isinstance(value, RangeSweep) and not value.shuffle:
        return _range(override, value, is_log="log" in tags)
    if tags:
        raise ConfigError(f"{key}: single values are not drawn by their logarithm; leave the tag out, or write {LOG}")
    return CategoricalDistribution(grammar.values(override))


def _interval(key: str, value: IntervalSweep, is_log: bool) -> "BaseDistribution":
    from optuna.distributions import FloatDistribution, IntDistribution

    low, high = value.start or 0.0, value.end or 0.0
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{key}: interval({low:g},{high:g}) has to begin below its end; write interval(low,high)")
    _check_log(key, low, is_log)
    wanted = validation.annotation(key)
    tried: dict[float, float]
    if is_whole(wanted):
        low, high = math.ceil(low), math.floor(high)
        if low > high:
            raise ConfigError(f"{key}: there is no whole number in {value.start:g} to {value.end:g}; make it wider")
        tried = {low: low, high: high, min(low + 1, high): min(low + 1, high)}
    else:  # the ends are not drawn
        tried = {low: math.nextafter(low, high), high: math.nextafter(high, low)}
    for shown, number in tried.items() if wanted is not None else ():
        if problem := type_problem(number, wanted):
            raise ConfigError(f"{key}: {type_problem(shown, wanted) or problem}; an interval draws all that lies in it")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=is_log)
    return FloatDistribution(low, high, log=is_log)


def _range(override: Override, value: RangeSweep, is_log: bool) -> "BaseDistribution":
    from optuna.distributions import FloatDistribution, IntDistribution

    key, count = override.key_or_group, grammar.count(override)
    if not count:
        raise ConfigError(f"{key}: {override.get_value_string()} has no end of values, or none; write range(low,high)")
    first, step = Decimal(value.start or 0), Decimal(value.step)
    low, high = sorted((first, first + (count - 1) * step))
    _check_log(key, float(low), is_log)
    if all(isinstance(number, int) for number in (value.start, value.stop, value.step)):
        if is_log and abs(step) != 1:
            raise ConfigError(f"{key}: Optuna draws by the logarithm without a step only; leave it out, or the tag")
        return IntDistribution(int(low), int(high), step=int(abs(step)), log=is_log)
    if is_log:
        raise ConfigError(f"{key}: Optuna draws fractions by the logarithm without a step only; write {LOG}")
    return FloatDistribution(float(low), float(high), step=float(abs(step)))


def _check_log(key: str, low: float, is_log: bool) -> None:
    if is_log and low <= 0:
        raise ConfigError(f"{key}: with the tag log it has to begin above 0, not at {low:g}; e.g. {LOG}")


def grid_values(key: str, values: "BaseDistribution") -> Sequence[Any]:
    """All values of a distribution.

    Raises:
        ConfigError: there is no end of them.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, CategoricalDistribution):
        return list(values.choices)
    if isinstance(values, IntDistribution):
        return list(range(values.low, values.high + 1, values.step))
    if isinstance(values, FloatDistribution) and values.step is not None:
        count = round((values.high - values.low) / values.step) + 1
        return [values.low + number * values.step for number in range(count)]
    raise ConfigError(f"{key}: a grid needs single values; give a list of them, or range(start,stop,step)")
