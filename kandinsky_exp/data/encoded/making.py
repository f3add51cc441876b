"""A table in the making: its plan, the parts that are there, and the manifest that joins them."""

import json
import os
import shutil
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kandinsky_exp.data import tally
from kandinsky_exp.data.encoded import claims
from kandinsky_exp.data.encoded.catalog import DAMAGE, locked, writing
from kandinsky_exp.data.encoded.layout import META, PART, PLAN, part_folder, partial
from kandinsky_exp.data.encoded.parts import NAMED, PartFacts, read_part, rows_of_part
from kandinsky_exp.data.encoded.table import FORMAT
from kandinsky_exp.data.examples import Indexed, Source
from kandinsky_exp.data.tally import Tally, first_few
from kandinsky_exp.errors import DataError
from kandinsky_exp.system.files import json_object, write_atomically
from kandinsky_exp.system.logs import Log


@dataclass(frozen=True)
class Plan:
    """How a table is divided: what all processes that make it agree on. It does not say how many they are.

    Args:
        table: name of its folder.
        version: of this package.
        rows: of the source; None where it is read in one sweep, which ends where it ends.
        part_rows: examples of the source per part, whole batches.
    """

    table: str
    version: str
    rows: int | None
    batch_size: int
    part_rows: int

    @classmethod
    def of(cls, folder: Path, source: Source, batch_size: int, version: str) -> "Plan":
        """The plan of who comes first."""
        rows = source.count if isinstance(source, Indexed) else None
        return cls(folder.name, version, rows, batch_size, rows_of_part(source.count, batch_size))

    @property
    def parts(self) -> int | None:
        """How many there are to be; None where nobody knows yet."""
        return None if self.rows is None else -(-self.rows // self.part_rows)

    def rows_of(self, number: int) -> range:
        """Examples of the source that a part has, at most."""
        start = number * self.part_rows
        return range(start, start + self.part_rows if self.rows is None else min(self.rows, start + self.part_rows))


class Making:
    """A table in the making, in a folder of its own, which several processes may have open.

    Args:
        target: where the complete table is to be.
        wanted: the plan, unless there is one already.
        fixed_batch: make again what was begun with another batch size, instead of going on with that one.

    Raises:
        DataError: another process is at it with another plan; a part is there that is none of this table, or twice; the
            disk cannot be written.
    """

    def __init__(self, target: Path, wanted: Plan, log: Log, *, fixed_batch: bool = True) -> None:
        self.target, self.folder, self._log = target, partial(target), log
        with self.locked():
            self.plan = self._agreed(wanted, fixed_batch)
            if not claims.is_anyone_at(self.folder):
                _clear(self.folder)
            self.found = self._parts()

    def locked(self) -> AbstractContextManager[None]:
        """Alone with the table for a moment, see `catalog.locked`."""
        return locked(self.target, self._log)

    def there(self) -> set[int]:
        """Numbers of the parts that are complete."""
        try:
            return {int(name) for name in os.listdir(self.folder) if name.isdecimal()}  # noqa: PTH208 - of thousands
        except FileNotFoundError:
            if self.is_joined:
                return set(range(self.plan.parts or 0))
            raise DataError(f"{self.folder} was removed while it was encoded; give the same command again") from None

    @property
    def is_joined(self) -> bool:
        """Whether another process has made the table of it."""
        return not self.folder.exists() and (self.target / META).exists()

    def join(self, name: str, about: dict[str, object]) -> None:
        """Make the complete table of the parts, which stay where they are.

        Args:
            name: of the source.
            about: further facts for its `table.json`.

        Raises:
            DataError: a part is missing, twice there, or of another table; or there is no example in any.
        """
        with self.locked():
            if self.is_joined:
                return
            parts = self._parts()
            numbers = range(self.plan.parts if self.plan.parts is not None else len(parts))
            if missing := [number for number in numbers if number not in parts]:
                raise DataError(f"{self.folder}: part {missing[0]} is missing; give the same command again")
            if not any(part.images for part in parts.values()):
                reasons = first_few(problem for part in parts.values() for problem in part.skipped)
                raise DataError(f"{name}: none of its examples can be used\n{reasons or 'it holds no image'}")
            with writing(self.folder):
                write_atomically(self.folder / META, _manifest([parts[number] for number in numbers], self.plan, about))
                _clear(self.folder)
                self.folder.replace(self.target)

    def _agreed(self, wanted: Plan, fixed_batch: bool) -> Plan:
        """The plan of who began, or this one."""
        found = read_plan(self.folder)
        same = found is not None and (found.table, found.rows) == (wanted.table, wanted.rows)
        if found is not None and same and (found.batch_size == wanted.batch_size or not fixed_batch):
            if found.version != wanted.version:
                self._refuse_company(f"version {found.version} of kandinsky_exp", wanted.version, "install")
            agreed = replace(found, version=wanted.version)
        else:
            if found is not None:
                was, ours, cure = _difference(found, wanted)
                self._refuse_company(was, ours, cure)
                self._log(f"{self.folder} was begun with {was}: encoding again")
            agreed = wanted
            with writing(self.folder):
                if self.folder.exists():
                    shutil.rmtree(self.folder)
                self.folder.mkdir()
        if agreed != found:
            with writing(self.folder):
                write_atomically(self.folder / PLAN, json.dumps(asdict(agreed), indent=1))
        return agreed

    def _refuse_company(self, theirs: str, ours: str, cure: str) -> None:
        if claims.is_anyone_at(self.folder):
            raise DataError(
                f"{self.folder}: another process is encoding it with {theirs}, this one would with {ours}; {cure} the "
                "same for all, or wait for its end"
            )

    def _parts(self) -> dict[int, PartFacts]:
        """What is there, by number. What is damaged is removed."""
        found: dict[int, tuple[Path, PartFacts]] = {}
        for folder in sorted(self.folder.iterdir()):
            if folder.name.startswith(".") or not (folder.name.isdecimal() or (folder / PART).exists()):
                continue
            try:
                facts = read_part(folder)
            except DAMAGE as error:
                self._log(f"{folder} is damaged ({error}): encoding that part again")
                with writing(self.folder):
                    shutil.rmtree(folder)
                continue
            if (facts.table, facts.batch_size) != (self.plan.table, self.plan.batch_size):
                raise DataError(
                    f"{folder} is no part of this table: it was made of other data, with other weights or with other "
                    "settings; take it away"
                )
            if facts.number in found:
                raise DataError(
                    f"part {facts.number} is there twice: {found[facts.number][0]} and {folder}; take one away"
                )
            found[facts.number] = folder, facts
        for number, (folder, _) in found.items():
            if folder != part_folder(self.folder, number):
                with writing(self.folder):
                    folder.rename(part_folder(self.folder, number))
        return {number: facts for number, (_, facts) in found.items()}


def _difference(found: Plan, wanted: Plan) -> tuple[str, str, str]:
    """Of two plans: theirs, ours, and what to do, as a message names them."""
    if (found.table, found.rows) == (wanted.table, wanted.rows):
        return f"batches of {found.batch_size}", f"{wanted.batch_size} (data.encode_batch)", "set"
    rows = ("an unknown number of rows" if plan.rows is None else f"{plan.rows:,} rows" for plan in (found, wanted))
    theirs, ours = (f"{count} for {plan.table[:8]}" for count, plan in zip(rows, (found, wanted), strict=True))
    return theirs, ours, "give"


def _clear(folder: Path) -> None:
    """Remove what processes that are no more have left beside the parts."""
    for left in (*folder.glob(".*"), *folder.glob(f"*{claims.CLAIM}")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):  # what stays does no harm
                left.unlink()


def read_plan(folder: Path) -> Plan | None:
    """Of a table, complete or in the making; None if there is none."""
    try:
        return Plan(**(json_object(folder / PLAN) or {}))
    except TypeError:
        return None


def _manifest(parts: list[PartFacts], plan: Plan, about: dict[str, object]) -> str:
    """All that a reader has to know of a table before it reads a row: `table.json`."""
    noted: Tally = {}
    for part in parts:
        tally.add(noted, part.noted)
    facts: dict[str, Any] = {"format": FORMAT, "batch_size": plan.batch_size, "part_rows": plan.part_rows}
    for name in ("source_rows", "images", "captions", "truncated"):
        facts[name] = sum(getattr(part, name) for part in parts)
    facts["cut"] = [text for part in parts for text in part.cut][:NAMED]
    facts["skipped"] = [text for part in parts for text in part.skipped]
    facts |= {"noted": noted, "bytes": sum(size for part in parts for size in part.bytes.values()), **about}
    return json.dumps({**facts, "parts": [part.entry for part in parts]})
