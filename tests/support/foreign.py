"""Adapters as other trainers name their tensors, made from one that was trained here."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kandinsky_exp.models.adapter_files import PEFT_CONFIG, PEFT_NAME, WEIGHTS_NAME

Tensors = dict[str, Tensor]


def renamed(tensors: Tensors, change: Callable[[str], str]) -> Tensors:
    return {change(name): value.clone() for name, value in tensors.items()}


def with_alpha(tensors: Tensors, alpha: float) -> Tensors:
    modules = {re.split(r"\.lora_", name)[0] for name in tensors}
    return {**tensors, **{f"{module}.alpha": torch.tensor(alpha) for module in modules}}


def kohya(prefix: str, tensors: Tensors) -> Tensors:
    """Also what its extension LyCORIS writes of a DoRA: the magnitudes as a column."""

    def change(name: str) -> str:
        module, _, kind = re.sub(r"\.(lora_[AB])\.weight$", r".\1", name).rpartition(".")
        kinds = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_magnitude_vector": "dora_scale"}
        return f"{prefix}_{module.replace('.', '_')}.{kinds.get(kind, kind)}"

    found = renamed(tensors, change)
    return {name: value[:, None] if name.endswith("dora_scale") else value for name, value in found.items()}


def old_processors(to_out: str, tensors: Tensors) -> Tensors:
    def change(name: str) -> str:
        module, kind = re.match(r"(.+)\.lora_([AB])\.weight", name).groups()  # type: ignore[union-attr]
        before, _, last = module.replace("to_out.0", "to_out#").rpartition(".")
        return f"{before}.processor.{last.replace('to_out#', to_out)}_lora.{'down' if kind == 'A' else 'up'}.weight"

    return renamed(tensors, change)


def old_diffusers(tensors: Tensors) -> Tensors:
    ends = {".lora_A.": ".lora.down.", ".lora_B.": ".lora.up."}
    return renamed(tensors, lambda name: re.sub(r"\.lora_[AB]\.", lambda found: ends[found[0]], name))


def write(form: str, plain: Path, folder: Path, part: str, alpha: float, rank: int) -> Path:
    """An adapter, whose strength is alpha / rank, as another trainer would have written it; the folder."""
    tensors, name = load_file(plain / WEIGHTS_NAME), WEIGHTS_NAME
    full = {key: value * alpha / rank if "lora_B" in key else value for key, value in tensors.items()}  # no alpha known
    metadata = {"format": "pt"}
    match form:
        case "prefixed":
            tensors = renamed(full, lambda key: f"{part}.{key}")
        case "prefixed with settings":
            tensors = renamed(tensors, lambda key: f"{part}.{key}")
            metadata["lora_adapter_metadata"] = json.dumps({f"{part}.r": rank, f"{part}.lora_alpha": alpha})
        case "with alpha":
            tensors = with_alpha(tensors, alpha)
        case "kohya":
            tensors = kohya("lora_unet", with_alpha(tensors, alpha))
        case "kohya without alpha":
            tensors = kohya(f"lora_{part}", full)
        case "old processors":
            tensors = old_processors("to_out", full)
        case "older processors":
            tensors = renamed(old_processors("to_out.0", full), lambda key: f"unet.{key}")
        case "old diffusers":
            tensors = old_diffusers(full)
        case "peft":
            name = PEFT_NAME
            tensors = renamed(tensors, lambda key: f"base_model.model.{key}")
            settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 1, "alpha_pattern": {r"to_\w+(\.0)?": alpha}}
            settings["alpha_pattern"][r"(add_._proj|linear|\d)"] = alpha
            folder.mkdir(parents=True)
            (folder / PEFT_CONFIG).write_text(json.dumps(settings))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata=metadata)
    return folder
