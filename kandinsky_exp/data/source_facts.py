"""What the function of a source declares of itself, for the check of a config, `plan` and the model card."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Announced:
    """A split of which the name and the number of images are known, and nothing was fetched."""

    name: str
    count: int | None


@dataclass(frozen=True)
class AnnouncedSplits:
    """In place of `Splits`, for `plan`."""

    train: Announced
    validation: Announced | None
    class_images: None = None

    @property
    def both(self) -> list[Announced]:
        return [self.train] + ([self.validation] if self.validation is not None else [])

    @property
    def is_divided(self) -> bool:
        return self.validation is None


@dataclass(frozen=True)
class SourceFacts:
    """A decorator of a source, also of one's own: `@declares(files=("path",))`.

    Args:
        folders, files: settings that name a folder or a file, which has to be there.
        streamed: what can only be read in order, such as `shards`: training needs data.cache=true then.
        hub_id: the setting that names a data set of the hub, where it names no folder.
        announced: takes the settings and `limit`, and says what is known of `hub_id` before anything is fetched.
        title: what a model card calls a set that is not of the hub.
    """

    folders: tuple[str, ...] = ("path", "validation_path", "instance_path")
    files: tuple[str, ...] = ()
    streamed: str = ""
    hub_id: str = ""
    announced: Callable[..., AnnouncedSplits] | None = None
    title: str = "own pictures"

    def __call__(self, function: Function) -> Function:
        vars(function)["facts"] = self
        return function


declares = SourceFacts


def arguments(function: Callable[..., Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings that a function takes."""
    return {name: settings[name] for name in signature(function).parameters if name in settings}
