"""Draw missing class images with the base prior and decoder, once, into a folder that keeps them."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from kandinsky_exp.data import long_texts
from kandinsky_exp.data.dreambooth import MADE, ClassImages, drawn_name
from kandinsky_exp.errors import ConfigError, DataError, cause_of, memory_told
from kandinsky_exp.models import compatibility, pipelines
from kandinsky_exp.models.components import PARTS, check_source, is_hub_id, side_parts
from kandinsky_exp.models.pipelines import SampleSettings
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.system import files
from kandinsky_exp.system.telling import told

OUT_OF_MEMORY = (
    "drawing class images ran out of memory ({}); set precision=fp16 or bf16, or give pictures of the class in "
    "data.class_path"
)
logger = logging.getLogger(__name__)


def settings(seed: int, resolution: int) -> SampleSettings:
    """How class images are drawn. One at a time: what a picture looks like must not depend on which others lack."""
    return SampleSettings(seed=seed, batch_size=1, height=resolution, width=resolution)


def needed_parts(wanted: ClassImages | None, weights: Weights) -> set[str]:
    """The parts that draw what is missing, all or none.

    Raises:
        ConfigError: something is missing, and one side is nothing that draws.
    """
    if wanted is None or not (missing := wanted.missing()):
        return set()
    for side, source in weights.sources.items():
        if problem := check_source(source, side, weights.variant):
            raise ConfigError(f"data.num_class_images: {_lack(wanted, len(missing))}: weights.{side}: {problem}")
    return set(PARTS)


def _lack(wanted: ClassImages, missing: int) -> str:
    if wanted.folder is None:
        return "they have to be drawn, and cannot be; give them in data.class_path, or weights that draw"
    there = f"{wanted.count - missing} of {wanted.count} class images are in {wanted.folder}"
    return f"{there}, and the other {missing} cannot be drawn; give more, a smaller number, or weights that draw"


def placed(wanted: ClassImages | None, weights: Weights, how: SampleSettings) -> ClassImages | None:
    """The same with a folder, in the cache where none was given, named by all that its pictures follow from.

    Not by the precision, which may change when a run goes on: it must find its class images then.
    """
    if wanted is None or wanted.folder is not None:
        return wanted
    return replace(wanted, folder=weights.cache_folder.absolute() / _name(wanted.prompt, weights, how))


def _name(prompt: str, weights: Weights, how: SampleSettings) -> str:
    named = repr((prompt, weights.content(sorted(PARTS)), how))
    return f"class-{hashlib.sha256(named.encode()).hexdigest()[:31]}"


def refuse_others(
    wanted: ClassImages | None, weights: Weights, how: SampleSettings, is_known: Callable[[], bool] = lambda: False
) -> None:
    """Have nobody train on pictures that were drawn for something else.

    Args:
        is_known: whether a run goes on that has trained on these very pictures; asked where nothing else tells.

    Raises:
        DataError: what was drawn into the folder follows from something else, or nobody knows from what.
    """
    if wanted is None or wanted.folder is None or not wanted.drawn():
        return
    recorded = files.json_object(wanted.folder / MADE)
    if recorded is None:
        if _is_named_by_content(wanted, weights, how) or is_known():
            return
        problem = f"nothing says what the {len(wanted.drawn())} drawn pictures there were drawn for"
    elif different := _differences(recorded, wanted, weights, how):
        problem = f"the pictures there were drawn otherwise ({'; '.join(different)})"
    else:
        return
    raise DataError(
        f"data.class_path: {wanted.folder}: {problem}; give another folder, remove drawn-*.png and {MADE} to have them "
        "drawn anew, or give the pictures other names to keep them as your own"
    )


def _settings(prompt: str, how: SampleSettings) -> dict[str, Any]:
    return {
        "prompt": prompt,
        **{key: value for key, value in asdict(how).items() if key not in ("batch_size", "first")},
    }


def _differences(recorded: dict[str, Any], wanted: ClassImages, weights: Weights, how: SampleSettings) -> list[str]:
    now = _settings(wanted.prompt, how)
    found = [
        f"{key} was {recorded.get(key)!r}, is {value!r}" for key, value in now.items() if recorded.get(key) != value
    ]
    for side, source in weights.sources.items():
        if is_hub_id(source) and not wanted.missing():  # it may not be on this machine, and need not
            was = str(recorded.get(f"{side}_source"))
            same = not is_hub_id(was) or was == source
        else:
            same = check_source(source, side, weights.variant) is not None or recorded.get(side) == weights.content(
                side_parts(side)
            )
        found += [] if same else [f"weights.{side} was another"]
    return found


def _note_origin(wanted: ClassImages, weights: Weights, how: SampleSettings) -> None:
    """Write what the pictures follow from that are about to be drawn into a folder without any."""
    if wanted.folder is None or (wanted.drawn() and not _is_named_by_content(wanted, weights, how)):
        return
    sources = weights.sources
    base = {side: weights.content(side_parts(side)) for side in sources}
    facts = _settings(wanted.prompt, how) | base | {f"{side}_source": source for side, source in sources.items()}
    files.write_atomically(wanted.folder / MADE, json.dumps(facts, indent=2) + "\n")


def _is_named_by_content(wanted: ClassImages, weights: Weights, how: SampleSettings) -> bool:
    """Whether the folder is the cache's own, whose name follows from all that counts."""
    assert wanted.folder is not None  # nosec B101 # narrows the type
    name = wanted.folder.name
    return name.startswith("class-") and name == _name(wanted.prompt, weights, how)


def complete(
    wanted: ClassImages | None, weights: Weights, how: SampleSettings, device: torch.device
) -> ClassImages | None:
    """Draw what is missing. Several processes may ask for it: one draws, the others wait.

    Picture i starts from the noise of (seed, i): one that was killed is gone on with.

    Raises:
        DataError: the folder cannot be written, or holds pictures that were drawn for something else, or memory ran
            out. What was drawn stays.
        ConfigError: the parts cannot be loaded, or cannot draw at this resolution.
    """
    wanted = placed(wanted, weights, how)
    refuse_others(wanted, weights, how, lambda: True)
    if wanted is None or wanted.folder is None or not wanted.missing():
        return wanted
    compatibility.check_resolution(weights, how.height)  # the verb `encode` draws for the prior, too
    try:
        with memory_told(DataError, OUT_OF_MEMORY), files.locked(wanted.folder / ".lock"):
            refuse_others(wanted, weights, how, lambda: True)  # another process may have drawn meanwhile
            if missing := wanted.missing():
                _note_origin(wanted, weights, how)
                draw(wanted.prompt, missing, wanted.folder, weights, how, device)
    except OSError as error:
        raise DataError(
            f"data.class_path: class images cannot be written to {wanted.folder} ({cause_of(error)}); make room, or "
            "give a folder that can"
        ) from error
    return wanted


@torch.no_grad()
def draw(
    prompt: str, numbers: list[int], folder: Path, weights: Weights, how: SampleSettings, device: torch.device
) -> None:
    """Pictures of these numbers into a folder, each complete or not there at all."""
    logger.info("drawing %d class images into %s (%s)", len(numbers), folder, prompt)
    for note in long_texts.prompt_notes(weights.load("tokenizer"), [("data.class_prompt", prompt)]):
        logger.warning(note)
    with weights.lent(("image_encoder",), device):
        null = pipelines.zero_embed(weights.load("image_encoder"))
    with weights.lent(("prior", "text_encoder"), device):
        prior = pipelines.prior_pipeline(weights, null_embed=null)
        embeds = [pipelines.embed_prompts(prior, [prompt], replace(how, first=number)) for number in numbers]
        del prior  # it holds the parts
    with weights.lent(("unet", "movq"), device):
        decoder, made = pipelines.decoder_pipeline(weights), dict(zip(numbers, embeds, strict=True))
        for number in told(numbers, "class images", "drew", logger.info):
            (image,) = pipelines.decode(decoder, made[number], replace(how, first=number))
            with files.replacing(folder / drawn_name(number)) as aside:
                image.save(aside, "PNG")
