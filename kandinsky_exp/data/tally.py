"""What was passed over, by reason: how often, and the names of the first few."""

from typing import Any

from kandinsky_exp.data.formats.metadata import SHOWN

Tally = dict[str, list[Any]]  # reason: [how often, name, name, …], as JSON keeps it


def count(tally: Tally, reason: str, name: str) -> None:
    entry = tally.setdefault(reason, [0])
    entry[0] += 1
    if len(entry) <= SHOWN:
        entry.append(name)


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
