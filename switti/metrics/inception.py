"""Inception v3 of the Fréchet Inception Distance, and the named conventions by which images are brought to it.

The network is torchvision's with the pooling of the original graph: averages leave the border out, and the last block
takes a maximum. One file of weights serves all conventions: pytorch-fid's pt_inception-2015-12-05-6726825d.pth or
torch-fidelity's weights-inception-2015-12-05-6726825d.pth.

A distance depends on the convention more than on many a model: values of different ones are never compared.

Shape suffixes: B images, H, W their size.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models import inception as blocks
from torchvision.transforms.functional import to_pil_image

from switti.errors import UserError, first_line
from switti.files import kind_of
from switti.weights.torch_files import check_torch_file

SIDE, FEATURES = 299, 2048
FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")


class _BlockA(blocks.InceptionA):
    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(pooled)], dim=1)


class _BlockC(blocks.InceptionC):
    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_2(self.branch7x7dbl_1(x))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(self.branch7x7dbl_3(twice)))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(pooled)], dim=1)


class _BlockE(blocks.InceptionE):
    def pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(twice),
                self.branch3x3dbl_3b(twice),
                self.branch_pool(self.pool(x)),
            ],
            dim=1,
        )


class _LastBlockE(_BlockE):
    def pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 1, 1)


class FidInception(nn.Module):
    """Float images [B, 3, 299, 299] in [−1, 1] → features [B, 2048] of the last average pool, in float32."""

    num_features = FEATURES

    def __init__(self) -> None:
        super().__init__()
        conv = blocks.BasicConv2d
        self.Conv2d_1a_3x3 = conv(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = conv(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = conv(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = conv(80, 192, kernel_size=3)
        self.Mixed_5b = _BlockA(192, pool_features=32)
        self.Mixed_5c = _BlockA(256, pool_features=64)
        self.Mixed_5d = _BlockA(288, pool_features=64)
        self.Mixed_6a = blocks.InceptionB(288)
        self.Mixed_6b = _BlockC(768, channels_7x7=128)
        self.Mixed_6c = _BlockC(768, channels_7x7=160)
        self.Mixed_6d = _BlockC(768, channels_7x7=160)
        self.Mixed_6e = _BlockC(768, channels_7x7=192)
        self.Mixed_7a = blocks.InceptionD(768)
        self.Mixed_7b = _BlockE(1280)
        self.Mixed_7c = _LastBlockE(2048)
        self.eval().requires_grad_(False)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_B3HW)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed_"):
                x = block(x)
        return x.mean(dim=(2, 3))


def load_inception(file: str | Path, setting: str = "metrics.inception=") -> FidInception:
    """The network with published weights. UserError if the file is missing or holds something else."""
    if kind_of(file) != "file":
        raise UserError(
            f"{setting}{file}: no such file; download {FILES[0]} from the releases of pytorch-fid, or {FILES[1]} from "
            "those of torch-fidelity"
        )
    try:
        check_torch_file(Path(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
        network = FidInception()
        # Of the classifier, which no distance uses.
        state = {name: value for name, value in state.items() if not name.startswith(("fc.", "AuxLogits."))}
        network.load_state_dict(state)
    except (RuntimeError, OSError, KeyError, AttributeError, ValueError, EOFError) as error:
        raise UserError(f"{setting}{file} does not hold Inception weights ({first_line(error)})") from error
    return network


# ---- conventions ------------------------------------------------------------------------------------------------


def paper_chain(images_B3HW: Tensor) -> Tensor:
    """The paper's: bicubic to 512 px, Lanczos to 256 px by PIL, then pytorch-fid's. uint8 → [B, 3, 299, 299]."""
    return pytorch_fid(torch.stack([_to_256(image) for image in images_B3HW.cpu()]).to(images_B3HW.device))


def _to_256(image_3HW: Tensor) -> Tensor:
    image = to_pil_image(image_3HW)
    if image.size != (512, 512):
        image = image.resize((512, 512), Image.Resampling.BICUBIC)
    image = image.resize((256, 256), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def pytorch_fid(images_B3HW: Tensor) -> Tensor:
    """pytorch-fid's own: bilinear to 299 px without antialiasing, 2x − 1. uint8 → [B, 3, 299, 299]."""
    x = images_B3HW.float() / 255
    return 2 * F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1


def torch_fidelity(images_B3HW: Tensor) -> Tensor:
    """torch-fidelity's: TensorFlow 1's bilinear resize (no half-pixel centres), (x − 128) / 128."""
    x = images_B3HW.float()
    for dim in (2, 3):
        x = _resize_like_tensorflow(x, dim)
    return (x - 128) / 128


def _resize_like_tensorflow(x: Tensor, dim: int) -> Tensor:
    size = x.shape[dim]
    place = torch.arange(SIDE, device=x.device, dtype=torch.float32) * (size / SIDE)
    low = place.floor().long()
    high = (low + 1).clamp(max=size - 1)
    weight = (place - low).view([-1 if axis == dim else 1 for axis in range(4)])
    first = x.index_select(dim, low)
    return first + (x.index_select(dim, high) - first) * weight


def clean_fid(images_B3HW: Tensor) -> Tensor:
    """clean-fid's: PIL's antialiased bicubic to 299 px, a channel at a time in float, clipped; (x − 128) / 128."""
    values = images_B3HW.cpu().numpy().astype(np.float32)
    resized = np.empty((*values.shape[:2], SIDE, SIDE), np.float32)
    for place in np.ndindex(*values.shape[:2]):
        channel = Image.fromarray(values[place], mode="F").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        resized[place] = np.asarray(channel).clip(0, 255)
    return (torch.from_numpy(resized).to(images_B3HW.device) - 128) / 128


# Name of the convention, as in the metric's label → uint8 images [B, 3, H, W] to the network's input.
CONVENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "pytorch_fid": paper_chain,
    "torch_fidelity": torch_fidelity,
    "clean": clean_fid,
}


class InceptionUnderConvention(nn.Module):
    """uint8 images [B, 3, H, W] of one size → features [B, 2048] by a convention of CONVENTIONS."""

    num_features = FEATURES

    def __init__(self, network: FidInception, convention: str) -> None:
        super().__init__()
        self.network = network
        self.prepare = CONVENTIONS[convention]

    @torch.no_grad()
    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.network(self.prepare(images_B3HW))
