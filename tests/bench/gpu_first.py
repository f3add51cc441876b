"""What to run first on a GPU: ten minutes in eight parts, each with a limit of its own, each result on disk at once.

    python tests/bench/gpu_first.py OUT [--parts 1,2,3] [--reference FOLDER] [--work FOLDER]
    python tests/bench/gpu_first.py OUT --quick        small networks, on any machine: under two minutes

1  90 s   tiny runs: both stages, bf16 and fp16, full with EMA and LoRA, cached and online; checkpoint and resume
2  20 s   steps that wait for the device are errors; prefetched batches are those on the disk
3  10 s   the prior's attention: which kernel takes it, and its time by mask and length
4  120 s  true size: prior batch 64, decoder 512 px batch 8, 768 px batch 4; with `--reference` the scripts too
5  60 s   the decoder's step: memory format, GroupNorm in bf16, cudnn.benchmark
6  150 s  compiled prior, then compiled decoder
7  60 s   planned memory and measured; MoVQ decoding; the stall of a checkpoint; the message for want of memory
8  90 s   8-bit AdamW with resume, int8 and nf4 bases, xFormers

OUT/results.jsonl gets a line a result. A part that is over its time is ended, and what it found stays. What needs CUDA
says so where there is none. Part 4 with `--reference` writes 10 GB of weights to `--work` before: in a part 0, 120 s.
Needs the package (torch, diffusers, transformers, accelerate, peft, hydra-core, pyarrow), and no MLflow, no data set.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import doors
import filled
import gpu
import random_table
import torch
import torch.nn.functional as F
from networks import BENCH, TRUE_SIZE, network
from torch import Tensor, nn

from kandinsky_exp import build
from kandinsky_exp.models import adapters
from kandinsky_exp.stages.base import DiffusionStage
from kandinsky_exp.system import distributed
from kandinsky_exp.training.checkpoint import Snapshot
from kandinsky_exp.verbs.plan import Planner

sys.path.append(str(Path(__file__).parents[1] / "support"))
import hollow

LIMITS = {0: 120, 1: 90, 2: 20, 3: 10, 4: 120, 5: 60, 6: 150, 7: 60, 8: 90}  # seconds
LOADS = 120  # seconds that the published scripts take to load weights of true size
STARTS = 15  # seconds that the first use of a device may take besides
NEEDS_CUDA = "needs CUDA"
TINY = ["weights=tiny", "data=emoji", "data.max_samples=8", "trainer.batch_size=2", "trainer.grad_accumulation=2"]
TINY += ["validation.inference_steps=2", "validation.draws=1", "validation.reconstructions=1", "tracker=none"]
PROMPTS = "validation.prompts=[a red heart]"
VARIANTS = {"full": ["trainer.ema_decay=0.9"], "lora": ["adapter=lora"]}


@dataclass(frozen=True)
class Work:
    """What the parts share.

    Args:
        note: writes a result.
    """

    plan: gpu.Plan
    quick: bool
    note: Callable[..., None]

    @property
    def on_cuda(self) -> bool:
        return self.plan.device.type == "cuda"

    def row(self, stage: str, kind: str = "cached", resolution: int = 512) -> gpu.Row:
        """At the batch that fills a card, or in a moment."""
        if self.quick:
            return gpu.Row(stage, 2, 64, kind)
        return gpu.Row(stage, 64 if stage == "prior" else 8 if resolution == 512 else 4, resolution, kind)

    @contextlib.contextmanager
    def caught(self, name: str) -> Iterator[None]:
        """What goes wrong is a result."""
        try:
            yield
        except Exception as error:
            self.note(name, problem=gpu.problem(error))
        gpu.clean_up()


# --- the parts


def weights(work: Work) -> None:
    if work.plan.reference is not None:
        filled.write(work.plan.architecture, work.plan.work / "weights")
        work.note("weights written")


def tiny_runs(work: Work) -> None:
    cases: Any = [
        *itertools.product(("prior", "decoder"), ("bf16", "fp16"), VARIANTS, ("true", "false")),
        *itertools.product(("inpaint", "control"), ("bf16",), VARIANTS, ("true", "false")),
    ]
    if work.quick:
        cases = [("prior", "bf16", "full", "true"), ("decoder", "bf16", "lora", "false")]
    for stage, precision, variant, cached in cases:
        words = [f"model={stage}", f"precision={precision}", f"data.cache={cached}", *VARIANTS[variant]]
        tiny_run(work, f"{stage}-{precision}-{variant}-{'cached' if cached == 'true' else 'online'}", words)


def tiny_run(work: Work, name: str, words: list[str]) -> None:
    """Two steps, and two more by the same command."""
    since = time.monotonic()
    with work.caught(name):
        for steps in (2, 4):
            length = [f"trainer.max_steps={steps}", "checkpoint.every=2", "validation.every=2"]
            root = f"output_root={work.plan.work / 'outputs'}"
            doors.train(doors.compose([*TINY, PROMPTS, *words, *length, root, f"name={name}"]))
        work.note(name, seconds=time.monotonic() - since)


def waits(work: Work) -> None:
    for stage, kind in itertools.product(("prior", "decoder"), ("cached", "lora")):
        name = f"{stage}-{kind}: no wait for the device"
        if not work.on_cuda:
            work.note(name, problem=NEEDS_CUDA)
            continue
        with work.caught(name), gpu.runner(gpu.Row(stage, 4, 256, kind), small(work)) as (_, step):
            for _ in range(3):
                step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(10):
                    step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            work.note(name, steps=10)
    with work.caught("prefetched batches"):
        prefetched(work, 20 if work.quick else 300)


def small(work: Work) -> gpu.Plan:
    return replace(work.plan, architecture=BENCH, work=work.plan.work / "small")


def prefetched(work: Work, count: int) -> None:
    """Batches that are read ahead and copied while others are at work, against those that are read on the host."""
    table = random_table.write(work.plan.work / "small" / "tables" / "prior", "prior", BENCH, 64, gpu.ROWS)
    sums = []
    for device in (work.plan.device, torch.device("cpu")):
        with distributed.accelerated(lambda: build.accelerator(doors.compose(TINY))) as accelerator:
            stream = random_table.reader(table, device, 16).stream(0, count, accelerator)
            sums.append([sum(value.double().sum() for name, value in one.items() if name != "index") for one in stream])
    wrong = sum(abs(float(one) - float(other)) > 1e-6 for one, other in zip(*sums, strict=True))
    work.note("prefetched batches", batches=len(sums[0]), wrong=wrong)


def attention(work: Work) -> None:
    """Forward and backward of all blocks' attention at the prior's shape, (batch, heads, length, 64)."""
    batch, heads, blocks = (2, 4, 1) if work.quick else (64, 32, 20)
    kernels = {int(kind): name for name, kind in torch.nn.attention.SDPBackend.__members__.items()}
    for length, masked in ((81, True), (81, False), (43, False), (22, False)):
        some = [torch.randn(batch, heads, length, 64, device=work.plan.device, dtype=torch.bfloat16) for _ in range(3)]
        query, key, value = (one.requires_grad_() for one in some)
        mask = torch.zeros(batch, heads, length, length, device=work.plan.device, dtype=torch.bfloat16)
        given: dict[str, Any] = {"attn_mask": mask} if masked else {"is_causal": True}

        def step(query: Tensor = query, key: Tensor = key, value: Tensor = value, given: Any = given) -> None:
            for _ in range(blocks):
                F.scaled_dot_product_attention(query, key, value, **given).sum().backward()

        kernel = kernels.get(int(torch._fused_sdp_choice(query, key, value, **given)), "?")
        seconds = gpu.timed(step, replace(work.plan, steps=2 if work.quick else 10))
        name = f"attention {'masked' if masked else 'causal'} {length}"
        work.note(name, kernel=kernel, ms=1e3 * seconds, blocks=blocks)


def true_size(work: Work) -> None:
    kinds = ["cached"] + (["published"] if work.plan.reference is not None else [])
    shapes = [("prior", 512), ("decoder", 512), ("decoder", 768)]
    for kind, (stage, resolution) in itertools.product(kinds, shapes[: 2 if work.quick else 3]):
        measured(work, work.row(stage, kind, resolution))


def measured(work: Work, row: gpu.Row, what: str = "", **changes: Any) -> None:
    found = gpu.measure(row, work.plan, **changes)
    name = found.pop("row")
    work.note(f"{name} {what}".strip(), **found)


def ordered(stage: DiffusionStage, form: torch.memory_format) -> None:
    """Weights in this order on any device: the stage itself chooses for the CPU alone."""
    stage.memory_format = form  # type: ignore[misc]
    stage.network.to(memory_format=form)  # type: ignore[call-overload]


def decoder_step(work: Work) -> None:
    row, first = work.row("decoder"), [False, True]
    if work.quick:
        first = [True]
    for channels_last in first:
        form = torch.channels_last if channels_last else torch.contiguous_format
        what = "channels-last" if channels_last else "contiguous"
        measured(work, row, what, prepare=lambda stage, form=form: ordered(stage, form))
    measured(work, row, "GroupNorm in bf16", prepare=lambda stage: bf16_norms(stage.network))
    if not work.on_cuda:
        work.note("cudnn.benchmark", problem=NEEDS_CUDA)
        return
    torch.backends.cudnn.benchmark = True
    measured(work, row, "cudnn.benchmark")


def bf16_norms(network: nn.Module) -> None:
    """Have GroupNorm compute in the type of its input; autocast takes it to float32."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = bf16_norm.__get__(module)  # type: ignore[method-assign]


def bf16_norm(self: nn.GroupNorm, value: Tensor) -> Tensor:
    with torch.autocast(value.device.type, enabled=False):
        made = value.bfloat16()
        weight, bias = self.weight.to(made.dtype), self.bias.to(made.dtype)
        return F.group_norm(made, self.num_groups, weight, bias, self.eps)


def compiled(work: Work) -> None:
    for stage in ("prior", "decoder"):
        if work.on_cuda:
            measured(work, work.row(stage, "compiled"))
        else:
            work.note(f"{stage} compiled", problem=NEEDS_CUDA)


def memory(work: Work) -> None:
    for stage in ("prior", "decoder"):
        with work.caught(f"{stage}: planned memory"):
            planned(work, work.row(stage))
    with work.caught("MoVQ decodes"):
        movq(work)
    with work.caught("checkpoint"):
        stall(work)
    if work.on_cuda:
        no_memory(work)
    else:
        work.note("out of memory", problem=NEEDS_CUDA)


def planned(work: Work, row: gpu.Row) -> None:
    """GB of the phase that trains, from configs alone; on a GPU beside what its allocator gave out at most."""
    folder = work.plan.work / "hollow"
    if not folder.is_dir():
        hollow.write(work.plan.architecture, folder)
    cfg = gpu.settings(row, work.plan, *filled.settings(folder), verb="plan")
    with distributed.accelerated(lambda: build.accelerator(cfg)) as accelerator:
        phases = Planner(cfg, accelerator).phases
    gb = {phase.name: phase.total / 1e9 for phase in phases}
    found = gpu.measure(row, replace(work.plan, steps=2, warm_up=2)) if work.on_cuda else {"problem": NEEDS_CUDA}
    measured_gb = {"measured_gb": found["peak_gb"]} if "peak_gb" in found else {"measured": found["problem"]}
    work.note(f"{row.name}: planned memory", planned_gb=gb["training"], **measured_gb)


@torch.no_grad()
def movq(work: Work) -> None:
    """8 pictures of 768 px from latents, in bf16: at once under autocast, at once without, one by one."""
    count, side = (2, 64) if work.quick else (8, 768)
    made = network(work.plan.architecture, "movq", str(work.plan.device), torch.bfloat16).eval()
    latents = torch.randn(count, *random_table.latents(work.plan.architecture, side), device=work.plan.device)
    for what, size, autocast in (("autocast", count, True), ("plain", count, False), ("one by one", 1, False)):

        def decode(size: int = size, autocast: bool = autocast) -> None:
            with torch.autocast(work.plan.device.type, torch.bfloat16, enabled=autocast):
                for some in latents.bfloat16().split(size):
                    made.decode(some, force_not_quantize=True)

        seconds = gpu.timed(decode, replace(work.plan, steps=1, warm_up=1))
        work.note(f"MoVQ decodes {count} × {side} px, {what}", ms=1e3 * seconds, peak_gb=gpu.peak_gb(work.plan.device))
        gpu.clean_up()


def stall(work: Work) -> None:
    """How long training waits for a checkpoint's copy in host memory."""
    made = network(work.plan.architecture, "prior", str(work.plan.device))
    gpu.wait(work.plan.device)
    for what in ("first copy", "second copy"):
        since = time.perf_counter()
        Snapshot(0, {"prior": adapters.snapshot(made, {})}, {}, {}).on_host()
        work.note(f"checkpoint of the prior's weights, {what}", ms=1e3 * (time.perf_counter() - since))


def no_memory(work: Work) -> None:
    """A run with too little of the card: what the user is told."""
    allowed = 1e9 / torch.cuda.mem_get_info(work.plan.device)[1]
    torch.cuda.set_per_process_memory_fraction(allowed)
    words = [*TINY, "model=decoder", "data.resolution=256", "trainer.batch_size=512", "trainer.max_steps=1"]
    try:
        doors.train(doors.compose([*words, f"output_root={work.plan.work / 'outputs'}", "name=no-memory"]))
        work.note("out of memory", problem="1 GB was enough")
    except Exception as error:
        work.note("out of memory", message=f"{type(error).__name__}: {error}")


def libraries(work: Work) -> None:
    cases = {
        "8-bit AdamW": ["optimizer=adamw_8bit"],
        "int8 base": ["adapter=lora", "adapter.base_precision=int8"],
        "nf4 base": ["adapter=lora", "adapter.base_precision=nf4"],
        "xFormers": ["trainer.attention=xformers"],
    }
    for name, words in cases.items():
        if work.on_cuda:
            tiny_run(work, name, ["model=decoder", "precision=bf16", *words])
        else:
            work.note(name, problem=NEEDS_CUDA)


PARTS = (weights, tiny_runs, waits, attention, true_size, decoder_step, compiled, memory, libraries)


# --- one after the other, each in a process of its own


def run_part(number: int, arguments: argparse.Namespace, work_folder: Path) -> None:
    """In the child: it has what the parent imported, and the device to itself."""
    os.setsid()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    architecture = BENCH if arguments.quick else TRUE_SIZE
    steps, warm_up = (1, 1) if arguments.quick else (10, 3)
    peak = gpu.known_peak(gpu.device_name(device))
    reference = arguments.reference.absolute() if arguments.reference is not None else None
    plan = gpu.Plan(architecture, device, steps, warm_up, peak, work_folder, reference)

    def note(name: str, **found: Any) -> None:
        add(arguments.out, {"part": number, "device": gpu.device_name(device), "what": name, **found})

    with Work(plan, arguments.quick, note).caught("part"):
        PARTS[number](Work(plan, arguments.quick, note))


def add(out: Path, result: dict[str, Any]) -> None:
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
        file.flush()
        os.fsync(file.fileno())
    shown = {name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()}
    print(*[f"{name}={value}" if name not in ("part", "what") else value for name, value in shown.items()], flush=True)


def limited(number: int, arguments: argparse.Namespace, work_folder: Path) -> None:
    """A part, ended with all that it began once its time is over."""
    limit = (arguments.limit or LIMITS[number]) + STARTS
    if number == 4 and arguments.reference is not None:
        limit += LOADS
    child = multiprocessing.get_context("fork").Process(target=run_part, args=(number, arguments, work_folder))
    since = time.monotonic()
    child.start()
    child.join(limit)
    if child.exitcode is None:
        add(arguments.out, {"part": number, "what": "part", "problem": f"ended after {limit} s"})
    elif child.exitcode:
        add(arguments.out, {"part": number, "what": "part", "problem": f"died of {child.exitcode}"})
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid or 0, signal.SIGKILL)
    child.kill()  # where it was not yet the head of a group
    child.join()
    add(arguments.out, {"part": number, "what": "done", "seconds": time.monotonic() - since})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parts", default="0,1,2,3,4,5,6,7,8")
    parser.add_argument("--limit", type=float, help="seconds of each part, in place of its own")
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for number in map(int, arguments.parts.split(",")):
            limited(number, arguments, (arguments.work or Path(temporary)).absolute())


if __name__ == "__main__":
    main()
