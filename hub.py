"""Files in and out: models found on disk or on the Hub, JSON and safetensors read and written
safely, and hashes that identify files and tensors.

Everything that can be wrong with a file the user gave becomes an `InputError`: one line that names
the file or flag and the fix. A file is written under a temporary name and renamed, so it is whole
or not there.
"""

import hashlib
import json
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

PARTIAL = ".partial"  # suffix of a file that is still being written
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)


class InputError(ValueError):
    """A mistake that the user can fix: the message, one line, names the file or flag and the fix.
    Text from a file, such as a tensor's name, cannot control the terminal: control characters are
    escaped."""

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def require(condition, message: str) -> None:
    """Raises InputError with this message where the condition does not hold."""
    if not condition:
        raise InputError(message)


# --- found on disk or on the Hub ---------------------------------------------------------------


def find_model(path_or_hub_id: str, revision: str | None = None) -> Path:
    """The local folder of a model. For a Hub id, the files that are read are downloaded, or found
    in the Hub's cache. Raises InputError if there is neither."""
    if os.path.isdir(path_or_hub_id):
        return Path(path_or_hub_id)

    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path_or_hub_id)
    require(
        is_hub_id and not path_or_hub_id.startswith("."),
        f"{path_or_hub_id}: no such folder; give that of a model, or a Hub id",
    )
    weights = ["*.safetensors", "*.safetensors.index.json"]
    patterns = ["config.json", "README.md", *weights, *TOKENIZER_FILES]
    folder = download(
        "snapshot_download",
        path_or_hub_id,
        repo_id=path_or_hub_id,
        revision=revision,
        allow_patterns=patterns,
    )
    return Path(folder)


def download(function: str, what: str, **arguments) -> str:
    """Calls a function of huggingface_hub; each of its errors becomes one line about `what`."""
    import huggingface_hub  # takes a third of a second, which a local folder need not wait for
    from huggingface_hub import errors

    try:
        return getattr(huggingface_hub, function)(**arguments)
    except errors.GatedRepoError:
        fix = "gated; accept its licence on its Hub page and run `hf auth login`"
    except errors.RevisionNotFoundError:
        fix = f"has no revision {arguments.get('revision')!r}; check --revision"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        fix = "neither a local path nor on the Hub; a private repository needs `hf auth login`"
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        ConnectionError,
        TimeoutError,
    ):
        fix = "not a local path, and the Hub cannot be reached; check either"
    except errors.EntryNotFoundError:
        fix = "no such file on the Hub"
    except errors.HTTPError as error:
        fix = str(error).strip().partition("\n")[0]
    raise InputError(f"{what}: {fix}")


# --- JSON and safetensors ----------------------------------------------------------------------


def read_json(path: Path) -> dict:
    """A file that holds one JSON object. Raises InputError where it does not."""
    try:
        return parse_json(path.read_bytes(), path)
    except FileNotFoundError:
        parts = "config.json", "tokenizer.json"
        fix = f"; a model has {', '.join(parts)} and *.safetensors" if path.name in parts else ""
        raise InputError(f"{path}: no such file{fix}") from None


def parse_json(text: str | bytes, path: Path) -> dict:
    """One JSON object, found in a file. Raises InputError for anything else."""
    try:
        content = json.loads(text if isinstance(text, str) else text.decode())
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, 5,000 digits, too deep
        raise InputError(f"{path}: not valid JSON ({error})") from None
    require(isinstance(content, dict), f"{path}: holds no JSON object")
    return content


@contextmanager
def open_safetensors(path: Path, fix: str = "download it again"):
    """safe_open, on the CPU. Raises InputError, ending in `fix`, for a file that is damaged."""
    try:
        with safe_open(path, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error}); {fix}") from None


def write_file(path: Path, write) -> None:
    """write(temporary path), then rename. Raises OSError naming the file where it cannot be
    written; then nothing of it is left to fill the disk."""
    temporary = path.with_name(path.name + PARTIAL)
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # the latter from a full disk, too
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(getattr(error, "errno", None), reason, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda temporary: temporary.write_text(text, "utf-8", "replace"))


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def save_safetensors(tensors: dict, path: Path, metadata: dict[str, str]) -> None:
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


# --- hashes ------------------------------------------------------------------------------------


def content_hash(tensors: dict, metadata: dict[str, str]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, and over metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        x = x.detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint(*tensors: Tensor) -> str:
    """Twelve hex digits that identify a set of tensors, by their shapes and 64 values of each;
    weights give the same digits in every precision."""
    digest = hashlib.sha256()
    for x in tensors:
        flat = x.detach().flatten()
        values = flat[:: max(1, flat.numel() // 64)]
        if x.is_floating_point():
            values = values.bfloat16()
        digest.update(str(tuple(x.shape)).encode())
        digest.update(values.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def hash_files(*paths: str | Path) -> str:
    """Twelve hex digits of the contents of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()[:12]
