"""Uploads to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from depthprune_runtime.checkpoint.assets import one_line
from depthprune_runtime.errors import InputError, printable

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def check_repository(repo: str) -> None:
    """Refuse early a name that is no repository of the hub."""
    if not _REPOSITORY.fullmatch(repo):
        raise InputError(f"push: expected OWNER/NAME, got {printable(repr(repo))}")


def push(path: Path, repo: str, private: bool = False, client: Any = None) -> str:
    """Upload a folder, or one file, to repository `repo`, which is made where it is not there.

    client: what talks to the hub, by default `huggingface_hub.HfApi()` with the login of this machine.

    Returns:
        The address of the repository.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if client is None:
        from huggingface_hub import HfApi

        client = HfApi()
    try:
        url = client.create_repo(repo, private=private, exist_ok=True)
        if path.is_dir():
            client.upload_folder(repo_id=repo, folder_path=path)
        else:
            client.upload_file(repo_id=repo, path_or_fileobj=path, path_in_repo=path.name)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise InputError(f"push to {repo}: {one_line(error)}; what was written is in {path}") from error
    return str(url)
