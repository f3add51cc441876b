"""The prior without padding: what its published forward computes, at no more positions than the captions need.

The published forward computes 77 text tokens and four further ones (the caption's embedding, the time, the noisy
embedding, the answer) of each sample, causally, its padding masked. Here padding stands last, where causal attention
alone hides it from all that counts: [the caption's tokens | its four further ones | padding], cut to the longest
caption of the batch. There is no mask, so that flash attention takes it. Positions are added before tokens are ordered:
the answer is the same up to rounding. Of the last block only the answer's place is computed.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.prior_transformer import PriorTransformerOutput
from torch import Tensor, nn


class CausalAttention:
    """Self-attention of the prior's blocks, in which a position sees itself and what stands before it."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: None, attention_mask: None) -> Tensor:
        """(B, L, D) → (B, L, D). The other two are diffusers', of other blocks."""
        return _attended(attn, hidden_states, hidden_states, is_causal=True)


def remove_padding(network: Any) -> bool:
    """Have a `PriorTransformer` compute without padding; False, and as it was, where its architecture is another one.

    It takes text states of any length from now on, and masks that are true up to the end of each caption.
    """
    if network.prd_embedding is None or network.additional_embeddings != 4:
        return False
    network.set_attn_processor(CausalAttention())
    network.forward = MethodType(forward, network)  # what Accelerate and DDP wrap
    return True


def is_unpadded(network: nn.Module) -> bool:
    """Whether a network takes text states of any length."""
    return any(isinstance(one, CausalAttention) for one in getattr(network, "attn_processors", {}).values())


def forward(
    network: Any,
    hidden_states: Tensor,
    timestep: Tensor | float,
    proj_embedding: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    return_dict: bool = True,
) -> PriorTransformerOutput | tuple[Tensor]:
    """Takes the place of `PriorTransformer.forward`.

    Args:
        hidden_states: (B, E), noisy embeddings of images.
        timestep: (B,), or one for all.
        proj_embedding: (B, E), of the captions.
        encoder_hidden_states: (B, L, E), states of the captions' tokens.
        attention_mask: (B, L) bool, true for a caption's tokens, which come first.
    """
    further = _further_tokens(network, hidden_states, timestep, proj_embedding)
    text = encoder_hidden_states
    if network.encoder_hidden_states_proj is not None:
        text = network.encoder_hidden_states_proj(text)
    length = text.shape[1]
    positions = network.positional_embedding.to(text.dtype)
    count = further.shape[1]
    tokens = torch.cat([text + positions[:, :length], further + positions[:, -count:]], dim=1)
    lengths = attention_mask.sum(1)
    tokens = _rows(tokens, _order(lengths, length, count))
    if network.norm_in is not None:
        tokens = network.norm_in(tokens)
    for block in network.transformer_blocks[:-1]:
        tokens = block(tokens)
    answers = _answers(network.transformer_blocks[-1], tokens, (lengths + count - 1).unsqueeze(1))
    predicted = network.proj_to_clip_embeddings(network.norm_out(answers))
    return PriorTransformerOutput(predicted_image_embedding=predicted) if return_dict else (predicted,)


def _answers(block: Any, tokens: Tensor, places: Tensor) -> Tensor:
    """What the last block makes of tokens (B, N, D) at places (B, 1), the only ones that are read: (B, D)."""
    normed, residual = block.norm1(tokens), _rows(tokens, places)
    seen = torch.arange(tokens.shape[1], device=tokens.device) <= places
    hidden = residual + _attended(block.attn1, _rows(normed, places), normed, attn_mask=seen[:, None, None])
    answers: Tensor = hidden + block.ff(block.norm3(hidden))
    return answers.squeeze(1)


def _attended(attn: Any, asking: Tensor, asked: Tensor, **mask: Any) -> Tensor:
    """Attention of tokens (B, M, D) to tokens (B, N, D): (B, M, D)."""
    query, key, value = (
        project(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for project, tokens in ((attn.to_q, asking), (attn.to_k, asked), (attn.to_v, asked))
    )
    project, dropout = attn.to_out
    mixed = F.scaled_dot_product_attention(query, key, value, **mask)
    output: Tensor = dropout(project(mixed.transpose(1, 2).flatten(2)))
    return output


def _further_tokens(network: Any, noisy: Tensor, timestep: Tensor | float, captions: Tensor) -> Tensor:
    """(B, 4, D): the caption's embedding, the time, the noisy embedding, and where the answer is read."""
    timesteps = torch.as_tensor(timestep, device=noisy.device).expand(len(noisy))
    time = network.time_embedding(network.time_proj(timesteps).to(network.dtype))
    if network.embedding_proj_norm is not None:
        captions = network.embedding_proj_norm(captions)
    embedded = network.proj_in(noisy)
    answer = network.prd_embedding.to(embedded.dtype).expand(len(noisy), 1, -1)
    return torch.cat([torch.stack([network.embedding_proj(captions), time, embedded], dim=1), answer], dim=1)


def _order(lengths: Tensor, length: int, count: int) -> Tensor:
    """(B, L + count): which of [L text tokens | count further ones] stands at each place: padding last."""
    places = torch.arange(length + count, device=lengths.device).expand(len(lengths), -1)
    behind = places - lengths.unsqueeze(1)  # how far behind the caption's end
    moved = torch.where(behind < count, length + behind, places - count)
    return torch.where(behind < 0, places, moved)


def _rows(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, N, D) at places (B, M): (B, M, D)."""
    starts = torch.arange(len(tokens), device=tokens.device).unsqueeze(1) * tokens.shape[1]
    return tokens.flatten(0, 1).index_select(0, (places + starts).flatten()).view(*places.shape, -1)
