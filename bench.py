"""Measurements. This file's `quality` asks what a conversion cost: models side by side, on the same text and questions.

    python bench.py quality --model out/smollm2 --base DIR --valid FILE --tasks FILE... [--limit N]

On text: perplexity, KL(base || model) per token, and top-1 agreement, how often both name the same next token. Perplexity
alone hides what a window loses, since most words follow from the last few; so the table also has passkey recall by context
length and depth: a number is hidden in long text and must be repeated at its end (arXiv 2305.16300, section 4.3).
On tasks: multiple choice (`query`, `choices`, `gold`: the choice of the highest log-likelihood, raw and per byte),
Winograd-style (`context_options`, `continuation`, `gold`: the context that makes the continuation likeliest), and LAMBADA
(`context`, `continuation`: greedy decoding gives exactly the last word). The last line printed is one JSON document.
"""

import argparse
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from distill import C4, pack, read_documents
from kernels import ROWS, by_rows, logit_kl
from model import InputError, Model, Tokenizer, load_model, load_tokenizer

RECALL_LENGTHS = (256, 512, 1024, 2048)
RECALL_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


# --- this machine -----------------------------------------------------------------------------------------------------

def pick_device(name: str | None) -> str:
    """The device that was asked for, or the GPU when there is one. Raises InputError where torch has no such device."""
    try:
        torch.empty(0, device=name or "cpu")
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: torch has no such device here; use cpu, or cuda where there is a GPU") from None
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(device: str) -> str:
    """bfloat16 on a GPU that has it, and on a CPU where a product of matrices is faster in it."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times[dtype] = math.inf
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            times[dtype] = min(times[dtype], time.perf_counter() - start)
    return "bfloat16" if times[torch.bfloat16] < 0.8 * times[torch.float32] else "float32"


# --- text --------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def text_quality(models: dict[str, Model], base: Model, tokenizer: Tokenizer, sequences: Tensor, batch: int = 4) -> dict[str, dict]:
    """{name: perplexity, bits_per_byte, kl, agreement} on sequences [N, T]; `base` is what kl and agreement are measured
    against. Bits per UTF-8 byte are perplexity made comparable between tokenizers."""
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in models}       # negative log-likelihood, KL, same top-1
    for ids in tqdm(sequences.to(base.device).split(batch), desc="text", unit="batch", leave=False):
        base_hidden = base.hidden(ids)
        for name, model in models.items():
            hidden = base_hidden if model is base else model.hidden(ids)
            for i in range(ids.shape[0]):
                sums[name] += compare_rows(hidden[i], model.head, base_hidden[i], base.head, ids[i])
    predicted, positions = sequences[:, 1:].numel(), sequences.numel()
    size = len(tokenizer.decode_bytes(sequences[:, 1:].flatten().tolist()))
    return {name: {"perplexity": math.exp(nll / predicted), "bits_per_byte": nll / math.log(2) / size,
                   "kl": kl / positions, "agreement": same / positions}
            for name, (nll, kl, same) in ((name, total.tolist()) for name, total in sums.items())}


def compare_rows(hidden: Tensor, head: Tensor, base_hidden: Tensor, base_head: Tensor, ids: Tensor) -> Tensor:
    """One sequence [T]: its negative log-likelihood, KL(base || model), and equal top-1 tokens, summed over positions."""
    following = torch.cat((ids[1:], ids.new_zeros(1)))          # nothing is known to follow the last one
    figures = torch.cat([torch.stack(fused_comparison(h @ head.T, base @ base_head.T, after)) for h, base, after in
                         zip(hidden.split(ROWS), base_hidden.split(ROWS), following.split(ROWS))], dim=1)
    figures[0, -1] = 0                                          # so it counts no likelihood
    return figures.double().sum(1).cpu()


def compare_logits(logits: Tensor, base_logits: Tensor, following: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [rows, V] and the tokens that follow [rows] -> negative log-likelihood, KL, equal top-1, each [rows]."""
    likelihood = logits.float().log_softmax(-1).gather(-1, following[:, None])[:, 0]
    return -likelihood, logit_kl(logits, base_logits), (logits.argmax(-1) == base_logits.argmax(-1)).float()


fused_comparison = by_rows(compare_logits)


# --- prompts with an answer --------------------------------------------------------------------------------------

@dataclass
class Scored:
    """What a model made of one answer: its log-likelihood in nats, and whether greedy decoding gives exactly it."""
    log_likelihood: float
    greedy: bool


@torch.inference_mode()
def score_answers(model: Model, prompts: list[tuple[list[int], list[int]]], desc: str = "",
                  batch_tokens: int = 4096) -> list[Scored]:
    """One Scored for each (context ids, answer ids). Prompts of like length share a batch, padded on the right; logits are
    made at the answers' positions alone."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i][0]) - len(prompts[i][1]))
    results: list = [None] * len(prompts)
    with tqdm(total=len(prompts), desc=desc, leave=False, disable=not desc) as bar:
        while order:
            longest = sum(map(len, prompts[order[0]]))
            group, order = order[:max(1, batch_tokens // longest)], order[max(1, batch_tokens // longest):]
            ids = torch.zeros(len(group), longest, dtype=torch.int64)
            for row, i in enumerate(group):
                ids[row, :sum(map(len, prompts[i]))] = torch.tensor(prompts[i][0] + prompts[i][1])
            hidden = model.hidden(ids.to(model.device))
            for row, i in enumerate(group):
                context, answer = prompts[i]
                results[i] = score_hidden(hidden[row, len(context) - 1:len(context) + len(answer) - 1], model.head, answer)
            bar.update(len(group))
    return results


def score_hidden(hidden: Tensor, head: Tensor, answer: list[int]) -> Scored:
    """hidden [len(answer), d]: the states that predict each token of the answer."""
    logits = (hidden @ head.T).float()
    answer = torch.tensor(answer, device=logits.device)
    likelihood = logits.log_softmax(-1).gather(-1, answer[:, None]).sum()
    return Scored(float(likelihood), bool((logits.argmax(-1) == answer).all()))


# --- passkey recall ----------------------------------------------------------------------------------------------

def passkey_prompts(tokenizer: Tokenizer, text: Tensor, length: int, depths=RECALL_DEPTHS, count: int = 4, seed: int = 0):
    """[(depth, (context ids, answer ids))]: `count` prompts of `length` tokens for each depth (0 the start, 1 the end),
    each hidden in another part of `text` (ids of any shape)."""
    draw = random.Random(f"{seed} {length}")
    text = text.flatten().repeat(1 + length // text.numel())            # a short text is told again
    encode = lambda text: tokenizer.encode(text, special=False)
    head = tokenizer.prefix + encode("There is important information hidden in a lot of irrelevant text. "
                                     "Find it and remember it.\n")
    question = encode("\nWhat is the pass key? The pass key is")
    prompts = []
    for depth in depths:
        for _ in range(count):
            number = str(draw.randrange(10000, 100000))
            needle = encode(f"\nThe pass key is {number}. Remember it. {number} is the pass key.\n")
            answer = encode(f" {number}")
            room = length - len(head) - len(needle) - len(question) - len(answer)
            before, at = int(room * depth), draw.randrange(max(1, len(text) - room))
            filler = text[at:at + room].tolist()
            context = head + filler[:before] + needle + filler[before:room] + question
            prompts.append((depth, (context, answer)))
    return prompts


def passkey_recall(model: Model, tokenizer: Tokenizer, text: Tensor, lengths=RECALL_LENGTHS, count: int = 4) -> dict:
    """{"recall": {length: share repeated exactly}, "recall_by_depth": {length: {depth: share}}}"""
    by_depth: dict = {}
    for length in lengths:
        prompts = passkey_prompts(tokenizer, text, length, count=count)
        scored = score_answers(model, [prompt for _, prompt in prompts], f"passkey at {length}")
        found = lambda depth: mean(s.greedy for (d, _), s in zip(prompts, scored) if d == depth)
        by_depth[str(length)] = {str(depth): found(depth) for depth in RECALL_DEPTHS}
    return {"recall": {length: mean(row.values()) for length, row in by_depth.items()}, "recall_by_depth": by_depth}


# --- tasks -------------------------------------------------------------------------------------------------------

def read_task(path: str, limit: int | None = None) -> list[dict]:
    """The items of a task file, the first `limit` of them. Raises InputError for a line in none of the three formats."""
    formats = ({"query", "choices", "gold"}, {"context_options", "continuation", "gold"}, {"context", "continuation"})
    items = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--tasks {path}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines[:limit], 1):
        try:
            item = json.loads(line)
        except json.JSONDecodeError:
            item = {}
        if not any(keys <= set(item) for keys in formats):
            raise InputError(f"--tasks {path}: line {number}: give query, choices, gold; or context_options, continuation, "
                             "gold; or context, continuation")
        items.append(item)
    if not items:
        raise InputError(f"--tasks {path}: is empty")
    return items


def task_prompts(item: dict, tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """The (context ids, answer ids) of one item, one for each choice. Context and answer are encoded together, and the
    answer is what follows the context's own tokens."""
    if "choices" in item:
        query = item["query"].rstrip()
        query += "\nAnswer:" if query.startswith("Question:") else ""
        pairs = [(query, choice) for choice in item["choices"]]
    else:
        pairs = [(context, item["continuation"]) for context in item.get("context_options", [item.get("context")])]
    prompts = []
    for context, answer in pairs:
        ids = tokenizer.encode(f"{context.rstrip()} {answer}", special=False)
        cut = len(tokenizer.encode(context.rstrip(), special=False))
        prompts.append((tokenizer.prefix + ids[:cut], ids[cut:]))
    return prompts


def task_accuracy(items: list[dict], scored: list[list[Scored]]) -> dict:
    """The figures of one file from its scored choices: `accuracy`, and by kind `accuracy_norm` (log-likelihood per byte of
    the choice) or `perplexity` (of LAMBADA's last word)."""
    best = lambda values: max(range(len(values)), key=values.__getitem__)
    figures: dict = {"items": len(items)}
    if "gold" not in items[0]:
        perplexity = math.exp(-mean(answer.log_likelihood for answer, in scored))
        return figures | {"accuracy": mean(answer.greedy for answer, in scored), "perplexity": perplexity}
    figures["accuracy"] = mean(best([c.log_likelihood for c in s]) == item["gold"] for item, s in zip(items, scored))
    if "choices" in items[0]:
        per_byte = lambda item, s: [c.log_likelihood / len(choice.encode()) for c, choice in zip(s, item["choices"])]
        figures["accuracy_norm"] = mean(best(per_byte(item, s)) == item["gold"] for item, s in zip(items, scored))
    return figures


def task_quality(model: Model, tokenizer: Tokenizer, path: str, limit: int | None = None) -> dict:
    items = read_task(path, limit)
    prompts = [task_prompts(item, tokenizer) for item in items]
    scored = iter(score_answers(model, [prompt for item in prompts for prompt in item], Path(path).stem))
    return task_accuracy(items, [[next(scored) for _ in item] for item in prompts])


def cache_bytes(model: Model, tokens: int) -> int:
    """What one sequence of this many tokens keeps in the cache."""
    layers = model.new_cache(1, tokens, "meta").layers
    return sum(x.numel() * x.element_size() for layer in layers if layer for x in vars(layer).values()
               if isinstance(x, Tensor))


@torch.inference_mode()
def decode_rates(models: dict[str, Model], batch: int = 32, context: int = 1024, steps: int = 12) -> dict[str, float]:
    """{name: tokens/s} of decoding: `batch` sequences that hold about `context` tokens each, one token a step for all of
    them, from the median of the steps. The models take turns, so that all meet the same machine. What the caches hold
    does not change the cost: they start out as zeros."""
    caches, times = {}, {name: [] for name in models}
    for name, model in models.items():
        caches[name] = model.new_cache(batch, context)
        caches[name].positions += context - steps - 1
    token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    for _ in range(steps + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(token, caches[name]).argmax(-1).tolist()
            times[name].append(time.perf_counter() - start)
    return {name: batch / sorted(seconds[1:])[steps // 2] for name, seconds in times.items()}


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


# --- side by side ------------------------------------------------------------------------------------------------

def evaluate(models: dict[str, Model], base: Model, tokenizer: Tokenizer, valid: Tensor, tasks: list[str],
             limit: int | None = None, lengths=RECALL_LENGTHS) -> dict[str, dict]:
    """The figures of every model under its name: plan, perplexity, bits_per_byte, kl, agreement, recall, recall_by_depth,
    tasks, cache_bytes and decode_tokens_per_second. valid [N, T] ids is the text, and what the passkeys are hidden in."""
    report = {name: {"plan": model.plan} for name, model in models.items()}
    rates = decode_rates(models)
    for name, figures in text_quality(models, base, tokenizer, valid).items():
        report[name] |= figures
    for name, model in models.items():
        report[name]["cache_bytes"] = {str(tokens): cache_bytes(model, tokens) for tokens in (1024, 8192)}
        report[name]["decode_tokens_per_second"] = rates[name]
        reach = [length for length in lengths if length <= model.config.max_position_embeddings]
        report[name] |= passkey_recall(model, tokenizer, valid, reach)
        report[name]["tasks"] = {Path(path).stem: task_quality(model, tokenizer, path, limit) for path in tasks}
    return report


def table(report: dict[str, dict]) -> list[list[str]]:
    """The rows of a side-by-side table, the first one its head."""
    rows: dict[str, dict[str, str]] = {}
    for name, figures in report.items():
        add = lambda label, value, form: rows.setdefault(label, {}).__setitem__(name, format(value, form))
        add("bits per byte", figures["bits_per_byte"], ".3f")
        add("perplexity", figures["perplexity"], ".2f")
        add("KL to the base, nats/token", figures["kl"], ".4f")
        add("top-1 agreement", figures["agreement"], ".1%")
        for length, share in figures["recall"].items():
            add(f"passkey recall at {length}", share, ".0%")
        for task, result in figures["tasks"].items():
            for key, label, form in (("accuracy", "accuracy", ".1%"), ("accuracy_norm", "accuracy, per byte", ".1%"),
                                     ("perplexity", "perplexity", ".2f")):
                if key in result:
                    add(f"{task} {label} ({result['items']})", result[key], form)
        for tokens, size in figures["cache_bytes"].items():
            add(f"cache of a sequence of {tokens}, MiB", size / 2**20, ".2f")
        add("decode, tokens/s (32 sequences of 1024)", figures["decode_tokens_per_second"], ",.0f")
    return [["", *report]] + [[label, *(values.get(name, "") for name in report)] for label, values in rows.items()]


def format_table(rows: list[list[str]]) -> str:
    """Aligned for a terminal, and Markdown at the same time."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    line = lambda row: "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def quality(args) -> dict:
    """The `quality` command: {base, model: figures}, printed as a table."""
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or pick_dtype(device))
    load = lambda name: load_model(name, dtype=dtype, device=device)
    model, tokenizer = load(args.model), load_tokenizer(args.model)
    base = load(args.base) if args.base else model
    if base.config.vocab_size != model.config.vocab_size:
        raise InputError(f"--base {args.base}: has a vocabulary of {base.config.vocab_size}, --model {args.model} one of "
                         f"{model.config.vocab_size}; compare a model with its own original")
    valid = pack(read_documents(args.valid, "--valid"), tokenizer, model.config.eos_token_ids, 1024, args.sequences * 1024)
    if not len(valid):
        raise InputError(f"--valid {args.valid}: too little text; 1024 tokens are needed at least")
    models = {"base": base, "model": model} if args.base else {"model": model}
    report = evaluate(models, base, tokenizer, valid, args.tasks, args.limit)
    print(format_table(table(report)))
    return report


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Measures models: what a conversion cost.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("quality", help="text, tasks and passkey recall, side by side").add_argument
    add("--model", required=True, help="a folder or Hub id")
    add("--base", help="the original to compare with")
    add("--valid", default=C4, help="a .txt, .jsonl, .jsonl.gz, folder or hub:DATASET/FILE [one shard of C4]")
    add("--sequences", type=int, default=32, help="how many sequences of 1,024 tokens of it [32]")
    add("--tasks", nargs="+", default=[], help="question files")
    add("--limit", type=int, help="only the first items of each")
    add("--device", help="cpu or cuda [the GPU when there is one]")
    add("--dtype", choices=("bfloat16", "float32"), help="[bfloat16 where it is faster here]")
    args = parser.parse_args(argv)
    try:
        report = quality(args)
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"command": args.command, **vars(args), "report": report}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
