"""Quality: what a conversion costs. Each measure is written once and has three callers: the scan's
probes, healing's validation and the report.

On text, from the next-token distributions p of the base and q of the model at each position:

    KL(base || model) = sum_v p_v (log p_v - log q_v)     how far the model has moved from the base
    top-1 agreement                                       how often both name the same next token
    perplexity = exp(mean of -log q(next token))          how well it predicts the text itself

Perplexity alone hides what a window loses, since most words follow from the last few. Passkey
recall shows it: a number is hidden in long text, at several depths, and must be repeated at the end
(arXiv 2305.16300, section 4.3).

On question files, one JSON object a line, in one of three formats:

    query, choices, gold                   multiple choice: the choice of the highest
                                           log-likelihood wins, raw and per byte
    context_options, continuation, gold    Winograd-style: the context that makes the continuation
                                           likeliest wins
    context, continuation                  LAMBADA: greedy decoding gives exactly the continuation

Logits are large: those of 4,096 positions over 128k tokens take 2 GB in float32. So all measures
start from hidden states after the final norm, and compute logits for a slice of positions, or for
an answer's positions, at a time.
"""

import codecs
import functools
import itertools
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from attention import linear
from divergence import logit_kl, slice_rows
from hub import require
from model import Model
from terminal import progress, say
from tokenizer import Tokenizer

TEXT_BATCH = 4  # sequences that are read together
RECALL_LENGTHS = (256, 512, 1024, 2048, 4096)
WRITTEN = 128  # tokens of a continuation
LEAST_WRITTEN = 8  # continuations; fewer say little
RECALL_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)

PASSKEY_HEAD = (
    "There is important information hidden in a lot of irrelevant text. Find it and remember it.\n"
)
PASSKEY_NEEDLE = "\nThe pass key is {number}. Remember it. {number} is the pass key.\n"
PASSKEY_QUESTION = "\nWhat is the pass key? The pass key is"

Prompt = tuple[list[int], list[int]]  # context ids, answer ids


# --- text --------------------------------------------------------------------------------------


@torch.no_grad()
def kl_by_position(hidden: Tensor, base_hidden: Tensor, head: Tensor, base_head: Tensor) -> Tensor:
    """KL(base || model) at each position, in nats.

    hidden, base_hidden [B, T, d]: hidden states after the final norm; head, base_head [V, d]
    -> [B, T] float32. Callers slice it: its mean, halves of the text, late positions.
    """
    slices = sliced_logits(hidden, base_hidden, head, base_head)
    kl = [logit_kl(logits, base_logits) for logits, base_logits in slices]
    return torch.cat(kl).view(hidden.shape[:2])


@torch.no_grad()
def compare_by_position(
    hidden: Tensor, base_hidden: Tensor, head: Tensor, base_head: Tensor, following: Tensor
) -> Tensor:
    """The same with two measures more: [3, B, T] float32, at each position the negative
    log-likelihood of the token that follows (`following` [B, T] ids), in nats, the KL, and 1 where
    both models name the same next token."""
    slices = sliced_logits(hidden, base_hidden, head, base_head)
    next_tokens = following.flatten().split(slice_rows(hidden.device))

    figures = []
    for (logits, base_logits), token in zip(slices, next_tokens, strict=True):
        nll = F.cross_entropy(logits.float(), token, reduction="none")
        kl = logit_kl(logits, base_logits)
        same = logits.argmax(-1) == base_logits.argmax(-1)
        figures.append(torch.stack((nll, kl, same.float())))  # (3, rows)
    return torch.cat(figures, dim=1).view(3, *hidden.shape[:2])


def sliced_logits(hidden: Tensor, base_hidden: Tensor, head: Tensor, base_head: Tensor):
    """Yields the logits of both models, [rows, V] each, one slice of positions at a time."""
    rows = slice_rows(hidden.device)
    parts = hidden.flatten(0, 1).split(rows)
    base_parts = base_hidden.flatten(0, 1).split(rows)
    for part, base_part in zip(parts, base_parts, strict=True):
        yield linear(part, head), linear(base_part, base_head)


@torch.inference_mode()
def hidden_states(model: Model, batches: list[Tensor]) -> list[Tensor]:
    """The original's hidden states [B, T, d] after the final norm, for batches of ids [B, T]."""
    return [model.hidden(ids) for ids in progress(batches, desc="original")]


@torch.inference_mode()
def text_quality(
    model: Model, base: Model, tokenizer: Tokenizer, sequences: Tensor, base_states=None
) -> dict:
    """{perplexity, bits_per_byte, kl, agreement, errors} on sequences [N, T] of ids, kl and
    agreement against `base`, whose `hidden_states` on them are made here where they are not given.
    Bits per UTF-8 byte of the text, special tokens left out, are perplexity made comparable between
    tokenizers. `errors` has the standard error of each of the four, from how the sequences differ;
    that of agreement is at least the error of as many independent tokens, since sequences may agree
    equally often by chance."""
    batches = sequences.to(base.device).split(TEXT_BATCH)
    base_states = base_states or hidden_states(base, batches)
    sums = []
    for ids, base_hidden in zip(progress(batches, desc="text"), base_states):
        hidden = base_hidden if model is base else model.hidden(ids)
        following = F.pad(ids[:, 1:], (0, 1))
        figures = compare_by_position(hidden, base_hidden, model.head, base.head, following)
        figures[0, :, -1] = 0  # nothing is known to follow the last token
        sums.append(figures.double().sum(2).cpu())

    special = set(tokenizer.added.values())
    sizes = []  # of the text that is predicted, in bytes
    for row in sequences[:, 1:].tolist():
        sizes.append(len(tokenizer.decode_bytes([id for id in row if id not in special])))
    sizes = torch.tensor(sizes, dtype=torch.float64)
    return text_figures(torch.cat(sums, 1), sizes, sequences.shape[1])


def text_figures(sums: Tensor, sizes: Tensor, tokens: int) -> dict:
    """The figures of one model, from its sums of negative log-likelihood, KL and agreement over
    each sequence [3, N] of so many tokens, and the sizes [N] of their texts in bytes."""
    nll = sums[0] / (tokens - 1)
    kl, same = sums[1:] / tokens
    bits = sums[0] / math.log(2)
    bits_per_byte = float(bits.sum() / sizes.sum())
    agreement = float(same.mean())
    independent = (agreement * (1 - agreement) / (tokens * len(same))) ** 0.5
    errors = {
        "perplexity": perplexity(float(nll.mean())) * standard_error(nll),
        "bits_per_byte": standard_error(bits - bits_per_byte * sizes) / float(sizes.mean()),
        "kl": standard_error(kl),
        "agreement": max(standard_error(same), independent),
    }
    return {
        "perplexity": perplexity(float(nll.mean())),
        "bits_per_byte": bits_per_byte,
        "kl": float(kl.mean()),
        "agreement": agreement,
        "errors": errors,
    }


# --- prompts with an answer --------------------------------------------------------------------


@dataclass
class Scored:
    """How likely a model finds one answer."""

    log_likelihood: float  # of all its tokens together, in nats
    greedy: bool  # whether greedy decoding gives exactly it


@torch.inference_mode()
def score_answers(
    model: Model, prompts: list[Prompt], desc: str = "answers", batch_tokens: int = 4096
) -> list[Scored]:
    """One Scored for each prompt. Prompts of like length share a batch of up to `batch_tokens`."""
    lengths = [len(context) + len(answer) for context, answer in prompts]
    longest_first = sorted(range(len(prompts)), key=lengths.__getitem__, reverse=True)
    scored: dict[int, Scored] = {}

    with progress(total=len(prompts), desc=desc) as bar:
        while len(scored) < len(prompts):
            longest = lengths[longest_first[len(scored)]]
            count = max(1, batch_tokens // longest)
            indices = longest_first[len(scored) : len(scored) + count]

            group = [prompts[i] for i in indices]
            hidden = model.hidden(pad_prompts(group).to(model.device))
            scored |= zip(indices, score_rows(hidden, model.head, group), strict=True)
            bar.update(len(group))
    return [scored[i] for i in range(len(prompts))]


def pad_prompts(prompts: list[Prompt]) -> Tensor:
    """[N, T] ids, padded on the right."""
    rows = [torch.tensor(context + answer) for context, answer in prompts]
    return pad_sequence(rows, batch_first=True)


def score_rows(hidden: Tensor, head: Tensor, prompts: list[Prompt]) -> list[Scored]:
    """hidden [N, T, d]: the final hidden states of a batch from `pad_prompts`."""
    scored = []
    for row, (context, answer) in zip(hidden, prompts, strict=True):
        first = len(context) - 1  # the state that predicts the answer's first token
        logits = linear(row[first : first + len(answer)], head).float()  # (answer, V)
        tokens = torch.tensor(answer, device=logits.device)
        log_likelihood = -F.cross_entropy(logits, tokens, reduction="sum")
        greedy = (logits.argmax(-1) == tokens).all()
        scored.append(Scored(float(log_likelihood), bool(greedy)))
    return scored


# --- passkey recall ----------------------------------------------------------------------------


def passkey_prompts(
    tokenizer: Tokenizer, text: Tensor, length: int, depths=RECALL_DEPTHS, count=4, seed=0
) -> list[Prompt]:
    """`count` prompts of `length` tokens, answer included, for each depth (0 the start, 1 the end),
    each hidden in another part of `text` (ids of any shape)."""
    draw = random.Random(f"{seed} {length}")
    encode = functools.partial(tokenizer.encode, special=False)
    text = text.flatten().repeat(1 + length // text.numel())  # repeats a short text
    head = tokenizer.prefix + encode(PASSKEY_HEAD)
    question = encode(PASSKEY_QUESTION)

    prompts = []
    for depth, _ in itertools.product(depths, range(count)):
        number = str(draw.randrange(10000, 100000))
        needle = encode(PASSKEY_NEEDLE.format(number=number))
        answer = encode(f" {number}")

        room = length - len(head) - len(needle) - len(question) - len(answer)
        start = draw.randrange(max(1, len(text) - room))
        filler = text[start : start + room].tolist()

        before = int(room * depth)
        context = head + filler[:before] + needle + filler[before:room] + question
        prompts.append((context, answer))
    return prompts


def passkey_recall(
    model: Model, tokenizer: Tokenizer, text: Tensor, lengths=RECALL_LENGTHS, count: int = 4
) -> dict[str, float]:
    """{length: share of passkeys that are repeated exactly}, of `count` at each depth."""
    recall = {}
    for length in lengths:
        prompts = passkey_prompts(tokenizer, text, length, count=count)
        scored = score_answers(model, prompts, f"passkey at {length}")
        recall[str(length)] = mean(answer.greedy for answer in scored)
    return recall


# --- what a model writes -----------------------------------------------------------------------


@torch.inference_mode()
def write_on(model: Model, prompts: Tensor) -> dict[str, Tensor]:
    """How a model continues prompts [N, T] of ids, [N, WRITTEN] each: `drawn` with one seed at
    temperature 1, and `greedy`. A row that ends is filled with its end-of-text token."""
    prompts = prompts.to(model.device)
    texts = {}
    for name, temperature in (("drawn", 1.0), ("greedy", 0.0)):
        stream = model.stream(prompts, WRITTEN, temperature=temperature, seed=0)
        tokens = list(progress(stream, desc=f"writing, {name}", total=WRITTEN))
        tokens += tokens[-1:] * (WRITTEN - len(tokens))
        texts[name] = torch.stack(tokens, dim=1)
    return texts


@torch.inference_mode()
def writing_quality(base: Model, prompts: Tensor, ours: dict, theirs: dict) -> dict:
    """The faults of a model's writing, which likelihoods of given text hide (arXiv 2603.26556),
    from what `write_on` gives for it and for the base.

    nats: the base's mean negative log-likelihood of the drawn text, a token
    repeated: the share of the drawn text's 4-grams that occurred in it before
    as_base: greedy tokens until the first that the base would not have written
    `errors` has the standard error of each, from how the continuations differ."""
    drawn = ours["drawn"]
    ids = torch.cat((prompts.to(base.device), drawn), dim=1)
    first = prompts.shape[1] - 1
    nats = []
    for row in ids.split(TEXT_BATCH):
        hidden = base.hidden(row)[:, first:-1]
        for state, tokens in zip(hidden, row[:, first + 1 :]):
            logits = linear(state, base.head).float()
            nats.append(F.cross_entropy(logits, tokens, reduction="none"))
    nats = torch.stack(nats).cpu()  # (N, WRITTEN)

    # What follows an end-of-text token fills the row.
    ends = torch.isin(drawn.cpu(), torch.tensor(base.config.eos_token_ids, dtype=torch.int64))
    written = ends.cumsum(1) - ends.long() == 0
    as_base = (ours["greedy"] == theirs["greedy"]).cumprod(1).sum(1).double().cpu()
    repeated = [repeated_grams(row[:n]) for row, n in zip(drawn.tolist(), written.sum(1).tolist())]

    figures = {
        "nats": (nats * written).sum(1).double() / written.sum(1),
        "repeated": torch.tensor(repeated, dtype=torch.float64),
        "as_base": as_base,
    }
    errors = {name: standard_error(values) for name, values in figures.items()}
    return {name: float(x.mean()) for name, x in figures.items()} | {"errors": errors}


def repeated_grams(ids: list[int], size: int = 4) -> float:
    """The share of the runs of `size` ids that occurred before."""
    grams = list(zip(*(ids[i:] for i in range(size))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# --- question files ----------------------------------------------------------------------------


def read_tasks(paths: list[str]) -> dict[str, list[dict]]:
    """{name: items} of question files. Raises InputError for two files of the same name."""
    tasks = {Path(path).stem: read_task(path) for path in paths}
    require(
        len(tasks) == len(paths),
        f"--tasks {' '.join(paths)}: give files of different names; the report has them by "
        "their names",
    )
    return tasks


def read_task(path: str) -> list[dict]:
    """The items of a question file. Raises InputError for a line that is in none of the three
    formats, or not in that of the first line."""
    items: list[dict] = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            item = json.loads(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
        except (ValueError, RecursionError):  # no JSON, or no UTF-8
            item = None
        kind = task_format(item)
        require(
            kind and kind == task_format(items[0] if items else item),
            f"--tasks {path}: line {number}: give query, choices, gold; or context_options, "
            "continuation, gold; or context, continuation; texts that are not empty and have no "
            "lone surrogates, gold the number of one from 0 on, all lines alike",
        )
        items.append(item)
    require(items, f"--tasks {path}: is empty")
    return items


def task_format(item) -> str | None:
    """`choices`, `context_options` or `context`, by what is scored against each other; None where
    something is missing or wrong."""
    if not isinstance(item, dict):
        return None
    for kind, text in (("choices", "query"), ("context_options", "continuation")):
        if kind in item:
            options, gold = item[kind], item.get("gold")
            right = isinstance(options, list) and are_texts(*options, item.get(text))
            return kind if right and type(gold) is int and 0 <= gold < len(options) else None
    return "context" if are_texts(item.get("context"), item.get("continuation")) else None


def are_texts(*values) -> bool:
    """Whether all are text. Lone surrogates, as of an emoji cut in half, are not."""
    return all(
        isinstance(value, str) and value.strip() and not re.search("[\ud800-\udfff]", value)
        for value in values
    )


def task_prompts(items: list[dict], tokenizer: Tokenizer, reach: int) -> list[list[Prompt]]:
    """The prompts of each item, one for each choice, for a model of `reach` positions. Longer
    ones are cut on the left, as in lm-evaluation-harness, and a line says so. Raises InputError for
    an answer that alone is too long, or has no tokens in this vocabulary."""
    groups = [[encode_pair(*pair, tokenizer) for pair in task_pairs(item)] for item in items]
    cut = 0
    for prompts in groups:
        for i, (context, answer) in enumerate(prompts):
            require(
                context and 0 < len(answer) <= reach,
                f"--tasks: an answer of {len(answer)} tokens after {len(context)}: a model of "
                f"{reach} positions needs 1 to {reach}, after one at least",
            )
            room = reach + 1 - len(answer)  # the last token is only predicted
            cut += len(context) > room
            prompts[i] = (context[-room:], answer)
    if cut:
        total = sum(map(len, groups))
        say_once(f"{cut:,} of {total:,} prompts are longer than {reach:,} tokens: cut on the left")
    return groups


say_once = functools.cache(say)


def task_pairs(item: dict) -> list[tuple[str, str]]:
    """Context and answer for each choice; a space parts them where no white space of the answer's
    own does."""
    if "choices" in item:
        query = item["query"].rstrip()
        if query.startswith("Question:") and not query.endswith("Answer:"):
            query += "\nAnswer:"
        pairs = [(query, choice) for choice in item["choices"]]
    else:
        contexts = item.get("context_options", [item.get("context")])
        pairs = [(context.rstrip(), item["continuation"]) for context in contexts]
    return [(context, text if text[0].isspace() else f" {text}") for context, text in pairs]


def encode_pair(context: str, answer: str, tokenizer: Tokenizer) -> Prompt:
    """Both are encoded together; the answer is what follows the context's own tokens."""
    ids = tokenizer.encode(context + answer, special=False)
    cut = len(tokenizer.encode(context, special=False))
    return tokenizer.prefix + ids[:cut], ids[cut:]


def task_quality(model: Model, tokenizer: Tokenizer, name: str, items: list[dict]) -> dict:
    """The figures of `task_accuracy` for the items of one file."""
    by_item = task_prompts(items, tokenizer, model.config.max_position_embeddings)
    scored = iter(score_answers(model, list(itertools.chain(*by_item)), name))
    return task_accuracy(items, [[next(scored) for _ in prompts] for prompts in by_item])


def task_accuracy(items: list[dict], scored: list[list[Scored]]) -> dict:
    """The figures of one file, from the scored choices of each item: `items`, `accuracy`, and by
    format `accuracy_norm` (by log-likelihood per byte) or `perplexity` (of LAMBADA's last word)
    with its standard error `perplexity_error`."""
    if "gold" not in items[0]:
        answers = [choices[0] for choices in scored]
        nll = torch.tensor([-answer.log_likelihood for answer in answers], dtype=torch.float64)
        value = perplexity(float(nll.mean()))
        return {
            "items": len(items),
            "accuracy": mean(answer.greedy for answer in answers),
            "perplexity": value,
            "perplexity_error": value * standard_error(nll),
        }

    gold = [item["gold"] for item in items]
    values = [[choice.log_likelihood for choice in choices] for choices in scored]
    figures = {"items": len(items), "accuracy": share_right(values, gold)}
    if "choices" in items[0]:
        per_byte = []
        for item, row in zip(items, values, strict=True):
            sizes = [len(text.lstrip().encode()) for text in item["choices"]]
            per_byte.append([value / size for value, size in zip(row, sizes, strict=True)])
        figures["accuracy_norm"] = share_right(per_byte, gold)
    return figures


def share_right(values: list[list[float]], gold: list[int]) -> float:
    """How often the largest value is that of the choice which is right."""
    return mean(row.index(max(row)) == right for row, right in zip(values, gold, strict=True))


# --- statistics --------------------------------------------------------------------------------


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def perplexity(nll: float) -> float:
    """exp(nats a token), held at 1e282: a report is written whatever a model makes of a text."""
    return math.exp(min(nll, 650.0))


def quantile(values, share: float) -> float:
    """The value that this share of the others lies below: 0.5 for the median."""
    return sorted(values)[int(share * (len(values) - 1) + 0.5)]


def standard_error(values: Tensor) -> float:
    """Of the mean of values [N]; 0 where one value alone tells nothing about it."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def share_error(share: float, count: int) -> float:
    """The standard error of a share of `count` trials. It is that of the beta distribution which
    the trials leave of a share that could have been any: the binomial sqrt(p (1 - p) / n) in large
    counts, while 5 of 5 are not told as certain."""
    right = share * count
    return ((right + 1) * (count - right + 1) / (count + 3)) ** 0.5 / (count + 2)
