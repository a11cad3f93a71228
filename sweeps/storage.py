"""Storages of a search's trials: a journal in the study's folder, or a database."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from sweeps.search_space import Search
from sweeps.study import Study
from switti.errors import first_line

JOURNAL = "search.journal"
# Of a storage that has been opened.
StorageErrors = (StorageInternalError, SQLAlchemyError)
# Packages of database drivers that are not called as their module is.
_PACKAGES = {
    "psycopg2": "psycopg2-binary",
    "psycopg": "psycopg[binary]",
    "MySQLdb": "mysqlclient",
}


def storage_exists(study: Study) -> bool:
    """Whether there is anything to open; a database on a server has to be asked."""
    assert study.search is not None
    url = study.search.storage
    if url is None:
        return (study.folder / JOURNAL).is_file()
    return not url.startswith("sqlite:///") or Path(url.removeprefix("sqlite:///")).is_file()


def open_storage(study: Study) -> Any:
    """Optuna's storage, with its tables made if need be; raises whatever the database's driver raises."""
    assert study.search is not None
    url = study.search.storage
    if url is None:
        study.folder.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(study.folder / JOURNAL))
        return optuna.storages.JournalStorage(backend)
    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    # The ping notices that a server was restarted in between.
    return optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})


def reason(search: Search, error: Exception) -> str:
    """A storage's error in one line without a password."""
    if isinstance(error, ImportError) and isinstance(error.__cause__, ImportError):
        module = error.__cause__.name or "its driver"
        return f"{module} is missing: pip install '{_PACKAGES.get(module, module)}'"
    if isinstance(error, StorageInternalError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    words = first_line(error)
    with suppress(ArgumentError, ValueError):
        if search.storage is not None and (secret := make_url(search.storage).password):
            words = words.replace(str(secret), "…")
    return words
