"""`kandinsky-exp generate`: images from prompts, pictures and masks, through any pair of a prior and a decoder."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
from omegaconf import DictConfig
from PIL import Image

from kandinsky_exp import build, run_settings
from kandinsky_exp.config import drawing_tasks, saved_config, validation
from kandinsky_exp.data import given_pictures, long_texts
from kandinsky_exp.errors import ConfigError, OutOfMemory, memory_told
from kandinsky_exp.memory import device_limits
from kandinsky_exp.models import hints, inpainting, mixing, pipelines
from kandinsky_exp.models.components import PipelineHalf, read_object
from kandinsky_exp.models.decoder_kinds import HINT, INPAINTING
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.runs.model_sources import ModelSource, decoder_folder, decoder_kind, find_origins, load_network, use
from kandinsky_exp.system import distributed, files, logs, signals
from kandinsky_exp.system.halving import Halving
from kandinsky_exp.system.image_grid import labelled_grid
from kandinsky_exp.tracking import store, store_probe

OUT_OF_MEMORY = "drawing ran out of memory ({}); set precision=bf16, or smaller height and width"
Shown = Sequence[tuple[str, Image.Image]]  # pictures with their labels


@dataclass(frozen=True)
class Given:
    """What the task draws from, as its files hold it; what it does not use is left out.

    Args:
        labels: of the images, one for each: the prompt, or what is mixed.
        hole: of the picture's size, mode L, white where it is drawn anew.
        hint: what the decoder is to draw; `picture` is one whose edges are it.
        mix: texts and pictures; `names` are as they were typed.
        notes: what the user should know of it.
    """

    labels: list[str]
    picture: Image.Image | None = None
    hole: Image.Image | None = None
    hint: Image.Image | None = None
    mix: Sequence[str | Image.Image] = ()
    weights: Sequence[float] = ()
    names: Sequence[str] = ()
    notes: Sequence[str] = ()


def generate(cfg: DictConfig) -> float:
    """Draw `num_images` for every prompt, or of the mix, and write them with a labelled grid.

    Returns:
        The number of images (Hydra jobs return numbers).

    Raises:
        ConfigError: a source is none, or does not fit its side, or the task cannot be drawn.
    """
    validation.validate(cfg, "generate")
    logs.quiet_libraries()
    with signals.stop_signals(), distributed.accelerated(lambda: build.accelerator(cfg)) as accelerator:
        device_limits.check_precision(cfg, accelerator.device)
        given = read_given(cfg)
        origins = find_origins(cfg)
        files.make_root(files.output_root(cfg.output_root))
        run_to_log = find_run_to_log(cfg, origins) if cfg.log_to_run else None
        weights = build.weights(cfg)
        use(weights, origins)
        settings = decoder_settings(cfg, weights, origins["decoder"], given)
        with memory_told(OutOfMemory, OUT_OF_MEMORY):
            images = draw(cfg, weights, origins, given, settings, accelerator.device)
        folder = write(cfg, images, given.labels, inputs_shown(given, settings))
        if run_to_log is not None:
            client, _ = store.connect(store.chosen_uri(cfg.tracker.uri, cfg.output_root))
            client.log_artifacts(run_to_log, str(folder), f"generate/{folder.name}")
        print(folder)
    return float(len(images))


# --- what is drawn from


def read_given(cfg: DictConfig) -> Given:
    """The texts and pictures that the settings name.

    Raises:
        ConfigError: a file is no picture, or a mask that cannot be used.
    """
    if cfg.task == "mix":
        return _read_mix(cfg)
    given = Given([prompt for prompt in run_settings.prompts(cfg.prompts) for _ in range(cfg.num_images)])
    if cfg.image is not None:
        given = replace(given, picture=given_pictures.open_picture("image", cfg.image))
    if cfg.mask is not None and given.picture is not None:
        hole, notes = given_pictures.open_hole("mask", cfg.mask, given.picture.size)
        given = replace(given, hole=hole, notes=notes)
    if cfg.hint is not None:
        given = replace(given, hint=given_pictures.open_picture("hint", cfg.hint))
    return given


def _read_mix(cfg: DictConfig) -> Given:
    names = [str(entry) for entry in cfg.mix]
    weights = [1.0] * len(names) if cfg.mix_weights is None else [float(weight) for weight in cfg.mix_weights]
    mix = [given_pictures.open_picture("mix", name) if files.is_file(name) else name for name in names]
    shares = zip(mixing.shares(weights), names, strict=True)
    label = " + ".join(f"{share:.2g} {Path(name).name if files.is_file(name) else name}" for share, name in shares)
    return Given([label] * cfg.num_images, mix=mix, weights=weights, names=names)


def decoder_settings(cfg: DictConfig, weights: Weights, origin: ModelSource, given: Given) -> pipelines.SampleSettings:
    """How the decoder draws, with the pictures in the size that is drawn. Nothing is loaded.

    Raises:
        ConfigError: the decoder cannot draw this size or this task.
    """
    multiple = weights.size_multiple()
    wrong = [
        f"{key}: has to be a multiple of {multiple} for this decoder, not {cfg[key]}"
        for key in ("height", "width")
        if cfg[key] is not None and cfg[key] % multiple
    ]
    kind = {"inpaint": INPAINTING, "control": HINT}.get(cfg.task)
    if kind is not None and decoder_kind(weights, origin) is not kind:
        wrong.append(
            f"decoder: {origin.network or origin.base} is not {kind.told}, which task={cfg.task} needs; give one, "
            f"decoder=<a run with model={kind.model}>, or the published one, weights=kandinsky22_{kind.model}"
        )
    if wrong:
        raise ConfigError(wrong)
    native = read_object(decoder_folder(weights, origin) / "config.json")["sample_size"] * weights.latent_scale()
    size = cfg.width or native, cfg.height or native
    hint = None if given.hint is None else given_pictures.shaped(given.hint, size)
    if cfg.task == "control" and given.picture is not None:
        width, height = (side // weights.latent_scale() * hints.SCALE for side in size)
        hint = given_pictures.edges_of(given.picture, (width, height))
    return pipelines.SampleSettings(
        inference_steps=cfg.inference_steps,
        guidance_scale=cfg.guidance_scale,
        seed=cfg.seed,
        width=size[0],
        height=size[1],
        picture=None if given.picture is None else given_pictures.fitted(given.picture, size),
        hole=None if given.hole is None else given_pictures.fitted_hole("mask", given.hole, size),
        hint=hint,
        strength=drawing_tasks.strength_of(cfg.strength) if cfg.task == "image" else None,
    )


def find_run_to_log(cfg: DictConfig, origins: Mapping[PipelineHalf, ModelSource]) -> str:
    """The MLflow run that trained the decoder, or else the prior; its store answers."""
    run_id = origins["decoder"].trained_by or origins["prior"].trained_by
    if run_id is None:
        raise ConfigError("log_to_run: neither the prior nor the decoder comes from an MLflow run; leave it off")
    store_probe.probe(store.chosen_uri(cfg.tracker.uri, cfg.output_root))
    return run_id


# --- drawing


@torch.no_grad()
def draw(
    cfg: DictConfig,
    weights: Weights,
    origins: Mapping[PipelineHalf, ModelSource],
    given: Given,
    settings: pipelines.SampleSettings,
    device: torch.device,
) -> list[Image.Image]:
    """All images: every prompt through the prior first, then every embedding through the decoder."""
    texts = [("mix", text) for text in given.mix if isinstance(text, str)]
    texts = texts if given.mix else [("prompts", prompt) for prompt in given.labels]
    asked = [*texts, ("negative_prompt", cfg.negative_prompt or "")]
    for note in [*given.notes, *long_texts.prompt_notes(weights.load("tokenizer"), asked)]:
        print(note, file=sys.stderr)
    embeds = embed(cfg, weights, origins["prior"], given, device)
    network = load_network(weights, "decoder", origins["decoder"]).to(device)
    with weights.lent(("movq",), device):
        pipeline = pipelines.decoder_pipeline(weights, network)
        return Halving("the decoder", settings.batch_size).run(
            lambda size: pipelines.decode(pipeline, embeds, replace(settings, batch_size=size))
        )


def embed(
    cfg: DictConfig, weights: Weights, origin: ModelSource, given: Given, device: torch.device
) -> pipelines.Embeds:
    """The image embeddings of all images, and those to guide away from."""
    settings = pipelines.SampleSettings(
        inference_steps=cfg.prior_inference_steps,
        guidance_scale=cfg.prior_guidance_scale,
        seed=cfg.seed,
        negative_prompt=cfg.negative_prompt or None,
    )
    network = load_network(weights, "prior", origin).to(device)
    with weights.lent(("text_encoder", "image_encoder"), device):
        pipeline = pipelines.prior_pipeline(weights, network)

        def work(size: int) -> pipelines.Embeds:
            how = replace(settings, batch_size=size)
            if given.mix:
                return mixing.embed_mix(pipeline, given.mix, given.weights, len(given.labels), how)
            return pipelines.embed_prompts(pipeline, given.labels, how)

        embeds = Halving("the prior", settings.batch_size).run(work)
    network.to("cpu")
    return embeds


# --- what is left


def inputs_shown(given: Given, settings: pipelines.SampleSettings) -> Shown:
    """The pictures that were drawn from, as they were: in the size that is drawn."""
    size = settings.width, settings.height
    shown = [] if settings.picture is None else [("original", settings.picture)]
    if settings.picture is not None and settings.hole is not None:
        shown.append(("hole", inpainting.hole_shown(settings.picture, settings.hole)))
    if settings.hint is not None:
        shown.append(("hint", settings.hint.resize(size, Image.Resampling.BOX)))
    if shown:
        return shown
    return [
        (Path(name).name, given_pictures.fitted(entry, size))
        for name, entry in zip(given.names, given.mix, strict=True)
        if not isinstance(entry, str)
    ]


def write(cfg: DictConfig, images: list[Image.Image], labels: list[str], inputs: Shown) -> Path:
    """The images, a grid of what they were drawn from and of them, and the settings, in a folder of their own."""
    root = files.output_root(cfg.output_root) / "generate"
    folder = files.fresh_folder(root, cfg.name or f"{datetime.now():%Y%m%d-%H%M%S}")
    for index, image in enumerate(images):
        image.save(folder / f"{index:02d}.png")
    pictures, names = [*(picture for _, picture in inputs), *images], [*(name for name, _ in inputs), *labels]
    columns = max(len(inputs) + 1, math.ceil(math.sqrt(len(pictures)))) if inputs else None  # inputs in the first row
    labelled_grid(pictures, names, columns).save(folder / "grid.png")
    lines = [f"{index:02d}.png\t{label}" for index, label in enumerate(labels)]
    files.write_atomically(folder / "prompts.txt", "\n".join(lines) + "\n")
    files.write_atomically(folder / "config.yaml", saved_config.to_yaml(cfg))
    return folder
