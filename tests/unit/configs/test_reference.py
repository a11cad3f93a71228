"""The reference of settings: every field is documented, and what commands print of it is right."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from configs.field_docs import field_docs, setting_docs
from configs.loading import CONFIGS, SETTINGS, load
from configs.reference import UNUSED, annotated_yaml, docs, explain, group_list
from experiments.tools.write_configuration_page import page
from sweeps.search_space import Axis, Search
from sweeps.study import Study
from switti.errors import UserError

CONFIG_NAMES = [
    str(path.relative_to(CONFIGS).with_suffix(""))
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.parent.name != "studies"
]


@dataclass
class Base:
    """A class that documents its fields."""

    first: int = 0
    """One
    two."""
    second: int = 0
    third: int = 0
    """Three."""


@dataclass
class Derived(Base):
    """Another default for a field of the base."""

    third: int = 4
    fourth: int = 0
    """Four."""


def test_docstrings_are_read_from_below_their_fields() -> None:
    assert field_docs(Derived) == {"first": "One two.", "second": "", "third": "Three.", "fourth": "Four."}
    assert next(iter(setting_docs(Derived, "x."))) == ("x.first", "One two.")


def test_every_setting_and_every_key_of_a_study_is_documented() -> None:
    assert set(SETTINGS) < set(docs())
    undocumented = [name for name, text in docs().items() if not text]
    for kind in (Study, Search, Axis):
        undocumented += [f"{kind.__name__}.{name}" for name, text in field_docs(kind).items() if not text]
    assert undocumented == []


def test_docstrings_are_sentences() -> None:
    assert [name for name, text in docs().items() if not text.endswith(".")] == []


def test_settings_that_docstrings_mention_exist() -> None:
    groups = {name.partition(".")[0] for name in SETTINGS if "." in name}
    mentioned = {name for text in docs().values() for name in re.findall(r"\b[a-z_]+\.[a-z_]+\b", text)}
    named = {name for name in mentioned if name.partition(".")[0] in groups} - {"metrics.csv"}
    assert len(named) > 10
    assert named <= set(SETTINGS)


@pytest.mark.parametrize("name", CONFIG_NAMES)
def test_shown_settings_load_again(name: str, tmp_path: Path) -> None:
    config = load(name)
    (tmp_path / "shown.yaml").write_text(annotated_yaml(config))
    assert load(tmp_path / "shown.yaml") == config


def test_shown_settings_of_awkward_text_load_again(tmp_path: Path) -> None:
    config = load(
        "generator/tiny",
        ["name=007", "data.train=[a b, 'pipe:curl # x']", "study=1e5", "text.clip_l=\"on\\nto # x\"",
         "callbacks.sample_prompts=[a, 'b: c', 'ä\\n']", "init_from=null", "tokenizer_weights=" + "long " * 40],
    )  # fmt: skip
    (tmp_path / "shown.yaml").write_text(annotated_yaml(config))
    assert load(tmp_path / "shown.yaml") == config


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("generator/demo", {"tokenizer_loss", "decoder"}),
        ("tokenizer/demo", {"model", "text", "loss", "decoder", "sampling", "metrics"}),
        ("tokenizer/decoder_demo", {"model", "text", "loss", "tokenizer_loss", "sampling", "metrics"}),
    ],
)
def test_groups_of_other_tasks_are_hidden(name: str, hidden: set[str]) -> None:
    shown = set(re.findall(r"^(\w+):$", annotated_yaml(load(name)), flags=re.MULTILINE))
    assert shown == {group.partition(".")[0] for group in SETTINGS if "." in group} - hidden


def test_every_task_says_which_settings_it_does_not_read() -> None:
    assert set(UNUSED) == set(SETTINGS["task"].choices)
    for unused in UNUSED.values():
        assert set(unused) <= {name.partition(".")[0] for name in SETTINGS}


def test_a_changed_setting_of_another_task_is_shown_as_not_read() -> None:
    text = annotated_yaml(load("generator/tiny", ["decoder.l1=0.5"]))
    assert "(Not read by a generator run.)\n  l1: 0.5  # default: 1.0\n" in text
    assert "lpips_net" not in text


def test_changed_values_are_marked_with_their_default() -> None:
    lines = annotated_yaml(load("generator/tiny", ["trainer.max_steps=9"])).splitlines()
    assert "  max_steps: 9  # default: 1000" in lines
    assert "  gradient_clip: 1.0" in lines
    # It follows tokenizer.scales, which was changed.
    assert lines.count("  scales: [1, 2]") == 1


def test_a_value_of_the_environment_is_shown_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITTI_TEST_TOKEN", "s3cr3t-t0ken")
    config = load("generator/tiny", ["data.train=pipe:curl ${oc.env:SWITTI_TEST_TOKEN}"])
    for text in (annotated_yaml(config), explain(config, "data.train")):
        assert "s3cr3t" not in text and "${oc.env:SWITTI_TEST_TOKEN}" in text


def test_a_setting_is_explained() -> None:
    config = load("generator/tiny", ["callbacks.keep_last=3"])
    assert explain(config, "callbacks.keep_last").splitlines() == [
        "callbacks.keep_last: an integer",
        f"  {docs()['callbacks.keep_last']}",
        "  default: 2",
        "  value:   3",
    ]
    assert explain(config, "model.scales").endswith(
        "default: ${tokenizer.scales}\n  value:   [1, 2] (the default)"
    )


def test_a_group_is_explained_setting_by_setting() -> None:
    text = explain(load("generator/tiny"), "sampling")
    assert text.startswith(docs()["sampling"])
    for name in SETTINGS:
        assert (f"\n{name}: " in text) == name.startswith("sampling.")


def test_an_unknown_setting_to_explain_is_refused_with_the_nearest_one() -> None:
    config = load("generator/tiny")
    with pytest.raises(UserError, match=r"did you mean 'callbacks\.best_metric'"):
        explain(config, "callbacks.best_metrc")
    with pytest.raises(UserError, match="the groups are tokenizer, model"):
        explain(config, "zzz")


def test_the_help_of_training_lists_every_group_in_a_line() -> None:
    lines = group_list().splitlines()
    assert all(len(line) <= 120 for line in lines)
    for group in {name.partition(".")[0] for name in SETTINGS if "." in name}:
        assert sum(line.startswith(f"  {group} ") for line in lines) == 1


def test_the_configuration_page_is_current(root: Path) -> None:
    """Written by `python -m experiments.tools.write_configuration_page > docs/configuration.md`."""
    assert (root / "docs" / "configuration.md").read_text() == page()


def test_explaining_imports_no_torch(root: Path) -> None:
    code = (
        "import sys\nfrom experiments.train import main\n"
        "main(['generator/demo', '--explain', 'trainer'])\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
