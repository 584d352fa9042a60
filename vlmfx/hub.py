"""A local model folder from a path, a hub id or "scenes"; what is downloaded is data, never a program or a pickle."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vlmfx.errors import CheckpointError
from vlmfx.folder import MANIFEST, is_bundle

SCENES = Path(__file__).parent / "assets" / "scenes"  # the model that ships with the package

# Patterns go to huggingface_hub, whose "*" crosses "/"; the second list takes back what that lets in from sub folders.
# Of those only small JSON files one level down are kept (1_Pooling/config.json), not the copies of the weights that
# some repositories hold beside the Hugging Face ones (original/, onnx/, consolidated.safetensors).
ALLOW = ("*.json", "*.txt", "*.jinja", "*.model", "*.safetensors")
IGNORE = ("*/*.txt", "*/*.jinja", "*/*.model", "*/*.safetensors", "*/*/*", "onnx/*", "original/*", "consolidated*")

_HUB_CACHE = re.compile(r"/(models|datasets|spaces)--[^/]+/snapshots/")

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?", re.ASCII)


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
) -> Path:
    """The folder that holds the model; a hub id is downloaded, or found in huggingface_hub's cache.

    model: "scenes" (the shipped model; write "./scenes" for a folder), an existing folder or a hub id. Endpoint, token, cache
    and offline mode are huggingface_hub's own (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE). Only ALLOW less
    IGNORE is downloaded. Raises CheckpointError.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise CheckpointError(f"the model is a {type(model).__name__}; give a folder, a hub id or 'scenes'.")
    if model == "scenes":  # before any folder of that name where the program happens to run
        if not SCENES.is_dir():
            raise CheckpointError(
                f"{SCENES} is missing: this installation lacks the shipped model; install vlmfx again."
            )
        return SCENES
    if os.path.isdir(model):  # not Path.is_dir: it raises for names that are too long, and takes "" for "."
        if is_bundle(Path(model)) and _HUB_CACHE.search(os.path.realpath(model)):
            raise CheckpointError(_refused_bundle(str(model)))
        return Path(model)
    if os.path.exists(model):
        raise CheckpointError(f"{model} is a file, expected a model folder; give the folder that holds it.")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"there is no folder {str(model)[:200]!r}; give an existing one, a hub id or 'scenes'.")
    return _download(model, revision, token, cache_dir, bool(local_files_only))


def _download(
    repo: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None, local_files_only: bool
) -> Path:
    from huggingface_hub import errors as hub_errors  # not at the top: local folders need no hub
    from huggingface_hub import snapshot_download

    at = f"{repo!r}" if revision is None else f"{repo!r} at revision {revision!r}"
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=list(ALLOW),
            ignore_patterns=list(IGNORE),
        )
    except hub_errors.GatedRepoError as error:  # before RepositoryNotFoundError, its base
        message = f"{at} is gated; accept its conditions on its hub page, then pass token=… or set HF_TOKEN."
        raise CheckpointError(message) from error
    except hub_errors.RepositoryNotFoundError as error:
        message = (
            f"{at} is neither a local folder nor a model on the hub (or it is private); check it, or pass token=…."
        )
        raise CheckpointError(message) from error
    except hub_errors.RevisionNotFoundError as error:
        message = f"{repo!r} has no revision {revision!r}; give a branch, tag or commit that it has."
        raise CheckpointError(message) from error
    except hub_errors.LocalEntryNotFoundError as error:
        message = f"{at} is not (wholly) in the local cache and the hub cannot be reached; check the network or"
        raise CheckpointError(f"{message} offline mode (HF_HUB_OFFLINE), or give a local folder.") from error
    except Exception as error:  # HTTP errors of several libraries, full disks, invalid names
        reason = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:300] or type(error).__name__
        raise CheckpointError(f"{at} could not be downloaded ({reason}); try again or give a local folder.") from error
    if is_bundle(Path(folder)):
        raise CheckpointError(_refused_bundle(at))
    if not any(Path(folder).glob("*.safetensors")):
        raise CheckpointError(_no_weights(repo, at, revision, token, local_files_only))
    return Path(folder)


def _refused_bundle(at: str) -> str:
    return (
        f"{at} holds a bundle ({MANIFEST}), which is a program and is never run from a hub or its cache; export the model itself, or "
        "copy the bundle to a folder of your own if you trust it."
    )


def _no_weights(repo: str, at: str, revision: str | None, token: str | bool | None, local_files_only: bool) -> str:
    """The sentence for a repository without safetensors; the hub is asked what it holds instead."""
    from huggingface_hub import HfApi

    try:
        files = [] if local_files_only else HfApi(token=token).list_repo_files(repo, revision=revision)
    except Exception:  # offline: the sentence is right without the list too
        files = []
    others = sorted(
        name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"))
    )
    holds = f", only {', '.join(others[:3])}{', …' if len(others) > 3 else ''}" if others else ""
    return (
        f"{at} holds no .safetensors weights{holds}, and vlmfx loads nothing else (a .bin file is a pickle, which can "
        "run code); where you trust it, convert it once: load it with transformers' from_pretrained, call "
        "save_pretrained(folder), and give that folder."
    )
