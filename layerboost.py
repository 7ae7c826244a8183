"""LayerBoost (arXiv 2604.22050) turns a pretrained model into a cheaper one, in these steps:

    load -> scan -> plan -> convert -> heal -> evaluate -> report and save

Every layer of a Llama-style model pays for softmax attention over the whole context; few of them
need it. The scan changes one layer at a time, to X (attention removed) and to L (sliding-window
linear attention), and measures the damage. The plan keeps softmax (S) where the damage is worst.
Healing distils the original back into the converted model. `boost` tells this story.

    python layerboost.py                    all of this on the embedded model in tiny/, in a minute
    python layerboost.py --model DIR --data TEXT --keep 10 --tokens 200k --out out/name
    python layerboost.py --model out/name --prompt "The capital of France is"    or --chat
    python layerboost.py --model DIR --adapter out/name/adapter.safetensors    the same, no healing
    torchrun --nproc-per-node=4 layerboost.py --model ...    work shared over processes
"""

import argparse
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while torch is imported
    signal.signal(signal.SIGINT, lambda *_: sys.stderr.write("stopped\n") and os._exit(130))

import torch
from torch import Tensor

import chat
import cpu
import planner
import report
import scan
from adapter import load_adapter, read_adapter
from attention import compiles
from budget import (
    LEAST_STEPS,
    SCAN_TOKENS,
    SCANS,
    Budget,
    announce,
    make_budget,
    measure_rates,
    recomputes,
    weighs_windows,
)
from config import REMOVED, default_window
from distill import Healing, heal, healing_bytes, tail_names
from fit import copy_maps, fit_maps
from hub import find_model, fingerprint, hash_files, require
from kernels import FEATURE_MAPS
from machine import (
    gather,
    hold_folder,
    is_main_process,
    pick_dtype,
    rank_and_world,
    require_disk,
    require_memory,
    start_process,
)
from measure import read_tasks
from model import Model, convert, load_model, parse_plan, save_model
from roofline import HARDWARE, measure_hardware
from terminal import (
    MACHINE_FLAGS,
    Parser,
    add_flags,
    at_least,
    clock,
    run_program,
    say,
    token_count,
    utf8,
)
from text import C4, ENCODING, TEXT_KINDS, TEXT_TOKENS, fitting_text, read_documents, read_text
from tokenizer import Tokenizer, load_tokenizer

SHORT_CONTEXT = 512  # least tokens of a sequence in healing's first stage (`reach_beyond`)
LONG_CONTEXT = 4096  # tokens a sequence in the last stage of healing, or all of its positions
DAMAGE = 0.05  # largest, if no budget is given; for SmolLM2, twice the speed

TINY = Path(os.path.relpath(Path(__file__).resolve().parent / "tiny"))
TINY_DEFAULTS = {  # used without --model
    "model": str(TINY),
    "data": str(TINY / "train.jsonl.gz"),
    "valid": str(TINY / "valid.jsonl.gz"),
    "tokens": 36_000,
    "damage": 0.017,  # with few layers, each changed one counts more
}

PAPER = {"removed": "nothing", "window": 64, "feature_map": "hedgehog"}

NEXT_STEPS = """
Next, a real model (a folder in the Hub's layout or a Hub id) on your own text:
  python layerboost.py --model HuggingFaceTB/SmolLM2-135M --data TEXT --tokens 200k
Other plans to try:
  python layerboost.py --paper --out out/paper
  python layerboost.py --plan uniform:L --out out/uniform"""


# --- the story ---------------------------------------------------------------------------------


def boost(model: Model, tokenizer: Tokenizer, source: Path, args) -> None:
    """Scan, plan, convert, heal, evaluate, report and save: all into args.out."""
    started = time.monotonic()
    out = Path(args.out)
    tiers = {name: getattr(args, name) for name in ("window", "sinks", "feature_map", "removed")}
    if args.window is None:  # the scan tries this one, and the plan may have another
        tiers["window"] = default_window(model.config)
    check_arguments(model, source, tiers, args)
    tasks = read_tasks(args.tasks)
    hold_folder(out)

    # The budget sizes everything below.
    step = args.batch * min(args.context or SHORT_CONTEXT, model.config.max_position_embeddings)
    rates = measure_rates(model, healing_settings(model, step, 2, args), args)
    budget = make_budget(model, args, step, rates)
    args.tokens, args.sequences, args.passkeys = budget.tokens, budget.sequences, budget.passkeys
    settings = healing_settings(model, budget.tokens, budget.validations, args)
    train, valid = read_text(args, tokenizer, model.config, settings)
    fitting = fitting_text(train, budget.fitted, SCAN_TOKENS)
    budget.settle(len(valid), fitting.numel())

    # Scan and plan.
    layers, plan, tiers["window"] = scan_and_plan(
        model, tokenizer, train, fitting, tiers, settings, budget, rates, args
    )
    say(f"\nPlan: {plan}", *planner.describe_plan(model, plan, tiers, layers, args.measure))

    # Convert. `converted` keeps untrained tails of its own; the student's are trained.
    converted = convert(model, plan, **tiers)
    student = convert(model, plan, **tiers)
    if "X" in plan and args.removed == "linear":
        fit_maps(model, converted, fitting)
        copy_maps(converted, student)
    student.recompute = recomputes(args, tiers["window"], model)

    # Heal.
    if args.context is None and "L" in plan:
        settings = reach_beyond(tiers["window"], settings)
    if not tail_names(student):  # nothing to train alone
        settings = replace(settings, long_share=0.0)
    say(f"\nHeal: {describe_healing(settings)}")
    same = scan.identity_of(model, train, tiers) | {"plan": plan, "dtype": args.dtype}
    watched = valid[: budget.watched]
    curve = heal(model, student, train, watched, settings, out / "healing.safetensors", same)
    if not is_main_process():
        return  # the main process does the rest
    say(f"\nSave: the healed model, to {out}.")
    save_model(student, out, source)

    # Evaluate and report.
    say("\nEvaluate: the untouched, the converted and the healed model on the same text.")
    models = {"base": model, "converted": converted, "healed": student}
    sizes = (args.passkeys, budget.recall_lengths)
    measured = out / "evaluation.json"
    figures = report.evaluate(models, model, tokenizer, valid, tasks, *sizes, measured)
    same["valid"] = fingerprint(valid)
    seconds = time.monotonic() - started
    report.write_report(figures, curve, settings, args, layers, seconds, same, source)
    for name in ("base", "healed"):
        say(f"{name + ' goes on:':17}" + report.continuation(models[name], tokenizer, valid))
    say_what_next(args)


def take_adapter(model: Model, source: Path, args) -> None:
    """Applies --adapter instead of healing, and saves the model to args.out."""
    check_original(model, source, args)
    healed = load_adapter(model, Path(args.adapter))
    save_model(healed, args.out, source)
    say(f"Plan: {healed.plan}")
    say_what_next(args)


def check_original(model: Model, source: Path, args) -> None:
    require(
        Path(args.out).resolve() != source.resolve(),
        f"--out {args.out}: is the folder of the original; give another",
    )
    require(
        set(model.plan) == {"S"},
        f"--model {args.model}: is converted already (plan {model.plan}); start from the "
        "original, or give --prompt or --chat, or measure it with report.py",
    )


def check_arguments(model: Model, source: Path, tiers: dict, args) -> None:
    """Checks the flags together and with this model before any work, and sets args.keep, args.plan
    and args.batch. Raises InputError."""
    check_original(model, source, args)
    n = len(model.layers)
    reach = model.config.max_position_embeddings
    args.plan = None if args.plan is None else parse_plan(args.plan, n)
    args.workload = (args.workload[0], min(args.workload[1], reach))
    args.batch = args.batch or rank_and_world()[1]
    if "keep" in args.limits:
        args.keep = round(n / 3) if args.keep is None else args.keep
        args.drop = args.drop or 0
        require(
            args.keep + args.drop <= n,
            f"{args.split}: {args.keep} layers to keep and {args.drop} to drop are more than the "
            f"{n} of the model; give --keep and --drop that are {n} together at most",
        )
    shortest = min(min(prompts) for _, _, prompts in SCANS)
    require(
        "recall" not in args.measure or reach >= shortest,
        f"--measure: recall needs a model of {shortest} positions; give --measure kl",
    )
    require(
        "task" not in args.measure or args.tasks,
        "--measure task: needs a question file; give --tasks FILE",
    )
    require(args.scan is None or Path(args.scan).is_file(), f"--scan {args.scan}: no such file")
    convert(model, args.plan or "L" * n, **tiers)  # raises InputError
    for flag in ("data", "valid"):
        if text := getattr(args, flag):
            next(read_documents(text, f"--{flag}", args.encoding), None)  # raises InputError


def healing_settings(model: Model, tokens: int, validations: int, args) -> Healing:
    """Healing on sequences of --context or SHORT_CONTEXT. Raises InputError if memory or disk are
    too small."""
    reach = model.config.max_position_embeddings
    context = min(args.context or SHORT_CONTEXT, reach)
    settings = Healing(
        tokens,
        rank=args.rank,
        lr=args.lr,
        seed=args.seed,
        context=context,
        batch=args.batch,
        long_context=max(context, min(LONG_CONTEXT, reach)),
        validations=validations,
        compile=bool(args.compile),
    )
    memory, disk = healing_bytes(model, settings)
    require_memory(memory, args.device, "healing", "give a smaller --context, --batch or --rank")
    require_disk(disk, Path(args.out))
    return settings


def reach_beyond(window: int, settings: Healing) -> Healing:
    """Sequences of twice the window, in powers of two, if there are at least LEAST_STEPS of them:
    within its window an L layer is softmax attention and has nothing to learn."""
    context = settings.context
    most = min(settings.long_context, settings.tokens // (settings.batch * LEAST_STEPS))
    while context < 2 * window and 2 * context <= most:
        context *= 2
    return replace(settings, context=context)


def scan_and_plan(
    model: Model, tokenizer: Tokenizer, train, fitting, tiers: dict, settings, budget, rates, args
) -> tuple[list[dict], str, int]:
    """The damage of each layer by tier, the plan, and the window of its L layers. The damage is
    read from an earlier scan, measured, or both; nothing is scanned if the plan is given. First
    says what the whole run will do."""
    n = len(model.layers)
    count, longest = budget.calibration
    path, same, layers = earlier_scan(model, train, tiers, budget, args)
    scanned = scan.count_trials(layers) // len(scan.TRIALS)
    if scanned == n and not args.plan:  # the plan is known already
        plan, window, choices = make_plan(model, layers, tiers, args)
        budget.removes = "X" in plan

    announce(model, budget, rates, scanned, settings.trained_tokens, args)
    if args.compile:
        model.compiled_shapes |= {(min(2, count), longest), (settings.together, settings.context)}
    if args.plan:
        return layers, args.plan, tiers["window"]
    if scanned == n:
        say(f"\nScan: read from {path}.")
        show_plan(layers, plan, window, choices, args)
        return layers, plan, window

    resumed = f"resumed at layer {scanned} of {n}, from {path}" if layers else f"{n} layers"
    say(f"\nScan: one layer at a time, {resumed}.")
    start = time.monotonic()
    calibration = train.flatten().unfold(0, longest, longest)[:count]
    local = tiers["window"] + tiers["sinks"]
    probes = scan.make_probes(
        model, tokenizer, args.measure, calibration, train, budget.prompts, args.tasks, local
    )
    served = None
    if budget.served and longest >= 2 * tiers["window"]:  # else the damage says nothing about it
        served = train.flatten()[None, : budget.served]
    layers = scan.scan(model, probes, tiers, path, same, layers, fitting, served, longest)
    seconds = time.monotonic() - start

    plan, window, choices = make_plan(model, layers, tiers, args)
    budget.removes = "X" in plan
    rest = rates.of(budget) - rates.seconds(budget.scan)
    say(f"The scan took {clock(seconds)}, the rest takes about {clock(rest)}.\n")
    show_plan(layers, plan, window, choices, args)
    return layers, plan, window


def earlier_scan(
    model: Model, train: Tensor, tiers: dict, budget: Budget, args
) -> tuple[Path, dict, list[dict]]:
    """The file of this run's scan, the identity that it must have, and the layers in it. Raises
    InputError for a --scan that does not fit or is incomplete."""
    n = len(model.layers)
    same = scan.identity_of(model, train.flatten()[: budget.context], tiers)
    same["served"] = budget.served  # tokens of the text that windows are weighed on
    if not args.scan:  # it can be resumed, at the same sizes
        count, longest = budget.calibration
        same["sizes"] = f"{count} x {longest} tokens, passkeys {budget.prompts}"
    if "task" in args.measure:
        same["task file"] = hash_files(args.tasks[0])

    layers = []
    path = Path(args.scan or Path(args.out) / "scan.json")
    if path.exists() and (args.scan or args.plan is None):
        layers = scan.check_scan(path, same, args.measure, n)
    scanned = scan.count_trials(layers) // len(scan.TRIALS)
    require(
        not args.scan or scanned == n,
        f"--scan {args.scan}: holds {scanned} of {n} layers; repeat the command that makes it",
    )
    return path, same, layers


def make_plan(model: Model, layers: list[dict], tiers: dict, args) -> tuple[str, int, list]:
    """The plan and the window of its L layers, from the scan by --keep and --drop or the one budget
    that is given. Third, the plans that it was chosen from."""
    hardware = HARDWARE.get(args.hardware)
    if hardware is None:  # all processes plan by the first one's rates
        hardware = gather(measure_hardware(args.device, model.norm.weight.dtype))[0]
    windows = planner.windows_of(layers) if weighs_windows(args) else []
    costs = {
        window: planner.costs_of(layers, args.measure, window)
        for window in windows or [tiers["window"]]
    }
    choices = planner.price_plans(model, costs, tiers, args.workload, hardware)
    ((name, limit),) = args.limits.items()
    if name == "keep":
        window = tiers["window"]
        make = planner.plan_paper if args.paper else planner.plan_tier
        plan = make(costs[window], args.keep, args.drop)
    else:
        plan, window, *_ = planner.choose(choices, name, limit)
    return plan, window, choices


def show_plan(layers: list[dict], plan: str, window: int, choices: list, args) -> None:
    """Shows the scan and the plans to choose from, as charts."""
    batch, context = args.workload
    say(planner.chart(layers, args.measure, plan, window))
    step = f"a decoding step of {batch} x {context:,} tokens"
    title = f"\nfor {step}, predicted for {args.hardware}:"
    say(planner.frontier_chart(choices, plan, window, title))


# --- what the terminal shows -------------------------------------------------------------------


def describe_healing(settings: Healing) -> str:
    short, long = settings.short_steps, settings.steps - settings.short_steps
    return (
        f"{settings.trained_tokens:,} tokens, {short} steps of KL distillation, then {long} of the "
        "tails alone on long sequences."
    )


def say_what_next(args) -> None:
    is_tiny = args.model == str(TINY)
    prompt = "It was late in the evening when" if is_tiny else "The history of"
    say(f'\nSaved to {args.out}. Try: python layerboost.py --model {args.out} --prompt "{prompt}"')
    say(f'To share it: hf upload YOU/{Path(args.out).name} {args.out} . --exclude "healing*"')
    if is_tiny:
        say(NEXT_STEPS)


# --- command line ------------------------------------------------------------------------------


def workload(text: str) -> tuple[int, int]:
    try:
        batch, context = map(at_least(1), text.split("x"))
        return batch, context
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: write sequences x tokens of each, as 16x4096"
        ) from None


def measure_names(text: str) -> list[str]:
    names = text.split("+")
    if set(names) - set(scan.MEASURES):
        known = ", ".join(scan.MEASURES)
        raise argparse.ArgumentTypeError(f"{text!r}: give {known}, or several joined with +")
    return names


FLAGS = {
    "model": {
        "model": (str, None, "a folder in the Hub's layout or a Hub id [the embedded one]"),
        "revision": (str, None, "branch, tag or commit on the Hub [main]"),
        "out": (str, None, "folder for the model, scan.json and report.json [out/<model name>]"),
    },
    "text": {
        "data": (str, C4, f"to heal on: {TEXT_KINDS}"),
        "valid": (str, None, "to evaluate on [the last twentieth of --data, held out]"),
        "encoding": ENCODING,
        "sequences": (at_least(1), None, "of 2,048 tokens, to evaluate on [2 to 16, by --tokens]"),
        "passkeys": (
            at_least(1, int, 10_000),
            None,
            "hidden numbers to repeat, a length [5 to 20]",
        ),
        "tasks": (list, [], "question files to evaluate on [none]"),
    },
    "scan and plan": {
        "damage": (at_least(0.0, float), None, f"largest, as predicted [{DAMAGE}]"),
        "speedup": (at_least(1.0, float), None, "smallest, as predicted"),
        "cache": (at_least(0.0, float), None, "share of it to keep, as 0.3"),
        "workload": (workload, "16x4096", "decoding step to plan for: sequences x context"),
        "hardware": ((*HARDWARE, "this"), "a10", "that speed is predicted for"),
        "keep": (at_least(0), None, "layers that keep softmax attention [a third]"),
        "drop": (at_least(0), None, "layers whose attention is removed [0]"),
        "plan": (str, None, "this one: S, L or X for each layer, or uniform:L [scan and plan]"),
        "paper": (bool, False, "its recipe: window 64, Hedgehog tail, X nothing, ranked by X"),
        "removed": (REMOVED, "linear", "in place of removed attention: a fitted map, or nothing"),
        "measure": (measure_names, "kl+recall", "damage: kl, recall, task or a sum"),
        "scan": (
            str,
            None,
            "plan from this scan.json, made on any text [scan, or go on with the one in OUT]",
        ),
        "window": (int, None, "last tokens that an L layer sees exactly [chosen with the plan]"),
        "sinks": (int, 4, "first tokens that it sees exactly"),
        "feature-map": (str, "softmax", f"of its tail: {', '.join(FEATURE_MAPS)}"),
    },
    "healing": {
        "tokens": (token_count, None, "to heal on, as 200k; also sizes scan and evaluation [10M]"),
        "minutes": (at_least(1e-9, float, 1e6), None, "for the whole run, instead of --tokens"),
        "adapter": (str, None, "take what a run learned (its adapter.safetensors), heal nothing"),
        "rank": (at_least(1), 16, "of the adapters"),
        "lr": (at_least(1e-9, float, 10.0), 1e-3, "highest learning rate"),
        "context": (at_least(2), None, "tokens of a training sequence [512, or twice the window]"),
        "batch": (at_least(1), None, "sequences a step, over all processes [one a process]"),
        "activation-checkpointing": (bool, None, "less memory, more time [with wide windows]"),
    },
    "generation": {
        "prompt": (utf8, None, "only continue this text with MODEL"),
        "chat": (bool, None, "only talk to MODEL, by its chat template"),
        "system": (utf8, None, "message that a chat begins with [none]"),
        "max-new-tokens": (
            at_least(1, int, 10**6),
            None,
            "at most so many more tokens [100; chat: 1,000]",
        ),
        "temperature": (at_least(0.0, float, 100.0), 0.7, "0 takes the likeliest token"),
        "top-k": (at_least(1), None, "draw from the K likeliest tokens [all]"),
        "top-p": (at_least(0.0, float, 1.0), 0.9, "draw from the likeliest P of probability"),
    },
    "machine": {
        "repeat": (str, None, "this report.json's run, into --out [its folder's name and -repeat]"),
        "seed": (at_least(0, int, 2**62), 0, "of data order, adapters and samples"),
        **MACHINE_FLAGS,
        "compile": (
            bool,
            None,
            "run scan and healing through torch.compile, which pays from some 100k tokens on; "
            "--no-compile leaves out the C++ of cpu.cpp, too [neither]",
        ),
    },
}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = Parser(
        usage="python layerboost.py [--model MODEL] [options]",
        description="Makes a pretrained Llama-style model cheaper to serve: scan, plan, convert, "
        "heal, evaluate, save. Without --model: the embedded one, its own text and settings.",
    )
    add_flags(parser, FLAGS)
    given = parser.parse_args(argv)
    if given.repeat:
        argv = report.recorded_flags(given.repeat, parser) + (argv or sys.argv[1:])
        given = parser.parse_args(argv)
    for flags in (("tokens", "minutes"), ("prompt", "chat", "adapter")):
        named = [f"--{flag}" for flag in flags if getattr(given, flag) not in (None, False)]
        if named[1:]:
            parser.error(f"{' and '.join(named)}: give one of them")

    defaults = {"tokens": TEXT_TOKENS}
    if given.model is None:
        defaults |= TINY_DEFAULTS
    if given.paper:
        defaults |= PAPER
    if given.minutes:
        del defaults["tokens"]
    if given.data != C4:
        defaults.pop("valid", None)  # would be text of another kind
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    budgets = {"damage": given.damage, "speedup": given.speedup, "cache": given.cache}
    args.limits = {name: limit for name, limit in budgets.items() if limit is not None}
    if given.keep is not None or given.drop is not None or given.paper:
        args.limits["keep"] = given.keep
    if len(args.limits) > 1:
        parser.error("--keep and --drop, --damage, --speedup, --cache: give one budget")
    args.limits = args.limits or {"damage": args.damage or DAMAGE}

    split = {"--keep": given.keep, "--drop": given.drop}
    args.split = " ".join(f"{flag} {value}" for flag, value in split.items() if value is not None)
    args.out = args.out or f"out/{Path(args.model).resolve().name}"
    return args


def run(args) -> None:
    args.device = start_process(args.device)
    if args.compile and not compiles(torch.device(args.device)):
        args.compile = None
    if args.adapter:
        args.dtype = args.dtype or read_adapter(Path(args.adapter))["dtype"]
    args.dtype = args.dtype or pick_dtype(args.device)
    source = find_model(args.model, args.revision)
    tokenizer = load_tokenizer(str(source))
    model = load_model(str(source), dtype=getattr(torch, args.dtype), device=args.device)
    if args.prompt is not None:
        chat.generate_text(model, tokenizer, args)
    elif args.chat:
        chat.chat(model, tokenizer, source, args)
    elif args.adapter:
        take_adapter(model, source, args)
    else:
        boost(model, tokenizer, source, args)


def main(argv=None) -> int:
    args = parse_arguments(argv)
    cpu.enabled = args.compile is not False
    return run_program(
        "layerboost",
        lambda: run(args),
        lambda: "" if args.prompt or args.chat or args.adapter else report.kept(args.out),
    )


if __name__ == "__main__":
    sys.exit(main())
