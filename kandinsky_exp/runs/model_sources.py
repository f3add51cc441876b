"""What the two sides of Kandinsky are made of, as a user names it: bases, trained networks, adapters."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig
from safetensors import SafetensorError

from kandinsky_exp.config import saved_config
from kandinsky_exp.errors import ConfigError, cut, first_line
from kandinsky_exp.models import adapter_files, adapter_tensors, compatibility
from kandinsky_exp.models.adapter_files import HINT_BLOCK
from kandinsky_exp.models.components import NETWORKS, PARTS, SHIPPED, PipelineHalf, check_source, is_hub_id, read_object
from kandinsky_exp.models.decoder_kinds import HINT, INPAINTING, PLAIN, DecoderKind, kind_of
from kandinsky_exp.models.weight_files import passed_over, untrusted
from kandinsky_exp.models.weights import Weights, fetched
from kandinsky_exp.runs.lookup import located, names_of, no_adapter, recorded_id, run_of, source_of, trained_network

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Adapter:
    """An adapter that was trained.

    Args:
        folder: that holds its file.
        side: whose network it was trained for.
        run_folder, run_id: of the run that trained it, where that is known.
        scale: what its own scale is multiplied by.
    """

    folder: Path
    side: PipelineHalf
    run_folder: Path | None = None
    run_id: str | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class ModelSource:
    """What one side is made of.

    Args:
        base: a source as `Weights` takes it.
        network: folder of the trained network that goes in, None for the base's own.
        adapters: that go onto it.
        run_id: MLflow run that trained it.
        run_folder: of the run that trained it.
        revision: of a base on the hub that a run started from.
        variant: of the base's files.
    """

    base: str
    network: Path | None = None
    adapters: tuple[Adapter, ...] = ()
    run_id: str | None = None
    run_folder: Path | None = None
    revision: str | None = None
    variant: str | None = None

    @property
    def trained_by(self) -> str | None:
        """The MLflow run that made what is drawn with, where one did: its last adapter's, or else its network's."""
        return next((one.run_id for one in reversed(self.adapters) if one.run_id is not None), self.run_id)


def find_origins(cfg: DictConfig) -> dict[PipelineHalf, ModelSource]:
    """Both sides of `generate`'s config.

    One that is not given is what its adapter's run started from, or else the other side's run, or else the `weights`
    group's.
    """
    loose = {
        side: [find_adapter(cfg, f"{side}_adapter", text, side) for text in names_of(cfg[f"{side}_adapter"])]
        for side in NETWORKS
    }
    found: dict[PipelineHalf, ModelSource] = {
        side: find_origin(cfg, side, cfg[side]) for side in NETWORKS if cfg[side] is not None
    }
    for side in NETWORKS:
        for adapter in loose[side]:
            if adapter.side != side:
                other = f"{adapter.side}_adapter"
                raise ConfigError(f"{side}_adapter: {adapter.folder} is of the {adapter.side}; give it as {other}=")
    homes = {side: [one.run_folder for one in loose[side]] for side in NETWORKS}
    partners = [origin.run_folder for origin in found.values()] + homes["prior"] + homes["decoder"]
    for side in NETWORKS:
        if side not in found:
            found[side] = started_from(cfg, [*homes[side], *partners], side)
    both = {side: replace(found[side], adapters=(*found[side].adapters, *loose[side])) for side in NETWORKS}
    return scaled(both, cfg.adapter_scale)


def started_from(cfg: DictConfig, runs: Iterable[Path | None], side: PipelineHalf) -> ModelSource:
    """What the first run that is known started from on a side, or else the `weights` group's."""
    run_folder = next((folder for folder in runs if folder is not None), None)
    if run_folder is None:
        return find_origin(cfg, side, cfg.weights[side])
    variant = saved_config.value(run_folder, "weights.variant")
    found = find_origin(cfg, side, source_of(run_folder, side), cfg.weights.variant or variant)
    return replace(found, revision=saved_config.value(run_folder, f"weights.{side}_revision"), variant=variant)


def scaled(origins: Mapping[PipelineHalf, ModelSource], scale: Any) -> dict[PipelineHalf, ModelSource]:
    """The same with `adapter_scale`: a number for all adapters, or one for each, the prior's first.

    Raises:
        ConfigError: there are other numbers of adapters and scales.
    """
    count = sum(len(origin.adapters) for origin in origins.values())
    scales = [float(one) for one in scale] if isinstance(scale, ListConfig) else [float(scale)] * count
    if count == 0 and scale != 1:
        raise ConfigError("adapter_scale: is set, but there is no adapter; give prior_adapter= or decoder_adapter=")
    if len(scales) != count:
        raise ConfigError(
            f"adapter_scale: {len(scales)} for {count} adapters; give one number for all, or one for each"
        )
    rest = iter(scales)
    return {
        side: replace(origins[side], adapters=tuple(replace(one, scale=next(rest)) for one in origins[side].adapters))
        for side in NETWORKS
        if side in origins
    }


def find_origin(cfg: DictConfig, side: PipelineHalf, source: str, variant: str | None = None) -> ModelSource:
    """Tell a run folder, a checkpoint, a sweep, an MLflow run id, a hub id and a diffusers folder apart.

    Args:
        variant: of a diffusers folder's files, None = `weights.variant`.
    """
    if source in SHIPPED or is_hub_id(source):
        return ModelSource(checked(source, side, variant))
    folder = located(cfg, side, source, side)
    run_folder = run_of(folder)
    if run_folder is None or (folder / "model_index.json").is_file():
        return ModelSource(checked(str(folder), side, variant or cfg.weights.variant))
    run_id = recorded_id(run_folder)
    if folder == run_folder and (folder / "pipeline").is_dir() and check_source(str(folder), side) is None:
        return ModelSource(str(folder), None, (), run_id, run_folder)
    variant = saved_config.value(run_folder, "weights.variant")
    base = checked(source_of(run_folder, side), side, cfg.weights.variant or variant)
    revision = saved_config.value(run_folder, f"weights.{side}_revision")
    found = ModelSource(base, trained_network(folder, side), (), run_id, run_folder, revision, variant)
    if found.network is not None and adapter_files.is_adapter(found.network):
        return replace(found, network=None, adapters=(Adapter(found.network, side, run_folder, run_id),))
    return found


def find_adapter(cfg: DictConfig, key: str, source: str, side: PipelineHalf | None = None) -> Adapter:
    """Tell a run folder, a checkpoint, a sweep, an MLflow run id, a hub id and a folder with an adapter's file apart.

    Args:
        key: of the setting, for messages.
        side: whose job it is, where the folder is a sweep's; None = that of its only job.
    """
    if is_hub_id(source):
        folder = fetched(source, key, list(adapter_files.NAMES))
        if not adapter_files.is_adapter(folder):
            raise ConfigError(f"{key}: '{source}' on the hub has no {adapter_files.WEIGHTS_NAME}; check the id")
    else:
        folder = _with_file(located(cfg, key, source, side), key, source)
    trained_for = adapter_files.stage(_shapes(folder, key))
    if trained_for is None:
        raise ConfigError(
            f"{key}: {folder} names modules of no prior and no decoder of Kandinsky 2.2, or of both; give the adapter "
            "of one of them"
        )
    run_folder = run_of(folder)
    return Adapter(folder, trained_for, run_folder, recorded_id(run_folder))


def _shapes(folder: Path, key: str) -> adapter_files.Shapes:
    try:
        return adapter_files.read(folder)
    except ValueError as error:
        raise ConfigError(f"{key}: {folder} cannot be loaded: {error}; give another") from error


def _with_file(place: Path, key: str, source: str) -> Path:
    """The folder with the adapter's file: this one, a run's, or a checkpoint's, averaged where there is that."""
    names = ["adapter", *(name for part in NETWORKS.values() for name in (f"{part}_ema", part))]
    folder = next((one for one in (place, *(place / name for name in names)) if adapter_files.is_adapter(one)), None)
    if folder is None:
        if run_of(place) == place:
            raise ConfigError(f"{key}: {no_adapter(place, key)}")
        hint = "there is no such file" if place.is_dir() else "there is no such run or folder"
        if run_of(place) is not None:
            hint = "it is of a run that trained all weights"
        if found := [name for name in adapter_files.PICKLES if (place / name).is_file()]:
            hint = f"'{found[0]}' is a pickle, which can run code when it is loaded; convert it to .safetensors"
        raise ConfigError(
            f"{key}: '{cut(source)}' holds no {adapter_files.WEIGHTS_NAME} ({hint}); give a run with adapter=lora or "
            f"dora, one of its checkpoints, a folder with that file or {adapter_files.PEFT_NAME}, a .safetensors file, "
            "or a hub id"
        )
    if problem := untrusted(folder):
        raise ConfigError(f"{key}: {folder}: {problem}")
    return folder


def checked(source: str, side: PipelineHalf, variant: str | None) -> str:
    problem = check_source(source, side, variant)
    if problem is not None:
        raise ConfigError(f"{side}: {problem}")
    return source


def use(weights: Weights, origins: Mapping[PipelineHalf, ModelSource], keys: str = "{side}") -> None:
    """Let the weights be those of the origins' bases, and check both sides before the first of them works.

    Args:
        keys: what the settings of the sides are called, for messages.

    Raises:
        ConfigError: a part cannot be fetched, a file is damaged, or what should work together does not fit.
    """
    weights.prior, weights.decoder = origins["prior"].base, origins["decoder"].base
    weights.prior_revision = origins["prior"].revision or weights.prior_revision
    weights.decoder_revision = origins["decoder"].revision or weights.decoder_revision
    weights.variant = weights.variant or origins["prior"].variant or origins["decoder"].variant
    trained = {NETWORKS[side]: origin.network for side, origin in origins.items() if origin.network is not None}
    folders = [one.folder for origin in origins.values() for one in origin.adapters]
    for note in compatibility.check(weights, set(PARTS), trained, keys=keys) + passed_over(
        [*trained.values(), *folders]
    ):
        logger.warning(note)
    for side, origin in origins.items():
        part = NETWORKS[side]
        if origin.adapters:
            shapes = compatibility.expected_shapes(part, origin.network or weights.folder(part))
        for one in origin.adapters:
            key = keys.format(side=side)
            problem = adapter_files.base_problem(_shapes(one.folder, key), shapes)
            if (problem := problem or adapter_files.whole_problem(one.folder, shapes)) is not None:
                raise ConfigError(f"{key}: {one.folder} does not fit {origin.base}: {problem}")
        layers = {tuple(found) for one in origin.adapters if (found := adapter_files.whole_files(one.folder))}
        if len(layers) > 1:
            raise ConfigError(f"{keys.format(side=side)}: some adapters fill holes, some read hints; give one kind")


def load_network(weights: Weights, side: PipelineHalf, origin: ModelSource) -> Any:
    """The base network, or the trained one in its place, with its adapters.

    Raises:
        ConfigError: a file cannot be loaded.
    """
    part, source = NETWORKS[side], origin.network
    try:
        network = weights.load(part) if source is None else weights.read_model(part, source)
        if origin.adapters:
            source = origin.adapters[0].folder
            adapter_tensors.apply(network, [(one.folder, one.scale) for one in origin.adapters])
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{side}: {source} cannot be loaded: {first_line(error)}") from error
    return network


def decoder_folder(weights: Weights, origin: ModelSource) -> Path:
    """Of the decoder's network, without its adapters."""
    return origin.network or weights.folder(NETWORKS["decoder"])


def decoder_kind(weights: Weights, origin: ModelSource) -> DecoderKind:
    """What a decoder is: by itself, or by the layers that an adapter brings along."""
    latents = read_object(weights.folder("movq") / "config.json")["latent_channels"]
    itself = kind_of(read_object(decoder_folder(weights, origin) / "config.json"), latents) or PLAIN
    whole = [layers for one in origin.adapters if (layers := adapter_files.whole_files(one.folder))]
    return itself if not whole else HINT if HINT_BLOCK in whole[0] else INPAINTING
