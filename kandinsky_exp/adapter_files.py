"""What the file of an adapter says of itself, told from its header: nothing is loaded, torch is not imported."""

import re
from collections.abc import Mapping
from pathlib import Path

from kandinsky_exp import weight_files
from kandinsky_exp.errors import first_line
from kandinsky_exp.parts import Side

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
STEMS: dict[str, Side] = {
    "transformer_blocks": "prior",
    "down_blocks": "decoder",
    "mid_block": "decoder",
    "up_blocks": "decoder",
}
Shapes = Mapping[str, tuple[int, ...]]


def is_adapter(folder: Path) -> bool:
    return (folder / WEIGHTS_NAME).is_file()


def read(folder: Path) -> Shapes:
    """The shapes of an adapter's tensors.

    Raises:
        ValueError: the file is damaged, or holds no LoRA of bare keys.
    """
    try:
        shapes = weight_files.header(folder / WEIGHTS_NAME)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"'{folder.name}/{WEIGHTS_NAME}' is damaged or cut off ({first_line(error)})") from error
    if not any(FACTOR.fullmatch(name) for name in shapes):
        raise ValueError(f"'{folder.name}/{WEIGHTS_NAME}' holds no LoRA in the form that diffusers' models write")
    return shapes


def stage(shapes: Shapes) -> Side | None:
    """The stage whose network an adapter was trained for; None where its names do not tell."""
    found = {STEMS[stem] for name in shapes if (stem := name.partition(".")[0]) in STEMS}
    return found.pop() if len(found) == 1 else None


def misfit(shapes: Shapes, network: Shapes) -> str | None:
    """Why an adapter does not go onto a network, or None.

    Args:
        network: shapes of its tensors, by name.
    """
    for name, shape in sorted(shapes.items()):
        found = FACTOR.fullmatch(name)
        if found is None:
            continue
        base = network.get(f"{found['module']}.weight")
        if base is None:
            return f"it changes {found['module']}, which the base has not: it was trained on another base"
        # A is (rank, inputs, …), B is (outputs, rank, …): what is not the rank is the layer's own.
        ours, theirs = (shape[1], base[1]) if found["factor"] == "A" else (shape[0], base[0])
        if ours != theirs:
            side = "inputs" if found["factor"] == "A" else "outputs"
            return f"its {found['module']} has {ours} {side}, the base's has {theirs}: it was trained on another base"
    return None
