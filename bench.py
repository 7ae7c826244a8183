"""Measurements: what a conversion cost in quality, and what it bought in speed.

    python bench.py quality --model out/smollm2 --base DIR --valid FILE --tasks FILE... [--limit N]

On text: perplexity, KL(base || model) per token, and top-1 agreement, how often both name the same next token. Perplexity
alone hides what a window loses, since most words follow from the last few; so the table also has passkey recall by context
length and depth: a number is hidden in long text and must be repeated at its end (arXiv 2305.16300, section 4.3).
On tasks: multiple choice (`query`, `choices`, `gold`: the choice of the highest log-likelihood, raw and per byte),
Winograd-style (`context_options`, `continuation`, `gold`: the context that makes the continuation likeliest), and LAMBADA
(`context`, `continuation`: greedy decoding gives exactly the last word).

    python bench.py decode   --model DIR | --shape NAME  [--plan P] --batch 16 --lengths 256,1024,4096,8192
    python bench.py serve    --model DIR | --shape NAME  [--plan P] --concurrency 50,100,200 --prompt 256 --output 256
    python bench.py roofline --model DIR | --shape NAME  [--plan P] --hardware a10,h100,this

Serving has two phases. *Prefill* reads a prompt, all its tokens at once: its products of matrices keep the arithmetic units
busy, and it costs operations. *Decoding* makes one token a step for each sequence, and reads all weights and all caches to do
so: it costs bytes. The weights are shared by the batch and each sequence has a cache of its own, so at large batch and long
context the cache is what a step's time goes into, and that is what a plan makes smaller. `roofline` counts both kinds of
cost, `decode` and `serve` measure, and give the measured time over that floor.

The last line that a command prints is one JSON document.
"""

import argparse
import ctypes
import importlib.util
import itertools
import json
import math
import os
import random
import resource
import sys
import tempfile
import time
import timeit
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import kernels
from distill import C4, pack, read_documents
from kernels import ROWS, by_rows, feature_size, linear, logit_kl
from model import (Engine, InputError, Model, Request, Tokenizer, convert, load_model, load_tokenizer,
                   parse_plan, prefill, read_config, rotary_frequencies)

RECALL_LENGTHS = (256, 512, 1024, 2048)
RECALL_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


# --- this machine -----------------------------------------------------------------------------------------------------

def set_up(eager: bool) -> None:
    """For the whole process: whether anything is compiled, and that memory which is freed stays with it. The C library would give
    blocks of over 128 KiB back and ask for them anew, 60,000 page faults in a prompt of 512 tokens (mallopt(3); results/speed.md)."""
    torch.compiler.set_stance("force_eager" if eager else "default")
    kernels.CPP = not eager
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3                                     # their numbers in malloc.h
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**30), mallopt(mmap_threshold, 2**25)              # 2^25 is the most that the second takes


def pick_device(name: str | None) -> str:
    """The device that was asked for, or the GPU when there is one. Raises InputError for a device that is neither, or is not here."""
    try:
        known = torch.empty(0, device=name or "cpu").device.type in ("cpu", "cuda")
    except (RuntimeError, AssertionError):
        known = False
    if not known:
        raise InputError(f"--device {name}: there is no such device here; use cpu, or cuda where there is a GPU")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(device: str) -> str:
    """bfloat16 on a GPU that has it, and on a CPU where a product of matrices is faster in it."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"

    def seconds(dtype: torch.dtype) -> float:
        a, weight = torch.ones(512, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        return min(timeit.repeat(lambda: a @ weight.T, number=1, repeat=5))
    return "bfloat16" if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else "float32"


# --- text --------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def text_quality(models: dict[str, Model], base: Model, tokenizer: Tokenizer, sequences: Tensor, batch: int = 4) -> dict[str, dict]:
    """{name: perplexity, bits_per_byte, kl, agreement} on sequences [N, T]; `base` is what kl and agreement are measured
    against. Bits per UTF-8 byte of the text, its special tokens left out, are perplexity made comparable between tokenizers."""
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in models}       # negative log-likelihood, KL, same top-1
    for ids in tqdm(sequences.to(base.device).split(batch), desc="text", unit="batch", leave=False):
        base_hidden = base.hidden(ids)
        for name, model in models.items():
            hidden = base_hidden if model is base else model.hidden(ids)
            for i in range(ids.shape[0]):
                sums[name] += compare_rows(hidden[i], model.head, base_hidden[i], base.head, ids[i])
    predicted, positions = sequences[:, 1:].numel(), sequences.numel()
    special = set(tokenizer.added.values())
    size = len(tokenizer.decode_bytes([id for id in sequences[:, 1:].flatten().tolist() if id not in special]))
    return {name: {"perplexity": math.exp(nll / predicted), "bits_per_byte": nll / math.log(2) / size,
                   "kl": kl / positions, "agreement": same / positions}
            for name, (nll, kl, same) in ((name, total.tolist()) for name, total in sums.items())}


def compare_rows(hidden: Tensor, head: Tensor, base_hidden: Tensor, base_head: Tensor, ids: Tensor) -> Tensor:
    """One sequence [T]: its negative log-likelihood, KL(base || model), and equal top-1 tokens, summed over positions."""
    following = torch.cat((ids[1:], ids.new_zeros(1)))          # nothing is known to follow the last one
    figures = torch.cat([torch.stack(fused_comparison(linear(h, head), linear(base, base_head), after)) for h, base, after in
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
    logits = linear(hidden, head).float()
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
    """The items of a task file, the first `limit` of them. Raises InputError for a line that is in none of the three formats, or not
    in that of the first line."""
    items, kinds = [], set()
    try:
        with open(path, encoding="utf-8") as file:
            lines = list(itertools.islice(file, limit))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--tasks {path}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(lines, 1):
        try:
            items.append(json.loads(line))
        except json.JSONDecodeError:
            items.append({})
        kinds.add(task_format(items[-1]))
        if None in kinds or len(kinds) > 1:
            raise InputError(f"--tasks {path}: line {number}: give query, choices, gold; or context_options, continuation, gold; or "
                             "context, continuation; texts that are not empty, gold the number of one from 0 on, all lines alike")
    if not items:
        raise InputError(f"--tasks {path}: is empty")
    return items


def task_format(item) -> str | None:
    """`choices`, `context_options` or `context`, by what is scored against each other; None where something is missing or wrong."""
    item = item if isinstance(item, dict) else {}
    filled = lambda *texts: all(isinstance(text, str) and text.strip() for text in texts)
    for options, text in (("choices", "query"), ("context_options", "continuation")):
        if options in item:
            given, gold = item[options], item.get("gold")
            fits = isinstance(given, list) and filled(*given, item.get(text)) and type(gold) is int and 0 <= gold < len(given)
            return options if fits else None
    return "context" if filled(item.get("context"), item.get("continuation")) else None


def read_tasks(paths: list[str], limit: int | None) -> dict[str, list[dict]]:
    """{name: items} of task files. Raises InputError for two of one name and where `read_task` does."""
    tasks = {Path(path).stem: read_task(path, limit) for path in paths}
    if len(tasks) < len(paths):
        raise InputError(f"--tasks {' '.join(paths)}: give files of different names; the report has them by their names")
    return tasks


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


def task_quality(model: Model, tokenizer: Tokenizer, name: str, items: list[dict]) -> dict:
    prompts = [task_prompts(item, tokenizer) for item in items]
    scored = iter(score_answers(model, [prompt for item in prompts for prompt in item], name))
    return task_accuracy(items, [[next(scored) for _ in item] for item in prompts])


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def quantile(values, share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1) + 0.5)]


# --- speed -------------------------------------------------------------------------------------------------------

def cache_bytes(model: Model, tokens: int) -> int:
    """What one sequence of this many tokens keeps in the cache."""
    return model.new_cache(1, tokens, "meta").bytes


@torch.inference_mode()
def decode_times(engines: dict[str, Engine], context: int, steps: int = 12) -> dict[str, list[float]]:
    """{name: seconds of each step, sorted}, all slots live and holding about `context` tokens. The engines take turns, so that
    all meet the same machine. What the caches hold does not change the cost: zeros here. Raises InputError for a context shorter than
    the steps."""
    if context < steps + 3:
        raise InputError(f"--lengths, --prompt: {context} tokens are too few for {steps} steps; give {steps + 3} or more")
    times: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.live = [Request(torch.zeros(context), 1)] * engine.slots
        engine.cache.positions.fill_(context - steps - 3)
    for step in range(steps + 2):                                               # two to warm up
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.step().tolist()
            times[name] += [time.perf_counter() - start] * (step >= 2)
    for engine in engines.values():
        engine.live = []
        engine.cache.positions.zero_()
    return {name: sorted(seconds) for name, seconds in times.items()}


# --- side by side ------------------------------------------------------------------------------------------------

def evaluate(models: dict[str, Model], base: Model, tokenizer: Tokenizer, valid: Tensor, tasks: dict[str, list[dict]],
             passkeys: int = 20) -> dict[str, dict]:
    """The figures of every model under its name: plan, perplexity, bits_per_byte, kl, agreement, recall, recall_by_depth,
    tasks, cache_bytes and decode_tokens_per_second. valid [N, T] ids is the text, and what the passkeys are hidden in, about
    `passkeys` of them at each length."""
    for model in models.values():
        model.pack()
    report = {name: {"plan": model.plan} for name, model in models.items()}
    times = decode_times({name: Engine(model, 32) for name, model in models.items()}, 1024)
    for name, figures in text_quality(models, base, tokenizer, valid).items():
        report[name] |= figures
    for name, model in models.items():
        report[name]["cache_bytes"] = {str(tokens): cache_bytes(model, tokens) for tokens in (1024, 8192)}
        report[name]["decode_tokens_per_second"] = 32 / quantile(times[name], 0.5)
        reach = [length for length in RECALL_LENGTHS if length <= model.config.max_position_embeddings]
        report[name] |= passkey_recall(model, tokenizer, valid, reach, max(1, passkeys // len(RECALL_DEPTHS)))
        report[name]["tasks"] = {task: task_quality(model, tokenizer, task, items) for task, items in tasks.items()}
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
    tasks = read_tasks(args.tasks, args.limit)
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or pick_dtype(device))
    load = lambda name: load_model(name, dtype=dtype, device=device)
    model, tokenizer = load(args.model), load_tokenizer(args.model)
    base = load(args.base) if args.base else model
    if base.config.vocab_size != model.config.vocab_size:
        raise InputError(f"--base {args.base}: has a vocabulary of {base.config.vocab_size}, --model {args.model} one of "
                         f"{model.config.vocab_size}; compare a model with its own original")
    context = min(1024, model.config.max_position_embeddings)
    valid = pack(read_documents(args.valid, "--valid"), tokenizer, model.config.eos_token_ids, context, args.sequences * context)
    if not len(valid):
        raise InputError(f"--valid {args.valid}: too little text; {context} tokens are needed at least")
    models = {"base": base, "model": model} if args.base else {"model": model}
    report = evaluate(models, base, tokenizer, valid, tasks, args.passkeys)
    print(format_table(table(report)))
    return report


# --- the floor ---------------------------------------------------------------------------------------------------

@dataclass
class Hardware:
    bandwidth: float        # bytes/s from memory
    rate: float             # bf16 operations/s, a multiplication and an addition being two
    memory: float           # bytes


HARDWARE = {"a10": Hardware(600e9, 125e12, 24e9), "h100": Hardware(3.35e12, 989e12, 80e9)}     # NVIDIA's data sheets


def measure_hardware(device: str, dtype: torch.dtype) -> Hardware:
    """This machine's copying bandwidth and its rate of multiplying matrices, the best of several tries. As in a linear layer, x W^T:
    where bfloat16 is emulated torch takes 66 times as long for x W (2,048 x 2,048, AVX2)."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    best = lambda run: min(timeit.repeat(lambda: (run(), wait()), number=1, repeat=6))
    size = 8192 if device.startswith("cuda") else 2048                          # many times what it takes to start a product
    source, a = torch.ones(2**28, dtype=torch.uint8, device=device), torch.ones(size, size, dtype=dtype, device=device)
    target = torch.empty_like(source)
    memory = torch.cuda.mem_get_info()[1] if device.startswith("cuda") else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(2 * source.numel() / best(lambda: target.copy_(source)), 2 * size**3 / best(lambda: a @ a.T), memory)


def step_costs(model: Model, batch: int, context: int) -> dict[str, tuple[float, float]]:
    """{part: (bytes, operations)} of one decoding step for `batch` sequences that hold `context` tokens each.

    Weights and head are read once for all. A softmax layer reads 2 G D numbers for every token of every sequence; an L layer
    those of its window and sinks, and it reads and writes S and z, G F (D + 1) float32 numbers.
    """
    c, size, S, L = model.config, model.norm.weight.element_size(), model.plan.count("S"), model.plan.count("L")
    H, G, D, features = c.num_attention_heads, c.num_key_value_heads, c.head_dim, feature_size(c.feature_map, c.head_dim)
    attention, mlp, head = 2 * (H + G) * D * c.hidden_size, 3 * c.hidden_size * c.intermediate_size, c.vocab_size * c.hidden_size
    weights = (S + L) * attention + len(c.plan) * mlp
    local, state = min(context, c.window + c.sinks), features * (D + 1)
    maps = L * (H + G) * D * D if features else 0
    return {"weights": (size * weights + 4 * maps, 2 * (weights + maps) * batch),
            "softmax cache": (S * batch * context * 2 * size * G * D, S * batch * context * 4 * H * D),
            "window": (L * batch * local * 2 * size * G * D, L * batch * local * 4 * H * D),
            "state": (L * batch * 8 * G * state, L * batch * 2 * (G + H) * state),
            "head": (size * head, 2 * head * batch)}


def prefill_operations(model: Model, tokens: int) -> float:
    """For a prompt of `tokens`: the operations of a step for each token at half the context, its head for the last one only."""
    costs = step_costs(model, 1, tokens // 2)
    return tokens * sum(operations for part, (_, operations) in costs.items() if part != "head") + costs["head"][1]


def floor_seconds(costs: dict, hardware: Hardware) -> float:
    """The parts run one after the other, each for as long as its bytes or its operations take, whichever is longer."""
    return sum(max(size / hardware.bandwidth, operations / hardware.rate) for size, operations in costs.values())


def weight_bytes(model: Model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def fitting_slots(model: Model, tokens: int, memory: float) -> int:
    """How many sequences of this many tokens fit beside the weights. Raises InputError where none does."""
    slots = int((memory - weight_bytes(model)) // max(1, cache_bytes(model, tokens)))        # without attention there is no cache
    if slots < 1:
        raise InputError(f"--memory, --hardware: {memory / 2**30:.1f} GiB hold the weights ({weight_bytes(model) / 2**30:.1f} GiB) and no "
                         f"sequence of {tokens} tokens; give more")
    return slots


# --- the speed commands ------------------------------------------------------------------------------------------

SHAPES = {      # hidden_size, intermediate_size, layers, heads, key/value heads, head_dim, vocab_size, tied head
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152, True), "llama3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama3.2-3b": (3072, 8192, 28, 24, 8, 128, 128256, True), "llama3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 128, 152064, False)}


def build_shape(name: str, dtype: torch.dtype, device: str) -> Model:
    """A known architecture with random weights: as fast as the real one."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "vocab_size", "tie_word_embeddings")
    raw = dict(zip(keys, SHAPES[name])) | {"model_type": "qwen2" if "qwen" in name else "llama", "rms_norm_eps": 1e-5}
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        model = Model(read_config(Path(folder)))
    weights = {name: torch.empty_like(p, dtype=dtype, device=device).normal_(std=0.02) for name, p in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    model.frequencies = rotary_frequencies(model.config).to(device)
    return model.requires_grad_(False)


def load_pair(args) -> tuple[dict[str, Model], Hardware]:
    """{"dense": the model, "converted": its weights under --plan, the tails untrained, which no time shows}; this machine."""
    if bool(args.shape) == bool(args.model):
        raise InputError("--model, --shape: give one of the two")
    if args.plot and (Path(args.plot).suffix not in (".svg", ".png", ".pdf") or not Path(args.plot).parent.is_dir()):
        raise InputError(f"--plot {args.plot}: give a .svg, .png or .pdf file in a folder that exists")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise InputError("--plot: needs matplotlib; pip install matplotlib, or leave --plot out")
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.command == "roofline" else pick_dtype(device)))
    torch.manual_seed(0)
    place = "meta" if args.command == "roofline" else device                    # that one asks for sizes alone
    dense = build_shape(args.shape, dtype, place) if args.shape else load_model(args.model, dtype=dtype, device=device)
    if set(dense.plan) != {"S"}:
        raise InputError(f"--model {args.model}: is converted already; give the original, and --plan {dense.plan}")
    n, few = len(dense.layers), round(len(dense.layers) * 4 / 15)               # of SmolLM2's 30 layers 8
    plan = parse_plan(args.plan, n) if args.plan else "S" * few + "L" * (n - 2 * few) + "X" * few
    this = measure_hardware(device, dtype)
    print(f"{args.shape or args.model}, {str(dtype)[6:]} on {device}, {torch.get_num_threads()} threads; copies at {this.bandwidth / 1e9:,.1f} "
          f"GB/s, multiplies matrices at {this.rate / 1e12:,.3f} Tflop/s\nconverted: {plan}", flush=True)
    return {"dense": dense, "converted": convert(dense, plan, args.window, args.sinks)}, this


def decode(args) -> list[dict]:
    """The `decode` command: steps of a full batch at each length, dense and converted in turn, and prompts read alone."""
    models, this = load_pair(args)
    engines = {name: Engine(model, args.batch, compiled=not args.no_compile) for name, model in models.items()}
    prefill_seconds(models["dense"], 1)                                         # compiles the C++ of prompts
    report = []
    for length in tqdm(args.lengths, desc="decoding", unit="length", leave=False):
        times = decode_times(engines, length, args.steps)
        for name, model in models.items():
            step, floor = quantile(times[name], 0.5), floor_seconds(step_costs(model, args.batch, length), this)
            report.append({"context": length, "model": name, "step_ms": step * 1e3, "tokens_per_second": args.batch / step,
                           "quartiles_ms": [quantile(times[name], q) * 1e3 for q in (0.25, 0.75)],
                           "gain": quantile(times["dense"], 0.5) / step, "floor_ms": floor * 1e3, "over_floor": step / floor,
                           "cache_mib": cache_bytes(model, length) / 2**20,
                           "prefill_tokens_per_second": length / prefill_seconds(model, length)})
    print_figures(report, {"context": "{context:,}", "": "{model}", "ms a step": "{step_ms:.2f}", "quartiles": "{quartiles_ms[0]:.2f} to "
                           "{quartiles_ms[1]:.2f}", "tokens/s": "{tokens_per_second:,.0f}", "gain": "{gain:.2f}", "over floor": "{over_floor:.2f}",
                           "cache MiB/sequence": "{cache_mib:.2f}", "prefill tokens/s": "{prefill_tokens_per_second:,.0f}"})
    print(peak_memory())
    plot(args.plot, report, "context", "step_ms", f"milliseconds a step, batch {args.batch}")
    return report


@torch.inference_mode()
def prefill_seconds(model: Model, tokens: int) -> float:
    """A prompt read as the engine reads one, in chunks."""
    cache, prompt = model.new_cache(1, 0), torch.zeros(tokens, dtype=torch.int64, device=model.device)
    start = time.perf_counter()
    for hidden, _ in prefill(model, prompt, cache):
        hidden.tolist()                         # waits for the device
    return time.perf_counter() - start


def serve(args) -> list[dict]:
    """The `serve` command: a closed loop of clients, each sending its next request when its last is answered."""
    models, this = load_pair(args)
    longest = sum(mean + int(args.spread * mean) for mean in (args.prompt, args.output))
    report: list[dict] = []
    prefill_seconds(models["dense"], 1)                                         # compiles the C++ of prompts
    for clients in args.concurrency:
        for name, model in models.items():
            slots = min(clients, fitting_slots(model, longest, args.memory)) if args.memory else clients
            engine = Engine(model, slots, compiled=not args.no_compile)
            decode_times({name: engine}, args.prompt, 1)                # compiles
            figures = serve_requests(engine, clients, make_requests(args, clients, model))
            step = floor_seconds(step_costs(model, slots, args.prompt + args.output // 2), this)
            floor = args.output / (prefill_operations(model, args.prompt) / this.rate + args.output * step / slots)
            rate = figures["tokens_per_second"]
            report.append({"clients": clients, "model": name, "slots": slots, **figures, "over_floor": floor / rate,
                           "gain": 1.0 if name == "dense" else rate / report[-1]["tokens_per_second"],
                           "memory_gib": (weight_bytes(model) + slots * cache_bytes(model, longest)) / 2**30})
            print(f"{clients} clients, {name}: {rate:,.0f} output tokens/s", flush=True)
    print_figures(report, {"clients": "{clients}", "": "{model}", "slots": "{slots}", "output tokens/s": "{tokens_per_second:,.0f}",
                           "gain": "{gain:.2f}", "over floor": "{over_floor:.2f}", "first token s, p50": "{first_token_s[0]:.2f}",
                           "p95": "{first_token_s[1]:.2f}", "ms a token, p50": "{per_token_ms[0]:.1f}", " p95": "{per_token_ms[1]:.1f}",
                           "weights, caches GiB": "{memory_gib:.2f}"})
    print(peak_memory())
    plot(args.plot, report, "clients", "tokens_per_second", "output tokens/s")
    return report


def make_requests(args, clients: int, model: Model) -> list[Request]:
    """Prompts of random ids; lengths of prompt and output drawn from `spread` below their means to as much above."""
    draw, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    about = lambda mean: draw.randint(mean - int(args.spread * mean), mean + int(args.spread * mean))
    prompt = lambda: torch.randint(model.config.vocab_size, (about(args.prompt),), generator=generator).to(model.device)
    return [Request(prompt(), about(args.output)) for _ in range(args.requests or clients)]


def serve_requests(engine: Engine, clients: int, requests: list[Request]) -> dict:
    """Output tokens/s, and p50 and p95 of the time from sending a request to its first token, and of that between tokens."""
    waiting, later = deque(requests[:clients]), deque(requests[clients:])
    start = time.perf_counter()
    sent, first, last = {request: start for request in waiting}, {}, {}
    with tqdm(total=sum(r.max_new_tokens for r in requests), unit="token", desc=f"{clients} clients", leave=False) as bar:
        for request in engine.run(waiting):
            last[request] = time.perf_counter()
            first.setdefault(request, last[request])
            bar.update()
            if request.done and later:
                sent[later[0]] = last[request]
                waiting.append(later.popleft())
    between = [1e3 * (last[r] - first[r]) / max(1, len(r.output) - 1) for r in requests]
    percentiles = lambda values: [quantile(values, q) for q in (0.5, 0.95)]
    return {"tokens_per_second": bar.total / (max(last.values()) - start), "requests": len(requests),
            "first_token_s": percentiles([first[r] - sent[r] for r in requests]), "per_token_ms": percentiles(between)}


def roofline(args) -> dict:
    """The `roofline` command: what a step costs by part, and what a plan can gain, before anything is run."""
    models, this = load_pair(args)
    report: dict = {}
    for name in args.hardware:
        if name not in (*HARDWARE, "this"):
            raise InputError(f"--hardware {name}: give some of {', '.join(HARDWARE)}, this")
        hardware, parts, gains = HARDWARE.get(name, this), [], []
        memory = min(args.memory or math.inf, hardware.memory)
        print(f"\n{name}: {hardware.bandwidth / 1e9:,.0f} GB/s, {hardware.rate / 1e12:,.2f} Tflop/s, {memory / 1e9:,.0f} GB; a step of "
              f"{args.batch} sequences of {args.lengths[0]:,} tokens:")
        for kind, model in models.items():
            costs = step_costs(model, args.batch, args.lengths[0])
            costs["prefill, a token"] = 0, prefill_operations(model, args.lengths[0]) / args.lengths[0]
            parts += [{"part": part, "model": kind, "mb": cost[0] / 1e6, "mflop": cost[1] / 1e6, "ms": 1e3 * floor_seconds({part: cost}, hardware)}
                      for part, cost in costs.items()]
        print_figures(parts, {"part": "{part}", "": "{model}", "MB": "{mb:,.1f}", "Mflop": "{mflop:,.1f}", "ms": "{ms:,.3f}"})
        for clients, context in itertools.product(args.concurrency, args.lengths):
            for kind, model in models.items():
                slots = min(clients, fitting_slots(model, context, memory))
                step, half = (floor_seconds(step_costs(model, slots, n), hardware) for n in (context, context * 3 // 4))
                half_context = max(1, context // 2)
                prompt = prefill_operations(model, half_context) / hardware.rate / half_context
                figures = {"decode": slots / step, "served": 1 / (prompt + half / slots)}
                base = gains[-1] if kind == "converted" else figures
                gains.append({"clients": clients, "context": context, "model": kind, "slots": slots, **figures,
                              "gain": figures["decode"] / base["decode"], "served_gain": figures["served"] / base["served"]})
        print_figures(gains, {"clients": "{clients}", "context": "{context:,}", "": "{model}", "slots": "{slots}", "decode tokens/s": "{decode:,.0f}",
                              "gain": "{gain:.2f}", "served, half prompt half output": "{served:,.0f}", " gain": "{served_gain:.2f}"})
        report[name] = {"parts": parts, "gains": gains}
    most = [figures for figures in report[args.hardware[0]]["gains"] if figures["clients"] == max(args.concurrency)]
    plot(args.plot, most, "context", "decode", f"tokens/s at the floor of {args.hardware[0]}, {max(args.concurrency)} clients")
    return report


def print_figures(report: list[dict], columns: dict[str, str]) -> None:
    """A row for each dict; columns are {head: format}."""
    print(format_table([list(columns)] + [[form.format(**figures) for form in columns.values()] for figures in report]))


def peak_memory() -> str:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"peak memory, of the GPU or else of this process, {peak / 2**30:.2f} GiB"


def plot(path: str | None, report: list[dict], x: str, y: str, label: str) -> None:
    if path:
        from matplotlib import pyplot
        for kind in ("dense", "converted"):
            points = sorted((figures[x], figures[y]) for figures in report if figures["model"] == kind)
            pyplot.plot(*zip(*points), marker="o", label=kind)
        pyplot.xlabel(x), pyplot.ylabel(label), pyplot.ylim(0), pyplot.legend(), pyplot.grid(alpha=0.3)
        pyplot.savefig(path, dpi=150, bbox_inches="tight")


# --- command line ------------------------------------------------------------------------------------------------

def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def memory_size(text: str) -> float:
    """24GiB, or 24GB"""
    for unit, size in (("GiB", 2**30), ("GB", 1e9)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * size
    raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 24GiB or 24GB")


def share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return float(text)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Measures models: what a conversion cost, and what it bought.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str):
        add = commands.add_parser(name, help=help).add_argument
        add("--model", required=name == "quality", help="a folder or Hub id")
        add("--device", help="cpu or cuda [the GPU when there is one]")
        add("--dtype", choices=("bfloat16", "float32"), help="[bfloat16 where it is faster here; of roofline, always]")
        if name != "quality":
            add("--shape", choices=SHAPES, help="instead of --model: this architecture with random weights")
            add("--plan", help="letters, or uniform:L [4/15 of the layers S, 4/15 X, the others L]")
            add("--window", type=int, default=64, help="[64]")
            add("--sinks", type=int, default=4, help="[4]")
            if name != "serve":
                add("--batch", type=positive, default=16, help="sequences of a step [16]")
            if name != "decode":
                add("--memory", type=memory_size, help="for weights and caches together, as 24GiB")
                add("--concurrency", type=positives, default=[50, 100, 200], help="[50,100,200]")
            add("--plot", help="draw the figures into this file, with matplotlib")
        if name != "roofline":
            add("--no-compile", action="store_true", help="run everything eagerly and without C++")
        return add
    add = command("quality", "text, tasks and passkey recall, side by side")
    add("--base", help="the original to compare with")
    add("--valid", default=C4, help="a .txt, .jsonl, .jsonl.gz, folder or hub:DATASET/FILE [one shard of C4]")
    add("--sequences", type=positive, default=32, help="how many sequences of 1,024 tokens of it [32]")
    add("--passkeys", type=positive, default=20, help="prompts at each length [20]")
    add("--tasks", nargs="+", default=[], help="question files")
    add("--limit", type=positive, help="only the first items of each")
    add = command("decode", "milliseconds a step, dense and converted")
    add("--lengths", type=positives, default=[256, 1024, 4096, 8192], help="tokens that each sequence holds [256,1024,4096,8192]")
    add("--steps", type=positive, default=20, help="measured at each length [20]")
    add = command("serve", "throughput and latency of concurrent requests")
    add("--prompt", type=positive, default=256, help="tokens of a prompt, on average [256]")
    add("--output", type=positive, default=256, help="new tokens of a request, on average [256]")
    add("--spread", type=share, default=0.25, help="how far lengths lie from these, as a share of them [0.25]")
    add("--requests", type=positive, help="in all [one for each client]")
    add("--seed", type=int, default=0, help="draws prompts and lengths [0]")
    add = command("roofline", "bytes, operations, floor and predicted gain")
    add("--hardware", type=lambda text: text.split(","), default=[*HARDWARE, "this"], help="[a10,h100,this]")
    add("--lengths", type=positives, default=[2048, 512, 8192], help="contexts; costs by part at the first [2048,512,8192]")
    args = parser.parse_args(argv)
    set_up(eager=getattr(args, "no_compile", False))
    try:
        report = {"quality": quality, "decode": decode, "serve": serve, "roofline": roofline}[args.command](args)
    except (InputError, kernels.NoCompiler) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bench: {error.filename or args.model}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(json.dumps({**vars(args), "report": report}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
