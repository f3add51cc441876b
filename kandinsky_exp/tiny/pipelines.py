"""The tiny Kandinsky 2.2 as a combined diffusers folder, built once from what ships."""

import hashlib
from functools import cache
from pathlib import Path

from filelock import FileLock

ASSETS = Path(__file__).parent / "assets"


@cache
def version() -> str:
    """Changes when an asset or the architecture does, so that a stale folder is never used."""
    digest = hashlib.sha256((Path(__file__).parent / "architecture.py").read_bytes())
    for name in ("movq", "unet", "prior", "image_encoder"):
        digest.update((ASSETS / f"{name}.safetensors").read_bytes())
    return digest.hexdigest()[:12]


def build(cache_folder: Path) -> Path:
    """The folder of the tiny combined pipeline under `cache_folder`; made when it is not there yet."""
    folder = cache_folder.absolute() / f"tiny-{version()}"
    if not (folder / "model_index.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "model_index.json").is_file():
                _write(folder)
    return folder


def _write(folder: Path) -> None:
    from diffusers import KandinskyV22CombinedPipeline

    from kandinsky_exp.tiny import architecture

    pipeline = KandinskyV22CombinedPipeline(
        unet=architecture.trained("unet"),
        scheduler=architecture.decoder_scheduler(),
        movq=architecture.trained("movq"),
        prior_prior=architecture.trained("prior"),
        prior_image_encoder=architecture.trained("image_encoder"),
        prior_text_encoder=architecture.text_encoder(),
        prior_tokenizer=architecture.tokenizer(),
        prior_scheduler=architecture.prior_scheduler(),
        prior_image_processor=architecture.image_processor(),
    )
    # model_index.json marks the folder as complete: it goes last, and the parts first.
    aside = folder.with_name(folder.name + ".part")
    pipeline.save_pretrained(aside)
    # vocab.json and merges.txt, as Kandinsky is published: transformers reads them in a third of the time.
    pipeline.prior_tokenizer.backend_tokenizer.model.save(str(aside / "prior_tokenizer"))
    (aside / "prior_tokenizer" / "tokenizer.json").unlink()
    aside.rename(folder)
