"""ImageReward, HPSv2, aesthetic predictor: published files of tiny random networks, against plain formulations."""

import json
import math
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from switti.errors import UserError
from switti.metrics.aesthetic import load_head
from switti.metrics.collection import build_metrics
from switti.metrics.config import MetricsConfig
from switti.metrics.image_reward import load_image_reward

WIDTH, DEPTH, SIDE, PATCH, WORDS, TEXT_WIDTH = 128, 2, 32, 8, 40, 64
TEXT = {
    "hidden_size": TEXT_WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 48, "layer_norm_eps": 1e-12,
}  # fmt: skip


def published_state() -> dict[str, Tensor]:
    """A file in ImageReward's own names."""
    torch.manual_seed(3)
    state: dict[str, Tensor] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs) / math.sqrt(inputs)
        state[f"{name}.bias"] = torch.randn(outputs) * 0.1

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = (
            1 + 0.1 * torch.randn(width),
            0.1 * torch.randn(width),
        )

    vision = "blip.visual_encoder"
    state[f"{vision}.cls_token"] = torch.randn(1, 1, WIDTH)
    state[f"{vision}.pos_embed"] = torch.randn(1, 1 + (SIDE // PATCH) ** 2, WIDTH)
    state[f"{vision}.patch_embed.proj.weight"] = torch.randn(WIDTH, 3, PATCH, PATCH) * 0.1
    state[f"{vision}.patch_embed.proj.bias"] = torch.randn(WIDTH) * 0.1
    for block in (f"{vision}.blocks.{n}" for n in range(DEPTH)):
        norm(f"{block}.norm1", WIDTH)
        norm(f"{block}.norm2", WIDTH)
        linear(f"{block}.attn.qkv", WIDTH, 3 * WIDTH)
        linear(f"{block}.attn.proj", WIDTH, WIDTH)
        linear(f"{block}.mlp.fc1", WIDTH, 96)
        linear(f"{block}.mlp.fc2", 96, WIDTH)
    norm(f"{vision}.norm", WIDTH)
    text = "blip.text_encoder"
    state[f"{text}.embeddings.position_ids"] = torch.arange(48)[None]
    state[f"{text}.embeddings.word_embeddings.weight"] = torch.randn(WORDS, TEXT_WIDTH)
    state[f"{text}.embeddings.position_embeddings.weight"] = torch.randn(48, TEXT_WIDTH)
    norm(f"{text}.embeddings.LayerNorm", TEXT_WIDTH)
    for layer in (f"{text}.encoder.layer.{n}" for n in range(2)):
        for part, keys in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            linear(f"{layer}.{part}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            linear(f"{layer}.{part}.self.key", keys, TEXT_WIDTH)
            linear(f"{layer}.{part}.self.value", keys, TEXT_WIDTH)
            linear(f"{layer}.{part}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{layer}.{part}.output.LayerNorm", TEXT_WIDTH)
        linear(f"{layer}.intermediate.dense", TEXT_WIDTH, 96)
        linear(f"{layer}.output.dense", 96, TEXT_WIDTH)
        norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    linear("blip.vision_proj", WIDTH, 16)
    for place, inputs, outputs in (
        (0, TEXT_WIDTH, 1024),
        (2, 1024, 128),
        (4, 128, 64),
        (6, 64, 16),
        (7, 16, 1),
    ):
        linear(f"mlp.layers.{place}", inputs, outputs)
    return state


def plain_reward(state: dict[str, Tensor], pixels_3HW: Tensor, ids: list[int]) -> float:
    """The published computation for one image and caption, written out."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    patches = F.unfold(pixels_3HW[None], PATCH, stride=PATCH)[0].T
    x = (
        patches @ state[f"{vision}.patch_embed.proj.weight"].flatten(1).T
        + state[f"{vision}.patch_embed.proj.bias"]
    )
    x = torch.cat([state[f"{vision}.cls_token"][0], x]) + state[f"{vision}.pos_embed"][0]
    for block in (f"{vision}.blocks.{n}" for n in range(DEPTH)):
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v, WIDTH // 64))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
        x = x + linear(f"{block}.mlp.fc2", hidden)
    image = norm(f"{vision}.norm", x, 1e-6)
    y = state[f"{text}.embeddings.word_embeddings.weight"][torch.tensor(ids)]
    y = norm(
        f"{text}.embeddings.LayerNorm",
        y + state[f"{text}.embeddings.position_embeddings.weight"][: len(ids)],
        1e-12,
    )
    for layer in (f"{text}.encoder.layer.{n}" for n in range(2)):
        for part, keys in (("attention", y), ("crossattention", image)):
            own = f"{layer}.{part}"
            seen = y if part == "attention" else keys
            mixed = attend(
                linear(f"{own}.self.query", y),
                linear(f"{own}.self.key", seen),
                linear(f"{own}.self.value", seen),
                4,
            )
            y = norm(f"{own}.output.LayerNorm", linear(f"{own}.output.dense", mixed) + y, 1e-12)
        hidden = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", y)))
        y = norm(f"{layer}.output.LayerNorm", hidden + y, 1e-12)
    reward = y[:1]
    for place in (0, 2, 4, 6, 7):
        reward = linear(f"mlp.layers.{place}", reward)
    return (float(reward) - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Weights, text settings and the vocabulary, as they are downloaded."""
    torch.save(published_state(), tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(TEXT))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "heart", "cat", "face", "the", "sun"]
    (tmp_path / "vocab.txt").write_text(
        "\n".join(words + [f"w{n}" for n in range(WORDS - len(words))]) + "\n"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    return tmp_path


class TestImageReward:
    def test_agrees_with_the_computation_written_out(self, folder):
        scorer = load_image_reward(str(folder), str(folder))
        torch.manual_seed(0)
        images = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
        captions = ["a red heart", "the sun", "A CAT face heart red sun"]
        ids = [[2, 5, 6, 7, 3], [2, 10, 11, 3], [2, 5, 8, 9, 7, 6, 11, 3]]
        mean, deviation = (
            torch.tensor(v)[:, None, None]
            for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
        )
        state = published_state()
        expected = [
            plain_reward(state, (image / 255 - mean) / deviation, words)
            for image, words in zip(images, ids, strict=True)
        ]
        assert scorer.score(images, captions).tolist() == pytest.approx(expected, abs=2e-4)

    def test_long_prompts_are_cut_at_35_tokens(self, folder):
        scorer = load_image_reward(str(folder), str(folder))
        image = torch.randint(0, 256, (1, 3, 48, 40), dtype=torch.uint8)
        long = " ".join(["cat"] * 33)
        assert scorer.score(image, [long]).equal(scorer.score(image, [f"{long} sun heart"]))

    def test_is_a_metric_of_a_run(self, folder):
        config = MetricsConfig(
            names=["image_reward"], image_reward=str(folder), image_reward_tokenizer=str(folder)
        )
        metrics = build_metrics(config)
        images = torch.rand(4, 3, 20, 20)
        metrics.update(images, ["a cat"] * 4)
        (single,) = metrics.scores.values()
        from switti.metrics.collection import to_bytes

        assert metrics.compute()["image_reward"] == pytest.approx(
            float(single.score(to_bytes(images), ["a cat"] * 4).mean()), abs=1e-6
        )

    def test_a_missing_or_foreign_file_is_named(self, folder):
        with pytest.raises(UserError, match=r"metrics.names has image_reward: set metrics.image_reward to"):
            build_metrics(MetricsConfig(names=["image_reward"]))
        state = published_state()
        del state["blip.visual_encoder.norm.bias"]
        torch.save(state, folder / "ImageReward.pt")
        with pytest.raises(UserError, match=r"post_layernorm.bias is missing"):
            load_image_reward(str(folder), str(folder))
        torch.save({"a": torch.zeros(1)}, folder / "ImageReward.pt")
        with pytest.raises(UserError, match="does not hold ImageReward's weights"):
            load_image_reward(str(folder), str(folder))
        (folder / "med_config.json").unlink()
        with pytest.raises(UserError, match=r"med_config.json is missing; download"):
            load_image_reward(str(folder), str(folder))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An open_clip architecture of a few thousand numbers, and its weights as HPSv2 publishes them."""
    name, folder = "tiny-for-preferences", tmp_path_factory.mktemp("clip")
    sizes = {"width": 16, "layers": 1, "heads": 2}
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "head_width": 8, "width": 16, "layers": 1},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, **sizes},
    }
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(0)
    torch.save({"state_dict": open_clip.create_model(name).state_dict()}, folder / "HPS.pt")
    return name, folder / "HPS.pt"


class TestHps:
    def test_the_longer_side_is_resized_and_the_rest_padded(self, clip):
        name, weights = clip
        config = MetricsConfig(names=["hps_v2_1"], hps_v2_1=str(weights), hps_model=name)
        metric = build_metrics(config).scores["hps_v2_1"]
        torch.manual_seed(1)
        image = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
        picture = Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize(
            (32, 16), Image.Resampling.BICUBIC
        )
        square = Image.new("RGB", (32, 32))
        square.paste(picture, (0, 8))
        network = open_clip.create_model(name).eval()
        network.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
        mean, deviation = (
            torch.tensor(v)[:, None, None]
            for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        import numpy as np

        pixels = (torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255 - mean) / deviation
        with torch.no_grad():
            expected = F.cosine_similarity(
                network.encode_image(pixels[None]), network.encode_text(open_clip.tokenize(["a cat"]))
            )
        assert metric.score(image, ["a cat"]).tolist() == pytest.approx(expected.tolist(), abs=1e-3)

    def test_versions_are_named_and_their_files_asked_for(self):
        with pytest.raises(UserError, match=r"metrics.hps_v2_0 to the file HPS_v2_compressed.pt"):
            build_metrics(MetricsConfig(names=["hps_v2_0"]))
        with pytest.raises(UserError, match=r"metrics.hps_v2_1=/no/file.pt: no such file"):
            build_metrics(MetricsConfig(names=["hps_v2_1"], hps_v2_1="/no/file.pt"))


class TestAesthetic:
    def head(self, folder: Path, width: int) -> Path:
        torch.manual_seed(5)
        sizes = (width, 1024, 128, 64, 16, 1)
        state = {}
        for place, inputs, outputs in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
            state[f"layers.{place}.weight"] = torch.randn(outputs, inputs) / math.sqrt(inputs)
            state[f"layers.{place}.bias"] = torch.randn(outputs)
        torch.save(state, folder / "head.pth")
        return folder / "head.pth"

    def test_the_head_sees_unit_vectors_and_has_no_activations(self, clip, tmp_path):
        name, weights = clip
        file = self.head(tmp_path, 16)
        config = MetricsConfig(
            names=["aesthetic"], aesthetic=str(file), aesthetic_model=name, aesthetic_clip=str(weights)
        )
        metric = build_metrics(config).scores["aesthetic_laion_v2"]
        images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        x = metric.scorer.encoder.encode_images(images)
        x = x / x.norm(dim=-1, keepdim=True)
        state = torch.load(file, weights_only=True)
        for place in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
        assert metric.score(images, ["", ""]).tolist() == pytest.approx(x[:, 0].tolist(), abs=1e-4)

    def test_a_head_of_another_embedding_is_refused(self, clip, tmp_path):
        name, weights = clip
        config = MetricsConfig(
            names=["aesthetic"], aesthetic=str(self.head(tmp_path, 12)), aesthetic_model=name,
            aesthetic_clip=str(weights),
        )  # fmt: skip
        with pytest.raises(UserError, match=r"needs an embedding of 12 numbers, but .* gives 16"):
            build_metrics(config)
        with pytest.raises(UserError, match="does not hold the aesthetic head"):
            load_head(weights)
