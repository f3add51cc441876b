"""The tiny Kandinsky 2.2 as diffusers folders, built once from what ships."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

ASSETS = Path(__file__).parent / "assets"
PARTS = {"tiny": ("movq", "unet", "prior", "image_encoder"), "tiny_control": ("movq", "unet", "hint_decoder")}


@cache
def version(name: str = "tiny") -> str:
    """Changes when an asset or the architecture does, so that a stale folder is never used."""
    digest = hashlib.sha256((Path(__file__).parent / "architecture.py").read_bytes())
    for part in PARTS[name]:
        digest.update((ASSETS / f"{part}.safetensors").read_bytes())
    return digest.hexdigest()[:12]


def build(cache_folder: Path, name: str = "tiny") -> Path:
    """The folder of a tiny pipeline under `cache_folder`; made when it is not there yet.

    Args:
        name: `tiny`, both halves as a combined pipeline, or `tiny_control`, the decoder for hints alone.
    """
    folder = cache_folder.absolute() / f"{name}-{version(name)}"
    if not (folder / "model_index.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "model_index.json").is_file():
                # model_index.json marks the folder as complete: it goes last, and the parts first.
                aside = folder.with_name(folder.name + ".part")
                (_write_hint_decoder if name == "tiny_control" else _write)(aside)
                aside.rename(folder)
    return folder


def _write(folder: Path) -> None:
    from diffusers import KandinskyV22CombinedPipeline

    from kandinsky_exp.tiny import architecture

    pipeline = KandinskyV22CombinedPipeline(
        **_decoder(architecture.trained("unet")),
        prior_prior=architecture.trained("prior"),
        prior_image_encoder=architecture.trained("image_encoder"),
        prior_text_encoder=architecture.text_encoder(),
        prior_tokenizer=architecture.tokenizer(),
        prior_scheduler=architecture.prior_scheduler(),
        prior_image_processor=architecture.image_processor(),
    )
    pipeline.save_pretrained(folder)
    # vocab.json and merges.txt, as Kandinsky is published: transformers reads them in a third of the time.
    pipeline.prior_tokenizer.backend_tokenizer.model.save(str(folder / "prior_tokenizer"))
    (folder / "prior_tokenizer" / "tokenizer.json").unlink()


def _write_hint_decoder(folder: Path) -> None:
    from diffusers import KandinskyV22ControlnetPipeline

    from kandinsky_exp.tiny import architecture

    KandinskyV22ControlnetPipeline(**_decoder(architecture.hint_decoder())).save_pretrained(folder)


def _decoder(network: Any) -> dict[str, Any]:
    """The parts of a decoder's pipeline."""
    from kandinsky_exp.tiny import architecture

    return {"unet": network, "scheduler": architecture.decoder_scheduler(), "movq": architecture.trained("movq")}
