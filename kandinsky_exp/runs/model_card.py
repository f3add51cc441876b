"""The card of a result on the hub, in markdown: what it is, what it was made from, and the code that loads it.

The settings and prompts in it may be anybody's: they go through a yaml library or are escaped, and no path is shown.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData

from kandinsky_exp.config import targets
from kandinsky_exp.errors import cut
from kandinsky_exp.models.components import NETWORKS, PRIOR_FOLDER, SHIPPED, PipelineHalf, is_hub_id
from kandinsky_exp.models.decoder_kinds import HINT, INPAINTING, PLAIN, DecoderKind
from kandinsky_exp.runs.run_folder import Record
from kandinsky_exp.system import redaction

HUB = "https://huggingface.co"
LICENCE = "apache-2.0"  # of Kandinsky 2.2
PROMPT = "a red fox in the snow"
TAGS = {INPAINTING: ["inpainting"], HINT: ["controlnet"]}
SHOWN = {  # settings, by group
    "optimizer": ("_target_", "lr", "weight_decay"),
    "scheduler": ("_target_", "warmup_steps"),
    "trainer": ("batch_size", "grad_accumulation", "max_grad_norm", "ema_decay"),
    "model": ("snr_gamma", "condition_dropout", "vlb_weight"),
    "data": ("resolution",),
    "precision": ("name",),
}
ADAPTER = {"adapter": ("name", "rank", "alpha", "dropout", "target_modules")}
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What a run trained.

    Args:
        params: the flattened config of the run.
        record: how far the run came.
        is_adapter: the result is an adapter's weights, not a pipeline.
        kind: of the decoder, where one trained.
    """

    params: Values
    record: Record
    is_adapter: bool
    kind: DecoderKind = PLAIN

    @property
    def half(self) -> PipelineHalf:
        return self.record.half

    def base(self, side: PipelineHalf) -> str | None:
        """The hub id of what the run started from, None where that lies elsewhere."""
        source = str(self.params.get(f"weights.{side}"))
        return source if is_hub_id(source) else None

    @property
    def linked_prior(self) -> str | None:
        """The repository that a decoder on the hub takes its prior from, None where the result brings its own."""
        return self.base("prior") if self.half == "decoder" and not self.is_adapter else None


def model_card(repo: str, result: Result, images: Sequence[tuple[str, str]]) -> str:
    """A whole README.md.

    Args:
        repo: <user>/<name> that the result goes to.
        images: (path in the repository, prompt); an empty prompt for a grid.
    """
    images = [(path, redaction.masked(prompt)) for path, prompt in images]
    adapter = {"lora": "A LoRA", "dora": "A DoRA"}.get(str(result.params.get("adapter.name")), "An adapter")
    kind = f"{adapter} for the {result.half}" if result.is_adapter else f"The {result.half}"
    paragraphs = [
        f"---\n{_metadata(result, images).to_yaml()}\n---\n# {repo.rpartition('/')[2]}",
        f"{kind} of Kandinsky 2.2, fine-tuned with kandinsky-exp.",
        *_pictures(images),
        "## What it was made from",
        _table("", "", _origins(result)),
        "## How it was trained",
        _table("setting", "value", _settings(result)),
        "## How to load it",
        "\n".join(["```python", *_code(repo, result), "```"]),
        "## Licence",
        "Apache-2.0, as Kandinsky 2.2. What the pictures that it was trained on may be used for is not changed by it.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _metadata(result: Result, images: Sequence[tuple[str, str]]) -> ModelCardData:
    """For the hub, and for diffusers: a decoder is connected with the first repository under `prior`."""
    base, (data, _) = result.base(result.half), _data(result.params)
    return ModelCardData(
        base_model=[base] if base else None,
        base_model_relation=("adapter" if result.is_adapter else "finetune") if base else None,
        prior=[result.linked_prior] if result.linked_prior else None,
        datasets=[data] if data else None,
        license=LICENCE,
        library_name="diffusers",
        pipeline_tag=(task := "text-to-image" if result.kind is PLAIN else "image-to-image"),
        tags=["kandinsky", task, *TAGS.get(result.kind, []), "diffusers"] + (["lora"] if result.is_adapter else []),
        widget=[{"text": prompt, "output": {"url": path}} for path, prompt in images if prompt] or None,
    )


def _data(params: Values) -> tuple[str | None, str]:
    """The hub id of the data set, None where it is another's business what it is called; and what to say then."""
    source = targets.source_facts(params.get("data._target_"))
    name = str(params.get(f"data.{source.hub_id}"))
    return name if source.hub_id and is_hub_id(name) else None, source.title


def _pictures(images: Sequence[tuple[str, str]]) -> Iterator[str]:
    for path, prompt in images:
        text = _escaped(prompt) if prompt else "Drawn and redrawn after the last step"
        yield f"![{text}]({path})" + (f"\n\n{text}" if prompt else "")


def _origins(result: Result) -> Iterator[tuple[str, str]]:
    params = result.params
    for side in ("decoder", "prior"):
        base, revision = result.base(side), params.get(f"weights.{side}_revision")
        if side == result.half:
            revision = result.record.revision or revision
        own = (
            "the tiny one that ships with kandinsky-exp"
            if params.get(f"weights.{side}") in SHIPPED
            else "not on the hub"
        )
        at = f" at {_escaped(revision)}" if base and revision else ""
        trained = ", which was trained" if side == result.half else ""
        yield side, (f"[{base}]({HUB}/{base}){at}" if base else own) + trained
    data, title = _data(params)
    rows = f", {result.record.rows} rows that train" if result.record.rows else ""
    yield "data", (f"[{data}]({HUB}/datasets/{data})" if data else title) + rows


def _settings(result: Result) -> Iterator[tuple[str, str]]:
    yield "optimizer steps", _escaped(result.record.step)
    if result.record.result_step is not None:
        yield "weights of step", f"{_escaped(result.record.result_step)}, which had the best validation loss"
    groups = ADAPTER | SHOWN if result.is_adapter else SHOWN
    for key in (*(f"{group}.{name}" for group, names in groups.items() for name in names), "seed"):
        if result.params.get(key) is not None:
            yield f"`{key}`", _escaped(result.params[key])
    if result.record.validation_loss is not None:
        yield "last loss (fixed-noise validation, where pictures were held out)", f"{result.record.validation_loss:.5f}"


def _table(left: str, right: str, rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in [(left, right), ("---", "---"), *rows])


def _escaped(value: Any) -> str:
    """Any value as plain text of one line, in a table too."""
    return re.sub(r"([\\`*_{}\[\]()<>|!#&~])", r"\\\1", " ".join(cut(redaction.masked(str(value))).split()))


def _code(repo: str, result: Result) -> Iterator[str]:
    """Python that draws as the run's own validation did."""
    params = result.params
    side, steps = params.get("data.resolution", 512), params.get("validation.inference_steps", 25)
    drawing = f"height={side!r}, width={side!r}, num_inference_steps={steps!r}"
    if result.kind is INPAINTING:
        yield from _code_that_fills(repo, result, f"{drawing}, prior_num_inference_steps={steps!r}")
        return
    if result.kind is HINT:
        yield from _code_with_hint(repo, result, drawing, side, steps)
        return
    if result.half == "decoder" and not result.is_adapter:
        yield from ("from diffusers import AutoPipelineForText2Image", "")
        yield f'pipeline = AutoPipelineForText2Image.from_pretrained("{repo}")'
        yield f'image = pipeline("{PROMPT}", {drawing}, prior_num_inference_steps={steps!r}).images[0]'
        return
    yield from ("from diffusers import DiffusionPipeline", "")
    for half in ("prior", "decoder"):
        source = repo if half == result.half and not result.is_adapter else result.base(half)
        if source is None:
            yield f'{half.upper()} = "path/to/the/{half}"  # a diffusers folder of the weights that it was trained with'
        revision = params.get(f"weights.{half}_revision") if source != repo and source else None
        at = f", revision={str(revision)!r}" if revision else ""
        yield f"{half} = DiffusionPipeline.from_pretrained({repr(source) if source else half.upper()}{at})"
    if result.is_adapter:
        network = f"{result.half}.{NETWORKS[result.half]}"
        yield f'{network}.load_lora_adapter("{repo}", weight_name="pytorch_lora_weights.safetensors", prefix=None)'
    yield f'image = decoder(**prior("{PROMPT}", num_inference_steps={steps!r}), {drawing}).images[0]'


def _code_that_fills(repo: str, result: Result, drawing: str) -> Iterator[str]:
    yield from ("from diffusers import AutoPipelineForInpainting", "from diffusers.utils import load_image", "")
    source, merging = _whole(repo, result)
    yield from merging
    yield f"pipeline = AutoPipelineForInpainting.from_pretrained({source!r})"
    yield 'picture, hole = load_image("picture.png"), load_image("hole.png")  # what is white in the hole is filled'
    yield f'image = pipeline("{PROMPT}", picture, hole, {drawing}).images[0]'


def _code_with_hint(repo: str, result: Result, drawing: str, side: Any, steps: Any) -> Iterator[str]:
    """A prior pipeline and a decoder pipeline: no pipeline of diffusers joins these two."""
    yield from ("import numpy", "import torch")
    yield "from diffusers import KandinskyV22ControlnetPipeline, KandinskyV22PriorPipeline"
    yield "from diffusers.utils import load_image"
    source, merging = _whole(repo, result)
    if inside := result.linked_prior is None and not merging:
        yield "from huggingface_hub import snapshot_download"
    yield from ("", *merging)
    prior = f'snapshot_download("{repo}") + "/{PRIOR_FOLDER}"' if inside else repr(result.linked_prior)
    prior = f'"{source}/{PRIOR_FOLDER}"' if merging else prior
    yield f"prior = KandinskyV22PriorPipeline.from_pretrained({prior})"
    yield f"decoder = KandinskyV22ControlnetPipeline.from_pretrained({source!r})"
    yield f"side = 8 * {side!r} // decoder.movq_scale_factor"
    yield 'hint = load_image("hint.png").resize((side, side))'
    yield "hint = torch.from_numpy(numpy.array(hint)).permute(2, 0, 1)[None] / 255"
    yield f'embeds = prior("{PROMPT}", num_inference_steps={steps!r})'
    yield f"image = decoder(**embeds, hint=hint, {drawing}).images[0]"


def _whole(repo: str, result: Result) -> tuple[str, list[str]]:
    """Where a whole pipeline is, and the comment that says how to make one of an adapter."""
    if not result.is_adapter:
        return repo, []
    revision = result.params.get("weights.decoder_revision")
    base = result.base("decoder") or "path/to/the/decoder"  # what it was trained with
    at = f" weights.decoder_revision={revision}" if revision else ""
    merge = f"kandinsky-exp export adapter={repo} base={base}{at} name=merged"
    beside = "conv_in.safetensors" if result.kind is INPAINTING else "the files beside it"
    # diffusers reads no layer that trained as a whole
    return "outputs/export/merged/pipeline", [f"# Merge the adapter and {beside} first: {merge}"]
