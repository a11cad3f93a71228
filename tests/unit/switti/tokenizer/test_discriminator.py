"""The U-Net discriminator against its definition, with weights normalized by singular values instead of iteration."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from switti.errors import UserError
from switti.tokenizer.discriminator import UNetDiscriminator


def test_number_of_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UNetDiscriminator(64).parameters()) == 4_376_897


def by_hand(model: UNetDiscriminator, x: Tensor) -> Tensor:
    """The same network from its trainable tensors: W divided by its largest singular value."""
    raw = {name.removesuffix(".parametrizations.weight.original"): p for name, p in model.named_parameters()}

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = raw[name] / torch.linalg.svdvals(raw[name].flatten(1))[0]
        return F.leaky_relu(F.conv2d(x, kernel, stride=stride, padding=1), 0.2)

    def grown(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    full = F.leaky_relu(F.conv2d(x, raw["first.weight"], raw["first.bias"], padding=1), 0.2)
    half = conv("down.0", full, 2)
    quarter = conv("down.1", half, 2)
    eighth = conv("down.2", quarter, 2)
    back = quarter + conv("up.0", grown(eighth))
    back = half + conv("up.1", grown(back))
    back = full + conv("up.2", grown(back))
    back = conv("extra.1", conv("extra.0", back))
    return F.conv2d(back, raw["last.weight"], raw["last.bias"], padding=1)


def test_equals_its_definition() -> None:
    model = UNetDiscriminator(4).double()
    image = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(300):  # each training pass sharpens the estimate of the singular values
            model(image)
        model.eval()
        logits = model(image)
        torch.testing.assert_close(logits, by_hand(model, image), rtol=1e-5, atol=1e-7)
    assert logits.shape == (2, 1, 16, 24)


def test_evaluation_leaves_the_estimates_alone() -> None:
    model = UNetDiscriminator(2).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(torch.randn(1, 3, 8, 8))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_all_weights_learn() -> None:
    model = UNetDiscriminator(2)
    model(torch.randn(1, 3, 16, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_sides_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="multiples of 8, got 16 x 20"):
        UNetDiscriminator(2)(torch.zeros(1, 3, 16, 20))
