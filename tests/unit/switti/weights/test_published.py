"""Published weights: key tables of every published size, conversion there and back, loading, and what is refused."""

import gzip
import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from switti.errors import UserError
from switti.models.config import GeneratorConfig
from switti.models.transformer import ScaleTransformer
from switti.scales import PYRAMIDS
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.describe import GeneratorDescription, config_fields, describe_generator, tokenizer_fields
from switti.weights.fill import WeightsError, build_empty, random_weights
from switti.weights.fit import nearest_levels, resize_code_use, resize_levels
from switti.weights.load import load_generator, load_tokenizer
from switti.weights.published import GENERATORS, LEVELS, MASK, generator_to_published
from switti.weights.read import Contents, read_weights

TABLES: dict[str, dict[str, Any]] = json.loads(
    gzip.decompress((Path(__file__).parents[3] / "data" / "released_keys" / "tables.json.gz").read_bytes())
)
TRANSFORMERS = sorted(name for name in TABLES if name.startswith("Switti"))
TOKENIZER_TABLES = sorted(name for name in TABLES if name.startswith("VQVAE"))
SCALES = [1, 2, 3, 5]


def table_config(name: str) -> GeneratorConfig:
    """From the published constructor arguments, through the reader of published config.json files."""
    return GeneratorConfig(**config_fields(TABLES[name]["config"], GeneratorConfig, name))


def small_config(**changes: Any) -> GeneratorConfig:
    settings: dict[str, Any] = {
        "depth": 2, "width": 64, "heads": 1, "scales": SCALES, "codebook_size": 24, "code_width": 6,
        "text_width": 12, "pooled_width": 10,
    }  # fmt: skip
    return GeneratorConfig(**(settings | changes))


def small(seed: int = 0, **changes: Any) -> ScaleTransformer:
    torch.manual_seed(seed)
    model = ScaleTransformer(small_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def small_tokenizer() -> RQVAE:
    torch.manual_seed(1)
    config = RQVAEConfig(
        scales=SCALES, codebook_size=24, code_width=6, channels=32, multipliers=[1, 2, 2], residual_blocks=1
    )
    return RQVAE(config).eval()


def describe(state: dict[str, torch.Tensor]) -> GeneratorDescription:
    return describe_generator(Contents("these weights", Path("weights.safetensors"), state, {}, {}, None))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# ---- key tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_generator_keys_are_the_published_ones(name: str) -> None:
    table, model = TABLES[name], build_empty(table_config(name))
    found = {key: (list(v.shape), str(v.dtype)) for key, v in model.state_dict().items()}
    wanted = {
        key: (shape, f"torch.{dtype}")
        for key, (shape, dtype, kind) in table["keys"].items()
        if kind != "buffer"
    }
    assert found == wanted
    assert {key for key, (_, _, kind) in table["keys"].items() if kind == "buffer"} == {LEVELS, MASK}
    assert sum(p.numel() for p in model.parameters()) == table["n_params"]
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {key for key, (_, _, kind) in table["keys"].items() if kind == "param_frozen"}


@pytest.mark.parametrize("name", TOKENIZER_TABLES)
def test_tokenizer_keys_are_the_published_ones(name: str) -> None:
    table = TABLES[name]
    with torch.device("meta"):
        model = RQVAE(RQVAEConfig(**config_fields(table["config"], RQVAEConfig, name)))
    found = {key: (list(v.shape), str(v.dtype)) for key, v in model.state_dict().items()}
    assert found == {key: (shape, f"torch.{dtype}") for key, (shape, dtype, _) in table["keys"].items()}
    assert sum(p.numel() for p in model.parameters()) == table["n_params"] == 108_948_355


def test_known_sizes() -> None:
    """So that a damaged table cannot go unnoticed."""
    assert {name: TABLES[name]["n_params"] for name in ("SwittiHF_d30_512", "SwittiHF_d30_1024_AR")} == {
        "SwittiHF_d30_512": 2_470_518_256, "SwittiHF_d30_1024_AR": 2_470_525_936,
    }  # fmt: skip
    assert [sum(s * s for s in PYRAMIDS[px]) for px in (256, 512, 1024)] == [680, 2240, 9451]
    assert table_config("SwittiHF_d30_1024_AR").visibility == "causal"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_settings_are_read_off_published_shapes(name: str) -> None:
    """The mask and the levels take part in another test: 357 MB are not made here."""
    config = table_config(name)
    state = {k: torch.empty(shape, device="meta") for k, (shape, _, _) in TABLES[name]["keys"].items()}
    state.pop(MASK)
    state[LEVELS] = torch.repeat_interleave(
        torch.arange(len(config.scales)), torch.tensor([s * s for s in config.scales])
    )[None]
    described = describe(state)
    found = described.implied
    assert described.masked is None
    assert found == {key: asdict(config)[key] for key in found}
    assert set(asdict(config)) - set(found) == {
        "visibility", "heads", "head_precision", "query_key_norm", "rope_theta", "rope_size", "crop_base",
    }  # fmt: skip
    assert set(state) - set(described.state) == {LEVELS}


@pytest.mark.parametrize("name", TOKENIZER_TABLES)
def test_tokenizer_settings_are_read_off_shapes(name: str) -> None:
    state = {k: torch.empty(shape, device="meta") for k, (shape, _, _) in TABLES[name]["keys"].items()}
    default = asdict(RQVAEConfig())
    assert tokenizer_fields(state) == {
        k: default[k] for k in default if k not in ("scales", "phi_ratio", "commitment")
    }


# ---- there and back ---------------------------------------------------------------------------------------------

KINDS = [{}, {"ffn": "gelu"}, {"crop_condition": False}, {"rope": False}]


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_round_trip_keeps_every_bit(visibility: str, kind: dict, tmp_path: Path) -> None:
    model = small(visibility=visibility, **kind)
    published = generator_to_published(model)
    described = describe(published)
    assert described.masked == visibility
    assert same(described.state, model.state_dict())
    assert described.implied["scales"] == SCALES and described.implied["rope"] == kind.get("rope", True)
    save_file(published, tmp_path / "model.safetensors")
    loaded = load_generator(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert same(loaded.state_dict(), model.state_dict())
    assert same(generator_to_published(loaded), published)


def test_buffers_by_their_definition() -> None:
    """L = 5 tokens of scales 1 and 2: the first one apart, the others together."""
    published = {
        v: generator_to_published(small(scales=[1, 2], visibility=v)) for v in ("causal", "non_causal")
    }
    no = -torch.inf
    first = [[0.0, no, no, no, no]]
    assert published["non_causal"][MASK][0, 0].tolist() == first + [[no, 0.0, 0.0, 0.0, 0.0]] * 4
    assert published["causal"][MASK][0, 0].tolist() == first + [[0.0] * 5] * 4
    assert published["causal"][LEVELS].tolist() == [[0, 1, 1, 1, 1]]
    assert published["causal"][LEVELS].dtype == torch.int64 and published["causal"][MASK].shape == (
        1,
        1,
        5,
        5,
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (MASK, torch.zeros(1, 1, 39, 39), "neither causal nor non-causal"),
        (MASK, torch.zeros(1, 1, 5, 5), "39 tokens"),
        (MASK, torch.full((1, 1, 39, 39), -1e9), "other values than 0 and -inf"),
        (LEVELS, torch.tensor([[0, 1, 1]]), "is not a pyramid of square token maps"),
        (LEVELS, torch.tensor([[0, 1, 1, 1, 1]]).flip(1), "is not a pyramid of square token maps"),
    ],
)
def test_wrong_buffers_are_named(key: str, value: torch.Tensor, words: str) -> None:
    with pytest.raises(UserError, match=words):
        describe({**generator_to_published(small()), key: value})


def test_tokenizer_for_another_pyramid_keeps_weights_and_restarts_counts(tmp_path: Path) -> None:
    model = small_tokenizer()
    model.quantize.ema_vocab_hit_SV.fill_(3.0)
    save_file(model.state_dict(), tmp_path / "tokenizer.safetensors")
    loaded = load_tokenizer(tmp_path / "tokenizer.safetensors", scales=SCALES)
    assert same(loaded.state_dict(), model.state_dict()) and loaded.config == model.config
    finer = load_tokenizer(tmp_path / "tokenizer.safetensors", scales=[1, 2, 4, 6, 8])
    assert torch.equal(finer.quantize.ema_vocab_hit_SV, torch.zeros(5, 24))
    assert torch.equal(finer.encoder.conv_in.weight, model.encoder.conv_in.weight)
    without = {k: v for k, v in model.state_dict().items() if k != "quantize.ema_vocab_hit_SV"}
    assert resize_code_use(without, SCALES).keys() == model.state_dict().keys()


def golden() -> Path:
    folder = Path(__file__).parents[3] / "data" / "parity"
    if not (folder / "switti_swiglu.weights.safetensors").is_file():
        pytest.skip("no golden tensors of the transformer in tests/data/parity")
    return folder


@pytest.mark.parametrize(("variant", "visibility"), [("ar", "causal"), ("nonar", "non_causal")])
def test_buffers_of_the_published_code(variant: str, visibility: str, tmp_path: Path) -> None:
    """The two buffers as the published classes make them, here and back, in the values of their own file."""
    folder = golden()
    state = load_file(folder / "switti_swiglu.weights.safetensors")
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    given = load_file(folder / f"switti_swiglu_{variant}.io.safetensors")
    state |= {key: given[f"buffer.{key}"] for key in (LEVELS, MASK)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"heads": 4}))
    model = load_generator(tmp_path)
    assert model.config.visibility == visibility
    assert same(generator_to_published(model), state)


def test_weights_of_the_published_tokenizer_class() -> None:
    folder = golden()
    scales = json.loads((folder / "meta.json").read_text())["patch_nums"]
    model = load_tokenizer(folder / "vae.weights.safetensors", scales=scales)
    state = load_file(folder / "vae.weights.safetensors")
    assert same(model.state_dict(), {key: value.float() for key, value in state.items()})


# ---- loading ----------------------------------------------------------------------------------------------------


def publish(folder: Path, model: ScaleTransformer, **changes: Any) -> Path:
    """The layout of the published repositories, config.json included."""
    folder.mkdir(exist_ok=True)
    save_file(generator_to_published(model), folder / "model.safetensors")
    config = {
        "depth": 2, "width": 64, "heads": 1, "rope": True, "rope_size": 128, "rope_theta": 10000,
        "use_crop_cond": True, "use_swiglu_ffn": True, "use_ar": model.config.visibility == "causal",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("kind", [".safetensors", ".pth", ".pt", ".bin", ".ckpt", "folder", "bin folder"])
def test_every_kind_of_file_gives_the_same_model(kind: str, tmp_path: Path) -> None:
    model = small(visibility="causal")
    published = generator_to_published(model)
    if kind == "folder":
        source = publish(tmp_path / "f", model)
    elif kind == "bin folder":
        source = publish(tmp_path / "f", model)
        (source / "model.safetensors").unlink()
        torch.save(published, source / "pytorch_model.bin")
    else:
        source = tmp_path / f"weights{kind}"
        if kind == ".safetensors":
            save_file(published, source)
        elif kind == ".ckpt":
            state = {f"generator.{k}": v + 1 for k, v in published.items()}
            averaged = {f"ema_generator.{k}": v for k, v in published.items()}
            torch.save({"state_dict": state | averaged, "global_step": 3}, source)
        else:
            torch.save(published, source)
    loaded = load_generator(source)
    assert loaded.config == model.config and not loaded.training
    assert same(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded.cosine_LK, model.cosine_LK) and torch.equal(loaded.level_L, model.level_L)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_half_precision_without_a_detour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to casting a float32 model, the crop frequencies and tables stay float32, and nothing is copied over."""
    model = small()
    source = publish(tmp_path, model)
    seen: list[bool] = []
    original = ScaleTransformer.load_state_dict
    monkeypatch.setattr(
        ScaleTransformer,
        "load_state_dict",
        lambda self, state, **kw: (
            seen.append(self.head.weight.is_meta and kw["assign"]) or original(self, state, **kw)
        ),
    )
    loaded = load_generator(source, dtype=torch.bfloat16)
    assert seen == [True]
    assert loaded.crop_embed.weight.dtype == loaded.cosine_LK.dtype == torch.float32
    assert torch.equal(loaded.crop_embed.weight, model.crop_embed.weight)
    assert loaded.head.weight.dtype == torch.bfloat16
    assert same(loaded.state_dict(), model.to(torch.bfloat16).state_dict())


def test_random_weights_are_initial_weights() -> None:
    config = small_config(width=128, heads=2)
    found = random_weights(build_empty(config, torch.bfloat16), seed=3)
    again = random_weights(build_empty(config, torch.bfloat16), seed=3)
    other = random_weights(build_empty(config, torch.bfloat16), seed=4)
    assert same(found.state_dict(), again.state_dict())
    assert not torch.equal(found.head.weight, other.head.weight)
    assert {key: v.dtype for key, v in found.state_dict().items() if v.dtype != torch.bfloat16} == {
        "crop_embed.weight": torch.float32
    }
    reference = ScaleTransformer(config)
    assert torch.equal(found.cosine_LK, reference.cosine_LK) and torch.equal(found.level_L, reference.level_L)
    for (key, a), b in zip(found.state_dict().items(), reference.state_dict().values(), strict=True):
        spread = b.std(correction=0).item()
        few = b.numel() < 100  # the crop frequencies: N(0, 1), too few for a close estimate
        assert a.float().std(correction=0).item() == pytest.approx(spread, rel=0.5 if few else 0.25), key
        assert a.float().mean().item() == pytest.approx(b.mean().item(), abs=1 if few else 0.1), key


def test_the_variant_must_be_said_and_must_agree(tmp_path: Path) -> None:
    model = small(visibility="non_causal")
    with pytest.raises(
        UserError, match=r"model\.visibility=causal is asked for, but its buffers say non_causal"
    ):
        load_generator(publish(tmp_path, model, use_ar=True))
    assert load_generator(tmp_path, visibility="causal").config.visibility == "causal"
    with pytest.raises(UserError, match=r"use_ar=false .* must be true or false"):
        load_generator(publish(tmp_path, model, use_ar="false"))
    plain = tmp_path / "plain.pth"
    torch.save(model.state_dict(), plain)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"does not say its model\.visibility"):
        load_generator(plain)
    assert load_generator(plain, config=model.config).config == model.config


def test_every_misfit_is_named(tmp_path: Path) -> None:
    model = small()
    state = model.state_dict()
    state["surplus"] = state.pop("head.bias")
    state |= {key: value[:-1] for key, value in state.items() if ".attn." in key and key.endswith("bias")}
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_generator(tmp_path / "weights.safetensors", config=small_config(depth=3))
    extra = [key for key in build_empty(small_config(depth=3)).state_dict() if key.startswith("blocks.2.")]
    assert set(caught.value.details) == {
        "surplus is unexpected", "head.bias is missing", *(f"{key} is missing" for key in extra),
        *(f"blocks.{i}.attn.to_qkv.bias is [191], the settings need [192]" for i in range(2)),
        *(f"blocks.{i}.attn.proj.bias is [63], the settings need [64]" for i in range(2)),
    }  # fmt: skip
    message = str(caught.value)
    assert f"({len(caught.value.details)} keys)" in message and "\n" not in message and len(message) < 700
    assert f"and {len(caught.value.details) - 6} more" in message


class Harmful:
    """Calls os.getcwd when unpickled: any call will do."""

    def __reduce__(self) -> tuple:
        import os

        return os.getcwd, ()


def broken(kind: str, folder: Path) -> Path:
    """A file of a kind that must be refused."""
    weights, whole = folder / "w.safetensors", folder / "w.pth"
    save_file(generator_to_published(small()), weights)
    torch.save(generator_to_published(small()), whole)
    if kind == "cut safetensors":
        weights.write_bytes(weights.read_bytes()[:-100])
        return weights
    if kind == "cut pth":
        whole.write_bytes(whole.read_bytes()[: 2 * whole.stat().st_size // 3])
        return whole
    if kind == "code":
        torch.save({"head.weight": Harmful()}, whole)
    elif kind == "old code":
        whole.write_bytes(pickle.dumps(Harmful(), protocol=2))
    elif kind == "text":
        weights.write_text("a page that says 404")
        return weights
    elif kind == "text as pth":
        whole.write_text("<html>not found</html>")
    elif kind == "empty":
        whole.write_bytes(b"")
    elif kind == "list":
        torch.save([1, 2], whole)
    elif kind == "no tensors":
        torch.save({"epoch": 3, "args": {"lr": 0.1}}, whole)
    elif kind == "tokenizer":
        torch.save(small_tokenizer().state_dict(), whole)
    elif kind == "picture":
        return whole.rename(folder / "w.png")
    return whole


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut safetensors", "is not a complete safetensors file"),
        ("text", "is not a complete safetensors file"),
        ("cut pth", "is cut off; copy or download it again"),
        ("code", r"would run code \((posix|nt|os).getcwd\) when loaded, which is refused"),
        ("old code", "is not a readable checkpoint"),
        ("text as pth", "is not a readable checkpoint"),
        ("empty", "is not a readable checkpoint"),
        ("list", "holds a list"),
        ("no tensors", "holds no weights but epoch, args"),
        ("tokenizer", r"is not a scale transformer: word_embed\.weight, .* missing"),
        ("picture", "is not a weights file"),
    ],
)
def test_unusable_files_are_refused_in_one_line(kind: str, words: str, tmp_path: Path) -> None:
    path = broken(kind, tmp_path)
    with pytest.raises(UserError, match=words) as caught:
        load_generator(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_generator_is_not_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an RQ-VAE"):
        load_tokenizer(publish(tmp_path, small()), scales=SCALES)


def test_without_network_a_hub_id_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for source, load in (("yresearch/Switti-AR", load_generator), ("FoundationVision/var", load_tokenizer)):
        with pytest.raises(UserError, match=f"{source} cannot be downloaded .*give a local path") as caught:
            load(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no such file or folder: \./nowhere"):
        load_generator("./nowhere")


def test_hub_repositories_are_asked_for_what_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Repositories that say nothing of scales or variant are known by name; of VAR's only one file is fetched."""
    import huggingface_hub

    asked: dict[str, list[str]] = {}

    def download(repo_id: str, allow_patterns: list[str], revision: str | None) -> str:
        asked[repo_id] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = small(scales=PYRAMIDS[512], depth=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = {source: load_generator(source).config for source in ("yresearch/Switti", "yresearch/Switti-AR")}
    assert [config.visibility for config in loaded.values()] == ["non_causal", "causal"]
    assert all(config.scales == PYRAMIDS[512] for config in loaded.values())
    assert {r.resolution for n, r in GENERATORS.items() if "1024" in n} == {1024}
    torch.save(small_tokenizer().state_dict(), tmp_path / "vae_ch160v4096z32.pth")
    assert load_tokenizer("FoundationVision/var").pyramid.sides == tuple(PYRAMIDS[256])
    assert asked["FoundationVision/var"] == ["vae_ch160v4096z32.pth"]


# ---- another resolution -----------------------------------------------------------------------------------------


def test_levels_are_carried_by_nearest_progress() -> None:
    assert nearest_levels(PYRAMIDS[256], PYRAMIDS[512]) == list(range(10))
    # r' = j / 9 nearest to r = k / 13, by hand: 9·k/13 rounded.
    assert nearest_levels(PYRAMIDS[512], PYRAMIDS[1024]) == [0, 1, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8, 9]
    assert nearest_levels([1, 2, 4], [1, 2]) == [0, 2]
    state = small().state_dict()
    finer = resize_levels(state, SCALES, [1, 2, 3, 5, 7, 9, 12])
    assert torch.equal(finer["lvl_embed.weight"], state["lvl_embed.weight"][[0, 0, 1, 1, 2, 2, 3]])
    assert all(finer[key] is state[key] for key in state if key != "lvl_embed.weight")


def test_what_cannot_change_resolution_says_so() -> None:
    with pytest.raises(UserError, match=r"model\.rope=false"):
        resize_levels(small(rope=False).state_dict(), SCALES, [1, 2, 4, 8])
    with pytest.raises(UserError, match="must begin with 1"):
        resize_levels(small().state_dict(), SCALES, [2, 3, 4])
    assert (
        resize_levels(small(rope=False).state_dict(), SCALES, SCALES).keys()
        == small(rope=False).state_dict().keys()
    )


def test_weights_are_mapped_not_copied(tmp_path: Path) -> None:
    """A file that is replaced after loading does not change what was loaded."""
    path = tmp_path / "w.safetensors"
    state = {"a": torch.arange(5.0)}
    save_file(state, path)
    loaded = read_weights(path)
    (tmp_path / "new").write_bytes(b"x")
    (tmp_path / "new").replace(path)
    assert torch.equal(loaded["a"], state["a"])
