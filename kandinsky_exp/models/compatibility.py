"""Do the parts of Kandinsky fit each other, and weights the networks that their configs describe?

Told from configs and the headers of weight files, before anything loads: the libraries fill what a file lacks with
random numbers, drop what a config has no place for, and say so in a log at best.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kandinsky_exp.errors import ConfigError, first_line
from kandinsky_exp.models import weight_files
from kandinsky_exp.models.components import MODELS, PARTS, PipelineHalf, pipeline_folder, side_parts, subfolder
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.system import files


def inpainting_channels(latents: int) -> int:
    """Of a decoder's input: noisy latents, kept latents, and where something is kept."""
    return 2 * latents + 1


# (part, key of its config), and what it has to equal: a value; another part's, or else what a function makes of it.
Requirement = (
    tuple[tuple[str, str], tuple[str, str] | str] | tuple[tuple[str, str], tuple[str, str], Callable[[int], int]]
)
Required = Mapping[PipelineHalf, tuple[Requirement, ...]]
CHANNELS = (("unet", "in_channels"), ("movq", "latent_channels"))
_DECODER: tuple[Requirement, ...] = (
    (("unet", "addition_embed_type"), "image"),
    (("unet", "encoder_hid_dim"), ("image_encoder", "projection_dim")),
)
REQUIRED: Required = {
    "prior": (
        (("prior", "embedding_dim"), ("image_encoder", "projection_dim")),
        (("prior", "embedding_dim"), ("text_encoder", "projection_dim")),
        (("prior", "embedding_dim"), ("text_encoder", "hidden_size")),
        (("prior", "num_embeddings"), ("text_encoder", "max_position_embeddings")),
    ),
    "decoder": (*_DECODER, (*CHANNELS, inpainting_channels)),
}
PLAIN: Required = {**REQUIRED, "decoder": (*_DECODER, CHANNELS)}  # a decoder that sees nothing but noisy latents


def local_folders(sources: Mapping[PipelineHalf, str]) -> dict[str, Path]:
    """The folders of the parts whose sources are folders that `check_source` finds nothing wrong with."""
    found: dict[str, Path] = {}
    for side, source in sources.items():
        if is_local(source):
            root = pipeline_folder(files.expanded(source))
            found |= {part: root / subfolder(root, part) for part in side_parts(side)}
    return found


def is_local(source: str) -> bool:
    """Whether a source is a folder of the user's, whatever folders may be called `tiny` here."""
    return source != "tiny" and files.is_folder(source)


def disagreements(folders: Mapping[str, Path], required: Required = REQUIRED) -> Iterator[tuple[PipelineHalf, str]]:
    """(side, what is wrong) of parts that cannot work together, by their configs; of parts that are not given, nothing.

    Args:
        folders: of networks, by part.
        required: what has to agree, by the side whose source is to blame.
    """
    # Of one that cannot be read `check_source` has something to say.
    configs = {name: files.json_object(path / "config.json") or {} for name, path in folders.items() if name in MODELS}
    wrong = set()  # one number that is odd disagrees with many
    for side, requirements in required.items():
        for (one, key), wanted, *otherwise in requirements:
            config = configs.get(one, {})
            if isinstance(wanted, str):
                if (value := config.get(key, wanted)) != wanted:
                    wrong.add(one)
                    shown = f"{key}={json.dumps(value)}, not {wanted}"
                    yield side, f"its {one} has {shown}: it is no Kandinsky 2.2 {side}; give one"
                continue
            first, second = config.get(key), configs.get(wanted[0], {}).get(wanted[1])
            if first is None or second is None or one in wrong or first in (second, *(of(second) for of in otherwise)):
                continue
            wrong.add(one)
            yield side, f"its {one} has {key}={first}{_against(first, second, wanted, bool(otherwise))}"


def _against(first: int, second: int, wanted: tuple[str, str], is_any: bool) -> str:
    """What a number disagrees with, and what to do."""
    if wanted == CHANNELS[1] and is_any:
        known = f"{second} of a plain decoder nor the {inpainting_channels(second)} of one for inpainting"
        return f", neither the {known}; give one of these"
    if wanted == CHANNELS[1] and first == inpainting_channels(second):
        return ": it is a decoder for inpainting; set model=inpaint"
    part, key = wanted
    return f", but {part} of weights.{PARTS[part][0]} has {key}={second}; give what was made together"


def check(
    weights: Weights,
    parts: set[str],
    network: Mapping[str, Path] | None = None,
    keys: str = "weights.{side}",
    required: Required = REQUIRED,
) -> list[str]:
    """Refuse parts that do not fit; nothing is loaded. What ships with the package is not looked at alone.

    Args:
        parts: names of those that will be used.
        network: folders of trained networks that go in, in place of the source's own, by part.
        keys: what the settings of the sides are called, for messages.
        required: what has to agree, by side.

    Returns:
        What the user should know of them, a line each.

    Raises:
        ConfigError: they do not fit each other, or the weights not their config.
    """
    folders = {part: weights.folder(part) for part in sorted(parts) if part in MODELS} | dict(network or {})
    found = [f"{keys.format(side=side)}: {problem}" for side, problem in disagreements(folders, required)]
    for part, folder in folders.items():
        side = PARTS[part][0]
        is_ours = weights.sources[side] == "tiny" and part not in (network or {})
        problem = None if is_ours else weights_problem(part, folder, weights.variant)
        found += [f"{keys.format(side=side)}: {folder} {problem}"] if problem else []
    if found:
        raise ConfigError(found)
    for part in parts & {"prior_scheduler", "decoder_scheduler"}:  # they are small, and their classes many
        weights.load(part)
    return weight_files.passed_over(weights.folder(part) for part in parts)


def check_resolution(weights: Weights, resolution: int) -> None:
    """Refuse a side in pixels that the decoder's networks cannot halve as often as they do.

    Raises:
        ConfigError: naming what it has to be a multiple of.
    """
    if resolution % (multiple := weights.size_multiple()):
        raise ConfigError(f"data.resolution: has to be a multiple of {multiple} for these weights, not {resolution}")


def weights_problem(part: str, folder: Path, variant: str | None) -> str | None:
    """What is wrong with the weights of a network, as its config describes it, or None."""
    try:
        expected = expected_shapes(part, folder)
    except Exception as error:  # a value that the class can make nothing of raises whatever it happens to raise
        return f"cannot become a {MODELS[part]}: {first_line(error)}; its config.json is not that of these weights"
    if problem := weight_files.lacking(folder, variant):
        return problem
    found: dict[str, tuple[int, ...]] = {}
    try:
        for file in weight_files.opened(folder, True, variant):
            found |= weight_files.header(file) if file.suffix == ".safetensors" else {}
    except (OSError, ValueError):
        return f"holds {file.name}, which is damaged or cut off; fetch or copy it again"
    return _difference(expected, found)


def expected_shapes(part: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's tensors by its config alone."""
    return {name: tuple(tensor.shape) for name, tensor in without_data(part, folder).state_dict().items()}


def without_data(part: str, folder: Path) -> Any:
    """The network that a config describes, on the meta device: there nothing takes memory or time."""
    import diffusers
    import torch
    import transformers

    cls = getattr(transformers if part.endswith("encoder") else diffusers, MODELS[part])
    with torch.device("meta"):
        if part.endswith("encoder"):  # attention as `weights` asks for it
            return cls(cls.config_class.from_pretrained(folder, local_files_only=True, attn_implementation="sdpa"))
        return cls.from_config(cls.load_config(folder, local_files_only=True))


def _difference(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str | None:
    """Only what is certain: libraries rename tensors while they load, so that strange names alone say little."""
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            return (
                f"has weights of another architecture than its config.json: {name} is {list(found[name])}, not "
                f"{list(expected[name])}; fetch or save both again"
            )
    missing, strange = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing and not strange:
        return f"lacks {len(missing)} tensors that its config.json asks for, such as {missing[0]}; fetch it again"
    patterns = {_pattern(name) for name in expected}
    beyond = [name for name in strange if _pattern(name) in patterns]
    if beyond:
        return f"has {len(beyond)} tensors beyond what its config.json asks for, such as {beyond[0]}; fetch it again"
    return None


def _pattern(name: str) -> str:
    """A tensor's name whatever the number of its block."""
    return re.sub(r"\.\d+\.", ".#.", name)
