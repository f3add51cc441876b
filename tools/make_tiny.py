"""Make the tiny weights and the shipped emoji from a folder of captioned pictures.

    python tools/make_tiny.py FOLDER [--only pictures image_encoder movq unet prior hint_decoder] [--threads 2]

FOLDER holds `train/` and `validation/`, each with `metadata.jsonl` (`file_name`, `text`) and square RGB pictures.
Pictures that ship (64 spread evenly over the train split, 16 over the validation split) are never trained on here: the
demo is what learns them. It took 68 minutes on two busy cores; every part starts from the ones before it.
"""

import argparse
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel, VQModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky_exp.tiny import architecture

Parts = dict[str, Callable[["Emoji"], None]]
SHIPPED = {"train": 64, "validation": 16}


class Emoji:
    """The pictures that do not ship, in memory: pixels (N, 3, 64, 64) in [-1, 1] and captions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = [row for index, row in enumerate(read_rows(folder / "train")) if not is_shipped(folder, index)]
        images = [Image.open(folder / "train" / row["file_name"]) for row in rows]
        self.pixels = torch.stack([to_pixels(image) for image in images])
        self.captions = [row["text"] for row in rows]


def read_rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]


def shipped_indices(folder: Path, split: str) -> list[int]:
    places = np.linspace(0, len(read_rows(folder / split)) - 1, SHIPPED[split])
    return [int(place) for place in places.round()]


def is_shipped(folder: Path, index: int) -> bool:
    return index in shipped_indices(folder, "train")


def shrink(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((architecture.IMAGE_SIZE,) * 2, Image.Resampling.BICUBIC, reducing_gap=None)


def to_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(shrink(image), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


def batches(rows: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches of row indices, every epoch in its own order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(rows, generator=generator)])
        yield order[:size]
        order = order[size:]


def fit(name: str, module: nn.Module, losses: Iterator[Tensor], steps: int, lr: float) -> nn.Module:
    """Train with AdamW on a cosine schedule and return the averaged weights.

    Args:
        losses: yields one loss per step, computed when asked for.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=1e-4, betas=(0.9, 0.99))
    ema = EMAModel(module.parameters(), decay=0.998, use_ema_warmup=True, power=0.75)
    started, total = time.monotonic(), 0.0
    for step, loss in enumerate(losses, start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / 100, 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(module.parameters())
        total += loss.item()
        if step % 100 == 0:
            print(f"{name} {step}/{steps} loss {total / 100:.4f} {time.monotonic() - started:.0f} s", flush=True)
            total = 0.0
    ema.copy_to(module.parameters())
    return module


def save(name: str, module: nn.Module) -> None:
    tensors = {key: value.to(torch.float16).contiguous() for key, value in module.state_dict().items()}
    save_file(tensors, architecture.ASSETS / f"{name}.safetensors")


def make_pictures(emoji: Emoji) -> None:
    for split in SHIPPED:
        target = architecture.ASSETS / "emoji" / split
        target.mkdir(parents=True, exist_ok=True)
        rows = read_rows(emoji.folder / split)
        kept = [rows[index] for index in shipped_indices(emoji.folder, split)]
        for row in kept:
            shrink(Image.open(emoji.folder / split / row["file_name"])).save(target / row["file_name"], optimize=True)
        lines = [json.dumps({"file_name": row["file_name"], "text": row["text"]}) for row in kept]
        (target / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    shutil.copyfile(emoji.folder / "LICENSE", architecture.ASSETS / "emoji" / "LICENSE")


def make_image_encoder(emoji: Emoji) -> None:
    """Embeddings from which a linear map can draw a 16 px thumbnail: random features of this size tell too little."""
    torch.manual_seed(1)
    encoder = architecture.image_encoder().requires_grad_(True).train()
    head = nn.Linear(architecture.EMBEDDING, 3 * 16 * 16)
    model = nn.ModuleDict({"encoder": encoder, "head": head})
    clip_pixels, steps = to_clip_pixels(emoji.pixels), 3000

    def losses() -> Iterator[Tensor]:
        for rows in batches(len(emoji.pixels), 64, steps, seed=1):
            embeds = encoder(clip_pixels[rows]).image_embeds
            thumbnail = F.interpolate(emoji.pixels[rows], size=16, mode="area")
            spread = (embeds.std(0) - 1).square().mean() + embeds.mean(0).square().mean()
            yield F.mse_loss(head(embeds), thumbnail.flatten(1)) + 0.01 * spread

    fit("image_encoder", model, losses(), steps, lr=1e-3)
    save("image_encoder", encoder)


def to_clip_pixels(pixels: Tensor) -> Tensor:
    """(N, 3, 64, 64) in [-1, 1] to the normalised pixels that the image encoder reads."""
    processor = architecture.image_processor()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std))
    return (pixels * 0.5 + 0.5 - mean) / std


def make_movq(emoji: Emoji) -> None:
    """Reconstruction from the latents before quantisation, kept near mean 0 and variance 1: they train the UNet."""
    torch.manual_seed(2)
    model, steps = architecture.movq().train(), 2000

    def losses() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(2)
        for rows in batches(len(emoji.pixels), 16, steps, seed=2):
            pixels = emoji.pixels[rows]
            latents = model.encode(pixels).latents
            noisy = latents + 0.05 * torch.randn(latents.shape, generator=generator)
            decoded = model.decode(noisy, force_not_quantize=True).sample
            spread = (latents.std((0, 2, 3)) - 1).square().mean() + latents.mean((0, 2, 3)).square().mean()
            edges = F.l1_loss(decoded.diff(dim=-1), pixels.diff(dim=-1)) + F.l1_loss(
                decoded.diff(dim=-2), pixels.diff(dim=-2)
            )
            yield F.mse_loss(decoded, pixels) + F.l1_loss(decoded, pixels) + edges + 0.1 * spread

    fit("movq", model, losses(), steps, lr=1e-3)
    fit_codebook(model, emoji.pixels)
    save("movq", model)


@torch.no_grad()
def fit_codebook(model: VQModel, pixels: Tensor, rounds: int = 5) -> None:
    """k-means of the latents: the pipelines never look the codebook up, but it should not be noise."""
    vectors = model.encode(pixels[:256]).latents.permute(0, 2, 3, 1).reshape(-1, 4)
    codes = vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(3))[:1024]]
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(chunk, codes).argmin(1) for chunk in vectors.split(8192)])
        sums = torch.zeros_like(codes).index_add_(0, nearest, vectors)
        counts = torch.bincount(nearest, minlength=len(codes)).unsqueeze(1)
        codes = torch.where(counts > 0, sums / counts.clamp(min=1), codes)
    model.quantize.embedding.weight.copy_(codes)


@torch.no_grad()
def embed(pixels: Tensor) -> Tensor:
    return torch.cat(
        [
            architecture.trained("image_encoder")(chunk).image_embeds
            for chunk in torch.split(to_clip_pixels(pixels), 128)
        ]
    )


def make_unet(emoji: Emoji) -> None:
    """ε-prediction with dropped conditions and the variational term of the learned variance."""
    from kandinsky_exp.stages import diffusion

    torch.manual_seed(4)
    model, steps, size = architecture.unet().train(), 3000, 48
    scheduler, encoder = architecture.decoder_scheduler(), architecture.trained("movq")
    embeds = embed(emoji.pixels)
    null = architecture.trained("image_encoder")(
        torch.zeros(1, 3, architecture.IMAGE_SIZE, architecture.IMAGE_SIZE)
    ).image_embeds
    with torch.no_grad():
        latents = torch.cat([encoder.encode(chunk).latents for chunk in torch.split(emoji.pixels, 64)])

    def losses() -> Iterator[Tensor]:
        for rows in batches(len(latents), size, steps, seed=4):
            clean, noise = latents[rows], torch.randn(size, 4, 16, 16)
            timesteps = torch.randint(0, 1000, (size,))
            condition = torch.where(torch.rand(size, 1) < 0.1, null, embeds[rows])
            noisy = scheduler.add_noise(clean, noise, timesteps)
            output = model(noisy, timesteps, None, added_cond_kwargs={"image_embeds": condition}).sample
            yield (
                F.mse_loss(output[:, :4], noise)
                + 0.001
                * 1000
                * diffusion.variational_bound(
                    output[:, :4].detach(), output[:, 4:], clean, noisy, timesteps, scheduler.alphas_cumprod
                ).mean()
            )

    save("unet", fit("unet", model, losses(), steps, lr=1e-3))


def make_prior(emoji: Emoji) -> None:
    """Sample-prediction of the normalised image embedding; its mean and deviation are those of these pictures."""
    torch.manual_seed(5)
    model, steps, size = architecture.prior().train(), 6000, 64
    nn.init.normal_(model.positional_embedding, std=0.02)
    nn.init.normal_(model.prd_embedding, std=0.02)
    embeds = embed(emoji.pixels)
    model.clip_mean.requires_grad_(False).copy_(embeds.mean(0, keepdim=True))
    model.clip_std.requires_grad_(False).copy_(embeds.std(0, keepdim=True))
    clean = (embeds - model.clip_mean) / model.clip_std
    states, pooled, mask = encode_text(emoji.captions)
    null_states, null_pooled, null_mask = encode_text([""])
    scheduler = architecture.prior_scheduler()

    def losses() -> Iterator[Tensor]:
        for rows in batches(len(clean), size, steps, seed=5):
            timesteps = torch.randint(0, 1000, (size,))
            noisy = scheduler.add_noise(clean[rows], torch.randn(size, architecture.EMBEDDING), timesteps)
            drop = torch.rand(size) < 0.1
            yield F.mse_loss(
                model(
                    noisy,
                    timestep=timesteps,
                    proj_embedding=torch.where(drop[:, None], null_pooled, pooled[rows]),
                    encoder_hidden_states=torch.where(drop[:, None, None], null_states, states[rows]),
                    attention_mask=torch.where(drop[:, None], null_mask, mask[rows]),
                ).predicted_image_embedding,
                clean[rows],
            )

    save("prior", fit("prior", model, losses(), steps, lr=1e-3))


@torch.no_grad()
def encode_text(captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Captions to states (N, 77, 64), pooled embeddings (N, 64) and masks (N, 77) of the random text encoder."""
    tokens = architecture.tokenizer()(captions, padding="max_length", truncation=True, return_tensors="pt")
    encoder = architecture.text_encoder()
    outputs = [encoder(chunk) for chunk in tokens.input_ids.split(128)]
    states = torch.cat([output.last_hidden_state for output in outputs])
    return states, torch.cat([output.text_embeds for output in outputs]), tokens.attention_mask.bool()


def make_hint_decoder(emoji: Emoji) -> None:
    """The runner's own way: from the decoder above, with edges as hints."""
    from kandinsky_exp import cli

    with tempfile.TemporaryDirectory() as place:
        for split in SHIPPED:
            (target := Path(place, "pictures", split)).mkdir(parents=True)
            rows = read_rows(emoji.folder / split)
            kept = [row for index, row in enumerate(rows) if split != "train" or not is_shipped(emoji.folder, index)]
            for row in kept:
                shutil.copyfile(emoji.folder / split / row["file_name"], target / row["file_name"])
            (target / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
        data = ["data=folder", f"data.path={place}/pictures", "data.resolution=64", "data.encode_workers=0"]
        model = ["model=control", "weights=tiny", "model.new_lr_factor=3", "model.condition_dropout=0.3"]
        steps = ["optimizer.lr=1e-3", "trainer.batch_size=16", "trainer.max_steps=2700", "trainer.ema_decay=0.995"]
        quiet = ["validation.every=2700", "validation.reconstructions=0", "tracker=none", f"output_root={place}"]
        cli.main([*data, *model, *steps, *quiet, "name=control"])
        save_hint_decoder(Path(place, "control", "pipeline", "unet"))


def save_hint_decoder(folder: Path) -> None:
    """A trained decoder for hints as the plain one's change, in whole numbers from -127 to 127 for each output."""
    plain = architecture.trained("unet").state_dict()
    tensors = {}
    for name, value in UNet2DConditionModel.from_pretrained(folder).state_dict().items():
        if name not in plain:
            tensors[name] = value.half()
            continue
        change = value.clone()
        (change[:, : plain[name].shape[1]] if value.ndim > 1 else change).sub_(plain[name])
        scale = change.reshape(len(change), -1).abs().amax(1).clamp(min=1e-8) / 127
        whole = (change / scale.view(-1, *[1] * (value.ndim - 1))).round()
        tensors |= {f"{name}{architecture.CHANGE}": whole.to(torch.int8), f"{name}{architecture.SCALE}": scale}
    save_file(tensors, architecture.ASSETS / "hint_decoder.safetensors")


PARTS: Parts = {
    "pictures": make_pictures,
    "image_encoder": make_image_encoder,
    "movq": make_movq,
    "unet": make_unet,
    "prior": make_prior,
    "hint_decoder": make_hint_decoder,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny weights and the shipped emoji.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    emoji = Emoji(arguments.folder)
    for name in arguments.only:
        PARTS[name](emoji)


if __name__ == "__main__":
    main()
