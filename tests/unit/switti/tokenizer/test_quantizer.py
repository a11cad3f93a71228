"""Multi-scale quantizer: against definitions written out in loops, and in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from switti.scales import Pyramid
from switti.tokenizer.quantizer import MultiScaleQuantizer, phi_indices, phi_ticks, sample_noise


def build(sides: tuple[int, ...] = (1, 2, 3, 4), size: int = 32, width: int = 6) -> MultiScaleQuantizer:
    torch.manual_seed(0)
    return MultiScaleQuantizer(
        Pyramid(sides), codebook_size=size, code_width=width, phi_count=4, phi_ratio=0.5, commitment=0.25
    ).double()


def random_latent(batch: int = 3, width: int = 6, side: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, width, side, side, generator=generator, dtype=torch.float64)


def box_average(f_CHH: np.ndarray, side: int) -> np.ndarray:
    """Mean over rows floor(i·H/p) … ceil((i+1)·H/p): the exact box average, in loops."""
    latent = f_CHH.shape[-1]
    edges = [(i * latent // side, -(-(i + 1) * latent // side)) for i in range(side)]
    rows = [[f_CHH[:, a:b, c:d].mean((1, 2)) for c, d in edges] for a, b in edges]
    return np.array(rows).transpose(2, 0, 1)


def test_phi_of_the_released_schedules() -> None:
    """Nearest of four equidistant ticks from 1/12 to 11/12, worked out by hand for ten and fourteen scales."""
    assert phi_ticks(4) == pytest.approx([1 / 12, 13 / 36, 23 / 36, 11 / 12])
    ten = Pyramid((1, 2, 3, 4, 6, 9, 13, 18, 24, 32))
    assert phi_indices(ten, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    fourteen = Pyramid((1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64))
    assert phi_indices(fourteen, 4) == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]


def test_other_numbers_of_phi_sit_in_the_middle_of_equal_parts() -> None:
    assert phi_ticks(2) == pytest.approx([0.25, 0.75])
    assert phi_ticks(5) == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert phi_ticks(1) == pytest.approx([0.5])
    assert phi_indices(Pyramid((1, 2, 3, 4)), 2) == [0, 0, 1, 1]


def test_search_is_the_nearest_code() -> None:
    quantizer = build()
    rows = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    codes = quantizer.embedding.weight.detach()
    expected = [int(((codes - row) ** 2).sum(1).argmin()) for row in rows]
    assert quantizer.nearest(rows).tolist() == expected


def test_search_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, f = build(), random_latent()
    expected = quantizer.tokenize(f)
    monkeypatch.setattr("switti.tokenizer.quantizer.SEARCH_ELEMENTS", 5 * 32)
    assert torch.equal(quantizer.tokenize(f), expected)


def test_search_ignores_autocast() -> None:
    quantizer = build().float()
    f = random_latent().float()
    expected, latent = quantizer.tokenize(f), [*quantizer.latents(quantizer.tokenize(f))][-1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.tokenize(f), expected)
        again = [*quantizer.latents(expected)][-1]
    assert again.dtype == torch.float32 and torch.equal(again, latent)


def test_tokens_match_a_loop_over_scales() -> None:
    """Residual quantization written out for one image: box average, nearest code, up-sampling, φ, subtraction."""
    quantizer, f = build(), random_latent(batch=1)
    codes, rest, found = quantizer.embedding.weight.detach().numpy(), f.clone(), []
    for k, side in enumerate((1, 2, 3, 4)):
        z = box_average(rest[0].numpy(), side).reshape(6, -1).T
        tokens = ((z[:, None] - codes[None]) ** 2).sum(-1).argmin(1)
        found += tokens.tolist()
        h = torch.from_numpy(codes[tokens].T.reshape(1, 6, side, side))
        if side != 4:
            h = torch.nn.functional.interpolate(h, (4, 4), mode="bicubic", align_corners=False)
        conv = quantizer.quant_resi.qresi_ls[k]
        mended = torch.nn.functional.conv2d(h, conv.weight.detach(), conv.bias.detach(), padding=1)
        rest = rest - 0.5 * h - 0.5 * mended
    assert quantizer.tokenize(f)[0].tolist() == found
    f_hat = [*quantizer.latents(quantizer.tokenize(f))][-1]
    torch.testing.assert_close(f_hat, f - rest, rtol=0, atol=1e-12)


def test_next_input_is_the_box_average() -> None:
    quantizer, f_hat = build(), random_latent()
    for k, side in enumerate((2, 3, 4)):
        expected = np.stack([box_average(one.numpy(), side).reshape(6, -1).T for one in f_hat])
        torch.testing.assert_close(
            quantizer.next_input(k, f_hat), torch.from_numpy(expected), rtol=0, atol=1e-12
        )


def test_straight_through_gradient() -> None:
    """The value is f_hat; the gradient of the latent with respect to f is the identity."""
    quantizer = build()
    f = random_latent().requires_grad_()
    latent, _, tokens, _ = quantizer(f)
    torch.testing.assert_close(latent, [*quantizer.latents(tokens)][-1], rtol=0, atol=1e-12)
    weights = torch.randn(f.shape, dtype=f.dtype, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((latent * weights).sum(), f)
    assert torch.equal(gradient, weights)


def test_loss_gradients() -> None:
    """f is pulled by the commitment only: 2·β/(S·n)·Σ_s (f − f_hat_s); the codebook is pulled towards f."""
    quantizer = build()
    f = random_latent().requires_grad_()
    _, loss, tokens, _ = quantizer(f)
    f_hats = [f_hat.detach() for f_hat in quantizer.latents(tokens)]
    errors = torch.stack([((f.detach() - f_hat) ** 2).mean() for f_hat in f_hats])
    torch.testing.assert_close(loss.detach(), 1.25 * errors.mean(), rtol=1e-12, atol=0)
    gradient, codes = torch.autograd.grad(loss, [f, quantizer.embedding.weight])
    expected = sum(2 * 0.25 * (f.detach() - f_hat) for f_hat in f_hats) / (len(f_hats) * f.numel())
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-15)
    with torch.no_grad():
        quantizer.embedding.weight -= 0.01 * codes
        after = torch.stack([((f - f_hat) ** 2).mean() for f_hat in quantizer.latents(tokens)])
    assert after.mean() < errors.mean()


def test_residuals_are_what_the_search_sees() -> None:
    quantizer, f = build(), random_latent()
    rows = quantizer.residuals(f)
    assert rows.shape == (3, 30, 6)
    assert torch.equal(quantizer.nearest(rows.flatten(0, 1)).view(3, 30), quantizer.tokenize(f))
    torch.testing.assert_close(rows[:, 0], f.mean((2, 3)), rtol=0, atol=1e-12)


def test_noise_of_a_sample_depends_on_its_seed_alone() -> None:
    seeds = torch.tensor([7, 2**62 + 1, 9])
    noise = sample_noise(seeds, 30, 6, torch.device("cpu"))
    swapped = sample_noise(seeds[[2, 0]], 30, 6, torch.device("cpu"))
    assert torch.equal(swapped, noise[[2, 0]])
    assert not torch.equal(noise[0], noise[1])
    large = sample_noise(torch.arange(20), 300, 6, torch.device("cpu"))
    assert large.mean().item() == pytest.approx(0, abs=0.02) and large.std().item() == pytest.approx(
        1, abs=0.02
    )


def test_noise_moves_the_search_only() -> None:
    """With noise z → sqrt(1 − n²)·z + n·ε at the first scale; later scales subtract the chosen codes as usual."""
    quantizer, f, n = build(), random_latent(), 0.6
    noise = torch.randn(3, 30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    tokens = quantizer.tokenize(f, n, noise)
    seen = 0.8 * f.mean((2, 3)) + 0.6 * noise[:, 0]
    assert torch.equal(tokens[:, 0], quantizer.nearest(seen))
    rest = f - [*quantizer.latents(tokens)][-2]
    last = 0.8 * rest.flatten(2).transpose(1, 2) + 0.6 * noise[:, 14:]
    assert torch.equal(tokens[:, 14:], quantizer.nearest(last.flatten(0, 1)).view(3, 16))


def test_usage_counts_and_their_published_decay() -> None:
    quantizer = build(sides=(1, 2), size=4, width=2)
    tokens = torch.tensor([[0, 1, 1, 2, 3]])
    quantizer.count_hits(tokens)
    first = [[1.0, 0.0, 0.0, 0.0], [0.0, 0.2, 0.1, 0.1]]
    torch.testing.assert_close(quantizer.ema_vocab_hit_SV, torch.tensor(first).double())
    quantizer.count_hits(tokens)
    torch.testing.assert_close(quantizer.ema_vocab_hit_SV[1], torch.tensor([0, 0.38, 0.19, 0.19]).double())
    quantizer.hit_updates = 100
    quantizer.count_hits(tokens)
    torch.testing.assert_close(
        quantizer.ema_vocab_hit_SV[1, 1], torch.tensor(0.99 * 0.38 + 0.02, dtype=torch.float64)
    )
    # threshold 0.08 · 1 image · 4 positions / 4 codes = 0.08
    assert quantizer.usage_percent(batch=1) == [25.0, 75.0]
    assert quantizer.usage_percent(batch=4) == [25.0, 25.0]


def test_evaluation_does_not_count() -> None:
    quantizer = build().eval()
    quantizer(random_latent())
    assert quantizer.ema_vocab_hit_SV.abs().sum() == 0
