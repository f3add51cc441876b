"""What the file of an adapter says of itself, told from its header: nothing is loaded, torch is not imported.

Trainers give the same tensor several names. Here it has that of diffusers' own models, `<module>.lora_A.weight`. The
converters of diffusers know the modules of Stable Diffusion alone: not `add_k_proj`, and nothing of a prior.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from kandinsky_exp.errors import first_line
from kandinsky_exp.models import weight_files
from kandinsky_exp.models.components import PipelineHalf
from kandinsky_exp.models.decoder_kinds import KINDS

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Layers that train as a whole beside an adapter; each has a file of its last name there.
CONV_IN, HINT_BLOCK = "conv_in", "add_embedding.input_hint_block"
NAMES = (WEIGHTS_NAME, PEFT_NAME, PEFT_CONFIG, "conv_in.safetensors", "input_hint_block.safetensors")
PICKLES = ("pytorch_lora_weights.bin", "adapter_model.bin")
WHOLE = "trained_whole"  # in the header of an adapter's file: the layers that have files of their own beside it
METADATA = "lora_adapter_metadata"  # in the header: an adapter's settings, as diffusers writes them
# Of peft and of diffusers' pipelines; of kohya-ss, which writes all dots of a module's name as `_`.
PREFIX = re.compile(r"^((base_model\.model|unet|prior|transformer)\.)+")
FLAT_PREFIX = re.compile(r"^lora_((unet|prior|transformer)_(?!blocks))?")
TEXT_ENCODER = re.compile(r"(lora_te\d?_|(base_model\.model\.)?text_encoder)")
# `.lora_A` of peft, `.lora_down` of kohya-ss, `.lora.down` and `_lora.down` of older versions of diffusers.
ENDING = re.compile(
    r"([._]lora(_linear_layer)?[._](?P<factor>A|B|down|up)(\.default)?\.weight"
    r"|\.(?P<other>alpha|lora_magnitude_vector|dora_scale)(\.default)?(\.weight)?)"
)
TENSORS = {"A": "lora_A.weight", "down": "lora_A.weight", "B": "lora_B.weight", "up": "lora_B.weight"}
TENSORS |= {"alpha": "alpha", "lora_magnitude_vector": "lora_magnitude_vector", "dora_scale": "lora_magnitude_vector"}
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
STEMS: dict[str, PipelineHalf] = {
    "transformer_blocks": "prior",
    "down_blocks": "decoder",
    "mid_block": "decoder",
    "up_blocks": "decoder",
}
STEM = re.compile(rf"({'|'.join(STEMS)})[._]")
TAKEN_FROM_BASE = ("pissa", "olora", "corda", "loftq")  # peft's inits that change the base, which no file of it says
Shapes = Mapping[str, tuple[int, ...]]


def weights_file(place: Path) -> Path:
    """The file of an adapter, which is given by its folder or itself; it need not be there."""
    if place.suffix == ".safetensors" and place.is_file():
        return place
    return place / (PEFT_NAME if not (place / WEIGHTS_NAME).is_file() else WEIGHTS_NAME)


def whole_files(place: Path) -> dict[str, Path]:
    """The files beside an adapter's with layers that trained as a whole, as its header says; they need not be there.

    Raises:
        OSError, ValueError: the adapter's file cannot be read.
    """
    file = weights_file(place)
    named = weight_files.metadata(file).get(WHOLE, "").split(",")
    return {layer: whole_file(file.parent, layer) for layer in (CONV_IN, HINT_BLOCK) if layer in named}


def whole_file(folder: Path, layer: str) -> Path:
    return folder / f"{layer.rpartition('.')[2]}.safetensors"


def is_adapter(place: Path) -> bool:
    return weights_file(place).is_file()


def read(place: Path) -> Shapes:
    """The shapes of an adapter's tensors, by the names that `bare` gives them.

    Raises:
        ValueError: the file is damaged, or holds something else or more than a LoRA.
    """
    file = weights_file(place)
    shown = f"'{file.name}'" if file == place else f"'{place.name}/{file.name}'"
    try:
        shapes, found = weight_files.header(file), settings(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{shown} is damaged or cut off ({first_line(error)})") from error
    if problem := _settings_problem(found) or _names_problem(shapes):
        raise ValueError(f"{shown} {problem}")
    return {str(bare(name)): shape for name, shape in shapes.items()}


def settings(file: Path) -> dict[str, Any]:
    """What is known of an adapter beside its tensors, under the names of peft's `LoraConfig`; empty for none.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    text = weight_files.metadata(file).get(METADATA)
    if text is None and file.name == PEFT_NAME and file.with_name(PEFT_CONFIG).is_file():
        text = file.with_name(PEFT_CONFIG).read_text("utf-8")
    found = {} if text is None else json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("its settings are no table")
    return {PREFIX.sub("", key): value for key, value in found.items()}


def bare(name: str) -> str | None:
    """A tensor's name here; None for one that is no part of a LoRA of one of the networks.

    A module of kohya-ss stays as it is written, `down_blocks_1_…`: only the network tells which `_` were dots.
    """
    found = None if TEXT_ENCODER.match(name) else ENDING.search(name)
    if found is None or found.end() != len(name):
        return None
    module = name[: found.start()]
    module = (PREFIX if PREFIX.match(module) else FLAT_PREFIX).sub("", module).replace(".processor.", ".")
    return f"{module}.{TENSORS[found['factor'] or found['other']]}"


def _settings_problem(found: Mapping[str, Any]) -> str | None:
    kind, init = found.get("peft_type") or "LORA", str(found.get("init_lora_weights")).lower()
    if kind != "LORA":
        return f"is of the type {kind}: only LoRA and DoRA can be read"
    if init.startswith(TAKEN_FROM_BASE):
        return f"was made with init_lora_weights={init}, which changed its base; save it once more as a plain LoRA"
    patterns = found.get("alpha_pattern") or {}
    try:
        re.compile("|".join(patterns))
    except (re.error, TypeError):
        return "has settings with an alpha_pattern that is no table of patterns"
    alphas = [found.get("lora_alpha") or 0, *(patterns.values() if isinstance(patterns, dict) else [patterns])]
    odd = [value for value in alphas if not isinstance(value, int | float) or not math.isfinite(value)]
    return f"has settings that are no numbers, such as {odd[0]!r:.60} for an alpha" if odd else None


def _names_problem(shapes: Shapes) -> str | None:
    names = {name: bare(name) for name in shapes}
    kinds: dict[str, set[str]] = {}
    for name in names.values():
        module, _, kind = (name or "").replace(".weight", "").rpartition(".")
        kinds.setdefault(module, set()).add(kind)
    others = sorted(name for name, own in names.items() if own is None)
    if len(others) == len(names):
        return "holds no LoRA in a form that diffusers, peft or kohya-ss write"
    if others:
        return f"holds {len(others)} tensors, such as '{others[0]}', that are no LoRA of a prior or a decoder"
    if len(set(names.values())) < len(names):
        return "holds the same tensor under two names"
    if broken := sorted(module for module, found in kinds.items() if not {"lora_A", "lora_B"} <= found):
        return f"lacks a factor of '{broken[0]}', of which it has {', '.join(sorted(kinds[broken[0]]))}"
    if flat := [name for name, own in names.items() if FACTOR.fullmatch(own or "") and len(shapes[name]) < 2]:
        return f"has a factor that is no matrix, '{flat[0]}'"
    sideways = [name for name, shape in shapes.items() if name.endswith("dora_scale") and len(shape) > 1 == shape[0]]
    return (
        f"is a DoRA with a magnitude for each input ('{sideways[0]}'); only one per output is one" if sideways else None
    )


def in_network(module: str, modules: Collection[str]) -> str | None:
    """The network's own name of an adapter's module; None where it has no such module.

    Args:
        modules: names of the network's.
    """
    if module in modules:
        return module
    if f"{module}.0" in modules:  # `to_out`, of older versions of diffusers
        return f"{module}.0"
    return next((name for name in modules if name.replace(".", "_") == module), None)


def scale(module: str, rank: int, alpha: float | None, found: Mapping[str, Any]) -> float:
    """What the product of a module's factors counts.

    Args:
        alpha: of a tensor of the file, which goes before its settings.
    """
    if alpha is not None:
        return alpha / rank
    if found.get("lora_alpha") is None:
        return 1.0
    patterns = found.get("alpha_pattern") or {}
    own = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module))  # as peft has it
    return float(next(own, found["lora_alpha"])) / (math.sqrt(rank) if found.get("use_rslora") else rank)


def stage(shapes: Shapes) -> PipelineHalf | None:
    """The stage whose network an adapter was trained for; None where its names do not tell."""
    found = {STEMS[stem[1]] for name in shapes if (stem := STEM.match(name))}
    return found.pop() if len(found) == 1 else None


def base_problem(shapes: Shapes, network: Shapes) -> str | None:
    """Why an adapter does not go onto a network, or None.

    Args:
        network: shapes of its tensors, by name.
    """
    modules = {name.removesuffix(".weight") for name in network if name.endswith(".weight")}
    for name, shape in sorted(shapes.items()):
        found = FACTOR.fullmatch(name)
        if found is None:
            continue
        module = in_network(found["module"], modules)
        if module is None:
            return f"it changes {found['module']}, which the base has not: it was trained on another base"
        base = network[f"{module}.weight"]
        if len(base) < 2:
            return f"it changes {module}, which is no layer that an adapter can change"
        # A is (rank, inputs, …), B is (outputs, rank, …): what is not the rank is the layer's own.
        ours, theirs = (shape[1], base[1]) if found["factor"] == "A" else (shape[0], base[0])
        if ours != theirs:
            side = "inputs" if found["factor"] == "A" else "outputs"
            return f"its {module} has {ours} {side}, the base's has {theirs}: it was trained on another base"
    return None


def whole_problem(folder: Path, base: Shapes) -> str | None:
    """What is wrong with the layers that trained as a whole beside an adapter, or with their absence; or None.

    Args:
        base: shapes of the tensors of the network that it is to go onto.
    """
    files = whole_files(folder)
    reads_hints = bool(_of_layer(base, HINT_BLOCK))
    if reads_hints and HINT_BLOCK not in files:
        return "it was trained on a decoder without hints; train one with model=control, or give a plain decoder"
    for layer, file in files.items():
        try:
            theirs = weight_files.header(file)
        except (OSError, ValueError):
            return f"it belongs together with {file.name}, which is not beside it, or damaged"
        if layer == HINT_BLOCK and not reads_hints:
            continue  # the base gets this one
        ours, weight = _of_layer(base, layer), f"{layer}.weight"
        inputs = theirs.get(weight, (0, 0))[1:2]
        if layer == CONV_IN and not reads_hints and any(inputs == (kind.inputs(ours[weight][1]),) for kind in KINDS):
            ours[weight] = (ours[weight][0], *inputs, *ours[weight][2:])  # a plain decoder is widened
        for name in sorted({*theirs, *ours}, reverse=True):  # weights before biases
            if theirs.get(name) != ours.get(name):
                shown = f"{list(theirs.get(name, ()))}, the base's {list(base.get(name, ()))}"
                return f"its {name} is {shown}: it was trained on another base"
    return None


def _of_layer(shapes: Shapes, layer: str) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in shapes.items() if name.startswith(f"{layer}.")}
