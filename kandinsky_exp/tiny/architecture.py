"""The tiny Kandinsky 2.2: the five real classes at a size that trains on two CPU cores.

Images are 64 px, latents (4, 16, 16), CLIP embeddings 64 wide. What is trained ships as fp16 safetensors under
`assets/`; the text encoder is random, rebuilt from a seed, and called so: its states are fixed random features.
"""

import gzip
import zlib
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, VQModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

ASSETS = Path(__file__).parent / "assets"
EMBEDDING = 64
IMAGE_SIZE = 64
SEED = 2023
CHANGE, SCALE = ".change", ".scale"  # end the names of a change's tensors


def prior() -> PriorTransformer:
    return PriorTransformer(num_attention_heads=4, attention_head_dim=16, num_layers=3, embedding_dim=EMBEDDING)


def unet(reads_hints: bool = False) -> UNet2DConditionModel:
    """The decoder: like the original, a resnet-only outer level and attention with image keys on the inner ones."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8 if reads_hints else 4,
        out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        attention_head_dim=16,
        cross_attention_dim=64,
        norm_num_groups=16,
        encoder_hid_dim=EMBEDDING,
        encoder_hid_dim_type="image_proj",
        addition_embed_type="image_hint" if reads_hints else "image",
        resnet_time_scale_shift="scale_shift",
    )


def movq() -> VQModel:
    """Four-fold downsampling. Widths are multiples of 32: the spatial norm of its decoder has 32 groups."""
    return VQModel(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=1024,
        norm_num_groups=32,
        norm_type="spatial",
        sample_size=IMAGE_SIZE,
    )


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter from a generator of its own name and the seed, whatever a library's own init does.

    Matrices keep the variance of what passes through (std = 1/sqrt(fan in)), embeddings are N(0, 1), norms identity.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            if parameter.ndim < 2:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                if name.endswith("class_embedding"):
                    parameter.normal_(generator=generator)
            else:
                fan_in = 1 if "embedding.weight" in name and parameter.ndim == 2 else parameter[0].numel()
                parameter.normal_(std=fan_in**-0.5, generator=generator)
    return module.eval().requires_grad_(False)


def image_encoder() -> CLIPVisionModelWithProjection:
    """Random features of the picture, (B, 3, 64, 64) → (B, 64)."""
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
        projection_dim=EMBEDDING,
    )
    return randomize(CLIPVisionModelWithProjection(config), SEED)


def text_encoder() -> CLIPTextModelWithProjection:
    """Random features of the caption, (B, 77) → states (B, 77, 64) and embedding (B, 64)."""
    config = CLIPTextConfig(
        hidden_size=EMBEDDING,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=EMBEDDING,
        eos_token_id=49407,
        bos_token_id=49406,
        pad_token_id=49407,
    )
    return randomize(CLIPTextModelWithProjection(config), SEED)


def tokenizer() -> CLIPTokenizer:
    """CLIP's own vocabulary, rebuilt from its merges: 256 bytes, the same at a word's end, merges, two marks."""
    lines = gzip.decompress((ASSETS / "clip_merges.txt.gz").read_bytes()).decode("utf-8").splitlines()
    merges = [line for line in lines if not line.startswith("#version")]
    tokens = [*_byte_symbols(), *(symbol + "</w>" for symbol in _byte_symbols())]
    tokens += [line.replace(" ", "") for line in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(line.split(" ")) for line in merges], model_max_length=77)


def _byte_symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes, in the order byte-level BPE numbers them (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(rest))]


def image_processor() -> CLIPImageProcessorPil:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


def prior_scheduler() -> UnCLIPScheduler:
    return UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=5.0
    )


def decoder_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        clip_sample=False,
        variance_type="learned_range",
        prediction_type="epsilon",
    )


def hint_decoder() -> UNet2DConditionModel:
    """The decoder for hints. Of what the plain one has, its file holds the change: whole numbers times a scale."""
    stored, plain = (load_file(ASSETS / f"{name}.safetensors") for name in ("hint_decoder", "unet"))
    module = unet(reads_hints=True)
    tensors = {}
    for name, own in module.state_dict().items():
        if name in stored:
            tensors[name] = stored[name].float()
            continue
        base = torch.zeros_like(own)
        (base[:, : plain[name].shape[1]] if own.ndim > 1 else base).copy_(plain[name])
        change = stored[f"{name}{CHANGE}"].float()
        tensors[name] = base + change * stored[f"{name}{SCALE}"].view(-1, *[1] * (own.ndim - 1))
    module.load_state_dict(tensors)
    return module.eval().requires_grad_(False)


def trained(name: str) -> Any:
    """A part that ships, through its fp16 file: `image_encoder`, `movq`, `unet` or `prior`."""
    module = globals()[name]()
    tensors = load_file(ASSETS / f"{name}.safetensors")
    module.load_state_dict({key: value.float() for key, value in tensors.items()})
    return module.eval().requires_grad_(False)
