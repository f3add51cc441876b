"""The parts of Kandinsky 2.2, and what a folder of them has to look like. Reads small files and imports no torch.

Kandinsky 2.2 comes as two pipelines. The prior pipeline holds `prior`, `text_encoder`, `image_encoder`, `tokenizer`,
`image_processor` and a scheduler; the decoder pipeline `unet`, `movq` and a scheduler. A combined folder holds both,
the prior's parts under names that begin with `prior_`. Here every part has one name, whatever the layout.
"""

import json
import re
from pathlib import Path
from typing import Any, Literal

from kandinsky_exp.errors import cut
from kandinsky_exp.models import weight_files
from kandinsky_exp.models.decoder_kinds import HINT, PLAIN
from kandinsky_exp.system import files

PipelineHalf = Literal["prior", "decoder"]
# Part → (the pipeline that holds it, its subfolder there).
PARTS: dict[str, tuple[PipelineHalf, str]] = {
    "prior": ("prior", "prior"),
    "text_encoder": ("prior", "text_encoder"),
    "image_encoder": ("prior", "image_encoder"),
    "tokenizer": ("prior", "tokenizer"),
    "image_processor": ("prior", "image_processor"),
    "prior_scheduler": ("prior", "scheduler"),
    "unet": ("decoder", "unet"),
    "movq": ("decoder", "movq"),
    "decoder_scheduler": ("decoder", "scheduler"),
}
MODELS = {
    "prior": "PriorTransformer",
    "text_encoder": "CLIPTextModelWithProjection",
    "image_encoder": "CLIPVisionModelWithProjection",
    "unet": "UNet2DConditionModel",
    "movq": "VQModel",
}
NETWORKS: dict[PipelineHalf, str] = {"prior": "prior", "decoder": "unet"}  # the part of each half that can train
# The pipelines that results are, by half. A combined one holds both halves.
RESULTS: dict[PipelineHalf, str] = {"prior": "KandinskyV22PriorPipeline", "decoder": PLAIN.result}
SHIPPED = ("tiny", "tiny_control")  # sources that come with the package; the second is a decoder alone
PRIOR_FOLDER = "prior"  # in the result of a decoder for hints, which no combined pipeline of diffusers takes
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def side_parts(side: PipelineHalf) -> list[str]:
    return [name for name, (owner, _) in PARTS.items() if owner == side]


def is_combined(pipeline: object) -> bool:
    return str(pipeline).endswith("CombinedPipeline")


def result_parts(half: PipelineHalf, pipeline: str) -> list[str]:
    """The parts of a result, by the half that trained and the class of its pipeline."""
    return list(PARTS) if is_combined(pipeline) or pipeline == HINT.result else side_parts(half)


def is_hub_id(source: str) -> bool:
    return HUB_ID.fullmatch(source) is not None and not source.endswith(".safetensors") and not files.exists(source)


def check_source(source: str, side: PipelineHalf, variant: str | None = None) -> str | None:
    """What is wrong with a source of weights, or None. Reads small JSON files only and imports no torch."""
    if source in SHIPPED:
        return None if source == "tiny" or side == "decoder" else f"'{source}' is a decoder alone; give tiny"
    if is_hub_id(source):
        return None
    root = files.expanded(source)
    if not files.is_folder(root):
        return f"there is no folder '{cut(source)}'; give one, or a hub id: kandinsky-community/kandinsky-2-2-{side}"
    folder = pipeline_folder(root)
    if folder == root and (root / "config.yaml").is_file():
        if (root / "adapter").is_dir():
            how = f"kandinsky-exp export {files.setting('adapter', root)}"
            return f"'{source}' has an adapter, no whole network; make one: {how}"
        fork = f", or begin at its last checkpoint with {files.setting('checkpoint.resume', root)}"
        hint = (
            f"go on with it first{fork if any((root / 'checkpoints').glob('step-*')) else ', or give another folder'}"
        )
        return f"'{source}' is a run without a pipeline/ to start from ({_status(root)}); {hint}"
    if not (folder / "model_index.json").is_file():
        return f"'{source}' has no model_index.json; give the top folder of a diffusers pipeline or of an earlier run"
    try:
        read_object(folder / "model_index.json")
    except (OSError, ValueError):
        return f"'{source}': model_index.json cannot be read; fetch or save the pipeline again"
    problems = [problem for part in side_parts(side) if (problem := _check_part(folder, part, variant))]
    if not problems:
        return None
    is_whole = all(weight_files.SET_VARIANT in problem for problem in problems)
    return f"'{source}': {'; '.join(problems)}" + (
        "" if is_whole else f"; give a Kandinsky 2.2 {side}, or fetch it again"
    )


def _status(run_folder: Path) -> str:
    try:
        return str(read_object(run_folder / "run.json")["status"])[:20]
    except (OSError, ValueError, KeyError):
        return "nothing is recorded of it"


def _check_part(folder: Path, part: str, variant: str | None) -> str | None:
    part_folder = folder / subfolder(folder, part)
    if not part_folder.is_dir():
        return f"subfolder '{part_folder.name}' is missing"
    if problem := weight_files.untrusted(part_folder):
        return problem
    expected = MODELS.get(part)
    if expected is None:
        return weight_files.unreadable(part_folder)
    try:
        config = read_object(part_folder / "config.json")
    except (OSError, ValueError):
        return f"'{part_folder.name}/config.json' cannot be read"
    found = config.get("_class_name") or (config.get("architectures") or ["unknown model"])[0]
    if found != expected:
        return f"'{part_folder.name}' holds a {found}, not a {expected}"
    if problem := weight_files.lacking(part_folder, variant):
        return f"'{part_folder.name}' {problem}"
    return weight_files.damaged(part_folder, variant)


def read_object(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file} is no JSON object")
    return content


def pipeline_folder(root: Path) -> Path:
    """The diffusers folder itself: a run keeps its result in `pipeline/`."""
    return root / "pipeline" if (root / "pipeline" / "model_index.json").is_file() else root


def subfolder(folder: Path, part: str) -> str:
    """The part's folder name in this pipeline's layout; combined pipelines prefix the prior's parts."""
    side, name = PARTS[part]
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    return f"prior_{name}" if side == "prior" and is_combined(index.get("_class_name")) else name
