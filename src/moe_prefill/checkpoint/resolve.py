"""From what a user calls a model (a directory or a hub id) to a local directory, and to its raw config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download

from ..errors import ModelError, UsageError

# What loading, tokenizing and templating need; never pickles, original-format copies or images.
CONFIG_FILES = ("config.json",)
TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_directory(
    source: str | Path, *, revision: str | None = None, weights: bool = True, local_files_only: bool = False
) -> Path:
    """The local directory of a model, downloaded from the hub unless ``source`` is one already.

    A directory needs no network. ``revision`` is a branch, tag or commit of a hub model. ``weights=False`` leaves the
    tensors out. ModelError: the directory is missing or is a file, the hub does not know the id, asks for permission,
    or cannot be reached. UsageError: a directory with a revision.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise UsageError(
                f"--revision {revision}: {path} is a local directory, which has no revisions; leave it out, or give a "
                "hub id as the model"
            )
        return path
    if path.exists():
        raise ModelError(f"{path} is a file; give the directory that holds config.json and the safetensors files.")
    if not _looks_like_hub_id(str(source)):
        raise ModelError(f"there is no directory {path}; give a directory with config.json, or a hub id (owner/name).")
    return _download(str(source), revision, weights, local_files_only)


def pinned_revision(source: str | Path, revision: str | None) -> str | None:
    """The commit that a hub model's revision (default: its main branch) names now; None for a local directory.

    With the commit, everything that is loaded later is of the same state, whatever is published meanwhile. Raises as
    ``resolve_directory`` does.
    """
    directory = resolve_directory(source, revision=revision, weights=False)
    downloaded = not Path(source).expanduser().is_dir()
    return directory.name if downloaded and directory.parent.name == "snapshots" else revision


def read_config(directory: Path) -> dict[str, Any]:
    """The raw ``config.json`` of a model directory; ModelError where it is missing or not a JSON object."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{directory} has no config.json; give the directory of a Hugging Face checkpoint.") from None
    except (ValueError, OSError) as problem:
        raise ModelError(f"{path} cannot be read as JSON: {problem}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds {type(config).__name__}, not an object of fields.")
    return config


def _looks_like_hub_id(source: str) -> bool:
    return _HUB_ID.fullmatch(source) is not None and not source.startswith((".", "~", "/"))


def _download(name: str, revision: str | None, weights: bool, local_files_only: bool) -> Path:
    wanted = [*CONFIG_FILES, *TEXT_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=local_files_only)
        )
    except errors.GatedRepoError:
        raise ModelError(
            f"the hub asks for permission to download {name}; accept its terms on its page, then run `hf auth login`."
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"the hub's {name} has no revision {revision!r}.") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise ModelError(
            f"there is no directory {name} here and no public model {name} on the hub. Check the spelling, or run "
            "`hf auth login` if it is private."
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as problem:
        first = str(problem).strip().splitlines()[0][:200] if str(problem).strip() else type(problem).__name__
        raise ModelError(
            f"{name} is not a directory here, not in the hub's local cache, and the hub cannot be reached ({first}). "
            "Connect to the network, or give a local directory."
        ) from None
