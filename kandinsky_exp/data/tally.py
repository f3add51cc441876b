"""Lists of problems and of unused files for messages: counted by reason, the first few named."""

from collections.abc import Iterable
from typing import Any

SHOWN = 5

Tally = dict[str, list[Any]]  # reason: [how often, name, name, …], as JSON keeps it


def count(tally: Tally, reason: str, name: str) -> None:
    add(tally, {reason: [1, name]})


def add(tally: Tally, other: Tally) -> None:
    """Count all of another one, too."""
    for reason, (number, *names) in other.items():
        entry = tally.setdefault(reason, [0])
        entry[:] = [entry[0] + number, *[*entry[1:], *names][:SHOWN]]


def lines(tally: Tally) -> list[str]:
    """One for each reason."""
    return [
        f"{reason}: {number:,} ({', '.join(names)}{', …' if number > len(names) else ''})"
        for reason, (number, *names) in tally.items()
    ]


def first_few(problems: Iterable[str], total: int | None = None) -> str:
    """The first problems, one a line, and how many more there are, of `total` if only some are given."""
    listed = list(problems)
    rest = (total if total is not None else len(listed)) - SHOWN
    return "\n".join([*listed[:SHOWN], *([f"… and {rest:,} more"] if rest > 0 else [])])
