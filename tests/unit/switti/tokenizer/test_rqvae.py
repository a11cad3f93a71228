"""RQ-VAE: golden tensors of the published model, published key tables, consistency of its routes."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.parity.common import Golden
from benchmarks.parity.vae import build_vae, check_vae
from switti.errors import UserError
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.load import load_tokenizer
from switti.weights.save import save_tokenizer

SMALL = RQVAEConfig(
    scales=[1, 2, 4], codebook_size=32, code_width=8, channels=32, multipliers=[1, 1, 1], residual_blocks=1
)


@pytest.fixture
def parity_dir(root: Path) -> Path:
    return root / "tests" / "data" / "parity"


@pytest.fixture
def meta(parity_dir: Path) -> dict[str, Any]:
    return json.loads((parity_dir / "meta.json").read_text())


@pytest.fixture
def small() -> RQVAE:
    torch.manual_seed(0)
    return RQVAE(SMALL).double().eval()


def images(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(count, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1


def compared(folder: Path, meta: dict[str, Any]) -> Golden:
    golden = Golden.open(folder, meta)
    check_vae(golden)
    return golden


def test_golden_tensors(parity_dir: Path, meta: dict[str, Any]) -> None:
    golden = compared(parity_dir, meta)
    assert golden.failed == []
    assert len(golden.checks) > 50


def test_golden_check_can_fail(parity_dir: Path, meta: dict[str, Any]) -> None:
    """Half the φ strength, another β, another number of φ: each is noticed."""
    for key, value in (("quant_resi", 0.25), ("beta", 0.3), ("noise_std", 0.2)):
        altered = {**meta, "vae": {**meta["vae"], key: value}}
        assert compared(parity_dir, altered).failed, key


@pytest.mark.parametrize("size", [512, 1024])
def test_released_key_tables(root: Path, size: int) -> None:
    """Same keys, shapes and order as the full-size state dicts, without allocating them."""
    packed = (root / "tests" / "data" / "released_keys" / "tables.json.gz").read_bytes()
    table = json.loads(gzip.decompress(packed))[f"VQVAEHF_{size}"]
    with torch.device("meta"):
        model = RQVAE(RQVAEConfig(scales=table["patch_nums"]))
    found = {
        key: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in model.state_dict().items()
    }
    assert found == {key: entry[:2] for key, entry in table["keys"].items()}
    assert list(found) == list(table["keys"])
    assert sum(p.numel() for p in model.parameters()) == table["n_params"]


def test_released_phi(meta: dict[str, Any]) -> None:
    for table in meta["functions"]["phi_index_released"].values():
        config = RQVAEConfig(scales=table["patch_nums"])
        with torch.device("meta"):
            assert RQVAE(config).quantize.phi_index == table["phi"]


def test_golden_model_by_the_sampler_route(parity_dir: Path, meta: dict[str, Any]) -> None:
    """Scale by scale in float64, the sampler builds what teacher forcing sees at once."""
    model = build_vae(Golden.open(parity_dir, meta)).double()
    side = model.config.resolution
    image = (
        torch.rand(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    tokens = model.tokenize(image)
    inputs = model.teacher_forcing(tokens)
    f_hat, seen = model.quantize.empty_latent(2), []
    for k, part in enumerate(model.pyramid.split(tokens)):
        f_hat = model.quantize.accumulate(k, f_hat, model.quantize.embed(part))
        if k + 1 < model.pyramid.count:
            seen.append(model.quantize.next_input(k, f_hat))
    torch.testing.assert_close(torch.cat(seen, 1), inputs, rtol=0, atol=1e-12)
    torch.testing.assert_close(f_hat, model.tokens_to_latent(tokens), rtol=0, atol=1e-12)


def test_shapes(small: RQVAE) -> None:
    image = images()
    tokens = small.tokenize(image)
    assert tokens.shape == (2, 21) and tokens.dtype == torch.int64
    assert small.encode(image).shape == (2, 8, 4, 4)
    assert small.teacher_forcing(tokens).shape == (2, 20, 8)
    assert small.decode(small.tokens_to_latent(tokens)).shape == (2, 3, 16, 16)


def test_one_scale_has_no_inputs() -> None:
    config = RQVAEConfig(
        scales=[2], codebook_size=8, code_width=4, channels=32, multipliers=[1], residual_blocks=1
    )
    model = RQVAE(config)
    assert model.teacher_forcing(torch.zeros(3, 4, dtype=torch.int64)).shape == (3, 0, 4)


def test_training_image_is_that_of_the_tokens(small: RQVAE) -> None:
    """The straight-through latent has the value of f_hat."""
    image = images()
    output = small(image)
    expected = small.decode(small.tokens_to_latent(small.tokenize(image)))
    torch.testing.assert_close(output.image, expected, rtol=0, atol=1e-12)


def test_down_sampling_pads_right_and_bottom(small: RQVAE) -> None:
    """The stride-2 convolution reads x[2i], x[2i+1], x[2i+2] with zeros beyond the end only."""
    conv = small.encoder.down[0].downsample.conv
    x = torch.randn(1, 32, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    padded = torch.zeros(1, 32, 5, 5, dtype=torch.float64)
    padded[..., :4, :4] = x
    corner = (padded[0, :, 2:5, 2:5] * conv.weight[3]).sum() + conv.bias[3]
    torch.testing.assert_close(small.encoder.down[0].downsample(x)[0, 3, 1, 1], corner, rtol=0, atol=1e-12)


def test_attention_is_softmax_over_positions(small: RQVAE) -> None:
    block = small.encoder.mid.attn_1
    x = torch.randn(1, 32, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    q, k, v = block.qkv(block.norm(x))[0].flatten(1).split(32)
    weights = torch.softmax(q.T @ k / 32**0.5, dim=-1)
    mixed = (weights @ v.T).T.reshape(1, 32, 2, 2)
    torch.testing.assert_close(block(x), x + block.proj_out(mixed), rtol=0, atol=1e-12)


def test_noise_does_not_depend_on_the_place_in_the_batch(small: RQVAE) -> None:
    image, seeds = images(3), torch.tensor([11, 12, 13])
    clean, noisy = small.tokenize(image), small.tokenize(image, 0.7, seeds)
    assert not torch.equal(clean, noisy)
    order = [2, 0]
    assert torch.equal(small.tokenize(image[order], 0.7, seeds[order]), noisy[order])
    assert not torch.equal(small.tokenize(image, 0.7, seeds + 1), noisy)


def test_bfloat16_encoder_leaves_the_latent_in_float32() -> None:
    torch.manual_seed(0)
    model = RQVAE(SMALL).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode(images().float()).dtype == torch.bfloat16
        tokens = model.tokenize(images().float())
        assert model.tokens_to_latent(tokens).dtype == torch.float32
        assert model.teacher_forcing(tokens).dtype == torch.float32


def test_bad_requests(small: RQVAE) -> None:
    with pytest.raises(UserError, match="16 x 16 pixels, got 16 x 32"):
        small.encode(torch.zeros(1, 3, 16, 32, dtype=torch.float64))
    with pytest.raises(UserError, match=r"noise_std=1\.0"):
        small.tokenize(images(), 1.0)
    with pytest.raises(UserError, match="seed"):
        small.tokenize(images(), 0.5)


def test_saved_weights_come_back(tmp_path: Path, small: RQVAE) -> None:
    small.float()
    for dtype, tolerance in ((torch.float32, 0.0), (torch.float16, 1e-3)):
        save_tokenizer(small, tmp_path / "model.safetensors", dtype)
        loaded = load_tokenizer(tmp_path / "model.safetensors", config=SMALL)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        for key, value in small.state_dict().items():
            assert loaded.state_dict()[key].dtype == torch.float32
            torch.testing.assert_close(loaded.state_dict()[key], value, rtol=tolerance, atol=tolerance)


def test_settings_that_shapes_do_not_show(tmp_path: Path, small: RQVAE) -> None:
    """Another pyramid of as many scales, another φ strength: same shapes, other images."""
    save_tokenizer(small, tmp_path / "model.safetensors")
    load_tokenizer(tmp_path / "model.safetensors", config=replace(SMALL, commitment=0.5))
    with pytest.raises(UserError, match=r"tokenizer\.scales=\[1, 3, 4\] \(the weights: \[1, 2, 4\]\)"):
        load_tokenizer(tmp_path / "model.safetensors", config=replace(SMALL, scales=[1, 3, 4]))
    with pytest.raises(UserError, match="phi_ratio"):
        load_tokenizer(tmp_path / "model.safetensors", config=replace(SMALL, phi_ratio=0.4))


def test_weights_that_do_not_fit_are_named(tmp_path: Path, small: RQVAE) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(path, config=SMALL)
    path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        load_tokenizer(path, config=SMALL)
    state = {key: value.contiguous() for key, value in small.state_dict().items()}
    state["extra"] = state.pop("quant_conv.bias")
    state["quantize.embedding.weight"] = torch.zeros(16, 8)
    save_file(state, path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path, config=SMALL)
    for part in ("quant_conv.bias is missing", "extra is unexpected", "[16, 8], the settings need [32, 8]"):
        assert part in str(caught.value)
