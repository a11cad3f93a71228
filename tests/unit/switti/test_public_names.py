"""The names of `import switti`: there are few, and none costs anything before it is used."""

import subprocess
import sys
from pathlib import Path

import pytest

import switti


def test_the_public_names_are_the_classes_of_their_modules() -> None:
    from switti.models.transformer import ScaleTransformer
    from switti.sampling.pipeline import SwittiPipeline
    from switti.scales import Pyramid
    from switti.tokenizer.rqvae import RQVAE

    assert switti.SwittiPipeline is SwittiPipeline and switti.ScaleTransformer is ScaleTransformer
    assert switti.Pyramid is Pyramid and switti.RQVAE is RQVAE
    assert set(switti.__all__) <= set(dir(switti))
    with pytest.raises(AttributeError, match="has no attribute 'Pipeline'"):
        _ = switti.Pipeline


def test_importing_the_library_imports_no_torch(root: Path) -> None:
    code = "import sys, switti; dir(switti); print('torch' in sys.modules); from switti import Pyramid; print(Pyramid)"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False" and "switti.scales.Pyramid" in done.stdout
