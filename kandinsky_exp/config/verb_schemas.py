"""The root config of each verb, of the groups in `schema`."""

from typing import Literal

from kandinsky_exp.config import schema


class Train(schema.Group):
    name: schema.Name | None
    output_root: schema.Text
    seed: schema.Seed
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
    trusted_modules: schema.Modules | None = None


class Plan(Train):
    device_memory: schema.Positive | None = None


class Drawing(schema.Group):
    """What draws, and how."""

    name: schema.Name | None
    output_root: schema.Text
    seed: schema.Seed
    weights: schema.Weights
    precision: schema.Precision
    tracker: schema.Tracker
    prior: schema.Text | None
    decoder: schema.Text | None
    prior_adapter: schema.Names | None
    decoder_adapter: schema.Names | None
    adapter_scale: schema.Number | list[schema.Number]
    guidance_scale: schema.PositiveOrZero
    inference_steps: schema.Count
    prior_guidance_scale: schema.PositiveOrZero
    prior_inference_steps: schema.Steps


class Generate(Drawing):
    task: Literal["text", "image", "inpaint", "mix", "control"]
    prompts: schema.Prompts
    image: schema.Text | None
    mask: schema.Text | None
    hint: schema.Text | None
    strength: schema.Strength | None
    mix: list[schema.Text]
    mix_weights: list[schema.Number] | None
    negative_prompt: str
    num_images: schema.Count
    height: schema.Side | None
    width: schema.Side | None
    log_to_run: bool


class Evaluate(Drawing):
    run: schema.Text | None
    model: schema.Model
    data: schema.Data
    num_images: schema.Count | None
    batch_size: schema.Count
    encoder: schema.Text | None
    validation: schema.HeldOut
    trusted_modules: schema.Modules | None = None


class Encode(schema.Group):
    output_root: schema.Text
    seed: schema.Seed
    model: schema.Model
    weights: schema.Weights
    data: schema.EncodedData
    precision: schema.Precision
    list: bool
    remove: schema.Names
    trusted_modules: schema.Modules | None = None


class AdapterSource(schema.Group):
    source: schema.Names


class Export(schema.Group):
    name: schema.Name | None
    output_root: schema.Text
    weights: schema.Weights
    precision: schema.Precision
    tracker: schema.Tracker
    adapter: AdapterSource
    base: schema.Text | None
    adapter_scale: schema.Number | list[schema.Number]
    merge: bool


class Push(schema.Group):
    run: schema.Text
    hub: schema.Repository


class Ui(schema.Group):
    output_root: schema.Text
    host: schema.Text
    port: schema.Port
    tracker: schema.Tracker


class SweepSource(schema.Group):
    source: schema.Text | None


class Compare(schema.Group):
    runs: schema.Names | None
    sweep: SweepSource
    name: schema.Name | None
    output_root: schema.Text
    tracker: schema.Tracker


SCHEMAS: dict[str, type[schema.Group]] = {
    root.__name__.lower(): root for root in (Train, Plan, Generate, Evaluate, Encode, Export, Push, Ui, Compare)
}
