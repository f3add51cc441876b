"""The typed schema of what our own code reads: one dataclass per root config and per group of conf/.

A field with a default may be absent. An `OpenNode` is built through its `_target_`: further keys are that target's
arguments and are checked against its signature (`targets`). Defaults and explanations of the keys are in conf/.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from kandinsky_exp.config.rules import (
    BELOW_ONE,
    BETAS,
    FRACTION,
    MODEL_NAME,
    Count,
    CountOrZero,
    Positive,
    PositiveOrZero,
    Prompts,
    Seed,
    Side,
    Steps,
    Text,
)


@dataclass
class OpenNode:
    """A node with a `_target_`. Subclasses type the arguments that are ours to judge; none has to be there."""

    given_later: ClassVar[frozenset[str]] = frozenset()  # arguments that the run hands over: not settings
    beside: ClassVar[frozenset[str]] = frozenset()  # keys that our code reads and the target does not take
    by_run: ClassVar[frozenset[str]] = frozenset()  # null = the run decides, and leaves it out where no target takes it
    role: ClassVar[str] = ""  # what the target has to be: see `trust`

    _target_: Text
    _partial_: bool = True


@dataclass
class Model(OpenNode):
    role = "model"
    given_later = frozenset({"weights", "resolution"})

    snr_gamma: Positive | None = None
    condition_dropout: Annotated[float, FRACTION] = 0.0
    vlb_weight: PositiveOrZero = 0.0


@dataclass
class Optimizer(OpenNode):
    role = "optimizer"
    given_later = frozenset({"params"})
    by_run = frozenset({"fused"})

    lr: Positive = 1.0
    weight_decay: PositiveOrZero = 0.0
    betas: Annotated[list[float], BETAS] | None = None
    eps: Positive | list[Positive] = 1.0
    momentum: Annotated[float, BELOW_ONE] = 0.0
    warmup_steps: CountOrZero = 0
    fused: bool | None = None


@dataclass
class Scheduler(OpenNode):
    role = "scheduler"
    given_later = frozenset({"optimizer", "total_steps"})

    warmup_steps: CountOrZero = 0
    num_cycles: Count = 1
    power: Positive = 1.0
    lr_end: PositiveOrZero = 0.0


@dataclass
class _DataKeys:
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


@dataclass
class Data(OpenNode, _DataKeys):
    role = "data"
    given_later = frozenset({"extra_columns"})
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


@dataclass
class Weights:
    prior: Text
    decoder: Text
    prior_revision: Text | None
    decoder_revision: Text | None
    variant: Text | None


@dataclass
class Precision:
    name: Text
    mixed_precision: Literal["no", "fp16", "bf16"]
    frozen_dtype: Literal["float32", "float16", "bfloat16"]
    tf32: bool


@dataclass
class Adapter:
    name: Literal["none", "lora", "dora"]
    rank: Count | None
    alpha: Positive | None
    dropout: Annotated[float, BELOW_ONE]
    target_modules: Literal["attention", "all-linear"] | list[Text] | None
    use_rslora: bool
    init: Literal["default", "gaussian", "pissa", "olora"]
    base_precision: Literal["int8", "nf4"] | None


@dataclass
class Trainer:
    max_steps: Count
    max_epochs: Count | None
    max_minutes: Positive | None
    batch_size: Count
    grad_accumulation: Count
    max_grad_norm: Positive | None
    gradient_checkpointing: bool
    compile: bool
    attention: Literal["sdpa", "xformers", "eager"]
    ema_decay: Annotated[float, BELOW_ONE] | None
    log_every: Count


@dataclass
class Checkpoint:
    every: Count
    keep: Count
    behind: bool
    resume: Text


@dataclass
class Validation:
    every: Count
    prompts: Prompts
    inference_steps: Steps
    guidance_scale: PositiveOrZero
    seed: Seed
    fraction: Annotated[float, BELOW_ONE]
    batch_size: Count
    draws: Count
    reconstructions: CountOrZero


@dataclass
class Tracker:
    name: Literal["mlflow", "none"]
    uri: Text | None
    experiment: Text
    register: Annotated[str, MODEL_NAME] | None = None


@dataclass
class Hub:
    push: bool
    repo_id: Text | None
    private: bool


@dataclass
class Sweep:
    devices: Literal["auto"] | list[int | str] | None
    max_jobs: Count
    trial: CountOrZero | None


@dataclass
class Repository:
    repo_id: Text | None
    private: bool | None
