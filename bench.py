"""Speed: what a conversion bought, measured; and in `evaluate`, beside what it cost.

    python bench.py decode   --model DIR --plan PLAN --batch 16 --lengths 256,1024,4096,8192
    python bench.py serve    --model DIR --plan PLAN --concurrency 50,100,200
    python bench.py roofline --shape llama3.1-8b --plan uniform:L --hardware a10,h100
    python bench.py quality  --model out/smollm2 --base DIR --valid TEXT --tasks FILE ...

Dense and converted run in turn, through the same engine and the same compilation, and each figure
stands beside the floor that roofline.py counts. The last line that a command prints is one JSON
document.
"""

import argparse
import importlib.util
import itertools
import json
import math
import random
import sys
import time
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

import cpu
import measure
from config import parse_plan
from engine import Engine, Request, prefill
from hub import C4, InputError, read_documents
from machine import pick_device, pick_dtype, progress
from measure import quantile
from model import Model, cache_bytes, convert, load_model, weight_bytes
from roofline import (
    HARDWARE,
    SHAPES,
    Hardware,
    build_shape,
    fitting_slots,
    floor_seconds,
    list_parts,
    measure_hardware,
    predict,
    serving_floor,
    step_costs,
)
from tokenizer import Tokenizer, load_tokenizer, pack_sequences

CONTEXT = 1024  # tokens of a sequence in `quality`, and that each holds where `evaluate` decodes
DECODED = 32  # sequences that `evaluate` decodes together


# --- this machine ------------------------------------------------------------------------------


def peak_memory() -> str:
    if torch.cuda.max_memory_allocated():
        return f"peak memory of the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    if sys.platform == "win32":
        return "peak memory: not known on Windows"

    import resource  # only Unix has it

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"peak memory of this process {peak / 2**30:.2f} GiB"


# --- measurements ------------------------------------------------------------------------------


@torch.inference_mode()
def decode_times(engines: dict[str, Engine], context: int, steps: int = 12) -> dict:
    """{name: seconds of each step, sorted}, all slots live and holding about `context` tokens. The
    engines take turns, so that all meet the same machine. What the caches hold does not change the
    cost: zeros here. Raises InputError for a context shorter than the steps."""
    warm_up = 2
    least = steps + warm_up + 1
    if context < least:
        raise InputError(
            f"--lengths, --prompt: {context} tokens are too few for {steps} steps; "
            f"give {least} or more"
        )
    for engine in engines.values():
        engine.live = [Request(torch.zeros(context), 1)] * len(engine.live)
        engine.step()  # compiles
        engine.mark_live()
        engine.cache.positions.fill_(context - least)

    times: dict[str, list[float]] = {name: [] for name in engines}
    for step in range(warm_up + steps):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.step().tolist()  # waits for the device
            if step >= warm_up:
                times[name].append(time.perf_counter() - start)

    for engine in engines.values():
        engine.live = [None] * len(engine.live)
        engine.mark_live()
    return {name: sorted(seconds) for name, seconds in times.items()}


@torch.inference_mode()
def prefill_seconds(engine: Engine, tokens: int) -> float:
    """A prompt read as the engine reads one, in chunks."""
    model = engine.model
    cache = model.new_cache(1, 0)
    prompt = torch.zeros(tokens, dtype=torch.int64, device=model.device)
    start = time.perf_counter()
    for hidden, _ in prefill(model, [prompt], cache, engine.block):
        hidden.tolist()  # waits for the device
    return time.perf_counter() - start


def warm_up(engine: Engine, prompt: int) -> None:
    """Compiles and records what serving prompts of about this many tokens needs: one read alone,
    and several at once."""
    for count in (1, 2):
        tokens = torch.zeros(prompt, dtype=torch.int64, device=engine.model.device)
        list(engine.run(deque(Request(tokens, 2) for _ in range(count))))


def length_range(mean: int, spread: float) -> tuple[int, int]:
    return mean - int(spread * mean), mean + int(spread * mean)


def make_requests(args, clients: int, model: Model) -> list[Request]:
    """Prompts of random ids; the lengths of prompts and outputs are drawn from their ranges."""
    draw = random.Random(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    requests = []
    for _ in range(args.requests or clients):
        length = draw.randint(*length_range(args.prompt, args.spread))
        output = draw.randint(*length_range(args.output, args.spread))
        prompt = torch.randint(model.config.vocab_size, (length,), generator=generator)
        requests.append(Request(prompt.to(model.device), output))
    return requests


def serve_requests(engine: Engine, clients: int, requests: list[Request]) -> dict:
    """A closed loop: each client sends its next request when its last one is answered. Output
    tokens/s, and p50 and p95 of the time from a request to its first token and between tokens."""
    waiting = deque(requests[:clients])
    later = deque(requests[clients:])
    start = time.perf_counter()
    sent = dict.fromkeys(waiting, start)
    first: dict[Request, float] = {}
    last: dict[Request, float] = {}

    total = sum(request.max_new_tokens for request in requests)
    with progress(total=total, unit="token", desc=f"{clients} clients", leave=False) as bar:
        for request in engine.run(waiting):
            last[request] = time.perf_counter()
            first.setdefault(request, last[request])
            bar.update()
            if request.done and later:
                sent[later[0]] = last[request]
                waiting.append(later.popleft())

    to_first = [first[r] - sent[r] for r in requests]
    between = [1e3 * (last[r] - first[r]) / max(1, len(r.output) - 1) for r in requests]
    return {
        "tokens_per_second": total / (max(last.values()) - start),
        "requests": len(requests),
        "first_token_s": [quantile(to_first, 0.5), quantile(to_first, 0.95)],
        "per_token_ms": [quantile(between, 0.5), quantile(between, 0.95)],
    }


# --- quality and speed side by side ------------------------------------------------------------


def evaluate(
    models: dict[str, Model],
    base: Model,
    tokenizer: Tokenizer,
    valid: Tensor,
    tasks: dict[str, list[dict]],
    passkeys: int = 20,
    recall_lengths: tuple[int, ...] = measure.RECALL_LENGTHS,
) -> dict[str, dict]:
    """The figures of every model under its name: those of `measure.text_quality` on valid [N, T]
    ids, recall of about `passkeys` passkeys, hidden in that text, at each of `recall_lengths` that
    the model has positions for, tasks, cache_bytes and decode_tokens_per_second."""
    engines = {name: Engine(model, DECODED, CONTEXT) for name, model in models.items()}
    times = decode_times(engines, CONTEXT)
    del engines  # and the memory of their caches

    count = max(1, passkeys // len(measure.RECALL_DEPTHS))
    report = measure.text_quality(models, base, tokenizer, valid)
    for name, model in models.items():
        figures = report[name]
        reach = model.config.max_position_embeddings
        lengths = tuple(length for length in recall_lengths if length <= reach)
        figures |= measure.passkey_recall(model, tokenizer, valid, lengths, count)
        figures["tasks"] = {}
        for task, items in tasks.items():
            figures["tasks"][task] = measure.task_quality(model, tokenizer, task, items)
        figures["cache_bytes"] = {str(n): cache_bytes(model, n) for n in (1024, 8192)}
        figures["decode_tokens_per_second"] = DECODED / quantile(times[name], 0.5)
        figures["plan"] = model.plan
    return report


def table(report: dict[str, dict]) -> list[list[str]]:
    """The rows of a side-by-side table of what `evaluate` gives, the first one its head."""
    columns = [table_column(figures) for figures in report.values()]
    labels = dict.fromkeys(itertools.chain(*columns))  # each once, in order
    rows = [[label, *(column.get(label, "") for column in columns)] for label in labels]
    return [["", *report], *rows]


def table_column(figures: dict) -> dict[str, str]:
    """{label: figure} of one model."""
    column = {
        "bits per byte": f"{figures['bits_per_byte']:.3f}",
        "perplexity": f"{figures['perplexity']:.2f}",
        "KL to the base, nats/token": f"{figures['kl']:.4f}",
        "top-1 agreement": f"{figures['agreement']:.1%}",
    }
    for length, recalled in figures["recall"].items():
        column[f"passkey recall at {length}"] = f"{recalled:.0%}"
    for task, result in figures["tasks"].items():
        items = result["items"]
        column[f"{task} accuracy ({items})"] = f"{result['accuracy']:.1%}"
        if "accuracy_norm" in result:
            column[f"{task} accuracy, per byte ({items})"] = f"{result['accuracy_norm']:.1%}"
        if "perplexity" in result:
            column[f"{task} perplexity ({items})"] = f"{result['perplexity']:.2f}"
    for tokens, size in figures["cache_bytes"].items():
        column[f"cache of a sequence of {tokens}, MiB"] = f"{size / 2**20:.2f}"
    decoding = f"decode, tokens/s ({DECODED} sequences of {CONTEXT})"
    return column | {decoding: f"{figures['decode_tokens_per_second']:,.0f}"}


def format_table(rows: list[list[str]]) -> str:
    """Aligned for a terminal, and Markdown at the same time."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *rest in [rows[0], rule, *rows[1:]]:
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        lines.append("| " + " | ".join([first.ljust(widths[0]), *cells]) + " |")
    return "\n".join(lines)


def print_figures(report: list[dict]) -> None:
    """A table with a row for each dict and a column for each key."""
    rows = [[key.replace("_", " ") for key in report[0]]]
    for figures in report:
        rows.append([format_figure(value) for value in figures.values()])
    print(format_table(rows))


def format_figure(value) -> str:
    if isinstance(value, list):
        return " to ".join(map(format_figure, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"
    return str(value)


def plot(path: str | None, report: list[dict], x: str, y: str, label: str) -> None:
    """Draws y over x, a line for each model."""
    if path is None:
        return
    from matplotlib import pyplot  # which nothing else needs

    for model in ("dense", "converted"):
        points = sorted((figures[x], figures[y]) for figures in report if figures["model"] == model)
        pyplot.plot(*zip(*points, strict=True), marker="o", label=model)
    pyplot.xlabel(x)
    pyplot.ylabel(label)
    pyplot.ylim(0)
    pyplot.legend()
    pyplot.grid(alpha=0.3)
    pyplot.savefig(path, dpi=150, bbox_inches="tight")


# --- the models that are compared in speed -----------------------------------------------------


def load_pair(args) -> tuple[dict[str, Model], Hardware]:
    """{"dense": the model, "converted": its weights under --plan}, and this machine. The tails are
    untrained, which no time shows. Raises InputError for flags that do not fit together."""
    if bool(args.shape) == bool(args.model):
        raise InputError("--model, --shape: give one of the two")
    check_plot(args.plot)
    device = pick_device(args.device)
    on_paper = args.command == "roofline"  # needs sizes alone
    dtype_name = args.dtype or ("bfloat16" if on_paper else pick_dtype(device))
    dtype = getattr(torch, dtype_name)

    torch.manual_seed(0)
    if args.shape:
        dense = build_shape(args.shape, dtype, "meta" if on_paper else device)
    else:
        dense = load_model(args.model, dtype=dtype, device=device)
    if set(dense.plan) != {"S"}:
        raise InputError(
            f"--model {args.model}: is converted already; give the original and --plan {dense.plan}"
        )
    n = len(dense.layers)
    few = round(n * 4 / 15)
    plan = "S" * few + "L" * (n - 2 * few) + "X" * few
    if args.plan:
        plan = parse_plan(args.plan, n)
    converted = convert(dense, plan, args.window, args.sinks)

    this = measure_hardware(device, dtype)
    print(
        f"{args.shape or args.model}, {dtype_name} on {device}, {torch.get_num_threads()} threads; "
        f"copies at {this.bandwidth / 1e9:,.1f} GB/s, multiplies matrices at "
        f"{this.rate / 1e12:,.3f} Tflop/s\nconverted: {plan}",
        flush=True,
    )
    return {"dense": dense, "converted": converted}, this


def check_plot(path: str | None) -> None:
    if path is None:
        return
    if Path(path).suffix not in (".svg", ".png", ".pdf") or not Path(path).parent.is_dir():
        raise InputError(f"--plot {path}: give a .svg, .png or .pdf file in a folder that exists")
    if not importlib.util.find_spec("matplotlib"):
        raise InputError("--plot: needs matplotlib; pip install matplotlib, or leave --plot out")


def add_gains(report: list[dict], key: str, gain: str = "gain") -> None:
    """How much larger a converted model's figure is than that of the dense one, the row before."""
    for dense, converted in zip(report[::2], report[1::2], strict=True):
        dense[gain] = 1.0
        converted[gain] = converted[key] / dense[key]


# --- the commands ------------------------------------------------------------------------------


def decode_command(args) -> list[dict]:
    """Steps of a full batch at each length, dense and converted in turn, and prompts read alone."""
    models, this = load_pair(args)
    report = []
    for length in progress(args.lengths, desc="decoding", unit="length", leave=False):
        engines = {}  # frees the caches of the last length
        for name, model in models.items():
            engines[name] = Engine(model, args.batch, length, compiled=not args.no_compile)
            prefill_seconds(engines[name], 2)  # warms up
        times = decode_times(engines, length, args.steps)
        for name, model in models.items():
            step = quantile(times[name], 0.5)
            floor = floor_seconds(step_costs(model, args.batch, length), this)
            figures = {
                "context": length,
                "model": name,
                "step_ms": 1e3 * step,
                "quartiles_ms": [1e3 * quantile(times[name], q) for q in (0.25, 0.75)],
                "tokens_per_second": args.batch / step,
                "floor_ms": 1e3 * floor,
                "over_floor": step / floor,
                "cache_mib": cache_bytes(model, length) / 2**20,
                "prefill_tokens_per_second": length / prefill_seconds(engines[name], length),
            }
            report.append(figures)
    add_gains(report, "tokens_per_second")

    print_figures(report)
    print(f"batch {args.batch}; {peak_memory()}")
    plot(args.plot, report, "context", "step_ms", f"milliseconds a step, batch {args.batch}")
    return report


def serve_command(args) -> list[dict]:
    """Throughput and latency of concurrent requests, dense and converted."""
    models, this = load_pair(args)
    longest = sum(length_range(mean, args.spread)[1] for mean in (args.prompt, args.output))
    report = []
    for clients, (name, model) in itertools.product(args.concurrency, models.items()):
        slots = fitting_slots(model, longest, args.memory or math.inf, clients)
        engine = Engine(model, slots, longest, compiled=not args.no_compile)
        warm_up(engine, args.prompt)
        served = serve_requests(engine, clients, make_requests(args, clients, model))
        rate = served["tokens_per_second"]
        floor = serving_floor(model, args.prompt, args.output, slots, this)
        memory = weight_bytes(model) + slots * cache_bytes(model, longest)
        figures = {"clients": clients, "model": name, "slots": slots, **served}
        report.append(figures | {"over_floor": floor / rate, "memory_gib": memory / 2**30})
        print(f"{clients} clients, {name}: {rate:,.0f} output tokens/s", flush=True)
    add_gains(report, "tokens_per_second")

    print_figures(report)
    print(f"first token, per token: p50 to p95; {peak_memory()}")
    plot(args.plot, report, "clients", "tokens_per_second", "output tokens/s")
    return report


def roofline_command(args) -> dict:
    """What a step costs by part, and what a plan can gain, before anything is run."""
    models, this = load_pair(args)
    report = {}
    for name in args.hardware:
        hardware = HARDWARE.get(name, this)
        memory = min(args.memory or math.inf, hardware.memory)
        print(
            f"\n{name}: {hardware.bandwidth / 1e9:,.0f} GB/s, {hardware.rate / 1e12:,.2f} Tflop/s, "
            f"{memory / 1e9:,.0f} GB; a step of {args.batch} sequences of {args.lengths[0]} tokens"
        )
        parts = list_parts(models, args.batch, args.lengths[0], hardware)
        print_figures(parts)

        gains = []
        for clients, context in itertools.product(args.concurrency, args.lengths):
            gains += predict(models, clients, context, memory, hardware)
        add_gains(gains, "decode")
        add_gains(gains, "served", "served_gain")
        print_figures(gains)
        print("decode, served: tokens/s; served: requests of half prompt, half output")
        report[name] = {"parts": parts, "gains": gains}

    first = args.hardware[0]
    most = max(args.concurrency)
    drawn = [figures for figures in report[first]["gains"] if figures["clients"] == most]
    label = f"tokens/s at the floor of {first}, {most} clients"
    plot(args.plot, drawn, "context", "decode", label)
    return report


def quality_command(args) -> dict:
    """{base, model: figures}, printed as a table."""
    tasks = measure.read_tasks(args.tasks, args.limit)
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype or pick_dtype(device))
    model = load_model(args.model, dtype=dtype, device=device)
    base = load_model(args.base, dtype=dtype, device=device) if args.base else model
    tokenizer = load_tokenizer(args.model)
    config = model.config
    if base.config.vocab_size != config.vocab_size:
        raise InputError(
            f"--base {args.base}: has a vocabulary of {base.config.vocab_size}, --model "
            f"{args.model} one of {config.vocab_size}; compare a model with its own original"
        )

    context = min(CONTEXT, config.max_position_embeddings)
    documents = read_documents(args.valid, "--valid")
    tokens = args.sequences * context
    valid = pack_sequences(documents, tokenizer, config.eos_token_ids, context, tokens)
    if not len(valid):
        raise InputError(f"--valid {args.valid}: too little text; give {context} tokens or more")
    models = {"base": base, "model": model} if args.base else {"model": model}
    report = evaluate(models, base, tokenizer, valid, tasks, args.passkeys)
    print(format_table(table(report)))
    return report


# --- command line ------------------------------------------------------------------------------


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


def positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def share(text: str) -> float:
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return float(text)


def memory_size(text: str) -> float:
    for unit, size in (("GiB", 2**30), ("GB", 1e9)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * size
    raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 24GiB or 24GB")


def hardware_names(text: str) -> list[str]:
    for name in text.split(","):
        if name not in HARDWARE and name != "this":
            known = ", ".join(HARDWARE)
            raise argparse.ArgumentTypeError(f"{name!r} is not known; give some of {known}, this")
    return text.split(",")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures models: what a conversion cost, and what it bought."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    add = add_command(commands, quality_command, "text, questions and passkeys, side by side")
    add("--valid", default=C4, help="a .txt, .jsonl, .jsonl.gz, folder or hub:DATASET/FILE [C4]")
    add("--sequences", type=positive, default=32, help="of 1,024 tokens, of it [%(default)s]")
    add("--passkeys", type=positive, default=20, help="prompts at each length [%(default)s]")
    add("--tasks", nargs="+", default=[], help="question files [none]")
    add("--limit", type=positive, help="only the first items of each [all]")

    batch = {"type": positive, "default": 16, "help": "sequences of a step [%(default)s]"}
    lengths = {"type": positives, "help": "tokens that each sequence holds [%(default)s]"}
    clients = {"type": positives, "default": "50,100,200", "help": "clients [%(default)s]"}
    memory = {"type": memory_size, "help": "limit of weights and caches, as 24GiB [none]"}

    add = add_command(commands, decode_command, "milliseconds a step, dense and converted")
    add("--batch", **batch)
    add("--lengths", default="256,1024,4096,8192", **lengths)
    add("--steps", type=positive, default=20, help="measured at each length [%(default)s]")

    add = add_command(commands, serve_command, "throughput and latency of concurrent requests")
    add("--concurrency", **clients)
    add("--prompt", type=positive, default=256, help="its tokens, on average [%(default)s]")
    add("--output", type=positive, default=256, help="new tokens, on average [%(default)s]")
    add("--spread", type=share, default=0.25, help="how far both vary, as a share [%(default)s]")
    add("--requests", type=positive, help="how many in all [one for each client]")
    add("--seed", type=int, default=0, help="draws prompts and lengths [%(default)s]")
    add("--memory", **memory)

    add = add_command(commands, roofline_command, "bytes, operations, floor and predicted gain")
    add(
        "--hardware",
        type=hardware_names,
        default="a10,h100,this",
        help="to predict for [%(default)s]",
    )
    add("--batch", **batch)
    add("--lengths", default="2048,512,8192", **lengths)
    add("--concurrency", **clients)
    add("--memory", **memory)
    return parser.parse_args(argv)


def add_command(commands, run, help: str):
    """Adds a command with its model and machine flags; returns what adds those of its own."""
    name = run.__name__.removesuffix("_command")
    parser = commands.add_parser(name, help=help)
    parser.set_defaults(run=run)
    add = parser.add_argument_group("model").add_argument
    measurement = parser.add_argument_group("measurement").add_argument
    add("--model", required=name == "quality", help="a folder or Hub id")
    if name == "quality":
        add("--base", help="the original to compare with [none]")
    else:
        add("--shape", choices=SHAPES, help="instead of --model: its sizes, random weights")
        add("--plan", help="letters, or uniform:L [4/15 of the layers S, 4/15 X, the others L]")
        add("--window", type=int, default=64, help="of L layers, in tokens [%(default)s]")
        add("--sinks", type=int, default=4, help="of L layers, in tokens [%(default)s]")
        measurement("--plot", help="draw the figures into this file, with matplotlib [none]")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cpu or cuda [the GPU where there is one]")
    default = "" if name == "roofline" else " where the processor has it, else float32"
    add("--dtype", choices=("bfloat16", "float32"), help=f"of the weights [bfloat16{default}]")
    if name != "roofline":
        add("--no-compile", action="store_true", help="torch alone, eagerly [compiled, with C++]")
    return measurement


def main(argv=None) -> int:
    args = parse_arguments(argv)
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    if settings.get("no_compile"):
        cpu.enabled = False
    try:
        report = args.run(args)
    except InputError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bench: {error.filename or args.model}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(json.dumps({**settings, "report": report}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
