"""Diffusers pipelines made of parts already in memory: samples; and complete pipeline folders: results."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn

from kandinsky_exp.models import hints, image_to_image, inpainting, unpadded_prior, weight_files
from kandinsky_exp.models.components import (
    MODELS,
    NETWORKS,
    PARTS,
    PRIOR_FOLDER,
    RESULTS,
    PipelineHalf,
    is_combined,
    side_parts,
)
from kandinsky_exp.models.decoder_kinds import HINT, INPAINTING, kind_of_network
from kandinsky_exp.models.sampling import Embeds as Embeds
from kandinsky_exp.models.sampling import SampleSettings as SampleSettings
from kandinsky_exp.models.sampling import slices
from kandinsky_exp.models.weight_files import PART_FILES
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.system.files import replacing_folder

COMPANIONS = {  # classes of transformers that read the same files; the first is the published pipelines'
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "image_processor": ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
}
WHOLE = (("text_encoder", "prior"), ("image_encoder",), ("unet", "movq"))  # all that draws, what works together at once


def prior_pipeline(weights: Weights, network: nn.Module | None = None, null_embed: Tensor | None = None) -> Any:
    """The prior pipeline around a trained network, or around the base one.

    Args:
        null_embed: (1, E), what `zero_embed` gives: then no image encoder is loaded.
    """
    if network is None:
        unpadded_prior.remove_padding(network := weights.load("prior"))
    pipeline = diffusers.KandinskyV22PriorPipeline(
        prior=network,
        image_encoder=weights.load("image_encoder") if null_embed is None else None,
        text_encoder=weights.load("text_encoder"),
        tokenizer=weights.load("tokenizer"),
        scheduler=weights.load("prior_scheduler"),
        image_processor=weights.load("image_processor"),
    )
    if null_embed is not None:  # all that it needs of its largest part by far
        pipeline.get_zero_embed = lambda batch_size, device: null_embed.to(device).repeat(batch_size, 1)
    if unpadded_prior.is_unpadded(network):
        pipeline._encode_prompt = partial(_encode_without_padding, pipeline._encode_prompt)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _encode_without_padding(encode: Callable[..., tuple[Tensor, ...]], *prompts: Any, **settings: Any) -> Any:
    """The text of a pipeline's prompts cut to the longest of them."""
    embeds, states, mask = encode(*prompts, **settings)
    longest = int(mask.sum(1).max())
    return embeds, states[:, :longest], mask[:, :longest]


@torch.no_grad()
def zero_embed(image_encoder: Any) -> Tensor:
    """The embedding (1, E) of the zero image, which guidance leads away from."""
    size = image_encoder.config.image_size
    zeros = torch.zeros(1, 3, size, size, device=image_encoder.device, dtype=image_encoder.dtype)
    embed: Tensor = image_encoder(zeros).image_embeds
    return embed


def decoder_pipeline(weights: Weights, network: Any = None) -> Any:
    """The decoder pipeline around a trained network, or around the base one: of the kind that the network is."""
    unet = weights.load("unet") if network is None else network
    cls = getattr(diffusers, kind_of_network(unet).drawing)
    pipeline = cls(unet=unet, scheduler=weights.load("decoder_scheduler"), movq=weights.load("movq"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embed_prompts(pipeline: Any, prompts: list[str], settings: SampleSettings) -> Embeds:
    """Prompts to image embeddings (N, E) and the embeddings to guide away from (N, E)."""
    embeds, negatives = [], []
    for start in range(0, len(prompts), settings.batch_size):
        chunk = prompts[start : start + settings.batch_size]
        generators = [settings.generator(index) for index in range(start, start + len(chunk))]
        negative = None if settings.negative_prompt is None else [settings.negative_prompt] * len(chunk)
        if negative is not None:
            # The pipeline draws the negative prompts in the same batch: they need noise of their own.
            generators += [settings.generator(-1 - index) for index in range(start, start + len(chunk))]
        image_embeds, null_embeds = pipeline(
            chunk,
            negative_prompt=negative,
            num_inference_steps=settings.inference_steps,
            guidance_scale=settings.guidance_scale,
            generator=generators,
            return_dict=False,
        )
        embeds.append(image_embeds)
        negatives.append(null_embeds)
    return torch.cat(embeds), torch.cat(negatives)


def decode(pipeline: Any, embeds: Embeds, settings: SampleSettings) -> list[Image.Image]:
    """Image embeddings to images, in the precision of the parts: networks that train bring theirs along."""
    with image_to_image.begun(pipeline, settings) as begun:
        return _drawn(pipeline, embeds, begun)


def _drawn(pipeline: Any, embeds: Embeds, settings: SampleSettings) -> list[Image.Image]:
    kind = kind_of_network(pipeline.unet)
    if kind is INPAINTING:
        return inpainting.fill(pipeline, embeds, *inpainting.to_fill(len(embeds[0]), settings), settings)
    if kind is HINT:
        return hints.draw(pipeline, embeds, hints.to_draw(pipeline, len(embeds[0]), settings), settings)
    images: list[Image.Image] = []
    device, dtype = pipeline.unet.device, pipeline.unet.dtype
    for start in range(0, len(embeds[0]), settings.batch_size):
        chunk, null = (part[start : start + settings.batch_size].to(device, dtype) for part in embeds)
        asked = settings.asked(range(start, start + len(chunk)))
        (latents,) = pipeline(chunk, null, output_type="latent", **asked)
        for some in latents.to(pipeline.movq.dtype).tensor_split(slices(len(latents))):
            images += _pictures(pipeline, some)
    return images


def rows_at_once(count: int, guided: bool) -> dict[str, int]:
    """Of each part, how many rows it answers at once while so many pictures are drawn; guidance asks twice."""
    asked = count * 2 if guided else count
    decoded = -(-count // slices(count))
    return {"text_encoder": count, "image_encoder": 1, "prior": asked, "unet": asked, "movq": decoded}


def ask(part: str, network: Any, batch: int, side: int, device: torch.device) -> object:
    """The answer of a part, as it is asked while pictures are drawn, to tensors whose shapes alone count.

    Args:
        side: of latents.
    """
    config, dtype = network.config, next(network.parameters()).dtype

    def some(*sides: int) -> Tensor:
        return torch.empty(batch, *sides, device=device, dtype=dtype)

    if part == "image_encoder":
        return network(some(3, config.image_size, config.image_size))
    if part == "text_encoder":
        return network(torch.zeros(batch, config.max_position_embeddings, device=device, dtype=torch.long))
    if part == "prior":
        embed, length = config.embedding_dim, config.num_embeddings
        return network(some(embed), 0, some(embed), some(length, embed), some(length).bool())
    if part == "movq":
        return network.decode(some(config.latent_channels, side, side), force_not_quantize=True)
    condition = {"image_embeds": some(config.encoder_hid_dim)}
    if config.addition_embed_type == HINT.embedding:
        condition["hint"] = some(3, hints.SCALE * side, hints.SCALE * side)
        return network(some(config.in_channels // 2, side, side), 0, None, added_cond_kwargs=condition)
    return network(some(config.in_channels, side, side), 0, None, added_cond_kwargs=condition)


@torch.no_grad()
def _pictures(pipeline: Any, latents: Tensor) -> list[Image.Image]:
    """As the pipeline itself ends."""
    pixels = (pipeline.movq.decode(latents, force_not_quantize=True).sample * 0.5 + 0.5).clamp(0, 1)
    pictures: list[Image.Image] = pipeline.numpy_to_pil(pixels.cpu().permute(0, 2, 3, 1).float().numpy())
    return pictures


def result_class(half: PipelineHalf, network: Any) -> str:
    """Name of the pipeline that a network of this half belongs into."""
    return kind_of_network(network).result if half == "decoder" else RESULTS[half]


def save_result(
    weights: Weights, half: PipelineHalf, pipeline: str, folder: Path, save_network: Callable[[Path], None]
) -> None:
    """Write a complete pipeline: the trained network, and everything else linked from where it was loaded.

    A prior becomes a prior pipeline (`DiffusionPipeline.from_pretrained`), a decoder a combined one: from a local
    folder, `AutoPipelineForText2Image.from_pretrained` needs both halves. A decoder for hints has no combined pipeline:
    the prior's lies in `prior/`.

    Args:
        half: that trained.
        pipeline: name of the result's class.
    """
    with replacing_folder(folder) as aside:
        parts = {part: PARTS[part][1] for part in side_parts(half)}
        if is_combined(pipeline):
            parts |= {part: f"prior_{PARTS[part][1]}" for part in side_parts("prior")}
        _write(weights, pipeline, aside, parts, {NETWORKS[half]: save_network})
        if pipeline == HINT.result:
            own = {part: PARTS[part][1] for part in side_parts("prior")}
            _write(weights, RESULTS["prior"], aside / PRIOR_FOLDER, own, {})


def _write(
    weights: Weights,
    pipeline: str,
    folder: Path,
    parts: dict[str, str],
    trained: dict[str, Callable[[Path], None]],
) -> None:
    """A pipeline of this class.

    Args:
        parts: and the names that they have there.
        trained: parts that are no file's.
    """
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
    for part, name in parts.items():
        index[name] = _index_entry(weights, part)
        if part in trained:
            trained[part](folder / name)
        else:
            link_part(weights.folder(part), folder / name, weights.variant)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _index_entry(weights: Weights, part: str) -> list[str]:
    """[library, class] of a part. Never what another pipeline names there: loading the result would import it."""
    if part in MODELS:
        return ["transformers" if part.endswith("encoder") else "diffusers", MODELS[part]]
    folder = weights.folder(part)
    if part in COMPANIONS:
        index = json.loads((folder.parent / "model_index.json").read_text("utf-8"))
        entry = index.get(folder.name)
        known = isinstance(entry, list) and len(entry) == 2 and entry[1] in COMPANIONS[part]
        return ["transformers", entry[1] if known else COMPANIONS[part][0]]
    return ["diffusers", type(weights.load(part)).__name__]


def link_part(source: Path, target: Path, variant: str | None) -> None:
    """Hard-link a part's files, or copy them where the file system cannot; weights of a variant lose its suffix.

    Files of other kinds stay where they are: no code, pickle or note of others ends up in a result.
    """
    target.mkdir(parents=True)
    for file in _files(source, variant):
        name = weight_files.without_variant(file.name)
        if name != file.name and file.suffix == ".json":  # the index names the shards
            index = json.loads(file.read_text("utf-8"))
            named = {key: weight_files.without_variant(str(shard)) for key, shard in index["weight_map"].items()}
            (target / name).write_text(json.dumps({**index, "weight_map": named}, indent=2) + "\n", "utf-8")
            continue
        try:
            os.link(file.resolve(), target / name)
        except OSError:
            shutil.copyfile(file, target / name)


def _files(source: Path, variant: str | None) -> Iterator[Path]:
    """What loading opens of the weights, and all else."""
    read = weight_files.opened(source, True, variant)
    for file in sorted(path for path in source.iterdir() if path.is_file()):
        are_weights = file.suffix == ".safetensors" or ".index." in file.name
        if file in read or (file.suffix in PART_FILES and not are_weights):
            yield file
