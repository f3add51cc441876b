"""The verb `encode`: encode a data set before training; list or remove what is encoded."""

import logging
from collections.abc import Collection

from omegaconf import DictConfig

from kandinsky_exp.config import validation
from kandinsky_exp.data.encoded import catalog
from kandinsky_exp.system import files

logger = logging.getLogger(__name__)


def encode(cfg: DictConfig, trusted_modules: Collection[str] = ()) -> None:
    """Encode a data set as a run with the same settings would, or list or remove what was encoded.

    Args:
        trusted_modules: what `_target_` may name beside torch and the like; the config alone cannot add any.

    Raises:
        UserError: the config, the data or the weights are not usable, or there is no room.
    """
    validation.validate(cfg, "encode", trusted_modules)
    if cfg.list or cfg.remove:
        _show(cfg)
    else:
        _encode(cfg)


def _show(cfg: DictConfig) -> None:
    folder = files.output_root(cfg.output_root) / "cache"
    if cfg.remove:
        names = [cfg.remove] if isinstance(cfg.remove, str) else list(cfg.remove)
        removed, freed = catalog.remove(folder, names)
        print("\n".join([*(f"removed {entry}" for entry in removed), f"{freed / 1e6:,.1f} MB removed"]))
    print(catalog.listing(folder))


def _encode(cfg: DictConfig) -> None:
    # Here, because they import torch: `_show` is done in a second.
    from kandinsky_exp import build
    from kandinsky_exp.memory import device_limits
    from kandinsky_exp.models import compatibility
    from kandinsky_exp.system import distributed, logs, signals
    from kandinsky_exp.training import class_images
    from kandinsky_exp.training.feature_loader import encode_part, open_readers
    from kandinsky_exp.training.feature_reader import ReadSettings

    folder = build.cache_folder(cfg)
    logs.quiet_libraries()
    with signals.stop_signals(), distributed.accelerated(lambda: build.accelerator(cfg)) as accelerator:
        distributed.on_all_processes(lambda: device_limits.check_precision(cfg, accelerator.device))
        weights = build.weights(cfg)
        splits = distributed.on_all_processes(lambda: build.data(cfg))
        if accelerator.is_main_process and not folder.is_dir():  # one on a read-only disk may hold all that is needed
            files.make_root(folder)
        report = distributed.on_all_processes(lambda: build.check_data(cfg, splits))
        encoders, how = set(build.stage_class(cfg).encoders), class_images.settings(cfg.seed, cfg.data.resolution)
        notes = distributed.on_main_process(
            lambda: compatibility.check(weights, encoders | class_images.needed_parts(splits.class_images, weights))
        )
        distributed.on_main_process(
            lambda: class_images.refuse_others(class_images.placed(splits.class_images, weights, how), weights, how)
        )
        stage = build.bare_stage(cfg, weights)
        settings = ReadSettings(folder, build.encode_settings(cfg, stage, accelerator.device), cfg.seed)
        with logs.logging_to(None, accelerator.is_main_process):
            for note in report.notes:
                logger.warning(note)
            splits.class_images = distributed.on_main_process(
                lambda: class_images.complete(splits.class_images, weights, how, accelerator.device)
            )
            if cfg.data.part is None:
                notes += open_readers(splits, stage, settings, accelerator, logger.info).notes
            else:
                encode_part(splits, stage, settings, accelerator, logger.info, cfg.data.part)
            for note in notes:
                logger.warning(note)
        if accelerator.is_main_process:
            print(catalog.listing(folder))
