"""`kandinsky-exp evaluate`: is it better? Pictures of held-out captions, measured against real ones."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from kandinsky_exp import build
from kandinsky_exp.config import saved_config, validation
from kandinsky_exp.data import long_texts
from kandinsky_exp.errors import ConfigError, OutOfMemory, UserError, memory_told
from kandinsky_exp.evaluation import drawing, report, rows
from kandinsky_exp.evaluation.drawing import Networks, Plan
from kandinsky_exp.evaluation.encoders import FolderEncoder, PictureEncoder
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
from kandinsky_exp.run_settings import FEWEST
from kandinsky_exp.runs.model_sources import decoder_folder, decoder_kind, load_network, use
from kandinsky_exp.runs.subjects import Subject, find_subjects
from kandinsky_exp.system import accelerators, distributed, files, logs, signals
from kandinsky_exp.tracking import store, store_probe
from kandinsky_exp.training.feature_loader import Readers, open_readers
from kandinsky_exp.training.feature_reader import FeatureReader, ReadSettings

OUT_OF_MEMORY = "evaluating ran out of memory ({}); set precision=bf16, or a smaller batch_size"
MOST = 256  # captions, unless num_images says otherwise
ABOUT, PICTURES, LOCK = "evaluation.json", "pictures", ".lock"  # what the pictures follow from; their folder; its lock
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
    notes: list[str]


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
        if is_recorded := cfg.tracker.name != "none" and any(subject.run_id for subject in subjects):
            uri = store.chosen_uri(cfg.tracker.uri, cfg.output_root)
            distributed.on_main_process(lambda: store_probe.probe(uri))
        with logs.logging_to(None, accelerator.is_main_process), memory_told(OutOfMemory, OUT_OF_MEMORY):
            folder, measured = measure_all(cfg, subjects, notes, other, accelerator, held)
            if accelerator.is_main_process:
                found = [row for _, row in measured]
                written = report.write(folder, folder.name, found, list(dict.fromkeys(notes)))
                if is_recorded:
                    record(uri, [(one.run_id, one.step, row) for one, row in measured if one.run_id], written)
                print(*written, sep="\n")
        return min(row.own.metrics["cmmd"].value for _, row in measured)


def measure_all(
    cfg: DictConfig,
    subjects: list[Subject],
    notes: list[str],
    other: PictureEncoder | None,
    accelerator: Accelerator,
    held: contextlib.ExitStack,
) -> tuple[Path, list[tuple[Subject, Row]]]:
    """The folder, and a row for each model; of several, one that cannot be measured is left out, and named in `notes`.

    Raises:
        UserError: none can be measured.
    """
    folder: Path | None = None
    found = []
    for subject in subjects:
        try:
            one = prepare(cfg, subject, accelerator)
        except UserError as error:
            if len(subjects) == 1:
                raise
            notes.append(f"{subject.name} is left out: {error}")
            logger.warning(notes[-1])
            continue
        notes += one.notes
        facts = distributed.on_main_process(partial(drawn_from, cfg, one))
        title = subject.name if len(subjects) == 1 else Path(cfg.run).name
        folder = folder or distributed.on_main_process(partial(claimed, cfg, title, facts, held))
        place = folder if len(subjects) == 1 else folder / subject.name
        found.append((subject, drawn_row(one, facts, place, other)))
    if folder is None:
        raise ConfigError(f"run: no job of {cfg.run} can be measured; {notes[-1]}")
    return folder, found


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
    if (count := splits.known_held_out(own.validation.fraction)) is not None:
        check_enough(cfg, count)
    notes = list(distributed.on_all_processes(lambda: build.check_data(own, splits)).notes)
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
    notes += [*readers.notes, *long_texts.captions_note(weights.load("tokenizer"), captions)]
    if len(captions) < len(held_out):
        notes.append(f"{len(captions):,} of {len(held_out):,} held-out captions were drawn (num_images)")
    if len(held_out) > rows.MOST_REAL:
        notes.append(f"{rows.MOST_REAL:,} of {len(held_out):,} held-out pictures were measured, drawn by the seed")
    for note in notes:
        logger.warning(note)
    return Evaluation(subject, weights, readers, held_out, captioned, captions, how, accelerator, notes)


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


def _how(cfg: DictConfig, subject: Subject, weights: Weights) -> tuple[SampleSettings, SampleSettings]:
    """How the prior and the decoder draw."""
    origin = subject.origins["decoder"]
    if decoder_kind(weights, origin) is HINT:
        raise ConfigError(
            "decoder: it draws hints, and captions alone say nothing of it; its runs record validation/hint_f1"
        )
    native = read_object(decoder_folder(weights, origin) / "config.json")["sample_size"] * weights.latent_scale()
    home = origin.run_folder
    trained = "" if home is None else saved_config.value(home, "data.resolution") or ""
    multiple = weights.size_multiple()
    size = -(-(int(trained) if trained.isdigit() else native) // multiple) * multiple
    prior = SampleSettings(cfg.prior_inference_steps, cfg.prior_guidance_scale, cfg.seed, cfg.batch_size)
    decoder = SampleSettings(cfg.inference_steps, cfg.guidance_scale, cfg.seed, cfg.batch_size, size, size)
    return prior, decoder


# --- drawing and measuring


def claimed(cfg: DictConfig, title: str, facts: Mapping[str, Any], held: contextlib.ExitStack) -> Path:
    """The folder of all that is evaluated, made where it is not there, and kept to this process.

    Args:
        title: what is evaluated.
        facts: of the first model.
        held: gives it back.

    Raises:
        ConfigError: something else is there, or another process.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:6]
    folder = files.output_root(cfg.output_root) / "evaluate" / (cfg.name or f"{title}-{digest}")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LOCK).exists():
        raise ConfigError(f"name: {folder} exists already and is no evaluation; give another name")
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(files.occupied(folder, LOCK, "evaluates in"))
    return folder


def check_place(folder: Path, facts: dict[str, Any]) -> None:
    """A model's own folder: what was drawn there before was drawn from the same facts.

    Raises:
        ConfigError: it was not.
    """
    known = files.json_object(folder / ABOUT)
    if known is not None and known != facts:
        different = ", ".join(sorted(key for key in facts.keys() | known.keys() if known.get(key) != facts.get(key)))
        raise ConfigError(
            f"name: {folder} holds another evaluation ({different} differ); give another name, or remove it"
        )
    (folder / PICTURES).mkdir(parents=True, exist_ok=True)
    files.write_atomically(folder / ABOUT, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def drawn_from(cfg: DictConfig, one: Evaluation) -> dict[str, Any]:
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


def drawn_row(one: Evaluation, facts: dict[str, Any], folder: Path, other: PictureEncoder | None) -> Row:
    """Draw and measure a subject; all processes draw, and the first one's row counts."""
    plan, pictures, weights, device = Plan(one.captions), folder / PICTURES, one.weights, one.accelerator.device
    distributed.on_main_process(lambda: check_place(folder, facts))
    networks = Networks(
        lambda: load_network(weights, "prior", one.subject.origins["prior"]),
        lambda: load_network(weights, "decoder", one.subject.origins["decoder"]),
    )
    share = one.accelerator.process_index, one.accelerator.num_processes
    drawing.draw(plan, pictures, weights, networks, one.how, device, share)
    one.accelerator.wait_for_everyone()
    weights.release(PARTS)
    seed = one.how[1].seed
    against = Measures(one.readers.train, one.held_out, one.captioned, weights, other, seed, device)
    about = {**facts, "step": one.subject.step}
    return distributed.on_main_process(lambda: rows.row_of(one.subject.name, plan, pictures, against, about))
