"""Suggestions for unknown names: typing errors, the names of other libraries, and silence about nonsense."""

import sys

import pytest

from configs.foreign_names import FOREIGN
from configs.loading import SETTINGS
from configs.settings import walk
from experiments import cli as command
from experiments import embed, train
from sweeps.search_space import FOREIGN as SEARCH
from sweeps.search_space import Search
from sweeps.study import _FOREIGN, KEYS
from switti.sampling.config import FOREIGN as SAMPLING
from switti.sampling.config import SamplingConfig
from switti.suggestions import did_you_mean, nearest, not_found, shortened


def hint(name: str) -> str:
    return did_you_mean(name, SETTINGS, FOREIGN)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        # Lightning
        ("max_epochs", "trainer.max_steps"),
        ("trainer.max_epochs", "trainer.max_steps"),
        ("accumulate_grad_batches", "'trainer.accumulate'"),
        ("gradient_clip_val", "'trainer.gradient_clip'"),
        ("val_check_interval", "'trainer.validate_every'"),
        ("log_every_n_steps", "'trainer.log_every'"),
        ("limit_val_batches", "'trainer.validate_batches'"),
        ("ckpt_path", "init_from=RUN"),
        ("logger", "'trainer.loggers'"),
        ("fast_dev_run", "'trainer.fast_dev_run'"),
        ("seed_everything", "'seed'"),
        ("default_root_dir", "'runs_dir'"),
        ("devices", "'trainer.devices'"),
        ("precision", "'trainer.precision'"),
        # diffusers, transformers
        ("guidance_scale", "'sampling.guidance'"),
        ("sampling.guidance_scale", "'sampling.guidance'"),
        ("num_inference_steps", "one step per scale"),
        ("output_dir", "'runs_dir'"),
        ("learning_rate", "'optimizer.learning_rate'"),
        ("lr", "'optimizer.learning_rate'"),
        ("optim.lr", "'optimizer.learning_rate'"),
        ("train_batch_size", "'data.batch_size'"),
        ("batch_size", "'data.batch_size'"),
        ("num_workers", "'data.workers'"),
        ("gradient_accumulation_steps", "'trainer.accumulate'"),
        ("lr_scheduler", "optimizer.schedule"),
        ("report_to", "'trainer.loggers'"),
        # Hydra, torchrun
        ("hydra.run.dir", "no Hydra"),
        ("hydra.job.name", "no Hydra"),
        ("nproc_per_node", "'trainer.devices'"),
        ("nnodes", "'trainer.num_nodes'"),
        # other ways to write a name
        ("maxSteps", "'trainer.max_steps'"),
        ("max-steps", "'trainer.max_steps'"),
        ("TRAINER.MAX_STEPS", "'trainer.max_steps'"),
        ("trainer_max_steps", "'trainer.max_steps'"),
        ("trainer/max_steps", "'trainer.max_steps'"),
        ("GuidanceScale", "'sampling.guidance'"),
        # slips of the finger
        ("sede", "'seed'"),
        ("modle.depth", "'model.depth'"),
        ("optimizer.lerning_rate", "'optimizer.learning_rate'"),
        ("trainer.max_step", "'trainer.max_steps'"),
        ("data.trian", "'data.train'"),
        ("callbacks.ema_decya", "'callbacks.ema_decay'"),
        ("model.scalse", "'model.scales'"),
    ],
)
def test_what_is_meant_is_named(typed: str, meant: str) -> None:
    assert meant in hint(typed)


@pytest.mark.parametrize(
    "typed",
    [
        "xyzzy", "banana", "foo", "a", "x", "", "model.foo", "turbo_mode", "flux_capacitor", "qqq.www", "step_size",
        "momentum", "nesterov", "kernel_size", "dropout_probability", "my_setting", "asdf", "12", "guidance_color",
        "steps_of_doom", "é", "rank_of_matrix",
    ],
)  # fmt: skip
def test_nonsense_gets_no_suggestion(typed: str) -> None:
    assert hint(typed) == ""


def test_equally_near_names_are_all_given() -> None:
    assert (
        hint("scales") == "; did you mean 'tokenizer.scales' or 'model.scales' or 'sampling.pruning.scales'?"
    )
    assert nearest("tokenizr.scales", SETTINGS) == ["tokenizer.scales"]
    assert nearest("a.same", [f"{group}.same" for group in "bcdefg"]) == []  # too many to be of any use


@pytest.mark.parametrize(
    ("table", "known"),
    [
        (FOREIGN, set(SETTINGS)),
        (SAMPLING, {setting.name for setting in walk(SamplingConfig)}),
        (SEARCH, set(Search.__dataclass_fields__)),
        (_FOREIGN, set(KEYS)),
    ],
)
def test_the_tables_name_settings_that_exist_and_hide_none(table: dict[str, str], known: set[str]) -> None:
    """A value is a name, or a sentence; a key is never the name of a setting, for which typing errors are meant."""
    assert all(meant in known for meant in table.values() if " " not in meant)
    assert not {name.rpartition(".")[2] for name in known} & set(table)


def test_sentences_name_settings_that_exist() -> None:
    groups = {name.partition(".")[0] for name in SETTINGS if "." in name}
    for sentence in (meant for meant in FOREIGN.values() if " " in meant):
        for word in sentence.replace(":", " ").replace(",", " ").replace(";", " ").split():
            name = word.partition("=")[0].removesuffix(".*")
            if name.partition(".")[0] in groups and "." in name and name != "metrics.csv":
                assert name in SETTINGS, sentence


def test_what_is_not_there_is_said_in_one_way() -> None:
    assert not_found("study", "smok", "below runs/", ["demo", "smoke"]) == (
        "no study 'smok', neither as a path nor below runs/; did you mean 'smoke'?"
    )
    assert not_found("study", "x", "below runs/", []).endswith("; there are: none")
    assert not_found("config", "x", "below configs/", map(str, range(30))).endswith("18, 19 and 10 more")
    assert len(not_found("study", "9" * 5000, "below runs/", [])) < 200


def test_long_values_are_shortened() -> None:
    assert shortened("short") == "short"
    assert shortened("9" * 5000) == "9" * 30 + "… (5000 characters)"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["generator/tiny", "--seed=1"], "settings are key=value without dashes: seed=1"),
        (["generator/tiny", "--trainer.max_steps", "4"], "without dashes: trainer.max_steps=…"),
        (["generator/tiny", "--max_epochs", "3"], "without dashes; runs are measured in optimizer steps"),
        (["generator/tiny", "--lr=3"], "without dashes; did you mean 'optimizer.learning_rate'?"),
        (["generator/tiny", "--bogus"], ""),
    ],
)
def test_a_setting_that_is_written_as_an_option_is_recognised(
    words: list[str], hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(SystemExit) as leaving:
        command.run(train.main)
    text = capsys.readouterr().err
    assert leaving.value.code == 2
    assert hint in text if hint else "without dashes" not in text


def test_an_option_with_a_wrong_value_is_not_taken_for_a_setting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["embed", "data", "--encoder=x"])
    with pytest.raises(SystemExit):
        command.run(embed.main)
    text = capsys.readouterr().err
    assert "invalid choice" in text and "without dashes" not in text
