"""Optional: faster twins of functions of kernels.py on a CPU, most of them C++ (cpu.cpp), and how
that is built.

Each twin has the signature of its original. `runs(x)` says whether it can be used: on the CPU,
without gradients, if a C++ compiler works; otherwise one warning is printed and torch runs
instead. `enabled = False` is the one switch (--no-compile).

The library is built once per machine: a shared object in the user's cache folder, named by a hash
of the source, the command and the processor. Every call goes through `call`, which checks device,
dtype, shape, contiguity and range, so no argument can make the C++ read or write outside its
tensors.
"""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import kernels
from terminal import progress

enabled = True
SOURCE = Path(__file__).with_name("cpu.cpp")
NUMBERS = {torch.float32: "float", torch.bfloat16: "bfloat16"}


def runs(x: Tensor) -> bool:
    """Whether the twins accept x, a key, value or weight."""
    usable = enabled and x.device.type == "cpu" and x.dtype in NUMBERS
    return usable and not torch.is_grad_enabled() and compiler_works()


# --- the twins ---------------------------------------------------------------------------------


def softmax_attention(query, key, value, start=None, sliding_window: int | None = None) -> Tensor:
    """Without a mask where every sequence has equally many keys before its queries: attention over
    those keys, and causal attention over the queries' own, joined by their log-sums."""
    before = key.shape[2] - query.shape[2]
    in_parts = before and not sliding_window and not torch.compiler.is_compiling()
    if not in_parts or (start != before).any():
        return kernels.softmax_attention(query, key, value, start, sliding_window)

    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rows = kernels.group_heads(query, key.shape[1])
    earlier, earlier_sum = attend(rows, key[:, :, :before], value[:, :, :before])
    ratio = query.shape[1] // key.shape[1]
    own = [x[:, :, before:].repeat_interleave(ratio, 1) for x in (key, value)]
    out, log_sum = attend(query, *own, is_causal=True)
    earlier_sum = earlier_sum.reshape(log_sum.shape)[..., None]
    joined = kernels.join_terms(
        out, log_sum[..., None], earlier.reshape(query.shape), torch.ones(()), earlier_sum
    )
    return joined.to(query.dtype)


def softmax_step(
    query, new_key, new_value, slot, key, value, end, sliding_window: int | None = None
) -> Tensor:
    first = (end - (sliding_window or key.shape[2])).clamp(min=0)
    step = torch.ops.layerboost.step
    return step(scaled(query), new_key, new_value, slot, key, value, first, end).to(query.dtype)


def window_linear_step(
    query,
    new_key,
    new_value,
    slot,
    key,
    value,
    end,
    phi_query,
    phi_key,
    left,
    tail_logit,
    state,
    norm,
) -> Tensor:
    local = (scaled(query), new_key, new_value, slot, key, value, torch.zeros_like(end), end)
    tail = (phi_query, phi_key, left, tail_logit, state, norm)
    return torch.ops.layerboost.step(*local, *tail).to(query.dtype)


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """W x for a single row x [..., inputs] -> [..., outputs]: as fast as W is read."""
    y = torch.ops.layerboost.row_product(x.float().flatten(), weight)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def scaled(query: Tensor) -> Tensor:
    return query.float() * query.shape[-1] ** -0.5


# --- calls into the library --------------------------------------------------------------------

# What each function of cpu.cpp takes after its sizes and its output: dtype and shape, a letter for
# each size. "number" is the dtype of keys, values and weights; "?" marks what may be None, "!" what
# changes in place and so cannot be copied.
LAYOUTS = {
    "step": {
        "query": "float B H 1 D",
        "new_key": "number B G 1 D",
        "new_value": "number B G 1 D",
        "slot": "int B",
        "key": "number! B G N D",
        "value": "number! B G N D",
        "first": "int B",
        "end": "int B",
        "phi_query": "float? B H 1 F",
        "phi_key": "float? B G F",
        "left": "number? B G D",
        "tail_logit": "float? H",
        "state": "float?! B G F D",
        "norm": "float?! B G F",
    },
    "row_product": {"x": "float I", "weight": "number O I"},
}
SIZES = {"step": "BGNF", "row_product": "OI"}  # in the order of cpu.cpp
DTYPES = {"float": torch.float32, "int": torch.int64}


def parse_layout(layout: dict[str, str]) -> list[tuple]:
    """(name, dtype or None for "number", shape, may be None, changes in place) of each tensor."""
    arguments = []
    for name, spec in layout.items():
        kind, *letters = spec.split()
        dtype = DTYPES.get(kind.strip("?!"))
        arguments.append((name, dtype, "".join(letters), "?" in kind, "!" in kind))
    return arguments


# Parsed once, since every call is checked.
ARGUMENTS = {function: parse_layout(layout) for function, layout in LAYOUTS.items()}


def call(function: str, out: Tensor, *tensors: Tensor | None) -> Tensor:
    """Calls a function of cpu.cpp on `tensors`, which are as LAYOUTS has them. Returns `out`.

    This is the one boundary into C++. Raises ValueError for a tensor of another device, dtype or
    shape, for one that changes in place and is not contiguous, for a part of a tail without the
    others, and for a position outside a cache.
    """
    number = tensors[1].dtype  # of the new key, the keys or the weight
    if number not in NUMBERS:
        raise ValueError(f"cpu.{function}: {number} is neither float32 nor bfloat16")

    sizes = {"1": 1}
    kept = [out]  # contiguous copies must live until the call is over
    for (name, dtype, shape, optional, in_place), x in zip(
        ARGUMENTS[function], tensors, strict=True
    ):
        if x is None and optional:
            kept.append(None)
            continue
        dtype = dtype or number
        fits = x.is_cpu and x.dtype == dtype and x.dim() == len(shape)
        if not fits or any(sizes.setdefault(k, n) != n for k, n in zip(shape, x.shape)):
            raise ValueError(
                f"cpu.{function}: {name} is {x.dtype} {tuple(x.shape)} on {x.device}, not {dtype} "
                f"{' '.join(shape)} on cpu with {sizes}"
            )
        if in_place and not x.is_contiguous():
            raise ValueError(f"cpu.{function}: {name} changes in place and is not contiguous")
        kept.append(x.contiguous())

    if "F" in sizes and any(x is None for x in kept):
        raise ValueError(f"cpu.{function}: a tail needs all of its tensors")
    heads, rest = divmod(sizes.get("H", 1), sizes.get("G", 1))
    if rest:
        raise ValueError(
            f"cpu.{function}: {sizes['H']} query heads on {sizes['G']} key/value heads"
        )
    run = library(heads, sizes.get("D", 64), number)[function]
    numbers = [sizes.get(letter, 0) for letter in SIZES[function]]
    pointers = [None if x is None else x.data_ptr() for x in kept]
    if not run(*numbers, *pointers):
        raise ValueError(f"cpu.{function}: a position is outside the cache; call cache.resize")
    return out


def output_of(first: Tensor, *rest: Tensor | None) -> Tensor:
    """An uninitialised output: like the query, or the rows of the weight."""
    if first.dim() > 1:
        return torch.empty_like(first, memory_format=torch.contiguous_format)
    return first.new_empty(len(rest[0]))


def define_operator(function: str) -> None:
    """Makes a function an operator, so that it can be part of a compiled program."""
    arguments = []
    for i, (name, _, _, optional, in_place) in enumerate(ARGUMENTS[function]):
        written = f"({chr(97 + i)}!)" if in_place else ""
        mark, default = ("?", "=None") if optional else ("", "")
        arguments.append(f"Tensor{written}{mark} {name}{default}")

    def run(*tensors):
        tensors += (None,) * (len(arguments) - len(tensors))
        return call(function, output_of(*tensors), *tensors)

    torch.library.define(f"layerboost::{function}", f"({', '.join(arguments)}) -> Tensor")
    torch.library.impl(f"layerboost::{function}", "CPU", run)
    torch.library.register_fake(f"layerboost::{function}", output_of)


for function in LAYOUTS:
    define_operator(function)


# --- the build ---------------------------------------------------------------------------------


def compiler_works() -> bool:
    return try_compiler()


# As torch.compiler.assume_constant_result does, which would import torch's compiler: 3 s.
compiler_works._dynamo_marked_constant = True


@functools.cache
def try_compiler() -> bool:
    """Builds one variant. Where that fails, says why, once."""
    try:
        library(1, 64, torch.float32)
        return True
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        reason = output.strip().splitlines()[0]
        print(
            f"cpu.cpp was not built, torch runs instead, slower ({reason}); install g++, or name a "
            "C++ compiler with OpenMP in CXX, or give --no-compile",
            file=sys.stderr,
        )
        return False


@functools.cache
def library(heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Callable[..., bool]]:
    """The functions of cpu.cpp for `heads` query heads a key/value head, built or found in the
    cache folder. Sums may be taken in any order, as vector instructions do. Raises OSError or
    CalledProcessError."""
    command = [os.environ.get("CXX", "g++"), "-O3", "-march=native", "-fopenmp", "-std=c++17"]
    command += ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-shared", "-fPIC"]
    command += [f"-DHEADS={heads}", f"-DHEAD_DIM={head_dim}", f"-DNUMBER={NUMBERS[dtype]}"]

    parts = (SOURCE.read_text(), " ".join(command), processor())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    path = cache_folder() / f"cpu-{digest}.so"
    if not path.exists():
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        os.close(handle)
        try:
            build = [*command, str(SOURCE), "-o", temporary]
            with progress(desc="building cpu.cpp", bar_format="{desc} {elapsed}"):
                subprocess.run(build, text=True, check=True, capture_output=True)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    functions = {}
    for name, sizes in SIZES.items():
        function = getattr(ctypes.CDLL(str(path)), name)
        function.restype = ctypes.c_bool
        pointers = len(LAYOUTS[name]) + 1  # the output's is the first
        function.argtypes = [ctypes.c_int64] * len(sizes) + [ctypes.c_void_p] * pointers
        functions[name] = function
    return functions


def cache_folder() -> Path:
    """A folder of the user's own, since what lies there is executed. Raises OSError for
    another's."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "layerboost"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if sys.platform != "win32":
        owner = folder.stat()
        if owner.st_uid != os.getuid() or owner.st_mode & 0o022:
            raise PermissionError(
                f"{folder}: others can write there; remove it or set XDG_CACHE_HOME"
            )
    return folder


def processor() -> str:
    """What -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = cpuinfo.read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))
