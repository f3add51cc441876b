"""Check settings against files, against each other and against the installed packages.

All functions take `good`: {dotted key: value} of those settings whose values are well-formed. None imports torch, but
where something hangs on the stage: `stage` gives its class, None where the config names none that is good.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kandinsky_exp.config import companions, drawing_tasks, measured, prompt_entries, set_entries, targets
from kandinsky_exp.data.source_facts import SourceFacts
from kandinsky_exp.errors import cut
from kandinsky_exp.models import compatibility, components, weight_files
from kandinsky_exp.models.decoder_kinds import PLAIN
from kandinsky_exp.system import text_files
from kandinsky_exp.system.files import exists, expanded, is_file, is_folder, looks_local

Values = dict[str, Any]
Stage = Callable[[], Any]
Found = Iterator[tuple[str, str]]  # (key, what is wrong; what to do)

MAX_NAME = 200  # bytes; file systems take 255, and suffixes are put behind
# Of output_root, by all runs together, now or later.
TAKEN = ("cache", "compare", "data", "evaluate", "export", "generate", "mlartifacts", "mlflow.db")
CONSTANT = "kandinsky_exp.schedules.constant"
BITSANDBYTES = (0, 48)  # as in pyproject.toml
LEAST_FACTOR = 0.01  # of Prodigy's rate: what is smaller was meant as a rate
REPO_ID = re.compile(r"([\w.-]+/)?[\w.-]+")


def files(good: Values, stage: Stage, source: SourceFacts) -> Found:
    """What the settings name on this machine and is not there, or cannot be used."""
    yield from _data(good, source)
    yield from _resume(good, stage)
    yield from _output(good)
    for key in ("validation.prompts", "prompts"):
        if key in good and (problem := _prompts(key, good[key])):
            yield key, problem
    yield from drawing_tasks.problems(good)
    yield from prompt_entries.problems(good, stage)
    yield from set_entries.problems(good, stage)
    if "model._target_" in good:  # `generate` takes more kinds of sources and looks at them itself
        strict = {**compatibility.REQUIRED, "decoder": compatibility.starting_from(PLAIN)}
        found = list(_weights(good, components.NETWORKS, strict))
        # What is wrong with the prior's source itself is wrong for every stage, which encodes with what is in there.
        if found != list(_weights(good, ["prior"], {})) and (made := stage()) is not None:
            sides = {components.PARTS[part][0] for part in (made.part, *made.encoders)}
            # Without prompts or captions nothing will be drawn, and no other source is opened.
            if good.get("validation.prompts") or good.get("validation.metrics"):
                sides |= components.NETWORKS.keys()
            found = list(_weights(good, sides, {**compatibility.REQUIRED, made.half: made.requires}))
        yield from found


def _resume(good: Values, stage: Stage) -> Found:
    """`checkpoint` reads it later, for what it holds; here, before a new run has a folder."""
    resume = good.get("checkpoint.resume", "auto")
    if resume in ("auto", "never"):
        return
    if not is_folder(resume):
        yield "checkpoint.resume", f"'{cut(resume)}' is no folder; give auto, never or the folder of a checkpoint"
        return
    folder = expanded(resume)
    is_run = (folder / "checkpoints").is_dir()
    steps = [step for step in ((folder / "checkpoints").glob("step-*") if is_run else [folder]) if _has_state(step)]
    if not steps:
        yield "checkpoint.resume", f"there is no complete checkpoint in '{resume}'; give a run or a step-… folder"
        return
    holds = {part for part in components.NETWORKS.values() if (max(steps) / part).is_dir()}
    if holds and (made := stage()) is not None and made.part not in holds:
        yield "checkpoint.resume", f"'{resume}' belongs to another stage; set model=, or give another checkpoint"


def _has_state(step: Path) -> bool:
    with suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        int(json.loads((step / "state.json").read_text("utf-8"))["step"])
        return True
    return False


def _output(good: Values) -> Found:
    root = good.get("output_root", ".")
    if exists(root) and not is_folder(root):
        yield "output_root", f"'{root}' is a file; give a folder"
    elif "\0" in root or str(expanded(root)).startswith("~"):
        yield "output_root", f"{cut(root)!r} is no path on this machine; give a folder"
    elif max(len(part.encode(errors="replace")) for part in root.split("/")) > 255 or len(root) > 3000:
        yield "output_root", f"'{cut(root)}' is too long for a path; give a shorter one"
    name = good.get("name") or ""
    if len(name.encode(errors="replace")) > MAX_NAME:
        yield "name", f"is too long for a folder; give a shorter one, of {MAX_NAME} bytes at most"
    elif not name.isprintable():
        yield "name", f"{name!r} has characters that cannot be seen; give another name"
    elif name.casefold() in TAKEN and "model._target_" in good:
        folder = expanded(root) / name  # of a run or a sweep that has such a name already, from before it was refused?
        if not ((folder / "run.json").is_file() or (folder / ".jobs").is_dir()):
            yield "name", f"'{name}' is what all runs share in output_root; give another name"


def _data(good: Values, source: SourceFacts) -> Found:
    """Folders and lists of images; what shards stand for is found out by their reader."""
    for name in (*source.folders, *source.files, source.hub_id):
        path = good.get(f"data.{name}")
        kind, is_there = ("file", is_file) if name in source.files else ("folder", is_folder)
        if isinstance(path, str) and not is_there(path) and (name != source.hub_id or looks_local(path)):
            where = f"check the path ({Path.cwd()} is the working directory)"
            yield f"data.{name}", f"there is no {kind} '{cut(path)}' here; {where}"
    if (path := good.get("data.class_path")) and exists(path) and not is_folder(path):
        yield "data.class_path", f"'{cut(path)}' is a file; give a folder"


def _prompts(key: str, prompts: Any) -> str | None:
    if isinstance(prompts, list):
        return None
    if not is_file(prompts):
        text = cut(prompts)
        return f"there is no text file '{text}'; a list of prompts is written '{key}=[\"{text}\"]'"
    try:
        is_empty = not text_files.lines(expanded(prompts))
    except (OSError, UnicodeDecodeError):
        return f"'{prompts}' is not a text file in UTF-8; save it as UTF-8"
    return f"'{prompts}' is empty; write one prompt per line" if is_empty else None


def _weights(good: Values, sides: Collection[components.PipelineHalf], required: compatibility.Required) -> Found:
    sources = {
        side: good[f"weights.{side}"] for side in components.NETWORKS if side in sides and f"weights.{side}" in good
    }
    variant = good.get("weights.variant")
    found = {side: components.check_source(source, side, variant) for side, source in sources.items()}
    wrong = {side: problem for side, problem in found.items() if problem is not None}
    for side, problem in wrong.items():
        yield f"weights.{side}", problem
    local = {side: source for side, source in sources.items() if side not in wrong and compatibility.is_local(source)}
    folders = compatibility.local_folders(local)
    for side, problem in compatibility.disagreements(folders, required):
        yield f"weights.{side}", f"'{sources[side]}': {problem}"
    for side, source in sources.items():
        revision = good.get(f"weights.{side}_revision")
        if revision is not None and not components.is_hub_id(source):
            yield f"weights.{side}_revision", f"is set, but weights.{side} is no hub id: only those have one; remove it"
    are_all_here = bool(folders) and len(local) == len(sources)
    if variant and are_all_here and not any(weight_files.has_variant(one, variant) for one in folders.values()):
        such = f"files of this variant, such as *.{variant}.safetensors"
        yield "weights.variant", f"no part of the weights has {such}; remove it"


def together(good: Values, stage: Stage, source: SourceFacts) -> Found:
    """Settings that contradict each other, or ask for a package that is not there."""
    yield from _publishing(good)
    yield from _adapter(good)
    yield from _training(good, stage)
    yield from measured.problems(good, stage)
    yield from _optimizer(good)
    yield from _reading(good, source)
    yield from companions.problems(good, stage)
    yield from _tracking(good)


def _publishing(good: Values) -> Found:
    repo = good.get("hub.repo_id", "")
    if good.get("hub.push") and repo is None:
        yield "hub.repo_id", "hub.push is on but there is no repository; give hub.repo_id=<user>/<name>"
    elif repo and good.get("hub.push") is False:
        yield "hub.repo_id", "is set, but hub.push is off; add hub.push=true, or remove it"
    elif repo and not REPO_ID.fullmatch(repo):
        yield "hub.repo_id", f"'{repo}' is no <user>/<name>; give the name of a repository on the hub"


def _adapter(good: Values) -> Found:
    if good.get("adapter.name") == "none":
        for key in ("rank", "alpha", "dropout", "target_modules", "use_rslora", "init", "base_precision"):
            if good.get(f"adapter.{key}") not in (None, 0, "default"):
                yield f"adapter.{key}", "is set, but adapter=none trains all weights; add adapter=lora, or remove it"
    elif good.get("adapter.rank", 1) is None:
        yield "adapter.rank", "has to be a whole number, at least 1, not null"
    if good.get("adapter.target_modules") == []:
        yield "adapter.target_modules", "is empty, so that nothing would train; name modules, or take null for all"
    if good.get("adapter.base_precision") is not None:
        yield from _quantized(good)


def _quantized(good: Values) -> Found:
    key, bits, init = "adapter.base_precision", good["adapter.base_precision"], good.get("adapter.init")
    if not targets.is_installed("bitsandbytes"):
        yield key, f"bitsandbytes is not installed; {targets.how_to_install('bitsandbytes')}, or leave it null"
    elif old := targets.older_than("bitsandbytes", BITSANDBYTES):
        wrong = f"bitsandbytes {old} does not move 8-bit weights to a device, {'.'.join(map(str, BITSANDBYTES))} does"
        yield key, f"{wrong}; pip install -U bitsandbytes, or leave it null"
    if good.get("precision.mixed_precision") == "no":
        yield key, f"{bits} computes in half precision; add precision=bf16 or fp16, or leave it null"
    if init in ("pissa", "olora"):
        yield "adapter.init", f"{init} changes the frozen weights, which {bits} has rounded; take default or gaussian"


def _training(good: Values, stage: Stage) -> Found:
    in_halves = good.get("precision.frozen_dtype") != "float32" and good.get("precision.mixed_precision") == "no"
    if in_halves and "model._target_" in good:  # `generate` runs everything in that one type
        yield "precision.frozen_dtype", "half precision needs mixed precision; take precision=bf16, or leave it float32"
    if good.get("trainer.attention") == "xformers" and (why := getattr(stage(), "unfit_attention", {}).get("xformers")):
        yield "trainer.attention", why
    elif good.get("trainer.attention") == "xformers" and not targets.is_installed("xformers"):
        how = targets.how_to_install("xformers")
        yield "trainer.attention", f"xformers is not installed; {how}, or take sdpa"
    if good.get("trainer.compile") == "regional" and (made := stage()) is not None and not made.regions:
        yield "trainer.compile", f"{made.name} names no blocks to compile one by one; take true, or leave it false"
    if good.get("trainer.group_by_length") and (made := stage()) is not None:
        key = "trainer.group_by_length"
        if not made.reads_captions():
            yield key, f"{made.name} reads no captions; leave it false"
        elif good.get("data.cache") is False:
            yield key, "lengths are known of encoded captions only; set data.cache=true, or leave it false"
    lr, lr_end = good.get("optimizer.lr", math.inf), good.get("scheduler.lr_end", 0.0)
    if lr_end >= lr:
        yield "scheduler.lr_end", f"{lr_end} is not below optimizer.lr, {lr}; make it smaller"
    steps = good.get("trainer.max_steps", math.inf)
    for key in ("scheduler.warmup_steps", "optimizer.warmup_steps"):
        if (warmup := good.get(key, 0)) > steps:
            never = "the rate never reaches optimizer.lr"
            yield key, f"{warmup} is more than trainer.max_steps, {steps}: {never}; make it smaller"
    for group in ("model", "optimizer", "scheduler"):
        if good.get(f"{group}._partial_") is False:
            yield f"{group}._partial_", "has to be true: the run hands over the rest; remove it"


def _optimizer(good: Values) -> Found:
    target = str(good.get("optimizer._target_"))
    if target.startswith("schedulefree."):
        schedule, warmup = good.get("scheduler._target_", CONSTANT), good.get("scheduler.warmup_steps", 0)
        what = "a schedule-free optimizer"
        if schedule != CONSTANT:
            instead = "averages instead of decaying; take scheduler=constant"
            yield "scheduler._target_", f"{what} keeps its rate, and {instead}"
        if warmup:
            yield "scheduler.warmup_steps", f"{what} warms up by itself; set optimizer.warmup_steps={warmup} instead"
        if good.get("trainer.ema_decay") is not None:
            yield "trainer.ema_decay", f"{what} averages by itself, for validation and for the result; remove it"
    if target.startswith(("schedulefree.", "prodigyopt.")) and good.get("model.new_lr_factor", 1) != 1:
        how = "what its steps have led to with one rate for all"
        yield "model.new_lr_factor", f"{target.rpartition('.')[2]} follows from {how}; set it to 1"
    lr = good.get("optimizer.lr", 1.0)
    if target.startswith("prodigyopt.") and lr < LEAST_FACTOR:
        yield "optimizer.lr", f"{lr} is a factor on the rate that Prodigy finds by itself; leave it at 1"


def _reading(good: Values, source: SourceFacts) -> Found:
    if good.get("data._partial_"):
        yield "data._partial_", "has to be false: nothing is handed over later; remove it"
    if good.get("data.cache") is False and source.streamed:
        how = f"{source.streamed} are read in one sweep, and training visits images in random order"
        yield "data.cache", f"{how}; set it to true"
    if good.get("data.buckets"):
        if good.get("data.cache") is False:
            yield "data.buckets", "the sizes of all images are known once they are encoded; set data.cache=true"
        if good.get("data.resolution", 64) % 64:
            yield "data.buckets", f"data.resolution has to be a multiple of 64 with it, not {good['data.resolution']}"
    if good.get("data.class_prompt") is None:
        if good.get("data.class_path") is not None:
            lacking = "without data.class_prompt no class is preserved; give one, or remove it"
            yield "data.class_path", f"is set, but {lacking}"
    elif good.get("data.buckets"):
        yield "data.buckets", "pictures of subject and class share a batch, so have one shape; set it to false"


def _tracking(good: Values) -> Found:
    if good.get("tracker.name") == "mlflow" and not targets.is_installed("mlflow"):
        yield "tracker", "mlflow is not installed; pip install mlflow, or take tracker=none"
    if good.get("tracker.register") and good.get("tracker.name") == "none":
        yield "tracker.register", "is set, but tracker=none has no registry; take tracker=mlflow, or remove it"
    if good.get("log_to_run") and good.get("tracker.name") == "none":
        yield "log_to_run", "is on, but tracker=none names no store to log to; take tracker=mlflow"
    uri = good.get("tracker.uri")
    if uri and not _is_address(uri):
        yield "tracker.uri", f"'{uri}' is no address; e.g. sqlite:///runs/mlflow.db or http://localhost:5000"


def _is_address(uri: str) -> bool:
    try:
        return bool(urlsplit(uri).scheme)
    except ValueError:  # such as half a bracket around an IPv6 address
        return False
