"""Models on a device against float64 on the CPU: logits, gradients, the tokenizer."""

import copy

import pytest
import torch
from sampler_cases import build, captions
from torch import Tensor

from switti.losses.cross_entropy import token_losses
from switti.models.transformer import ScaleTransformer
from switti.text.base import TextEmbedding
from switti.tokenizer.rqvae import RQVAE


def logits_of(model: ScaleTransformer, rows_BMC: Tensor, text: TextEmbedding) -> Tensor:
    weight = model.head.weight
    moved = text.to(weight.device)
    # Floating inputs follow the weights; the condition's own precision is the model's business.
    kind = torch.promote_types(weight.dtype, torch.float32)
    return model(
        rows_BMC.to(weight.device, kind), moved.tokens_BTC.to(kind), moved.mask_BT, moved.pooled_BP.to(kind),
        torch.tensor([[512, 512, 0, 0]] * len(rows_BMC), device=weight.device),
    )  # fmt: skip


def inputs(tokenizer: RQVAE) -> tuple[Tensor, Tensor]:
    """(next-scale inputs, tokens) of two images."""
    generator = torch.Generator().manual_seed(5)
    side = tokenizer.config.resolution
    with torch.no_grad():
        tokens = tokenizer.tokenize(torch.rand(2, 3, side, side, generator=generator) * 2 - 1)
        return tokenizer.teacher_forcing(tokens), tokens


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_logits_and_gradients_in_float32(device: str, visibility: str) -> None:
    model, tokenizer = build(visibility)
    rows, tokens = inputs(tokenizer)
    exact, moved = copy.deepcopy(model).double(), copy.deepcopy(model).to(device)
    text = captions(2)
    expected, actual = logits_of(exact, rows.double(), text), logits_of(moved, rows, text)
    scale = expected.abs().amax().item()
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=1e-4 * scale)
    token_losses(expected, tokens, 0.0).mean().backward()
    token_losses(actual, tokens.to(device), 0.0).mean().backward()
    for (name, a), b in zip(exact.named_parameters(), moved.parameters(), strict=True):
        if a.grad is None:
            assert b.grad is None, name
            continue
        largest = max(a.grad.abs().amax().item(), 1e-8)
        worst = (b.grad.cpu().double() - a.grad).abs().amax().item()
        assert worst <= 2e-3 * largest, f"{name}: {worst:.3g} of {largest:.3g}"


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_logits_in_bfloat16(device: str, visibility: str) -> None:
    """Within a few roundings of bfloat16, which has 8 bits."""
    model, tokenizer = build(visibility)
    rows, _ = inputs(tokenizer)
    with torch.no_grad():
        expected = logits_of(copy.deepcopy(model).double(), rows.double(), captions(2))
        moved = copy.deepcopy(model).to(device)
        with torch.autocast(device, torch.bfloat16):
            actual = logits_of(moved, rows, captions(2))
    error = (actual.cpu().double() - expected).square().mean().sqrt() / expected.std()
    assert error < 0.03


def test_tokens_and_decoded_images(device: str) -> None:
    """A token may differ where two codebook entries are equally near; here none are."""
    _, tokenizer = build("causal")
    moved = copy.deepcopy(tokenizer).to(device)
    side = tokenizer.config.resolution
    image = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(6)) * 2 - 1
    with torch.no_grad():
        tokens, there = tokenizer.tokenize(image), moved.tokenize(image.to(device))
        assert (tokens == there.cpu()).float().mean() > 0.97
        decoded = tokenizer.decode(tokenizer.tokens_to_latent(tokens))
        back = moved.decode(moved.tokens_to_latent(tokens.to(device))).cpu()
    torch.testing.assert_close(back, decoded, rtol=0, atol=1e-3)
