"""Does our training loss agree with the published Kandinsky 2.2 scripts, on the same weights and the same pictures?

    git clone --depth 1 https://github.com/huggingface/diffusers
    python tests/bench/agreement.py diffusers/examples/kandinsky2_2/text_to_image

Runs each stage of `train_text_to_image_{prior,decoder}.py` and ours from the tiny weights on the shipped emoji with
equal settings, several seeds each, and compares the mean training loss. Noise and order differ between the two, so the
means agree within their standard error only: `z` is the difference in units of it, and beyond ±4 something is wrong.
"""

import argparse
import json
import math
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIDES = ("published", "ours")


@dataclass(frozen=True)
class Plan:
    """What all runs share, and where it lies."""

    references: Path
    work: Path
    steps: int
    batch: int
    lr: float

    @property
    def pictures(self) -> Path:
        return self.work / "pictures"

    def pipeline(self, stage: str) -> Path:
        return self.work / f"tiny-{stage}"

    def losses(self, side: str, stage: str, seed: int) -> Path:
        return self.work / f"{side}-{stage}-{seed}.json"


def write_pictures(folder: Path) -> None:
    """The shipped emoji as an image folder, which both sides read."""
    from kandinsky_exp.data import sources

    folder.mkdir()
    lines = []
    for index, example in enumerate(sources.emoji().train):
        example.image().save(folder / f"{index:03d}.png")
        lines.append(json.dumps({"file_name": f"{index:03d}.png", "text": example.captions[0]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def write_pipelines(plan: Plan) -> None:
    """The tiny weights as two folders, prior and decoder: the published scripts read no combined one."""
    from kandinsky_exp.models import pipelines
    from kandinsky_exp.models.weights import Weights

    weights = Weights("tiny", "tiny", cache_folder=plan.work / "cache")
    pipelines.prior_pipeline(weights).save_pretrained(plan.pipeline("prior"))
    pipelines.decoder_pipeline(weights).save_pretrained(plan.pipeline("decoder"))


def published(plan: Plan, stage: str, seed: int) -> list[float]:
    """Loss of each step of the published script, which runs as it is; only where it reports to is taken over.

    It may fail at its final save, after training: it looks for the other half of the pipeline on the hub.
    """
    import accelerate

    losses: list[float] = []

    class Recording(accelerate.Accelerator):
        def __init__(self, *args, log_with=None, **kwargs):
            super().__init__(*args, **kwargs)

        def init_trackers(self, *args, **kwargs):
            pass

        def log(self, values, step=None, log_kwargs=None):
            losses.append(values["train_loss"])

    accelerate.Accelerator = Recording
    script = plan.references / f"train_text_to_image_{stage}.py"
    sys.argv = [str(script), *published_arguments(plan, seed)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Exception as error:
        print(f"the published {stage} script ended with {type(error).__name__} after {len(losses)} steps")
    return losses


def published_arguments(plan: Plan, seed: int, **others: Any) -> list[str]:
    settings = {
        "pretrained_prior_model_name_or_path": plan.pipeline("prior"),
        "pretrained_decoder_model_name_or_path": plan.pipeline("decoder"),
        "train_data_dir": plan.pictures,
        "cache_dir": plan.work / "datasets",
        "output_dir": plan.work / "published-output",
        "resolution": 64,
        "seed": seed,
        "train_batch_size": plan.batch,
        "max_train_steps": plan.steps,
        "checkpointing_steps": plan.steps + 1,
        "learning_rate": plan.lr,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "adam_weight_decay": 0.0,
        "max_grad_norm": 1.0,
        **others,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def ours(plan: Plan, stage: str, seed: int) -> list[float]:
    """Loss of each step of our run, read back from its MLflow store."""
    from hydra import compose, initialize_config_module
    from mlflow import MlflowClient

    from kandinsky_exp.run import run

    root = plan.work / f"ours-{stage}-{seed}"
    with initialize_config_module("kandinsky_exp.conf", version_base="1.3"):
        run(compose("train", our_overrides(plan, root, stage, seed)))
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("kandinsky-2-2")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    return [metric.value for metric in client.get_metric_history(found.info.run_id, "train/loss")]


def our_overrides(plan: Plan, root: Path, stage: str, seed: int) -> list[str]:
    overrides = [
        f"model={stage}",
        "model.condition_dropout=0",
        f"weights.prior={plan.pipeline('prior')}",
        f"weights.decoder={plan.pipeline('decoder')}",
        f"data.path={plan.pictures}",
        "data.resolution=64",
        f"optimizer.lr={plan.lr}",
        "optimizer.weight_decay=0",
        f"trainer.max_steps={plan.steps}",
        f"trainer.batch_size={plan.batch}",
        "trainer.log_every=1",
        "validation.fraction=0",
        f"checkpoint.every={plan.steps}",
        f"output_root={root}",
        "name=run",
        f"seed={seed}",
    ]
    return [*overrides, "model.vlb_weight=0"] if stage == "decoder" else overrides


def measure(plan: Plan, side: str, stage: str, seed: int) -> list[float]:
    """One run in a process of its own; one that is there already, in --work, is not run again."""
    file = plan.losses(side, stage, seed)
    if not file.is_file():
        command = [sys.executable, __file__, *sys.argv[1:], "--work", str(plan.work), "--one", side, stage, str(seed)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        log = file.with_suffix(".log")
        with log.open("w") as output:
            subprocess.run(command, env=environment, check=False, stdout=output, stderr=subprocess.STDOUT)
        if not file.is_file():
            raise SystemExit(f"{side} {stage}, seed {seed}: no losses, see {log}")
    losses: list[float] = json.loads(file.read_text("utf-8"))
    if len(losses) != plan.steps:
        raise SystemExit(f"{file}: {len(losses)} losses, not {plan.steps}; see the log beside it")
    return losses


def compare(stage: str, part: str, means: dict[str, list[float]]) -> str:
    """A line of the table: mean ± standard error over the seeds, and the difference."""
    found = {side: (statistics.fmean(values), error_of_mean(values)) for side, values in means.items()}
    base = found["published"][0]
    difference = found["ours"][0] - base
    error = math.hypot(found["ours"][1], found["published"][1])
    columns = "".join(f"{mean:>12.5f} ± {se:.5f}" for mean, se in found.values())
    z = difference / error if error > 0 else math.nan
    return f"{stage:<8} {part:<13}{columns}{difference:>+12.5f} ± {error:.5f}{difference / base:>+9.1%}{z:>+7.1f}"


def error_of_mean(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("references", type=Path, help="folder with the two published scripts")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--stages", nargs="+", choices=["prior", "decoder"], default=["prior", "decoder"])
    parser.add_argument("--work", type=Path, help="keep everything here; runs found in it are not run again")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="agreement-"))
    plan = Plan(arguments.references.absolute(), work.absolute(), arguments.steps, arguments.batch, arguments.lr)
    if arguments.one:
        side, stage, seed = arguments.one
        losses = {"published": published, "ours": ours}[side](plan, stage, int(seed))
        plan.losses(side, stage, int(seed)).write_text(json.dumps(losses), "utf-8")
        return
    work.mkdir(parents=True, exist_ok=True)
    if not plan.pictures.exists():
        write_pictures(plan.pictures)
        write_pipelines(plan)
    report(plan, arguments.stages, arguments.seeds)


def report(plan: Plan, stages: Sequence[str], seeds: int) -> None:
    print(f"{plan.steps} steps of {plan.batch} at lr {plan.lr}, {seeds} seeds; everything in {plan.work}")
    print(f"{'stage':<8} {'steps':<13}{'published':>22}{'ours':>22}{'ours − published':>22}{'relative':>9}{'z':>7}")
    parts = {"all": slice(None), "last quarter": slice(-plan.steps // 4, None)}
    for stage in stages:
        runs = {side: [measure(plan, side, stage, seed) for seed in range(seeds)] for side in SIDES}
        for part, steps in parts.items():
            means = {side: [statistics.fmean(losses[steps]) for losses in found] for side, found in runs.items()}
            print(compare(stage, part, means), flush=True)


if __name__ == "__main__":
    main()
