"""Peak memory of one training step at true size, on the CPU, from random weights and random cached features.

    python tests/bench/memory.py FOLDER prior|decoder [--adapter] [--adafactor] [--batch 1] [--resolution 512]

FOLDER holds the architecture as `prior.json` and `unet.json`. It prints the peak resident memory of this process after
two steps (the second one has the optimizer's state), and what of it was there before the network was built.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler, PriorTransformer, UNet2DConditionModel

from kandinsky_exp.models import adapters
from kandinsky_exp.stages import diffusion


def peak() -> float:
    """Peak resident memory in GB (10⁹ bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def forward(network: torch.nn.Module, stage: str, batch: int, resolution: int) -> torch.Tensor:
    timesteps = torch.randint(1000, (batch,))
    if stage == "prior":
        clean = torch.randn(batch, network.config.embedding_dim)
        states, mask = torch.randn(batch, 77, clean.shape[1]), torch.ones(batch, 77, dtype=torch.bool)
        noisy = diffusion.add_noise(clean, torch.randn_like(clean), timesteps, DDPMScheduler().alphas_cumprod)
        answer = network(noisy, timesteps, torch.randn_like(clean), states, mask).predicted_image_embedding
        return (answer - clean).square().mean()
    noise = torch.randn(batch, 4, resolution // 8, resolution // 8)
    condition = {"image_embeds": torch.randn(batch, network.config.encoder_hid_dim)}
    answer = network(noise, timesteps, None, added_cond_kwargs=condition).sample
    return (answer[:, :4] - noise).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("stage", choices=["prior", "decoder"])
    parser.add_argument("--adapter", action="store_true", help="train a LoRA of rank 4 on bfloat16 weights")
    parser.add_argument("--adafactor", action="store_true")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=512)
    arguments = parser.parse_args()
    before = peak()
    cls, name = {"prior": (PriorTransformer, "prior"), "decoder": (UNet2DConditionModel, "unet")}[arguments.stage]
    torch.set_default_dtype(torch.bfloat16 if arguments.adapter else torch.float32)
    network = cls.from_config(json.loads((arguments.folder / f"{name}.json").read_text()))
    torch.set_default_dtype(torch.float32)
    if arguments.adapter:
        adapters.attach_lora(
            network, rank=4, alpha=None, dropout=0.0, target_modules=None, use_dora=False, dtype=torch.bfloat16
        )
    elif arguments.stage == "prior":
        network.clip_mean.requires_grad_(False)
        network.clip_std.requires_grad_(False)
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if arguments.adafactor:
        from transformers.optimization import Adafactor

        optimizer = Adafactor(trainable, lr=1e-5, scale_parameter=False, relative_step=False, warmup_init=False)
    else:
        optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
    started = time.monotonic()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.adapter):
            loss = forward(network, arguments.stage, arguments.batch, arguments.resolution)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    count = sum(parameter.numel() for parameter in trainable) / 1e6
    print(f"{vars(arguments)}: {count:.1f} M trainable, peak {peak():.1f} GB, {before:.1f} GB of it before the network")
    print(f"two steps took {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
