"""The bare step: what any training of these networks has to do, in plain PyTorch, and nothing else.

Noise, forward, mean squared error, backward, gradient clipping, fused AdamW, on features that lie in memory; the
prior's captions without padding. No logging, no data loading, no checks, no random-number bookkeeping, no dropped
conditions, no variational term: a runner with its defaults does all of that besides, and the ratio charges it for it.
"""

import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky_exp.data import sources
from kandinsky_exp.data.encoded.layout import MASK
from kandinsky_exp.data.encoded.workers import collate
from kandinsky_exp.data.features import without_padding
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages.base import DiffusionStage, Features
from kandinsky_exp.stages.decoder import DecoderStage
from kandinsky_exp.stages.prior import PriorStage

STAGES: dict[str, type[DiffusionStage]] = {"prior": PriorStage, "decoder": DecoderStage}


def stage(name: str, pipelines: str | None, resolution: int) -> DiffusionStage:
    """From a folder with the two pipelines; None for the tiny weights that ship."""
    if pipelines is None:
        weights = Weights("tiny", "tiny", cache_folder=Path(tempfile.mkdtemp()))
    else:
        weights = Weights(f"{pipelines}/prior", f"{pipelines}/decoder", cache_folder=Path(pipelines))
    return STAGES[name](weights, resolution=resolution)  # type: ignore[call-arg]


def examples(made: DiffusionStage, pictures: str, rows: int) -> list[dict[str, Tensor]]:
    """The first pictures as the stage's encoders read them."""
    source = sources.folder(pictures).train
    chosen = [source[row % len(source)] for row in range(rows)]
    return [made.preprocess(example.image(), example.captions[0]) for example in chosen]


class BareStep:
    """Takes one step of `batch` rows at each call, on a network of its own with the same weights."""

    def __init__(self, name: str, pipelines: str | None, pictures: str, batch: int, resolution: int) -> None:
        made = stage(name, pipelines, resolution)
        rows = examples(made, pictures, 4 * batch)
        self.batches = cycle([encoded(made, rows[start : start + batch]) for start in range(0, len(rows), batch)])
        self.name, self.alphas = name, made.alphas_cumprod
        made.set_attention("sdpa")
        self.network: Any = made.network
        self.trainable = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-5, weight_decay=0.0, fused=True)

    def __call__(self) -> None:
        features = next(self.batches)
        clean = features["image_embeds" if self.name == "prior" else "latents"]
        noise, timesteps = torch.randn_like(clean), torch.randint(len(self.alphas), (len(clean),))
        alpha = self.alphas[timesteps].view(-1, *[1] * (clean.ndim - 1))
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        output = FORWARD[self.name](self.network, noisy, timesteps, features)
        loss = F.mse_loss(output[:, : clean.shape[1]], clean if self.name == "prior" else noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def encoded(made: DiffusionStage, rows: list[Features]) -> Features:
    examples = collate(rows)
    return without_padding(made.encode(examples), examples.get(MASK), made.ragged_features)


def _prior(network: Any, noisy: Tensor, timesteps: Tensor, features: Features) -> Tensor:
    answer: Tensor = network(
        noisy,
        timestep=timesteps,
        proj_embedding=features["text_embeds"],
        encoder_hidden_states=features["text_states"],
        attention_mask=features["text_mask"],
    ).predicted_image_embedding
    return answer


def _decoder(network: Any, noisy: Tensor, timesteps: Tensor, features: Features) -> Tensor:
    condition = {"image_embeds": features["image_embeds"]}
    answer: Tensor = network(noisy, timesteps, None, added_cond_kwargs=condition).sample
    return answer


FORWARD = {"prior": _prior, "decoder": _decoder}
