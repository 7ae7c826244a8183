"""Figures of the method's cost, measured:

    python results/measure.py scan MODEL        our scan against a naive one that runs every altered model whole, same numbers
    python results/measure.py memory            peak memory of tier L's parallel form against the number of tokens
    python results/measure.py healing SHAPE [DTYPE]     peak memory of healing one sequence of 1,024 tokens, with activation checkpointing
                                                and without, and what it is made of; SHAPE as in bench.py
    python results/measure.py attention         milliseconds of tier S's attention against torch's fused kernel: SmolLM2's heads, bfloat16
    python results/measure.py profile MODEL     where the milliseconds go of decoding steps, prompts and a step of healing, bfloat16
    python results/measure.py rate MODEL B T [DTYPE]    tokens a second of distillation, B sequences of T tokens a step, rank 16: to
                                                be set beside a peer's in alternating runs
    python results/measure.py packed MODEL [DTYPE]      milliseconds with torch's products and with those of packed weights, in turn
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import bench
import distill
import kernels
import layerboost
from attention import WindowLinearAttention
from model import Engine, Request, convert, load_model, load_tokenizer, prefill


def scan_cost(path: str) -> dict:
    model, tokenizer = load_model(path, dtype=torch.bfloat16), load_tokenizer(path)
    model.pack()
    layerboost.SCAN_RECALL = {768: 1}                   # the product's measures on an eighth of its text
    torch.manual_seed(0)
    sequences = torch.randint(100, model.config.vocab_size - 100, (1, 1024))
    probe = lambda: layerboost.make_probes(model, tokenizer, ["kl", "recall"], sequences, sequences, [])
    tiers, n = {"window": 64, "sinks": 4, "feature_map": "hedgehog"}, len(model.layers)
    times = {"ours": [], "naive": []}
    for _ in range(2):                                  # alternating, since the machine's speed drifts by a tenth
        start = time.perf_counter()
        probes = probe()
        with tempfile.TemporaryDirectory() as folder:
            layers = layerboost.scan(model, probes, tiers, Path(folder) / "scan.json", {}, [])
        times["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        probes = probe()
        naive = [{tier: layerboost.measure_plan(model, probes, tiers, "S" * i + tier + "S" * (n - i - 1)) for tier in "XL"} for i in range(n)]
        times["naive"].append(time.perf_counter() - start)
    largest = max(abs(value - naive[i][tier][name]) for i in range(n) for tier in "XL" for name, value in layers[i][tier].items())
    return {"seconds": times, "ratio": sum(times["ours"]) / sum(times["naive"]), "largest_difference": largest}


def alone(call: str) -> int:
    """A function of this file called in a process of its own, since peak memory is one figure a process."""
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}; import measure; print(measure.{call})"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def added_bytes(tokens: int) -> int:
    """SmolLM2's head shape (9 query and 3 key/value heads of 64), window 64, 4 sinks, hedgehog, float32, forward and backward."""
    import types
    torch.manual_seed(0)
    config = types.SimpleNamespace(num_attention_heads=9, num_key_value_heads=3, head_dim=64, hidden_size=576, sliding_windows=(None,), qkv_bias=False,
                                   o_bias=False, qk_norm=False, window=64, sinks=4, feature_map="hedgehog")
    layer = WindowLinearAttention(config, 0)
    for name, value in layer.initial_tail().items():
        getattr(layer, name).data = value
    small = [torch.randn(1, heads, 64, 64, requires_grad=True) for heads in (9, 3, 3)]
    layer.attend(*small).sum().backward()               # the libraries' own memory is not the method's
    inputs = [torch.randn(1, heads, tokens, 64, requires_grad=True) for heads in (9, 3, 3)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layer.attend(*inputs).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def healing_peak(shape: str, recompute: bool, dtype: str = "bfloat16") -> int:
    """Bytes, after two steps of distillation of the plan that bench.py takes by default, rank 16."""
    torch.compiler.set_stance("force_eager")
    teacher, student = healing_models(bench.build_shape(shape, getattr(torch, dtype), "cpu"))
    student.recompute = recompute
    optimizer = distill.Optimizer({name: p.requires_grad_(True) for name, p in student.named_parameters() if name.endswith((".A", ".B", "_logit"))})
    for _ in range(2):
        distill.distillation(teacher, student, torch.randint(0, 1000, (1, 1024)))
        optimizer.step(1e-4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def healing_step(model, batch: int, context: int):
    """A function that takes a step of distillation on random ids; its first call compiles."""
    teacher, student = healing_models(model)
    teacher.compiled_shapes.add((batch, context))
    optimizer = distill.Optimizer({name: p.requires_grad_(True) for name, p in student.named_parameters() if name.endswith((".A", ".B", "_map", "_logit"))})

    def step() -> None:
        distill.distillation(teacher, student, torch.randint(100, model.config.vocab_size - 100, (batch, context)))
        optimizer.step(1e-4)
    return step


def healing_rate(path: str, batch: int, context: int, dtype: str = "bfloat16", steps: int = 4) -> dict:
    bench.set_up(eager=False)
    model = load_model(path, dtype=getattr(torch, dtype))
    model.pack()
    run, seconds = healing_step(model, batch, context), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    step = sorted(seconds[1:])[steps // 2]              # the first one compiles
    return {"dtype": dtype, "batch": batch, "context": context, "step_s": round(step, 3), "tokens_per_s": round(batch * context / step, 1),
            "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}


def packed_times(path: str, dtype: str = "float32"):
    """Least and median milliseconds of the dense model; in the compiled steps torch's products are oneDNN's, of constants it packed itself."""
    bench.set_up(eager=False)
    models = {"torch": load_model(path, dtype=getattr(torch, dtype)), "packed": load_model(path, dtype=getattr(torch, dtype))}
    models["torch"].pack = lambda: None
    models["packed"].pack()

    def in_turn(what: str, runs: dict, repeats: int) -> dict:
        seconds = {name: [] for name in runs}
        for _ in range(repeats + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        least_and_median = lambda times: [round(1e3 * x, 1) for x in (min(times), sorted(times)[len(times) // 2])]
        return {"dtype": dtype, "what": what} | {name: least_and_median(times[1:]) for name, times in seconds.items()}

    with torch.inference_mode():
        for tokens in (64, 1024):
            ids = torch.randint(100, 1000, (1, tokens))
            yield in_turn(f"forward pass of {tokens} tokens and the head", {name: lambda m=m: m(ids) for name, m in models.items()}, 5)
        for batch, context, compiled in ((32, 1024, False), (1, 512, True), (16, 512, True)):
            engines = {name: Engine(m, batch, compiled=compiled) for name, m in models.items()}
            times = bench.decode_times(engines, context)
            yield {"dtype": dtype, "what": f"step of {batch} x {context}, {'compiled' if compiled else 'eager'}"} | {
                name: [round(1e3 * bench.quantile(seconds, q), 1) for q in (0, 0.5)] for name, seconds in times.items()}
    yield in_turn("step of healing, 1 x 512", {name: healing_step(m, 1, 512) for name, m in models.items()}, 6)


KINDS = {"weights": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise", "layerboost::row_product", "layerboost::packed_product"),
         "attention": ("aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data", "layerboost::attention"),
         "compiled": ("## Call CompiledFxGraph", "CompiledFunction", "Torch-Compiled Region", "TorchDynamo Cache Lookup", "Pregraph bytecode")}


def profile(path: str) -> list[dict]:
    """Milliseconds on the clock, then by kind of operator as torch.profiler counts them: products with weights; of the attention, what
    is products, softmax or C++; compiled elementwise code with its calls and guards; all else, which is eager. Short
    formulas in C++ are in none of them: in a prompt they and Python are what is left of the clock."""
    def measured(what: str, name: str, run, repeats: int) -> dict:
        for _ in range(3):
            run()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        row = {"what": what, "model": name, "clock": (time.perf_counter() - start) / repeats} | dict.fromkeys([*KINDS, "eager"], 0.0)
        with torch.profiler.profile() as profiler:
            for _ in range(repeats):
                run()
        for event in profiler.key_averages():
            kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "eager")
            row[kind] += event.self_cpu_time_total / 1e6 / repeats
        return {key: x if isinstance(x, str) else round(1e3 * x, 1) for key, x in row.items()}

    bench.set_up(eager=False)
    dense, rows = load_model(path, dtype=torch.bfloat16), []
    with torch.inference_mode():
        for name, model in {"dense": dense, "converted": healing_models(dense, adapters=False)[1]}.items():
            for batch, context in ((1, 512), (16, 2048), (50, 768)):
                engine = Engine(model, batch, compiled=True)
                engine.live = [Request(torch.zeros(context), 1)] * batch
                engine.cache.positions.fill_(context - 100)
                rows.append(measured(f"step of {batch} x {context}", name, lambda: engine.step().tolist(), 10))
            prompt = torch.randint(0, 1000, (512,))
            rows.append(measured("prompt of 512", name, lambda: [hidden for hidden, _ in prefill(model, prompt, model.new_cache(1, 0))], 5))
    return rows + [measured("healing, 1 x 512", "converted", healing_step(dense, 1, 512), 3)]


def attention_times() -> list[dict]:
    """9 query heads on 3 key/value heads of 64: T causal queries, or the last 512 of more keys as a prompt's chunks are read."""
    def best(run) -> float:
        seconds = []
        for _ in range(12):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return round(1e3 * min(seconds), 2)
    rows = []
    for tokens, keys in ((512, 512), (1024, 1024), (4096, 4096), (512, 1024), (512, 4096)):
        query, key, value = (torch.randn(1, heads, count, 64, dtype=torch.bfloat16, requires_grad=True) for heads, count in ((9, tokens), (3, keys), (3, keys)))
        start = None if tokens == keys else torch.tensor([keys - tokens])
        mask = start if start is None else kernels.causal_mask(torch.arange(keys - tokens, keys), torch.arange(keys))[None, None]
        fused = lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, mask,
                                                                         is_causal=mask is None, enable_gqa=True)
        ours = lambda: kernels.softmax_attention(query, key, value, start)
        row = {"queries": tokens, "keys": keys}
        for name, run in (("fused", fused), ("ours", ours)):
            with torch.no_grad():
                row[f"{name}_ms"] = best(run)
            row[f"{name}_with_backward_ms"] = best(lambda: run().sum().backward())
        rows.append(row)
    return rows


def healing_models(teacher, adapters: bool = True):
    """It, and a student with adapters of rank 16 under the plan that bench.py takes by default."""
    n, few = len(teacher.layers), round(len(teacher.layers) * 4 / 15)
    student = convert(teacher, "S" * few + "L" * (n - 2 * few) + "X" * few)
    if adapters:
        distill.add_adapters(student, 16, 0)
    return teacher, student


def healing_arithmetic(shape: str, dtype: str = "bfloat16") -> dict:
    """Bytes that healing must hold at least: the weights once; adapters with gradient, average and two moments in float32; the input of
    each block; the logits of a slice of positions, student's and teacher's, and both as log-probabilities in float32."""
    size = getattr(torch, dtype).itemsize
    hidden, intermediate, layers, H, G, D, vocabulary, tied = bench.SHAPES[shape]
    linears = [(hidden, H * D), (hidden, G * D), (hidden, G * D), (H * D, hidden)] + [(hidden, intermediate)] * 2 + [(intermediate, hidden)]
    weights = size * (layers * sum(a * b for a, b in linears) + (1 if tied else 2) * vocabulary * hidden)
    adapters = 20 * layers * sum(16 * (a + b) for a, b in linears)
    return {"weights": weights, "adapters": adapters, "block_inputs": size * 1024 * hidden * layers,
            "logits": kernels.ROWS * vocabulary * (2 * size + 8)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["scan"] and len(sys.argv) == 3:
        print(json.dumps(scan_cost(sys.argv[2])))
    elif sys.argv[1:] == ["memory"]:
        print(json.dumps({str(tokens): alone(f"added_bytes({tokens})") for tokens in (1024, 2048, 4096, 8192, 16384)}))
    elif sys.argv[1:] == ["attention"]:
        print(json.dumps(attention_times()))
    elif sys.argv[1:2] == ["healing"] and len(sys.argv) in (3, 4):
        shape, dtype = (sys.argv + ["bfloat16"])[2:4]
        peak = {name: alone(f"healing_peak({shape!r}, {flag}, {dtype!r})") for name, flag in (("kept", False), ("recomputed", True))}
        print(json.dumps({"shape": shape, "dtype": dtype, "peak_bytes": peak, "at_least": healing_arithmetic(shape, dtype)}))
    elif sys.argv[1:2] == ["profile"] and len(sys.argv) == 3:
        print("\n".join(map(json.dumps, profile(sys.argv[2]))))
    elif sys.argv[1:2] == ["rate"] and len(sys.argv) in (5, 6):
        print(json.dumps(healing_rate(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])))
    elif sys.argv[1:2] == ["packed"] and len(sys.argv) in (3, 4):
        for row in packed_times(*sys.argv[2:]):
            print(json.dumps(row), flush=True)
    else:
        sys.exit(__doc__)
