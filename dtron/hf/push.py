"""Uploads the folder of a model to the Hugging Face hub.

huggingface_hub does the work: it hashes the files, uploads the large ones as LFS files (or through
Xet) and makes one commit. Only the files of a model are uploaded, and its model card. A folder may
have other files beside them.

A new repository is private. The visibility of one that exists is never changed: a push to a public
one must say ``public``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.hf.hub import FILES

CARD = ["README.md", "LICENSE*"]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def check_push(name: str) -> None:
    """Raise UserError, before any work is done, for a name that no repository can have, without a
    token, and if the network is forbidden."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        allowed = _NAME.fullmatch(name) is not None
    except HFValidationError:
        allowed = False
    if not allowed:
        raise UserError(
            f"{name!a}: is no name of the Hugging Face hub, which takes letters, digits, '-', '_' "
            "and '.', at most 96 of them; give ORG/NAME"
        )
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{name}: HF_HUB_OFFLINE forbids the network; unset it")
    if get_token() is None:
        raise UserError(f"{name}: there is no token; set HF_TOKEN, or run `hf auth login`")


def push(folder: Path, name: str, public: bool, message: str) -> str:
    """Upload a model, and return the URL of the commit. Raises UserError if the hub refuses it.

    ``name``: the repository, as ``org/name``. It is made if it is not there.
    ``public``: whether everyone may see it.
    ``message``: of the commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    check_push(name)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: has no safetensors; give a run, or a folder of `hf export`")
    # A lost connection is an error of the library for HTTP, of which HfHubHTTPError is one. A model
    # card that cannot be read is a ValueError.
    refusals: Any = (OSError, ValueError, *HfHubHTTPError.__bases__)
    api = HfApi()
    try:
        try:
            _check_visibility(name, bool(api.repo_info(name).private), public)
        except RepositoryNotFoundError:
            api.create_repo(name, private=not public)
        done = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message,
            allow_patterns=[*FILES, *CARD],
        )
    except refusals as error:
        raise UserError(f"{name}: {_why(error)}") from error
    return str(done.commit_url)


def _check_visibility(name: str, private: bool, public: bool) -> None:
    if private == public:
        now, remedy = ("private", "leave --public out") if private else ("public", "add --public")
        raise UserError(
            f"{name}: is {now} on the Hugging Face hub, and a push does not change it; {remedy}, "
            "or change it there"
        )


def _why(error: Any) -> str:
    """Say why the hub refused, with a remedy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = " ".join(str(getattr(error, "server_message", None) or error).split())[:120]
    if status == 401:
        return "the hub does not accept the token; make another, and set HF_TOKEN"
    if status == 403:
        return f"the token may not write there ({said}); take one that may, or another name"
    if status is None and not isinstance(error, ValueError):
        return f"the hub cannot be reached ({said or type(error).__name__}); check the network"
    return f"the upload failed ({said}); mend it, or try again"
