"""What to run first where a GPU is at hand for a few minutes: correctness, then figures.

    OUT=out/gpu python results/gpu_check.py              all, within 9 minutes
    python results/gpu_check.py --only probe,decode1b    some of the steps
    python results/gpu_check.py --dry                    tiny sizes, as where there is no GPU

Each step runs in a process of its own with its own time limit; what it has found is kept if it is
stopped or crashes. Needs no network. Writes gpu_check.json (all figures), gpu_check.txt (a
summary) and gpu_check.log (the ends of all outputs) into $OUT, which is out/gpu where it is not
given. Ends with exit code 1 where a step failed.
"""

import argparse
import copy
import functools
import inspect
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bench
import cpu
import distill
import divergence
import gpu
import kernels
import roofline
from attention import SoftmaxAttention, WindowLinearAttention
from engine import IN_PLACE, Engine, Request, prefill, record
from measure import quantile
from model import Model, cache_tensors, convert, load_model
from shapes import build_shape
from text import pack_sequences, read_documents
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 530  # seconds in all
DRY_BUDGET = 3000
PLANS = {"tiny": "SLLSLXLLSLLS", "llama3.2-1b": "SLLL" * 4, "llama3.1-8b": "SLLL" * 8}
# Of L: the default, which is a window of 256 for the embedded model, and a window that even short
# requests leave, so that their steps write the tail.
TIERS = {"default": {}, "hedgehog": {"window": 64, "feature_map": "hedgehog"}}

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DRY = os.environ.get("GPU_CHECK_DRY") == "1"
BF16 = torch.bfloat16


# --- what the steps share ----------------------------------------------------------------------


def emit(**figures) -> None:
    """Prints figures for the process that started this step. `ok` says whether a check passed."""
    print("@@ " + json.dumps(figures), flush=True)


def time_left() -> float:
    """Seconds until this step is stopped."""
    return float(os.environ.get("GPU_CHECK_DEADLINE", "inf")) - time.time()


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def free_memory() -> None:
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if CUDA else 0.0


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:400]


def load_tiny(
    dtype: torch.dtype = torch.float32, device: str = DEVICE, plan: str | None = None, **tiers
) -> Model:
    """The embedded model, converted where a plan is given."""
    model = load_model(str(ROOT / "tiny"), dtype=dtype, device=device)
    return model if plan is None else convert(model, plan, **tiers)


def load_pair(shape: str) -> dict[str, Model]:
    """{"dense", "plan"} of a shape with random weights in bf16; in a dry run of the embedded
    model."""
    torch.manual_seed(0)
    dense = load_tiny() if DRY else build_shape(shape, BF16, DEVICE)
    return {"dense": dense, "plan": convert(dense, PLANS["tiny" if DRY else shape])}


def measure_hardware() -> roofline.Hardware:
    return roofline.measure_hardware(DEVICE, torch.float32 if DRY else BF16)


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 4096, shape, generator=generator).to(DEVICE)


def random_heads(batch: int, heads: int, tokens: int, head_dim: int) -> Tensor:
    return torch.randn(batch, heads, tokens, head_dim, dtype=BF16, device=DEVICE)


def make_requests(count: int, new: int = 24, longest: int = 150, seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    requests = []
    for length in torch.randint(1, longest, (count,), generator=generator).tolist():
        prompt = torch.randint(1, 4096, (length,), generator=generator)
        requests.append(Request(prompt.to(DEVICE), new))
    return requests


def serve_all(engine: Engine, requests: list[Request]) -> list[list[int]]:
    for _ in engine.run(deque(requests)):
        pass
    return [request.output for request in requests]


def count_same(a: list, b: list) -> int:
    return sum(x == y for x, y in zip(a, b))


def relative_difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def mean_kl(got: Tensor, expected: Tensor) -> float:
    """Of logits [B, T, V]."""
    return float(divergence.logit_kl(got.flatten(0, 1), expected.flatten(0, 1)).mean())


# --- time --------------------------------------------------------------------------------------


def milliseconds(run, repeat: int = 10, warm_up: int = 3) -> float:
    """Of a call, the median."""
    for _ in range(warm_up):
        run()

    times = []
    for _ in range(repeat):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return 1e3 * quantile(times, 0.5)


def milliseconds_in_graph(run, repeat: int = 20) -> float:
    """Of a call without the time of launches: ten of them in a CUDA graph."""
    if not CUDA:
        return milliseconds(run, 3, 1)

    def ten_times() -> None:
        for _ in range(10):
            run()

    return milliseconds(record(ten_times), repeat) / 10


def mib_added(run) -> float:
    """What a call allocates at its peak."""
    if not CUDA:
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


# --- correctness -------------------------------------------------------------------------------


def check_environment() -> None:
    emit(
        torch=torch.__version__,
        python=platform.python_version(),
        cxx=shutil.which("g++"),
        cc=shutil.which("gcc") or shutil.which("cc"),
        python_h=Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        cpus=os.cpu_count(),
        cuda=torch.version.cuda,
    )
    emit(flash=str(torch.ops.aten._flash_attention_forward.default._schema)[-260:])
    try:
        from torch.nn.attention.varlen import varlen_attn

        emit(varlen=list(inspect.signature(varlen_attn).parameters))
    except ImportError as error:
        emit(varlen=str(error))
    if CUDA:
        describe_gpu()
        for dtype in (BF16, torch.float32):
            for masked in (False, True):
                choose_attention(dtype, masked)


def describe_gpu() -> None:
    try:
        import triton

        emit(triton=triton.__version__)
    except ImportError as error:
        emit(triton=str(error))

    properties = torch.cuda.get_device_properties(0)
    emit(
        gpu=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        multiprocessors=properties.multi_processor_count,
        memory_gib=round(properties.total_memory / 2**30, 2),
        free_gib=round(torch.cuda.mem_get_info()[0] / 2**30, 2),
        cudnn=torch.backends.cudnn.version(),
        bf16=torch.cuda.is_bf16_supported(including_emulation=False),
    )
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,memory.total,memory.used,clocks.sm,power.limit"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        emit(nvidia_smi=subprocess.run(query, capture_output=True, text=True).stdout)


def choose_attention(dtype: torch.dtype, masked: bool) -> None:
    """Which of its kernels torch takes for a prompt."""
    from torch.nn.attention import SDPBackend

    q = torch.zeros(1, 32, 256, 128, dtype=dtype, device=DEVICE)
    k = q[:, :8].contiguous()
    mask = torch.ones(256, 256, dtype=torch.bool, device=DEVICE).tril() if masked else None
    chosen = torch._fused_sdp_choice(q, k, k, mask, 0.0, not masked, enable_gqa=True)
    emit(dtype=str(dtype), masked=masked, backend=SDPBackend(chosen).name)


@torch.inference_mode()
def check_logits() -> None:
    """The device against the CPU; in a dry run torch against the C++ of cpu.cpp."""
    ids = random_ids(2, 330)
    cases = [
        ("S" * 12, {}),
        ("L" * 12, {}),
        ("L" * 12, TIERS["hedgehog"]),
        ("SLX" * 4, {}),
        ("L" * 12, {"window": 0, "sinks": 0}),
        ("L" * 12, {"window": 7, "sinks": 1}),
    ]
    for name in ("elu", "relu", "favor", "none"):
        cases.append(("LS" * 6, {"feature_map": name}))

    for plan, tiers in cases[:5] if DRY else cases:
        for healed_context in (None, 100):
            here = load_tiny(device="cpu", plan=plan, **tiers)
            there = load_tiny(plan=plan, **tiers)
            here.config.healed_context = healed_context
            there.config.healed_context = healed_context

            cpu.enabled = DRY and not CUDA
            expected = here(ids.cpu())
            cpu.enabled = False
            got = there(ids).cpu()
            low = got  # a CPU may emulate bf16, slowly
            if CUDA:
                low = there.to(BF16)(ids).float().cpu()

            difference = relative_difference(got, expected)
            kl = mean_kl(low, expected)
            emit(
                plan=plan,
                **tiers,
                healed=healed_context,
                relative_difference=difference,
                bf16_kl=round(kl, 5),
                ok=difference < 1e-3 and kl < 0.1,
            )


@torch.inference_mode()
def check_prefill() -> None:
    """A prompt in any split gives what it gives whole."""
    for plan in ("SLX" * 4, "S" * 12, "L" * 12):
        compare_splits(torch.float32, plan, 2e-3)
        compare_chunks(torch.float32, plan, 2e-3)
        if CUDA:
            compare_splits(BF16, plan, 0.1)
            compare_chunks(BF16, plan, 0.3)


def compare_splits(dtype: torch.dtype, plan: str, bound: float) -> None:
    """By the relative difference in float32, by KL in bf16."""
    model = load_tiny(dtype, plan=plan)
    ids = random_ids(3, 300)
    whole = model(ids).float()
    ones = [1] * 20  # steps beyond the window
    for split in ([300], [1, 1, 1, 297], [64, 64, 172], [7, 250, 43], [270, *ones, 10]):
        cache = model.new_cache(3, 300)
        parts = [model(part, cache).float() for part in ids.split(split, dim=1)]
        out = torch.cat(parts, dim=1)

        difference = relative_difference(out, whole)
        kl = mean_kl(out, whole)
        emit(
            dtype=str(dtype),
            plan=plan,
            splits=len(split),
            relative_difference=difference,
            kl=kl,
            ok=(difference if dtype == torch.float32 else kl) < bound,
        )


def compare_chunks(dtype: torch.dtype, plan: str, bound: float) -> None:
    """A prompt of several chunks as the engine reads it."""
    model = load_tiny(dtype, plan=plan)
    prompt = random_ids(2300)  # more than a chunk
    *_, (last, _) = prefill(model, [prompt], model.new_cache(1, 0))
    expected = model.hidden(prompt[None])[:, -1].float()
    difference = relative_difference(last.float(), expected)
    emit(
        dtype=str(dtype),
        plan=plan,
        prompt=len(prompt),
        relative_difference=difference,
        ok=difference < bound,
    )


def check_engine() -> None:
    """Requests served together get the tokens that they get alone, and on a CPU."""
    count = 4 if DRY else 12
    longest = 150 if DRY else 320
    make = functools.partial(make_requests, count, longest=longest)
    for plan, name in (("SLX" * 4, "default"), ("SLX" * 4, "hedgehog"), ("S" * 12, "default")):
        model = load_tiny(plan=plan, **TIERS[name])
        together = serve_all(Engine(model, 5 if CUDA else 3, longest + 24), make())
        alone = [serve_all(Engine(model, 1, longest + 24), [request])[0] for request in make()]
        same = count_same(together, alone)
        emit(plan=plan, tier=name, requests=count, same_as_alone=same, ok=same == count)
        if CUDA:
            some = [Request(r.prompt.cpu(), r.max_new_tokens) for r in make()[:3]]
            model = load_tiny(device="cpu", plan=plan, **TIERS[name])
            same = count_same(serve_all(Engine(model, 1, longest + 24), some), together)
            emit(plan=plan, tier=name, same_as_cpu=same, of=len(some), ok=same == len(some))


def check_graph() -> None:
    """The recorded step against the plain loop of `generate`, in bf16 through flash attention: the
    same tokens."""
    cases = [(plan, "default") for plan in ("SLX" * 4, "S" * 12, "L" * 12)]
    for plan, name in (*cases, ("L" * 12, "hedgehog")):
        model = load_tiny(BF16 if CUDA else torch.float32, plan=plan, **TIERS[name])
        prompts = random_ids(4, 230)
        expected = model.generate(prompts, 60)[:, 230:].tolist()
        start = time.perf_counter()
        engine = Engine(model, 4, 290)
        outputs = serve_all(engine, [Request(prompt, 60) for prompt in prompts])
        same = 0
        for output, tokens in zip(outputs, expected):
            same += count_same(output, tokens[: len(output)])
        total = sum(len(output) for output in outputs)
        emit(
            plan=plan,
            tier=name,
            seconds=round(time.perf_counter() - start, 1),
            same_tokens=same,
            of=total,
            ok=same == total,
        )


def check_healing() -> None:
    """50 steps of healing: the losses go down, are those of a CPU at first, and a run that was
    stopped ends with the same."""
    folder = Path(tempfile.mkdtemp())
    on_cpu = heal_tiny(folder / "cpu.safetensors", "cpu")["train"]
    curve = heal_tiny(folder / "device.safetensors", DEVICE)
    losses = curve["train"]
    kl = [value for _, value in curve["valid"]]
    first = max(abs(a / b - 1) for a, b in zip(on_cpu[:8], losses[:8]))
    emit(
        steps=len(losses),
        first_losses_cpu=on_cpu[:8],
        first_losses_device=losses[:8],
        largest_relative_difference=first,
        validation_kl=[round(value, 5) for value in kl],
        ok=first < 0.02 and kl[-1] < kl[0],
    )

    stopped = heal_tiny(folder / "resumed.safetensors", DEVICE, stop_at=20)
    resumed = heal_tiny(folder / "resumed.safetensors", DEVICE)["train"]
    difference = max(abs(a - b) / max(b, 1e-9) for a, b in zip(resumed, losses))
    emit(
        resume="after 20 steps of stage 1",
        was_stopped=stopped is None,
        largest_relative_difference=difference,
        bit_for_bit=resumed == losses,
        ok=stopped is None and difference < 0.05,
    )


def heal_tiny(checkpoint: Path, device: str, stop_at: int | None = None) -> dict | None:
    """The curve of a short run; None where it was stopped by Ctrl-C in step `stop_at` of
    distillation."""
    model = load_tiny(device=device)
    student = convert(model, "SLLLSLXLSLLL")
    documents = list(read_documents(str(ROOT / "tiny/train.jsonl.gz")))[:120]
    tokenizer = load_tokenizer(str(ROOT / "tiny"))
    data = pack_sequences(documents, tokenizer, model.config.eos_token_ids, 128, 60_000)
    settings = distill.Healing(50 * 128, context=128, long_context=512, warm_up=10)

    distillation = distill.distillation
    steps = 0

    def counted(*arguments):
        nonlocal steps
        steps += 1
        if steps == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return distillation(*arguments)

    with mock.patch.object(distill, "distillation", counted):
        try:
            return distill.heal(model, student, data[8:], data[:8], settings, checkpoint, {})
        except KeyboardInterrupt:
            return None


def check_compiled() -> None:
    """The engine through torch.compile, as bench.py runs it, against the plain one: the tokens,
    how many programs that took, and how long."""
    cpu.enabled = True
    model = load_tiny(plan="SLXL" * 3)
    outputs = []
    for compiled in (False, True):
        engine = Engine(model, 9, 344, compiled)
        requests = make_requests(6 if DRY else 20, new=40, longest=300, seed=1)
        start = time.perf_counter()
        outputs.append(serve_all(engine, requests))
        seconds = time.perf_counter() - start
        ms = 1e3 * quantile(bench.decode_times({"": engine}, 128, 20)[""], 0.5)
        emit(compiled=compiled, seconds=round(seconds, 1), step_ms=round(ms, 3))

    counters = torch._dynamo.utils.counters
    same = count_same(*outputs)
    emit(
        same_as_eager=same,
        of=len(outputs[0]),
        unique_graphs=counters["stats"]["unique_graphs"],
        graph_breaks=sum(counters["graph_break"].values()),
        ok=same == len(outputs[0]),
    )


def check_command_line() -> None:
    """A run on the embedded model, a longer one that goes on from it, and a prompt."""
    out = tempfile.mkdtemp()
    machine = ["--device", DEVICE, "--compile" if CUDA else "--no-compile"]
    runs = {
        "whole": ["--tokens", "36k", "--out", out],
        "longer": ["--tokens", "41k", "--out", out],
        "prompt": ["--model", out, "--prompt", "The history of", "--max-new-tokens", "20"],
    }
    for name, arguments in runs.items():
        if time_left() < 10:
            break
        start = time.perf_counter()
        command = [sys.executable, "layerboost.py", *arguments, *machine]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        seconds = time.perf_counter() - start
        print(done.stdout[-3000:], done.stderr[-1500:])

        shown = ("| KL", "| top-1", "| decode")
        end = [line for line in done.stdout.splitlines() if line.startswith(shown)]
        emit(
            run=name,
            code=done.returncode,
            seconds=round(seconds, 1),
            end=done.stdout[-300:] if name == "prompt" else end,
            error=done.stderr[-400:] if done.returncode else "",
            ok=done.returncode == 0,
        )


# --- figures: kernels --------------------------------------------------------------------------

# Of the shape of Llama-3.1-8B.
B, H, G, D = 16, 32, 8, 128
gpu_form = gpu if CUDA else kernels


@torch.inference_mode()
def probe() -> None:
    """What is used now against what could be."""
    this = measure_hardware()
    wide = roofline.measure_hardware(DEVICE, torch.float32)
    small = torch.zeros(1, device=DEVICE)
    start = time.perf_counter()
    for _ in range(2000):
        small.add_(1)
    emit(
        copy_gb_s=round(this.bandwidth / 1e9),
        tflops=round(this.rate / 1e12, 1),
        float32_tflops=round(wide.rate / 1e12, 1),
        launch_us=round((time.perf_counter() - start) / 2000 * 1e6, 2),
    )
    wait()

    rooms = ((64, True),) if DRY else ((1024, False), (8192, False), (8192, True))
    for room, mixed in rooms:
        probe_step(room, mixed)
    probe_chunk(*(16, 48) if DRY else (512, 7680))
    probe_lengths()
    probe_tiers(this)


def compare_attention(name: str, forms: dict, figures: dict, size: int) -> None:
    """What runs on a GPU, the first of `forms`, against torch's own operators."""
    expected = None
    for form, run in forms.items():
        row = {name: form, **figures}
        try:
            added = mib_added(run)
            out = run().float()
            expected = out if expected is None else expected
            ms = milliseconds_in_graph(run)
        except Exception as error:
            emit(**row, error=describe(error))
            continue
        difference = float((out - expected).abs().max())
        emit(
            **row,
            us=round(1e3 * ms, 1),
            gb_s=round(size / ms / 1e6),
            added_mib=added,
            difference=difference,
            ok=difference < 0.05,
        )


def probe_step(room: int, mixed: bool) -> None:
    """Tier S's decoding attention, sequences of one length or of many."""
    q = random_heads(B, H, 1, D)
    new_key, new_value = random_heads(2 * B, G, 1, D).chunk(2)
    k, v = random_heads(2 * B, G, room, D).chunk(2)
    used = torch.full((B,), room, device=DEVICE)
    if mixed:
        used = torch.linspace(room // 16, room, B, device=DEVICE).long()
    seen = (torch.arange(room, device=DEVICE) < used[:, None])[:, None]
    forms = {
        "softmax_step": lambda: gpu_form.softmax_step(q, new_key, new_value, used - 1, k, v, used),
        "masked": lambda: kernels.attend(q, k, v, seen),
    }
    size = 4 * G * D * int(used.sum())
    compare_attention("decode_attention", forms, {"room": room, "mixed": mixed}, size)


def probe_chunk(tokens: int, past: int) -> None:
    """A chunk of a prompt on a long cache."""
    q = random_heads(1, H, tokens, D)
    k, v = random_heads(2, G, past + tokens, D).split(1)
    position = torch.full((1,), past, device=DEVICE)
    seen = torch.ones(tokens, past + tokens, dtype=torch.bool, device=DEVICE).tril(past)
    forms = {
        "softmax_attention": lambda: gpu_form.softmax_attention(q, k, v, position),
        "masked": lambda: F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True),
    }
    figures = {"tokens": tokens, "past": past}
    compare_attention("prefill_attention", forms, figures, 4 * G * D * (past + tokens))


def probe_lengths() -> None:
    """Whether a new length of a prompt costs more than the next one of that length."""
    times = []
    for tokens in (193, 211, 229, 251, 277):
        q = random_heads(1, H, tokens, D)
        k = random_heads(1, G, tokens, D)
        wait()
        start = time.perf_counter()
        gpu_form.softmax_attention(q, k, k)
        wait()
        times.append(round(1e3 * (time.perf_counter() - start), 2))
    emit(first_call_of_a_length_ms=times)


def probe_tiers(this: roofline.Hardware) -> None:
    """Whole sequences through all tiers, and a step of tier L against its floor."""
    settings = {
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": D,
        "hidden_size": H * D,
        "sliding_windows": (None,),
        "qkv_bias": False,
        "o_bias": False,
        "qk_norm": False,
        "window": 4 * D,
        "sinks": 4,
        "feature_map": "softmax",
        "healed_context": None,
    }
    with torch.device(DEVICE):
        tiers = {"S": SoftmaxAttention(SimpleNamespace(**settings), 0)}
        for name, changes in TIERS.items():
            config = SimpleNamespace(**settings | changes)
            tiers[f"L, {name}"] = WindowLinearAttention(config, 0)

    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        for tokens in (128,) if DRY else (512, 4096):
            q = random_heads(1, H, tokens, D)
            k, v = random_heads(2, G, tokens, D).split(1)
            for name, tier in tiers.items():
                run = functools.partial(tier.attend, q, k, v)
                emit(
                    attend=name,
                    tokens=tokens,
                    float32_matmul=precision,
                    ms=round(milliseconds(run, 5, 2), 3),
                    added_mib=mib_added(run),
                )

    for name in TIERS:
        probe_step_of_tier_l(name, tiers[f"L, {name}"], this)


def probe_step_of_tier_l(name: str, tier: WindowLinearAttention, this: roofline.Hardware) -> None:
    """Through flash attention, and in torch alone: the first outputs, then the time."""
    q = random_heads(B, H, 1, D)
    k, v = random_heads(2 * B, G, 1, D).chunk(2)
    position = torch.full((B,), 5000, device=DEVICE)
    first = tier.new_cache(B, 0, BF16, DEVICE)
    for x in cache_tensors(first).values():
        x.copy_(torch.rand_like(x))
    size = 2 * 4 * first.state.numel() + 4 * first.key.numel()  # bytes

    expected = None
    for form, runs in {"torch": lambda x: False, "gpu.py": gpu.runs}.items():
        for compiled in (False, True) if CUDA else (False,):
            cache = copy.deepcopy(first)
            step = torch.compile(tier.step, options=IN_PLACE) if compiled else tier.step
            run = functools.partial(step, q, k, v, cache, position)
            with mock.patch.object(gpu, "runs", runs):
                out = run().float()
                ms = milliseconds_in_graph(run)
            expected = out if expected is None else expected
            difference = relative_difference(out, expected)
            emit(
                step_of_tier_L_us=round(1e3 * ms, 1),
                tier=name,
                form=form,
                compiled=compiled,
                floor_us=round(1e6 * size / this.bandwidth, 1),
                difference=difference,
                ok=difference < 0.02,
            )


# --- figures: models ---------------------------------------------------------------------------


def measure_decoding(shape: str, modes: tuple[bool, ...] = (True,)) -> None:
    """Milliseconds a step, compiled or not, and prompts read alone."""
    cpu.enabled = True
    this = measure_hardware()
    lengths = (128, 256) if DRY else (1024, 4096, 8192)
    free_memory()
    for name, model in load_pair(shape).items():
        for compiled in modes:
            measure_steps(shape, name, model, compiled, lengths, this)


def measure_steps(
    shape: str, name: str, model: Model, compiled: bool, lengths: tuple, this: roofline.Hardware
) -> None:
    batch, steps = (4, 3) if DRY else (16, 20)
    for length in lengths:
        if time_left() < 5:
            emit(stopped="no time left")
            return
        figures = {"shape": shape, "model": name, "compiled": compiled, "context": length}
        start = time.perf_counter()
        free_memory()
        try:
            engine = Engine(model, batch, length, compiled)
            ms = 1e3 * quantile(bench.decode_times({"": engine}, length, steps)[""], 0.5)
        except Exception as error:
            emit(**figures, error=describe(error))
            continue
        floor = 1e3 * roofline.floor_seconds(roofline.step_costs(model, batch, length), this)
        emit(
            **figures,
            step_ms=round(ms, 3),
            tokens_per_second=round(1e3 * batch / ms),
            over_floor=round(ms / floor, 2),
            peak_gib=peak_gib(),
            seconds=round(time.perf_counter() - start, 1),
        )
        if length != lengths[-1] and time_left() > 5:
            measure_prompt(shape, name, engine, length // 2, this)


def measure_prompt(
    shape: str, name: str, engine: Engine, tokens: int, this: roofline.Hardware
) -> None:
    bench.prefill_seconds(engine, tokens)  # warms up
    seconds = bench.prefill_seconds(engine, tokens)
    model = engine.model
    floor = roofline.prefill_operations(model, tokens) / this.rate
    emit(
        shape=shape,
        model=name,
        prompt=tokens,
        prefill_tokens_per_second=round(tokens / seconds),
        over_floor=round(seconds / floor, 2),
    )


def measure_serving(shape: str, clients: tuple[int, ...], compiled: bool = True) -> None:
    """Throughput of requests of about 256 + 256 tokens in 24 GiB, the memory of an A10."""
    cpu.enabled = True
    prompt, output = (64, 16) if DRY else (256, 256)
    this = measure_hardware()
    models = load_pair(shape)
    memory = bench.memory_limit(None if DRY else 24 * 2**30, models["dense"].device)
    for count in (6,) if DRY else clients:
        for name, model in models.items():
            if time_left() < 8:
                emit(stopped="no time left")
                return
            figures = {"shape": shape, "model": name, "clients": count, "compiled": compiled}
            start = time.perf_counter()
            try:
                served = bench.serve(model, count, prompt, output, memory, compiled)
            except Exception as error:
                emit(**figures, error=describe(error))
                continue
            floor = roofline.serving_floor(model, prompt, output, served["slots"], this)
            emit(
                **figures,
                **served,
                over_floor=round(floor / served["tokens_per_second"], 2),
                seconds=round(time.perf_counter() - start, 1),
            )


class HealingCase(NamedTuple):
    shape: str
    batch: int
    tokens: int
    compiled: bool = False
    recompute: bool = False


HEALING_CASES = [
    HealingCase("llama3.2-1b", 1, 512),
    HealingCase("llama3.2-1b", 1, 512, compiled=True),
    HealingCase("llama3.2-1b", 4, 512, compiled=True),
    HealingCase("llama3.2-1b", 1, 4096),
    HealingCase("llama3.1-8b", 1, 512, recompute=True),
    HealingCase("llama3.1-8b", 1, 4096, recompute=True),
    HealingCase("llama3.1-8b", 1, 512, compiled=True),
]
DRY_CASES = [HealingCase("tiny", 1, 128), HealingCase("tiny", 1, 128, recompute=True)]


def measure_healing() -> None:
    """Tokens a second of distillation and its peak memory: one sequence a step, as is the default,
    and more."""
    shape = None
    for case in DRY_CASES if DRY else HEALING_CASES:
        if time_left() < 12:
            emit(stopped="no time left")
            return
        if case.shape != shape:
            shape = case.shape
            models, trained = {}, {}  # frees the memory of the last shape
            free_memory()
            models = load_pair(shape)
            trained = distill.prepare(models["plan"], distill.Healing())
        try:
            measure_distillation(case, models["dense"], models["plan"], trained)
        except Exception as error:
            emit(**case._asdict(), error=describe(error))


def measure_distillation(case: HealingCase, teacher: Model, student: Model, trained: dict) -> None:
    teacher.compiled_shapes.clear()
    if case.compiled:
        teacher.compiled_shapes.add((case.batch, case.tokens))
    student.recompute = case.recompute
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = distill.Optimizer(trained)
    ids = random_ids(case.batch, case.tokens)

    def step() -> None:
        float(distill.distillation(teacher, student, ids, compiled=case.compiled))
        optimizer.step(1e-4, 1)

    free_memory()
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    ms = milliseconds(step, 3 if DRY else 8, 2)
    emit(
        **case._asdict(),
        step_ms=round(ms, 1),
        tokens_per_second=round(1e3 * case.batch * case.tokens / ms),
        first_step_s=round(first, 1),
        peak_gib=peak_gib(),
    )


# --- all steps ---------------------------------------------------------------------------------


class Step(NamedTuple):
    """limit: seconds that the step may take; dry: those of a dry run on one core, which may take
    three times as long, 0 where it is left out; small: on a GPU it runs beside others like it,
    since it times nothing that counts."""

    run: Callable[[], None]
    limit: int
    dry: int
    small: bool = False


ONE = "llama3.2-1b"
EIGHT = "llama3.1-8b"
STEPS = {
    "env": Step(check_environment, 60, 60, small=True),
    "logits": Step(check_logits, 100, 120, small=True),
    "prefill": Step(check_prefill, 80, 100, small=True),
    "engine": Step(check_engine, 100, 120, small=True),
    "graph": Step(check_graph, 80, 100, small=True),
    "heal": Step(check_healing, 120, 240, small=True),
    "compiled": Step(check_compiled, 200, 400, small=True),
    "cli": Step(check_command_line, 170, 500, small=True),
    "probe": Step(probe, 60, 60),
    "decode1b": Step(lambda: measure_decoding(ONE), 90, 150),
    "decode8b": Step(lambda: measure_decoding(EIGHT), 90, 100),
    "serve1b": Step(lambda: measure_serving(ONE, (200, 100, 50)), 120, 150),
    "healrate": Step(measure_healing, 120, 200),
    "serve8b": Step(lambda: measure_serving(EIGHT, (200,)), 60, 100),
    "eager_decode1b": Step(lambda: measure_decoding(ONE, (False,)), 50, 0),
    "eager_serve1b": Step(lambda: measure_serving(ONE, (200,), compiled=False), 60, 0),
}


class Job:
    """A step in a process of its own, stopped after `limit` seconds."""

    def __init__(self, name: str, limit: float, log: Path, environment: dict):
        self.name = name
        self.limit = limit
        self.log = log
        self.start = time.time()
        deadline = str(self.start + limit - 3)
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-u", __file__, "--step", name],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment | {"GPU_CHECK_DEADLINE": deadline},
            )

    def finish(self) -> dict:
        """The step's figures, once it has ended or its time is up."""
        stopped = False
        try:
            self.process.wait(max(0.1, self.start + self.limit - time.time()))
        except subprocess.TimeoutExpired:
            stopped = True
            os.killpg(self.process.pid, signal.SIGKILL)  # its compile workers too
            self.process.wait()

        text = self.log.read_text(errors="replace")
        lines = [line[3:] for line in text.splitlines() if line.startswith("@@ ")]
        figures = [json.loads(line) for line in lines]
        code = "time limit" if stopped else self.process.returncode
        return {
            "code": code,
            "seconds": round(time.time() - self.start, 1),
            "failed": [row for row in figures if row.get("ok") is False],
            "figures": figures,
            "end": "" if code == 0 else text[-2500:],
        }


class Report:
    """What the steps have found, written to `out` after each of them."""

    def __init__(self, out: Path, dry: bool):
        self.out = out
        self.dry = dry
        self.start = time.time()
        self.steps: dict[str, dict] = {}
        self.summary = ""
        self.log = ""
        out.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> float:
        return round(time.time() - self.start, 1)

    def add(self, job: Job) -> None:
        result = job.finish()
        self.steps[job.name] = result
        bad = f", {len(result['failed'])} FAILED" if result["failed"] else ""
        print(
            f"{self.seconds:6.0f} s  {job.name:18} {result['code']}  {result['seconds']} s, "
            f"{len(result['figures'])} figures{bad}",
            flush=True,
        )
        self.summary += f"{job.name}: exit {result['code']}, {result['seconds']} s\n"
        for figures in result["figures"]:
            self.summary += f"    {json.dumps(figures)}\n"
        self.log += f"=== {job.name}\n{job.log.read_text(errors='replace')[-20000:]}\n"

        content = {"seconds": self.seconds, "dry": self.dry, "steps": self.steps}
        (self.out / "gpu_check.json").write_text(json.dumps(content, indent=1))
        (self.out / "gpu_check.txt").write_text(self.summary)
        (self.out / "gpu_check.log").write_text(self.log)

    def wrong(self) -> list[str]:
        names = []
        for name, result in self.steps.items():
            if result["code"] != 0 or result["failed"]:
                names.append(name)
        return names


def run_steps(names: list[str], report: Report, budget: float) -> None:
    logs = Path(tempfile.mkdtemp())
    environment = os.environ | {
        "GPU_CHECK_DRY": str(int(report.dry)),
        "TORCHINDUCTOR_CACHE_DIR": str(logs / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }
    # The steps beside each other must not wait for each other's threads.
    environment["OMP_NUM_THREADS"] = "1" if report.dry else "2"

    beside: list[Job] = []
    for name in names:
        step = STEPS[name]
        limit = 3 * step.dry if report.dry else step.limit
        if step.small and not report.dry:
            limit = min(limit, budget - report.seconds)
            beside.append(Job(name, limit, logs / name, environment))
            continue

        while beside:
            report.add(beside.pop(0))
        remaining = budget - report.seconds
        if remaining < 15 or not limit:
            print(f"no time for {name}")
            continue
        report.add(Job(name, min(limit, remaining), logs / name, environment))
    for job in beside:
        report.add(job)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help=f"some of {','.join(STEPS)}, joined by commas [all]")
    parser.add_argument("--dry", action="store_true", help="tiny sizes [where there is no GPU]")
    parser.add_argument("--step", choices=STEPS, help="run this one here, for the others' sake")
    parser.add_argument("--budget", type=float, help=f"seconds [{BUDGET}, dry {DRY_BUDGET}]")
    args = parser.parse_args()
    if args.step:
        cpu.enabled = False  # so that a dry run takes the lines that a GPU takes
        STEPS[args.step].run()
        return 0

    names = args.only.split(",") if args.only else list(STEPS)
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: give some of {','.join(STEPS)}")

    dry = args.dry or not CUDA
    report = Report(Path(os.environ.get("OUT", ROOT / "out/gpu")), dry)
    run_steps(names, report, args.budget or (DRY_BUDGET if dry else BUDGET))
    print(report.summary[-9000:])
    wrong = report.wrong()
    verdict = f"look at: {', '.join(wrong)}" if wrong else "everything passed"
    print(f"{report.seconds:.0f} s in all; {verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
