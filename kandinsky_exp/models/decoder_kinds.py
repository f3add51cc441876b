"""The kinds of decoder of Kandinsky 2.2, told by a network's config: what each sees, and which pipelines it is for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EMBEDDING = "addition_embed_type"


@dataclass(frozen=True)
class DecoderKind:
    """
    Args:
        told: what messages call it.
        model: the setting that trains it.
        embedding: `addition_embed_type` of its config.
        channels: of its input, as (latents that it sees, further channels).
        drawing, result: classes of diffusers' pipelines: that draws with it, and that a run leaves.
    """

    told: str
    model: str
    embedding: str
    channels: tuple[int, int]
    drawing: str
    result: str

    def inputs(self, latents: int) -> int:
        """Channels of its input, where a latent has so many."""
        return self.channels[0] * latents + self.channels[1]


PLAIN = DecoderKind(
    "a plain decoder", "decoder", "image", (1, 0), "KandinskyV22Pipeline", "KandinskyV22CombinedPipeline"
)
INPAINTING = DecoderKind(  # noisy latents, kept ones, and where they are kept
    "a decoder for inpainting",
    "inpaint",
    "image",
    (2, 1),
    "KandinskyV22InpaintPipeline",
    "KandinskyV22InpaintCombinedPipeline",
)
HINT = DecoderKind(  # noisy latents, and a hint made as large as these
    "a decoder for hints",
    "control",
    "image_hint",
    (2, 0),
    "KandinskyV22ControlnetPipeline",
    "KandinskyV22ControlnetPipeline",
)
KINDS = (PLAIN, INPAINTING, HINT)


def kind_of(config: Mapping[str, Any], latents: int) -> DecoderKind | None:
    """The kind of a decoder by its config; None for a network that is none of them."""
    found = config.get(EMBEDDING), config.get("in_channels")
    return next((kind for kind in KINDS if found == (kind.embedding, kind.inputs(latents))), None)


def kind_of_network(network: Any) -> DecoderKind:
    """The kind of a decoder that was checked. Its output has the channels of a latent, or twice as many."""
    out = network.config.out_channels
    return kind_of(network.config, out // 2) or kind_of(network.config, out) or PLAIN


def by_result(pipeline: object) -> DecoderKind | None:
    """The kind whose runs leave a pipeline of this class."""
    return next((kind for kind in KINDS if pipeline == kind.result), None)
