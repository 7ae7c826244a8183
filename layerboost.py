"""LayerBoost (arXiv 2604.22050), from a pretrained model to a cheaper one, in the order in which it
happens:

    load -> scan -> plan -> convert -> heal -> evaluate -> report and save

Every layer of a Llama-style model pays for softmax attention over the whole context; few of them
need it. The scan changes one layer at a time, to X (attention removed) and to L (sliding-window
linear attention), and measures the damage. The plan keeps softmax (S) where the damage is worst.
Healing distils the original back into the converted model. `boost` tells this story.

    python layerboost.py                    all of this on the embedded model of tiny/, in minutes
    python layerboost.py --model DIR --data TEXT --keep 10 --tokens 200k --out out/name
    python layerboost.py --model out/name --prompt "The capital of France is"
    torchrun --nproc-per-node=4 layerboost.py --model ...    work shared out over processes
"""

import argparse
import codecs
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import cpu
from bench import evaluate, format_table, positive, table
from distill import Diverged, Healing, heal, tail_names
from hub import C4, InputError, find_model, read_documents, write_json, write_text
from kernels import FEATURE_MAPS
from machine import is_main_process, pick_dtype, rank_and_world, say, start_process
from measure import RECALL_LENGTHS, read_tasks
from model import Model, cache_bytes, convert, load_model, parse_plan, save_model
from scan import (
    CALIBRATION_CONTEXT,
    CALIBRATION_SEQUENCES,
    MEASURES,
    PLANNERS,
    RECALL_PROMPTS,
    chart,
    check_scan,
    costs_of,
    fingerprint,
    hash_file,
    make_probes,
    rank_agreements,
    scan,
)
from tokenizer import Tokenizer, load_tokenizer, pack_sequences

EVALUATION_CONTEXT = 1024  # tokens a sequence
LONG_CONTEXT = (
    4096  # tokens a sequence in the last stage of healing, or what the model was made for
)
TEXT_TOKENS = 10_000_000  # read to heal on, whatever the budget: a run can go on to a larger one
VALIDATION_SEQUENCES = 8  # of the evaluation's, watched while healing

TINY = Path(os.path.relpath(Path(__file__).resolve().parent / "tiny"))
DEFAULTS = {"data": C4, "tokens": 10_000_000, "drop": 0, "sequences": 32}
TINY_DEFAULTS = {  # what stands for flags that are not given, without --model
    "model": str(TINY),
    "data": str(TINY / "train.jsonl.gz"),
    "valid": str(TINY / "valid.jsonl.gz"),
    "tokens": 36_000,
    "keep": 6,
    "drop": 1,
    "sequences": 16,
}

NEXT_STEPS = """
Next, a real model (a folder in the Hub's layout or a Hub id) on your own text:
  python layerboost.py --model HuggingFaceTB/SmolLM2-135M --data TEXT --tokens 200k
Other ways to spend the same layers:
  python layerboost.py --scan out/tiny/scan.json --planner paper --out out/paper
  python layerboost.py --plan uniform:L --out out/uniform"""


# --- the story ---------------------------------------------------------------------------------


def boost(model: Model, tokenizer: Tokenizer, source: Path, args) -> None:
    """Scan, plan, convert, heal, evaluate, report and save: all into args.out."""
    started = time.monotonic()
    out = Path(args.out)
    settings = check_arguments(model, source, args)
    tasks = read_tasks(args.tasks, args.limit)
    train, valid = read_text(args, tokenizer, model, settings)

    # Scan and plan.
    tiers = {"window": args.window, "sinks": args.sinks, "feature_map": args.feature_map}
    layers = scan_layers(model, tokenizer, train, valid, tiers, settings, args)
    measures = args.measure.split("+")
    plan = args.plan
    if plan is None:
        plan = PLANNERS[args.planner](costs_of(layers, measures), args.keep, args.drop)
        say(chart(layers, measures, plan))
    say(f"\nPlan: {plan}", *describe_plan(model, plan, tiers, layers, measures))

    # Convert. `converted` keeps untrained tails of its own; the student's are trained.
    converted = convert(model, plan, **tiers)
    student = convert(model, plan, **tiers)
    student.recompute = args.activation_checkpointing

    # Heal.
    if not tail_names(student):  # nothing to train alone
        settings = replace(settings, transfer_steps=0, long_share=0.0)
    transfer, short = settings.transfer_steps, settings.short_steps
    say(
        f"\nHeal: {settings.trained_tokens:,} tokens, {transfer} steps of attention transfer, then "
        f"{short - transfer} of KL distillation, {settings.steps - short} on long sequences."
    )
    same = {"model": fingerprint(*model.parameters()), "data": fingerprint(train), **tiers}
    same |= {"plan": plan, "dtype": args.dtype}
    watched = valid[:VALIDATION_SEQUENCES]
    curve = heal(model, student, train, watched, settings, out / "healing.safetensors", same)
    if not is_main_process():
        return  # the main process does the rest
    save_model(student, out, source)

    # Evaluate and report.
    say("\nEvaluate: the untouched, the converted and the healed model on the same text.")
    models = {"base": model, "converted": converted, "healed": student}
    report = evaluate(models, model, tokenizer, valid, tasks, args.passkeys)
    write_report(out, report, curve, settings, args, layers, time.monotonic() - started)
    for name in ("base", "healed"):
        say(f"{name + ' goes on:':17}" + continuation(models[name], tokenizer, valid))
    say(f'\nSaved to {out}. Try: python layerboost.py --model {out} --prompt "The history of"')
    if args.model == str(TINY):
        say(NEXT_STEPS)


def scan_layers(
    model: Model, tokenizer: Tokenizer, train: Tensor, valid: Tensor, tiers: dict, settings, args
) -> list[dict]:
    """The damage of each layer by tier, read from a scan made before, measured, or both; nothing is
    scanned where the plan is stated. Says first what the whole run will do."""
    n = len(model.layers)
    longest = min(CALIBRATION_CONTEXT, model.config.max_position_embeddings)
    calibration = train.flatten().unfold(0, longest, longest)[:CALIBRATION_SEQUENCES]
    measures = args.measure.split("+")
    same = {"model": fingerprint(*model.parameters()), "data": fingerprint(calibration), **tiers}
    if "task" in measures:
        same["task file"] = hash_file(args.tasks[0])

    layers = []
    path = Path(args.scan or Path(args.out) / "scan.json")
    if path.exists() and (args.scan or args.plan is None):
        layers = check_scan(path, same, measures, n)
    if args.scan and len(layers) < n:
        raise InputError(
            f"--scan {args.scan}: holds {len(layers)} of {n} layers; "
            "repeat the command that makes it"
        )

    announce(model, args, settings, calibration, valid, len(layers))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.compile:
        model.compiled_shapes |= {(2, longest), (settings.together, settings.context)}
    if args.plan:
        return layers
    if len(layers) == n:
        say(f"\nScan: read from {path}.")
        return layers

    say(f"\nScan: one layer at a time, from layer {len(layers)} on.")
    probes = make_probes(model, tokenizer, measures, calibration, train, args.tasks)
    return scan(model, probes, tiers, path, same, layers)


def check_arguments(model: Model, source: Path, args) -> Healing:
    """All that is wrong with the flags stops here, before any work. Returns the settings of the
    healing; args.keep, args.plan and args.batch get their values."""
    n = len(model.layers)
    if Path(args.out).resolve() == source.resolve():
        raise InputError(f"--out {args.out}: is the folder of the original; give another")
    if set(model.plan) != {"S"}:
        raise InputError(
            f"--model {args.model}: is converted already (plan {model.plan}); start from the "
            "original, or give --prompt, or measure it with bench.py"
        )

    if args.keep is None:
        args.keep = round(n / 3)
    if args.keep < 0 or args.drop < 0 or args.keep + args.drop > n:
        raise InputError(
            f"--keep {args.keep} --drop {args.drop}: the model has {n} layers; "
            f"give two numbers, together at most {n}"
        )
    measures = args.measure.split("+")
    if set(measures) - set(MEASURES):
        raise InputError(
            f"--measure {args.measure}: give kl, recall, task, or several joined with +"
        )
    reach = model.config.max_position_embeddings
    if "recall" in measures and reach < min(RECALL_PROMPTS):
        raise InputError(
            f"--measure {args.measure}: recall needs a model of {min(RECALL_PROMPTS)} positions; "
            "give --measure kl"
        )
    if "task" in measures and not args.tasks:
        raise InputError("--measure task: needs a question file; give --tasks FILE")
    if args.scan and not Path(args.scan).exists():
        raise InputError(f"--scan {args.scan}: no such file")
    if args.plan:
        args.plan = parse_plan(args.plan, n)
    convert(
        model, args.plan or "L" * n, args.window, args.sinks, args.feature_map
    )  # raises InputError

    return healing_settings(args, reach)


def healing_settings(args, reach: int) -> Healing:
    """For a model of `reach` positions. Raises InputError; args.batch gets its value."""
    if args.rank < 1 or not args.lr > 0:
        raise InputError(
            f"--rank {args.rank} --lr {args.lr:g}: give a rank of 1 or more and a rate above 0"
        )
    if args.batch is None:
        args.batch = rank_and_world()[1]
    micro_batch = args.batch if args.micro_batch is None else args.micro_batch
    if args.batch < 1 or args.context < 2 or micro_batch < 1:
        raise InputError(
            "--batch, --micro-batch, --context: give numbers of sequences, 1 or more, "
            "and of tokens, 2 or more"
        )
    context = min(args.context, reach)
    return Healing(
        args.tokens,
        rank=args.rank,
        full=args.full,
        lr=args.lr,
        seed=args.seed,
        context=context,
        batch=args.batch,
        micro_batch=args.micro_batch,
        long_context=max(context, min(LONG_CONTEXT, reach)),
        compile=bool(args.compile),
    )


def read_text(args, tokenizer: Tokenizer, model: Model, settings: Healing) -> tuple[Tensor, Tensor]:
    """Training and validation sequences [N, context]. Without --valid the last documents of --data
    are held out."""
    eos = model.config.eos_token_ids
    longest = min(EVALUATION_CONTEXT, model.config.max_position_embeddings)
    needed = args.sequences * longest
    documents = read_documents(args.data)
    if args.valid:
        held_out = read_documents(args.valid, "--valid")
    else:
        documents, held_out = hold_out(list(documents), 6 * needed)

    valid = pack_sequences(held_out, tokenizer, eos, longest, needed)
    wanted = max(settings.trained_tokens, TEXT_TOKENS)
    train = pack_sequences(documents, tokenizer, eos, settings.context, wanted)
    if train.numel() < settings.long_context:
        raise InputError(
            f"--data {args.data}: too little text; "
            f"{settings.long_context} tokens are needed at least"
        )
    if valid.numel() < longest:
        where = f"--valid {args.valid}"
        if not args.valid:
            where = f"--valid is not given, and what is held out of --data {args.data}"
        raise InputError(f"{where}: too little text; {longest} tokens are needed at least")
    return train, valid


def hold_out(documents: list[str], characters: int) -> tuple[list[str], list[str]]:
    """Splits off the last documents, about so many characters of them, at most a tenth of them
    all."""
    held_out: list[str] = []
    most = 0.1 * len(documents)
    while len(documents) > 1 and sum(map(len, held_out)) < characters and len(held_out) < most:
        held_out.append(documents.pop())
    return documents, held_out


# --- what the terminal shows -------------------------------------------------------------------


def announce(
    model: Model, args, settings: Healing, calibration: Tensor, valid: Tensor, scanned: int
):
    """What is going to happen, and about how long it takes here, from a short measurement."""
    n = len(model.layers)
    rate = forward_rate(model) * rank_and_world()[1]
    reach = model.config.max_position_embeddings
    tokens = calibration.numel() if "kl" in args.measure else 0
    if "recall" in args.measure:
        tokens += sum(length * count for length, count in RECALL_PROMPTS.items() if length <= reach)
    passes = 2 + sum(2 * (n - i) / n for i in range(scanned, n))  # over all layers
    passkeys = args.passkeys * sum(length for length in RECALL_LENGTHS if length <= reach)

    scanning = clock(tokens * passes / rate)
    healing = clock(settings.trained_tokens * 5 / rate)  # teacher, student, backward
    evaluating = clock(3 * (valid.numel() + passkeys) / rate)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    say(
        f"{args.model}: {n} layers, {parameters:.1f}M parameters, {args.dtype} on {args.device}; "
        f"a forward pass runs at {rate:,.0f} tokens/s here"
    )
    if args.plan:
        say(f"1. plan      {args.plan}, as given")
    elif scanned == n:
        say(f"1. plan      keeps {args.keep} layers, drops {args.drop}, from a scan made before")
    else:
        say(
            f"1. scan      {2 * (n - scanned)} trials on {tokens:,} tokens, then a plan that keeps "
            f"{args.keep} layers, drops {args.drop}   about {scanning}"
        )
    say(
        f"2. heal      {settings.trained_tokens:,} tokens   about {healing}",
        f"3. evaluate  base, converted, healed   about {evaluating}"
        + (" and the task files" if args.tasks else ""),
        f"All goes to {args.out}. Ctrl-C is safe: the same command goes on where it stopped.",
    )


def forward_rate(model: Model, tokens: int = 512) -> float:
    """Tokens a second of a forward pass, from the second of two short ones."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    with torch.inference_mode():
        float(model.hidden(ids).sum())
        start = time.perf_counter()
        float(model.hidden(ids).sum())
    return tokens / (time.perf_counter() - start)


def clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def describe_plan(model: Model, plan: str, tiers: dict, layers: list[dict], measures: list[str]):
    """What a plan is predicted to cost before healing, where there is a scan, and what it saves."""
    lines = []
    if layers:
        changed = [(row[tier], tier) for row, tier in zip(layers, plan) if tier != "S"]
        sums = [f"{name} {sum(row[name] for row, _ in changed):.3f}" for name in measures]
        lines.append(f"  predicted before healing, as the sum over its layers: {', '.join(sums)}")

    before = cache_bytes(model, 8192) / 2**20
    after = cache_bytes(convert(model, plan, **tiers), 8192) / 2**20
    lines.append(
        f"  {plan.count('S')} softmax, {plan.count('L')} sliding-window linear, {plan.count('X')} "
        f"removed; cache of a sequence at 8k tokens {after:.1f} MiB, was {before:.1f} MiB"
    )
    return lines


def write_report(
    out: Path,
    report: dict,
    curve: dict,
    settings: Healing,
    args,
    layers: list[dict],
    seconds: float,
) -> None:
    """report.json, and report.md, which the terminal shows too."""
    healed, converted = report["healed"], report["converted"]
    plan = healed["plan"]
    validation = ", ".join(f"{kl:.3f} at {tokens:,}" for tokens, kl in curve["valid"])
    tiers = [plan.count(tier) for tier in "SLX"]
    text = f"""
# {Path(args.model).name}, boosted

Plan `{plan}`: of {len(plan)} layers, {tiers[0]} keep softmax attention (S), {tiers[1]} see a
window of {args.window} tokens, the first {args.sinks} and a linear-attention summary of the rest
(L), {tiers[2]} have no attention (X). Healed on {settings.trained_tokens:,} tokens.

{format_table(table(report))}

KL is how far the next-token distribution is from the base model's, top-1 agreement how often both
name the same token; passkey recall is how often a number hidden in a text of that many tokens is
repeated. `converted` is before healing.

Validation KL while healing, on the first {VALIDATION_SEQUENCES} sequences: {validation}.

KL {converted["kl"]:.4f} -> {healed["kl"]:.4f},
agreement {converted["agreement"]:.1%} -> {healed["agreement"]:.1%}; {clock(seconds)} in all.
"""
    body = {
        **report,
        "plan": plan,
        "healing": {"settings": asdict(settings), **curve},
        "scan": layers,
        "rank_agreements": rank_agreements(layers) if layers else {},
        "command": vars(args),
        "seconds": round(seconds, 1),
    }
    write_json(out / "report.json", body)
    write_text(out / "report.md", text.lstrip())
    say(text)


def continuation(model: Model, tokenizer: Tokenizer, valid: Tensor) -> str:
    """Some words of the validation text as a model goes on with them, on one line; drawn with one
    seed for all models."""
    ids = valid[len(valid) // 2, None, :16].to(model.device)
    start = tokenizer.decode(ids[0].tolist())
    whole = tokenizer.decode(model.generate(ids, 40, temperature=0.7, top_k=40, seed=0)[0].tolist())
    return " ".join(f"{start} >>>{whole[len(start) :]}".split())


def generate_text(model: Model, tokenizer: Tokenizer, args) -> None:
    """Streams the continuation of --prompt to the terminal."""
    ids = tokenizer.encode(args.prompt)
    if not ids:
        raise InputError("--prompt is empty; give it some text")
    top_k = 1 if args.top_k is None else args.top_k
    top_p = 1.0 if args.top_p is None else args.top_p
    if args.temperature < 0 or top_k < 1 or not 0 < top_p <= 1:
        raise InputError("--temperature, --top-k, --top-p: give 0 or more, 1 or more, above 0 to 1")

    print(args.prompt, end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
    prompt = torch.tensor([ids], device=model.device)
    sampling = (args.temperature, args.top_k, args.top_p, args.seed)
    for token in model.stream(prompt, args.max_new_tokens, *sampling):
        if token.item() in model.config.eos_token_ids:
            break
        print(decoder.decode(tokenizer.decode_bytes(token.tolist())), end="", flush=True)
    print(decoder.decode(b"", final=True))


# --- command line ------------------------------------------------------------------------------


def token_count(text: str) -> int:
    """200k, 10M or a plain number."""
    scale = {"k": 1e3, "m": 1e6}.get(text[-1:].lower())
    try:
        return int(float(text[:-1]) * scale) if scale else int(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of tokens; write 200k, 10M or 4096"
        ) from None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python layerboost.py [--model MODEL] [options]",
        description="Makes a pretrained Llama-style model cheaper to serve: scan, plan, convert, "
        "heal, evaluate, save. Without --model: the embedded one, its own text and settings.",
    )
    group = parser

    def add(flag: str, metavar: str, help: str, kind=str, default=None, **options) -> None:
        group.add_argument(flag, metavar=metavar, help=help, type=kind, default=default, **options)

    group = parser.add_argument_group("model")
    add("--model", "MODEL", "a folder in the Hub's layout or a Hub id [the embedded one]")
    add("--revision", "REV", "branch, tag or commit on the Hub [main]")
    add("--out", "DIR", "for the model, scan.json and report.json [out/<model name>]")

    group = parser.add_argument_group("text")
    kinds = ".txt, .jsonl, .jsonl.gz, a folder of them, or hub:DATASET/FILE"
    add("--data", "TEXT", f"to heal on: {kinds} [one shard of C4]")
    add("--valid", "TEXT", "to evaluate on [the last documents of --data, held out]")
    add("--sequences", "N", "of 1,024 tokens, to evaluate on [32]", positive)
    add("--passkeys", "N", "hidden numbers to repeat, at each length [20]", positive, 20)
    add("--tasks", "FILE", "question files to evaluate on [none]", nargs="+", default=[])
    add("--limit", "N", "only the first items of each question file [all]", positive)

    group = parser.add_argument_group("scan and plan")
    add("--keep", "K", "layers that keep softmax attention [a third]", int)
    add("--drop", "N", "layers whose attention is removed: costly (results/healing.md) [0]", int)
    add(
        "--planner",
        "NAME",
        "tier: least damage; paper: bands by X [tier]",
        choices=PLANNERS,
        default="tier",
    )
    add("--plan", "LETTERS", "this plan: S, L or X for each layer, or uniform:L [scan and plan]")
    add("--measure", "NAMES", "damage: kl, recall, task or a sum [kl+recall]", default="kl+recall")
    add("--scan", "FILE", "plan from this scan.json [scan, or go on with the one in OUT]")
    add("--window", "W", "last tokens that an L layer sees exactly [64]", int, 64)
    add("--sinks", "S", "first tokens that it sees exactly [4]", int, 4)
    maps = ", ".join(FEATURE_MAPS)
    add("--feature-map", "PHI", f"of its tail: {maps} [hedgehog]", default="hedgehog")

    group = parser.add_argument_group("healing")
    add("--tokens", "N", "to heal on, as 200k or 10M [10M]", token_count)
    add("--rank", "R", "of the adapters [16]", int, 16)
    add("--lr", "LR", "highest learning rate [1e-3]", float, 1e-3)
    add("--context", "N", "tokens of a training sequence [512]", int, 512)
    add("--batch", "N", "sequences a step, over all processes [one a process]", int)
    add("--micro-batch", "N", "sequences through the model at a time [all]", int)
    flag = {"action": "store_true"}
    group.add_argument("--full", help="train all weights instead of adapters [adapters]", **flag)
    less = "less memory: compute activations again in the backward pass [keep them]"
    group.add_argument("--activation-checkpointing", help=less, **flag)

    group = parser.add_argument_group("generation")
    add("--prompt", "TEXT", "only continue this text with MODEL")
    add("--max-new-tokens", "N", "at most so many more tokens [100]", positive, 100)
    add("--temperature", "T", "0 takes the likeliest token [0]", float, 0.0)
    add("--top-k", "K", "draw from the K likeliest tokens [all]", int)
    add("--top-p", "P", "draw from the likeliest that hold P of the probability [1]", float)

    group = parser.add_argument_group("machine")
    add("--seed", "N", "of data order, adapters and samples [0]", int, 0)
    add("--device", "NAME", "cpu or cuda [the GPU when there is one]")
    dtypes = ("bfloat16", "float32")
    add(
        "--dtype",
        "NAME",
        "bfloat16 or float32 [bfloat16 where the processor has it]",
        choices=dtypes,
    )
    compiled = (
        "run scan and healing through torch.compile, which pays from some 100k tokens on; "
        "--no-compile leaves out the C++ of cpu.cpp, too [neither]"
    )
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help=compiled)

    args = parser.parse_args(argv)
    for name, value in (TINY_DEFAULTS if args.model is None else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or f"out/{Path(args.model).resolve().name}"
    return args


def run(args) -> None:
    args.device = start_process(args.device)
    args.dtype = args.dtype or pick_dtype(args.device)
    source = find_model(args.model, args.revision)
    tokenizer = load_tokenizer(str(source))
    model = load_model(str(source), dtype=getattr(torch, args.dtype), device=args.device)
    if args.prompt is None:
        boost(model, tokenizer, source, args)
    else:
        generate_text(model, tokenizer, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 diverged, 2 bad input, 130 stopped by Ctrl-C."""
    args = parse_arguments(argv)
    cpu.enabled = args.compile is not False
    code, message = 0, None
    try:
        run(args)
    except InputError as error:
        code, message = 2, str(error)
    except OSError as error:
        code, message = 2, f"{error.filename or '--out'}: {error.strerror or error}"
    except Diverged as error:
        code, message = 1, f"{error}; what was saved before is in {args.out}"
    except KeyboardInterrupt:
        code, message = 130, "stopped"
        if args.prompt is None:
            message += f"; run the same command again to go on from what is in {args.out}"
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if message and is_main_process():
        print(f"layerboost: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
