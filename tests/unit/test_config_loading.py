"""Settings: what may be written, what comes out, and what is said when it is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.loading import SETTINGS, find, from_run, get, load, to_yaml
from configs.schema import RunConfig
from switti.errors import UserError

SMALL = """\
task: generator
tokenizer: {scales: [1, 2, 4], multipliers: [1, 2], codebook_size: 64, code_width: 8, channels: 32}
model: {depth: 2, width: 64, heads: 4}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def refusal(config: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(config, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_links_follow_the_tokenizer_and_the_text_encoder(small: Path) -> None:
    config = load(small)
    assert isinstance(config, RunConfig)
    assert config.model.scales == config.tokenizer.scales == [1, 2, 4]
    assert (config.model.codebook_size, config.model.code_width) == (64, 8)
    assert (config.model.text_width, config.model.pooled_width) == (
        config.text.width,
        config.text.pooled_width,
    )
    assert load(small, ["tokenizer.scales=[1,3]"]).model.scales == [1, 3]
    assert load(small, ["data.crop_base=100"]).model.crop_base == 100
    assert "model.crop_base=5 must equal data.crop_base=512" in refusal(small, "model.crop_base=5")


def test_later_sources_win_and_bases_are_relative(tmp_path: Path, small: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "long.yaml").write_text(
        "base: ../small.yaml\nseed: 1\ntrainer: {max_steps: 7, log_every: 3}\n"
    )
    (tmp_path / "parts" / "seeds.yaml").write_text("seed: 2\n")
    top = tmp_path / "top.yaml"
    top.write_text("base: [parts/long.yaml, parts/seeds.yaml]\ntrainer: {log_every: 4}\n")
    config = load(top, ["trainer.log_every=5"])
    assert (config.seed, config.trainer.max_steps, config.trainer.log_every) == (2, 7, 5)
    assert (load(top).trainer.log_every, config.model.depth, config.name) == (4, 2, "top")


def test_values_are_typed_and_text_stays_text(small: Path) -> None:
    config = load(
        small,
        ["name=007", "tokenizer_weights=a: b", "optimizer.learning_rate=2e-4", "trainer.deterministic=false",
         "callbacks.ema_decay=null", "data.train=[a.tar, b.tar]", "sampling.guidance_stop=2",
         "model.depth=${model.heads}", 'callbacks.sample_prompts=["a cat: red", dog]'],
    )  # fmt: skip
    assert (config.name, config.tokenizer_weights, config.optimizer.learning_rate) == ("007", "a: b", 2e-4)
    assert (config.trainer.deterministic, config.callbacks.ema_decay, config.model.depth) == (False, None, 4)
    assert config.data.train == ["a.tar", "b.tar"]
    assert config.callbacks.sample_prompts == ["a cat: red", "dog"]
    assert config.sampling.guidance_stop == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.visiblity=causal", "unknown setting 'model.visiblity'; did you mean 'model.visibility'?"),
        ("visibility=causal", "unknown setting 'visibility'; did you mean 'model.visibility'?"),
        ("training.max_step=3", "unknown setting 'training.max_step'; did you mean 'trainer.max_steps'?"),
        ("model.scales.0=3", "unknown setting 'model.scales.0'; model.scales is a list of integers, such as [1, 2]"),
        ("model.width=abc", "model.width=abc is not an integer, such as model.width=1920"),
        ("model.width=1.5", "model.width=1.5 is not an integer, such as model.width=1920"),
        ("model.width=", "model.width= has no value: model.width is an integer, such as model.width=1920"),
        ("seed=", "seed= has no value: seed is an integer, such as seed=0"),
        ("seed=[", "seed=[ is not an integer, such as seed=0"),
        ("seed=true", "seed=true is not an integer, such as seed=0"),
        ("trainer.max_steps=1e5", "trainer.max_steps=100000.0 is not an integer; write 100000"),
        ("seed=0,1", "seed=0,1 is not an integer; for a run of each: experiments.sweep base=… vary.seed=[0, 1]"),
        ("model.scales=[1, x]", "model.scales=[1, 'x'] is not a list of integers, such as [1, 2]"),
        ("model.visibility=casual", "model.visibility=casual is not one of causal, non_causal; did you mean 'causal'?"),
        ("trainer.deterministic=maybe", "trainer.deterministic=maybe is not true or false"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate=nan is not a finite number"),
        ("sampling.guidance_stop=x", "sampling.guidance_stop=x is not an integer (or null)"),
        ("model.width=62", "model.width=62 must be a multiple of model.heads=4"),
        ("model.scales=[1,2]", "model.scales=[1, 2] must equal tokenizer.scales=[1, 2, 4]"),
        ("name=../x", "name='../x' must be usable as a folder name"),
        ("study=..", "study='..' must be usable as a folder name"),
        ("seed=-1", "seed=-1 must lie in [0, 4294967296)"),
        ("seed=4294967296", "seed=4294967296 must lie in [0, 4294967296)"),
        ("seed=18446744073709551616", "seed=18446744073709551616 is not an integer of 64 bits"),
        ("callbacks.ema_decay=1", "callbacks.ema_decay=1.0 must lie in (0, 1), or be null for no average"),
        ("callbacks.keep_last=0", "callbacks.keep_last=0 must be at least 1"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named_in_one_line(small: Path, override: str, message: str) -> None:
    assert refusal(small, override) == message


@pytest.mark.parametrize(
    "value", ["9" * 5000, "0x" + "f" * 5000, "[" * 50_000, "[" + "9" * 5000 + "]", "{a: " + "9" * 5000 + "}"]
)
def test_a_value_without_end_is_refused_in_a_short_line(small: Path, tmp_path: Path, value: str) -> None:
    """Python prints no integer of more than 4300 digits, and reads none."""
    assert len(refusal(small, f"seed={value}")) < 200
    assert len(refusal(small, f"model.scales={value}")) < 200
    endless = tmp_path / "endless.yaml"
    endless.write_text(f"base: {small.name}\nseed: {value}\n")
    with pytest.raises(UserError) as caught:
        load(endless)
    assert len(str(caught.value)) < 400 + len(str(endless))


@pytest.mark.parametrize("override", ["model.width", "--model.width=3", "=3", "model.width =3", ""])
def test_other_forms_of_settings_are_refused(small: Path, override: str) -> None:
    assert "settings are key=value" in refusal(small, override)


def test_a_group_is_not_a_setting(small: Path, tmp_path: Path) -> None:
    assert "model is a group of settings" in refusal(small, "model=3")
    (tmp_path / "bad.yaml").write_text("model: 3\n")
    assert "model is a group of settings" in refusal(tmp_path / "bad.yaml")


def test_an_interpolation_that_leads_nowhere_names_its_setting(small: Path) -> None:
    assert refusal(small, "model.width=${nope}").startswith("model.width cannot be worked out")
    assert refusal(small, "model.scales=['${nope}']").startswith("model.scales cannot be worked out")
    assert refusal(small, "model.depth=${model.depth}").startswith("model.depth cannot be worked out")
    assert refusal(small, "model.width=${name}").startswith("model.width cannot be worked out")


def test_batch_and_resolution_must_fit(small: Path) -> None:
    assert "data.batch_size=64 must be a multiple" in refusal(small, "trainer.devices=3")
    assert "data.resolution=16 must be null or 8 px" in refusal(small, "data.resolution=16")
    assert load(small, ["data.resolution=8"]).data.resolution == 8


def test_mistakes_in_files_name_the_file(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    for content, message in [
        ("model: {visiblity: causal}", "unknown setting 'model.visiblity'; did you mean 'model.visibility'?"),
        ("model: {width: wide}", "model.width=wide is not an integer"),
        ("seed: 1\nseed: 2", "is not valid YAML"),
        ("seed: [1", "is not valid YAML"),
        ("- 1", "must hold `key: value` settings"),
        ("base: nowhere.yaml", "no base file"),
    ]:
        bad.write_text(content + "\n")
        text = refusal(bad)
        assert text.startswith(str(bad))
        assert message in text


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "a.yaml → b.yaml → a.yaml" in refusal(tmp_path / "a.yaml")


def test_a_missing_config_gives_near_names(tmp_path: Path) -> None:
    (tmp_path / "generator").mkdir()
    (tmp_path / "generator" / "demo.yaml").write_text("seed: 0\n")
    assert find("generator/demo", tmp_path) == tmp_path / "generator" / "demo.yaml"
    with pytest.raises(UserError, match=re.escape("did you mean 'generator/demo'?")):
        find("generator/dmo", tmp_path)
    with pytest.raises(UserError, match="there are: generator/demo"):
        find("zzz", tmp_path)


def test_a_saved_config_rebuilds_the_run(small: Path, tmp_path: Path) -> None:
    config = load(small, ["seed=3", "study=s"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert from_run(tmp_path) == config
    assert from_run(tmp_path, ["seed=4"]).seed == 4
    assert "${" not in to_yaml(config)
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        from_run(tmp_path / "elsewhere")


def test_run_dir(small: Path) -> None:
    assert load(small).run_dir == Path("runs/single/small")
    assert load(small, ["study=s", "name=n", "runs_dir=/r"]).run_dir == Path("/r/s/n")


def test_every_setting_can_be_read_by_its_name(small: Path) -> None:
    config = load(small)
    values = {name: get(config, name) for name in SETTINGS}
    assert len(values) > 60
    assert values["model.width"] == 64


def test_loading_imports_no_torch_and_is_quick(small: Path, root: Path) -> None:
    code = (
        "import sys, time\n"
        "from configs.loading import load, to_yaml\n"
        f"to_yaml(load({str(small)!r}, ['seed=1']))\n"
        "print('torch' in sys.modules, time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    torch_loaded, seconds = done.stdout.split()
    assert torch_loaded == "False"
    assert float(seconds) < 0.6  # of this process's own time: a busy machine does not count
