"""Files in and out: models and text found on disk or on the Hub, JSON and safetensors read and
written safely.

Everything that can be wrong with a file the user gave becomes an `InputError`: one line that names
the file or flag and the fix. A file is written under a temporary name and renamed, so it is whole
or not there.
"""

import codecs
import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import sys
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

C4 = "hub:allenai/c4/en/c4-train.00000-of-01024.json.gz"  # the text to heal on when none is named
TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json.gz")
PARTIAL = ".partial"  # ends the name of a file that is being written
DOCUMENT = 20_000  # characters of a .txt file's documents at most, some 4,000 tokens
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)


class InputError(ValueError):
    """Something the user can mend: the message, one line, names the file or flag and the fix. What
    a file brings into it, as a tensor's name, cannot steer the terminal: control characters are
    written out."""

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def require(condition, message: str) -> None:
    """Raises InputError with this message where the condition does not hold."""
    if not condition:
        raise InputError(message)


# --- found on disk or on the Hub ---------------------------------------------------------------


def find_model(path_or_hub_id: str, revision: str | None = None) -> Path:
    """The local folder of a model. Of a Hub id, the files that are read are downloaded, or found in
    the Hub's cache. Raises InputError where there is neither."""
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; a model has config.json, *.safetensors and tokenizer.json"
        ) from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, 5,000 digits, too deep
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object")
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


def content_hash(tensors: dict, metadata: dict[str, str]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, and over metadata."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        x = x.detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# --- text --------------------------------------------------------------------------------------


def read_documents(source: str, flag: str = "--data", encoding: str = "utf-8"):
    """Yields the texts of `source`: the paragraphs of a .txt file as `read_paragraphs` joins them,
    the `text` fields of a .jsonl, .jsonl.gz or .json.gz file, those of a folder of such files in
    the order of their names, but for hidden ones, or of `hub:OWNER/DATASET/FILE`. Raises
    InputError naming the file, and the line or byte."""
    kinds = ", ".join(TEXT_SUFFIXES)
    path = Path(source)
    if source.startswith("hub:"):
        owner, dataset, file = (source[4:].split("/", 2) + ["", ""])[:3]
        require(
            file.endswith(TEXT_SUFFIXES),
            f"{flag} {source}: give hub:OWNER/DATASET/FILE, the file one of {kinds}",
        )
        where = {"repo_id": f"{owner}/{dataset}", "filename": file, "repo_type": "dataset"}
        path = Path(download("hf_hub_download", f"{flag} {source}", **where))

    files = [path]
    if path.is_dir():
        names = glob.glob("**", root_dir=path, recursive=True)  # leaves hidden ones out
        files = sorted(path / name for name in names if name.endswith(TEXT_SUFFIXES))
    require(
        source and path.exists() and files,
        f"{flag} {source}: no such file, or a folder without {kinds} files",
    )
    for file in files:
        known = file.name.endswith(TEXT_SUFFIXES)
        require(known, f"{flag} {file}: give one of {kinds}, or a folder of them")
        read = read_paragraphs if file.suffix == ".txt" else read_text_fields
        with open_text(file, f"{flag} {file}", encoding) as lines:
            yield from read(lines, f"{flag} {file}")


@contextmanager
def open_text(file: Path, where: str, encoding: str):
    """The lines of a file, unzipped and decoded. What is wrong with its bytes becomes an InputError
    that begins with `where`."""
    open_file = gzip.open if file.suffix == ".gz" else open
    try:
        with open_file(file, "rt", encoding=encoding) as lines:
            try:
                yield lines
            except UnicodeError:
                with open_file(file, "rb") as content:
                    wrong = wrong_encoding(content.read(), encoding)
                raise InputError(f"{where}: {wrong}") from None
    except LookupError:
        raise InputError(f"--encoding {encoding}: unknown; give cp1252, utf-16 or alike") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        kind = "a gzip that was cut short" if isinstance(error, EOFError) else "not a sound gzip"
        raise InputError(f"{where}: {kind} ({error}); download it again") from None


def wrong_encoding(content: bytes, encoding: str) -> str:
    """Where the bytes stop being `encoding`, and what they probably are."""
    start = 0
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        start = error.start

    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    for likely in ["utf-16"] if is_utf16 else ["utf-8", "cp1252", "latin-1"]:
        with suppress(UnicodeDecodeError):
            content.decode(likely)
            break
    return (
        f"byte {start:,} (0x{content[start]:02x}) is not {encoding}; this is probably {likely}: "
        f"give --encoding {likely}, or save the text as utf-8"
    )


def read_paragraphs(lines, where: str):
    """The documents of plain text: its paragraphs, which blank lines part, joined while a document
    has at most DOCUMENT characters. A longer paragraph is cut at white space."""
    document = ""
    for blank, group in itertools.groupby(lines, lambda line: not line.strip("\ufeff \t\n")):
        if blank:
            continue
        paragraph = "".join(group).removeprefix("\ufeff").rstrip()
        if document and len(document) + len(paragraph) > DOCUMENT:
            yield document
            document = ""
        document = f"{document}\n\n{paragraph}" if document else paragraph
        if len(document) > DOCUMENT:
            pieces = rf".{{1,{DOCUMENT}}}(?=\s|\Z)|.{{1,{DOCUMENT}}}"
            *whole, document = map(str.strip, re.findall(pieces, document, re.DOTALL))
            yield from whole
    if document:
        yield document


def read_text_fields(lines, where: str):
    """The `text` field of each line. Lines that are empty, or have none, are counted on stderr."""
    skipped = 0
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line.strip("\ufeff \t\n") or "{}").get("text") or ""
            if not isinstance(text, str):
                raise TypeError(f"`text` is {text!r:.20}")
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            wrong = "not a JSON object with a `text` field"
            raise InputError(f"{where}: line {number}: {wrong} ({error})") from None
        if text:
            yield text
        skipped += not text
    if skipped and int(os.environ.get("RANK", 0)) == 0:  # one process of torchrun's says so
        note = f"{where}: skipped {skipped:,} of {number:,} lines, which have no `text`"
        tqdm.write(note, file=sys.stderr)  # which moves a bar out of the way
