"""What the runner costs, beside the bare step and beside the published scripts: one table of ratios.

    nox -s bench -- [--reference FOLDER] [--json out.json] [--only 1,3] [--quick]
    python tests/bench/run.py …                        the same, in an environment that has the package

FOLDER holds the guide's `train_text_to_image_{prior,decoder}.py` (diffusers, examples/kandinsky2_2/text_to_image);
without it item 2 is left out. Everything runs on the CPU with one thread per process, at the `bench` size of
`architecture/`, on generated pictures. Both sides of a ratio are measured by turns, in one process where that is
possible. Let nothing else run meanwhile. Exit code 1 when a limit is missed. `--quick` only shows that it works: its
figures mean nothing, and miss limits as they like.

1  our step / the bare step, a run with default settings and logging              ≤ 1.03, or 1.5 ms above it
2  the guide's step / ours: prior ≥ 8, of batch 16 ≥ 10, decoder ≥ 3.3; our samples/s ≥ 0.9 of what the bare step
   allows; one cold epoch of the whole command (start, encode, train) and the peak memory of its process  ≤ theirs
3  images/s of encoding (reading, decoding, writing included) / encoders alone    ≥ 0.9; of two processes that encode
   one set / of one process: prior ≥ 1.5, decoder ≥ 1.7
4  1,000 → 100,000 rows: step time, anonymous memory ≤ 1.05; a start from a warm cache of 100,000 rows < 2 s + imports
5  `--cfg job` < 1.5 s; first step of a tiny cached run in a fresh process < 10 s
6  a sweep of 4 runs encodes as often as one run
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import machine
import pictures
import report
import sharing
import startup
import turns
from report import Result

STAGES = ("prior", "decoder")
WARM = {("prior", 4): 8.0, ("prior", 16): 10.0, ("decoder", 4): 3.3}  # (stage, batch): how often as fast as the guide
WITHOUT_VLB = ["model.vlb_weight=0"]
TWO = {"prior": 1.5, "decoder": 1.7}  # one process alone decodes pictures on the other core already


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    resolution: int = 256
    blocks: dict[str, int] = field(default_factory=lambda: {"prior": 40, "decoder": 10})
    block: int = 10
    pictures: int = 96
    sides: tuple[int, int] = (512, 768)  # of the pictures, in pixels: fine-tuning sets are rarely smaller
    repeats: int = 3
    large_batch: int = 32
    shared_rows: int = 512  # two parts
    rows: tuple[int, int] = (1_000, 100_000)
    row_steps: int = 400
    row_block: int = 20


QUICK = Scale(
    resolution=64,
    blocks={"prior": 1, "decoder": 1},
    block=2,
    pictures=8,
    repeats=1,
    large_batch=8,
    shared_rows=300,
    rows=(70, 140),
    row_steps=10,
    row_block=2,
)


@dataclass(frozen=True)
class Bench:
    """Where everything lies, and what has been measured already."""

    work: Path
    references: Path | None
    scale: Scale
    stages: tuple[str, ...] = STAGES

    @cached_property
    def pipelines(self) -> Path:
        machine.child("prepare.pipelines", {"folder": self.work / "pipelines"}, self.work)
        return self.work / "pipelines"

    @cached_property
    def data(self) -> Path:
        return pictures.write(self.work / "pictures", self.scale.pictures, self.scale.sides)

    @property
    def warm(self) -> list[tuple[str, int]]:
        """(stage, batch) of the steps that are measured."""
        return [(stage, batch) for stage, batch in WARM if stage in self.stages]

    @cached_property
    def runner_steps(self) -> dict[tuple[str, int], dict[str, Any]]:
        return {case: self.steps("steps.runner", *case) for case in self.warm}

    @cached_property
    def published_steps(self) -> dict[tuple[str, int], dict[str, Any]]:
        return {case: self.steps("published.warm", *case, references=self.references) for case in self.warm}

    def steps(self, function: str, stage: str, batch: int, **more: Any) -> dict[str, Any]:
        settings = {"blocks": -(-self.scale.blocks[stage] * 4 // batch), "block": self.scale.block}
        say(f"{function} {stage}, batch {batch}")
        return machine.child(function, {**self.common(stage, batch), **settings, **more}, self.work)

    def common(self, stage: str, batch: int = 4) -> dict[str, Any]:
        root = Path(tempfile.mkdtemp(prefix=f"{stage}-", dir=self.work))
        where = {"pipelines": self.pipelines, "pictures": self.data, "root": root}
        return {"stage": stage, **where, "batch": batch, "resolution": self.scale.resolution}


def say(text: str) -> None:
    print(f"measuring {text}", file=sys.stderr, flush=True)


def item1(bench: Bench) -> Iterator[Result]:
    """Our step against the bare one, which has no variational term: what that takes stands beside it."""
    for stage, batch in bench.warm:
        found = bench.runner_steps[stage, batch]
        measured = {"ours ms": 1e3 * found["step"], "bare ms": 1e3 * found["bare"]}
        if stage == "decoder":
            without = bench.steps("steps.runner", stage, batch, overrides=WITHOUT_VLB)
            measured["variational term ms"] = measured["bare ms"] * (found["ratio"] - without["ratio"])
        limit = round(max(1.03, 1 + 1.5 / measured["bare ms"]), 3)
        yield Result(1, f"{stage}, batch {batch}: our step / bare step", measured, found["ratio"], limit)


def item2(bench: Bench) -> Iterator[Result]:
    """The guide's scripts against ours; the bare step, measured beside each, is the common measure of both."""
    for stage, batch in bench.warm if bench.references is not None else ():
        ours, theirs = bench.runner_steps[stage, batch], bench.published_steps[stage, batch]
        speedup = theirs["ratio"] / ours["ratio"]
        measured = {"theirs ms": 1e3 * theirs["step"], "ours ms": 1e3 * ours["step"]}
        name = f"{stage}, batch {batch}"
        yield Result(2, f"{name}: guide's step / ours", measured, speedup, WARM[stage, batch], at_least=True)
        allowed = {"speed-up": speedup, "of bare step": theirs["ratio"]}
        what = f"{name}: speed-up / what the bare step allows"
        yield Result(2, what, allowed, speedup / theirs["ratio"], 0.9, at_least=True)
        if batch == 4:
            yield from cold_epoch(bench, stage)


def cold_epoch(bench: Bench, stage: str) -> Iterator[Result]:
    """One epoch from nothing: from the start of the process to the last step, and its peak memory.

    Neither side records: the script's tracker is taken out, ours is `none`. What MLflow adds stands beside it.
    """
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for number in range(bench.scale.repeats):
        say(f"{stage}, cold epoch {number + 1}")
        found["ours"].append(our_epoch(bench, stage, "none"))
        found["theirs"].append(their_epoch(bench, stage))
    found["with MLflow"] = [our_epoch(bench, stage, "mlflow")]
    for index, (what, unit) in enumerate([("cold epoch", "s"), ("peak memory", "MB")]):
        medians = {side: statistics.median(reading[index] for reading in readings) for side, readings in found.items()}
        measured = {f"{side} {unit}": value for side, value in medians.items()}
        yield Result(2, f"{stage}: {what}, ours / guide's", measured, medians["ours"] / medians["theirs"], 1.0)


def our_epoch(bench: Bench, stage: str, tracker: str) -> tuple[float, float]:
    """(seconds, MB) of the real command with its defaults; the saving of the result is in the memory.

    Nothing is held out: the guide's scripts train on every picture, and so have as many steps.
    """
    from steps import overrides_for

    common = bench.common(stage)
    stamps = Path(common["root"]) / "stamps"
    place = ["trusted_modules=[schedule]", f"+scheduler.stamps={stamps}", "name=epoch", f"tracker={tracker}"]
    overrides = [*overrides_for(**common), *place, "trainer.max_epochs=1", "validation.fraction=0"]
    done = machine.runner(overrides, stamps.with_name("log"))
    return turns.read_stamps(stamps)[-1] - done.started, done.peak_mb


def their_epoch(bench: Bench, stage: str) -> tuple[float, float]:
    steps = bench.scale.pictures // 4
    done = machine.child(
        "published.cold", {**bench.common(stage), "references": bench.references, "steps": steps}, bench.work
    )
    return done["last"] - done["started"], done["peak_mb"]


def item3(bench: Bench) -> Iterator[Result]:
    """Encoding against the encoders alone."""
    for stage in bench.stages:
        say(f"encoding, {stage}")
        settings = bench.common(stage) | {"batch": bench.scale.large_batch, "rounds": bench.scale.repeats}
        found = machine.child("encoding.throughput", settings, bench.work)
        measured = {"encode images/s": found["encode"], "encoders images/s": found["encoders"]}
        yield Result(3, f"{stage}: encode / encoders alone", measured, found["ratio"], 0.9, at_least=True)
        say(f"encoding with two processes, {stage}")
        common = {name: value for name, value in bench.common(stage).items() if name != "batch"}
        found = sharing.throughput(common, bench.scale.shared_rows, bench.scale.repeats, bench.work)
        measured = {"one process images/s": found["one"], "two images/s": found["two"]}
        yield Result(3, f"{stage}: two processes / one", measured, found["ratio"], TWO[stage], at_least=True)


def item4(bench: Bench) -> Iterator[Result]:
    """Many rows against few."""
    places = {count: pictures.write_many(bench.work / f"rows-{count}", count) for count in (64, *bench.scale.rows)}
    roots = {count: bench.work / f"rows-{count}-root" for count in bench.scale.rows}
    found: dict[int, list[dict[str, Any]]] = {count: [] for count in bench.scale.rows}
    for count, root in roots.items():
        say(f"filling a cache of {count:,} rows")
        machine.child("rows.fill", {"pictures": places[count], "root": root}, bench.work)
    for number in range(bench.scale.repeats):
        for count, root in roots.items():
            say(f"{count:,} rows, round {number + 1}")
            where = {"pictures": places[count], "few_pictures": places[64], "root": root}
            how = {"steps": bench.scale.row_steps, "block": bench.scale.row_block}
            found[count].append(machine.child("rows.measure", {**where, **how}, bench.work))
    yield from compare_rows(found)


def compare_rows(found: dict[int, list[dict[str, Any]]]) -> Iterator[Result]:
    few, many = sorted(found)
    for name, unit in (("step", "bare steps"), ("memory", "MB")):
        medians = {count: statistics.median(one[name] for one in found[count]) for count in found}
        measured = {f"{count:,} rows {unit}": value for count, value in medians.items()}
        yield Result(4, f"{name}: {many:,} / {few:,} rows", measured, medians[many] / medians[few], 1.05)
    starts = {count: statistics.median(one["start"] for one in found[count]) for count in found}
    measured = {f"{count:,} rows s": value for count, value in starts.items()}
    yield Result(4, f"start to first step, warm cache of {many:,} rows", measured, starts[many], 2.0, unit="s")


def item5(bench: Bench) -> Iterator[Result]:
    """Start-up."""
    say("start-up")
    found = startup.answer(bench.work, bench.scale.repeats + 2)
    yield Result(5, "--cfg job", found, found["median s"], 1.5, unit="s")
    found = startup.first_step(bench.work, bench.scale.repeats)
    yield Result(5, "first step of a tiny cached run", found, found["median s"], 10.0, unit="s")


def item6(bench: Bench) -> Iterator[Result]:
    """A sweep."""
    say("a sweep")
    found = startup.sweep(bench.work)
    times = max(found[f"4 runs: {what}"] / found[f"one run: {what}"] for what in ("tables", "encodings"))
    yield Result(6, "encodings: sweep of 4 runs / one run", found, times, 1.0)


ITEMS: dict[int, Callable[[Bench], Iterator[Result]]] = dict(enumerate([item1, item2, item3, item4, item5, item6], 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="folder with the two published scripts")
    parser.add_argument("--json", type=Path, help="write the table there too")
    parser.add_argument("--only", default="1,2,3,4,5,6", help="items to measure")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="of items 1 to 3")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see that it works")
    parser.add_argument("--work", type=Path, help="keep everything here; otherwise it is removed")
    arguments = parser.parse_args()
    assert "torch" not in sys.modules, "a child's peak memory would begin with that of this process"
    machine_facts = machine.facts()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="bench-"))
    references = arguments.reference.absolute() if arguments.reference else None
    bench = Bench(work.absolute(), references, QUICK if arguments.quick else Scale(), tuple(arguments.stages))
    bench.work.mkdir(parents=True, exist_ok=True)
    try:
        results = [result for item in arguments.only.split(",") for result in ITEMS[int(item)](bench)]
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print("; ".join(f"{name} {value}" for name, value in machine_facts.items()))
    print(report.table(results))
    if references is None and "2" in arguments.only.split(","):
        print("item 2 is left out: it needs --reference FOLDER with the published scripts")
    if arguments.json:
        report.write_json(arguments.json, machine_facts, results)
    sys.exit(0 if all(result.ok for result in results) else 1)


if __name__ == "__main__":
    main()
