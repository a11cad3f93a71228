"""Import paths in settings: what is found, and the one line for what is not."""

import sys
from pathlib import Path

import pytest

from switti.errors import UserError
from switti.import_path import (
    build_object,
    check_choice,
    check_paths,
    is_import_path,
    load_factory,
    load_object,
)

CODE = """
class Thing(dict): pass
class Needs(dict):
    def __init__(self, size): pass
class Fails(dict):
    def __init__(self): len(3)
def make(config): return Thing(config=config)
def other(config): return 3
NUMBER = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of its own name, importable as long as the test lasts."""
    name = f"module_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize("text", ["a:B", "a.b_c:D2", "_a:b"])
def test_the_form_of_an_import_path(text: str) -> None:
    assert is_import_path(text)


@pytest.mark.parametrize(
    "text", ["", "a", "a.b", "a:", ":B", "a:B.C", "a:B:C", "a/b:C", "1a:B", "a.:B", "a:B\n", "a..b:C"]
)
def test_what_is_not_an_import_path(text: str) -> None:
    assert not is_import_path(text)


def test_a_choice_is_a_built_in_name_or_an_import_path() -> None:
    check_choice("text.encoder", "minilm", ["minilm", "clip_pair"])
    check_choice("text.encoder", "nowhere.at.all:Name", ["minilm", "clip_pair"])
    with pytest.raises(
        UserError, match=r"text.encoder=minlm is not one of minilm, clip_pair, package.module:Name; did you"
    ):
        check_choice("text.encoder", "minlm", ["minilm", "clip_pair"])


def test_a_class_is_built_and_a_function_called(module: str) -> None:
    assert build_object("x", f"{module}:Thing", dict, None) == {}
    assert build_object("x", f"{module}:make", dict, 5) == {"config": 5}
    assert load_object("x", f"{module}:NUMBER") == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Needs", "cannot be built without arguments"),
        ("other", "returned int, not builtins's dict"),
        ("NUMBER", "is int, not a class or a function"),
        ("Thingy", "has no Thingy; did you mean 'Thing'?"),
    ],
)
def test_what_cannot_be_built_is_one_line(module: str, name: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        build_object("callbacks.extra", f"{module}:{name}", dict, None)
    assert str(caught.value).startswith(f"callbacks.extra={module}:{name}") and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_of_another_kind_is_refused(module: str) -> None:
    with pytest.raises(UserError, match="is not a subclass of builtins's str"):
        load_factory("x", f"{module}:Thing", str)


def test_an_error_inside_of_a_class_stays_what_it_is(module: str) -> None:
    with pytest.raises(TypeError, match="has no len"):
        build_object("x", f"{module}:Fails", dict, None)


def test_a_module_that_is_not_there_or_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "breaks_on_import.py").write_text("import no_such_module_at_all")
    with pytest.raises(UserError, match="there is no module not_here_at_all"):
        load_object("x", "not_here_at_all.inside:Name")
    with pytest.raises(
        UserError, match=r"importing breaks_on_import failed \(ModuleNotFoundError: No module named"
    ):
        load_object("x", "breaks_on_import:Name")


@pytest.mark.parametrize("mark", ["config.yaml", "record.json"])
def test_no_code_is_imported_from_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    run = tmp_path / "some_runs" / "study" / "run"
    (run / "inner").mkdir(parents=True)
    (run / mark).write_text("{}")
    (run / "payload.py").write_text("class Name: pass")
    (run / "inner" / "__init__.py").write_text("raise SystemError('ran')")
    (run / "inner" / "payload.py").write_text("class Name: pass")
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("some_runs.study.run.payload:Name", "some_runs.study.run.inner.payload:Name"):
        with pytest.raises(UserError, match="lies in a run folder"):
            load_object("text.encoder", path)
    assert not [name for name in sys.modules if name.startswith("some_runs.study.run.")]


@pytest.mark.parametrize("value", ["\nNone", "a\x1b[31mb", "x\r"])
def test_a_value_of_several_lines_is_named_in_one(value: str) -> None:
    for check in (lambda: check_choice("text.encoder", value, ["minilm"]), lambda: check_paths("a", [value])):
        with pytest.raises(UserError) as caught:
            check()
        assert str(caught.value).isprintable()
