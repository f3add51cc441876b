"""The root config of each verb, of the groups in `schema`."""

from kandinsky_exp.config import schema, types


class Train(schema.Group):
    name: types.Name | None
    output_root: types.Text
    seed: types.Seed
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
    trusted_modules: types.Modules | None = None


class Plan(Train):
    device_memory: types.Positive | None = None


class Generate(schema.Group):
    name: types.Name | None
    output_root: types.Text
    seed: types.Seed
    weights: schema.Weights
    precision: schema.Precision
    tracker: schema.Tracker
    prior: types.Text | None
    decoder: types.Text | None
    prior_adapter: types.Names | None
    decoder_adapter: types.Names | None
    adapter_scale: types.Number | list[types.Number]
    prompts: types.Prompts
    negative_prompt: str
    num_images: types.Count
    guidance_scale: types.PositiveOrZero
    inference_steps: types.Count
    prior_guidance_scale: types.PositiveOrZero
    prior_inference_steps: types.Steps
    height: types.Side | None
    width: types.Side | None
    log_to_run: bool


class Encode(schema.Group):
    output_root: types.Text
    seed: types.Seed
    model: schema.Model
    weights: schema.Weights
    data: schema.Data
    precision: schema.Precision
    list: bool
    remove: types.Names
    trusted_modules: types.Modules | None = None


class AdapterSource(schema.Group):
    source: types.Names


class Export(schema.Group):
    name: types.Name | None
    output_root: types.Text
    weights: schema.Weights
    precision: schema.Precision
    tracker: schema.Tracker
    adapter: AdapterSource
    base: types.Text | None
    adapter_scale: types.Number | list[types.Number]
    merge: bool


class Push(schema.Group):
    run: types.Text
    hub: schema.Repository


class Ui(schema.Group):
    output_root: types.Text
    host: types.Text
    port: types.Port
    tracker: schema.Tracker


class SweepSource(schema.Group):
    source: types.Text | None


class Compare(schema.Group):
    runs: types.Names | None
    sweep: SweepSource
    name: types.Name | None
    output_root: types.Text
    tracker: schema.Tracker


SCHEMAS: dict[str, type[schema.Group]] = {
    root.__name__.lower(): root for root in (Train, Plan, Generate, Encode, Export, Push, Ui, Compare)
}
