"""`kandinsky-exp export`: an adapter and its base as one pipeline; or the adapter of a checkpoint alone."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors.torch import save_file

from kandinsky_exp import build
from kandinsky_exp.config import saved_config, validation
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.models import adapter_files, adapter_tensors, compatibility, pipelines
from kandinsky_exp.models.components import NETWORKS, PipelineHalf
from kandinsky_exp.runs.lookup import names_of
from kandinsky_exp.runs.model_sources import (
    Adapter,
    ModelSource,
    find_adapter,
    find_origin,
    load_network,
    scaled,
    started_from,
    use,
)
from kandinsky_exp.system import files, logs, signals


def export(cfg: DictConfig) -> None:
    """Write `pipeline/`, with the adapters merged into the network, or `adapter/`, into a new folder.

    Raises:
        ConfigError: an adapter cannot be read, does not fit its base, or there is nothing to merge.
    """
    validation.validate(cfg, "export")
    logs.quiet_libraries()
    with signals.stop_signals():
        found = [find_adapter(cfg, "adapter", text) for text in names_of(cfg.adapter.source)]
        check_together(cfg, found)
        root = files.output_root(cfg.output_root) / "export"
        files.make_root(root.parent)
        place = (found[0].run_folder or found[0].folder).absolute()
        name = cfg.name or (place.stem if place.is_file() else place.name)
        if cfg.merge:
            merged(cfg, found, root, name)
        else:
            alone(cfg, found[0], root, name)


def check_together(cfg: DictConfig, found: list[Adapter]) -> None:
    """Raises ConfigError for adapters that do not go into one network, or are more than can be had unmerged."""
    if len({one.side for one in found}) > 1:
        raise ConfigError("adapter: some are of the prior, some of the decoder; export one stage at a time")
    alone = len(found) == 1 and cfg.adapter_scale == 1
    if not cfg.merge and not alone:
        raise ConfigError("merge: is false, and one adapter alone keeps its own scale; give one, or set merge=true")
    has_magnitudes = [one for one in found if any("lora_magnitude" in name for name in adapter_files.read(one.folder))]
    if len(found) > 1 and has_magnitudes:
        raise ConfigError(
            f"adapter: {has_magnitudes[0].folder} is a DoRA, whose magnitudes are of the base alone: with others it "
            "draws what no merged network draws; export it alone"
        )


def alone(cfg: DictConfig, adapter: Adapter, root: Path, name: str) -> None:
    """The adapter's own file; that of another trainer as diffusers' models write it."""
    source, tensors = adapter_files.weights_file(adapter.folder), None
    if not adapter_tensors.is_plain(adapter.folder):
        weights, origins = build.weights(cfg), find_sides(cfg, [adapter])
        use(weights, origins, keys="adapter")
        part = NETWORKS[adapter.side]
        network = compatibility.without_data(part, origins[adapter.side].network or weights.folder(part))
        tensors, _ = adapter_tensors.read(adapter.folder, adapter_tensors.layers(network))
    folder = files.fresh_folder(root, name)
    (target := folder / "adapter" / adapter_files.WEIGHTS_NAME).parent.mkdir()
    for whole in adapter_files.whole_files(adapter.folder).values():
        shutil.copyfile(whole, target.with_name(whole.name))
    if tensors is None:
        shutil.copyfile(source, target)
    else:
        save_file({key: value.contiguous() for key, value in tensors.items()}, target, metadata={"format": "pt"})
    print(folder)


def merged(cfg: DictConfig, found: list[Adapter], root: Path, name: str) -> None:
    side = found[0].side
    origins = find_sides(cfg, found)
    if all(one.scale == 0 for one in origins[side].adapters):
        raise ConfigError("adapter_scale: at 0 the merged network would be the base itself; give another number")
    weights = build.weights(cfg)
    use(weights, origins, keys="adapter")
    dtype, weights.frozen_dtype = getattr(torch, weights.frozen_dtype), "float32"
    network = load_network(weights, side, origins[side])
    adapter_tensors.merge(network)
    folder = files.fresh_folder(root, name)

    def save(place: Path) -> None:
        network.to(dtype).save_pretrained(place)

    pipelines.save_result(weights, side, pipelines.result_class(side, network), folder / "pipeline", save)
    files.write_atomically(folder / "config.yaml", saved_config.to_yaml(cfg))
    print(folder)


def find_sides(cfg: DictConfig, found: list[Adapter]) -> dict[PipelineHalf, ModelSource]:
    """What the adapters go onto, and the other stage: what their run had, or else the `weights` group's."""
    runs = [one.run_folder for one in found]
    origins = {side: started_from(cfg, runs, side) for side in NETWORKS}
    side = found[0].side
    if cfg.base is not None:
        origins[side] = find_origin(cfg, side, cfg.base)
    with_adapters = replace(origins[side], adapters=(*origins[side].adapters, *found))
    return origins | scaled({side: with_adapters}, cfg.adapter_scale)
