"""Training speed of one device: samples/s, model-FLOPs utilisation and peak memory, from random weights alone.

    python tests/bench/gpu.py [--architecture FOLDER] [--rows 'prior*' '*compiled'] [--steps 20] [--json out.json]
    python tests/bench/gpu.py --quick                      small batches and few steps: under two minutes on a CPU

Needs no network, no data set and no MLflow. FOLDER holds the architecture as `prior.json`, `unet.json`, `movq.json`,
`image_encoder.json`, `text_encoder.json`; the default is the small one in `architecture/`. The stages, losses and the
optimizer step are the runner's own, in bf16 autocast over fp32 weights, with fused AdamW. The rows of each shape:

cached      features on the host, read ahead and pinned as the runner does by default
compiled    the same, with the network compiled
online      the frozen encoders, in bf16, in every step, one batch ahead of it
lora        cached, an adapter of rank 16 trains beside frozen bf16 weights
published   what a step of the published scripts costs, written after them: encoders in every step, two waits for the
            device, AdamW not fused, no variational term

No row drops conditions.

Model FLOPs are those of the networks as such, counted on the meta device: forward and backward of what trains, forward
of the encoders where the row runs them. Utilisation is their share of the device's dense bf16 peak, which is known for
a few devices and given by `--peak-tflops` for others. A row that does not fit into memory says so.
"""

import argparse
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from networks import BENCH, RandomWeights, config, network
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kandinsky_exp import adapters, loop
from kandinsky_exp.data.prefetch import prefetch
from kandinsky_exp.randomness import NoiseSource
from kandinsky_exp.stages.base import DiffusionStage, Features
from kandinsky_exp.stages.decoder import DecoderStage
from kandinsky_exp.stages.prior import PriorStage

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "RTX 4090": 165.0}  # dense bf16, by part of the name
KINDS = ("cached", "compiled", "online", "lora", "published")
TOKENS = 18  # of a caption that is not padding


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
    """What all rows share."""

    architecture: Path
    device: torch.device
    steps: int
    warm_up: int
    peak_tflops: float | None


def rows(quick: bool) -> list[Row]:
    shapes = [("prior", 1, 512), ("prior", 16, 512), ("prior", 64, 512)]
    shapes += [("decoder", 1, 512), ("decoder", 8, 512), ("decoder", 4, 768)]
    kinds = KINDS
    if quick:
        shapes = [("prior", 4, 512), ("decoder", 2, 256)]
        kinds = tuple(kind for kind in KINDS if kind != "compiled")
    return [Row(*shape, kind) for shape in shapes for kind in kinds]


# --- inputs


def examples(row: Row, architecture: Path) -> dict[str, Tensor]:
    """A batch as `Preprocess` gives it, on the host."""
    side = config(architecture, "image_encoder")["image_size"]
    batch = {"clip_pixels": torch.randn(row.batch, 3, side, side)}
    if row.stage == "decoder":
        return batch | {"pixels": torch.rand(row.batch, 3, row.resolution, row.resolution) * 2 - 1}
    mask = (torch.arange(77) < TOKENS).expand(row.batch, 77).contiguous()
    return batch | {"input_ids": torch.randint(49_000, (row.batch, 77)), "text_mask": mask}


def features(row: Row, architecture: Path) -> Features:
    """A batch as a table of fp16 gives it, on the host."""
    width = config(architecture, "prior")["embedding_dim"]
    batch = {"image_embeds": torch.randn(row.batch, width).half()}
    if row.stage == "decoder":
        shrink = 1 << len(config(architecture, "movq")["block_out_channels"]) - 1
        side = row.resolution // shrink
        return batch | {"latents": torch.randn(row.batch, 4, side, side).half()}
    mask = (torch.arange(77) < TOKENS).expand(row.batch, 77).contiguous()
    states = torch.randn(row.batch, 77, width).half() * mask.unsqueeze(-1)
    return batch | {"text_embeds": torch.randn(row.batch, width).half(), "text_states": states, "text_mask": mask}


def stream(row: Row, plan: Plan, stage: DiffusionStage) -> Iterator[Features]:
    """Batches from a few that lie on the host; encoded on the device where the row encodes."""
    make = examples if row.encodes else features
    ready = [make(row, plan.architecture) for _ in range(4)]
    for batch in cycle(ready):
        yield {**(stage.encode(batch) if row.encodes else batch), "index": torch.arange(row.batch)}


# --- steps


def make_stage(row: Row, plan: Plan) -> DiffusionStage:
    """The stage with random networks on the device; only the parts that the row needs are built."""
    weights = RandomWeights(plan.architecture, str(plan.device), "bfloat16")
    cls: Any = {"prior": PriorStage, "decoder": DecoderStage}[row.stage]
    # No conditions are dropped: the null condition would come from the encoders, which a cached run never loads.
    plain = {"condition_dropout": 0.0} | (
        {"vlb_weight": 0.0} if row.kind == "published" and cls is DecoderStage else {}
    )
    stage: DiffusionStage = cls(weights, resolution=row.resolution, **plain)
    if row.kind == "lora":
        attach_lora(stage.network)
    if row.kind == "compiled":
        torch._dynamo.reset()
        stage.network.compile()
    return stage


def attach_lora(made: Any) -> None:
    adapters.attach_lora(
        made, rank=16, alpha=None, dropout=0.0, target_modules=None, use_dora=False, dtype=torch.bfloat16
    )


def runner_step(row: Row, plan: Plan) -> Callable[[], object]:
    """The runner's own optimizer step, with what `precision=bf16` sets."""
    torch.set_float32_matmul_precision("high")
    accelerator = Accelerator(mixed_precision="bf16", cpu=plan.device.type == "cpu")
    stage = make_stage(row, plan)
    trainable = [parameter for parameter in stage.network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    network = stage.place(plan.device)
    prepared, prepared_optimizer = accelerator.prepare(network, optimizer)
    training = loop.Training(stage, prepared.train(), prepared_optimizer, schedule, None)
    settings = loop.LoopSettings(
        max_steps=1 << 30,
        grad_accumulation=1,
        max_grad_norm=1.0,
        log_every=10,
        validate_every=1 << 30,
        checkpoint_every=1 << 30,
        total_batch=row.batch,
        progress=False,
    )
    batches, noise = prefetch(stream(row, plan, stage), plan.device), NoiseSource(0, 0, plan.device)
    return lambda: loop.optimizer_step(training, batches, noise, accelerator, settings)


def published_step(row: Row, plan: Plan) -> Callable[[], object]:
    """A step with the costs of the published scripts, which leave TF32 off by default."""
    torch.set_float32_matmul_precision("highest")
    accelerator = Accelerator(mixed_precision="bf16", cpu=plan.device.type == "cpu")
    stage = make_stage(row, plan)
    made = accelerator.prepare(stage.network.train())
    trainable = list(made.parameters())
    optimizer = accelerator.prepare(torch.optim.AdamW([one for one in trainable if one.requires_grad], lr=1e-5))
    batches = stream(row, plan, stage)
    alphas = stage.alphas_cumprod.to(plan.device)

    def step() -> float:
        given = {name: value.to(plan.device) for name, value in next(batches).items()}
        clean = stage.clean(given) if row.stage == "decoder" else given["image_embeds"].float()
        noise, timesteps = torch.randn_like(clean), torch.randint(len(alphas), (row.batch,), device=plan.device)
        alpha = alphas[timesteps].view(-1, *[1] * (clean.ndim - 1))
        output = stage.predict(made, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timesteps, given)
        target = noise if row.stage == "decoder" else clean
        loss = F.mse_loss(output[:, : clean.shape[1]].float(), target)
        accelerator.gather(loss.repeat(row.batch)).mean().item()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach().item()

    return step


# --- counting and measuring


def step_flops(row: Row, architecture: Path) -> float:
    """Floating-point operations of one step, counted on the meta device for one sample."""
    one = replace(row, batch=1)
    cls: Any = {"prior": PriorStage, "decoder": DecoderStage}[row.stage]
    part = cls.part
    made = network(architecture, part, "meta").train()
    if row.stage == "prior":
        made.clip_mean.requires_grad_(False), made.clip_std.requires_grad_(False)
    if row.kind == "lora":
        attach_lora(made)
        made.float()
    given = {name: _meta(value) for name, value in features(one, architecture).items()}
    clean = given["latents" if row.stage == "decoder" else "image_embeds"]
    with FlopCounterMode(display=False) as counter:
        # `predict` reads nothing of the stage but the network and the features.
        output = cls.predict(None, made, clean, torch.zeros(1, dtype=torch.long, device="meta"), given)
        output.sum().backward()
        if row.encodes:
            _encode_on_meta(one, architecture)
    return float(counter.get_total_flops()) * row.batch


def _meta(value: Tensor) -> Tensor:
    return value.to("meta", torch.float32 if value.is_floating_point() else value.dtype)


@torch.no_grad()
def _encode_on_meta(row: Row, architecture: Path) -> None:
    given = {name: value.to("meta") for name, value in examples(row, architecture).items()}
    network(architecture, "image_encoder", "meta").eval()(given["clip_pixels"])
    if row.stage == "prior":
        network(architecture, "text_encoder", "meta").eval()(given["input_ids"])
    else:
        network(architecture, "movq", "meta").eval().encode(given["pixels"])


def measure(row: Row, plan: Plan) -> dict[str, Any]:
    """Samples/s, TFLOP/s, utilisation and peak memory of a row; what went wrong where it does not fit."""
    flops = step_flops(row, plan.architecture)
    try:
        step = (published_step if row.kind == "published" else runner_step)(row, plan)
        seconds = timed(step, plan)
    except torch.OutOfMemoryError:
        return {"row": row.name, "problem": "out of memory"}
    except Exception as error:  # one row that cannot run, such as a compiler that is missing, must not hide the rest
        return {"row": row.name, "problem": f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}"[:200]}
    found = {"row": row.name, "samples_per_second": row.batch / seconds, "ms_per_step": 1e3 * seconds}
    found |= {"tflop_per_step": flops / 1e12, "tflops": flops / seconds / 1e12, "peak_gb": peak_gb(plan.device)}
    return found | ({"utilisation": flops / seconds / 1e12 / plan.peak_tflops} if plan.peak_tflops else {})


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


def speed_ups(found: list[dict[str, Any]]) -> dict[str, float]:
    """Each row's samples/s over those of the `published` row of its shape."""
    rates = {one["row"]: one["samples_per_second"] for one in found if "samples_per_second" in one}
    bases = {name.rpartition("-")[0]: rate for name, rate in rates.items() if name.endswith("-published")}
    pairs = ((name, name.rpartition("-")[0]) for name in rates if not name.endswith("-published"))
    return {name: rates[name] / bases[shape] for name, shape in pairs if shape in bases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=Path, default=BENCH)
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of row names")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = arguments.peak_tflops or known_peak(name)
    steps, warm_up = (2, 1) if arguments.quick else (arguments.steps, arguments.warm_up)
    plan = Plan(arguments.architecture, device, steps, warm_up, peak)
    chosen = [row for row in rows(arguments.quick) if any(fnmatch(row.name, one) for one in arguments.rows)]
    if not chosen:
        sys.exit(f"no row is named so; there are {', '.join(row.name for row in rows(arguments.quick))}")
    print(f"{name}, torch {torch.__version__}, bf16 autocast, peak {peak or 'unknown'} TFLOP/s")
    print(f"{'row':<30} {'samples/s':>10} {'ms/step':>10} {'TFLOP/s':>9} {'of peak':>8} {'peak GB':>8}")
    found = []
    for row in chosen:
        found.append(measure(row, plan))
        clean_up()
        print(line(found[-1]), flush=True)
    ratios = speed_ups(found)
    for row_name, ratio in ratios.items():
        print(f"{row_name}: {ratio:.2f} × the step written after the published scripts")
    assert "mlflow" not in sys.modules
    if arguments.json:
        facts = {"device": name, "torch": torch.__version__, "peak_tflops": peak, "steps": steps}
        content = {"machine": facts, "rows": found, "over_published": ratios}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
