"""Do the parts of Kandinsky fit each other, and weights the networks that their configs describe?

Told from configs and the headers of weight files, before anything loads: the libraries fill what a file lacks with
random numbers, drop what a config has no place for, and say so in a log at best.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kandinsky_exp.errors import ConfigError, first_line
from kandinsky_exp.models import weight_files
from kandinsky_exp.models.components import MODELS, PARTS, SHIPPED, PipelineHalf, pipeline_folder, side_parts, subfolder
from kandinsky_exp.models.decoder_kinds import EMBEDDING, KINDS, PLAIN, DecoderKind, kind_of
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.system import files

# (part, key of its config), and which of another part's it has to equal; or the kinds of decoder of which it has to be.
Requirement = tuple[tuple[str, str], tuple[str, str]] | tuple[DecoderKind, ...]
Required = Mapping[PipelineHalf, tuple[Requirement, ...]]
_CONDITION: Requirement = (("unet", "encoder_hid_dim"), ("image_encoder", "projection_dim"))
REQUIRED: Required = {
    "prior": (
        (("prior", "embedding_dim"), ("image_encoder", "projection_dim")),
        (("prior", "embedding_dim"), ("text_encoder", "projection_dim")),
        (("prior", "embedding_dim"), ("text_encoder", "hidden_size")),
        (("prior", "num_embeddings"), ("text_encoder", "max_position_embeddings")),
    ),
    "decoder": (KINDS, _CONDITION),
}


def starting_from(*kinds: DecoderKind) -> tuple[Requirement, ...]:
    """What a decoder has to agree with that training begins with, where it may be of these kinds."""
    return kinds, _CONDITION


def local_folders(sources: Mapping[PipelineHalf, str]) -> dict[str, Path]:
    """The folders of the parts whose sources are folders that `check_source` finds nothing wrong with."""
    found: dict[str, Path] = {}
    for side, source in sources.items():
        if is_local(source):
            root = pipeline_folder(files.expanded(source))
            found |= {part: root / subfolder(root, part) for part in side_parts(side)}
    return found


def is_local(source: str) -> bool:
    """Whether a source is a folder of the user's, whatever folders may be called as what ships is."""
    return source not in SHIPPED and files.is_folder(source)


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
        for requirement in requirements:
            if isinstance(requirement[0], DecoderKind):
                if (problem := _kind_problem(configs, requirement)) is not None:
                    wrong.add("unet")
                    yield side, problem
                continue
            (one, key), (other, wanted) = requirement
            first, second = configs.get(one, {}).get(key), configs.get(other, {}).get(wanted)
            if first is None or second is None or one in wrong or first == second:
                continue
            wrong.add(one)
            yield side, f"its {one} has {key}={first}, but {_agree(other, wanted, second)}"


def _kind_problem(configs: Mapping[str, Any], kinds: tuple[DecoderKind, ...]) -> str | None:
    """Why a decoder is of none of these kinds; None where its config or MoVQ's does not tell."""
    config, latents = configs.get("unet", {}), configs.get("movq", {}).get("latent_channels")
    embedding, channels = config.get(EMBEDDING, PLAIN.embedding), config.get("in_channels")
    fitting = [kind for kind in KINDS if kind.embedding == embedding]
    if not fitting:
        return f"its unet has {EMBEDDING}={json.dumps(embedding)}, not image: it is no Kandinsky 2.2 decoder; give one"
    if latents is None or channels is None:
        return None
    found = kind_of({**config, EMBEDDING: embedding}, latents)
    if found is not None:
        another = f"{found.told}; set model={found.model}, or give {' or '.join(kind.told for kind in kinds)}"
        return None if found in kinds else f"its unet has in_channels={channels}: it is {another}"
    known = [kind for kind in fitting if kind in kinds] or fitting
    if len(known) == 1:
        return f"its unet has in_channels={channels}, but {_agree('movq', 'latent_channels', latents)}"
    numbers = " nor ".join(f"the {kind.inputs(latents)} of {kind.told}" for kind in known)
    return f"its unet has in_channels={channels}, neither {numbers}; give one of these"


def _agree(part: str, key: str, value: int) -> str:
    return f"{part} of weights.{PARTS[part][0]} has {key}={value}; give what was made together"


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
        is_ours = weights.sources[side] in SHIPPED and part not in (network or {})
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
