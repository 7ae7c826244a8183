"""The report: quality and speed of models side by side, as a table.

    python report.py out/smollm2 --base DIR --valid TEXT --tasks FILE ...

layerboost.py ends with the same table, of the untouched, the converted and the healed model. The
last line that the command prints is one JSON document.
"""

import argparse
import functools
import itertools
import json
import sys
import zlib
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import measure
from bench import decode_times
from distill import Healing, healed_tokens
from engine import Engine
from hub import InputError, fingerprint, hash_files, read_json, require, write_json, write_text
from machine import environment, pick_device, pick_dtype
from model import Model, cache_bytes, load_model
from scan import TRIALS, count_trials, read_scan
from terminal import (
    MACHINE_FLAGS,
    Parser,
    add_flags,
    at_least,
    format_table,
    run_program,
    say,
    visible,
)
from text import C4, CONTEXT, ENCODING, TEXT_KINDS, pack_sequences, read_documents
from tokenizer import Tokenizer, load_tokenizer

NOT_REPEATED = ("out", "split", "limits", "minutes", "repeat", "prompt", "chat", "adapter")
DECODED = 2**15  # tokens in the caches where decoding is timed
LONG = 4096  # of one sequence, there
WRITTEN = 32  # continuations at most


def evaluate(
    models: dict[str, Model],
    base: Model,
    tokenizer: Tokenizer,
    valid: Tensor,
    tasks: dict[str, list[dict]],
    passkeys: int = 20,
    lengths: tuple[int, ...] = measure.RECALL_LENGTHS,
    path: Path | None = None,
) -> dict[str, dict]:
    """The figures of every model under its name: those of `measure.text_quality` on valid [N, T]
    ids, of `measure.writing_quality` after the first halves of up to 32 of them (left out below
    8), recall of `passkeys` passkeys (a multiple of five), hidden in that text, at each of the
    lengths that the model has positions for, tasks, cache_bytes and decode_tokens_per_second. All
    but speed are kept in the file `path` and not measured again (`once`)."""
    held = min(LONG, base.config.max_position_embeddings)
    together = max(1, DECODED // held)
    engines = {name: Engine(model, together, held) for name, model in models.items()}
    times = decode_times(engines, held, 12)
    del engines  # and the memory of their caches

    count = max(1, passkeys // len(measure.RECALL_DEPTHS))
    batches = valid.to(base.device).split(measure.TEXT_BATCH)
    base_states = functools.cache(lambda: measure.hidden_states(base, batches))

    def text(model: Model) -> dict:
        return measure.text_quality(model, base, tokenizer, valid, base_states())

    prompts = valid[:WRITTEN, : valid.shape[1] // 2]
    base_writes = functools.cache(lambda: measure.write_on(base, prompts))

    def writing(model: Model) -> dict:
        ours = base_writes() if model is base else measure.write_on(model, prompts)
        return measure.writing_quality(base, prompts, ours, base_writes())

    report = {}
    for name, model in models.items():
        same = {
            "tensors": fingerprint(*model.parameters(), *base.parameters(), valid),
            "config": f"{model.config} {model.norm.weight.dtype}",
        }
        report[name] = figures = once(path, f"text of {name}", same, text, model)
        reach = model.config.max_position_embeddings
        possible = [length for length in lengths if length <= reach]
        asked = same | {"lengths": possible, "passkeys": count}
        recall = (measure.passkey_recall, model, tokenizer, valid, possible, count)
        figures["recall"] = once(path, f"passkeys of {name}", asked, *recall)
        if len(prompts) >= measure.LEAST_WRITTEN:
            figures["writing"] = once(path, f"writing of {name}", same, writing, model)
        figures["text"] = list(valid.shape)
        figures["passkeys"] = count * len(measure.RECALL_DEPTHS)
        figures["tasks"] = {}
        for task, items in tasks.items():
            asked = same | {"file": zlib.crc32(json.dumps(items).encode())}
            quality = (measure.task_quality, model, tokenizer, task, items)
            figures["tasks"][task] = once(path, f"{task} of {name}", asked, *quality)
        figures["cache_bytes"] = {str(n): cache_bytes(model, n) for n in (1024, 8192)}
        figures["decoded"] = together, held
        figures["decode_tokens_per_second"] = together / measure.quantile(times[name], 0.5)
        figures["plan"], figures["window"] = model.plan, model.config.window
    return report


def once(path: Path | None, name: str, identity: dict, function, *arguments) -> dict:
    """function(*arguments), at once written into the file `path` under `name`; what is there
    already, where it was measured under the same identity."""
    kept = read_json(path) if path and path.exists() else {}
    entry = kept.get(name)
    if not isinstance(entry, dict) or entry.get("identity") != identity or "figures" not in entry:
        kept[name] = {"identity": identity, "figures": function(*arguments)}
        if path:
            write_json(path, kept)
    return kept[name]["figures"]


def table(report: dict[str, dict]) -> str:
    """The figures of `evaluate` as a table: a row for each figure, a column for each model."""
    columns = []
    for figures in report.values():
        rows = measures(figures).items()
        columns.append({label: with_error(*row) for label, (_, *row) in rows})
    labels = dict.fromkeys(itertools.chain(*columns))  # each once, in order
    rows = [[label, *(column.get(label, "") for column in columns)] for label in labels]
    return format_table([["", *report], *rows])


def with_error(value: float, error: float, form: str) -> str:
    return f"{value:{form}} ±{error:{form}}" if error else f"{value:{form}}"


def measures(figures: dict) -> dict[str, tuple[int, float, float, str]]:
    """{label: row} of one model. A row: 1 where more is better and -1 where less is, the value, its
    standard error (0 where there is none), and their format."""
    rows = {}

    def share(value: float, count: int, form: str) -> tuple:
        return 1, value, measure.share_error(value, count), form

    for label, name, form, sign in (
        ("bits per byte", "bits_per_byte", ".3f", -1),
        ("perplexity", "perplexity", ".2f", -1),
        ("KL to the base, nats/token", "kl", ".4f", -1),
        ("top-1 agreement", "agreement", ".1%", 1),
    ):
        rows[label] = sign, figures[name], figures["errors"][name], form
    for label, name, form, sign in (
        ("nats/token of its writing, by the base", "nats", ".3f", -1),
        ("4-grams in it that occurred before", "repeated", ".1%", -1),
        (f"greedy tokens as the base's, of {measure.WRITTEN}", "as_base", ".0f", 1),
    ):
        if "writing" in figures:
            rows[label] = sign, figures["writing"][name], figures["writing"]["errors"][name], form
    for length, recalled in figures["recall"].items():
        rows[f"passkey recall at {length}"] = share(recalled, figures["passkeys"], ".0%")
    for task, result in figures["tasks"].items():
        items = result["items"]
        rows[f"{task} accuracy ({items})"] = share(result["accuracy"], items, ".1%")
        if "accuracy_norm" in result:
            per_byte = share(result["accuracy_norm"], items, ".1%")
            rows[f"{task} accuracy, per byte ({items})"] = per_byte
        if "perplexity" in result:
            value, error = result["perplexity"], result["perplexity_error"]
            rows[f"{task} perplexity ({items})"] = -1, value, error, ".2f"
    for tokens, size in figures["cache_bytes"].items():
        rows[f"cache of a sequence of {tokens}, MiB"] = -1, size / 2**20, 0, ".2f"
    decoding = "decode, tokens/s ({} sequences of {})".format(*figures["decoded"])
    return rows | {decoding: (1, figures["decode_tokens_per_second"], 0, ",.0f")}


# --- the end of layerboost.py ------------------------------------------------------------------


def write_report(
    report: dict,
    curve: dict,
    settings: Healing,
    args,
    layers: list[dict],
    seconds: float,
    hashes: dict,
    source: Path,
) -> None:
    """report.json, report.md, which the terminal shows too, and README.md, the same as a model
    card, into args.out. `report` is what `evaluate` gives for base, converted and healed, `layers`
    the scan, `hashes` those of what went in, `source` the folder of the original."""
    text = report_text(report, curve, settings, seconds, args)
    weights = Path(args.out) / "model.safetensors"
    body = {
        **report,
        "plan": report["healed"]["plan"],
        "healing": {"settings": asdict(settings), **curve},
        "scan": layers,
        "command": vars(args),
        "run": environment(args.device)
        | hashes
        | {"seed": args.seed, "healed": hash_files(weights)},
        "seconds": round(seconds, 1),
    }
    before = read_json(Path(args.repeat))["run"] if args.repeat else body["run"]
    write_json(Path(args.out) / "report.json", body)
    write_text(Path(args.out) / "report.md", text.lstrip())
    write_text(Path(args.out) / "README.md", model_card(report, text, args, source))
    say(text)
    if args.repeat:
        other = []
        for name, x in body["run"].items():
            other += [f"{name} {x}, was {before.get(name)}"] * (before.get(name) != x)
        say(f"Beside {args.repeat}: {'; '.join(other) or 'the same healed weights, bit for bit'}.")


def report_text(report: dict, curve: dict, settings: Healing, seconds: float, args) -> str:
    """The report in Markdown: plan, table, explanation of its rows, healing's validations."""
    healed, converted = report["healed"], report["converted"]
    plan = healed["plan"]
    instead = "a linear map instead" if args.removed == "linear" else "no attention"
    validation = ", ".join(f"{kl:.4f} at {tokens:,}" for tokens, kl in curve["valid"])
    sequences, context = healed["text"]
    watched = curve["sequences"] * context
    where = args.valid or f"what is held out of {args.data}"
    return f"""
# {Path(args.model).name}, boosted

Plan `{plan}`: of {len(plan)} layers, {plan.count("S")} keep softmax attention (S),
{plan.count("L")} see a window of {healed["window"]} tokens, the first {args.sinks} and a
linear-attention summary of the rest (L), {plan.count("X")} have {instead} (X). Healed on
{settings.trained_tokens:,} tokens.

{table(report)}

All on the first {sequences * context:,} tokens of {where}; ± is a standard error.

KL is how far the next-token distribution is from the base model's, top-1 agreement how often both
name the same token; passkey recall is how often a number hidden in a text of that many tokens is
repeated, of {healed["passkeys"]} numbers. `converted` is before healing.

Validation KL while healing: {validation}.
It differs from the table's since it is on the first {watched:,} of these tokens alone.

KL {converted["kl"]:.4f} -> {healed["kl"]:.4f},
agreement {converted["agreement"]:.1%} -> {healed["agreement"]:.1%}; {seconds / 60:.1f} min in all.
"""


def recorded_flags(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """The flags of the run that wrote a report.json, with the sizes that it chose itself, and
    another folder to write to. Ends in the parser's error for another file."""
    try:
        record = read_json(Path(path))
        command = record.get("command")
        made = isinstance(command, dict) and isinstance(record.get("run"), dict)
        require(made, f"{path}: does not record a run; give a report.json of layerboost.py")
    except (InputError, OSError) as error:
        parser.error(f"--repeat {error}")
    flags = [f"--out={command.get('out')}-repeat"]
    for name, value in command.items():
        flag = name.replace("_", "-")
        if name in NOT_REPEATED or value in (None, []):
            continue
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{flag}")
        elif name == "tasks":
            flags += ["--tasks", *map(str, value)]
        elif name == "workload":
            flags.append("--workload={}x{}".format(*value))
        else:
            flags.append(f"--{flag}={'+'.join(value) if name == 'measure' else value}")
    return flags


def kept(out: str) -> str:
    """What a stopped run has left in its folder; the same command continues from there."""

    def scanned(path: Path) -> str:
        made = read_scan(path)
        done = count_trials(made["layers"]) / len(TRIALS)
        return f"scan of {done:g} of {made.get('of', '?')} layers"

    def healed(path: Path) -> str:
        return "healing of {:,} of {:,} tokens".format(*healed_tokens(path))

    def evaluated(path: Path) -> str:
        return ", ".join(read_json(path))

    parts = []
    files = ("scan.json", scanned), ("healing.safetensors", healed), ("evaluation.json", evaluated)
    for name, describe in files:
        path = Path(out) / name
        if path.exists():
            with suppress(InputError):  # it is damaged: nothing to go on from
                parts.append(f"{describe(path)} in {path}")
    return f"; kept: {'; '.join(parts) or 'nothing yet'}"


def model_card(report: dict, text: str, args, source: Path) -> str:
    """The Hub's README.md: front matter, the report, how to load the model, its weaknesses."""
    name = Path(args.out).resolve().name
    base = f"base_model: {args.model}"
    if Path(args.model).is_dir():
        base = f"# base_model: the Hub's name of {Path(args.model).name}"
    head = ["library_name: transformers", "pipeline_tag: text-generation", base, *licence(source)]
    head += ["tags:", "- layerboost", "- linear-attention"]
    weak = "".join(f"- {line}\n" for line in weaknesses(report)) or "- Nothing beyond the errors.\n"
    template = Path(__file__).with_name("model_card.md").read_text("utf-8")
    return template.format(head="\n".join(head), text=text, name=name, weak=weak)


def licence(source: Path) -> list[str]:
    """The lines on the licence in the front matter of the original's README.md."""
    path = source / "README.md"
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    if lines[:1] != ["---"]:
        return []
    head = itertools.takewhile(lambda line: line != "---", lines[1:])
    return [line for line in head if line.startswith("license")]


def weaknesses(report: dict) -> list[str]:
    """The rows with an error in which `healed` is worse than `base` by more than both errors."""
    lines, healed = [], measures(report["healed"])
    for label, (sign, value, error, form) in measures(report["base"]).items():
        _, now, its_error, _ = healed[label]
        worse = sign * (value - now)
        if worse > error + its_error > 0:
            after = with_error(now, its_error, form)
            lines.append(f"{label}: {after}, the base {with_error(value, error, form)}")
    return lines


def continuation(model: Model, tokenizer: Tokenizer, valid: Tensor) -> str:
    """Some words of the validation text as a model continues them, on one line; drawn with the same
    seed for all models."""
    ids = valid[len(valid) // 2, None, :16].to(model.device)
    start = tokenizer.decode(ids[0].tolist())
    whole = tokenizer.decode(model.generate(ids, 40, temperature=0.7, top_k=40, seed=0)[0].tolist())
    return visible(" ".join(f"{start} >>>{whole[len(start) :]}".split()))


# --- command line ------------------------------------------------------------------------------


FLAGS = {
    "model": {"base": (str, None, "the original to compare with [none]")},
    "text": {
        "valid": (str, C4, TEXT_KINDS),
        "encoding": ENCODING,
        "sequences": (at_least(1), 16, "of 2,048 tokens, of it"),
        "passkeys": (at_least(1), 20, "hidden numbers to repeat, at each length"),
        "tasks": (list, [], "question files [none]"),
    },
    "machine": MACHINE_FLAGS,
}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = Parser(
        description="Measures a model on text, questions and passkeys, beside its original."
    )
    parser.add_argument("model", help="a folder or Hub id")
    add_flags(parser, FLAGS)
    return parser.parse_args(argv)


def run(args) -> None:
    tasks = measure.read_tasks(args.tasks)
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or pick_dtype(device))
    model = load_model(args.model, dtype=dtype, device=device)
    base = load_model(args.base, dtype=dtype, device=device) if args.base else model
    tokenizer = load_tokenizer(args.model)
    config = model.config
    require(
        base.config.vocab_size == config.vocab_size,
        f"--base {args.base}: has a vocabulary of {base.config.vocab_size}, {args.model} one of "
        f"{config.vocab_size}; compare a model with its own original",
    )

    context = min(CONTEXT, config.max_position_embeddings)
    documents = read_documents(args.valid, "--valid", args.encoding)
    tokens = args.sequences * context
    valid = pack_sequences(documents, tokenizer, config.eos_token_ids, context, tokens)
    require(len(valid), f"--valid {args.valid}: too little text; give {context} tokens or more")
    models = {"base": base, "model": model} if args.base else {"model": model}
    report = evaluate(models, base, tokenizer, valid, tasks, args.passkeys)
    print(table(report))
    print(json.dumps(vars(args) | {"report": report}))


def main(argv=None) -> int:
    args = parse_arguments(argv)
    return run_program("report", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
