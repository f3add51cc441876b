"""From a validated config to the objects of a run. The only place that calls Hydra's `instantiate`."""

import inspect
import os
import warnings
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from hydra.errors import InstantiationException
from hydra.utils import get_class, get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from kandinsky_exp import run_settings
from kandinsky_exp.config import allowlist, targets
from kandinsky_exp.config.verb_schemas import Encode, Train
from kandinsky_exp.data import checks, sets, source_facts
from kandinsky_exp.data.buckets import bucket_sizes, note_on_sizes
from kandinsky_exp.data.encoded.encode_loop import EncodeSettings
from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.sampler import Order
from kandinsky_exp.data.splits import Splits
from kandinsky_exp.errors import ConfigError, UserError
from kandinsky_exp.models import adapters, compatibility
from kandinsky_exp.models.components import PARTS, result_parts, side_parts
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages.base import DiffusionStage
from kandinsky_exp.system import accelerators, files, host_memory
from kandinsky_exp.training.ema import is_schedule_free
from kandinsky_exp.training.feature_reader import ReadSettings
from kandinsky_exp.training.loop import Training
from kandinsky_exp.training.new_parts import learn_faster


def accelerator(cfg: DictConfig, grad_accumulation: int = 1) -> Accelerator:
    """Device, precision, accumulation and processes.

    Raises:
        ConfigError: the precision cannot work on this device, or the environment or a launcher decides against the
            config.
    """
    accelerators.allow_tf32(cfg.precision.tf32)  # also after a run with another
    # `cudnn.benchmark` stays off: it may choose other kernels at each start, and a run that goes on computes the same.
    return accelerators.make(cfg.precision.mixed_precision, grad_accumulation, cfg.precision.tf32)


def weights(cfg: DictConfig, cls: type[Weights] = Weights) -> Weights:
    sources = {key: cfg.weights[key] for key in ("prior", "decoder", "prior_revision", "decoder_revision", "variant")}
    precision = {"frozen_dtype": cfg.precision.frozen_dtype, "tf32": cfg.precision.tf32}
    return cls(**sources, **precision, cache_folder=cache_folder(cfg))


def cache_folder(cfg: DictConfig) -> Path:
    return files.output_root(cfg.output_root) / "cache"


def fetch(cfg: DictConfig, parts: Weights, also: Collection[str] = ()) -> list[str]:
    """Have every part that the run will need on this machine, the result's included, before anything starts.

    Args:
        also: names of parts that are needed besides, to draw.

    Returns:
        What the user should know of them, a line each.

    Raises:
        ConfigError: a hub repository cannot be reached or has no such part, the parts do not fit, or the network takes
            the adapter nowhere.
    """
    cls = stage_class(cfg)
    needed = {cls.part, *cls.encoders, *side_parts(cls.half), *also}
    if run_settings.texts_drawn(cfg):
        needed |= {part for some in cls.draws_with for one in some for part in side_parts(PARTS[one][0])}
    if cfg.adapter.name == "none":
        needed |= set(result_parts(cls.half, cls.result_pipeline))
    for part in sorted(needed):
        parts.folder(part)
    notes = compatibility.check(parts, needed, required={**compatibility.REQUIRED, cls.half: cls.requires})
    cls.check_weights(parts)
    if cfg.adapter.name != "none":
        network = cls.network_without_data(parts)
        lora = cfg.adapter
        if found := adapters.problems(network, lora.rank, lora.target_modules, lora.init, cls.trains_whole):
            raise ConfigError(found)
    if cls.reads_pixels() or also:
        compatibility.check_resolution(parts, cfg.data.resolution)
    return notes


def target_settings(cfg: DictConfig, key: str) -> dict[str, Any]:
    """The resolved settings of a node that is about to be built, checked as they are now.

    Not as they were when the config was validated: that may not have been done, and a resolver may change its mind.

    Raises:
        ConfigError: a target in it may not be named, or is not what it has to be.
    """
    settings = OmegaConf.to_container(cfg[key], resolve=True)
    assert isinstance(settings, dict)  # nosec B101 # narrows the type
    verb = Encode if key == "data" else Train  # whose data may have keys that those of other verbs have not
    if found := targets.problems({key: settings}, verb, allowlist.user_modules(cfg)):
        raise ConfigError(found)
    return {str(name): value for name, value in settings.items()}


def data(cfg: DictConfig) -> Splits:
    """The configured source, cut down to `max_samples`, and the sets that are held out beside it.

    Raises:
        DataError: it cannot be read.
    """
    return replace(main_set(cfg), sets=further_sets(cfg, run_settings.further_sets(cfg)))


def main_set(cfg: DictConfig) -> Splits:
    """The configured source alone, see `data`."""
    settings = target_settings(cfg, "data")
    arguments = source_facts.arguments(get_method(settings["_target_"]), settings)
    try:
        splits = instantiate({"_target_": settings["_target_"], **arguments})
    except InstantiationException as error:  # Hydra's, around the one that tells the user what to do
        raise error.__cause__ if isinstance(error.__cause__, UserError) else error  # noqa: B904 - neither has another
    return _fit(cfg, settings)(splits, settings)


def further_sets(cfg: DictConfig, entries: dict[str, dict[str, Any]]) -> dict[str, Source]:
    """Those of these entries of `validation.sets`, see `data`."""
    settings = target_settings(cfg, "data")
    return sets.held_out(entries, settings, _fit(cfg, settings))


def _fit(cfg: DictConfig, settings: dict[str, Any]) -> partial[Splits]:
    cls = stage_class(cfg)
    return partial(sets.fitted, columns=sorted(cls.extra_inputs), companions=cls.companions(settings), seed=cfg.seed)


def check_data(cfg: DictConfig, splits: Splits) -> checks.DataSummary:
    """Read every row that costs little to read; images are looked at when they are encoded.

    Raises:
        DataError: with the first rows that cannot be used, unless these are to be skipped.
    """
    cls = stage_class(cfg)
    summary = checks.check(splits, cls.reads_captions(), skip=cfg.data.on_error == "skip")
    note = note_on_sizes(cfg.data.resolution) if cfg.data.buckets and cls.reads_pixels() else ""
    return replace(summary, notes=(*summary.notes, note)) if note else summary


def stage_class(cfg: DictConfig) -> type[DiffusionStage]:
    cls: type[DiffusionStage] = get_class(target_settings(cfg, "model")["_target_"])
    return cls


def bare_stage(cfg: DictConfig, parts: Weights) -> DiffusionStage:
    """The stage as its weights have it: enough to encode."""
    made: DiffusionStage = instantiate(target_settings(cfg, "model"), _convert_="all")(
        parts, resolution=cfg.data.resolution
    )
    if cfg.data.buckets and made.preprocess.resolution is not None:
        made.preprocess = replace(made.preprocess, buckets=bucket_sizes(cfg.data.resolution))
    made.read_companions(target_settings(cfg, "data"))
    return made


def stage(cfg: DictConfig, parts: Weights) -> DiffusionStage:
    """The stage, with its network as it will train."""
    made = bare_stage(cfg, parts)
    load_network(cfg, made)
    return made


def load_network(cfg: DictConfig, made: DiffusionStage) -> None:
    """The stage's network as it will train: adapter, attention, checkpointing."""
    made.weights.adapted = cfg.adapter.name != "none"
    made.weights.base_precision = cfg.adapter.base_precision
    if made.weights.adapted:
        # Loading may have drawn random numbers, or not, where a cache was warm: the adapter starts from the seed alone.
        set_seed(cfg.seed)
        attach(cfg, made.network, cfg.adapter.init)
    made.set_attention(cfg.trainer.attention)
    if cfg.trainer.gradient_checkpointing:
        made.enable_gradient_checkpointing()
    if cfg.trainer.compile:
        made.compile(regional=cfg.trainer.compile == "regional")


def network_without_data(cfg: DictConfig, parts: Weights) -> torch.nn.Module:
    """The network of a run, with the adapter that is configured."""
    network = stage_class(cfg).network_without_data(parts)
    if cfg.adapter.name != "none":
        attach(cfg, network, "default")  # the others of its inits read the weights, and have the same shapes
    return network


def attach(cfg: DictConfig, network: torch.nn.Module, init: adapters.Init) -> None:
    """Give a network, which may be without data, the adapter that is configured."""
    adapters.attach_lora(
        network,
        rank=cfg.adapter.rank,
        alpha=cfg.adapter.alpha,
        dropout=cfg.adapter.dropout,
        target_modules=cfg.adapter.target_modules,
        use_dora=cfg.adapter.name == "dora",
        dtype=getattr(torch, cfg.precision.frozen_dtype),
        use_rslora=cfg.adapter.use_rslora,
        init=init,
        whole=stage_class(cfg).trains_whole,
    )


def training(cfg: DictConfig, made: DiffusionStage, device: Accelerator, total_steps: int) -> Training:
    """Optimizer, schedule and EMA around the stage's network, prepared by Accelerate."""
    if device.device.type == "cpu":
        host_memory.give_back_blocks(run_settings.large_blocks(cfg))
    network = made.place(device.device)
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(cfg, trainable, device.device)
    learn_faster(optimizer, network, *made.faster())
    # Not prepared: Accelerate would skip accumulated micro-steps and step once per process.
    scheduler = instantiate(target_settings(cfg, "scheduler"), _convert_="all")(optimizer, total_steps=total_steps)
    ema = None
    if (decay := cfg.trainer.ema_decay) is not None:
        from kandinsky_exp.training.average import Average

        ema = Average(trainable, decay=decay, foreach=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # Accelerate knows no other name for it
        prepared, prepared_optimizer = device.prepare(network, optimizer)
    return Training(made, prepared, prepared_optimizer, scheduler, ema)


def make_optimizer(cfg: DictConfig, trainable: list[torch.nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """The configured one.

    Raises:
        ConfigError: it refuses its settings.
    """
    settings = target_settings(cfg, "optimizer")
    if settings.get("fused", False) is None:
        del settings["fused"]
        if "fused" in inspect.signature(get_class(settings["_target_"])).parameters:
            settings["fused"] = device.type in ("cuda", "cpu", "mps", "xpu")
    try:
        made = instantiate(settings, _convert_="all")(trainable)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"optimizer: {cfg.optimizer._target_} refuses its settings: {error}") from error
    if is_schedule_free(made):
        made.train()
    assert isinstance(made, torch.optim.Optimizer)  # nosec B101 # narrows the type
    return made


def read_settings(
    cfg: DictConfig, made: DiffusionStage, device: torch.device, by_row: bool = False, order: Order | None = None
) -> ReadSettings:
    """How the data set of a run becomes batches; for `by_row` and `order` see there."""
    return ReadSettings(
        cache=cache_folder(cfg),
        cached=cfg.data.cache,
        how=encode_settings(cfg, made, device),
        seed=cfg.seed,
        fraction=cfg.validation.fraction,
        workers=cfg.data.num_workers,
        batch_size=cfg.trainer.batch_size,
        grad_accumulation=cfg.trainer.grad_accumulation,
        by_row=by_row,
        by_length=cfg.trainer.group_by_length,
        order=order,
    )


def encode_settings(cfg: DictConfig, made: DiffusionStage, device: torch.device) -> EncodeSettings:
    return EncodeSettings(
        dtype=cfg.data.cache_dtype,
        batch_size=cfg.data.encode_batch or made.encode_batch(device),
        fixed_batch=cfg.data.encode_batch is not None,
        workers=cfg.data.encode_workers,
        mirrored=cfg.data.flip,
        skip_bad=cfg.data.on_error == "skip",
        beside=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def pruner(settings: DictConfig) -> Any:
    """An optimizing sweeper's pruner."""
    return instantiate(settings)
