"""Model hubs: download of the files that are needed, upload of exported folders; local paths stay local."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switti.errors import UserError, first_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_REMEDY = "give a local path, or download it on a machine with network: hf download"


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` has the form owner/name and is not an existing path."""
    return HUB_ID.fullmatch(str(source)) is not None and not os.path.exists(Path(source).expanduser())


def fetch(
    source: str | Path, patterns: Sequence[str], revision: str | None = None, cached: bool = False
) -> Path:
    """A local path for `source`: itself, or the cached folder with those files of a hub repository.

    patterns: which files of the repository are wanted, such as "*.safetensors". cached: what has been downloaded must
    do. Raises UserError that names the source and the remedy if there is no such path, no such repository or no
    network.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not is_hub_id(source):
        raise UserError(f"no such file or folder: {source}; give a path, or a hub id owner/name")
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, EntryNotFoundError, HTTPError

    options: dict[str, Any] = {"local_files_only": True} if cached else {}
    try:
        folder = huggingface_hub.snapshot_download(
            str(source), allow_patterns=list(patterns), revision=revision, **options
        )
    except (OSError, ValueError, HTTPError, EntryNotFoundError, CachedRepoTreeNotFoundError) as error:
        reason = first_line(error)
        raise UserError(f"{source} cannot be downloaded ({reason}); {_REMEDY} {source}") from error
    return Path(folder)


def upload(folder: Path, repo_id: str, *, private: bool, message: str) -> str:
    """All files of `folder` as one commit to a hub repository, which is made if need be. Returns the commit's address.

    Raises UserError naming the repository without network, permission or a valid name.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    try:
        huggingface_hub.create_repo(repo_id, private=private, exist_ok=True)
        commit = huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except (OSError, ValueError, HTTPError) as error:
        reason = first_line(error)
        remedy = "check the network and log in with: hf auth login"
        raise UserError(f"cannot upload to {repo_id} ({reason}); {remedy}") from error
    return str(commit.commit_url)
