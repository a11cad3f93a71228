"""Composition of settings: sources and their order, types, interpolation, and the messages about mistakes."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from configs.loading import SETTINGS, find, from_run, load, shown, to_dict, to_yaml
from configs.resume_rules import check_resumable
from configs.schema import RunConfig, get
from switti.environment import masked
from switti.errors import UserError

NO_FOLDER = "is not a usable folder name: give letters, digits and . _ - , = + @, beginning with a letter, a digit or _"

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
        ("name=../x", f"name='../x' {NO_FOLDER}"),
        ("study=..", f"study='..' {NO_FOLDER}"),
        ("seed=-1", "seed=-1 must lie in [0, 4294967296)"),
        ("seed=4294967296", "seed=4294967296 must lie in [0, 4294967296)"),
        ("seed=18446744073709551616", "seed=18446744073709551616 is not an integer of 64 bits"),
        ("seed=010", "seed=010 would be 8: write a decimal number without leading zeros"),
        ("sampling.top_k=1:30", "sampling.top_k=1:30 would be 90: write a decimal number without leading zeros"),
        ("name=caf\udce9", r"'name=caf\udce9' is not text in UTF-8"),
        ("callbacks.ema_decay=1", "callbacks.ema_decay=1.0 must lie in (0, 1), or be null for no EMA"),
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
    assert refusal(small, "model.width=${nope}").startswith("model.width cannot be resolved")
    assert refusal(small, "model.scales=['${nope}']").startswith("model.scales cannot be resolved")
    assert refusal(small, "model.depth=${model.depth}").startswith("model.depth cannot be resolved")
    assert refusal(small, "model.width=${name}").startswith("model.width cannot be resolved")


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


def saved(config: RunConfig) -> Path:
    """The run folder with its config and a record."""
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    (config.run_dir / "record.json").write_text('{"format": 1, "status": "finished"}')
    return config.run_dir


def test_a_saved_config_rebuilds_the_run(small: Path, tmp_path: Path) -> None:
    config = load(small, ["seed=3", "study=s", f"runs_dir={tmp_path}"])
    folder = saved(config)
    assert from_run(folder) == config == load(folder) == load(folder / "config.yaml")
    assert from_run(folder, ["seed=4"]).seed == 4
    assert "${" not in to_yaml(config)
    with pytest.raises(UserError, match=r"has no config\.yaml"):
        from_run(tmp_path / "elsewhere")


@pytest.mark.parametrize("place", ["r/s/new", "elsewhere/s/small", "r/single/small", "r/other/small"])
def test_a_run_folder_is_where_it_lies(small: Path, tmp_path: Path, place: str) -> None:
    config = load(small, ["seed=3", "study=s", f"runs_dir={tmp_path}/r"])
    moved = tmp_path / place
    moved.parent.mkdir(parents=True, exist_ok=True)
    saved(config).rename(moved)
    for found in (from_run(moved), load(moved), load(moved / "config.yaml")):
        assert found.run_dir == moved
        assert replace(found, name="small", study="s", runs_dir=config.runs_dir) == config
    assert load(moved, ["name=copy"]).run_dir == moved.with_name("copy")


def test_a_run_folder_named_by_a_relative_path(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved(load(small, []))
    assert from_run(folder).runs_dir == "runs" and from_run(folder).study is None
    monkeypatch.chdir(folder)
    assert from_run(".").run_dir == tmp_path / folder


@pytest.mark.parametrize("what", ["name", "study"])
@pytest.mark.parametrize(
    "name",
    [
        "<b>x</b>", "a b", "-x", "--out", ".locks", ".", "x\ny", "x\x1b[31m", "x\u202ey", "x\u200b", "=cmd()|x",
        "$HOME", "~", "x/y", "x\\y", "a\0b", "x:y", "'x'", '"x"', "`x`", "x;y", "x&y", "x|y", "x*", "[x]", "{x}", "%x",
        "#x", "!x", "x" * 201, "ä" * 101, "\u2028", "",
    ],
)  # fmt: skip
def test_names_that_are_not_plain_folder_names_are_refused(small: Path, what: str, name: str) -> None:
    override = f"{what}={json.dumps(name, ensure_ascii=False)}"
    if name == "" and what == "name":
        return  # the file's own name
    with pytest.raises(UserError, match=what) as caught:
        load(small, [override])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "a", "7", "_x", "visibility=causal,seed=0", "trial_0007,lr=1e-05", "model.depth=4,x=0.5+1", "größe",
        "a-b_c.d@e", "x" * 200, "ä" * 100,
    ],
)  # fmt: skip
def test_plain_names_are_taken(small: Path, name: str) -> None:
    assert load(small, [f"name={name}", f"study={name}"]).run_dir == Path("runs") / name / name


SECRET = "s3cr3t-t0ken"
FROM_ENVIRONMENT = [
    "data.train=pipe:curl -H ${oc.env:SWITTI_TEST_TOKEN} http://localhost/x.tar",
    "data.validation=[a.tar, '${oc.env:SWITTI_TEST_TOKEN}']",
    "trainer.max_steps=${oc.env:SWITTI_TEST_STEPS}",
    "init_from=${data.train}",
    "tokenizer_weights=${oc.env:SWITTI_TEST_UNSET,embedded:demo}",
]


def test_values_of_the_environment_are_used_and_not_saved(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWITTI_TEST_TOKEN", SECRET)
    monkeypatch.setenv("SWITTI_TEST_STEPS", "17")
    config = load(small, [*FROM_ENVIRONMENT, f"runs_dir={tmp_path}"])
    assert config.data.train == f"pipe:curl -H {SECRET} http://localhost/x.tar" == config.init_from
    assert config.data.validation == ["a.tar", SECRET]
    assert (config.trainer.max_steps, config.tokenizer_weights) == (17, "embedded:demo")
    for text in (to_yaml(config), str(to_dict(config)), str([shown(config, name) for name in SETTINGS])):
        assert SECRET not in text and "${oc.env:SWITTI_TEST_TOKEN}" in text
    assert masked(f"no {SECRET}/b.tar") == "no ${oc.env:SWITTI_TEST_TOKEN}/b.tar"
    folder = saved(config)
    assert from_run(folder) == config and to_yaml(from_run(folder)) == to_yaml(config)

    monkeypatch.setenv("SWITTI_TEST_TOKEN", "another-t0ken")  # a token is renewed: the same run
    assert from_run(folder).data.train == "pipe:curl -H another-t0ken http://localhost/x.tar"
    check_resumable(load(small, [*FROM_ENVIRONMENT, f"runs_dir={tmp_path}"]), folder)

    monkeypatch.delenv("SWITTI_TEST_TOKEN")  # nor does who looks at the run need it
    assert from_run(folder).data.train == "pipe:curl -H $SWITTI_TEST_TOKEN http://localhost/x.tar"
    with pytest.raises(UserError, match="environment variable SWITTI_TEST_TOKEN is not set"):
        load(small, FROM_ENVIRONMENT)
    monkeypatch.delenv("SWITTI_TEST_STEPS")
    with pytest.raises(
        UserError, match=r"trainer\.max_steps=.*environment variable SWITTI_TEST_STEPS is not set"
    ):
        from_run(folder)


def test_a_secret_of_the_wrong_type_is_not_shown(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITTI_TEST_TOKEN", SECRET)
    for name in ("trainer.max_steps", "optimizer.learning_rate", "data.crop", "model.scales"):
        with pytest.raises(UserError, match=re.escape(name)) as caught:
            load(small, [f"{name}=${{oc.env:SWITTI_TEST_TOKEN}}"])
        assert SECRET not in masked(str(caught.value))


def test_settings_of_observation_may_change_when_a_run_is_resumed(small: Path, tmp_path: Path) -> None:
    folder = saved(load(small, [f"runs_dir={tmp_path}"]))
    for item in (
        "trainer.validate_every=3", "trainer.validate_batches=1", "trainer.log_every=7", "trainer.max_steps=9000",
        "callbacks.samples_every=3", "callbacks.sample_prompts=[a]", "callbacks.metrics_every=9", "metrics.prompts=6",
        "callbacks.activation_norms_every=4", "callbacks.checkpoint_every=11", "sampling.guidance=2", "data.workers=1",
    ):  # fmt: skip
        check_resumable(load(small, [item, f"runs_dir={tmp_path}"]), folder)
    for item in (
        "seed=9",
        "optimizer.learning_rate=0.5",
        "callbacks.ema_decay=0.5",
        "trainer.precision=32-true",
    ):
        with pytest.raises(UserError, match=f"started with other settings: {re.escape(item)}"):
            check_resumable(load(small, [item, f"runs_dir={tmp_path}"]), folder)


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
