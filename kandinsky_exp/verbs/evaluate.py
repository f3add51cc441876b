"""`kandinsky-exp evaluate`: is it better? Pictures of held-out captions, measured against real ones."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kandinsky_exp import build
from kandinsky_exp.config import saved_config, validation
from kandinsky_exp.data.splits import Splits
from kandinsky_exp.errors import ConfigError, OutOfMemory, memory_told
from kandinsky_exp.evaluation import drawing, report, rows
from kandinsky_exp.evaluation.drawing import Networks, Plan
from kandinsky_exp.evaluation.encoders import FolderEncoder, PictureEncoder
from kandinsky_exp.evaluation.measuring import FEWEST
from kandinsky_exp.evaluation.real_pictures import RealPictures, some_of
from kandinsky_exp.evaluation.record import record
from kandinsky_exp.evaluation.report import Row
from kandinsky_exp.evaluation.rows import Measures
from kandinsky_exp.memory import device_limits
from kandinsky_exp.models import weight_files
from kandinsky_exp.models.components import PARTS, read_object
from kandinsky_exp.models.decoder_kinds import HINT
from kandinsky_exp.models.pipelines import SampleSettings
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.runs.model_sources import decoder_folder, decoder_kind, load_network, use
from kandinsky_exp.runs.subjects import Subject, find_subjects
from kandinsky_exp.system import accelerators, distributed, files, logs, signals
from kandinsky_exp.tracking import store, store_probe
from kandinsky_exp.training.feature_loader import Readers, open_readers
from kandinsky_exp.training.feature_reader import FeatureReader, ReadSettings

OUT_OF_MEMORY = "evaluating ran out of memory ({}); set precision=bf16, or a smaller batch_size"
MOST = 256  # captions, unless num_images says otherwise
ABOUT = "evaluation.json"  # what the pictures of a folder follow from
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What is known of a subject before it draws."""

    subject: Subject
    weights: Weights
    readers: Readers
    held_out: FeatureReader
    captioned: RealPictures
    captions: list[str]
    how: tuple[SampleSettings, SampleSettings]
    accelerator: Accelerator


def evaluate(cfg: DictConfig, trusted_modules: Collection[str] = ()) -> float:
    """Draw pictures of held-out captions with a run, each job of a sweep, or any pair, and measure them.

    Args:
        trusted_modules: what `_target_` may name beside torch and the like; the config alone cannot add any.

    Returns:
        CMMD of the best model.

    Raises:
        ConfigError: what is named cannot be drawn with, or there is too little to measure against.
        DataError: the data cannot be read.
    """
    validation.validate(cfg, "evaluate", trusted_modules)
    logs.quiet_libraries()
    with (
        signals.stop_signals(),
        distributed.accelerated(lambda: build.accelerator(cfg)) as accelerator,
        contextlib.ExitStack() as held,
    ):
        subjects, notes = distributed.on_main_process(lambda: find_subjects(cfg, trusted_modules, typed_keys()))
        files.make_root(files.output_root(cfg.output_root))
        other = None if cfg.encoder is None else FolderEncoder(files.expanded(cfg.encoder), accelerator.device)
        if any(subject.run_id for subject in subjects) and cfg.tracker.name != "none":
            store_probe.probe(store.chosen_uri(cfg.tracker.uri, cfg.output_root))
        folder, found = None, list[Row]()
        with logs.logging_to(None, accelerator.is_main_process), memory_told(OutOfMemory, OUT_OF_MEMORY):
            for subject in subjects:
                one = prepare(cfg, subject, accelerator)
                title = subject.name if len(subjects) == 1 else Path(cfg.run).name
                folder = folder or distributed.on_main_process(partial(claimed, cfg, one, title, held))
                place = folder if len(subjects) == 1 else folder / subject.name
                found.append(drawn_row(cfg, one, place, other))
            if accelerator.is_main_process:
                assert folder is not None  # nosec B101 # there is a subject
                notes += one.readers.notes if len(subjects) == 1 else []
                written = report.write(folder, folder.name, found, notes)
                recorded = [(one.run_id, one.step, row) for one, row in zip(subjects, found, strict=True) if one.run_id]
                if recorded and cfg.tracker.name != "none":
                    record(store.chosen_uri(cfg.tracker.uri, cfg.output_root), recorded, written)
                print(*written, sep="\n")
        return min(row.own.metrics["cmmd"].value for row in found)


# --- what it is measured against


def prepare(cfg: DictConfig, subject: Subject, accelerator: Accelerator) -> Evaluation:
    """Open the data, encoded where it is not yet, and choose the captions.

    Raises:
        ConfigError: there are too few held-out pictures, or captions, or the decoder cannot draw from captions.
    """
    own = subject.cfg
    accelerators.allow_tf32(own.precision.tf32)
    device_limits.check_precision(own, accelerator.device)
    weights = build.weights(own)
    use(weights, subject.origins)
    how = _how(cfg, subject, weights)
    splits = distributed.on_all_processes(lambda: build.data(own))
    if (count := known_before(splits, own.validation.fraction)) is not None:
        check_enough(cfg, count)
    for note in distributed.on_all_processes(lambda: build.check_data(own, splits)).notes:
        logger.warning(note)
    stage = build.bare_stage(own, weights)
    settings = ReadSettings(
        build.cache_folder(cfg),
        build.encode_settings(own, stage, accelerator.device),
        own.seed,
        cached=own.data.cache,
        fraction=own.validation.fraction,
        workers=own.data.num_workers,
        by_row=subject.by_row,
    )
    readers = open_readers(replace(splits, class_images=None), stage, settings, accelerator, logger.info)
    weights.release(stage.encoders)
    held_out = readers.held_out
    distributed.on_all_processes(lambda: check_enough(cfg, 0 if held_out is None else len(held_out)))
    assert held_out is not None  # nosec B101 # as was checked
    captioned = some_of(held_out, cfg.num_images or MOST, cfg.seed)
    captions = captioned.captions()
    if empty := sum(not caption for caption in captions):
        raise ConfigError(
            f"data: {empty:,} of {len(captions):,} held-out pictures have no caption to draw from; add them"
        )
    return Evaluation(subject, weights, readers, held_out, captioned, captions, how, accelerator)


def typed_keys() -> list[str]:
    """Those of the command line; none where it is called from Python."""
    if not HydraConfig.initialized():
        return []
    return [word.lstrip("+~").partition("=")[0] for word in HydraConfig.get().overrides.task]


def check_enough(cfg: DictConfig, held_out: int) -> None:
    """Raises ConfigError for fewer held-out pictures than it takes, or than captions are asked for."""
    more = "give more pictures, a larger validation.fraction=, or a validation/ folder"
    if held_out == 0:
        raise ConfigError(f"data: nothing is held out, and what has trained is no measure; {more}")
    if held_out < FEWEST:
        raise ConfigError(f"data: {held_out} pictures are held out, and it takes {FEWEST} to measure; {more}")
    if cfg.num_images is not None and cfg.num_images > held_out:
        raise ConfigError(
            f"num_images: {cfg.num_images:,} is more than the {held_out:,} held-out captions; give at most that"
        )


def known_before(splits: Splits, fraction: float) -> int | None:
    """How many pictures are held out, as far as that is known before they are encoded."""
    if splits.validation is not None:
        return splits.validation.count
    return None if splits.dividable and fraction else 0


def _how(cfg: DictConfig, subject: Subject, weights: Weights) -> tuple[SampleSettings, SampleSettings]:
    """How the prior and the decoder draw."""
    origin = subject.origins["decoder"]
    if decoder_kind(weights, origin) is HINT:
        raise ConfigError(
            "decoder: it draws hints, and captions alone say nothing of it; its runs record validation/hint_f1"
        )
    native = read_object(decoder_folder(weights, origin) / "config.json")["sample_size"] * weights.latent_scale()
    home = origin.run_folder
    trained = None if home is None else saved_config.value(home, "data.resolution")
    multiple = weights.size_multiple()
    size = -(-int(trained or native) // multiple) * multiple
    prior = SampleSettings(cfg.prior_inference_steps, cfg.prior_guidance_scale, cfg.seed, cfg.batch_size)
    decoder = SampleSettings(cfg.inference_steps, cfg.guidance_scale, cfg.seed, cfg.batch_size, size, size)
    return prior, decoder


# --- drawing and measuring


def claimed(cfg: DictConfig, one: Evaluation, title: str, held: contextlib.ExitStack) -> Path:
    """The folder of this evaluation, made where it is not there; one of the same facts is gone on with.

    Args:
        title: what is evaluated.
        held: keeps others out of it.

    Raises:
        ConfigError: it holds another one, or another process is there.
    """
    facts = _facts(cfg, one)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:6]
    folder = files.output_root(cfg.output_root) / "evaluate" / (cfg.name or f"{title}-{digest}")
    known = files.json_object(folder / ABOUT)
    if known is not None and known != facts:
        different = ", ".join(sorted(key for key in facts.keys() | known.keys() if known.get(key) != facts.get(key)))
        raise ConfigError(
            f"name: {folder} holds another evaluation ({different} differ); give another name, or remove it"
        )
    if known is None and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"name: {folder} exists already and is no evaluation; give another name")
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(files.occupied(folder, ".lock", "evaluates in"))
    files.write_atomically(folder / ABOUT, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return folder


def _facts(cfg: DictConfig, one: Evaluation) -> dict[str, Any]:
    """All that the pictures follow from."""
    trained = {
        f"{side} {number}": sorted(folder.glob("*.safetensors"))
        for side, origin in one.subject.origins.items()
        for number, folder in enumerate([origin.network, *(one.folder for one in origin.adapters)])
        if folder is not None
    }
    scales = {side: [one.scale for one in origin.adapters] for side, origin in one.subject.origins.items()}
    keys = ("seed", "guidance_scale", "inference_steps", "prior_guidance_scale", "prior_inference_steps")
    return {
        "weights": one.weights.content(sorted(PARTS)),
        "trained": weight_files.fingerprint(trained, one.weights.cache_folder),
        "adapter_scale": scales,
        "captions": hashlib.sha256(json.dumps(one.captions).encode()).hexdigest(),
        "num_images": len(one.captions),
        "size": one.how[1].width,
        "batch_size": cfg.batch_size,
        "precision": str(one.subject.cfg.precision.frozen_dtype),
        **{key: cfg[key] for key in keys},
    }


def drawn_row(cfg: DictConfig, one: Evaluation, folder: Path, other: PictureEncoder | None) -> Row:
    """Draw and measure a subject; all processes draw, and the first one's row counts."""
    plan, pictures, weights, device = Plan(one.captions), folder / "pictures", one.weights, one.accelerator.device
    facts = distributed.on_main_process(lambda: _checked_job(folder, _facts(cfg, one)))
    pictures.mkdir(parents=True, exist_ok=True)
    networks = Networks(
        lambda: load_network(weights, "prior", one.subject.origins["prior"]),
        lambda: load_network(weights, "decoder", one.subject.origins["decoder"]),
    )
    share = one.accelerator.process_index, one.accelerator.num_processes
    drawing.draw(plan, pictures, weights, networks, one.how, device, share)
    one.accelerator.wait_for_everyone()
    weights.release(PARTS)
    against = Measures(one.readers.train, one.held_out, one.captioned, weights, other, cfg.seed, device)
    about = {**facts, "step": one.subject.step}
    return distributed.on_main_process(lambda: rows.row_of(one.subject.name, plan, pictures, against, about))


def _checked_job(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Of a sweep, of which the folder's own file knows the first job alone."""
    folder.mkdir(parents=True, exist_ok=True)
    known = files.json_object(folder / ABOUT)
    if known is not None and known != facts:
        raise ConfigError(f"name: {folder} holds another evaluation; give another name, or remove it")
    files.write_atomically(folder / ABOUT, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return facts
