"""The root config of each verb, of the groups in `schema`."""

from dataclasses import dataclass
from typing import Any

from kandinsky_exp.config import schema
from kandinsky_exp.config.types import (
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


@dataclass
class Train:
    name: Name | None
    output_root: Text
    seed: Seed
    model: schema.Model
    weights: schema.Weights
    data: schema.Data
    optimizer: schema.Optimizer
    scheduler: schema.Scheduler
    precision: schema.Precision
    adapter: schema.Adapter
    trainer: schema.Trainer
    checkpoint: schema.Checkpoint
    validation: schema.Validation
    tracker: schema.Tracker
    hub: schema.Hub
    sweep: schema.Sweep
    trusted_modules: Modules | None = None


@dataclass
class Plan(Train):
    device_memory: Positive | None = None


@dataclass
class Generate:
    name: Name | None
    output_root: Text
    seed: Seed
    weights: schema.Weights
    precision: schema.Precision
    tracker: schema.Tracker
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
    model: schema.Model
    weights: schema.Weights
    data: schema.Data
    precision: schema.Precision
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
    weights: schema.Weights
    precision: schema.Precision
    tracker: schema.Tracker
    adapter: AdapterSource
    base: Text | None
    adapter_scale: Number | list[Number]
    merge: bool


@dataclass
class Push:
    run: Text
    hub: schema.Repository


@dataclass
class Ui:
    output_root: Text
    host: Text
    port: Port
    tracker: schema.Tracker


@dataclass
class SweepSource:
    source: Text | None


@dataclass
class Compare:
    runs: Names | None
    sweep: SweepSource
    name: Name | None
    output_root: Text
    tracker: schema.Tracker


SCHEMAS: dict[str, type[Any]] = {
    root.__name__.lower(): root for root in (Train, Plan, Generate, Encode, Export, Push, Ui, Compare)
}
