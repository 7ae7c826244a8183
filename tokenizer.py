"""tokenizer.json, run by tiktoken: byte-level BPE of the Llama-3, Qwen2/3, SmolLM and GPT-2 kinds.

A byte-level BPE tokenizer works in four steps: special tokens are cut out of the text, the rest is
normalised, a pattern splits it into words, and the bytes of each word are merged pair by pair, the
earliest learned merge first. tiktoken does the last two; it takes the id of a merged token as the
rank of its merge, which is the same where ids rise with the merges (checked). Anything else stops
with a line that says what is supported: wrong ids would go unseen.
"""

import math
import re
import unicodedata
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from hub import InputError, find_model, read_json
from machine import progress

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM cuts out single digits first and runs the GPT-2 pattern on what lies between. As one
# pattern, a digit stands alone, and white space before it stays whole, since its piece ends there.
DIGITS_GPT2_PATTERN = (
    r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Gives the ids that Hugging Face's tokenizer gives for the same tokenizer.json.

    prefix, suffix: the ids that its post-processor puts before and after a text (BOS, EOS)
    added: {text: id} of the added tokens, which become their id wherever they stand in a text

    Raises InputError where the file is of a kind that is not supported.
    """

    def __init__(self, folder: Path):
        self.path = folder / "tokenizer.json"
        if not self.path.exists() and (folder / "tokenizer.model").exists():
            raise self.unsupported("a SentencePiece tokenizer (tokenizer.model)")

        spec = read_json(self.path)
        model = spec["model"]
        if model.get("byte_fallback"):
            raise self.unsupported("a SentencePiece-style tokenizer")
        if model.get("type", "BPE") != "BPE":
            raise self.unsupported(f"a {model['type']} tokenizer")

        self.added = self.read_added_tokens(spec.get("added_tokens", []))
        self.normal_form = self.read_normalizer(spec.get("normalizer"))
        self.prefix, self.suffix = self.read_template(spec.get("post_processor"))

        ranks = self.read_ranks(model)
        self.encoding = tiktoken.Encoding(
            str(self.path),
            pat_str=self.read_pattern(spec.get("pre_tokenizer")),
            mergeable_ranks=ranks,
            special_tokens=self.added,
        )
        self.bytes = {rank: token for token, rank in ranks.items()}
        self.bytes |= {id: text.encode() for text, id in self.added.items()}

        longest_first = sorted(self.added, key=len, reverse=True)
        self.splitter = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str, special: bool = True, restore=None) -> list[int]:
        """The ids of a text; `special=False` leaves out the prefix and suffix. `restore` maps what
        stands between added tokens to its final form: those that it spells there stay text."""
        ids: list[int] = []
        for piece in self.splitter.split(text) if self.added else [text]:
            if piece in self.added:
                ids.append(self.added[piece])
                continue
            if restore:
                piece = restore(piece)
            if self.normal_form:
                piece = unicodedata.normalize(self.normal_form, piece)
            ids += self.encoding.encode_ordinary(piece)
        return self.prefix + ids + self.suffix if special else ids

    def decode(self, ids: list[int] | Tensor) -> str:
        """The text of ids [T], as list or tensor, or of a single one. Raises ValueError for several
        rows."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: list[int] | Tensor) -> bytes:
        """Ids beyond the vocabulary, which a padded head can name, decode to nothing."""
        ids = torch.as_tensor(ids)
        if ids.ndim > 1:
            raise ValueError("decode: takes the ids of one text; give one row of them, as ids[0]")
        return b"".join(self.bytes.get(id, b"") for id in ids.reshape(-1).tolist())

    def unsupported(self, what: str) -> InputError:
        return InputError(
            f"{self.path}: {what} is not supported; "
            "byte-level BPE of the Llama-3, Qwen2/3, SmolLM and GPT-2 kinds is"
        )

    # The parts of tokenizer.json, in the order in which a text meets them.

    def read_added_tokens(self, tokens: list[dict]) -> dict[str, int]:
        for token in tokens:
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise self.unsupported("an added token that strips the text around it")
        return {token["content"]: token["id"] for token in tokens}

    def read_normalizer(self, spec: dict | None) -> str | None:
        """The Unicode normal form, None for none."""
        if spec is None:
            return None
        if spec["type"] in ("NFC", "NFKC", "NFD", "NFKD"):
            return spec["type"]
        raise self.unsupported(f"a {spec['type']} normalizer")

    def read_pattern(self, spec: dict | None) -> str:
        """The regular expression that splits a text into words."""
        parts = (spec or {}).get("pretokenizers") or [spec or {"type": None}]
        kinds = [part["type"] for part in parts]
        if any(part.get("add_prefix_space") for part in parts):
            raise self.unsupported("a pre-tokenizer with add_prefix_space")

        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
            return GPT2_PATTERN
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            return DIGITS_GPT2_PATTERN
        if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
            split = parts[0]
            isolated = split["behavior"] == "Isolated" and not split.get("invert")
            if "Regex" in split["pattern"] and isolated:
                return split["pattern"]["Regex"]
        raise self.unsupported(f"a pre-tokenizer of the kind {' + '.join(map(str, kinds))}")

    def read_ranks(self, model: dict) -> dict[bytes, int]:
        """{bytes of a token: its id}, which is the rank of the merge that makes it."""
        byte_of = byte_alphabet()
        try:
            ranks = {
                bytes(map(byte_of.__getitem__, token)): id
                for token, id in model["vocab"].items()
                if token not in self.added
            }
        except KeyError:
            raise self.unsupported("a vocabulary that is not byte-level") from None

        merged = [
            merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
            for merge in model["merges"]
        ]
        ids = list(dict.fromkeys(model["vocab"][token] for token in merged))
        if ids != sorted(ids):
            raise self.unsupported("a vocabulary whose ids do not follow the order of its merges")
        return ranks

    def read_template(self, spec: dict | None) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before and after a text."""
        steps = [] if spec is None else spec.get("processors", [spec])
        prefix: list[int] = []
        suffix: list[int] = []
        for step in steps:
            if step["type"] == "ByteLevel":
                continue
            if step["type"] != "TemplateProcessing":
                raise self.unsupported(f"a {step['type']} post-processor")

            side = prefix
            for piece in step["single"]:
                if "Sequence" in piece:
                    side = suffix
                else:
                    side += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        return prefix, suffix


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte: itself where it prints, else the next free
    character from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def load_tokenizer(path_or_hub_id: str) -> Tokenizer:
    """The tokenizer of a model folder or Hub id. Raises InputError for an unsupported kind."""
    return Tokenizer(find_model(path_or_hub_id))


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
