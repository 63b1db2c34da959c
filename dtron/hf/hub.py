"""Models by their names on the Hugging Face hub: ``org/name``, or ``org/name@revision``.

A name is looked up where a folder would be given, if there is no such folder. huggingface_hub
downloads the files into its own cache, once, and then finds them there without a network. Only
safetensors, JSON and the tokenizer's files are fetched: nothing that could be executed.

``HF_HUB_OFFLINE=1`` forbids the network. ``HF_TOKEN`` opens models that need a permission.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dtron.errors import UserError

FILES = ["*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_NAME = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)(?:@([\w./-]+))?")


def hub_folder(flag: str, name: str) -> str:
    """Return the folder of a model: ``name`` itself if it is a folder or no name of the hub, else
    the model's folder in the cache, after a download if it is not there. Raises UserError if it is
    neither there nor to be had.

    ``flag``: the flag with the name, for an error."""
    found = _NAME.fullmatch(name)
    if found is None or os.path.lexists(name) or Path(name.split("/")[0]).is_dir():
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, revision = found.groups()
    what = f"{flag} {name}: there is no such folder, and on the Hugging Face hub"
    try:
        return snapshot_download(repo, revision=revision, allow_patterns=FILES)
    except GatedRepoError as error:
        raise UserError(
            f"{what} the model needs a permission; ask for it there, and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{what} the model has no revision {revision}; give another") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{what} no such model is open to you; give a folder, or set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{what} nothing can be looked up from here, and the cache has no copy; download the "
            f"model where there is a network: hf download {repo}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{what} the download failed ({reason}); try again") from error


def with_folders(argv: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return the arguments with folders in the place of names of models on the hub. A run that is
    resumed may not need the model any more, so a name that cannot be looked up stays.

    ``flags``: the flags whose values may be such names."""
    found, resumes = [*argv], any(word.partition("=")[0] == "--resume" for word in argv)

    def folder(flag: str, name: str) -> str:
        try:
            return hub_folder(flag, name)
        except UserError:
            if resumes:
                return name
            raise

    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") not in flags:
            continue
        if equals:
            found[i] = f"{flag}={folder(flag, value)}"
        elif i + 1 < len(argv):
            found[i + 1] = folder(flag, argv[i + 1])
    return found
