"""Inception features and the conventions of FID, against pytorch-fid, Pillow and arithmetic by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from switti.errors import UserError
from switti.metrics.collection import build_metrics
from switti.metrics.config import MetricsConfig
from switti.metrics.inception import (
    FidInception,
    clean_fid,
    load_inception,
    paper_chain,
    pytorch_fid,
    torch_fidelity,
)


@pytest.fixture(scope="module")
def network() -> FidInception:
    torch.manual_seed(0)
    made = FidInception()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return made


@pytest.fixture(scope="module")
def file(network: FidInception, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(
        network.state_dict() | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path
    )
    return path


def images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_features_are_those_of_pytorch_fid(network, file, monkeypatch):
    theirs = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(
        theirs, "load_state_dict_from_url", lambda *a, **k: torch.load(file, weights_only=True)
    )
    reference = theirs.InceptionV3().eval()
    some = images(2, 3, 256, 256)
    with torch.no_grad():
        expected = reference(some.float() / 255)[0].flatten(1)
        found = load_inception(file)(pytorch_fid(some))
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


def test_the_paper_resizes_twice_through_8_bits_before_pytorch_fid():
    some = images(1, 3, 300, 300)
    picture = to_pil_image(some[0]).resize((512, 512), Image.Resampling.BICUBIC)
    picture = picture.resize((256, 256), Image.Resampling.LANCZOS)
    small = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    assert paper_chain(some).equal(pytorch_fid(small))
    assert not paper_chain(some).allclose(pytorch_fid(some), atol=0.1)


@pytest.mark.parametrize("shape", [(20, 30), (512, 384)])
def test_torch_fidelity_resizes_from_the_upper_left_corner(shape):
    some = images(1, 3, *shape)
    values = some[0, 0].numpy().astype(np.float64)

    def at(row: int, column: int) -> float:
        y, x = row * shape[0] / 299, column * shape[1] / 299
        top, left = math.floor(y), math.floor(x)
        below, right = min(top + 1, shape[0] - 1), min(left + 1, shape[1] - 1)
        upper = values[top, left] + (values[top, right] - values[top, left]) * (x - left)
        lower = values[below, left] + (values[below, right] - values[below, left]) * (x - left)
        return (upper + (lower - upper) * (y - top) - 128) / 128

    found = torch_fidelity(some)[0, 0]
    for row, column in [(0, 0), (1, 7), (150, 149), (298, 298), (77, 298)]:
        assert float(found[row, column]) == pytest.approx(at(row, column), abs=1e-4)


def test_clean_fid_resizes_in_float_with_antialiasing():
    some = images(1, 3, 100, 400)
    channel = Image.fromarray(some[0, 1].numpy().astype(np.float32), mode="F")
    expected = np.asarray(channel.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
    np.testing.assert_array_equal(clean_fid(some)[0, 1].numpy(), (expected - 128) / 128)


def test_distances_under_one_convention_share_a_network_and_carry_its_name(file):
    names = ["fid_inception_pytorch_fid", "kid_inception_pytorch_fid", "kid_inception_clean"]
    metrics = build_metrics(MetricsConfig(names=names, inception=str(file)))
    assert [len(group.metrics) for group in metrics.distances] == [2, 1]
    assert {name for group in metrics.distances for name in group.metrics} == set(names)


def test_a_file_of_something_else_is_refused(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold Inception weights"):
        load_inception(tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"metrics.names has kid_inception_clean: set metrics.inception to"):
        build_metrics(MetricsConfig(names=["kid_inception_clean"]))
