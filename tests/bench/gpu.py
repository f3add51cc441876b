"""Training speed of one device: samples/s, model-FLOPs utilisation and peak memory, from random weights alone.

    python tests/bench/gpu.py [--rows 'prior*' '*compiled'] [--reference FOLDER] [--steps 20] [--json out.json]
    python tests/bench/gpu.py --quick                      small networks and few steps: under two minutes on a CPU

Kandinsky 2.2 at true size, or what `--architecture` holds as `prior.json`, `unet.json`, `movq.json`,
`image_encoder.json` and `text_encoder.json`. Needs no network, no data set and no MLflow. The step is the runner's own,
made of a composed config with `precision=bf16` and its other defaults: AdamW fused, conditions dropped, the decoder's
variational term. The rows of each shape:

cached      features of a table on disk, read ahead and pinned as a run does it
online      pictures and captions, encoded by the frozen encoders in every step, one batch ahead of it
lora        cached, an adapter of rank 16 trains beside frozen bf16 weights
published   with `--reference`, a folder of the two scripts of diffusers' examples/kandinsky2_2/text_to_image: their own
            loop, as it is, at the same batch and precision; from weights on disk, 10 GB at true size
compiled    cached, with the network compiled; after all others, for compiling takes minutes

Model FLOPs are those of the networks as such, counted on the meta device: forward and backward of what trains, forward
of the encoders where the row runs them. Utilisation is their share of the device's dense bf16 peak, which is known for
a few devices and given by `--peak-tflops` for others. A row that does not fit into memory says so. Each row is in the
file of `--json` as soon as it is done. `--work FOLDER` keeps tables, pictures and weights for the next time.
"""

import argparse
import contextlib
import gc
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import bare
import doors
import filled
import machine
import pictures
import random_table
import torch
from networks import BENCH, TRUE_SIZE, RandomWeights, config, network
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kandinsky_exp import build, run_settings
from kandinsky_exp.data import sources
from kandinsky_exp.data.features import OnlineExamples
from kandinsky_exp.models import adapters, unpadded_prior
from kandinsky_exp.stages.base import DiffusionStage
from kandinsky_exp.stages.decoder import DecoderStage
from kandinsky_exp.stages.prior import PriorStage
from kandinsky_exp.system import distributed
from kandinsky_exp.training import loop
from kandinsky_exp.training.feature_reader import FeatureReader
from kandinsky_exp.training.seeding import NoiseSource

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "RTX 4090": 165.0}  # dense bf16, by part of the name
STAGES: dict[str, Any] = {"prior": PriorStage, "decoder": DecoderStage}
KINDS = ("cached", "online", "lora", "published", "compiled")
ROWS = 1024  # of a table
PICTURES = 128
FOREVER = 1 << 30  # steps


@dataclass(frozen=True)
class Row:
    """One line: what trains, at what size, and how."""

    stage: str
    batch: int
    resolution: int
    kind: str

    @property
    def name(self) -> str:
        size = f"-{self.resolution}px" if self.stage == "decoder" else ""
        return f"{self.stage}{size}-b{self.batch}-{self.kind}"

    @property
    def encodes(self) -> bool:
        return self.kind in ("online", "published")


@dataclass(frozen=True)
class Plan:
    """What all rows share.

    Args:
        work: folder for what is read from disk.
        reference: folder of the published scripts.
    """

    architecture: Path
    device: torch.device
    steps: int
    warm_up: int
    peak_tflops: float | None
    work: Path
    reference: Path | None = None


def rows(quick: bool, published: bool) -> list[Row]:
    shapes = [("prior", 1, 512), ("prior", 16, 512), ("prior", 64, 512)]
    shapes += [("decoder", 1, 512), ("decoder", 8, 512), ("decoder", 4, 768)]
    left_out = set() if published else {"published"}
    if quick:
        shapes, left_out = [("prior", 4, 512), ("decoder", 2, 256)], left_out | {"compiled"}
    found = [Row(*shape, kind) for shape in shapes for kind in KINDS if kind not in left_out]
    return sorted(found, key=lambda row: row.kind == "compiled")


# --- the runner's step


def settings(row: Row, plan: Plan, *overrides: str, verb: str = "train") -> Any:
    """The config of a run with this step."""
    words = [f"model={row.stage}", "weights=tiny", "data=emoji", f"data.resolution={row.resolution}", "precision=bf16"]
    words += [f"trainer.batch_size={row.batch}", "tracker=none", f"output_root={plan.work / 'outputs'}"]
    kinds = {
        "lora": ["adapter=lora", "adapter.rank=16"],
        "compiled": ["trainer.compile=true"],
        "online": ["data.cache=false"],
    }
    return doors.compose([*words, *kinds.get(row.kind, []), *overrides], verb)


@contextlib.contextmanager
def runner(
    row: Row, plan: Plan, prepare: Callable[[DiffusionStage], object] = lambda stage: None, *overrides: str
) -> Iterator[tuple[loop.Training, Callable[[], object]]]:
    """What trains, and its step: built by what builds a run, but for random weights that are made on the device.

    Args:
        prepare: changes the stage once its network is there.
    """
    torch._dynamo.reset()
    cfg = settings(row, plan, *overrides)
    if plan.device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with distributed.accelerated(lambda: build.accelerator(cfg)) as accelerator:
        stage = build.stage(cfg, RandomWeights(plan.architecture, str(plan.device), cfg.precision.frozen_dtype))
        stage.use_null_condition(random_table.null(row.stage, plan.architecture))
        prepare(stage)
        training = build.training(cfg, stage, accelerator, FOREVER)
        training.network.train()
        given, noise = run_settings.loop_settings(cfg, FOREVER, accelerator), NoiseSource(0, 0, accelerator.device)
        batches = reader(row, plan, stage).stream(0, FOREVER, accelerator)
        with contextlib.closing(batches):
            yield training, lambda: loop.optimizer_step(training, batches, noise, accelerator, given)


def reader(row: Row, plan: Plan, stage: DiffusionStage) -> FeatureReader:
    if row.encodes:
        source: Any = sources.folder(given_pictures(row, plan)).train
        dataset = OnlineExamples(source, stage.preprocess, 0)
        return FeatureReader(dataset, source, "pictures", random_table.settings(row.batch), plan.device, stage)
    name = row.stage if row.stage == "prior" else f"{row.stage}-{row.resolution}"
    table = random_table.write(plan.work / "tables" / name, row.stage, plan.architecture, row.resolution, ROWS)
    return random_table.reader(table, plan.device, row.batch)


def given_pictures(row: Row, plan: Plan) -> Path:
    return pictures.write(plan.work / f"pictures-{row.resolution}", PICTURES, (row.resolution, row.resolution * 3 // 2))


# --- the published scripts' step


def published(row: Row, plan: Plan) -> tuple[float, float]:
    """(seconds per step, peak GB) of the script's own loop, in a process of its own."""
    found = machine.child(
        "published.timed",
        {
            "references": plan.reference,
            "stage": row.stage,
            "pipelines": filled.write(plan.architecture, plan.work / "weights"),
            "pictures": given_pictures(row, plan),
            "root": plan.work,
            "batch": row.batch,
            "resolution": row.resolution,
            "steps": plan.steps,
            "warm_up": plan.warm_up,
            "on_cpu": plan.device.type == "cpu",
        },
        plan.work,
    )
    return found["seconds"], found.get("peak_gb", found["peak_mb"] / 1e3)


# --- counting and measuring


def step_flops(row: Row, architecture: Path) -> float:
    """Floating-point operations of one step, counted on the meta device for one sample."""
    one, cls = replace(row, batch=1), STAGES[row.stage]
    made = network(architecture, cls.part, "meta").train()
    if row.stage == "prior":
        made.clip_mean.requires_grad_(False), made.clip_std.requires_grad_(False)
        unpadded_prior.remove_padding(made)
    if row.kind == "lora":
        adapters.attach_lora(
            made, rank=16, alpha=None, dropout=0.0, target_modules=None, use_dora=False, dtype=torch.float32
        )
    given = random_table.batch(row.stage, architecture, row.resolution, 1)
    given = {name: value.to("meta") for name, value in given.items()}
    clean = given["latents" if row.stage == "decoder" else "image_embeds"]
    with FlopCounterMode(display=False) as counter:
        output = bare.FORWARD[row.stage](made, clean, torch.zeros(1, dtype=torch.long, device="meta"), given)
        output.sum().backward()
        if row.encodes:
            _encode_on_meta(one, architecture)
    return float(counter.get_total_flops()) * row.batch


@torch.no_grad()
def _encode_on_meta(row: Row, architecture: Path) -> None:
    def some(*shape: int) -> Tensor:
        return torch.zeros(1, *shape, device="meta")

    side = config(architecture, "image_encoder")["image_size"]
    network(architecture, "image_encoder", "meta").eval()(some(3, side, side))
    if row.stage == "prior":
        network(architecture, "text_encoder", "meta").eval()(some(random_table.LENGTH).long())
    else:
        network(architecture, "movq", "meta").eval().encode(some(3, row.resolution, row.resolution))


def measure(row: Row, plan: Plan, **changes: Any) -> dict[str, Any]:
    """Samples/s, TFLOP/s, utilisation and peak memory of a row; what went wrong where it does not fit."""
    try:
        flops = step_flops(row, plan.architecture)
        if row.kind == "published":
            seconds, peak = published(row, plan)
        else:
            with runner(row, plan, **changes) as (_, step):
                seconds = timed(step, plan)
            peak = peak_gb(plan.device)
    except torch.OutOfMemoryError:
        return {"row": row.name, "problem": "out of memory"}
    except Exception as error:  # one row that cannot run, such as a compiler that is missing, must not hide the rest
        return {"row": row.name, "problem": problem(error)}
    finally:
        clean_up()
    found = {"row": row.name, "samples_per_second": row.batch / seconds, "ms_per_step": 1e3 * seconds}
    found |= {"tflop_per_step": flops / 1e12, "tflops": flops / seconds / 1e12, "peak_gb": peak}
    return found | ({"utilisation": flops / seconds / 1e12 / plan.peak_tflops} if plan.peak_tflops else {})


def problem(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).strip().splitlines()[-2:])}"[:300]


def timed(step: Callable[[], object], plan: Plan) -> float:
    """Seconds per step: many steps between two waits for the device."""
    for _ in range(plan.warm_up):
        step()
    wait(plan.device)
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
    since = time.perf_counter()
    for _ in range(plan.steps):
        step()
    wait(plan.device)
    return (time.perf_counter() - since) / plan.steps


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gb(device: torch.device) -> float:
    """Peak memory in GB (10⁹ bytes): of the timed steps on a GPU, of the whole process so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def clean_up() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def line(found: dict[str, Any]) -> str:
    if "problem" in found:
        return f"{found['row']:<30} {found['problem']}"
    share = f"{found['utilisation']:>8.1%}" if "utilisation" in found else f"{'–':>8}"
    return (
        f"{found['row']:<30} {found['samples_per_second']:>10.2f} {found['ms_per_step']:>10.1f}"
        f" {found['tflops']:>9.2f} {share} {found['peak_gb']:>8.2f}"
    )


def known_peak(device_name: str) -> float | None:
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def speed_ups(found: list[dict[str, Any]]) -> dict[str, float]:
    """Each row's samples/s over those of the `published` row of its shape."""
    rates = {one["row"]: one["samples_per_second"] for one in found if "samples_per_second" in one}
    bases = {name.rpartition("-")[0]: rate for name, rate in rates.items() if name.endswith("-published")}
    pairs = ((name, name.rpartition("-")[0]) for name in rates if not name.endswith("-published"))
    return {name: rates[name] / bases[shape] for name, shape in pairs if shape in bases}


def write(file: Path, content: dict[str, Any]) -> None:
    """All of it or nothing."""
    aside = file.with_name(f"{file.name}.aside")
    aside.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    aside.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=Path)
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of row names")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    available = rows(arguments.quick, arguments.reference is not None)
    chosen = [row for row in available if any(fnmatch(row.name, one) for one in arguments.rows)]
    if not chosen:
        sys.exit(f"no row is named so; there are {', '.join(row.name for row in available)}")
    with tempfile.TemporaryDirectory() as temporary:
        measure_all(chosen, arguments, (arguments.work or Path(temporary)).absolute())
    assert "mlflow" not in sys.modules


def measure_all(chosen: list[Row], arguments: Any, work: Path) -> None:
    device = torch.device(arguments.device)
    name = device_name(device)
    peak = arguments.peak_tflops or known_peak(name)
    steps, warm_up = (2, 1) if arguments.quick else (arguments.steps, arguments.warm_up)
    architecture = arguments.architecture or (BENCH if arguments.quick else TRUE_SIZE)
    reference = arguments.reference.absolute() if arguments.reference is not None else None
    plan = Plan(architecture.absolute(), device, steps, warm_up, peak, work, reference)
    print(f"{name}, torch {torch.__version__}, bf16 autocast, peak {peak or 'unknown'} TFLOP/s")
    print(f"{'row':<30} {'samples/s':>10} {'ms/step':>10} {'TFLOP/s':>9} {'of peak':>8} {'peak GB':>8}")
    found: list[dict[str, Any]] = []
    facts = {"device": name, "torch": torch.__version__, "peak_tflops": peak, "steps": steps}
    for row in chosen:
        found.append(measure(row, plan))
        print(line(found[-1]), flush=True)
        if arguments.json:
            write(arguments.json, {"machine": facts, "rows": found, "over_published": speed_ups(found)})
    for row_name, ratio in speed_ups(found).items():
        print(f"{row_name}: {ratio:.2f} × the published script's step")


if __name__ == "__main__":
    main()
