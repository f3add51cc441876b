"""The verb `encode`: what a cached run does first, for its own sake; and what is there already."""

import logging

from omegaconf import DictConfig

from kandinsky_exp import build, config, processes, workspace
from kandinsky_exp.data import cache
from kandinsky_exp.readers import ReadSettings, open_readers

logger = logging.getLogger(__name__)


def encode(cfg: DictConfig) -> None:
    """Encode a data set as a run with the same settings would, or list or remove what was encoded.

    Raises:
        UserError: the config, the data or the weights are not usable, or there is no room.
    """
    config.validate(cfg)
    folder = build.cache_folder(cfg)
    if cfg.list or cfg.remove:
        if cfg.remove:
            print(f"{cache.remove(folder, list(cfg.remove)) / 1e6:,.1f} MB removed")
        print(cache.listing(folder))
        return
    processes.quiet_libraries()
    with processes.stop_signals(), processes.accelerated(lambda: build.accelerator(cfg)) as accelerator:
        weights = build.weights(cfg)
        splits = build.data(cfg)
        if accelerator.is_main_process:
            workspace.make_root(folder)
        build.check_data(cfg, splits)
        stage = build.bare_stage(cfg, weights)
        settings = ReadSettings(
            cache=folder,
            cached=True,
            how=build.encode_settings(cfg, accelerator.device),
            seed=cfg.seed,
            fraction=0.0,
            workers=0,
            batch_size=1,
            grad_accumulation=1,
        )
        with workspace.logging_to(None, accelerator.is_main_process):
            readers = open_readers(splits, stage, settings, accelerator, logger.info)
            for note in readers.notes:
                logger.warning(note)
        if accelerator.is_main_process:
            print(cache.listing(folder))
