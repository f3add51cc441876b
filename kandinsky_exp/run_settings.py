"""Values that several modules read off a config: steps, batch sizes, prompts, settings of validation images."""

import sys
from typing import Any

from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf

from kandinsky_exp.errors import ConfigError
from kandinsky_exp.models.pipelines import SampleSettings
from kandinsky_exp.system import host_memory, text_files
from kandinsky_exp.system.files import expanded
from kandinsky_exp.training import validation_prompts
from kandinsky_exp.training.loop import LoopSettings

MEASURED = 64  # captions that a validation draws for `validation.metrics`
FEWEST = 16  # held-out pictures that say anything


def prompts(value: Any) -> list[str]:
    """The texts of a list of prompts, or the lines of the text file that a string names."""
    return [str(entry["prompt"] if isinstance(entry, dict) else entry) for entry in entries(value)]


def entries(value: Any) -> list[Any]:
    """A list of texts and mappings, or the lines of the text file that a string names."""
    if isinstance(value, str):
        return text_files.lines(expanded(value))
    plain: Any = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return list(plain)


def further_sets(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The entries of `validation.sets`, where the verb has any, without what is null."""
    found = OmegaConf.select(cfg, "validation.sets")
    plain: Any = {} if found is None else OmegaConf.to_container(found, resolve=True)
    return {name: {key: value for key, value in entry.items() if value is not None} for name, entry in plain.items()}


def drawn_prompts(cfg: DictConfig) -> tuple[list[validation_prompts.DrawnPrompt], list[str]]:
    """What validation draws, and what the user should know of it.

    Raises:
        ConfigError: a picture or a mask cannot be used.
    """
    return validation_prompts.read(entries(cfg.validation.prompts), sample_settings(cfg))


def check_held_out(cfg: DictConfig, count: int) -> None:
    """Raises ConfigError for settings that want more held-out pictures than there are."""
    metrics = {"validation.metrics": bool(cfg.validation.metrics)}
    others = {
        "validation.patience": cfg.validation.patience is not None,
        "checkpoint.result": cfg.checkpoint.result == "best",
    }
    problems = []
    if count == 0:
        advice = "nothing is held out, so there is no validation loss; set validation.fraction, or leave it out"
        problems = [f"{key}: {advice}" for key, is_set in {**others, **metrics}.items() if is_set]
    elif count < FEWEST and cfg.validation.metrics:
        advice = f"it takes {FEWEST} to measure; raise validation.fraction, or leave it out"
        problems = [f"validation.metrics: {count} pictures are held out, and {advice}"]
    if problems:
        raise ConfigError(problems)


def texts_drawn(cfg: DictConfig) -> int:
    """How many texts a validation draws: prompts, and captions that are measured."""
    return len(entries(cfg.validation.prompts)) + (MEASURED if cfg.validation.metrics else 0)


def asked(cfg: DictConfig, reads_captions: bool) -> list[tuple[str, str]]:
    """(setting, text) of all texts of a config that the text encoder reads."""
    key, found = "validation.prompts", entries(cfg.validation.prompts)
    negative = [entry.get("negative") for entry in found if isinstance(entry, dict)]
    texts = [(key, text) for text in [*prompts(found), *negative] if text]
    if reads_captions and "instance_prompt" in cfg.data:
        texts.append(("data.instance_prompt", cfg.data.instance_prompt))
    return texts


def sample_settings(cfg: DictConfig) -> SampleSettings:
    """How validation images are drawn: at the training resolution."""
    return SampleSettings(
        inference_steps=cfg.validation.inference_steps,
        guidance_scale=cfg.validation.guidance_scale,
        seed=cfg.validation.seed,
        batch_size=cfg.validation.batch_size,
        height=cfg.data.resolution,
        width=cfg.data.resolution,
    )


def total_steps(cfg: DictConfig, rows: int | None, num_processes: int) -> int:
    """Optimizer steps of the whole run: `max_steps`, or the end of `max_epochs`, whichever comes first.

    Args:
        rows: images that train; None where that is not known yet, which leaves `max_steps`.
    """
    if cfg.trainer.max_epochs is None or rows is None:
        return int(cfg.trainer.max_steps)
    per_step = total_batch(cfg, num_processes)
    return int(min(cfg.trainer.max_steps, -(-rows * cfg.trainer.max_epochs // per_step)))


def total_batch(cfg: DictConfig, num_processes: int) -> int:
    """Samples per optimizer step, over all processes."""
    return int(cfg.trainer.batch_size * cfg.trainer.grad_accumulation * num_processes)


def shown(cfg: DictConfig) -> int:
    """Samples that a process sees at once: with class images beside the subject's pictures, twice the batch."""
    pairs = "class_prompt" in cfg.data and cfg.data.class_prompt is not None
    return int(cfg.trainer.batch_size * (2 if pairs else 1))


def large_blocks(cfg: DictConfig) -> int:
    """On the CPU, bytes from which on a freed block goes back at once: more of them where time is spent for memory."""
    lean = cfg.trainer.gradient_checkpointing or cfg.precision.mixed_precision != "no"
    return host_memory.LEAN if lean else host_memory.FAST


def loop_settings(cfg: DictConfig, steps: int, device: Accelerator) -> LoopSettings:
    return LoopSettings(
        max_steps=steps,
        grad_accumulation=cfg.trainer.grad_accumulation,
        max_grad_norm=cfg.trainer.max_grad_norm,
        log_every=cfg.trainer.log_every,
        validate_every=cfg.validation.every,
        checkpoint_every=cfg.checkpoint.every,
        total_batch=total_batch(cfg, device.num_processes),
        progress=device.is_main_process and sys.stderr.isatty(),
    )
