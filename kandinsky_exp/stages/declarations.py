"""What a stage declares of itself, so that no other code asks for its class."""

from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from kandinsky_exp.models import components
from kandinsky_exp.models.compatibility import REQUIRED, Requirement
from kandinsky_exp.models.pipelines import WHOLE


class Declarations(ABC):
    """The declarations of a stage, and what they are unless it says otherwise."""

    name: ClassVar[str]
    part: ClassVar[str]  # that trains: its name in `components.PARTS`, and its folder's in a checkpoint
    half: ClassVar[components.PipelineHalf]  # of Kandinsky; this and the next two follow from `part`
    requires: ClassVar[tuple[Requirement, ...]]  # what of the network's config has to agree with what
    result_pipeline: ClassVar[str]  # class of the pipeline that a full run leaves
    encoders: ClassVar[tuple[str, ...]]  # frozen parts that `encode` needs
    # Parts that `sample` holds at a time, one after the other.
    draws_with: ClassVar[tuple[tuple[str, ...], ...]] = WHOLE
    stays_loaded: ClassVar[tuple[str, ...]] = ()  # of these, what is not forgotten when all is drawn
    redraws: ClassVar[bool] = False  # whether `reconstruct` gives anything
    ragged_features: ClassVar[tuple[str, ...]] = ()  # follow the caption's length, or with buckets the picture's shape
    extra_inputs: ClassVar[Mapping[str, tuple[int, ...]]] = {}  # columns beside picture and caption: shapes of numbers
    unfit_attention: ClassVar[Mapping[str, str]] = {}  # values of `trainer.attention`, and why they cannot be
    regions: ClassVar[tuple[type[nn.Module], ...]] = ()  # blocks that `trainer.compile=regional` compiles one by one
    memory_format: ClassVar[torch.memory_format] = torch.preserve_format  # of 4-dimensional weights, on the CPU
    encodes_as: ClassVar[str]  # the stage whose encoded features serve it too; its own name, unless it is given
    trains_whole: ClassVar[tuple[str, ...]] = ()  # layers that train as they are beside an adapter
    judges: ClassVar[tuple[str, ...]] = ()  # names of the metrics that `judge` gives
    prompt_inputs: ClassVar[tuple[str, ...]] = ()  # what else validation may draw a prompt from: image, mask, hint
    measures: ClassVar[tuple[str, ...]] = ()  # parts of the loss that are metrics: `train/loss_hole`, if `hole` is one

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls) and "encodes_as" not in vars(cls):
            cls.encodes_as = cls.name
        if "part" in vars(cls):
            half = components.PARTS[cls.part][0]
            declared = {"half": half, "requires": REQUIRED[half], "result_pipeline": components.RESULTS[half]}
            for name in declared.keys() - vars(cls).keys():
                setattr(cls, name, declared[name])

    @classmethod
    def reads_captions(cls) -> bool:
        return "text_encoder" in cls.encoders

    @classmethod
    def reads_pixels(cls) -> bool:
        """Whether `data.resolution` changes what trains."""
        return "movq" in cls.encoders

    @classmethod
    def setting_problems(cls, settings: Mapping[str, Any]) -> Mapping[str, str]:
        """What is wrong with settings of the stage's own whose types are right, by name."""
        return {}

    @classmethod
    def companions(cls, data: Mapping[str, Any]) -> Mapping[str, type[Any]]:
        """Pictures that belong to each picture, by name: classes of `data.companions`.

        Args:
            data: the settings of that group.
        """
        return {}
