"""The typed schema of what our own code reads: a class for each group of conf/; `verb_schemas` has the root configs.

A key with a default may be absent. An `OpenNode` is built through its `_target_`: further keys are that target's
arguments and are checked against its signature (`targets`). Defaults and explanations of the keys are in conf/.
"""

import re
import typing
from typing import Annotated, Any, Literal

from kandinsky_exp.config.types import LARGEST, Rule, at_least

# --- values


def _is_folder_name(text: str) -> bool:
    return text.strip() == text and text not in ("", ".", "..") and not set(text) & set('/\\:*?"<>|\n')


Count = Annotated[int, at_least(1)]
CountOrZero = Annotated[int, at_least(0)]
Steps = Annotated[int, at_least(2)]  # the prior's noise schedule divides by one less
Seed = Annotated[int, Rule(lambda value: 0 <= value < 2**32, "between 0 and 2^32 - 1")]
Port = Annotated[int, Rule(lambda value: 0 < value < 2**16, "between 1 and 65535")]
Side = Annotated[int, Rule(lambda value: value > 0 and value % 8 == 0, "a multiple of 8, such as 512 or 768")]
Number = Annotated[float, Rule(lambda value: abs(value) <= LARGEST, "finite")]
Positive = Annotated[float, Rule(lambda value: 0 < value <= LARGEST, "above 0")]
Strength = Annotated[float, Rule(lambda value: 0 < value <= 1, "above 0 and at most 1")]
PositiveOrZero = Annotated[float, at_least(0)]
Fraction = Annotated[float, Rule(lambda value: 0 <= value <= 1, "between 0 and 1")]
BelowOne = Annotated[float, Rule(lambda value: 0 <= value < 1, "at least 0 and below 1")]
Betas = Annotated[
    list[float],
    Rule(lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas), "two of them, each at least 0 and below 1"),
]
Text = Annotated[str, Rule(lambda text: text.strip() != "", "")]
Name = Annotated[str, Rule(_is_folder_name, 'without any of / \\ : * ? " < > |')]
ModelName = Annotated[
    str, Rule(lambda text: text.strip() != "" and not set(text) & set("/:"), "a name without / and :")
]
Module = Annotated[
    str,
    Rule(lambda text: all(part.isidentifier() for part in text.split(".")), "the name of a module, as it is imported"),
]
Modules = list[Module]
Names = list[Text] | Text
Prompts = list[Text] | Text
DrawnPrompts = list[Text | dict[str, Any]] | Text  # mappings: see `prompt_entries`


def _are_sets(sets: dict[str, Any]) -> bool:
    fits = re.compile(r"[A-Za-z0-9_-]{1,60}").fullmatch
    return all(
        fits(str(name)) and isinstance(entry, dict) and entry and "???" not in entry.values()
        for name, entry in sets.items()
    )


PictureSets = Annotated[
    dict[str, Any],
    Rule(_are_sets, "sets of pictures by name, of letters, digits, - and _: '{night: {path: night_pictures}}'"),
]  # see `set_entries`


# --- groups


class Group:
    """Settings: the annotations of a subclass. It has no instances, for configs stay OmegaConf's."""

    @classmethod
    def annotations(cls) -> dict[str, Any]:
        return typing.get_type_hints(cls, include_extras=True)


class OpenNode(Group):
    """A node with a `_target_`. Subclasses type the arguments that are ours to judge; none has to be there."""

    given_later = frozenset[str]()  # arguments that the run hands over: not settings
    beside = frozenset[str]()  # keys that our code reads and the target does not take
    by_run = frozenset[str]()  # null = the run decides, and leaves it out where no target takes it
    role = ""  # what the target has to be: see `allowlist`

    _target_: Text
    _partial_: bool = True


class Model(OpenNode):
    role = "model"
    given_later = frozenset({"weights", "resolution"})

    snr_gamma: Positive | None = None
    condition_dropout: Fraction = 0.0
    vlb_weight: PositiveOrZero = 0.0
    new_lr_factor: Positive = 1.0


class Optimizer(OpenNode):
    role = "optimizer"
    given_later = frozenset({"params"})
    by_run = frozenset({"fused"})

    lr: Positive = 1.0
    weight_decay: PositiveOrZero = 0.0
    betas: Betas | None = None
    eps: Positive | list[Positive] = 1.0
    momentum: BelowOne = 0.0
    warmup_steps: CountOrZero = 0
    fused: bool | None = None


class Scheduler(OpenNode):
    role = "scheduler"
    given_later = frozenset({"optimizer", "total_steps"})

    warmup_steps: CountOrZero = 0
    num_cycles: Count = 1
    power: Positive = 1.0
    lr_end: PositiveOrZero = 0.0


class _DataKeys(Group):
    resolution: Side
    max_samples: Count | None
    num_workers: CountOrZero
    cache: bool
    cache_dtype: Literal["fp16", "fp32"]
    encode_batch: Count | None
    encode_workers: CountOrZero | None
    flip: bool
    buckets: bool
    on_error: Literal["raise", "skip"]
    hole_column: Text | None = None
    holes: Text | None = None
    hint: Literal["canny", "column"] = "canny"
    hint_column: Text = "hint"
    hints: Text | None = None


class Data(OpenNode, _DataKeys):
    role = "data"
    beside = frozenset(_DataKeys.__annotations__)

    _partial_: bool = False
    path: Text | list[Text] = "."
    name: Text = "."
    subset: Text | None = None
    image_column: Text = "image"
    caption_column: Text = "text"
    instance_path: Text = "."
    instance_prompt: Text = "."
    class_path: Text | None = None
    class_prompt: Text | None = None
    num_class_images: Count = 100
    prior_loss_weight: PositiveOrZero = 1.0


class EncodedData(Data):
    beside = Data.beside | {"part"}

    part: CountOrZero | None = None


class Weights(Group):
    prior: Text
    decoder: Text
    prior_revision: Text | None
    decoder_revision: Text | None
    variant: Text | None


class Precision(Group):
    name: Text
    mixed_precision: Literal["no", "fp16", "bf16"]
    frozen_dtype: Literal["float32", "float16", "bfloat16"]
    tf32: bool


class Adapter(Group):
    name: Literal["none", "lora", "dora"]
    rank: Count | None
    alpha: Positive | None
    dropout: BelowOne
    target_modules: Literal["attention", "all-linear"] | list[Text] | None
    use_rslora: bool
    init: Literal["default", "gaussian", "pissa", "olora"]
    base_precision: Literal["int8", "nf4"] | None


class Trainer(Group):
    max_steps: Count
    max_epochs: Count | None
    max_minutes: Positive | None
    batch_size: Count
    grad_accumulation: Count
    max_grad_norm: Positive | None
    gradient_checkpointing: bool
    compile: bool | Literal["regional"]
    group_by_length: bool
    attention: Literal["sdpa", "xformers", "eager"]
    ema_decay: BelowOne | None
    log_every: Count


class Checkpoint(Group):
    every: Count
    keep: Count
    behind: bool
    result: Literal["last", "best"]
    resume: Text


DrawnMetric = Literal["clip_score", "cmmd"]  # of pictures that are drawn for it


class Validation(Group):
    every: Count
    prompts: DrawnPrompts
    inference_steps: Steps
    guidance_scale: PositiveOrZero
    seed: Seed
    fraction: BelowOne
    batch_size: Count
    draws: Count
    reconstructions: CountOrZero
    patience: Count | None
    metrics: list[DrawnMetric]
    sets: PictureSets | None = None


class HeldOut(Group):
    fraction: BelowOne


class Tracker(Group):
    name: Literal["mlflow", "none"]
    uri: Text | None
    experiment: Text
    register: ModelName | None = None


class Hub(Group):
    push: bool
    repo_id: Text | None
    private: bool


class Sweep(Group):
    devices: Literal["auto"] | list[int | str] | None
    max_jobs: Count
    objective: Text
    direction: Literal["minimize", "maximize"]
    trial: CountOrZero | None


class Repository(Group):
    repo_id: Text | None
    private: bool | None
