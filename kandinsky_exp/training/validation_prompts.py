"""What validation draws: prompts, some of which have settings of their own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from kandinsky_exp.data import given_pictures
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.models.pipelines import SampleSettings

PLAIN = ("seed", "guidance_scale", "inference_steps", "height", "width")
KEY = "validation.prompts"


@dataclass(frozen=True)
class DrawnPrompt:
    """A prompt and how it is drawn: by settings of its own, or by those that all others share."""

    text: str
    settings: SampleSettings
    is_own: bool = False


def read(entries: Sequence[Any], settings: SampleSettings) -> tuple[list[DrawnPrompt], list[str]]:
    """The prompts, and what the user should know of their masks.

    Args:
        entries: texts, and mappings as `config.prompt_entries` has checked them.
        settings: what an entry does not say otherwise.

    Raises:
        ConfigError: a picture or a mask cannot be used.
    """
    found, notes = [], list[str]()
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, Mapping):
            found.append(DrawnPrompt(str(entry), settings))
            continue
        given = {key: value for key, value in entry.items() if value is not None}
        own = replace(settings, **{key: given[key] for key in PLAIN if key in given})
        own = replace(own, negative_prompt=given.get("negative"))
        if "hint" in given:
            hint = given_pictures.open_picture(f"{KEY}: entry {number}: hint", given["hint"])
            own = replace(own, hint=given_pictures.shaped(hint, (own.width, own.height)))
        if "mask" in given:
            own = _with_hole(f"{KEY}: entry {number}", given, own, notes)
        found.append(DrawnPrompt(given["prompt"], own, is_own=True))
    return found, notes


def _with_hole(key: str, given: Mapping[str, Any], settings: SampleSettings, notes: list[str]) -> SampleSettings:
    size = settings.width, settings.height
    picture = given_pictures.open_picture(f"{key}: image", given["image"])
    hole, found = given_pictures.open_hole(f"{key}: mask", given["mask"], picture.size)
    notes += found
    hole = given_pictures.fitted_hole(f"{key}: mask", hole, size)
    return replace(settings, picture=given_pictures.fitted(picture, size), hole=hole)


def check_sizes(prompts: Sequence[DrawnPrompt], multiple: int) -> None:
    """Refuse sizes of entries' own that the decoder cannot draw.

    Raises:
        ConfigError: naming what they have to be a multiple of.
    """
    wrong = [
        f"{KEY}: entry {number}: {name} has to be a multiple of {multiple} for these weights, not {side}"
        for number, prompt in enumerate(prompts, 1)
        for name, side in (("height", prompt.settings.height), ("width", prompt.settings.width))
        if prompt.is_own and side % multiple
    ]
    if wrong:
        raise ConfigError(wrong)


def alike(prompts: Sequence[DrawnPrompt]) -> Iterator[tuple[list[str], SampleSettings]]:
    """Neighbours that are drawn together, with settings that know their numbers."""
    for _, group in groupby(enumerate(prompts), key=lambda one: id(one[1].settings)):
        some = list(group)
        (first, prompt), *_ = some
        yield [one.text for _, one in some], replace(prompt.settings, first=first)
