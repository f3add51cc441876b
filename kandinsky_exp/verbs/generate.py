"""`kandinsky-exp generate`: images from prompts, through any pair of a prior and a decoder."""

import sys
from dataclasses import replace
from datetime import datetime

import torch
from omegaconf import DictConfig
from PIL import Image

from kandinsky_exp import build, run_settings
from kandinsky_exp.config import saved_config, validation
from kandinsky_exp.data import long_texts
from kandinsky_exp.errors import ConfigError, OutOfMemory, memory_told
from kandinsky_exp.memory import device_limits
from kandinsky_exp.models import pipelines
from kandinsky_exp.models.components import PipelineHalf
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.runs.model_sources import ModelSource, find_origins, load_network, use
from kandinsky_exp.system import distributed, files, logs, signals
from kandinsky_exp.system.halving import Halving
from kandinsky_exp.system.image_grid import labelled_grid
from kandinsky_exp.tracking import store, store_probe

OUT_OF_MEMORY = "drawing ran out of memory ({}); set precision=bf16, or smaller height and width"


def generate(cfg: DictConfig) -> float:
    """Draw `num_images` for every prompt and write them with a labelled grid.

    Returns:
        The number of images (Hydra jobs return numbers).

    Raises:
        ConfigError: a source is none, or does not fit its side.
    """
    validation.validate(cfg, "generate")
    logs.quiet_libraries()
    with signals.stop_signals(), distributed.accelerated(lambda: build.accelerator(cfg)) as accelerator:
        device_limits.check_precision(cfg, accelerator.device)
        prompts = [prompt for prompt in run_settings.prompts(cfg.prompts) for _ in range(cfg.num_images)]
        origins = find_origins(cfg)
        files.make_root(files.output_root(cfg.output_root))
        run_to_log = find_run_to_log(cfg, origins) if cfg.log_to_run else None
        weights = build.weights(cfg)
        use(weights, origins)
        with memory_told(OutOfMemory, OUT_OF_MEMORY):
            images = draw(cfg, weights, origins, prompts, accelerator.device)
        root = files.output_root(cfg.output_root) / "generate"
        folder = files.fresh_folder(root, cfg.name or f"{datetime.now():%Y%m%d-%H%M%S}")
        for index, image in enumerate(images):
            image.save(folder / f"{index:02d}.png")
        labelled_grid(images, prompts).save(folder / "grid.png")
        lines = [f"{index:02d}.png\t{prompt}" for index, prompt in enumerate(prompts)]
        files.write_atomically(folder / "prompts.txt", "\n".join(lines) + "\n")
        files.write_atomically(folder / "config.yaml", saved_config.to_yaml(cfg))
        if run_to_log is not None:
            client, _ = store.connect(store.chosen_uri(cfg.tracker.uri, cfg.output_root))
            client.log_artifacts(run_to_log, str(folder), f"generate/{folder.name}")
        print(folder)
    return float(len(images))


@torch.no_grad()
def draw(
    cfg: DictConfig,
    weights: Weights,
    origins: dict[PipelineHalf, ModelSource],
    prompts: list[str],
    device: torch.device,
) -> list[Image.Image]:
    """All images: every prompt through the prior first, then every embedding through the decoder."""
    multiple = weights.size_multiple()
    wrong = [
        f"{key}: has to be a multiple of {multiple} for this decoder, not {cfg[key]}"
        for key in ("height", "width")
        if cfg[key] is not None and cfg[key] % multiple
    ]
    if wrong:
        raise ConfigError(wrong)
    asked = [("prompts", prompt) for prompt in prompts] + [("negative_prompt", cfg.negative_prompt or "")]
    for note in long_texts.prompt_notes(weights.load("tokenizer"), asked):
        print(note, file=sys.stderr)
    prior = pipelines.SampleSettings(
        inference_steps=cfg.prior_inference_steps, guidance_scale=cfg.prior_guidance_scale, seed=cfg.seed
    )
    network = load_network(weights, "prior", origins["prior"]).to(device)
    with weights.lent(("text_encoder", "image_encoder"), device):
        pipeline, negative = pipelines.prior_pipeline(weights, network), cfg.negative_prompt or None
        embeds = Halving("the prior", prior.batch_size).run(
            lambda size: pipelines.embed_prompts(pipeline, prompts, replace(prior, batch_size=size), negative)
        )
        del pipeline  # it holds the parts
    network.to("cpu")
    network = load_network(weights, "decoder", origins["decoder"]).to(device)
    with weights.lent(("movq",), device):
        side = network.config.sample_size * weights.latent_scale()
        settings = pipelines.SampleSettings(
            inference_steps=cfg.inference_steps,
            guidance_scale=cfg.guidance_scale,
            seed=cfg.seed,
            height=cfg.height or side,
            width=cfg.width or side,
        )
        pipeline = pipelines.decoder_pipeline(weights, network)
        return Halving("the decoder", settings.batch_size).run(
            lambda size: pipelines.decode(pipeline, embeds, replace(settings, batch_size=size))
        )


def find_run_to_log(cfg: DictConfig, origins: dict[PipelineHalf, ModelSource]) -> str:
    """The MLflow run that trained the decoder, or else the prior; its store answers."""
    run_id = origins["decoder"].trained_by or origins["prior"].trained_by
    if run_id is None:
        raise ConfigError("log_to_run: neither the prior nor the decoder comes from an MLflow run; leave it off")
    store_probe.probe(store.chosen_uri(cfg.tracker.uri, cfg.output_root))
    return run_id
