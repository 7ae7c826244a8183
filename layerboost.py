"""LayerBoost (arXiv 2604.22050), from a pretrained model to a cheaper one, in the order in which it happens:

    load -> scan -> plan -> convert -> heal -> evaluate -> report and save

Every layer of a Llama-style model pays for softmax attention over the whole context; few of them need it. The scan changes
one layer at a time, X (attention removed) and L (sliding-window linear attention), and measures the damage. The plan keeps
softmax (S) where the damage is worst. Healing distils the original back into the converted model. `main` tells this story.

    python layerboost.py                    the embedded model of tiny/ on its own text: all of this in two to five minutes, offline
    python layerboost.py --model DIR --data TEXT --valid TEXT --keep 10 --drop 4 --tokens 200k --out out/name
    python layerboost.py --model out/name --prompt "The capital of France is"
    torchrun --nproc-per-node=4 layerboost.py --model ...       the scan's layers and healing's sequences shared out
"""

import argparse
import codecs
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import kernels
from bench import (RECALL_LENGTHS, cache_bytes, evaluate, format_table, mean, passkey_prompts, pick_device, pick_dtype,
                   positive, read_task, read_tasks, score_hidden, set_up, table, task_accuracy, task_prompts)
from distill import C4, Diverged, Healing, gather, heal, pack, rank_and_world, read_documents, tail_names
from kernels import ROWS, fused_kl, linear
from model import (InputError, Model, Tokenizer, convert, find_model, load_model, load_tokenizer, parse_plan, read_json,
                   save_model, write_file)

CONTEXT = 1024                                      # tokens a sequence in evaluation
LONG_CONTEXT = 4096                                 # in the last stage of healing, or what the model was made for
SCAN_CONTEXT, SCAN_SEQUENCES = 2048, 4              # calibration text of the kl measure
SCAN_RECALL = {512: 4, 1024: 2, 2048: 1}            # prompts by context length of the recall measure
SCAN_TASK_ITEMS = 100                               # of the first task file, for the task measure
MEASURES = ("kl", "recall", "task")
SHORTLIST = 4                                       # layers that the greedy planner tries at each step
TEXT_TOKENS = 10_000_000                            # are read to heal on, whatever the budget: a run can go on to a larger one
VALID_SEQUENCES = 32                                # of CONTEXT tokens, for the report; healing watches the first 8

COMPILE_FROM = 400                                  # seconds of expected work: compiling takes one to two minutes

TINY = Path(os.path.relpath(Path(__file__).resolve().parent / "tiny"))
DEFAULTS = {"data": C4, "tokens": 10_000_000, "drop": 0}
TINY_DEFAULTS = {"model": str(TINY), "data": str(TINY / "train.jsonl.gz"), "valid": str(TINY / "valid.jsonl.gz"),
                 "tokens": 90_000, "keep": 6, "drop": 1}       # what stands for flags that are not given


NEXT_STEPS = """
Next, a real model (a folder in the Hub's layout or a Hub id) on your own text (.txt, .jsonl, .jsonl.gz or a folder of them):
  python layerboost.py --model HuggingFaceTB/SmolLM2-135M --data TEXT --tokens 200k
Other ways to spend the same layers:
  python layerboost.py --scan out/tiny/scan.json --planner paper --out out/paper
  python layerboost.py --plan uniform:L --out out/uniform"""


# --- scan --------------------------------------------------------------------------------------------------------

# A measure of damage is a pair: batches of ids [B, T], and a function from the final hidden states of an altered model on
# them to {column: damage against the base, 0 for none}.

def kl_probe(model: Model, sequences: Tensor):
    """Mean KL(base || altered) in nats a token; columns besides: either half of the text, and early and late positions.

    Measured at every second position, since the head costs a third of all layers. The base's logits are kept: 0.4 GB for
    a vocabulary of 49k.
    """
    batches = list(sequences.to(model.device).split(2))
    sampled = lambda hidden: hidden[:, ::2].flatten(0, 1).split(ROWS)
    base = [[linear(rows, model.head) for rows in sampled(model.hidden(ids))] for ids in batches]

    def damage(hiddens: list[Tensor]) -> dict[str, float]:
        kl = torch.cat([fused_kl(linear(rows, model.head), logits) for kept, hidden in zip(base, hiddens)
                        for logits, rows in zip(kept, sampled(hidden))]).view(len(sequences), -1)   # (sequences, T / 2)
        half, quarter = len(kl) // 2, kl.shape[1] // 4
        columns = {"kl": kl, f"kl, tokens to {2 * quarter}": kl[:, :quarter],
                   f"kl, tokens from {4 * quarter}": kl[:, 2 * quarter:]}
        if half:
            columns |= {"kl, text 1": kl[:half], "kl, text 2": kl[half:]}
        return {name: float(values.mean()) for name, values in columns.items()}
    return batches, damage


def recall_probe(model: Model, tokenizer: Tokenizer, text: Tensor):
    """The drop in the log-probability of a passkey hidden in long text, in nats a passkey; a column besides for each
    context length."""
    prompts = {}                                                                # length: [(context ids, answer ids)]
    for length, count in SCAN_RECALL.items():
        if length <= model.config.max_position_embeddings:
            depths = [(i + 0.5) / count for i in range(count)]
            prompts[length] = [p for _, p in passkey_prompts(tokenizer, text, length, depths, 1, seed=1)]
    batches = [torch.tensor([context + answer for context, answer in group]).to(model.device) for group in prompts.values()]

    def log_probabilities(hiddens: list[Tensor]) -> list[list[float]]:
        return [[score_hidden(row[len(context) - 1:-1], model.head, answer).log_likelihood
                 for row, (context, answer) in zip(hidden, group)] for hidden, group in zip(hiddens, prompts.values())]
    base = log_probabilities([model.hidden(ids) for ids in batches])

    def damage(hiddens: list[Tensor]) -> dict[str, float]:
        drops = [[b - a for b, a in zip(*pair)] for pair in zip(base, log_probabilities(hiddens))]
        columns = {f"recall at {length}": mean(group) for length, group in zip(prompts, drops)}
        return {"recall": mean(drop for group in drops for drop in group), **columns}
    return batches, damage


def task_probe(model: Model, tokenizer: Tokenizer, path: str):
    """The drop in accuracy on a task file, which is what the paper calls benchmark degradation."""
    items = read_task(path, SCAN_TASK_ITEMS)
    prompts = [task_prompts(item, tokenizer) for item in items]
    pad = torch.nn.utils.rnn.pad_sequence
    batches = [pad([torch.tensor(c + a) for c, a in group], batch_first=True).to(model.device) for group in prompts]

    def accuracy(hiddens: list[Tensor]) -> float:
        scored = [[score_hidden(row[len(c) - 1:len(c) + len(a) - 1], model.head, a) for row, (c, a) in zip(hidden, group)]
                  for hidden, group in zip(hiddens, prompts)]
        return task_accuracy(items, scored)["accuracy"]
    base = accuracy([model.hidden(ids) for ids in batches])
    return batches, lambda hiddens: {"task": base - accuracy(hiddens)}


@torch.inference_mode()
def make_probes(model: Model, tokenizer: Tokenizer, measures: list[str], calibration: Tensor, text: Tensor,
                tasks: list[str]) -> list:
    make = {"kl": lambda: kl_probe(model, calibration), "recall": lambda: recall_probe(model, tokenizer, text),
            "task": lambda: task_probe(model, tokenizer, tasks[0])}
    return [make[name]() for name in measures]


@torch.inference_mode()
def scan(model: Model, probes: list, tiers: dict, path: Path, identity: dict, layers: list[dict]) -> list[dict]:
    """Changes each layer alone to X and to L: [{"X": {column: damage}, "L": ...} per layer], several at a time under torchrun.

    What enters layer i does not depend on what happens in it, so the base's residual streams are carried from layer to layer
    and a trial starts at its own: half the work of running every altered model whole. Goes on after the `layers` that an
    earlier run has measured, and writes all of them to `path` after every layer.
    """
    n = len(model.layers)
    altered = {tier: convert(model, tier * n, **tiers) for tier in "XL"}        # a trial takes one block of these
    rank, world = rank_and_world()
    advance = lambda streams, first, last: [[model.run_layers(x, first, min(last, n)) for x in stream] for stream in streams]
    i = len(layers) + rank
    streams = advance([[model.embed_tokens(ids) for ids in batches] for batches, _ in probes], 0, i)
    with tqdm(total=2 * n, initial=2 * len(layers), desc="scanning", unit="trial") as bar:
        while len(layers) < n:                                                  # each process takes one of the next layers
            measured: dict = {}
            for tier in "XL" if i < n else "":
                columns = measured[tier] = {}
                for (_, damage), stream in zip(probes, streams):
                    changed = [altered[tier].run_layers(x, i, i + 1) for x in stream]
                    columns |= damage([model.norm(model.run_layers(x, i + 1, n)) for x in changed])
                if not all(map(math.isfinite, columns.values())):
                    raise Diverged(f"the damage of layer {i} as {tier} is not a finite number")
                bar.set_postfix_str(f"layer {i} {tier} " + " ".join(f"{k} {columns[k]:.3f}" for k in MEASURES if k in columns))
                bar.update()
            layers += [row for row in gather(measured) if row]
            bar.update(2 * len(layers) - bar.n)
            if rank == 0:
                write_file(path, lambda p: p.write_text(json.dumps({"identity": identity, "layers": layers}, indent=1)))
            streams = advance(streams, i, i + world)
            i += world
    return layers


@torch.inference_mode()
def measure_plan(model: Model, probes: list, tiers: dict, plan: str) -> dict[str, float]:
    """The damage of a whole plan, measured."""
    altered = convert(model, plan, **tiers)
    return {k: v for batches, damage in probes for k, v in damage([altered.hidden(ids) for ids in batches]).items()}


def check_scan(path: Path, identity: dict, measures: list[str], n: int) -> list[dict]:
    """The layers that a scan file holds. Raises InputError naming the first thing in which it differs from this run: a whole
    one must have the measures that are asked for, one that is to be gone on with no others."""
    made, again = read_json(path), "scan again (leave out --scan, or give another --out)"
    if not made.get("identity") or not made.get("layers"):
        raise InputError(f"{path}: is no scan file; {again}")
    columns = [m for m in MEASURES if m in made["layers"][0]["X"]]
    if not set(measures) <= set(columns) or len(made["layers"]) < n and set(measures) != set(columns):
        raise InputError(f"{path}: was measured with --measure {'+'.join(columns)}, this run has {'+'.join(measures)}; {again}")
    for key, value in identity.items():
        if made["identity"].get(key) != value:
            raise InputError(f"{path}: was measured with {key} {made['identity'].get(key)}, this run has {value}; {again}")
    return made["layers"]


def fingerprint(*tensors: Tensor) -> str:
    """Twelve hex digits that tell sets of tensors apart by their shapes and 64 values of each, weights alike in every precision."""
    digest = hashlib.sha256()
    for x in tensors:
        flat = x.detach().flatten()
        values = flat[::max(1, flat.numel() // 64)]
        values = values.bfloat16() if x.is_floating_point() else values
        digest.update(str(tuple(x.shape)).encode() + values.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


# --- plan --------------------------------------------------------------------------------------------------------

def total_damage(columns: dict[str, float], measures: list[str]) -> float:
    """The sum of the chosen measures, none of them below zero: a passkey that was easier by luck is no gain."""
    return sum(max(0.0, columns[m]) for m in measures)


def costs_of(layers: list[dict], measures: list[str]) -> list[dict[str, float]]:
    """Per layer the damage of each tier, none for S."""
    return [{"S": 0.0, **{tier: total_damage(row[tier], measures) for tier in "LX"}} for row in layers]


def plan_paper(costs: list[dict], keep: int, drop: int) -> str:
    """Ranks layers by the X column alone: the `keep` most sensitive stay S, the `drop` least become X, the middle L."""
    order = sorted(range(len(costs)), key=lambda i: costs[i]["X"])
    return "".join("X" if i in order[:drop] else "S" if i in order[len(order) - keep:] else "L" for i in range(len(costs)))


def plan_tier(costs: list[dict], keep: int, drop: int) -> str:
    """The plan with `keep` S and `drop` X of the least summed damage, exactly, by dynamic programming over the layers:
    best[s, x] is the cheapest way to give the layers so far s S and x X."""
    best = {(0, 0): (0.0, "")}
    for cost in costs:
        longer: dict = {}
        for (s, x), (total, plan) in best.items():
            for tier, state in (("S", (s + 1, x)), ("L", (s, x)), ("X", (s, x + 1))):
                if state[0] <= keep and state[1] <= drop:
                    longer[state] = min(longer.get(state, (math.inf, "")), (total + cost[tier], plan + tier))
        best = longer
    return best[keep, drop][1]


def plan_greedy(costs: list[dict], keep: int, drop: int, measure) -> str:
    """Converts one layer at a time, first the X ones, and measures the whole model each time: the next layer is the least
    harmful, given all before it, of the SHORTLIST that the scan calls least harmful. measure(plan) -> damage."""
    plan = ["S"] * len(costs)
    moves = "X" * drop + "L" * (len(costs) - keep - drop)
    with tqdm(moves, desc="greedy plan", unit="layer") as bar:
        for tier in bar:
            candidates = sorted((i for i, t in enumerate(plan) if t == "S"), key=lambda i: costs[i][tier])[:SHORTLIST]
            trials = {i: measure("".join(plan[:i]) + tier + "".join(plan[i + 1:])) for i in candidates}
            plan[min(trials, key=trials.get)] = tier
            bar.set_postfix_str(f"{''.join(plan)} damage {min(trials.values()):.3f}")
    return "".join(plan)


def remembered(path: Path, identity: dict, measure):
    """`measure`, its results kept in a file, so that a greedy planning that was stopped goes on where it was."""
    made = read_json(path) if path.exists() else {}
    damages = made["damages"] if made.get("identity") == identity else {}

    def look_up(plan: str) -> float:
        if plan not in damages:
            damages[plan] = measure(plan)
            if rank_and_world()[0] == 0:
                write_file(path, lambda p: p.write_text(json.dumps({"identity": identity, "damages": damages}, indent=1)))
        return damages[plan]
    return look_up


# --- what the terminal shows -------------------------------------------------------------------------------------

def chart(layers: list[dict], measures: list[str], plan: str) -> str:
    """Bars of the damage by layer, on a logarithmic scale since it spans three decades."""
    costs = costs_of(layers, measures)
    low, high = 1e-3, max(max(c["X"], c["L"]) for c in costs) + 2e-3       # above `low` where no change did damage
    def bar(value: float) -> str:
        length = 24 * math.log(max(value, low) / low) / math.log(high / low)
        return ("█" * int(length)).ljust(24)
    lines = [f"damage of changing one layer alone, {' + '.join(measures)} (logarithmic bars, {low:g} to {high:.2g})",
             "layer  attention removed (X)              window and linear tail (L)         plan"]
    for i, (cost, tier) in enumerate(zip(costs, plan)):
        lines.append(f"{i:5}  {bar(cost['X'])} {cost['X']:8.4f}  {bar(cost['L'])} {cost['L']:8.4f}  {tier}")
    return "\n".join(lines)


def agreement_lines(layers: list[dict]) -> list[str]:
    """How well two rankings of the layers agree, where the scan measured both (Spearman: 1 the same order, 0 unrelated)."""
    names = layers[0]["X"]
    measured = [name for name in MEASURES if name in names]
    pairs = list(itertools.combinations(measured, 2))
    for kind in ("kl, text", "kl, tokens", "recall at"):                        # two texts, early and late, short and long
        group = [name for name in names if name.startswith(kind)]
        pairs += [(group[0], group[-1])] if len(group) > 1 else []
    agree = lambda a, b: spearman(*([row[tier][name] for row in layers] for tier, name in (a, b)))
    lines = [f"  {a} against {b}: {agree(('X', a), ('X', b)):.2f} (X), {agree(('L', a), ('L', b)):.2f} (L)" for a, b in pairs]
    return lines + [f"  X against L by {name}: {agree(('X', name), ('L', name)):.2f}" for name in measured]


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of two rankings; ties share their mean rank."""
    ranks = []
    for values in (torch.tensor(a), torch.tensor(b)):
        below, same = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
        ranks.append(below + (same - 1) / 2)
    return float(torch.nan_to_num(torch.corrcoef(torch.stack(ranks)))[0, 1])


def clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def forward_rate(model: Model, tokens: int = 512) -> float:
    """Tokens a second of a forward pass, from two short ones."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            float(model.hidden(ids).sum())
    return tokens / (time.perf_counter() - start)


# --- generation --------------------------------------------------------------------------------------------------

def generate_text(model: Model, tokenizer: Tokenizer, args) -> None:
    """Streams the continuation of --prompt to the terminal."""
    ids = tokenizer.encode(args.prompt)
    if not ids:
        raise InputError("--prompt is empty; give it some text")
    if args.temperature < 0 or args.max_new_tokens < 1 or (args.top_k or 1) < 1 or not 0 < (args.top_p or 1) <= 1:
        raise InputError("--temperature, --max-new-tokens, --top-k, --top-p: give 0 or more, 1 or more, 1 or more, above 0 to 1")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")       # a character may span several tokens

    def show(row: int, token: int) -> None:
        if token not in model.config.eos_token_ids:
            print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    print(args.prompt, end="", flush=True)
    model.generate(torch.tensor([ids], device=model.device), args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                   args.seed, on_token=show)
    print(decoder.decode(b"", final=True))


# --- the story ---------------------------------------------------------------------------------------------------

def boost(model: Model, tokenizer: Tokenizer, source: Path, args) -> None:
    """Scan, plan, convert, heal, evaluate, report and save: all into args.out."""
    out, n = Path(args.out), len(model.layers)
    if out.resolve() == source.resolve():
        raise InputError(f"--out {out}: is the folder of the original; give another")
    settings, measures, tiers, plan = check_arguments(model, args)
    tasks = read_tasks(args.tasks, args.limit)
    model.pack()
    train, valid = read_text(args, tokenizer, model, settings)
    longest = min(SCAN_CONTEXT, model.config.max_position_embeddings)
    calibration = train.flatten().unfold(0, longest, longest)[:SCAN_SEQUENCES]
    identity = {"model": fingerprint(*model.parameters()), "data": fingerprint(calibration), **tiers}
    scan_identity = dict(identity)
    if "task" in measures:
        scan_identity["task file"] = hashlib.sha256(Path(args.tasks[0]).read_bytes()).hexdigest()[:12]
    scan_file = Path(args.scan or out / "scan.json")
    layers = check_scan(scan_file, scan_identity, measures, n) if scan_file.exists() and (args.scan or plan is None) else []
    if args.scan and len(layers) < n:
        raise InputError(f"--scan {args.scan}: holds {len(layers)} of {n} layers; repeat the command that makes it")
    if gather(announce(model, args, settings, calibration, plan, len(layers)))[0] < COMPILE_FROM:
        torch.compiler.set_stance("force_eager")
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    together = min(settings.batch // rank_and_world()[1], settings.micro_batch or settings.batch)      # sequences
    model.compiled_shapes |= {(2, calibration.shape[1]), (together, settings.context)}

    if plan is None:
        whole = len(layers) == n
        print(f"\nScan: read from {scan_file}." if whole else f"\nScan: one layer at a time, from layer {len(layers)} on.")
        probes = []
        if not whole or args.planner == "greedy":
            probes = make_probes(model, tokenizer, measures, calibration, train, args.tasks)
        if not whole:
            layers = scan(model, probes, tiers, scan_file, scan_identity, layers)
        costs = costs_of(layers, measures)
        if args.planner == "greedy":
            damage = lambda trial: total_damage(measure_plan(model, probes, tiers, trial), measures)
            known = remembered(out / "greedy.json", scan_identity | {"measures": measures}, damage)
            plan = plan_greedy(costs, args.keep, args.drop, known)
        else:
            plan = {"paper": plan_paper, "tier": plan_tier}[args.planner](costs, args.keep, args.drop)
        plan = gather(plan)[0]                              # rounding may differ between processes
    if len(layers) == n:
        print(chart(layers, measures, plan))
        print("rankings of the layers compared (Spearman: 1 the same order, 0 unrelated):", *agreement_lines(layers), sep="\n")
    print(f"\nPlan: {plan}")
    if len(layers) == n:
        expected = {m: sum(row[tier][m] for row, tier in zip(layers, plan) if tier != "S") for m in measures}
        print("  predicted before healing, as the sum over its layers: " + ", ".join(f"{m} {v:.3f}" for m, v in expected.items()))
    student = convert(model, plan, **tiers)
    print(f"  {plan.count('S')} softmax, {plan.count('L')} sliding-window linear, {plan.count('X')} removed; cache of a sequence at 8k "
          f"tokens {cache_bytes(student, 8192) / 2**20:.1f} MiB, was {cache_bytes(model, 8192) / 2**20:.1f} MiB")

    if not tail_names(student):                             # nothing to train alone
        settings = replace(settings, transfer_steps=0, long_share=0.0)
    print(f"\nHeal: {settings.trained_tokens:,} tokens, {settings.transfer_steps} steps of attention transfer, then "
          f"{settings.short_steps - settings.transfer_steps} of KL distillation, {settings.steps - settings.short_steps} on long sequences.")
    converted = convert(model, plan, **tiers)               # keeps untrained tails of its own; the student's are trained
    student.recompute = args.activation_checkpointing
    curve = heal(model, student, train, valid[:8], settings, out / "healing.safetensors",
                 identity | {"plan": plan, "data": fingerprint(train), "dtype": args.dtype})
    if rank_and_world()[0]:
        return                                              # the first process does the rest
    save_model(student, out, source)

    print("\nEvaluate: the untouched, the converted and the healed model on the same text and questions.")
    models = {"base": model, "converted": converted, "healed": student}
    report = evaluate(models, model, tokenizer, valid, tasks)
    write_report(out, report, curve, settings, args, layers, time.monotonic() - started)
    for name in ("base", "healed"):
        print(f"{name + ' goes on:':17}" + continuation(models[name], tokenizer, valid))
    print(f'\nSaved to {out}. Try: python layerboost.py --model {out} --prompt "The history of"')
    if args.model == str(TINY):
        print(NEXT_STEPS)


def check_arguments(model: Model, args) -> tuple[Healing, list[str], dict, str | None]:
    """Settings of the healing, measures, tier settings, and the plan if one is stated: all that is wrong with the flags
    stops here, before any work."""
    n = len(model.layers)
    if set(model.plan) != {"S"}:
        raise InputError(f"--model {args.model}: is converted already (plan {model.plan}); start from the original, or give "
                         "--prompt, or measure it with bench.py")
    args.keep = round(n / 3) if args.keep is None else args.keep
    if args.keep < 0 or args.drop < 0 or args.keep + args.drop > n:
        raise InputError(f"--keep {args.keep} --drop {args.drop}: the model has {n} layers; give two numbers, together at most {n}")
    measures = args.measure.split("+")
    if set(measures) - set(MEASURES):
        raise InputError(f"--measure {args.measure}: give kl, recall, task, or several joined with +")
    if "recall" in measures and model.config.max_position_embeddings < min(SCAN_RECALL):
        raise InputError(f"--measure {args.measure}: recall needs a model of {min(SCAN_RECALL)} positions; give --measure kl")
    if "task" in measures and not args.tasks:
        raise InputError("--measure task: needs a question file; give --tasks FILE")
    if args.scan and not Path(args.scan).exists():
        raise InputError(f"--scan {args.scan}: no such file")
    tiers = {"window": args.window, "sinks": args.sinks, "feature_map": args.feature_map}
    plan = args.plan and parse_plan(args.plan, n)
    convert(model, plan or "L" * n, **tiers)                # raises for settings that do not fit together
    if args.rank < 1 or not args.lr > 0:
        raise InputError(f"--rank {args.rank} --lr {args.lr:g}: give a rank of 1 or more and a rate above 0")
    args.batch = rank_and_world()[1] if args.batch is None else args.batch
    if args.batch < 1 or args.context < 2 or args.micro_batch is not None and args.micro_batch < 1:
        raise InputError("--batch, --micro-batch, --context: give numbers of sequences, 1 or more, and of tokens, 2 or more")
    context, long_context = (min(tokens, model.config.max_position_embeddings) for tokens in (args.context, LONG_CONTEXT))
    settings = Healing(args.tokens, rank=args.rank, full=args.full, lr=args.lr, seed=args.seed, context=context, batch=args.batch,
                       micro_batch=args.micro_batch, long_context=max(context, long_context))
    return settings, measures, tiers, plan


def read_text(args, tokenizer: Tokenizer, model: Model, settings: Healing) -> tuple[Tensor, Tensor]:
    """Training and validation sequences [N, context]. Without --valid the last documents of --data are held out."""
    eos, context, longest = model.config.eos_token_ids, settings.context, min(CONTEXT, model.config.max_position_embeddings)
    needed = VALID_SEQUENCES * longest
    documents = read_documents(args.data)
    if args.valid:
        valid = pack(read_documents(args.valid, "--valid"), tokenizer, eos, longest, needed)
    else:
        documents, held_out, size = list(documents), [], 0
        while len(documents) > 1 and size < 6 * needed and len(held_out) < 0.1 * (len(documents) + len(held_out)):
            held_out.append(documents.pop())
            size += len(held_out[-1])
        valid = pack(held_out, tokenizer, eos, longest, needed)
    train = pack(documents, tokenizer, eos, context, max(settings.trained_tokens, TEXT_TOKENS))
    for flag, source, sequences, least in (("--data", args.data, train, settings.long_context), ("--valid", args.valid or args.data, valid, longest)):
        if sequences.numel() < least:
            raise InputError(f"{flag} {source}: too little text; {least} tokens are needed at least"
                             + (" in the documents held out; give --valid" if flag == "--valid" and not args.valid else ""))
    return train, valid


def announce(model: Model, args, settings: Healing, calibration: Tensor, plan: str | None, scanned: int) -> float:
    """What is going to happen, and about how long it takes here, from a short measurement. Returns the seconds in all."""
    rate, n = forward_rate(model) * rank_and_world()[1], len(model.layers)
    tokens = calibration.numel() if "kl" in args.measure else 0
    reach = model.config.max_position_embeddings
    tokens += sum(n * count for n, count in SCAN_RECALL.items() if n <= reach) if "recall" in args.measure else 0
    passes = sum(2 * (n - i) / n for i in range(scanned, n)) + 2 if scanned < n else 0      # over all layers
    passes += SHORTLIST * (n - args.keep) if args.planner == "greedy" else 0
    evaluated = VALID_SEQUENCES * CONTEXT + 20 * sum(n for n in RECALL_LENGTHS if n <= reach)
    scanning, healing, evaluating = tokens * passes / rate * (plan is None), settings.trained_tokens * 5 / rate, 3 * evaluated / rate
    print(f"{args.model}: {n} layers, {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {args.dtype} on "
          f"{args.device}; a forward pass runs at {rate:,.0f} tokens/s here")
    if plan is None:
        print(f"1. scan      {2 * (n - scanned)} trials on {tokens:,} tokens, then a plan that keeps {args.keep} layers, drops "
              f"{args.drop}   about {clock(scanning)}")
    else:
        print(f"1. plan      {plan}, as given")
    print(f"2. heal      {settings.trained_tokens:,} tokens   about {clock(healing)}")
    print(f"3. evaluate  base, converted, healed   about {clock(evaluating)}" + (" and the task files" if args.tasks else ""))
    print(f"Everything goes to {args.out}. Ctrl-C is safe: the same command goes on where it stopped.", flush=True)
    return scanning + healing + evaluating


def write_report(out: Path, report: dict, curve: dict, settings: Healing, args, layers: list[dict], seconds: float) -> None:
    """report.json and report.md, and the same on the terminal."""
    healed, converted = report["healed"], report["converted"]
    plan = healed["plan"]
    lines = [
        f"# {Path(args.model).name}, boosted", "",
        f"Plan `{plan}`: of {len(plan)} layers, {plan.count('S')} keep softmax attention (S), {plan.count('L')} see a window of "
        f"{args.window} tokens, the first {args.sinks} and a linear-attention summary of the rest (L), {plan.count('X')} have no "
        f"attention (X). Healed on {settings.trained_tokens:,} tokens.", "",
        format_table(table(report)), "",
        "KL is how far the next-token distribution is from the base model's, top-1 agreement how often both name the same token; "
        "passkey recall is how often a number hidden in a text of that many tokens is repeated. `converted` is before healing.", "",
        "Validation KL while healing: " + ", ".join(f"{kl:.3f} at {tokens:,}" for tokens, kl in curve["valid"]) + ".", "",
        f"KL {converted['kl']:.4f} -> {healed['kl']:.4f}, agreement {converted['agreement']:.1%} -> {healed['agreement']:.1%}; "
        f"{clock(seconds)} in all."]
    body = {**report, "plan": plan, "healing": {"settings": asdict(settings), **curve}, "scan": layers, "command": vars(args),
            "seconds": round(seconds, 1)}
    write_file(out / "report.json", lambda path: path.write_text(json.dumps(body, indent=1)))
    write_file(out / "report.md", lambda path: path.write_text("\n".join(lines) + "\n"))
    print("\n" + "\n".join(lines))


def continuation(model: Model, tokenizer: Tokenizer, valid: Tensor, prompt: int = 16, new: int = 40) -> str:
    """Some words of the validation text as a model goes on with them, drawn with one seed for all models, on one line."""
    ids = valid[len(valid) // 2, None, :prompt].to(model.device)
    start, whole = (tokenizer.decode(x[0].tolist()) for x in (ids, model.generate(ids, new, 0.7, top_k=40, seed=0)))
    return " ".join(f"{start} >>>{whole[len(start):]}".split())


def token_count(text: str) -> int:
    """200k, 10M or a plain number."""
    scale = {"k": 1e3, "m": 1e6}.get(text[-1:].lower())
    try:
        return int(float(text[:-1]) * scale) if scale else int(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens; write 200k, 10M or 4096") from None


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python layerboost.py [--model MODEL] [options]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=22, width=118),
        description="Makes a pretrained Llama-style model cheaper to serve: scan, plan, convert, heal, evaluate, save.")

    def add(flag: str, metavar: str | None, help: str, **options) -> None:
        parser.add_argument(flag, help=help, **({"metavar": metavar} if metavar else {}), **options)
    add("--model", "MODEL", "is a folder in the Hub's layout or a Hub id (at --revision, default main). [the embedded one, with "
        "text and settings of its own]")
    add("--data", "TEXT", "heals on this .txt, .jsonl, .jsonl.gz, folder or hub:DATASET/FILE. [one shard of C4]")
    add("--valid", "TEXT", "evaluates on this text. [the last documents of --data, held out]")
    add("--tasks", "FILE", "also evaluates these question files, the first --limit items of each.", nargs="+", default=[])
    add("--tokens", "N", "heals on this many tokens, as 200k or 10M. [10M]", type=token_count)
    add("--keep", "K", "keeps softmax attention in this many layers. [a third]", type=int)
    add("--drop", "N", "removes the attention of this many: costly (results/healing.md). [0]", type=int)
    add("--planner", None, "picks them: the least summed damage, the paper's bands, or step by step.",
        choices=("tier", "paper", "greedy"), default="tier")
    add("--plan", "LETTERS", "states the plan instead, one of S, L, X per layer, or uniform:L; nothing is scanned.")
    add("--measure", "NAMES", "judges damage by kl, recall or task, or a sum of them. [kl+recall]", default="kl+recall")
    add("--scan", "FILE", "plans from this scan.json instead of scanning again.")
    add("--window", "W", "lets L layers see this many tokens exactly, [64]", type=int, default=64)
    add("--sinks", "S", "and this many first ones, [4]", type=int, default=4)
    add("--feature-map", "PHI", "and the rest through hedgehog, elu, relu or favor features, or none. [hedgehog]", default="hedgehog")
    add("--rank", "R", "is the rank of the adapters. [16]  --full trains all weights instead.", type=int, default=16)
    add("--lr", "LR", "is the highest learning rate of these. [1e-3]", type=float, default=1e-3)
    add("--batch", "N", "sequences, [one a process]  of --context 512 tokens, make a step of healing, --micro-batch at a time; "
        "--activation-checkpointing keeps less for the backward pass and computes it again.", type=int)
    add("--out", "DIR", "receives the healed model, scan.json and report.json. [out/<model name>]")
    add("--prompt", "TEXT", "only generates from MODEL: --max-new-tokens 100, --temperature 0, --top-k, --top-p.")
    add("--seed", "N", "draws the data order, the adapters and the samples. [0]", type=int, default=0)
    add("--device", "NAME", "is cpu or cuda. [the GPU when there is one]")
    add("--dtype", "NAME", "is bfloat16 or float32. [bfloat16 where it is faster here]", choices=("bfloat16", "float32"))
    add("--no-compile", None, "runs everything eagerly and without C++: slower, but starts at once.", action="store_true")
    for flag in ("--full", "--activation-checkpointing"):                   # the rest are named in the lines above
        add(flag, None, argparse.SUPPRESS, action="store_true")
    for flag, kind, default in (("--revision", str, None), ("--micro-batch", int, None), ("--context", int, 512), ("--limit", positive, None), ("--max-new-tokens", int, 100),
                                ("--temperature", float, 0.0), ("--top-k", int, None), ("--top-p", float, None)):
        add(flag, None, argparse.SUPPRESS, type=kind, default=default)
    args = parser.parse_args(argv)
    for name, value in (TINY_DEFAULTS if args.model is None else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def start_process(device: str | None) -> str:
    """The device of this process. Under torchrun it joins the others; only the first of them shows what it does."""
    device = pick_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    return device


def main(argv=None) -> int:
    args = parse_arguments(argv)
    set_up(eager=args.no_compile)
    args.out = args.out or f"out/{Path(args.model).resolve().name}"
    try:
        args.device = start_process(args.device)
        args.dtype = gather(args.dtype or pick_dtype(args.device))[0]
        source = find_model(args.model, args.revision)
        tokenizer = load_tokenizer(str(source))
        model = load_model(str(source), dtype=getattr(torch, args.dtype), device=args.device)
        if args.prompt is not None:
            generate_text(model, tokenizer, args)
        else:
            boost(model, tokenizer, source, args)
    except (InputError, kernels.NoCompiler) as error:
        if rank_and_world()[0] == 0:
            print(f"layerboost: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"layerboost: {error.filename or '--out'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"layerboost: {error}; what was saved before is in {args.out}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped" + (f"; run the same command again to go on from what is in {args.out}" if args.prompt is None else ""), file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
