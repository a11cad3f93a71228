"""What a sweep looks at before its first run: shards, embeddings, tokenizer and first weights, without torch."""

import io
import json
import re
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.loading import load, to_yaml
from experiments import sweep
from sweeps.preflight import check_files
from sweeps.study import load_study
from switti.errors import UserError
from switti.weights.tokenizer_file import SETTINGS_KEY, read_header, weights_path

PER_SHARD = 5
TRAIN, VALIDATION = 4, 1


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards with manifest and embeddings as the demo's config names them, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "emoji64"
    folder.mkdir(parents=True)
    names = [f"train-{i:06d}" for i in range(TRAIN)] + [f"validation-{i:06d}" for i in range(VALIDATION)]
    for name in names:
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            member = tarfile.TarInfo("a.txt")
            member.size = 5
            tar.addfile(member, io.BytesIO(b"hello"))
    rows = [
        {"name": f"{name}.tar", "samples": PER_SHARD, "bytes": (folder / f"{name}.tar").stat().st_size}
        for name in names
    ]
    write(folder / "manifest.json", {"shards": rows})
    store = folder / "embeddings" / "minilm-0123"
    store.mkdir(parents=True)
    for name in [*names, "null"]:
        save_file({"offsets": np.zeros(3, np.int64)}, store / f"{name}.safetensors")
    identity = {"name": "minilm", "width": 384, "pooled_width": 384, "max_length": 32}
    write(store / "manifest.json", identity | {"samples": dict.fromkeys(names, PER_SHARD)})
    return folder


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def edit(path: Path, **changes: object) -> None:
    write(path, json.loads(path.read_text()) | changes)


def problems(*overrides: str) -> str:
    """What the check of two runs says; "" if nothing is wrong."""
    study = load_study(None, ["base=generator/demo", "vary.seed=[0,1]", "study=s", *overrides])
    try:
        check_files(study.runs)
    except UserError as error:
        return str(error)
    return ""


def store_of(data: Path) -> Path:
    return data / "embeddings" / "minilm-0123"


def test_what_is_complete_passes(data: Path) -> None:
    assert problems() == ""
    assert problems("data.embeddings=data/emoji64/embeddings/minilm-0123") == ""
    (data / "manifest.json").unlink()  # shards from elsewhere have none
    assert problems() == ""
    assert problems("data.train=pipe:cat x.tar", "data.embeddings=null", "metrics.captions=validation") == ""


def test_code_that_cannot_be_imported_is_named(data: Path) -> None:
    said = problems("callbacks.extra=[nowhere_at_all:Name]")
    assert (
        "callbacks.extra=nowhere_at_all:Name: there is no module nowhere_at_all" in said
        and "all runs" in said
    )


def test_shards_that_are_not_there_are_named(data: Path) -> None:
    assert "data.train='nowhere/*.tar' matches no shard" in problems("data.train=nowhere/*.tar")
    assert problems("data.train=a.tar").startswith("data.train: no shard a.tar; make or fetch it again (all")
    wide = problems("data.train=data/emoji64/train-{000000..000009}.tar")
    assert "no shard data/emoji64/train-000004.tar" in wide
    assert "and 3 more (6 of 10 shards, more than data.max_bad_fraction=0.01)" in wide
    assert problems("data.train=data/emoji64/train-{000000..000004}.tar", "data.max_bad_fraction=0.2") == ""
    assert "is a folder" in problems("data.validation=data/emoji64")


def test_damage_counts_as_far_as_it_goes(data: Path) -> None:
    shard = data / "train-000001.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-512])
    assert f"train-000001.tar is cut off: {size - 512} of {size} bytes" in problems()
    assert problems("data.max_bad_fraction=0.1") == ""  # a twentieth of one shard of four
    shard.write_bytes(b"")
    assert "train-000001.tar is empty" in problems("data.max_bad_fraction=0.1")
    (data / "manifest.json").unlink()
    shard.write_bytes(b"\x1f\x8b" + b"no tar" * 1000)
    assert "train-000001.tar is not an uncompressed tar" in problems()


def test_embeddings_of_another_encoder_or_none_are_named(data: Path) -> None:
    assert "data.embeddings=none holds no finished embeddings" in problems("data.embeddings=none")
    other = problems("text.max_length=20")
    assert "minilm-0123 has max_length=32, the run text.max_length=20" in other
    edit(store_of(data) / "manifest.json", name="clip_pair", width=2048)
    assert "has encoder=clip_pair, the run text.encoder=minilm" in problems()
    (store_of(data) / "manifest.json").write_text("{")
    assert "manifest.json is not valid JSON" in problems()


def test_embeddings_that_are_not_complete_are_named(data: Path) -> None:
    store = store_of(data)
    samples = json.loads((store / "manifest.json").read_text())["samples"]
    edit(store / "manifest.json", samples=samples | {"train-000002": 3})
    assert "train-000002.tar has 5 samples, its embeddings were made from 3" in problems()
    assert problems("data.max_bad_fraction=0.1") == ""
    side = store / "train-000003.safetensors"
    side.write_bytes(side.read_bytes()[:-1])
    assert "train-000003.safetensors is not a readable safetensors file" in problems()
    side.unlink()
    assert "data.embeddings: 1 files are missing" in problems()
    (store / "null.safetensors").unlink()
    assert "data.embeddings: 2 files are missing" in problems()


def test_tokenizers_are_held_against_the_settings(data: Path, tmp_path: Path) -> None:
    assert "tokenizer_weights is not set" in problems("tokenizer_weights=null")
    assert "embedded:no is not shipped; the package has embedded:demo" in problems(
        "tokenizer_weights=embedded:no"
    )
    assert "weights/a.safetensors: no such file" in problems("tokenizer_weights=weights/a.safetensors")
    assert problems("tokenizer_weights=owner/name") == ""  # of a hub nobody knows before it is asked
    differing = problems("tokenizer.codebook_size=512")
    assert "was trained with other settings: tokenizer.codebook_size=512 (the weights: 1024)" in differing
    plain = tmp_path / "plain.safetensors"
    save_file({"quantize.embedding.weight": np.zeros((64, 16), np.float32)}, plain)
    assert "its codebook has 64 codes of 16 channels" in problems(f"tokenizer_weights={plain}")
    save_file({"x": np.zeros(1, np.float32)}, plain)
    assert "holds no tokenizer" in problems(f"tokenizer_weights={plain}")
    plain.write_bytes(b"no weights")
    assert "is not a readable safetensors file" in problems(f"tokenizer_weights={plain}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.safetensors").touch()
    assert f"give {tmp_path}/run/tokenizer.safetensors" in problems(f"tokenizer_weights={tmp_path}/run")
    assert problems("task=tokenizer", "tokenizer_weights=null") == ""


def test_decoder_tuning_may_use_another_pyramid(data: Path) -> None:
    scales = "tokenizer.scales=[1, 2, 3, 4]"
    assert "tokenizer.scales=[1, 2, 3, 4] (the weights:" in problems(scales)
    assert problems(scales, "task=decoder") == ""


def test_a_tokenizer_says_what_it_is_without_torch(tmp_path: Path) -> None:
    settings, shapes = read_header(weights_path("embedded:demo"))
    assert settings["codebook_size"] == 1024 and shapes["quantize.embedding.weight"] == (1024, 16)
    odd = tmp_path / "odd.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, odd, {SETTINGS_KEY: "[" * 5000})
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        read_header(odd)


def test_first_weights_must_fit(data: Path, tmp_path: Path) -> None:
    assert "init_from=no/run.ckpt: no such run" in problems("init_from=no/run.ckpt")
    run = tmp_path / "runs" / "single" / "before"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(load("generator/demo", ["name=before"])))
    assert "the run has no checkpoint yet" in problems(f"init_from={run}")
    (run / "checkpoints" / "last.ckpt").touch()
    assert problems(f"init_from={run}") == ""
    assert problems(f"init_from={run}/checkpoints/last.ckpt", "model.head_precision=bfloat16") == ""
    assert "model.visibility=causal (it has non_causal), model.depth=3 (it has 6)" in problems(
        f"init_from={run}", "model.visibility=causal", "model.depth=3"
    )
    assert "is for generators" in problems(f"init_from={run}", "task=tokenizer")
    resumed = tmp_path / "runs" / "s" / "seed=0" / "checkpoints"
    resumed.mkdir(parents=True)
    (resumed / "last.ckpt").touch()  # it has its weights
    assert problems("init_from=no/run.ckpt").endswith("(run seed=1)")


def test_each_problem_is_said_once_with_the_runs_that_have_it(data: Path) -> None:
    vary = "vary.tokenizer_weights=[embedded:demo,embedded:no,no.safetensors]"
    text = problems(vary, "data.train=nowhere/*.tar", "data.validation=none.tar")
    lines = text.splitlines()
    assert lines[0] == "4 things are missing or do not fit:"
    assert [line.rpartition(" (")[2] for line in lines[1:]] == [
        "all runs)",
        "all runs)",
        "runs seed=0,tokenizer_weights=embedded-no, seed=1,tokenizer_weights=embedded-no)",
        "runs seed=0,tokenizer_weights=no.safetensors, seed=1,tokenizer_weights=no.safetensors)",
    ]


def test_nothing_starts_while_something_is_missing(data: Path) -> None:
    words = ["base=generator/demo", "vary.seed=[0]", "study=s", "data.train=no.tar"]
    for more in ([], ["--dry-run"]):
        with pytest.raises(UserError, match=r"data\.train: no shard no\.tar.*run seed=0"):
            sweep.main([*words, *more])
    assert not Path("runs").exists()


def test_a_search_is_checked_at_the_ends_of_its_space(data: Path) -> None:
    space = "search.space={tokenizer_weights: [embedded:demo, no.safetensors], seed: {low: 0, high: 3}}"
    with pytest.raises(UserError, match=r"tokenizer_weights=no\.safetensors: no such file"):
        sweep.main(["base=generator/demo", "study=s", space, "--dry-run"])


def test_finished_runs_need_nothing_any_more(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["base=generator/demo", "vary.seed=[0]", "study=s", "--dry-run", "data.train=no.tar"]
    run = tmp_path / "runs" / "s" / "seed=0"
    run.mkdir(parents=True)
    write(run / "record.json", {"format": 1, "status": "finished", "step": 900})
    assert sweep.main(words) == 0
    assert re.search(r"seed=0 +finished +skip", capsys.readouterr().out)


@pytest.mark.parametrize(("words", "limit"), [(["smoke", "--dry-run"], 1.5), (["--help"], 1.0)])
def test_it_is_quick_and_needs_no_torch(data: Path, root: Path, words: list[str], limit: float) -> None:
    code = (
        "import sys; from experiments import sweep\n"
        f"try: sweep.main({words!r})\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=data.parents[1], env={"PYTHONPATH": str(root)},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "False"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < limit
