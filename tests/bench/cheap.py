"""A prior stage whose encoders cost nothing, so that a cache of 100,000 rows is made in a minute.

Its pictures are not looked at and its features are random, but it goes by the same names and fingerprints as the real
stage: a table that a run with this stage wrote is the one that the real stage finds. Only for data sets of a benchmark.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages.base import Features
from kandinsky_exp.stages.prior import PriorStage

TOKENS = 18  # of a caption


class _Blind(Preprocess):
    def __call__(self, image: Image.Image | None, caption: str | None, *others: Any) -> dict[str, Tensor]:  # type: ignore[override]
        tensors = {} if image is None else {"clip_pixels": torch.zeros(1)}
        return tensors if caption is None else tensors | self.tokenize([caption])[0][0]

    def tokenize(self, captions: Sequence[str]) -> list[tuple[dict[str, Tensor], str | None]]:
        mask = torch.arange(self.tokenizer.model_max_length) < TOKENS  # type: ignore[union-attr]
        return [({"input_ids": torch.zeros_like(mask, dtype=torch.int64), "text_mask": mask}, None) for _ in captions]


class CheapPrior(PriorStage):
    def __init__(
        self, weights: Weights, *, resolution: int = 512, snr_gamma: float | None = None, condition_dropout: float = 0.1
    ) -> None:
        super().__init__(weights, resolution=resolution, snr_gamma=snr_gamma, condition_dropout=condition_dropout)
        given: dict[str, Any] = {field.name: getattr(self.preprocess, field.name) for field in fields(self.preprocess)}
        self.preprocess = _Blind(**given)

    def encoding_fingerprint(self) -> str:
        return self.weights.fingerprint(self.encoders)

    def encode(self, examples: dict[str, Tensor]) -> Features:
        features: Features = {}
        width = self.weights.load("image_encoder").config.projection_dim
        if "clip_pixels" in examples:
            features["image_embeds"] = torch.randn(len(examples["clip_pixels"]), width)
        if "text_mask" in examples:
            mask = examples["text_mask"]
            states = torch.randn(*mask.shape, width) * mask.unsqueeze(-1)
            features |= {"text_embeds": torch.randn(len(mask), width), "text_states": states, "text_mask": mask}
        return features
