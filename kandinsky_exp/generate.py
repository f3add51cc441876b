"""`kandinsky-exp generate`: images from prompts, through any pair of a prior and a decoder."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from PIL import Image
from safetensors import SafetensorError

from kandinsky_exp import (
    adapters,
    architectures,
    build,
    config,
    mlflow_names,
    pipelines,
    processes,
    saved_config,
    store,
    tracking,
    weight_files,
    workspace,
)
from kandinsky_exp.errors import ConfigError, first_line
from kandinsky_exp.grid import labelled_grid
from kandinsky_exp.parts import PARTS, Side, check_source, is_hub_id
from kandinsky_exp.weight_files import untrusted
from kandinsky_exp.weights import Weights

logger = logging.getLogger(__name__)
RUN_ID = re.compile(r"[0-9a-f]{32}")
NETWORK: dict[Side, str] = {"prior": "prior", "decoder": "unet"}


@dataclass(frozen=True)
class Origin:
    """What one side is made of.

    Args:
        base: a source as `Weights` takes it.
        network: folder of the trained network or adapter that goes in, None for the base's own.
        run_id: MLflow run that trained it.
        run_folder: of the run that trained it.
        revision: of a base on the hub that a run started from.
    """

    base: str
    network: Path | None = None
    run_id: str | None = None
    run_folder: Path | None = None
    revision: str | None = None


def generate(cfg: DictConfig) -> float:
    """Draw `num_images` for every prompt and write them with a labelled grid.

    Returns:
        The number of images (Hydra jobs return numbers).

    Raises:
        ConfigError: a source is none, or does not fit its side.
    """
    config.validate(cfg)
    processes.quiet_libraries()
    with processes.stop_signals():
        prompts = [prompt for prompt in build.prompts(cfg.prompts) for _ in range(cfg.num_images)]
        origins = find_origins(cfg)
        weights = build.weights(cfg)
        weights.prior, weights.decoder = origins["prior"].base, origins["decoder"].base
        weights.prior_revision = origins["prior"].revision or weights.prior_revision
        weights.decoder_revision = origins["decoder"].revision or weights.decoder_revision
        workspace.make_root(Path(cfg.output_root).expanduser())
        run_to_log = find_run_to_log(cfg, origins) if cfg.log_to_run else None
        check_networks(weights, origins)
        images = draw(cfg, weights, origins, prompts)
        folder = fresh_folder(cfg)
        grid = labelled_grid(images, prompts)
        for index, image in enumerate(images):
            image.save(folder / f"{index:02d}.png")
        grid.save(folder / "grid.png")
        lines = [f"{index:02d}.png\t{prompt}" for index, prompt in enumerate(prompts)]
        workspace.write_atomically(folder / "prompts.txt", "\n".join(lines) + "\n")
        workspace.write_atomically(folder / "config.yaml", config.to_yaml(cfg))
        if run_to_log is not None:
            log_to_run(cfg, run_to_log, folder)
        print(folder)
    return float(len(images))


def find_origins(cfg: DictConfig) -> dict[Side, Origin]:
    """Both sides. One that is not given is what the other's run started from, or else the `weights` group's."""
    given: dict[Side, Origin] = {side: find_origin(cfg, side, cfg[side]) for side in NETWORK if cfg[side] is not None}
    partners = [origin.run_folder for origin in given.values() if origin.run_folder is not None]
    for side in NETWORK:
        if side not in given:
            source = source_of(partners[0], side) if partners else cfg.weights[side]
            revision = saved_config.value(partners[0], f"weights.{side}_revision") if partners else None
            given[side] = replace(find_origin(cfg, side, source), revision=revision)
    return given


def find_origin(cfg: DictConfig, side: Side, source: str) -> Origin:
    """Tell a run folder, a checkpoint, an MLflow run id, a hub id and a diffusers folder apart."""
    if source == "tiny" or is_hub_id(source):
        return Origin(source)
    run_id = None
    if RUN_ID.fullmatch(source) and not Path(source).exists():
        run_id, source = source, folder_of_run(cfg, source, side)
    folder = Path(source).expanduser()
    run_folder = folder if (folder / workspace.RECORD).is_file() else folder.parent.parent
    record = workspace.read_record(run_folder)
    if record is None or (folder / "model_index.json").is_file():
        return Origin(checked(source, side))
    run_id = run_id or record.run_id
    if folder == run_folder and (folder / "pipeline").is_dir() and check_source(source, side) is None:
        return Origin(source, None, run_id, run_folder)
    base = checked(source_of(run_folder, side), side)
    revision = saved_config.value(run_folder, f"weights.{side}_revision")
    return Origin(base, trained_network(folder, side), run_id, run_folder, revision)


def checked(source: str, side: Side) -> str:
    problem = check_source(source, side)
    if problem is not None:
        raise ConfigError(f"{side}: {problem}")
    return source


def trained_network(folder: Path, side: Side) -> Path:
    """The network or adapter in a run folder or checkpoint.

    Raises:
        ConfigError: it holds the other stage, or nothing yet.
    """
    name = NETWORK[side]
    # A checkpoint's averaged weights are what its run validates with and would leave behind.
    for candidate in (folder / "adapter", folder / f"{name}_ema", folder / name):
        if candidate.is_dir() and (candidate.name != "adapter" or stage_of(folder) == side):
            if problem := untrusted(candidate):
                raise ConfigError(f"{side}: {folder}: {problem}")
            return candidate
    hint = "give a step-… folder inside checkpoints/, or wait until the run is finished"
    raise ConfigError(f"{side}: {folder} holds no trained {side}; {hint}")


def stage_of(run_folder: Path) -> str:
    return "prior" if (saved_config.value(run_folder, "model._target_") or "").endswith("PriorStage") else "decoder"


def source_of(run_folder: Path, side: Side) -> str:
    """The weights that a run started from."""
    source = saved_config.value(run_folder, f"weights.{side}")
    if source is None:
        raise ConfigError(f"{run_folder / 'config.yaml'} has no weights.{side}; mend it, or give other sources")
    return source


def folder_of_run(cfg: DictConfig, run_id: str, side: Side) -> str:
    """The folder of an MLflow run, which its tags name."""
    from mlflow.exceptions import MlflowException

    uri = str(cfg.tracker.uri or tracking.default_uri(cfg.output_root))
    tracking.probe(uri)
    client, _ = store.connect(uri)
    try:
        folder = client.get_run(run_id).data.tags.get("run_folder")
    except MlflowException as error:
        raise ConfigError(
            f"{side}: the store {mlflow_names.masked(uri)} has no run {run_id}; set tracker.uri"
        ) from error
    if folder is None or not Path(folder).is_dir():
        raise ConfigError(f"{side}: the folder of run {run_id} ({folder}) is not on this machine; give a folder")
    return str(folder)


def check_networks(weights: Weights, origins: dict[Side, Origin]) -> None:
    """Both sides before the first of them draws.

    Raises:
        ConfigError: a part cannot be fetched, a file is damaged, or what should work together does not fit.
    """
    trained = {}
    for side, origin in origins.items():
        if origin.network is not None and (origin.network / adapters.WEIGHTS_NAME).is_file():
            if (problem := weight_files.damaged(origin.network)) is not None:
                raise ConfigError(f"{side}: {origin.network} cannot be loaded: {problem}; give another")
        elif origin.network is not None:
            trained[NETWORK[side]] = origin.network
    architectures.check(weights, set(PARTS), trained, keys="{side}")


@torch.no_grad()
def draw(cfg: DictConfig, weights: Weights, origins: dict[Side, Origin], prompts: list[str]) -> list[Image.Image]:
    """All images: every prompt through the prior first, then every embedding through the decoder."""
    multiple = weights.size_multiple()
    wrong = [
        f"{key}: has to be a multiple of {multiple} for this decoder, not {cfg[key]}"
        for key in ("height", "width")
        if cfg[key] is not None and cfg[key] % multiple
    ]
    if wrong:
        raise ConfigError(wrong)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prior = pipelines.SampleSettings(
        inference_steps=cfg.prior_inference_steps, guidance_scale=cfg.prior_guidance_scale, seed=cfg.seed
    )
    prior_net = load_network(weights, "prior", origins["prior"])
    with placed(weights, ("text_encoder", "image_encoder"), prior_net, device) as net:
        embeds = pipelines.embed_prompts(
            pipelines.prior_pipeline(weights, net), prompts, prior, negative_prompt=cfg.negative_prompt or None
        )
    weights.release(("text_encoder", "image_encoder"))
    decoder_net = load_network(weights, "decoder", origins["decoder"])
    with placed(weights, ("movq",), decoder_net, device) as net:
        side = net.config.sample_size * 2 ** (len(weights.load("movq").config.block_out_channels) - 1)
        settings = pipelines.SampleSettings(
            inference_steps=cfg.inference_steps,
            guidance_scale=cfg.guidance_scale,
            seed=cfg.seed,
            height=cfg.height or side,
            width=cfg.width or side,
        )
        return pipelines.decode(pipelines.decoder_pipeline(weights, net), embeds, settings)


@contextmanager
def placed(weights: Weights, parts: tuple[str, ...], network: Any, device: str) -> Iterator[Any]:
    """A network and the frozen parts that it works with, on the device for the time being."""
    network.to(device)
    with weights.on_device(parts, device):
        yield network
    network.to("cpu")


def load_network(weights: Weights, side: Side, origin: Origin) -> Any:
    """The base network, or the trained one in its place, or the base with an adapter."""
    name = NETWORK[side]
    if origin.network is None:
        return weights.load(name)
    try:
        if (origin.network / adapters.WEIGHTS_NAME).is_file():
            network = weights.load(name)
            network.load_lora_adapter(origin.network, weight_name=adapters.WEIGHTS_NAME, prefix=None)
            return network
        return weights.read_model(name, origin.network)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{side}: {origin.network} cannot be loaded: {first_line(error)}") from error


def fresh_folder(cfg: DictConfig) -> Path:
    root = Path(cfg.output_root).expanduser().absolute() / "generate"
    name = cfg.name or f"{datetime.now():%Y%m%d-%H%M%S}"
    for suffix in ("", *(f"-{count}" for count in range(2, 1000))):
        folder = root / f"{name}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"output_root: {root} cannot be written ({error.strerror}); choose another") from error
        return folder
    raise ConfigError(f"name: a thousand folders are called {name}; choose another")


def find_run_to_log(cfg: DictConfig, origins: dict[Side, Origin]) -> str:
    """The MLflow run that trained the decoder, or else the prior; its store answers."""
    run_id = origins["decoder"].run_id or origins["prior"].run_id
    if run_id is None:
        raise ConfigError("log_to_run: neither the prior nor the decoder comes from an MLflow run; leave it off")
    tracking.probe(str(cfg.tracker.uri or tracking.default_uri(cfg.output_root)))
    return run_id


def log_to_run(cfg: DictConfig, run_id: str, folder: Path) -> None:
    client, _ = store.connect(str(cfg.tracker.uri or tracking.default_uri(cfg.output_root)))
    client.log_artifacts(run_id, str(folder), f"generate/{folder.name}")
