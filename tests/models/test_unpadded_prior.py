"""The prior without padding against the published forward: answers, losses and gradients."""

import copy

import pytest
import torch
from diffusers import PriorTransformer
from torch import Tensor

from kandinsky_exp.models import adapters, unpadded_prior

FULL, WIDTH = 77, 32
LENGTHS = {"mixed": [2, 9, 20, 5], "the empty caption": [2, 2], "full": [77, 77], "one is full": [77, 2, 30]}
Inputs = dict[str, Tensor]


def networks(**settings: object) -> tuple[PriorTransformer, PriorTransformer]:
    """The published one, and the same without padding. Nothing in it is zero."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 3, "embedding_dim": WIDTH}
    stock = PriorTransformer(**{**sizes, **settings})
    for parameter in stock.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    ours = copy.deepcopy(stock)
    assert unpadded_prior.remove_padding(ours)
    return stock, ours


def inputs(lengths: list[int]) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def some(*sides: int) -> Tensor:
        return torch.randn(len(lengths), *sides, generator=generator)

    return {
        "hidden_states": some(WIDTH),
        "timestep": torch.randint(1000, (len(lengths),), generator=generator),
        "proj_embedding": some(WIDTH),
        "encoder_hidden_states": some(FULL, WIDTH),
        "attention_mask": torch.arange(FULL) < torch.tensor(lengths)[:, None],
    }


def cut(given: Inputs, spare: int = 0) -> Inputs:
    longest = int(given["attention_mask"].sum(1).max()) + spare
    return {key: value[:, :longest] if value.shape[1:2] == (FULL,) else value for key, value in given.items()}


def gradients(network: torch.nn.Module, given: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The answer (B, E), and the gradients of its squared distance to something."""
    network.zero_grad()
    answer = network(**given).predicted_image_embedding
    (answer - torch.linspace(-1, 1, WIDTH)).square().mean().backward()
    return answer.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def is_near(ours: Tensor, stock: Tensor, scale: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((ours - stock).abs().max() <= tolerance * scale.abs().max())


def assert_same(ours: torch.nn.Module, short: Inputs, stock: torch.nn.Module, full: Inputs) -> None:
    """Relative to the largest of each layer: the true gradient of `to_k.bias` is zero, and is rounding in both."""
    (answer, found), (expected, wanted) = gradients(ours, short), gradients(stock, full)
    assert is_near(answer, expected, expected)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        layer = torch.cat([value.flatten() for other, value in wanted.items() if owner(other) == owner(name)])
        assert is_near(found[name], gradient, layer), name


def owner(name: str) -> str:
    """The block or the part that a parameter belongs to."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[0] == "transformer_blocks" else parts[0]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_it_answers_and_learns_as_the_published_one(lengths: list[int]) -> None:
    stock, ours = networks()
    full = inputs(lengths)
    assert_same(ours, cut(full), stock, full)
    assert_same(ours, full, stock, full)  # whatever is left of the padding
    if max(lengths) < 70:
        assert_same(ours, cut(full, spare=3), stock, full)


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_in_type": "layer", "embedding_proj_norm_type": "layer"},
        {"encoder_hid_proj_type": None, "embedding_dim": WIDTH, "num_attention_heads": 2},
    ],
)
def test_other_architectures_of_the_class(settings: dict[str, object]) -> None:
    stock, ours = networks(**settings)
    full = inputs([3, 17])
    assert_same(ours, cut(full), stock, full)


def test_an_architecture_without_a_place_for_the_answer_stays_as_it_is() -> None:
    network = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=WIDTH, added_emb_type=None,
        additional_embeddings=3,
    )  # fmt: skip
    assert not unpadded_prior.remove_padding(network)
    assert not unpadded_prior.is_unpadded(network)
    assert "forward" not in vars(network)


def test_padding_has_no_say() -> None:
    """Not in the answer, and no gradient reaches it."""
    _, ours = networks()
    given = cut(inputs([4, 9]))
    given["encoder_hidden_states"].requires_grad_()
    first = ours(**given).predicted_image_embedding
    first.sum().backward()
    states, mask = given["encoder_hidden_states"], given["attention_mask"]
    assert not states.grad[~mask].any()
    assert states.grad[mask].abs().amax(-1).all()
    given["encoder_hidden_states"] = torch.where(mask[..., None], states.detach(), torch.full_like(states, 1e4))
    assert torch.equal(ours(**given).predicted_image_embedding, first)


@pytest.mark.parametrize("target_modules", adapters.PRESETS)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_with_adapters_on_all_presets(target_modules: str, use_dora: bool) -> None:
    made = networks()
    for network in made:
        torch.manual_seed(2)
        adapters.attach_lora(
            network, rank=4, alpha=None, dropout=0.0, target_modules=target_modules, use_dora=use_dora,
            dtype=torch.float32, init="gaussian",
        )  # fmt: skip
    full = inputs([2, 9, 20])
    assert_same(made[1], cut(full), made[0], full)
