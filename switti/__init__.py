"""Scale-wise transformers for text-to-image synthesis (arXiv 2412.01819): plain PyTorch, no Lightning, no YAML.

    from switti import SwittiPipeline

    pipeline = SwittiPipeline.from_pretrained("yresearch/Switti", device="cuda")
    images = pipeline("a red bicycle")

The names below are imported at their first use: `import switti` alone loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from switti.models.transformer import ScaleTransformer
    from switti.sampling.pipeline import SwittiPipeline
    from switti.scales import Pyramid
    from switti.tokenizer.rqvae import RQVAE

__version__ = "0.1.0"

__all__ = ["RQVAE", "Pyramid", "ScaleTransformer", "SwittiPipeline", "__version__"]

_MODULES = {
    "Pyramid": "switti.scales",
    "RQVAE": "switti.tokenizer.rqvae",
    "ScaleTransformer": "switti.models.transformer",
    "SwittiPipeline": "switti.sampling.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
