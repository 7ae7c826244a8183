"""Speed: what a conversion bought, measured.

    python bench.py decode --model DIR --plan PLAN --batch 16 --lengths 256,1024,4096,8192
    python bench.py serve  --model DIR --plan PLAN --concurrency 50,100,200

Dense and converted alternate, through the same engine and the same compilation, and each figure
comes with the floor that roofline.py counts. The last line that a command prints is one JSON
document. results/predict.py predicts the gain on other hardware.
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections import deque

import torch

import cpu
from config import parse_plan
from engine import Engine, Request, padded, prefill, runs_ahead, working_bytes
from hub import require
from kernels import FEATURE_MAPS
from machine import pick_device, pick_dtype
from measure import quantile
from model import Model, cache_bytes, convert, load_model, weight_bytes
from roofline import (
    Hardware,
    fitting_slots,
    floor_seconds,
    measure_hardware,
    serving_floor,
    step_costs,
)
from terminal import MACHINE_FLAGS, Parser, add_flags, at_least, format_table, progress, run_program

SPREAD = 0.25  # how far the lengths of requests vary around their mean, as a share

# --- measurements ------------------------------------------------------------------------------


@torch.inference_mode()
def decode_times(engines: dict[str, Engine], context: int, steps: int = 20) -> dict:
    """{name: seconds of each step, sorted}, all slots live and holding about `context` tokens. The
    engines take turns, so that all see the same machine. What the caches hold does not change the
    cost: zeros here. Raises InputError for a context shorter than the steps."""
    warm_up = 2
    least = steps + warm_up + 1
    require(
        context >= least,
        f"--lengths: {context} tokens are too few for {steps} steps; give {least} or more",
    )
    times: dict[str, list[float]] = {name: [] for name in engines}
    with progress(total=warm_up + steps, desc="timing steps") as bar:
        for engine in engines.values():
            engine.live = [Request(torch.zeros(context), 1)] * len(engine.live)
            engine.step()  # compiles
            engine.mark_live()
            engine.cache.positions.fill_(context - least)

        for step in range(warm_up + steps):
            for name, engine in engines.items():
                start = time.perf_counter()
                engine.step().tolist()  # waits for the device
                if step >= warm_up:
                    times[name].append(time.perf_counter() - start)
            bar.update()

    for engine in engines.values():
        engine.live = [None] * len(engine.live)
        engine.mark_live()
    return {name: sorted(seconds) for name, seconds in times.items()}


def prompt_times(engines: dict[str, Engine], tokens: int) -> dict[str, list[float]]:
    """Seconds to read a prompt alone, sorted: each engine's in turn, three times."""
    rounds = [[prefill_seconds(engine, tokens) for engine in engines.values()] for _ in range(3)]
    return dict(zip(engines, map(sorted, zip(*rounds))))


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


def length_range(mean: int) -> tuple[int, int]:
    return mean - int(SPREAD * mean), mean + int(SPREAD * mean)


def make_requests(count: int, prompt: int, output: int, model: Model) -> list[Request]:
    """Prompts of random ids, of about `prompt` tokens, with about `output` to follow."""
    draw = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    requests = []
    for _ in range(count):
        length = draw.randint(*length_range(prompt))
        new_tokens = draw.randint(*length_range(output))
        ids = torch.randint(model.config.vocab_size, (length,), generator=generator)
        requests.append(Request(ids.to(model.device), new_tokens))
    return requests


def serve_requests(engine: Engine, clients: int, requests: list[Request]) -> dict:
    """A closed loop: each client sends a new request once its previous one is answered. Output
    tokens/s, and p50 and p95 of the time from a request to its first token and between tokens."""
    waiting = deque(requests[:clients])
    later = deque(requests[clients:])
    start = time.perf_counter()
    sent = dict.fromkeys(waiting, start)
    first: dict[Request, float] = {}
    last: dict[Request, float] = {}

    total = sum(request.max_new_tokens for request in requests)
    with progress(total=total, unit="token", desc=f"{clients} clients") as bar:
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


def memory_limit(wanted: float | None, device: torch.device) -> float:
    """Bytes that serving may take. On a GPU torch refuses more from here on; where none are wanted,
    they are nine tenths of what is free or this process's already."""
    if not runs_ahead(device):
        return wanted or math.inf
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    there = free + torch.cuda.memory_reserved(device)
    limit = min(wanted or 0.9 * there, there)
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    return limit


def serve(
    model: Model, clients: int, prompt: int, output: int, memory: float, compiled: bool
) -> dict:
    """`serve_requests` of about these lengths, by an engine of as many slots as fit into memory.
    memory_gib is predicted; reserved_gib is what torch has reserved of a GPU at most."""
    room = padded(length_range(prompt)[1] + length_range(output)[1], model.device)
    on_gpu = runs_ahead(model.device)
    work = working_bytes(model, room, length_range(prompt)[0]) if on_gpu else (0, 0)
    slots = fitting_slots(model, room, memory, clients, work)
    predicted = weight_bytes(model) + work[0] + slots * (cache_bytes(model, room) + work[1])
    if on_gpu:
        torch.cuda.empty_cache()  # of the engine before
        torch.cuda.reset_peak_memory_stats(model.device)

    engine = Engine(model, slots, room, compiled)
    warm_up(engine, prompt)
    served = serve_requests(engine, clients, make_requests(clients, prompt, output, model))
    figures = {"slots": slots, **served, "memory_gib": predicted / 2**30}
    if on_gpu:
        figures["reserved_gib"] = torch.cuda.max_memory_reserved(model.device) / 2**30
    return figures


# --- the commands ------------------------------------------------------------------------------


def decode_command(args) -> list[dict]:
    """Steps of a full batch at each length, dense and converted in turn, and prompts read alone."""
    models, this = load_pair(args)
    report = []
    for length in progress(args.lengths, desc="decoding", unit="length"):
        engines = {}  # frees the caches of the last length
        for name, model in models.items():
            engines[name] = Engine(model, args.batch, length, args.compile)
            prefill_seconds(engines[name], 2)  # warms up
        times = decode_times(engines, length)
        prompts = prompt_times(engines, length)
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
                "prefill_tokens_per_second": length / quantile(prompts[name], 0.5),
            }
            report.append(figures)
    add_gains(report, "tokens_per_second")

    print_figures(report)
    print(f"batch {args.batch}; {peak_memory()}")
    return report


def serve_command(args) -> list[dict]:
    """Throughput and latency of concurrent requests, dense and converted."""
    models, this = load_pair(args)
    memory = memory_limit(args.memory, models["dense"].device)
    report = []
    for clients, (name, model) in itertools.product(args.concurrency, models.items()):
        served = serve(model, clients, args.prompt, args.output, memory, args.compile)
        rate = served["tokens_per_second"]
        floor = serving_floor(model, args.prompt, args.output, served["slots"], this)
        figures = {"clients": clients, "model": name, **served, "over_floor": floor / rate}
        report.append(figures)
        print(f"{clients} clients, {name}: {rate:,.0f} output tokens/s", flush=True)
    add_gains(report, "tokens_per_second")

    print_figures(report)
    peak = "" if "reserved_gib" in report[0] else f"; {peak_memory()}"
    print(f"first token, per token: p50 to p95{peak}")
    return report


def load_pair(args) -> tuple[dict[str, Model], Hardware]:
    """{"dense": the model, "converted": its weights under --plan}, and this machine. The tails are
    untrained, which no time shows. Raises InputError for flags that do not fit together."""
    require(args.model, "--model: give a folder or Hub id")
    device = pick_device(args.device)
    dtype_name = args.dtype or pick_dtype(device)
    dtype = getattr(torch, dtype_name)

    dense = load_model(args.model, dtype=dtype, device=device)
    require(
        set(dense.plan) == {"S"},
        f"--model {args.model}: is converted already; give the original and --plan {dense.plan}",
    )
    n = len(dense.layers)
    few = round(n * 4 / 15)
    plan = parse_plan(args.plan, n) if args.plan else "S" * few + "L" * (n - 2 * few) + "X" * few
    converted = convert(dense, plan, args.window, args.sinks, args.feature_map)

    this = measure_hardware(device, dtype)
    print(
        f"{args.model}, {dtype_name} on {device}, {torch.get_num_threads()} threads; "
        f"copies at {this.bandwidth / 1e9:,.1f} GB/s, multiplies matrices at "
        f"{this.rate / 1e12:,.3f} Tflop/s\nconverted: {plan}",
        flush=True,
    )
    return {"dense": dense, "converted": converted}, this


# --- what is shown -----------------------------------------------------------------------------


def add_gains(report: list[dict], key: str, gain: str = "gain") -> None:
    """How much larger a converted model's figure is than that of the dense one, the row before."""
    for dense, converted in zip(report[::2], report[1::2], strict=True):
        dense[gain] = 1.0
        converted[gain] = converted[key] / dense[key]


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


def peak_memory() -> str:
    if torch.cuda.max_memory_reserved():
        return f"reserved of the GPU at most {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB"
    if sys.platform == "win32":
        return "peak memory: not known on Windows"

    import resource  # only Unix has it

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"peak memory of this process {peak / 2**30:.2f} GiB"


# --- command line ------------------------------------------------------------------------------


def counts(text: str) -> list[int]:
    return [at_least(1)(part) for part in text.split(",")]


def memory_size(text: str) -> float:
    for unit, size in (("GiB", 2**30), ("GB", 1e9)):
        if text.endswith(unit):
            return at_least(0.0, float, 1e9)(text.removesuffix(unit)) * size
    raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 24GiB or 24GB")


COMMANDS = {  # what runs: its own flags
    decode_command: {
        "batch": (at_least(1), 16, "sequences of a step"),
        "lengths": (counts, "256,1024,4096,8192", "tokens that each sequence holds"),
    },
    serve_command: {
        "concurrency": (counts, "50,100,200", "clients"),
        "prompt": (at_least(1), 256, "its tokens, on average"),
        "output": (at_least(1), 256, "new tokens, on average"),
        "memory": (
            memory_size,
            None,
            "limit, as 24GiB: on a GPU of all that the process takes, on a CPU of weights and "
            "caches [nine tenths of what is free, none]",
        ),
    },
}
COMMON_FLAGS = {
    "model": {
        "model": (str, None, "a folder or Hub id"),
        "plan": (str, None, "letters, or uniform:L [4/15 of the layers S, 4/15 X, the others L]"),
        "window": (int, None, "of L layers, in tokens [4 times the head size]"),
        "sinks": (int, 4, "of L layers, in tokens"),
        "feature-map": (str, "softmax", f"of their tails: {', '.join(FEATURE_MAPS)}"),
    },
    "machine": {
        **MACHINE_FLAGS,
        "compile": (bool, True, "torch.compile and C++; --no-compile: torch alone, eagerly"),
    },
}


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = Parser(description="Measures what a conversion buys in speed.")
    commands = parser.add_subparsers(dest="command", required=True)
    for run, flags in COMMANDS.items():
        command = commands.add_parser(run.__name__.removesuffix("_command"), help=run.__doc__)
        command.set_defaults(run=run)
        add_flags(command, {"measurement": flags} | COMMON_FLAGS)
    return parser.parse_args(argv)


def run(args) -> None:
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    cpu.enabled = args.compile
    print(json.dumps({**settings, "report": args.run(args)}))


def main(argv=None) -> int:
    args = parse_arguments(argv)
    return run_program("bench", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
