"""Are pictures better after our training than after the published Kandinsky 2.2 scripts, at equal compute?

    git clone --depth 1 https://github.com/huggingface/diffusers
    python tests/bench/quality.py --reference diffusers/examples/kandinsky2_2/text_to_image [--data FOLDER]

Trains prior and decoder by the published `train_text_to_image_{prior,decoder}.py` and by ours, from the same weights
(the tiny ones), on the same pictures, with the same steps, batch, rate and seeds; ours with its defaults beyond these
(condition dropout 0.1, learned variance). Both pairs, and the weights they began with, are then measured by
`kandinsky-exp evaluate` on the same held-out captions and from the same noise. The table has the mean over the seeds,
and its 95 % interval (Student's t). The tiny weights know emoji: `--recolour` exchanges the colours of all pictures, so
that there is something to learn.
"""

import argparse
import json
import math
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import agreement
from agreement import SIDES

STAGES = {"prior": "prior", "decoder": "unet"}
SHOWN = ("clip_score", "cmmd", "precision", "recall", "diversity", "nearest_train")
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}  # 97.5 % quantiles of Student's t, by degrees of freedom


@dataclass(frozen=True)
class Plan(agreement.Plan):
    """What all runs share, and what they train on.

    Args:
        data: a folder with `train/` and `validation/`.
    """

    data: Path

    @property
    def pictures(self) -> Path:
        return self.data / "train"

    def result(self, side: str, stage: str, seed: int) -> Path:
        """A pipeline with what was trained."""
        return self.work / f"{side}-{stage}-{seed}"


def recoloured(data: Path, folder: Path) -> Path:
    """The same pictures with red, green and blue exchanged in turn."""
    from PIL import Image

    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        lines = (data / split / "metadata.jsonl").read_text("utf-8").splitlines()
        found = []
        for row in map(json.loads, lines):
            name = Path(row["file_name"]).name
            with Image.open(data / split / row["file_name"]) as picture:
                red, green, blue = picture.convert("RGB").split()
            Image.merge("RGB", (blue, red, green)).save(folder / split / name)
            found.append(json.dumps({"file_name": name, "text": row["text"]}))
        (folder / split / "metadata.jsonl").write_text("\n".join(found) + "\n", "utf-8")
    return folder


def published(plan: Plan, stage: str, seed: int) -> Path:
    """The network that the published script leaves in its last checkpoint; it runs as it is.

    It may fail at its final save, after training: it looks for the other half of the pipeline on the hub.
    """
    output = plan.work / f"published-output-{stage}-{seed}"
    script = plan.references / f"train_text_to_image_{stage}.py"
    # A cache of its own, for several run at a time.
    own = {"output_dir": output, "cache_dir": plan.work / f"datasets-{stage}-{seed}"}
    sys.argv = [
        str(script),
        *agreement.published_arguments(plan, seed, checkpointing_steps=plan.steps, **own),
    ]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception as error:
        print(f"the published {stage} script ended with {type(error).__name__}: {error}")
    return output / f"checkpoint-{plan.steps}" / STAGES[stage]


def ours(plan: Plan, stage: str, seed: int) -> Path:
    """The network that our run leaves."""
    root = plan.work / f"our-output-{stage}-{seed}"
    overrides = [
        f"model={stage}",
        f"weights.prior={plan.pipeline('prior')}",
        f"weights.decoder={plan.pipeline('decoder')}",
        f"data.path={plan.data}",
        "data.resolution=64",
        f"optimizer.lr={plan.lr}",
        "optimizer.weight_decay=0",
        f"trainer.max_steps={plan.steps}",
        f"trainer.batch_size={plan.batch}",
        f"validation.every={plan.steps}",
        "validation.reconstructions=0",
        f"checkpoint.every={plan.steps}",
        "tracker=none",
        f"output_root={root}",
        "name=run",
        f"seed={seed}",
    ]
    subprocess.run([sys.executable, "-m", "kandinsky_exp", *overrides], check=True)
    return root / "run" / "checkpoints" / f"step-{plan.steps:08d}" / STAGES[stage]


def trained(plan: Plan, side: str, stage: str, seed: int) -> None:
    """One run in a process of its own; one that is there already, in --work, is not run again."""
    result = plan.result(side, stage, seed)
    if result.is_dir():
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--work", str(plan.work), "--one", side, stage, str(seed)]
    log = result.with_suffix(".log")
    with log.open("w") as output:
        subprocess.run(command, env=environment(), check=False, stdout=output, stderr=subprocess.STDOUT)
    if not result.is_dir():
        raise SystemExit(f"{side} {stage}, seed {seed}: nothing was trained, see {log}")


def one(plan: Plan, side: str, stage: str, seed: int) -> None:
    network = {"published": published, "ours": ours}[side](plan, stage, seed)
    result = plan.result(side, stage, seed)
    aside = result.with_suffix(".part")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(plan.pipeline(stage), aside)
    shutil.rmtree(aside / STAGES[stage])
    shutil.copytree(network, aside / STAGES[stage])
    aside.rename(result)


def measured(plan: Plan, name: str, prior: Path, decoder: Path) -> dict[str, Any]:
    """What `evaluate` says of a pair."""
    words = [f"prior={prior}", f"decoder={decoder}", "weights=tiny", f"data.path={plan.data}", "data.resolution=64"]
    words += ["tracker=none", f"output_root={plan.work / 'outputs'}", f"name={name}"]
    command = [sys.executable, "-m", "kandinsky_exp", "evaluate", *words]
    subprocess.run(command, env=environment(), check=True, stdout=subprocess.DEVNULL)
    (model,) = json.loads((plan.work / "outputs" / "evaluate" / name / "metrics.json").read_text())["models"]
    (encoder,) = model["encoders"].values()
    found: dict[str, Any] = encoder["metrics"]
    return found


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def over_seeds(values: list[float]) -> str:
    margin = (
        T.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    )
    return f"{statistics.fmean(values):.3f} ± {margin:.3f}"


def table(plan: Plan, seeds: int) -> str:
    base = measured(plan, "base", plan.pipeline("prior"), plan.pipeline("decoder"))
    found = {
        side: [
            measured(plan, f"{side}-{seed}", plan.result(side, "prior", seed), plan.result(side, "decoder", seed))
            for seed in range(seeds)
        ]
        for side in SIDES
    }
    lines = [
        f"{plan.steps} steps of {plan.batch} for each stage at rate {plan.lr}, {seeds} seeds, "
        f"{base['cmmd']['count']} held-out captions of {plan.data.name}",
        "",
        "| metric | before training | published scripts | ours | ours − published |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key in SHOWN:
        sides = {side: [model[key]["value"] for model in models] for side, models in found.items()}
        apart = [our - their for our, their in zip(sides["ours"], sides["published"], strict=True)]
        columns = [f"{base[key]['value']:.3f}", *(over_seeds(sides[side]) for side in SIDES), over_seeds(apart)]
        lines.append(f"| `{key}` | {' | '.join(columns)} |")
    floor, real = base["cmmd_floor"]["value"], base["nearest_heldout"]["value"]
    lines += ["", f"CMMD of two halves of the held-out pictures: {floor:.3f}; nearest_heldout: {real:.3f}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help="folder with the two published scripts")
    parser.add_argument("--data", type=Path, help="folder with train/ and validation/; the shipped emoji otherwise")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--work", type=Path, help="keep everything here; runs found in it are not run again")
    parser.add_argument("--recolour", action="store_true", help="exchange the colours of all pictures")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="quality-"))).absolute()
    from kandinsky_exp.data.sources import EMOJI

    data = (arguments.data or EMOJI).absolute()
    if arguments.recolour:
        data = work / "recoloured" if arguments.one else recoloured(data, work / "recoloured")
    plan = Plan(arguments.reference.absolute(), work, arguments.steps, arguments.batch, arguments.lr, data)
    if arguments.one:
        side, stage, seed = arguments.one
        one(plan, side, stage, int(seed))
        return
    work.mkdir(parents=True, exist_ok=True)
    if not plan.pipeline("decoder").exists():
        agreement.write_pipelines(plan)
    runs = [(side, stage, seed) for seed in range(arguments.seeds) for side in SIDES for stage in STAGES]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda run: trained(plan, *run), runs))
    print(table(plan, arguments.seeds))


if __name__ == "__main__":
    main()
