"""One table of what was measured, for people and as JSON."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Args:
        item: number of the benchmark.
        what: what is compared, or how long what takes.
        measured: the readings behind it, with their units in their names.
        value: what the limit is for: a ratio, or seconds.
        limit: the bound.
        at_least: the value has to be the limit or more; else the limit or less.
        unit: "x" for a ratio, "s" for seconds, "" for a count.
    """

    item: int
    what: str
    measured: dict[str, float]
    value: float
    limit: float
    at_least: bool = False
    unit: str = "x"

    @property
    def ok(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def table(results: Sequence[Result]) -> str:
    head = ("item", "what", "measured", "value", "limit", "")
    lines = [head, *(_cells(result) for result in results)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cells(result: Result) -> tuple[str, ...]:
    measured = ", ".join(f"{name} {_number(value)}" for name, value in result.measured.items())
    bound = f"{'≥' if result.at_least else '≤'} {result.limit:g}{_unit(result)}"
    value = f"{result.value:.3f}{_unit(result)}" if result.unit else f"{result.value:g}"
    return str(result.item), result.what, measured, value, bound, "ok" if result.ok else "FAIL"


def _unit(result: Result) -> str:
    return {"x": "×", "s": " s"}.get(result.unit, "")


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def write_json(file: Path, machine: dict[str, Any], results: Iterable[Result]) -> None:
    lines = [{**asdict(result), "ok": result.ok} for result in results]
    file.write_text(json.dumps({"machine": machine, "results": lines}, indent=2, ensure_ascii=False) + "\n", "utf-8")
