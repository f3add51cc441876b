"""The root config of each verb, of the groups in `schema`."""

from dataclasses import dataclass
from typing import Any

from kandinsky_exp.config.rules import (
    Count,
    Modules,
    Name,
    Names,
    Number,
    Port,
    Positive,
    PositiveOrZero,
    Prompts,
    Seed,
    Side,
    Steps,
    Text,
)
from kandinsky_exp.config.schema import (
    Adapter,
    Checkpoint,
    Data,
    Hub,
    Model,
    Optimizer,
    Precision,
    Repository,
    Scheduler,
    Sweep,
    Tracker,
    Trainer,
    Validation,
    Weights,
)


@dataclass
class Train:
    name: Name | None
    output_root: Text
    seed: Seed
    model: Model
    weights: Weights
    data: Data
    optimizer: Optimizer
    scheduler: Scheduler
    precision: Precision
    adapter: Adapter
    trainer: Trainer
    checkpoint: Checkpoint
    validation: Validation
    tracker: Tracker
    hub: Hub
    sweep: Sweep
    trusted_modules: Modules | None = None


@dataclass
class Plan(Train):
    device_memory: Positive | None = None


@dataclass
class Generate:
    name: Name | None
    output_root: Text
    seed: Seed
    weights: Weights
    precision: Precision
    tracker: Tracker
    prior: Text | None
    decoder: Text | None
    prior_adapter: Names | None
    decoder_adapter: Names | None
    adapter_scale: Number | list[Number]
    prompts: Prompts
    negative_prompt: str
    num_images: Count
    guidance_scale: PositiveOrZero
    inference_steps: Count
    prior_guidance_scale: PositiveOrZero
    prior_inference_steps: Steps
    height: Side | None
    width: Side | None
    log_to_run: bool


@dataclass
class Encode:
    output_root: Text
    seed: Seed
    model: Model
    weights: Weights
    data: Data
    precision: Precision
    list: bool
    remove: Names
    trusted_modules: Modules | None = None


@dataclass
class AdapterSource:
    source: Names


@dataclass
class Export:
    name: Name | None
    output_root: Text
    weights: Weights
    precision: Precision
    tracker: Tracker
    adapter: AdapterSource
    base: Text | None
    adapter_scale: Number | list[Number]
    merge: bool


@dataclass
class Push:
    run: Text
    hub: Repository


@dataclass
class Ui:
    output_root: Text
    host: Text
    port: Port
    tracker: Tracker


@dataclass
class SweepSource:
    source: Text | None


@dataclass
class Compare:
    runs: Names | None
    sweep: SweepSource
    name: Name | None
    output_root: Text
    tracker: Tracker


ROOTS: list[type[Any]] = [Train, Plan, Generate, Encode, Export, Push, Ui, Compare]
