"""Suggestions for misspelt keys and words."""

from collections.abc import Iterable
from difflib import get_close_matches

ALIASES = {  # what the diffusers scripts and other trainers call these
    "learning_rate": "optimizer.lr",
    "lr_scheduler": "scheduler",
    "lr_warmup_steps": "scheduler.warmup_steps",
    "steps": "trainer.max_steps",
    "max_train_steps": "trainer.max_steps",
    "num_train_epochs": "trainer.max_epochs",
    "train_batch_size": "trainer.batch_size",
    "gradient_accumulation_steps": "trainer.grad_accumulation",
    "mixed_precision": "precision",
    "dataset_name": "data.name",
    "train_data_dir": "data.path",
    "output_dir": "output_root",
    "checkpointing_steps": "checkpoint.every",
    "checkpoints_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "checkpoint.resume",
    "push_to_hub": "hub.push",
    "use_ema": "trainer.ema_decay",
    "instance_data_dir": "data.instance_path",
    "class_data_dir": "data.class_path",
    "lora_rank": "adapter.rank",
}


def suggest(key: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` for a key that does not exist, or nothing; a right last part counts most."""
    choices = [choice for choice in dict.fromkeys(known) if choice != key]  # another verb may have it
    last = key.rpartition(".")[2]
    close = [ALIASES[last]] if ALIASES.get(last) in choices else []
    close = close or [choice for choice in choices if choice.rpartition(".")[2] == last]
    close = close or get_close_matches(key, choices, n=1, cutoff=0.75)
    by_last = {choice.rpartition(".")[2]: choice for choice in reversed(choices)}
    close = close or [by_last[text] for text in get_close_matches(last, by_last, n=1, cutoff=0.65)]
    return _question(close[:3])


def did_you_mean(word: object, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean ...?` for a word that is none of the choices, or nothing."""
    return _question(get_close_matches(str(word), list(choices), n=1, cutoff=cutoff))


def _question(close: list[str]) -> str:
    return f"; did you mean {' or '.join(close)}?" if close else ""
