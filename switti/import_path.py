"""Import paths in settings: `package.module:Name` names a class or function of the user's own code.

Reading settings checks the form alone; nothing is imported before a run that uses the name is started. A module that
lies in a run folder is refused: run folders are passed around, and their files are data.
"""

import importlib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from switti.environment import masked
from switti.errors import UserError
from switti.run_folder import CONFIG, RECORD
from switti.suggestions import did_you_mean, printable

FORM = "package.module:Name"
_IMPORT_PATH = re.compile(r"(?:[^\W\d]\w*\.)*[^\W\d]\w*:[^\W\d]\w*")


def is_import_path(value: str) -> bool:
    """Whether `value` has the form `package.module:Name`."""
    return bool(_IMPORT_PATH.fullmatch(value))


def check_choice(setting: str, value: str, known: Iterable[str]) -> None:
    """UserError unless `value` is one of the built-in names or has the form of an import path."""
    names = list(known)
    if value in names or is_import_path(value):
        return
    choices = ", ".join([*names, FORM])
    raise UserError(f"{setting}={printable(value)} is not one of {choices}{did_you_mean(value, names)}")


def check_paths(setting: str, values: list[str], remedy: str = "") -> None:
    """UserError unless all are import paths, each named once. remedy: the end of the message about another value."""
    for value in values:
        if not is_import_path(value):
            raise UserError(f"{setting}={printable(value)} is not {FORM}{remedy}")
    if len(set(values)) != len(values):
        raise UserError(f"{setting}={values} names one twice")


def load_object(setting: str, path: str) -> Any:
    """The class or function behind an import path. Its module, found as Python finds any, is imported by this.

    Raises:
        UserError: the module cannot be imported, lies in a run folder, or has no such name.
    """
    module_name, _, name = path.partition(":")
    _check_origin(setting, path, module_name)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise _import_failed(setting, path, module_name, error) from error
    if not hasattr(module, name):
        public = [other for other in vars(module) if not other.startswith("_")]
        raise UserError(f"{setting}={path}: {module_name} has no {name}{did_you_mean(name, public)}")
    return getattr(module, name)


def load_factory(setting: str, path: str, kind: type) -> Any:
    """What an import path names, if it can give an object of `kind`: a subclass of it, or a function.

    Raises:
        UserError: as `load_object`, or it is neither.
    """
    named = load_object(setting, path)
    if isinstance(named, type) and not issubclass(named, kind):
        raise UserError(f"{setting}={path} is not a subclass of {_words(kind)}")
    if not callable(named):
        raise UserError(f"{setting}={path} is {type(named).__name__}, not a class or a function")
    return named


def build_object(setting: str, path: str, kind: type, config: Any) -> Any:
    """An object of `kind`: a class is built without arguments, a function is called with the settings `config`.

    Raises:
        UserError: as `load_factory`; the class needs arguments; or the function returns something else.
    """
    named = load_factory(setting, path, kind)
    if not isinstance(named, type):
        built = named(config)
        if not isinstance(built, kind):
            raise UserError(f"{setting}={path} returned {type(built).__name__}, not {_words(kind)}")
        return built
    try:
        return named()
    except TypeError as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # from inside its own code
        raise UserError(
            f"{setting}={path} cannot be built without arguments ({error}); name a function of the run's settings "
            "that returns one"
        ) from error


def _import_failed(setting: str, path: str, module_name: str, error: Exception) -> UserError:
    reason = " ".join(masked(f"{type(error).__name__}: {error}").split())
    return UserError(f"{setting}={path}: importing {module_name} failed ({reason[:300]})")


def _words(kind: type) -> str:
    return f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"


def _check_origin(setting: str, path: str, module_name: str) -> None:
    """UserError if the module, or a package that holds it, is not there or lies in a run folder."""
    parts = module_name.split(".")
    for count in range(1, len(parts) + 1):
        package = ".".join(parts[:count])
        try:
            # Imports the packages above it, which have been checked.
            found = importlib.util.find_spec(package)
        except Exception as error:
            raise _import_failed(setting, path, module_name, error) from error
        if found is None:
            raise UserError(
                f"{setting}={path}: there is no module {package}; install it, or start the command in its folder"
            )
        if found.origin and any(
            (folder / CONFIG).is_file() or (folder / RECORD).is_file()
            for folder in Path(found.origin).absolute().parents
        ):
            raise UserError(
                f"{setting}={path}: {found.origin} lies in a run folder, from which no code is imported; move it"
            )
