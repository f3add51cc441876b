"""Where the parts of Kandinsky 2.2 are: hub repositories, diffusers folders, folders of earlier runs, the tiny one.

Kandinsky 2.2 comes as two pipelines. The prior pipeline holds `prior`, `text_encoder`, `image_encoder`, `tokenizer`,
`image_processor` and a scheduler; the decoder pipeline `unet`, `movq` and a scheduler. A combined folder holds both,
the prior's parts under names that begin with `prior_`. Here every part has one name, whatever the layout.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from kandinsky_exp import paths, weight_files
from kandinsky_exp.errors import ConfigError, cut, first_line

if TYPE_CHECKING:
    import torch

Side = Literal["prior", "decoder"]
# Part → (the pipeline that holds it, its subfolder there).
PARTS: dict[str, tuple[Side, str]] = {
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
SHRINKING = ("movq", "unet")
COMBINED = "KandinskyV22CombinedPipeline"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def side_parts(side: Side) -> list[str]:
    return [name for name, (owner, _) in PARTS.items() if owner == side]


def is_hub_id(source: str) -> bool:
    return HUB_ID.fullmatch(source) is not None and not paths.exists(source)


def check_source(source: str, side: Side) -> str | None:
    """What is wrong with a source of weights, or None. Reads small JSON files only and imports no torch."""
    if source == "tiny" or is_hub_id(source):
        return None
    root = paths.expanded(source)
    if not paths.is_folder(root):
        return f"there is no folder '{cut(source)}'; give one, or a hub id: kandinsky-community/kandinsky-2-2-{side}"
    folder = pipeline_folder(root)
    if folder == root and (root / "config.yaml").is_file():
        left = "an adapter run leaves no whole network" if (root / "adapter").is_dir() else "it is not finished"
        return f"'{source}' is a run without a pipeline/ to start from: {left}; give another folder"
    if not (folder / "model_index.json").is_file():
        return f"'{source}' has no model_index.json; give the top folder of a diffusers pipeline or of an earlier run"
    try:
        _read_object(folder / "model_index.json")
    except (OSError, ValueError):
        return f"'{source}': model_index.json cannot be read; fetch or save the pipeline again"
    problems = [problem for part in side_parts(side) if (problem := _check_part(folder, part, side))]
    return f"'{source}': {'; '.join(problems)}; give a Kandinsky 2.2 {side}, or fetch it again" if problems else None


def _check_part(folder: Path, part: str, side: Side) -> str | None:
    part_folder = folder / subfolder(folder, part)
    if not part_folder.is_dir():
        return f"subfolder '{part_folder.name}' is missing"
    expected = MODELS.get(part)
    if expected is None:
        return weight_files.unreadable(part_folder)
    try:
        found = _class_name(part_folder / "config.json")
    except (OSError, ValueError):
        return f"'{part_folder.name}/config.json' cannot be read"
    if found != expected:
        return f"'{part_folder.name}' holds a {found}, not a {expected}"
    if not any(part_folder.glob("*.safetensors")):
        pickled = " (pickled .bin weights are refused: convert them)" if any(part_folder.glob("*.bin")) else ""
        return f"'{part_folder.name}' has no .safetensors file{pickled}"
    return weight_files.damaged(part_folder)


def _class_name(config_file: Path) -> str:
    config = _read_object(config_file)
    return str(config.get("_class_name") or (config.get("architectures") or ["unknown model"])[0])


def _read_object(file: Path) -> dict[str, Any]:
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
    return f"prior_{name}" if side == "prior" and index.get("_class_name") == COMBINED else name


@dataclass
class Weights:
    """The parts of one prior and one decoder, each fetched and loaded once, when first asked for.

    Args:
        prior, decoder: a hub id, a diffusers folder, the folder of an earlier run, or `tiny`.
        cache_folder: where the tiny pipelines are built.
        frozen_dtype: torch dtype, by name, of what does not train.
        tf32: whether matrix products of float32 are rounded to it.
    """

    prior: str
    decoder: str
    cache_folder: Path
    prior_revision: str | None = None
    decoder_revision: str | None = None
    variant: str | None = None
    frozen_dtype: str = "float32"
    tf32: bool = False
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    def folder(self, part: str) -> Path:
        """The local folder of a part; hub parts are downloaded when first asked for, each on its own."""
        side, name = PARTS[part]
        source = self.prior if side == "prior" else self.decoder
        if source == "tiny":
            from kandinsky_exp.tiny.pipelines import build

            root = build(self.cache_folder)
        elif is_hub_id(source):
            return self._download(source, side, name)
        else:
            root = pipeline_folder(paths.expanded(source))
        return root / subfolder(root, part)

    def _download(self, repo: str, side: Side, name: str) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        revision = self.prior_revision if side == "prior" else self.decoder_revision
        weights = f"{name}/*.{self.variant}.safetensors" if self.variant else f"{name}/*.safetensors"
        try:
            root = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=["model_index.json", f"{name}/*.json", f"{name}/*.txt", f"{name}/*.model", weights],
            )
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ConfigError(
                f"weights.{side}: '{repo}' could not be fetched from the hub ({first_line(error)}); check the id, "
                "weights.*_revision, your access (huggingface-cli login) and the network, or give a local folder"
            ) from error
        part = Path(root) / name
        if not part.is_dir():
            raise ConfigError(f"weights.{side}: '{repo}' on the hub has no '{name}'; check the id, or fetch it first")
        return part

    def revision(self, side: Side) -> str | None:
        """The commit that a hub source resolved to; None for folders."""
        source = self.prior if side == "prior" else self.decoder
        if not is_hub_id(source):
            return None
        return self.folder("prior_scheduler" if side == "prior" else "decoder_scheduler").parent.name

    def size_multiple(self) -> int:
        """What the sides of the decoder's images are multiples of: its pipeline rounds up to it, its UNet needs it."""
        configs = {part: _read_object(self.folder(part) / "config.json") for part in SHRINKING}
        levels = {part: len(config["block_out_channels"]) for part, config in configs.items()}
        scale = 1 << levels["movq"] - 1  # pixels per latent
        return scale * max(scale, 1 << levels["unet"] - 1)

    def load(self, part: str) -> Any:
        """A frozen part, on the CPU at first; loaded once.

        Raises:
            ConfigError: the files are no such part.
        """
        if part not in self._loaded:
            self._loaded[part] = self._read(part, self.frozen_dtype)
            if part in MODELS:
                self._loaded[part].eval().requires_grad_(False)
        return self._loaded[part]

    def load_trainable(self, part: str) -> Any:
        """A network to train: a copy of its own, in fp32, whatever the precision of the rest."""
        return self._read(part, "float32").train()

    def _read(self, part: str, dtype: str) -> Any:
        folder = self.folder(part)
        try:
            return _read_part(part, folder, dtype, self.variant)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            side, _ = PARTS[part]
            reason = f"{folder} cannot be loaded as '{part}': {first_line(error)}"
            raise ConfigError(f"weights.{side}: {reason}; fetch or copy it again") from error

    def read_model(self, part: str, folder: Path) -> Any:
        """A frozen model of this kind from any folder, such as a checkpoint's."""
        return _read_model(part, folder, self.frozen_dtype, None).eval().requires_grad_(False)

    def release(self, parts: Iterable[str]) -> None:
        """Forget loaded parts, so that their memory is free."""
        for part in parts:
            self._loaded.pop(part, None)

    @contextmanager
    def on_device(self, parts: Iterable[str], device: "torch.device | str") -> Iterator[None]:
        """Frozen parts on the device for as long as they work there, then back where they were."""
        models = [self.load(part) for part in parts]
        homes = [model.device for model in models]
        for model in models:
            model.to(device)
        try:
            yield
        finally:
            for model, home in zip(models, homes, strict=True):
                model.to(home)

    @contextmanager
    def lent(self, parts: Iterable[str], device: "torch.device | str") -> Iterator[None]:
        """`on_device` for once: what was not loaded before is forgotten afterwards."""
        fresh = [part for part in parts if part not in self._loaded]
        try:
            with self.on_device(parts, device):
                yield
        finally:
            self.release(fresh)

    def fingerprint(self, parts: Iterable[str]) -> str:
        """A hash that follows what these parts compute: the content of the files they are read from, and precision."""
        files = {part: weight_files.opened(self.folder(part), part in MODELS, self.variant) for part in parts}
        rounded = self.tf32 and self.frozen_dtype == "float32"
        texts = [self.frozen_dtype, "tf32" if rounded else "", weight_files.fingerprint(files, self.cache_folder)]
        return hashlib.sha256(" ".join(texts).encode()).hexdigest()


def _read_part(part: str, folder: Path, dtype: str, variant: str | None) -> Any:
    if part in ("prior_scheduler", "decoder_scheduler"):
        return _read_scheduler(folder)
    if part not in MODELS:
        # The PIL variant needs no torchvision; the plain name falls back to it with a warning.
        from transformers import CLIPImageProcessorPil, CLIPTokenizer

        if part == "image_processor":
            return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        if len(tokenizer) < 256 or tokenizer.model_max_length > 1 << 20:  # its files are missing: no error of its own
            raise ValueError("its vocabulary or its model_max_length is missing")
        return tokenizer
    return _read_model(part, folder, dtype, variant)


def _read_model(part: str, folder: Path, dtype: str, variant: str | None) -> Any:
    import diffusers
    import torch
    import transformers

    cls = getattr(transformers if part.endswith("encoder") else diffusers, MODELS[part])
    model, info = cls.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        variant=variant if weight_files.has_variant(folder, variant) else None,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):  # the libraries fill them with random numbers
        raise ValueError(f"it lacks {len(missing)} tensors such as {missing[0]}")
    return model


def _read_scheduler(folder: Path) -> Any:
    import diffusers

    config = json.loads((folder / "scheduler_config.json").read_text("utf-8"))
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None or not issubclass(cls, diffusers.SchedulerMixin):
        raise ValueError(f"unknown noise scheduler {config.get('_class_name')!r}")
    return cls.from_pretrained(folder, local_files_only=True)
