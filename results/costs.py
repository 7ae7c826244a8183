"""What the method costs, measured:

    python results/costs.py scan MODEL [DTYPE]       our scan against one that runs every altered
                                                     model whole: the same damage, how much sooner
    python results/costs.py memory                   peak memory of tier L against the tokens
    python results/costs.py healing SHAPE [DTYPE]    peak memory of healing one sequence of 1,024
                                                     tokens, with activation checkpointing and
                                                     without, and what it is made of
    python results/costs.py profile MODEL [DTYPE]    where the milliseconds go of decoding steps,
                                                     prompts and a step of healing
    python results/costs.py rate MODEL B T [DTYPE]   tokens a second of distillation, B sequences of
                                                     T tokens a step

SHAPE is one of shapes.py's. DTYPE is bfloat16 unless given. On the CPU; each prints JSON.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import distill
import divergence
import scan
from attention import WindowLinearAttention
from engine import Engine, Request, prefill
from measure import quantile
from model import Model, convert, load_model
from shapes import SHAPES, build_shape
from tokenizer import load_tokenizer

CPU = torch.device("cpu")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def alone(function, *arguments) -> int:
    """Calls it in a new process, since peak memory is one figure a process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def convert_by_default(model: Model) -> Model:
    """Under the plan that bench.py takes by default."""
    n = len(model.layers)
    few = round(n * 4 / 15)
    return convert(model, "S" * few + "L" * (n - 2 * few) + "X" * few)


# --- the scan ----------------------------------------------------------------------------------


def scan_cost(args) -> dict:
    """The scan's own measures, on less text than it takes by default."""
    model = load_model(args.model, dtype=getattr(torch, args.dtype))
    tokenizer = load_tokenizer(args.model)
    prompts = {768: 1}
    ids = torch.randint(100, model.config.vocab_size - 100, (1, 1024))
    tiers = {"window": 64, "sinks": 4, "feature_map": "hedgehog"}

    def ours() -> list[dict]:
        probes = scan.make_probes(model, tokenizer, ["kl", "recall"], ids, ids, prompts, [])
        with tempfile.TemporaryDirectory() as folder:
            return scan.scan(model, probes, tiers, Path(folder) / "scan.json", {}, [])

    @torch.inference_mode()
    def naive() -> list[dict]:
        n = len(model.layers)
        probes = scan.make_probes(model, tokenizer, ["kl", "recall"], ids, ids, prompts, [])
        layers = []
        for i in range(n):
            row = {}
            for tier in "XL":
                altered = convert(model, "S" * i + tier + "S" * (n - i - 1), **tiers)
                row[tier] = {}
                for probe in probes:
                    row[tier] |= probe.damage([altered.hidden(batch) for batch in probe.batches])
            layers.append(row)
        return layers

    seconds = {"ours": [], "naive": []}
    layers = {}
    for _ in range(2):  # in turn, since a machine's speed drifts by a tenth
        for name, run in {"ours": ours, "naive": naive}.items():
            start = time.perf_counter()
            layers[name] = run()
            seconds[name].append(time.perf_counter() - start)

    differences = []
    for a, b in zip(layers["ours"], layers["naive"], strict=True):
        for tier in "XL":
            differences += [abs(a[tier][name] - b[tier][name]) for name in a[tier]]
    ratio = sum(seconds["ours"]) / sum(seconds["naive"])
    return {"seconds": seconds, "ratio": ratio, "largest_difference": max(differences)}


# --- memory ------------------------------------------------------------------------------------


def memory(args) -> dict:
    return {str(tokens): alone(added_bytes, tokens) for tokens in (1024, 2048, 4096, 8192, 16384)}


def added_bytes(tokens: int) -> int:
    """Of tier L forward and backward with SmolLM2's heads, in float32."""
    torch.manual_seed(0)
    config = SimpleNamespace(
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        hidden_size=576,
        sliding_windows=(None,),
        qkv_bias=False,
        o_bias=False,
        qk_norm=False,
        window=64,
        sinks=4,
        feature_map="hedgehog",
        healed_context=None,
    )
    layer = WindowLinearAttention(config, 0)

    def run(length: int) -> None:
        inputs = [torch.randn(1, heads, length, 64, requires_grad=True) for heads in (9, 3, 3)]
        layer.attend(*inputs).sum().backward()

    run(64)  # the libraries' own memory is not the method's
    before = peak_bytes()
    run(tokens)
    return peak_bytes() - before


def healing(args) -> dict:
    peaks = {}
    for name, recompute in {"kept": False, "recomputed": True}.items():
        peaks[name] = alone(healing_peak, args.shape, recompute, args.dtype)
    return {
        "shape": args.shape,
        "dtype": args.dtype,
        "peak_bytes": peaks,
        "at_least": healing_arithmetic(args.shape, args.dtype),
    }


def healing_peak(shape: str, recompute: bool, dtype: str) -> int:
    """After two steps of distillation."""
    teacher = build_shape(shape, getattr(torch, dtype), "cpu")
    step = healing_step(teacher, 1, 1024, recompute=recompute)
    step()
    step()
    return peak_bytes()


def healing_arithmetic(shape: str, dtype: str) -> dict[str, int]:
    """Bytes that healing holds at least: the weights once; adapters of rank 16 with gradient,
    average and two moments in float32; the input of each block; the logits of a slice of positions,
    student's and teacher's, and both as log-probabilities in float32."""
    size = getattr(torch, dtype).itemsize
    hidden, intermediate, layers, H, G, D, vocabulary, tied = SHAPES[shape]
    linears = [(hidden, H * D), (hidden, G * D), (hidden, G * D), (H * D, hidden)]
    linears += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    matrices = layers * sum(a * b for a, b in linears)
    embeddings = (1 if tied else 2) * vocabulary * hidden
    return {
        "weights": size * (matrices + embeddings),
        "adapters": 5 * 4 * layers * sum(16 * (a + b) for a, b in linears),
        "block_inputs": size * 1024 * hidden * layers,
        "logits": divergence.slice_rows(CPU) * vocabulary * (2 * size + 8),
    }


# --- healing's speed ---------------------------------------------------------------------------


def healing_step(
    teacher: Model, batch: int, context: int, compiled: bool = False, recompute: bool = False
):
    """A function that takes a step of distillation on random ids."""
    student = convert_by_default(teacher)
    student.recompute = recompute
    trained = distill.prepare(student, distill.Healing())
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = distill.Optimizer(trained)
    if compiled:
        teacher.compiled_shapes.add((batch, context))

    def step() -> None:
        ids = torch.randint(100, teacher.config.vocab_size - 100, (batch, context))
        distill.distillation(teacher, student, ids, compiled=compiled)
        optimizer.step(1e-4, 1)

    return step


def rate(args) -> dict:
    model = load_model(args.model, dtype=getattr(torch, args.dtype))
    step = healing_step(model, args.batch, args.context, compiled=True)
    step()  # compiles

    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    median = quantile(seconds, 0.5)
    return {
        "dtype": args.dtype,
        "batch": args.batch,
        "context": args.context,
        "step_s": round(median, 3),
        "tokens_per_s": round(args.batch * args.context / median, 1),
        "peak_rss_gb": round(peak_bytes() / 2**30, 2),
    }


# --- where the time goes -----------------------------------------------------------------------

# Operators by the first letters of their names; what is in none of them is "eager".
KINDS = {
    "weights": (
        "aten::mm",
        "aten::addmm",
        "mkl::_mkl_linear",
        "mkldnn::_linear_pointwise",
        "layerboost::row_product",
    ),
    "attention": (
        "aten::bmm",
        "aten::baddbmm",
        "aten::_softmax",
        "aten::_scaled_dot_product",
        "layerboost::step",
    ),
    "compiled": (
        "## Call CompiledFxGraph",
        "CompiledFunction",
        "Torch-Compiled Region",
        "TorchDynamo Cache Lookup",
        "Pregraph bytecode",
    ),
}


def profile(args):
    """Yields milliseconds by the clock, then by kind of operator as torch.profiler counts them:
    products with weights; attention; compiled elementwise code with its calls and guards; all else,
    which is eager."""
    dense = load_model(args.model, dtype=getattr(torch, args.dtype))
    yield from profile_model("dense", dense)
    yield from profile_model("converted", convert_by_default(dense))
    step = healing_step(dense, 1, 512, compiled=True)
    yield measure_run("healing, 1 x 512", "converted", step, 3)


@torch.inference_mode()
def profile_model(name: str, model: Model):
    for batch, context in ((1, 512), (16, 2048), (50, 768)):
        engine = Engine(model, batch, context, compiled=True)
        engine.live = [Request(torch.zeros(context), 1)] * batch
        engine.mark_live()
        engine.cache.positions.fill_(context - 100)
        yield measure_run(f"step of {batch} x {context}", name, engine.step, 10)

    def read_prompt() -> None:
        prompt = torch.randint(0, 1000, (512,))
        for _ in prefill(model, [prompt], model.new_cache(1, 0)):
            pass

    yield measure_run("prompt of 512", name, read_prompt, 5)


def measure_run(what: str, model: str, run, repeats: int) -> dict:
    for _ in range(3):  # warms up, and compiles
        run()

    start = time.perf_counter()
    for _ in range(repeats):
        run()
    seconds = {"clock": time.perf_counter() - start} | dict.fromkeys([*KINDS, "eager"], 0.0)

    with torch.profiler.profile() as profiler:
        for _ in range(repeats):
            run()
    for event in profiler.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    ms = {name: round(1e3 * total / repeats, 1) for name, total in seconds.items()}
    return {"what": what, "model": model, **ms}


def kind_of(operator: str) -> str:
    for kind, starts in KINDS.items():
        if operator.startswith(starts):
            return kind
    return "eager"


# --- command line ------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    def add_command(run, *positional: str):
        command = commands.add_parser(run.__name__.removesuffix("_cost"))
        command.set_defaults(run=run)
        for name in positional:
            command.add_argument(name)
        return command

    dtypes = {"nargs": "?", "choices": ("bfloat16", "float32"), "default": "bfloat16"}
    add_command(scan_cost, "model").add_argument("dtype", **dtypes)
    add_command(memory)
    command = add_command(healing)
    command.add_argument("shape", choices=SHAPES)
    command.add_argument("dtype", **dtypes)
    add_command(profile, "model").add_argument("dtype", **dtypes)
    command = add_command(rate, "model")
    command.add_argument("batch", type=int)
    command.add_argument("context", type=int)
    command.add_argument("dtype", **dtypes)

    args = parser.parse_args()
    torch.manual_seed(0)
    result = args.run(args)
    for row in [result] if isinstance(result, dict) else result:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
