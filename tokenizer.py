"""tokenizer.json in plain Python: BPE of the byte-level kind (Llama 3, Qwen2/3, SmolLM, GPT-2) and
of the SentencePiece kind (Llama 2, TinyLlama, Mistral).

    "<s>Say hello"
    added tokens are cut out         <s> | "Say hello"
    the rest is normalised           "▁Say▁hello", or in a Unicode normal form
    patterns split it into words     "▁Say" | "▁hello"
    a word is spelled                ▁ S a y: in bytes; or in characters, falling back to bytes
    neighbours merge                 ▁ S ay, then ▁Say: the pair that was learned first

The ids of short words are cached. An unknown component of a file raises an error that says what is
supported: wrong ids would go unnoticed.
"""

import functools
import heapq
import math
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

import regex  # re with Unicode categories, as \p{L}
import torch
from torch import Tensor

from hub import InputError, find_model, read_json

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BLANK = "▁"  # a space, in vocabularies of the SentencePiece kind
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, left by text that is not UTF-8
UNFIT = (LookupError, TypeError, ValueError, AttributeError, RecursionError, regex.error)
WORDS_KEPT, LONGEST_KEPT = 1 << 17, 64  # how many words' ids are kept; characters of such a word
SPLIT_SECONDS = 10  # that a file's own pattern may take, and as many for every million characters


class Tokenizer:
    """Gives the ids that Hugging Face's tokenizer gives for the same tokenizer.json.

    prefix, suffix: the ids that its post-processor puts before and after a text (BOS, EOS)
    added: {text: id} of the added tokens, which become their id wherever they appear in a text

    Raises InputError where the file is damaged or of a kind that is not supported.
    """

    def __init__(self, folder: Path):
        self.path = folder / "tokenizer.json"
        if not self.path.exists() and (folder / "tokenizer.model").exists():
            raise self.unsupported("a tokenizer.model without tokenizer.json")

        self.embeddings = math.inf
        self.known_bytes = functools.cache(self.token_bytes)
        self.known_word = functools.lru_cache(WORDS_KEPT)(self.encode_word)
        spec = read_json(self.path)
        try:
            self.read_model(spec["model"])
            self.normalizer = self.read_normalizer(spec.get("normalizer"))
            self.read_added_tokens(spec.get("added_tokens") or [])
            self.read_pre_tokenizer(spec.get("pre_tokenizer"))
            self.prefix, self.suffix = self.read_template(spec.get("post_processor"))
            self.read_decoder(spec.get("decoder") or {"type": None})
            self.encode("Values of a wrong type show here.")
        except InputError:
            raise
        except UNFIT as error:
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"{self.path}: damaged ({what}); download it again") from None

        config = folder / "config.json"
        size = read_json(config).get("vocab_size") if config.exists() else None
        self.embeddings = size if isinstance(size, int) else math.inf

    def encode(self, text: str, special: bool = True, restore=None) -> list[int]:
        """The ids of a text; `special=False` leaves out the prefix and suffix. `restore` maps what
        stands between added tokens to its final form: those that it spells there stay text. Raises
        InputError where config.json, beside tokenizer.json, has too few embeddings for an id, and
        where a pattern backtracks for longer than SPLIT_SECONDS allows."""
        ids: list[int] = []
        at_start = True
        for piece, added in cut_out(*self.verbatim, SURROGATE.sub("\ufffd", text)):
            parts = [(piece, added)]
            if added is None:
                parts = cut_out(*self.normalized, self.normalize(piece))
            for part, added in parts:
                if added is None:
                    part = restore(part) if restore else part
                    ids += self.encode_piece(part, at_start)
                else:
                    ids.append(added)
                at_start = False

        ids = self.prefix + ids + self.suffix if special else ids
        largest = max(ids, default=0)
        if largest >= self.embeddings:
            token = self.decode(largest)
            raise InputError(
                f"{self.path}: {token!r} has id {largest}, and the model {self.embeddings} "
                "embeddings; keep it out of the text, or use the model's own tokenizer.json"
            )
        return ids

    def normalize(self, text: str) -> str:
        for step in self.normalizer:
            text = step(text)
        return text

    def encode_piece(self, text: str, at_start: bool) -> list[int]:
        """The ids of a text that is normalised and has no added tokens."""
        if self.prepend is not None:
            text = text.replace(" ", BLANK)
            wanted = self.prepend == "always" or self.prepend == "first" and at_start
            text = BLANK + text if wanted and not text.startswith(BLANK) else text

        words = [text]
        limit = SPLIT_SECONDS * (1 + len(text) / 1e6) if self.has_split else None
        for pattern in self.patterns:
            try:
                words = [part for word in words for part in split(pattern, word, limit)]
            except TimeoutError:
                raise InputError(
                    f"{self.path}: its pattern {pattern.pattern[1:-1]!r:.200} takes too long to "
                    f"split a text of {len(text):,} characters; use the model's own tokenizer.json"
                ) from None
        ids: list[int] = []
        for word in words:
            ids += self.known_word(word) if len(word) <= LONGEST_KEPT else self.encode_word(word)
        return ids

    def encode_word(self, word: str) -> list[int]:
        if self.byte_level:
            word = "".join([BYTE_CHARACTERS[byte] for byte in word.encode()])
        if self.ignore_merges and word in self.vocab:
            return [self.vocab[word]]
        return merge(self.spell(word), self.ranks, self.merged)

    def spell(self, word: str) -> list[int]:
        """A character becomes its token; without one its bytes, the unknown token, or nothing,
        whichever of these the vocabulary has."""
        ids: list[int] = []
        for character in word:
            if character in self.vocab:
                ids.append(self.vocab[character])
            elif self.byte_ids:
                ids += [self.byte_ids[byte] for byte in character.encode()]
            elif not (self.fuse_unknown and ids[-1:] == self.unknown):
                ids += self.unknown
        return ids

    def decode(self, ids: list[int] | Tensor) -> str:
        """The text of ids [T], as list or tensor, or of a single one. Raises ValueError for several
        rows."""
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.strip_blank else text

    def decode_bytes(self, ids: list[int] | Tensor) -> bytes:
        """As inside a text: the blank that starts one of the SentencePiece kind stays. Ids beyond
        the vocabulary, which a padded head can name, decode to nothing."""
        ids = torch.as_tensor(ids)
        if ids.ndim > 1:
            raise ValueError("decode: takes the ids of one text; give one row of them, as ids[0]")
        return b"".join(map(self.known_bytes, ids.reshape(-1).tolist()))

    def unsupported(self, what: str) -> InputError:
        return InputError(
            f"{self.path}: {what} is not supported; "
            "BPE of the Llama 2 and 3, Mistral, Qwen2/3, SmolLM and GPT-2 kinds is"
        )

    # The parts of tokenizer.json.

    def read_model(self, model: dict) -> None:
        if model.get("type", "BPE") != "BPE":
            raise self.unsupported(f"a {model['type']} tokenizer")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise self.unsupported(f"{name} {model[name]!r}")

        self.vocab = vocab = dict(model["vocab"])
        check_ids(vocab.values())
        self.ranks, self.merged = {}, []
        self.merges_cross_words = False
        for rank, pair in enumerate(model["merges"]):
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            self.ranks[vocab[left], vocab[right]] = rank
            self.merged.append(vocab[left + right])
            self.merges_cross_words |= right.startswith(BLANK) and not left.endswith(BLANK)

        self.ignore_merges = bool(model.get("ignore_merges"))
        self.unknown = [vocab[model["unk_token"]]] if model.get("unk_token") else []
        self.fuse_unknown = bool(model.get("fuse_unk"))
        tokens = [f"<0x{byte:02X}>" for byte in range(256)] if model.get("byte_fallback") else []
        self.byte_ids = [vocab[token] for token in tokens if token in vocab]
        if len(self.byte_ids) not in (0, 256):
            raise self.unsupported("byte_fallback without a token for every byte")

    def read_normalizer(self, spec: dict | None) -> list:
        """Functions text -> text, to be called one after the other."""
        if spec is None:
            return []
        kind = spec["type"]
        if kind == "Sequence":
            return [step for part in spec["normalizers"] for step in self.read_normalizer(part)]
        if kind in ("NFC", "NFKC", "NFD", "NFKD"):
            return [functools.partial(unicodedata.normalize, kind)]
        if kind == "Prepend":
            return [lambda text: text and spec["prepend"] + text]
        if kind == "Replace" and "String" in spec["pattern"]:
            return [lambda text: text.replace(spec["pattern"]["String"], spec["content"])]
        raise self.unsupported(f"a {kind} normalizer")

    def read_added_tokens(self, tokens: list[dict]) -> None:
        """Those that are found in the text as it is, and those found once it is normalised."""
        self.added = {}
        verbatim, normalized = {}, {}
        for token in tokens:
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
                raise self.unsupported("an added token that strips the text around it")
            text = token["content"]
            id = self.added[text] = self.vocab.get(text, token["id"])
            if token.get("normalized"):
                normalized.setdefault(self.normalize(text), id)
            else:
                verbatim.setdefault(text, id)
        check_ids(self.added.values())
        self.verbatim = verbatim, splitter(verbatim)
        self.normalized = normalized, splitter(normalized)

    def read_pre_tokenizer(self, spec: dict | None) -> None:
        """The patterns that split a text into words, and what else happens on the way."""
        parts = spec.get("pretokenizers", [spec]) if spec else []
        kinds = [part["type"] for part in parts]
        self.byte_level = "ByteLevel" in kinds
        self.prepend = None  # "always", "first" or "never" where Metaspace replaces spaces
        self.patterns = []
        self.has_split = "Split" in kinds  # a file's own pattern, which may backtrack for ever
        for part in parts:
            pattern = self.read_pattern(part)
            if pattern is None or part["type"] == "ByteLevel" and part is not parts[-1]:
                raise self.unsupported(f"a pre-tokenizer of the kind {' + '.join(kinds)}")
            if pattern:
                self.patterns.append(regex.compile(f"({pattern})", regex.V1))

        words_are_apart = BLANK in self.vocab and not self.merges_cross_words
        if not self.patterns and not self.byte_level and words_are_apart and not self.ignore_merges:
            self.patterns = [regex.compile(f"({BLANK}+[^{BLANK}]*)")]  # the same ids, but faster

    def read_pattern(self, part: dict) -> str | None:
        """The regular expression of a step, "" where it splits nothing, None where it is not
        supported."""
        kind = part["type"]
        if kind == "Digits":
            return r"\p{N}" if part["individual_digits"] else r"\p{N}+"
        if kind == "ByteLevel" and not part.get("add_prefix_space"):
            return GPT2_PATTERN if part.get("use_regex", True) else ""
        if kind == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
            pattern = part["pattern"]
            return pattern["Regex"] if "Regex" in pattern else regex.escape(pattern["String"])
        if kind == "Metaspace" and part["replacement"] == BLANK:
            old = "always" if part.get("add_prefix_space", True) else "never"
            self.prepend = part.get("prepend_scheme", old)
            return f"{BLANK}[^{BLANK}]*" if part.get("split", True) else ""
        return None

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
        check_ids(prefix + suffix)
        return prefix, suffix

    def read_decoder(self, spec: dict) -> None:
        """The text of every token, and what of it stands for blanks and bytes."""
        kinds = {part["type"] for part in spec.get("decoders", [spec])}
        self.has_blanks = not self.byte_level and bool({"Replace", "Metaspace"} & kinds)
        strips = "Strip" in kinds or self.prepend in ("always", "first")
        self.strip_blank = self.has_blanks and strips
        self.has_bytes = "ByteFallback" in kinds

        added = {**self.verbatim[0], **self.normalized[0]}
        self.added_ids = {*added.values()}
        self.tokens = {id: token for token, id in [*self.vocab.items(), *added.items()]}

    def token_bytes(self, id: int) -> bytes:
        token = self.tokens.get(id, "")
        if self.byte_level and id not in self.added_ids and all(map(BYTES.__contains__, token)):
            return bytes([BYTES[character] for character in token])
        if self.has_bytes and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes.fromhex(token[3:5])
        return (token.replace(BLANK, " ") if self.has_blanks else token).encode()


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte: itself where it prints, else the next free
    character from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = byte_alphabet()
BYTE_CHARACTERS = {byte: character for character, byte in BYTES.items()}


def check_ids(ids) -> None:
    for id in ids:
        if type(id) is not int or not 0 <= id < 2**31:
            raise ValueError(f"{id!r:.20} is no id")


def splitter(added: dict[str, int]) -> re.Pattern:
    longest_first = sorted(added, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def cut_out(added: dict[str, int], splitter: re.Pattern, text: str) -> list:
    """The pieces of a text, each with its id where it is an added token, None where not."""
    pieces = splitter.split(text) if added else [text]
    return [(piece, added.get(piece)) for piece in pieces if piece]


def split(pattern: regex.Pattern, text: str, seconds: float | None) -> list[str]:
    """What the first group of a pattern matches, and what lies between. Other groups, which
    Pattern.split gives as well, are left out. Raises TimeoutError."""
    pieces = pattern.split(text, timeout=seconds)
    return [piece for i, piece in enumerate(pieces) if piece and i % (pattern.groups + 1) < 2]


def merge(ids: list[int], ranks: dict[tuple[int, int], int], merged: list[int]) -> list[int]:
    """Merges neighbours until no pair is left that has a rank: the lowest rank first, of equal ones
    the leftmost (byte pair encoding, arXiv 1508.07909). merged: the token that each rank makes.

    A heap holds rank * size + position for each pair, and lists the positions of neighbours, so
    that n tokens take O(n log n)."""
    size = len(ids) + 1
    ids = [*ids, None]  # no pair has None, which also stands where a token joined the one before
    after, before = [*range(1, size), size - 1], [*range(-1, size - 1)]
    heap = [ranks[pair] * size + i for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapq.heapify(heap)
    while heap:
        rank, left = divmod(heapq.heappop(heap), size)
        right = after[left]
        current = ranks.get((ids[left], ids[right]))
        if current is None or merged[current] != merged[rank]:
            continue  # one of the two has merged with another token since

        ids[left], ids[right] = merged[rank], None
        after[left] = after[right]
        before[after[right]] = left
        for i in (before[left], left):
            current = ranks.get((ids[i], ids[after[i]]))
            if current is not None:
                heapq.heappush(heap, current * size + i)
    return [id for id in ids if id is not None]


def load_tokenizer(path_or_hub_id: str) -> Tokenizer:
    """The tokenizer of a model folder or Hub id. Raises InputError for an unsupported kind."""
    return Tokenizer(find_model(path_or_hub_id))
