"""A model at the terminal: `--prompt` continues a text, `--chat` answers.

A chat model reads a conversation as one text, which a template builds from its messages:

    <|im_start|>user
    Who was Ada Lovelace?<|im_end|>
    <|im_start|>assistant

The template is a jinja2 program in the model's folder; it runs in a sandbox, with the variables and
functions that transformers provides. A special token that a person types stays text: a placeholder
replaces it until the template's own tokens have been found.
"""

import codecs
import datetime
import functools
import itertools
import json
import re
import sys
from contextlib import suppress
from pathlib import Path

from hub import InputError, read_json, require
from machine import require_memory
from model import Model, cache_bytes
from terminal import say, visible
from tokenizer import Tokenizer, splitter

MARK = "\ufdd0"  # around the id of a hidden token; Unicode leaves it to programs
SPECIAL = [f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


def stream_text(model: Model, tokenizer: Tokenizer, ids, ends, new: int, args, cache=None):
    """Writes what follows ids [T] to the terminal, up to `new` tokens or one of `ends`, and yields
    each token that is written."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
    sampling = (args.temperature, args.top_k, args.top_p, args.seed)
    try:
        for token in map(int, model.stream(ids, new, *sampling, cache)):
            if token in ends:
                return
            print(visible(decoder.decode(tokenizer.decode_bytes([token]))), end="", flush=True)
            yield token
    finally:
        print(visible(decoder.decode(b"", final=True)), flush=True)


def generate_text(model: Model, tokenizer: Tokenizer, args) -> None:
    """Streams the continuation of --prompt to the terminal, or says why there is none."""
    ids = tokenizer.encode(args.prompt)
    require(ids, "--prompt is empty; give it some text")
    reach = model.config.max_position_embeddings
    require(
        len(ids) <= reach,
        f"--prompt: has {len(ids):,} tokens, {args.model} reads {reach:,}; give a shorter one",
    )
    new = args.max_new_tokens or 100
    needed = cache_bytes(model, len(ids) + new)
    require_memory(needed, str(model.device), "--max-new-tokens", "give fewer")
    print(visible(args.prompt), end="", flush=True)
    if not list(stream_text(model, tokenizer, ids, model.config.eos_token_ids, new, args)):
        print(
            f"{args.model} ended the text at once, as an instruct model does without its chat "
            "format; talk to it with --chat, or give --prompt the beginning of a text, as "
            "'The capital of France is'",
            file=sys.stderr,
        )


# --- the template ------------------------------------------------------------------------------


class ChatTemplate:
    """The chat template of a model folder: chat_template.jinja, or chat_template in
    tokenizer_config.json. Raises InputError where there is none, or where it fails."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.exists() else {}
        source = config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {each["name"]: each["template"] for each in source}.get("default")
        if (folder / "chat_template.jinja").exists():
            path = folder / "chat_template.jinja"
            source = path.read_text(encoding="utf-8", errors="replace")
        require(
            isinstance(source, str),
            f"{folder}: has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); use --prompt, or the instruct model of this kind",
        )

        self.path, self.source, self.tokenizer = path, source, tokenizer
        named = {name: config[name] for name in SPECIAL if config.get(name)}
        self.tokens = {k: x["content"] if isinstance(x, dict) else x for k, x in named.items()}

    def render(self, messages: list[dict]) -> str:
        """The text of messages [{role, content}], up to where the answer begins."""
        values = {"tools": None, "documents": None, "add_generation_prompt": True, **self.tokens}
        try:
            return environment().from_string(self.source).render(messages=messages, **values)
        except Exception as error:  # somebody else's program, which can fail in any way
            reason = " ".join(str(error).split())
            raise InputError(f"{self.path}: the chat template fails: {reason}") from None

    def encode(self, messages: list[dict]) -> list[int]:
        return self.tokenizer.encode(self.render(messages), special=False, restore=self.restore)

    def hide(self, text: str) -> str:
        """A text with placeholders for the special tokens that it contains."""
        added = self.tokenizer.added

        def placeholder(found) -> str:  # templates strip white space
            return found[0] if found[0].isspace() else f"{MARK}{added[found[0]]}{MARK}"

        text = text.replace(MARK, "")
        return splitter(added).sub(placeholder, text) if added else text

    def restore(self, text: str) -> str:
        text_of = {str(id): text for text, id in self.tokenizer.added.items()}
        return re.sub(f"{MARK}([0-9]+){MARK}", lambda found: text_of[found[1]], text)

    def hide_answer(self, ids: list[int]) -> str:
        """The text of an answer, in which special tokens, such as <think>, are the model's own."""
        special, decode = set(self.tokenizer.added.values()), self.tokenizer.decode
        runs = itertools.groupby(ids, special.__contains__)
        return "".join(decode([*run]) if own else self.hide(decode([*run])) for own, run in runs)


def environment():
    """A jinja2 environment as in transformers.utils.chat_template_utils."""
    import jinja2  # only a chat need wait for it
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which marks answers for training, does nothing."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)  # no HTML escapes
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


# --- the conversation --------------------------------------------------------------------------


class Chat:
    """A conversation with a model. The cache is reused from turn to turn if the new text begins
    with what it holds; after an answer that was stopped, or if a template leaves out earlier
    thoughts, everything is read again."""

    def __init__(self, model: Model, tokenizer: Tokenizer, folder: Path, args):
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.template = ChatTemplate(folder, tokenizer)
        eos = tokenizer.added.get(self.template.tokens.get("eos_token"))
        self.ends = {*model.config.eos_token_ids, eos}
        self.reset()

    def reset(self) -> None:
        system = {"role": "system", "content": self.template.hide(self.args.system or "")}
        self.messages = [system] if self.args.system else []
        self.held, self.cache = [], None  # the ids that the cache holds

    def answer(self, text: str) -> None:
        """Streams the answer to a message. After Ctrl-C the history holds what there was of it."""
        self.messages.append({"role": "user", "content": self.template.hide(text)})
        ids = self.template.encode(self.messages)
        reach = self.model.config.max_position_embeddings
        new = min(self.args.max_new_tokens or 1000, reach - len(ids))
        if new < 1:
            self.messages.pop()
            say(f"(no room: {len(ids):,} tokens, the model has {reach:,} positions; try /reset)")
            return

        held, cache = self.held, self.cache
        self.held, self.cache = [], None  # until the answer is whole
        if cache is None or ids[: len(held)] != held or len(ids) == len(held):
            held, cache = [], self.model.new_cache(1, 0)
        rest, answer = ids[len(held) :], []
        given = (self.model, self.tokenizer, rest, self.ends, new, self.args, cache)
        try:
            for token in stream_text(*given):
                answer.append(token)
            self.held, self.cache = (ids + answer)[: int(cache.positions)], cache
        finally:
            text = self.template.hide_answer(answer)
            self.messages.append({"role": "assistant", "content": text})


def chat(model: Model, tokenizer: Tokenizer, folder: Path, args) -> None:
    """Reads messages from the terminal and answers them, until Ctrl-D."""
    talk = Chat(model, tokenizer, folder, args)
    with suppress(ImportError):  # as on Windows
        import readline  # noqa: F401  the arrow keys
    say("/reset starts over, Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            text = input("> ").strip()
            if text == "/reset":
                talk.reset()
            elif text:
                talk.answer(text)
        except EOFError:
            return say()
        except KeyboardInterrupt:
            say()
