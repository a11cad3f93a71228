"""The pipeline: what a call means, and folders and hubs it is written to and read from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from switti.errors import UserError
from switti.files import read_json
from switti.models.config import GeneratorConfig
from switti.models.transformer import ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.sampling.pipeline import SwittiPipeline
from switti.sampling.sampler import ScaleTrace
from switti.text.base import TextEmbedding
from switti.text.config import TextConfig
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.published import generator_to_published
from switti.weights.save import save_tokenizer

SCALES = [1, 2, 3, 4]
WIDTH, POOLED = 12, 10


class Letters:
    """A text encoder whose values follow from the caption alone."""

    name, width, pooled_width, max_length, truncated, fingerprint = "letters", WIDTH, POOLED, 5, 0, "f"

    def to(self, device: Any) -> "Letters":
        return self

    def encode(self, captions: list[str]) -> TextEmbedding:
        rows = []
        for caption in captions:
            generator = torch.Generator().manual_seed(sum(map(ord, caption)))
            rows.append(
                (torch.randn(5, WIDTH, generator=generator), torch.randn(POOLED, generator=generator))
            )
        mask = torch.ones(len(captions), 5, dtype=torch.bool)
        return TextEmbedding(torch.stack([r[0] for r in rows]), mask, torch.stack([r[1] for r in rows]))


def build(visibility: str = "non_causal", **model_settings: Any) -> SwittiPipeline:
    torch.manual_seed(0)
    tokenizer = RQVAE(
        RQVAEConfig(
            scales=SCALES, codebook_size=48, code_width=8, channels=32, multipliers=[1, 1], residual_blocks=1
        )
    )
    model = ScaleTransformer(
        GeneratorConfig(
            visibility=visibility, depth=2, width=32, heads=2, scales=SCALES, codebook_size=48, code_width=8,
            text_width=WIDTH, pooled_width=POOLED, **model_settings,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return SwittiPipeline(
        model.eval(),
        tokenizer.eval(),
        Letters(),
        SamplingConfig(guidance=3.0, top_k=20),
        text_config=TextConfig(),
    )


@pytest.fixture(scope="module")
def pipeline() -> SwittiPipeline:
    return build()


def close(a: Any, b: Any) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-4)


# ---- devices, types, and diffusers' names -------------------------------------------------------------------------


def test_moving_converts_the_transformer_alone() -> None:
    pipeline = build()
    assert pipeline.to("cpu", torch.bfloat16) is pipeline
    assert pipeline.dtype == torch.bfloat16 and pipeline.device == torch.device("cpu")
    assert next(pipeline.tokenizer.parameters()).dtype == torch.float32
    assert pipeline.generator.crop_embed.weight.dtype == torch.float32
    assert pipeline.to(dtype=torch.float32).dtype == torch.float32
    with pytest.raises(UserError, match="takes device and dtype, not memory"):
        pipeline.to(memory=3)
    with pytest.raises(UserError, match="not a floating-point type"):
        pipeline.to(torch.int8)


def test_names_of_diffusers_mean_the_same(pipeline: SwittiPipeline) -> None:
    ours = pipeline(["a", "b"], guidance=5.0, output_type="pt")
    theirs = pipeline(prompt=["a", "b"], guidance_scale=5.0, output_type="pt", return_dict=True)
    assert torch.equal(ours, theirs.images)
    (images,) = pipeline(["a", "b"], guidance_scale=5.0, output_type="np", return_dict=False)
    assert images.shape == (2, *ours.shape[2:], 3) and images.dtype == np.float32
    assert torch.equal(torch.from_numpy(images).permute(0, 3, 1, 2), ours)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"guidance": 3.0, "guidance_scale": 3.0}, "guidance_scale and guidance are the same argument"),
        ({"prompt": "a"}, "prompt and prompts are the same argument"),
    ],
)
def test_an_argument_under_two_names_is_refused(pipeline: SwittiPipeline, given: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        pipeline("a", **given)


def test_a_folder_names_no_code(tmp_path: Path) -> None:
    pipeline = build()
    pipeline.text_config = TextConfig(
        encoder="poison.module:X", width=WIDTH, pooled_width=POOLED, max_length=5
    )
    pipeline.save_pretrained(tmp_path / "exported")
    with pytest.raises(UserError, match="no code is imported because a folder names it"):
        SwittiPipeline.from_pretrained(tmp_path / "exported")
    opened = SwittiPipeline.from_pretrained(tmp_path / "exported", text_encoder=Letters())
    assert torch.equal(opened("a", output_type="pt"), pipeline("a", output_type="pt"))


# ---- a call -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_pictures_do_not_depend_on_their_batch(visibility: str) -> None:
    pipe = build(visibility)
    given: dict[str, Any] = {
        "num_images_per_prompt": 2, "seeds": [5, 6, 7, 8], "negative_prompt": ["x", "y"],
        "switch_prompts": ["c", "d"], "switch_scale": 2, "output_type": "latent",
    }  # fmt: skip
    together, single = (pipe(["a", "b"], batch_size=size, **given) for size in (4, 1))
    assert close(together, single)
    alone = pipe(
        "b", seeds=[7], negative_prompt="y", switch_prompts="d", switch_scale=2, output_type="latent"
    )
    assert close(alone, together[2:3])
    assert not close(together[2], together[3])


def test_generators(pipeline: SwittiPipeline) -> None:
    """One a picture: the same state gives the same picture, and each call moves it on."""

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (7, 8)]

    used = generators()
    first = pipeline(["a", "b"], generator=used, output_type="pt")
    assert torch.equal(pipeline(["a", "b"], generator=generators(), output_type="pt"), first)
    assert not close(pipeline(["a", "b"], generator=used, output_type="pt"), first)
    single = [
        pipeline(["a", "b"], generator=torch.Generator().manual_seed(s), batch_size=n, output_type="pt")
        for s, n in ((1, 2), (1, 1), (2, 2))
    ]
    assert close(single[0], single[1]) and not close(single[0], single[2])
    assert not close(single[0][0], single[0][1])


def test_output_types_are_one_picture(pipeline: SwittiPipeline) -> None:
    latent, picture, pil = (pipeline("a", seeds=[1], output_type=kind) for kind in ("latent", "pt", "pil"))
    assert latent.shape == (1, 8, 4, 4) and picture.shape == (1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal((pipeline.tokenizer.decode(latent).clamp(-1, 1) + 1) / 2, picture)
    pixel = torch.from_numpy(np.array(pil[0])).permute(2, 0, 1)
    assert torch.equal(pixel, (picture[0] * 255).round().byte())


def test_fields_of_the_sampling_are_arguments(pipeline: SwittiPipeline) -> None:
    whole = pipeline("a", seeds=[1], sampling=SamplingConfig(guidance=5.0, top_k=3), output_type="latent")
    found = pipeline("a", seeds=[1], guidance=5.0, top_k=3, output_type="latent")
    assert torch.equal(found, whole)
    assert not close(found, pipeline("a", seeds=[1], output_type="latent"))


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_a_switch_of_prompts_changes_later_scales_only(visibility: str) -> None:
    pipe = build(visibility)
    logits: dict[str, list[torch.Tensor]] = {}

    def run(name: str, prompt: str, **more: Any) -> torch.Tensor:
        def note(trace: ScaleTrace) -> None:
            logits.setdefault(name, []).append(trace.guided_BPV)

        return pipe(prompt, seeds=[1], output_type="latent", callback_on_scale_end=note, **more)

    first, second = run("first", "a"), run("second", "zebra")
    switched = run("switched", "a", switch_prompts="zebra", switch_scale=2)
    assert [torch.equal(a, b) for a, b in zip(logits["first"], logits["switched"], strict=True)] == [
        True, True, False, False,
    ]  # fmt: skip
    assert not close(switched, first) and not close(switched, second)
    assert torch.equal(run("same", "a", switch_prompts="a", switch_scale=2), first)


def test_a_causal_switch_keeps_what_was_seen() -> None:
    """By hand: the later scales see the earlier ones under the first caption, themselves under the second."""
    pipe = build("causal")
    seen: list[ScaleTrace] = []
    pipe(
        "a", seeds=[1], guidance=0.0, gumbel=False, switch_prompts="zebra", switch_scale=3, output_type="latent",
        callback_on_scale_end=seen.append,
    )  # fmt: skip
    model = pipe.generator
    conditions = []
    for caption in ("a", "zebra"):
        text = pipe.text_encoder.encode([caption])
        conditions.append(model.prepare(text.tokens_BTC, text.mask_BT, text.pooled_BP, None))
    cache, rows = model.build_cache(), None
    with torch.no_grad():
        for scale, trace in enumerate(seen):
            found = model.forward_scale(scale, rows, conditions[scale >= 3], cache)
            torch.testing.assert_close(trace.logits, found, rtol=0, atol=1e-5)
            if scale < 3:
                rows = pipe.tokenizer.quantize.next_input(scale, trace.latent_BCHW)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": []}, "no prompt given"),
        ({"seeds": [1, 2]}, "2 seeds for 1 images"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1 images"),
        ({"generator": torch.Generator(), "seeds": [1]}, "not both"),
        ({"guidence": 3.0}, "unknown argument 'guidence'; did you mean 'guidance'"),
        ({"top_p": 2.0}, "sampling.top_p=2.0 must lie in"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 texts for 1 prompts"),
        ({"switch_prompts": "b"}, "belong together"),
        ({"switch_scale": 2}, "belong together"),
        ({"switch_prompts": "b", "switch_scale": 4}, r"switch_scale=4 must be an integer in \[1, 3\]"),
        ({"switch_prompts": "b", "switch_scale": 0}, r"switch_scale=0 must be an integer in \[1, 3\]"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0"),
        ({"output_type": "tiff"}, "output_type='tiff' must be"),
        ({"prompts": None}, "prompts must be a text or a list of texts, not NoneType"),
        ({"prompts": ["a", 3]}, r"prompts\[1\]=3 must be text, not int"),
        ({"prompts": b"a"}, "not bytes"),
        ({"prompts": "caf\udce9"}, r"prompts=caf\\udce9 is not text in UTF-8"),
        ({"negative_prompt": 3}, "negative_prompt must be"),
        ({"negative_prompt": "\ud800"}, "negative_prompt=.* is not text in UTF-8"),
        ({"switch_prompts": [None], "switch_scale": 1}, r"switch_prompts\[0\]=None must be text"),
        ({"switch_prompts": "b", "switch_scale": 1.5}, "switch_scale=1.5 must be an integer"),
        ({"seeds": [-1]}, r"seeds\[0\]=-1 must be an integer in \[0, 18446744073709551615\]"),
        ({"seeds": [2**64]}, r"seeds\[0\]=18446744073709551616 must be"),
        ({"seeds": [1.5]}, r"seeds\[0\]=1.5 must be"),
        ({"seeds": [True]}, r"seeds\[0\]=True must be"),
        ({"seeds": [None]}, r"seeds\[0\]=None must be"),
        ({"seeds": [10**6000]}, r"seeds\[0\]=an integer of 19932 bits must be"),
        ({"seeds": 5}, "seeds=5 must be a list"),
        ({"seeds": "5"}, "seeds='5' must be a list"),
        ({"generator": 5}, "generator=5 must be a torch.Generator"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt=1.5 must be an integer of at least 1"),
        ({"batch_size": True}, "batch_size=True must be"),
        ({"crop": (1, 2, 3)}, "crop=.* must be .height, width, top, left."),
        ({"crop": (1, 2, 3, -1)}, "crop=-1 must be an integer"),
        ({"sampling": {"top_k": 3}}, "must be a SamplingConfig"),
        ({"sampling": SamplingConfig(top_k=2.5)}, "sampling.top_k=2.5 is not an integer"),  # type: ignore[arg-type]
        ({"guidance": 1e39}, r"sampling.guidance=1e\+39 must lie in"),
        ({"guidance": float("nan")}, "sampling.guidance=nan"),
        ({"guidance": "4"}, "sampling.guidance=.*4.* is not a number"),
        ({"guidance": None}, "sampling.guidance=None is not a number"),
        ({"top_k": -1}, "sampling.top_k=-1 must be 0"),
        ({"top_k": True}, "sampling.top_k=True is not an integer"),
        ({"top_p": float("nan")}, "sampling.top_p=nan"),
        ({"top_p": -0.1}, "sampling.top_p=-0.1 must lie in"),
        ({"late_temperature": 0}, "sampling.late_temperature=0 must lie in"),
        ({"late_temperature": 0.0}, "sampling.late_temperature=0.0 must lie in"),
        ({"late_temperature": float("inf")}, "sampling.late_temperature=inf"),
        ({"late_temperature": 1e-300}, "sampling.late_temperature=1e-300 must lie in"),
        ({"guidance_stop": -1}, "sampling.guidance_stop=-1"),
        ({"gumbel_start": 0.5}, "sampling.gumbel_start=0.5 is not an integer"),
        ({"gumbel": 1}, "sampling.gumbel=1 is not true or false"),
    ],
)
def test_bad_arguments_are_named(pipeline: SwittiPipeline, arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        pipeline(**({"prompts": "a"} | arguments))


@pytest.mark.parametrize(
    "arguments",
    [
        {"seeds": [2**64 - 1]}, {"seeds": np.array([3])}, {"seeds": range(1)}, {"top_k": 10**9}, {"top_k": 0},
        {"top_p": 0.0}, {"top_p": 1}, {"guidance": -1.0}, {"guidance": np.float32(2)}, {"guidance": 1e6},
        {"late_temperature": 1e-6, "guidance_stop": 1}, {"guidance_start": 10**18}, {"gumbel": False, "top_k": 1},
        {"prompts": ""}, {"prompts": "E = mc²"}, {"prompts": "x\x00y"},
    ],
)  # fmt: skip
def test_extreme_arguments_give_images(pipeline: SwittiPipeline, arguments: dict) -> None:
    image = pipeline(**({"prompts": "a", "output_type": "pt"} | arguments))
    assert image.shape == (1, 3, 8, 8) and image.isfinite().all()


def test_no_negative_prompt_is_the_empty_one(pipeline: SwittiPipeline) -> None:
    plain = pipeline("a", output_type="pt")
    assert torch.equal(pipeline("a", negative_prompt=None, output_type="pt"), plain)
    assert not close(pipeline("a", negative_prompt="b", output_type="pt"), plain)


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
@pytest.mark.parametrize("gumbel", [True, False])
@pytest.mark.parametrize("top_k", [0, 5])
def test_weights_that_are_not_finite_are_named(visibility: str, gumbel: bool, top_k: int) -> None:
    pipe = build(visibility)
    with torch.no_grad():
        pipe.generator.lvl_embed.weight[2] = float("nan")
    with pytest.raises(UserError, match="logits of scale 2 are not finite: the model's weights"):
        pipe("a", gumbel=gumbel, top_k=top_k)


def test_logits_that_guidance_makes_overflow_name_it() -> None:
    pipe = build()
    with torch.no_grad():
        pipe.generator.head.bias.add_(1e34)
    with pytest.raises(UserError, match=r"logits of scale 1 are not finite: sampling.guidance=1000000.0 and"):
        pipe("a", guidance=1e6, gumbel=False)


# ---- folders and hubs -------------------------------------------------------------------------------------------


def read(source: Path | str, **more: Any) -> SwittiPipeline:
    return SwittiPipeline.from_pretrained(source, text_encoder=Letters(), **more)


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_a_saved_pipeline_gives_the_same_bits(visibility: str, tmp_path: Path) -> None:
    pipe = build(visibility)
    pipe.autocast = True
    pipe.save_pretrained(tmp_path / "out")
    found = read(tmp_path / "out")
    assert found.generator.config == pipe.generator.config and found.tokenizer.config == pipe.tokenizer.config
    assert (found.sampling, found.autocast, found.text_config) == (pipe.sampling, True, TextConfig())
    assert torch.equal(found(["a", "b"], output_type="pt"), pipe(["a", "b"], output_type="pt"))
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == [
        "out/README.md", "out/generator/config.json", "out/generator/model.safetensors", "out/model_index.json",
        "out/text_encoder/config.json", "out/tokenizer/config.json", "out/tokenizer/model.safetensors",
    ]  # fmt: skip


def test_the_crop_base_of_training_is_that_of_sampling_and_exports(tmp_path: Path) -> None:
    """A square at the base that the model was trained with; folders of before that setting mean 512."""
    pipe = build(crop_base=100)
    plain = pipe(["a"], output_type="latent")
    assert torch.equal(plain, pipe(["a"], crop=(100, 100, 0, 0), output_type="latent"))
    assert not close(plain, pipe(["a"], crop=(512, 512, 0, 0), output_type="latent"))
    pipe.save_pretrained(tmp_path / "out")
    again = SwittiPipeline.from_pretrained(tmp_path / "out", text_encoder=Letters())
    assert again.generator.config.crop_base == 100
    assert torch.equal(again(["a"], output_type="latent"), plain)
    config = tmp_path / "out" / "generator" / "config.json"
    settings = json.loads(config.read_text())
    del settings["crop_base"]
    config.write_text(json.dumps(settings))
    older = SwittiPipeline.from_pretrained(tmp_path / "out", text_encoder=Letters())
    assert torch.equal(
        older(["a"], output_type="latent"), pipe(["a"], crop=(512, 512, 0, 0), output_type="latent")
    )


def test_half_precision_on_disk(tmp_path: Path) -> None:
    pipe = build()
    pipe.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    found = read(tmp_path / "half")
    assert found.generator.head.weight.dtype == torch.bfloat16
    assert torch.equal(found.generator.crop_embed.weight, pipe.generator.crop_embed.weight)
    assert torch.equal(found.tokenizer.encoder.conv_in.weight, pipe.tokenizer.encoder.conv_in.weight)
    pipe.generator.to(torch.bfloat16)
    assert torch.equal(found("a", output_type="pt"), pipe("a", output_type="pt"))
    assert read(tmp_path / "half", dtype=torch.float32).generator.head.weight.dtype == torch.float32


def test_a_folder_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        pipe.save_pretrained(tmp_path / "full")

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("switti.sampling.pipeline_folder.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(tmp_path / "part")
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "mine.txt"]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model_index.json", {"_class_name": "Other"}, "describes no SwittiPipeline"),
        ("model_index.json", {"_class_name": "SwittiPipeline", "format": 9, "sampling": {}}, "format 9"),
        ("generator/config.json", {"visibility": "causal"}, "does not say its model.scales"),
        ("generator/config.json", {"visibility": "causal", "scales": SCALES, "width": 31}, "width=31"),
        ("text_encoder/config.json", {"encodr": "minilm"}, "unknown setting text.encodr"),
    ],
)
def test_damaged_folders_are_explained(tmp_path: Path, file: str, content: dict, words: str) -> None:
    build().save_pretrained(tmp_path / "out")
    (tmp_path / "out" / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read(tmp_path / "out")


def test_published_weights_get_the_released_settings(tmp_path: Path) -> None:
    """A folder as published: generator only; the tokenizer is named, text encoder and sampler are the released ones."""
    pipe = build("causal")
    save_file(generator_to_published(pipe.generator), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"use_ar": True, "heads": 2}))
    save_tokenizer(pipe.tokenizer, tmp_path / "codes.safetensors")
    found = read(tmp_path, tokenizer=tmp_path / "codes.safetensors")
    assert found.generator.config == pipe.generator.config
    assert (found.sampling.guidance, found.sampling.late_temperature) == (6.0, 0.1)
    assert found.text_config == TextConfig(encoder="clip_pair", width=2048, pooled_width=1280, max_length=77)
    same = {"guidance": 3.0, "late_temperature": None, "top_k": 20, "output_type": "pt"}
    assert torch.equal(found("a", **same), pipe("a", **same))
    with pytest.raises(UserError, match="VQVAE-Switti cannot be downloaded"):
        read(tmp_path)


def test_hub_upload_and_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a hub that is a folder."""
    import shutil
    from types import SimpleNamespace

    import huggingface_hub

    hub = tmp_path / "hub"

    def take(repo_id: str, folder_path: Path, commit_message: str) -> Any:
        shutil.copytree(folder_path, hub / repo_id)
        return SimpleNamespace(commit_url=f"hub/{repo_id}/1")

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo_id, private, exist_ok: None)
    monkeypatch.setattr(huggingface_hub, "upload_folder", take)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo_id, allow_patterns, revision: str(hub / repo_id)
    )
    pipe = build()
    assert pipe.push_to_hub("me/tiny") == "hub/me/tiny/1"
    assert read_json(hub / "me" / "tiny" / "model_index.json")["_class_name"] == "SwittiPipeline"
    assert (hub / "me" / "tiny" / "README.md").read_text().startswith("---\nlibrary_name: switti\n")
    assert torch.equal(read("me/tiny")("a", output_type="pt"), pipe("a", output_type="pt"))


def test_without_network_the_hub_is_named() -> None:
    with pytest.raises(UserError, match="cannot upload to me/tiny"):
        build().push_to_hub("me/tiny")
    with pytest.raises(UserError, match=r"me/tiny cannot be downloaded .*give a local path"):
        read("me/tiny")
