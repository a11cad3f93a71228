"""Exported folders and published weights made by an enemy: one line at once, no memory, no network."""

# ruff: noqa: E501  (a table of cases)
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.loading import load
from experiments import analyse, sample
from switti.errors import UserError
from switti.metrics.pick_score import load_pick_score
from switti.models.config import GeneratorConfig
from switti.models.transformer import ScaleTransformer
from switti.sampling.pipeline import SwittiPipeline
from switti.sampling.pipeline_folder import read_parts, write_parts
from switti.text.build import build_text_encoder
from switti.text.clip_pair import load_clip_text
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.fill import count_parameters, expected_state
from switti.weights.load import load_generator, load_tokenizer
from switti.weights.published import LEVELS

GENERATOR, TOKENIZER, TEXT, INDEX = (
    "generator/config.json",
    "tokenizer/config.json",
    "text_encoder/config.json",
    "model_index.json",
)
WEIGHTS = ("generator/model.safetensors", "tokenizer/model.safetensors")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = load("generator/tiny", ["tokenizer_weights=unused"])
    pipeline = SwittiPipeline(
        ScaleTransformer(config.model).eval(),
        RQVAE(config.tokenizer).eval(),
        build_text_encoder(config.text),
        config.sampling,
        text_config=config.text,
    )
    folder = tmp_path_factory.mktemp("exported") / "folder"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(exported, tmp_path / "folder"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whom the process wanted to talk to; nobody answers."""
    import huggingface_hub  # noqa: F401  (imported once, so that no case is charged for it)
    import transformers  # noqa: F401

    calls: list[str] = []

    def refuse(*arguments: Any, **options: Any) -> Any:
        calls.append(repr(arguments))
        raise OSError("no network in tests")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return calls


def refused(read: Callable[[], Any], seconds: float = 3) -> str:
    """The one line with which something ends, in little time."""
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert message.isprintable() and len(message) < 900, message
    assert time.process_time() - start < seconds
    return message


def changed(file: str, **values: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | values))

    return act


def written(file: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(content) and None


def instead(file: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return act


def weights(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        state = {key: value.clone() for key, value in load_file(folder / file).items()}
        change(state)
        save_file(state, folder / file)

    return act


def many_blocks(state: dict[str, torch.Tensor]) -> None:
    state |= {f"blocks.{i}.cross_attn.to_kv.weight": torch.ones(1, 1) for i in range(2, 20_000)}


def many_residual_blocks(state: dict[str, torch.Tensor]) -> None:
    state |= {f"encoder.down.0.block.{i}.conv1.weight": torch.ones(1) for i in range(1, 20_000)}


G, T = WEIGHTS
LIES: dict[str, Callable[[Path], None]] = {
    **{f"generator {name}={value!r:.40}": changed(GENERATOR, **{name: value}) for name, value in [
        ("depth", 10**5), ("depth", 10**9), ("depth", 10**30), ("depth", 500), ("depth", 0), ("depth", -1),
        ("depth", 2.0),
        ("depth", "2"), ("depth", None), ("depth", [2]), ("depth", True), ("width", 2**40), ("width", 2**16), ("heads", 0),
        ("heads", 2**40), ("scales", list(range(1, 5001))), ("scales", [1, 10**9]), ("scales", []), ("scales", "1234"),
        ("scales", [1, 2.5]), ("scales", [1, None]), ("scales", {"1": 2}), ("scales", [[[]]]), ("codebook_size", 2**60),
        ("code_width", 2**31), ("text_width", 2**50), ("pooled_width", 2**50), ("rope_theta", 0), ("rope_size", -1),
        ("rope_theta", float("nan")), ("rope_theta", float("inf")), ("visibility", "all"), ("visibility", 3),
        ("ffn", "\x1b[31m"), ("norms", None), ("crop_base", 2**40), ("reso", [256]), ("reso", 10**40), ("use_ar", 1),
        ("head_precision", "float8"),
    ]},
    **{f"tokenizer {name}={value!r:.40}": changed(TOKENIZER, **{name: value}) for name, value in [
        ("residual_blocks", 10**7), ("residual_blocks", 3), ("multipliers", [1] * 10**6), ("multipliers", [2**40]),
        ("multipliers", []), ("multipliers", [0, 1]), ("channels", 2**41), ("channels", 64), ("codebook_size", 2**60),
        ("codebook_size", 1), ("code_width", 0), ("phi_count", 10**9), ("phi_ratio", 2), ("phi_ratio", "half"),
        ("commitment", None), ("scales", 7),
    ]},
    **{f"text {name}={value!r:.40}": changed(TEXT, **{name: value}) for name, value in [
        ("encoder", "../../x"), ("encoder", "evil/encoder"), ("encoder", "os.system"), ("encoder", ["minilm"]), ("encoder", None),
        ("width", 2**40), ("width", "384"), ("max_length", 10**9), ("max_length", 1), ("clip_l", "../../x"),
        ("clip_l", "/dev"), ("big_g", 3), ("trust_remote_code", True), ("\x1b[2J", 1),
    ] if (name, value) != ("clip_l", "/dev")},
    "text of a hub": changed(TEXT, encoder="clip_pair", width=2048, pooled_width=1280, clip_l="evil/clip"),
    "text of the known hub": changed(TEXT, encoder="clip_pair", width=2048, pooled_width=1280),
    "text of a folder": changed(TEXT, encoder="clip_pair", width=2048, pooled_width=1280, clip_l="/dev"),
    **{f"index {name}={value!r:.40}": changed(INDEX, **{name: value}) for name, value in [
        ("format", 2), ("format", "9" * 10**5), ("_class_name", "os.system"), ("sampling", []), ("sampling", None),
        ("sampling", {"guidance": "6"}), ("sampling", {"guidance": float("nan")}), ("sampling", {"top_k": 2**70}),
        ("sampling", {"top_k": -1}), ("sampling", {"\x1b": 1}), ("sampling", {"guidance_stop": 1.5}),
    ]},
    **{f"{file} is {content:.12}": written(file, content) for file in (GENERATOR, TOKENIZER, TEXT, INDEX) for content in (
        "[]", "3", "null", "{", "", '"text"', "[" * 100_000, '{"a":' * 1000 + "1" + "}" * 1000, " " * (2 << 20),
        '{"depth": ' + "9" * 5000 + "}", "\udcff",
    ) if content != "\udcff"},
    **{f"{file} is a {kind}": instead(file, make) for file in (GENERATOR, TOKENIZER, TEXT, INDEX, *WEIGHTS) for kind, make in (
        ("FIFO", os.mkfifo), ("device", lambda path: path.symlink_to("/dev/zero")), ("folder", Path.mkdir),
        ("link to itself", lambda path: path.symlink_to(path.name)),
    )},
    "many blocks": weights(G, many_blocks),
    "a block far away": weights(G, lambda s: s.update({"blocks.99999999999999999999.a": torch.ones(1)})),
    "a block without a number": weights(G, lambda s: s.update({"blocks.x.a": torch.ones(1)})),
    "a key with escapes": weights(G, lambda s: s.update({"\x1b[2J\n": torch.ones(1)})),
    "a wide empty matrix": weights(G, lambda s: s.update({"word_embed.weight": torch.ones(2**40, 0)})),
    "a vector for a matrix": weights(G, lambda s: s.update({"word_embed.weight": torch.ones(5)})),
    "a number for a matrix": weights(G, lambda s: s.update({"head.weight": torch.tensor(5.0)})),
    "whole numbers for weights": weights(G, lambda s: s.update({"head.weight": torch.ones_like(s["head.weight"], dtype=torch.int8)})),
    "levels without end": weights(G, lambda s: s.update({LEVELS: torch.tensor([[0, 1, 2**40]])})),
    "negative levels": weights(G, lambda s: s.update({LEVELS: torch.tensor([[-1]])})),
    "no levels": weights(G, lambda s: s.update({LEVELS: torch.ones(1, 0)})),
    "many residual blocks": weights(T, many_residual_blocks),
    "no channels": weights(T, lambda s: s.update({"encoder.conv_in.weight": torch.ones(0, 3, 3, 3)})),
    "a codebook without codes": weights(T, lambda s: s.update({"quantize.embedding.weight": torch.ones(0, 2**30)})),
    "a scalar kernel": weights(T, lambda s: s.update({"encoder.down.1.block.0.conv1.weight": torch.tensor(1.0)})),
    **{f"{file} is cut": (lambda folder, file=file: (folder / file).write_bytes((folder / file).read_bytes()[:-9]))  # type: ignore[misc]
       for file in WEIGHTS},
    **{f"{file} has a header of {size}": (lambda folder, file=file, size=size: (folder / file).write_bytes(  # type: ignore[misc]
        size.to_bytes(8, "little") + b"{}" * 100)) for file in WEIGHTS for size in (0, 2**62, 2**63, 10**8)},
}  # fmt: skip


def test_the_folder_can_be_read_before_it_is_spoilt(folder: Path, asked: list[str]) -> None:
    assert sample.main([str(folder), "a cat", "--out", str(folder / "a.png")]) == 0
    assert asked == []


@pytest.mark.parametrize("name", LIES)
def test_refused_at_once_and_without_network(name: str, folder: Path, asked: list[str]) -> None:
    LIES[name](folder)
    refused(lambda: SwittiPipeline.from_pretrained(folder))
    assert asked == []


def test_commands_say_the_same(folder: Path, asked: list[str]) -> None:
    changed(GENERATOR, depth=10**5)(folder)
    message = refused(lambda: sample.main([str(folder), "a cat", "--out", str(folder / "a.png")]))
    assert "model.depth=100000 must be at most 512" in message and GENERATOR.split("/")[1] in message
    assert message == refused(
        lambda: analyse.main(["guidance-off", str(folder), "a cat", "--out", str(folder / "out")])
    )
    assert not (folder / "out").exists() and not (folder / "a.png").exists()


def test_local_weights_ask_no_network_for_their_tokenizer(folder: Path, asked: list[str]) -> None:
    assert "hf download" in refused(lambda: read_parts(folder / "generator"))
    assert asked == []


def test_an_exported_folder_may_name_what_it_needs(folder: Path) -> None:
    """Text encoders by hub id, from what has been downloaded, or by the whole path of a folder."""
    changed(TEXT, encoder="clip_pair", width=2048, pooled_width=1280, clip_l=str(folder))(folder)
    assert read_parts(folder).text.clip_l == str(folder)
    assert read_parts(folder).text.big_g.startswith("laion/")


@pytest.mark.parametrize(
    "settings", [{}, {"rope": False}, {"ffn": "gelu"}, {"norms": "pre"}, {"crop_condition": False}]
)
@pytest.mark.parametrize("depth", [1, 3])
def test_expected_weights_are_those_of_the_model(settings: dict[str, Any], depth: int) -> None:
    config = GeneratorConfig(depth=depth, width=64, heads=2, scales=[1, 2, 3], **settings)
    with torch.device("meta"):
        model = ScaleTransformer(config)
    expected = expected_state(config)
    assert list(expected) == list(model.state_dict())
    assert all(expected[key].shape == value.shape for key, value in model.state_dict().items())
    assert count_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_the_largest_settings_are_counted_at_once() -> None:
    start = time.process_time()
    count_parameters(GeneratorConfig(depth=512, width=1 << 16, heads=1 << 10))
    with torch.device("meta"):
        RQVAE(RQVAEConfig(residual_blocks=8, multipliers=[64] * 8, channels=1 << 13))
    assert time.process_time() - start < 10


@pytest.mark.parametrize("load_weights", [load_generator, load_tokenizer])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_a_file_of_weights_is_a_regular_file(load_weights: Any, make: Any, tmp_path: Path) -> None:
    for suffix in (".safetensors", ".pth", ".ckpt", ".bin"):
        make(tmp_path / f"weights{suffix}")
        assert (
            "not a regular file" in refused(partial(load_weights, tmp_path / f"weights{suffix}"))
            or make is Path.mkdir
        )


# ---- networks in transformers format ----------------------------------------------------------------------------

CLIP = {"model_type": "clip_text_model", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
NETWORKS: dict[str, Callable[[Path], Any]] = {
    "many layers": lambda f: (f / "config.json").write_text(json.dumps(CLIP | {"num_hidden_layers": 10**7})),
    "a wide network": lambda f: (f / "config.json").write_text(json.dumps(CLIP | {"hidden_size": 2**40})),
    "a long vocabulary": lambda f: (f / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 2**33}})),
    "deep settings": lambda f: (f / "config.json").write_text('{"a":' * 1000 + "1" + "}" * 1000),
    "a list": lambda f: (f / "config.json").write_text("[]"),
    "own code": lambda f: (f / "config.json").write_text(json.dumps(CLIP | {"auto_map": {"AutoModel": "x.Model"}})),
    "a kernel of a hub": lambda f: (f / "config.json").write_text(json.dumps(CLIP | {"attn_implementation": "evil/kernel"})),
    "an adapter of a hub": lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/x"}'),
    "FIFO": lambda f: os.mkfifo(f / "model.safetensors"),
    "FIFO for settings": lambda f: os.mkfifo(f / "config.json"),
    "FIFO for words": lambda f: os.mkfifo(f / "vocab.json"),
    "device": lambda f: (f / "pytorch_model.bin").symlink_to("/dev/zero"),
    "raw pickle": lambda f: (f / "pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R."),
    "link to nothing": lambda f: (f / "model.safetensors").symlink_to("nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_looked_at_before_transformers_builds_them(
    name: str, tmp_path: Path, asked: list[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CLIP)) if name != "FIFO for settings" else None
    NETWORKS[name](tmp_path)
    for read in (
        partial(load_clip_text, str(tmp_path), "text.clip_l"),
        partial(load_pick_score, str(tmp_path)),
    ):
        refused(read)
    assert asked == []


# ---- folders that are written -----------------------------------------------------------------------------------


def test_of_several_writers_of_one_folder_one_wins(exported: Path, tmp_path: Path) -> None:
    parts = read_parts(exported)
    outcomes: list[str] = []

    def write() -> None:
        try:
            write_parts(tmp_path / "out", parts)
            outcomes.append("written")
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted("exists already" in outcome for outcome in outcomes) == [False, True, True, True]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_parts(tmp_path / "out").generator.config == parts.generator.config


@pytest.mark.parametrize(
    "kind", ["file", "FIFO", "device", "link to a folder", "link to nothing", "below a file"]
)
def test_odd_targets_are_refused(kind: str, exported: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    made = {
        "file": lambda: target.write_text("mine"),
        "FIFO": lambda: os.mkfifo(target),
        "device": lambda: target.symlink_to("/dev/null"),
        "link to a folder": lambda: ((tmp_path / "there").mkdir(), target.symlink_to("there")),
        "link to nothing": lambda: target.symlink_to("nowhere"),
        "below a file": lambda: target.write_text("mine"),
    }
    made[kind]()
    before = sorted(path.name for path in tmp_path.iterdir())
    refused(lambda: write_parts(target / "x" if kind == "below a file" else target, read_parts(exported)))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert kind not in ("file", "below a file") or target.read_text() == "mine"
