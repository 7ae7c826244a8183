"""Text files to sequences of ids: the documents of a file, packed end to end. Some are held out for
evaluation, some used to fit linear maps.
"""

import codecs
import glob
import gzip
import itertools
import json
import math
import re
import sys
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import Config
from hub import InputError, download, require
from machine import is_main_process
from terminal import progress
from tokenizer import Tokenizer

C4 = "hub:allenai/c4/en/c4-train.00000-of-01024.json.gz"  # the default text to heal on
TEXT_TOKENS = 10_000_000  # read whatever the budget: a run can be extended to a larger one
CONTEXT = 2048  # tokens of a sequence to evaluate on: long enough to show what a window misses
TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json.gz")
DOCUMENT = 20_000  # characters of a .txt file's documents at most, some 4,000 tokens
TEXT_KINDS = (
    f".txt (blank lines part paragraphs, joined to documents of up to {DOCUMENT:,} characters and "
    "cut there), .jsonl, .jsonl.gz, a folder of them, or hub:DATASET/FILE"
)
ENCODING = (str, "utf-8", "of the text, as cp1252 or utf-16")


# --- files to documents ------------------------------------------------------------------------


def read_documents(source: str, flag: str = "--data", encoding: str = "utf-8"):
    """Yields the texts of `source`: the paragraphs of a .txt file as `read_paragraphs` joins them;
    the `text` fields of a .jsonl, .jsonl.gz or .json.gz file; those of a folder of such files, by
    name, without hidden ones; or of `hub:OWNER/DATASET/FILE`. Raises InputError naming the file,
    and the line or byte."""
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
    """Where the bytes stop being valid in `encoding`, and what they probably are."""
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
    """The documents of plain text: its paragraphs, separated by blank lines, joined up to DOCUMENT
    characters. A longer paragraph is cut at white space."""
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
    if skipped and is_main_process():
        note = f"{where}: skipped {skipped:,} of {number:,} lines, which have no `text`"
        tqdm.write(note, file=sys.stderr)  # which moves a bar out of the way


# --- documents to sequences --------------------------------------------------------------------


def pack_sequences(
    documents, tokenizer: Tokenizer, eos: tuple[int, ...], context: int, tokens: int | None = None
) -> Tensor:
    """Joins documents, an end-of-text token after each, and cuts them into sequences: [N, context]
    int64, at most `tokens` tokens in all (rounded up to whole sequences). The rest is dropped."""
    wanted = math.inf if tokens is None else -(-tokens // context) * context
    ids: list[int] = []
    desc = "reading text" if tokens is None else f"reading text, at most {tokens:,} tokens"
    with progress(desc=desc, unit="tok", unit_scale=True) as bar:
        for text in documents:
            before = len(ids)
            ids += tokenizer.encode(text) + list(eos[:1])
            bar.update(len(ids) - before)
            if len(ids) >= wanted:
                break

    count = int(min(len(ids), wanted)) // context
    return torch.tensor(ids[: count * context], dtype=torch.int64).view(count, context)


def read_text(args, tokenizer: Tokenizer, config: Config, settings) -> tuple[Tensor, Tensor]:
    """Training and validation sequences [N, context], for `settings` of healing. Without --valid
    the end of --data is held out. Raises InputError, with how much there is and how much is
    missing, for too little text."""
    eos = config.eos_token_ids
    longest = min(CONTEXT, config.max_position_embeddings)
    needed = args.sequences * longest
    wanted = max(settings.trained_tokens, TEXT_TOKENS)
    documents = read_documents(args.data, "--data", args.encoding)
    if args.valid:
        held_out = read_documents(args.valid, "--valid", args.encoding)
    else:
        documents, held_out = hold_out(up_to(10 * wanted, documents), tokenizer, longest)

    valid = pack_sequences(held_out, tokenizer, eos, longest, needed)
    train = pack_sequences(documents, tokenizer, eos, settings.context, wanted)

    missing = {
        "--data": max(0, settings.long_context - train.numel()),
        "--valid": max(0, longest - valid.numel()),
    }
    if not args.valid:
        missing["--data"] += missing.pop("--valid")
    for flag, source in (("--data", args.data), ("--valid", args.valid)):
        if missing.get(flag):  # counted again, with what filled no sequence
            text = read_documents(source, flag, args.encoding)
            there = pack_sequences(text, tokenizer, eos, 1).numel()
            size = f"it has {there:,} tokens, {there + missing[flag]:,} are needed"
            raise InputError(f"{flag} {source}: too little text: {size}; give more")
    return train, valid


def up_to(characters: int, documents) -> list[str]:
    """The first documents, until they have so many characters."""
    taken = []
    for document in documents:
        taken.append(document)
        characters -= len(document)
        if characters <= 0:
            break
    return taken


def hold_out(documents: list[str], tokenizer: Tokenizer, least: int) -> tuple[list[str], list[str]]:
    """Splits off the last twentieth of the characters, but no fewer than `least` tokens take: whole
    documents, the first of them cut where it is more than twice what is missing."""
    sample = "".join(documents[-20:])[-20_000:]
    size = len(sample) / max(1, len(tokenizer.encode(sample)))  # characters of a token
    missing = max(sum(map(len, documents)) // 20, int(1.25 * least * size))
    held_out: list[str] = []
    while documents and missing > 0:
        document = documents.pop()
        if len(document) > 2 * missing:
            documents.append(document[:-missing])
            document = document[-missing:]
        held_out.append(document)
        missing -= len(document)
    return documents, held_out


def fitting_text(train: Tensor, tokens: int, judged: int) -> Tensor:
    """Training sequences of `tokens` in all that linear maps are fitted on: the same for every
    --tokens, since a run that goes on to more of them must go on with its maps; where there are
    enough, after the first `judged` tokens, which a scan may judge them on."""
    count = min(max(1, tokens // train.shape[1]), len(train))
    first = judged // train.shape[1] + 1
    return train[min(first, len(train) - count) :][:count]
