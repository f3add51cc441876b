"""The parts of Kandinsky 2.2 in memory, from wherever they lie: hub, diffusers folders, earlier runs, the tiny one."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from kandinsky_exp.errors import ConfigError, first_line, is_out_of_memory
from kandinsky_exp.models import weight_files
from kandinsky_exp.models.components import (
    MODELS,
    PARTS,
    SHIPPED,
    PipelineHalf,
    is_hub_id,
    pipeline_folder,
    read_object,
    subfolder,
)
from kandinsky_exp.system.files import expanded

if TYPE_CHECKING:
    import torch


@dataclass
class Weights:
    """The parts of one prior and one decoder, each fetched and loaded once, when first asked for.

    Args:
        prior, decoder: a hub id, a diffusers folder, the folder of an earlier run, or
            what ships: `tiny`, or of a decoder `tiny_control`.
        cache_folder: where the tiny pipelines are built.
        frozen_dtype: torch dtype, by name, of what does not train.
        tf32: whether matrix products of float32 are rounded to it.
        adapted: only an adapter of the network will train.
        base_precision: `int8` or `nf4`, of a network of which only an adapter trains; needs CUDA and bitsandbytes.
    """

    prior: str
    decoder: str
    cache_folder: Path
    prior_revision: str | None = None
    decoder_revision: str | None = None
    variant: str | None = None
    frozen_dtype: str = "float32"
    tf32: bool = False
    adapted: bool = False
    base_precision: str | None = None
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def sources(self) -> dict[PipelineHalf, str]:
        return {"prior": self.prior, "decoder": self.decoder}

    def folder(self, part: str) -> Path:
        """The local folder of a part; hub parts are downloaded when first asked for, each on its own."""
        side, name = PARTS[part]
        source = self.sources[side]
        if source in SHIPPED:
            from kandinsky_exp.tiny.pipelines import build

            root = build(self.cache_folder, source)
        elif is_hub_id(source):
            return self._download(source, side, name)
        else:
            root = pipeline_folder(expanded(source))
        return root / subfolder(root, part)

    def _download(self, repo: str, side: PipelineHalf, name: str) -> Path:
        about = ["model_index.json", f"{name}/*.json", f"{name}/*.txt", f"{name}/*.model"]
        part = self._snapshot(repo, side, [*about, *self._tensors(name)]) / name
        if self._tensors(name) and name in MODELS and self.variant and not weight_files.has_variant(part, self.variant):
            part = self._snapshot(repo, side, [*about, f"{name}/*.safetensors"]) / name  # plain files count then
        if not part.is_dir():
            raise ConfigError(f"weights.{side}: '{repo}' on the hub has no '{name}'; check the id, or fetch it first")
        return part

    def _snapshot(self, repo: str, side: PipelineHalf, patterns: list[str]) -> Path:
        return fetched(repo, f"weights.{side}", patterns, getattr(self, f"{side}_revision"))

    def _tensors(self, name: str) -> list[str]:
        """Patterns of the files of a part that hold tensors."""
        if self.variant is None:
            return [f"{name}/*.safetensors"]
        return [f"{name}/*.{self.variant}.safetensors", f"{name}/*.{self.variant}-*.safetensors"]

    def revision(self, side: PipelineHalf) -> str | None:
        """The commit that a hub source resolved to; None for folders."""
        return self.folder(f"{side}_scheduler").parent.name if is_hub_id(self.sources[side]) else None

    def latent_scale(self) -> int:
        """Pixels per latent, along each side."""
        return int(1 << len(read_object(self.folder("movq") / "config.json")["block_out_channels"]) - 1)

    def size_multiple(self) -> int:
        """What the sides of the decoder's images are multiples of: its pipeline rounds up to it, its UNet needs it."""
        levels = len(read_object(self.folder("unet") / "config.json")["block_out_channels"])
        return self.latent_scale() * max(self.latent_scale(), 1 << levels - 1)

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

    def bytes_loaded(self, parts: Iterable[str]) -> int:
        """Of these networks, as far as they are in memory."""
        found = (self._loaded[part] for part in parts if part in self._loaded)
        return sum(value.nbytes for network in found for value in network.parameters())

    def load_trainable(self, part: str) -> Any:
        """A network to train: a copy of its own, in fp32, whatever the precision of the rest.

        One that is `adapted` is frozen, and in `frozen_dtype`; with `base_precision` its linear layers are quantised.
        """
        dtype = self.frozen_dtype if self.adapted else "float32"
        return self._read(part, dtype, self.base_precision).train()

    def tensors(self, part: str, names: Iterable[str]) -> "dict[str, torch.Tensor]":
        """Some tensors of a part, in fp32, from its files alone: those of these names that it has."""
        from safetensors import safe_open

        found: dict[str, torch.Tensor] = {}
        for file in self.files(part):
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    found |= {name: opened.get_tensor(name).float() for name in set(names) & set(opened.keys())}
        return found

    def _read(self, part: str, dtype: str, bits: str | None = None) -> Any:
        folder = self.folder(part)
        try:
            return self._made(part, folder, dtype, bits)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            side, _ = PARTS[part]
            if is_out_of_memory(error):
                raise ConfigError(
                    f"weights.{side}: '{part}' does not fit into memory ({first_line(error)}); set precision=bf16, or "
                    "end what else is in memory"
                ) from error
            reason = f"{folder} cannot be loaded as '{part}': {first_line(error)}"
            raise ConfigError(f"weights.{side}: {reason}; fetch or copy it again") from error

    def _made(self, part: str, folder: Path, dtype: str, bits: str | None) -> Any:
        if part in MODELS:
            return _read_model(part, folder, dtype, self.variant, bits)
        return _read_scheduler(folder) if part.endswith("scheduler") else _read_processor(part, folder)

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
        try:
            for model in models:  # inside: where memory runs out half-way, all of them go back
                model.to(device)
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
        rounded = self.tf32 and self.frozen_dtype == "float32"
        texts = [self.frozen_dtype, "tf32" if rounded else "", self.content(parts)]
        return hashlib.sha256(" ".join(texts).encode()).hexdigest()

    def content(self, parts: Iterable[str]) -> str:
        """A hash of the files that these parts are read from, wherever they lie."""
        return weight_files.fingerprint({part: self.files(part) for part in parts}, self.cache_folder)

    def files(self, part: str) -> list[Path]:
        """Those that loading a part opens."""
        return weight_files.opened(self.folder(part), part in MODELS, self.variant)


def fetched(repo: str, key: str, patterns: list[str], revision: str | None = None) -> Path:
    """The folder of a hub repository's files of these names.

    Args:
        key: of the setting that names the repository, for messages.

    Raises:
        ConfigError: it is not there, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        at = "" if revision is None else f"{key}_revision, "
        raise ConfigError(
            f"{key}: '{repo}' is no folder here, and could not be fetched from the hub ({first_line(error)}); check "
            f"the id, {at}your access (hf auth login) and the network, or give a local folder"
        ) from error


def _read_processor(part: str, folder: Path) -> Any:
    # The PIL variant needs no torchvision; the plain name falls back to it with a warning.
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    if part == "image_processor":
        return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)  # nosec B615 # a folder
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)  # nosec B615 # a folder
    if len(tokenizer) < 256 or tokenizer.model_max_length > 1 << 20:  # its files are missing: no error of its own
        raise ValueError("its vocabulary or its model_max_length is missing")
    return tokenizer


def _read_model(part: str, folder: Path, dtype: str, variant: str | None, bits: str | None = None) -> Any:
    import diffusers
    import torch
    import transformers

    is_clip = part.endswith("encoder")
    cls = getattr(transformers if is_clip else diffusers, MODELS[part])
    model, info = cls.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        variant=variant if weight_files.has_variant(folder, variant) else None,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **({"attn_implementation": "sdpa"} if is_clip else {}),  # else its config may name a kernel to fetch and run
        **({"quantization_config": _quantised(bits, dtype)} if bits is not None else {}),
    )
    if missing := sorted(info["missing_keys"]):  # the libraries fill them with random numbers
        raise ValueError(f"it lacks {len(missing)} tensors such as {missing[0]}")
    return model


def _quantised(bits: str, dtype: str) -> Any:
    """8-bit integers (Dettmers et al. 2022), or NF4 whose constants are quantised too (Dettmers et al. 2023)."""
    import torch
    from diffusers import BitsAndBytesConfig

    if bits == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = getattr(torch, dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute, bnb_4bit_use_double_quant=True
    )


def _read_scheduler(folder: Path) -> Any:
    import diffusers

    config = json.loads((folder / "scheduler_config.json").read_text("utf-8"))
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None or not issubclass(cls, diffusers.SchedulerMixin):
        raise ValueError(f"unknown noise scheduler {config.get('_class_name')!r}")
    return cls.from_pretrained(folder, local_files_only=True)
