"""From what the user typed to files on disk: a path, an alias, `random:` or a Hugging Face hub id.

Downloads go through huggingface_hub, which keeps the cache, resumes a broken connection with a Range request, fetches
only the files that are not complete after a killed process, and reads HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxinfer.config import load_aliases, model_config_file, resolve_alias

ACCEPTED = (
    "a directory with config.json and .safetensors files, a .gguf file, a hub id such as 'Qwen/Qwen3-0.6B' "
    "(or 'org/name:file.gguf'), an alias of configs/aliases.yaml, or 'random:' before a config.json or a shape of "
    "configs/models"
)
HUB_FILES = [
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
]
# The same weights a second time, under their authors' own names.
HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]
TORCH_SUFFIXES = (".bin", ".pth", ".pt")


@dataclass(frozen=True)
class ModelFiles:
    """Where a model is. `path` is a directory ("safetensors"), a file ("gguf") or a config.json ("random")."""

    kind: Literal["safetensors", "gguf", "random"]
    path: Path


def resolve_model(model: str, *, revision: str | None = None, download_dir: str | None = None) -> ModelFiles:
    """Find a model's files, downloading them if `model` is a hub id.

    Args:
        model: see `ACCEPTED`.
        revision: branch, tag or commit of a hub id.
        download_dir: the hub's cache; None takes HF_HOME's.

    Raises:
        FileNotFoundError: there is no such model, revision or cached download; says what is accepted.
        ValueError: what is there cannot be loaded (torch pickles only, several GGUF files).
        ConnectionError: the download broke off, or the hub cannot be reached.
    """
    if model.startswith("random:"):
        return ModelFiles("random", model_config_file(model.removeprefix("random:")))
    name = resolve_alias(model)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _directory(path, named=name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model {name!r} is a {path.suffix or 'nameless'} file; accepted: {ACCEPTED}")
        return ModelFiles("gguf", path)
    hub_id = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+?)(?::([\w./-]+\.gguf))?", name)
    if hub_id is None or (name.endswith((".gguf", ".safetensors", ".json")) and hub_id[2] is None):
        close = difflib.get_close_matches(name.lower(), load_aliases(), n=3)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise FileNotFoundError(f"no model {model!r}.{hint} Accepted: {ACCEPTED}")
    return _download(hub_id[1], hub_id[2], revision, download_dir)


def _directory(path: Path, named: str) -> ModelFiles:
    """What a directory holds: safetensors, else exactly one GGUF file."""
    names = sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        if "config.json" not in names:
            raise FileNotFoundError(f"{named} has .safetensors files but no config.json; it has {_listed(names)}")
        return ModelFiles("safetensors", path)
    gguf = [name for name in names if name.endswith(".gguf")]
    if len(gguf) == 1:
        return ModelFiles("gguf", path / gguf[0])
    if gguf:
        raise ValueError(f"{named} holds {len(gguf)} GGUF files, name the one to load: {', '.join(gguf)}")
    torch_files = [name for name in names if name.endswith(TORCH_SUFFIXES)]
    if torch_files:
        raise ValueError(_torch_only(named, torch_files))
    raise FileNotFoundError(f"{named} holds no weights: it has {_listed(names)}. Accepted: {ACCEPTED}")


def _torch_only(where: str, files: list[str]) -> str:
    return (
        f"{where} has torch pickles only ({_listed(files)}), which are not supported: loading them runs code. Convert "
        "once, where torch is installed: transformers.AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR) "
        "writes safetensors"
    )


def _listed(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def _download(hub_id: str, gguf_file: str | None, revision: str | None, download_dir: str | None) -> ModelFiles:
    import huggingface_hub
    from huggingface_hub import constants, errors

    where = f"{hub_id!r}" + (f" at revision {revision!r}" if revision else "")
    common: dict[str, Any] = {"revision": revision, "cache_dir": download_dir}
    try:
        if gguf_file:
            return ModelFiles("gguf", Path(huggingface_hub.hf_hub_download(hub_id, gguf_file, **common)))
        path = huggingface_hub.snapshot_download(hub_id, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED, **common)
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"the model {where} is gated: accept its terms at {constants.ENDPOINT}/{hub_id}, and set HF_TOKEN or run "
            "`hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"no model {where} at {constants.ENDPOINT} (if it is private, set HF_TOKEN), and no such path here. "
            f"Accepted: {ACCEPTED}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"the model {hub_id!r} has no revision {revision!r} at {constants.ENDPOINT}") from error
    except errors.RemoteEntryNotFoundError as error:
        raise FileNotFoundError(f"the model {where} has no file {gguf_file!r}") from error
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"no model {hub_id!r}: {error}. Accepted: {ACCEPTED}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        raise FileNotFoundError(
            f"the model {where} is not complete in the cache {download_dir or constants.HF_HUB_CACHE}, and {reason}. "
            "Download it once online, or give a local path"
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise ConnectionError(
            f"the download of {where} broke off: {error}. Start it again: files that are complete are kept"
        ) from error
    found = _directory_or_none(Path(path))
    if found is not None:
        return found
    names = _remote_names(hub_id, revision)
    if gguf := [name for name in names if name.endswith(".gguf")]:
        raise ValueError(f"the model {where} has GGUF files: name one as '{hub_id}:FILE', FILE one of {_listed(gguf)}")
    if torch_files := [name for name in names if name.endswith(TORCH_SUFFIXES)]:
        raise ValueError(_torch_only(f"the model {where}", torch_files))
    raise ValueError(f"the model {where} has no config.json with .safetensors files; it has {_listed(names)}")


def _directory_or_none(path: Path) -> ModelFiles | None:
    """A downloaded snapshot, if it has what a directory needs."""
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        return None
    return ModelFiles("safetensors", path)


def _remote_names(hub_id: str, revision: str | None) -> list[str]:
    """What the repository holds; empty if the hub does not say (offline)."""
    from huggingface_hub import HfApi, errors

    try:
        return sorted(HfApi().list_repo_files(hub_id, revision=revision))
    except (errors.HTTPError, OSError):
        return []
