"""What a GPU would run for a layer, found on a machine without one: torch.compile makes its program
for tensors that have sizes and a device, but no memory, and Triton compiles its kernels.

    pip install triton        (and a C++ compiler)
    python results/launches.py [--shape llama3.1-8b] [--capability 8.6] [--torch]

For each tier, steps and prompts: the launches of a layer, eager and compiled (Triton's kernels,
products, and what our own operators launch), buffers of a step as large as a cache, of which there
should be none, and the seconds that the program took, or that an earlier one served. Nothing is
run: this finds what does not compile and what is too much, not what is wrong.
"""

import argparse
import contextlib
import ctypes
import functools
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch._dynamo import device_interface
from torch._inductor import async_compile, compile_fx, graph
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import engine
import gpu
from model import Block, Model, convert
from shapes import SHAPES, build_shape

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
# Tokens and room of the cache: a whole prompt fills it, a later chunk its end.
CALLS = {
    "step of 16": (16, 1, 4096),
    "step of 8": (8, 1, 4096),
    "step of 1": (1, 1, 4096),
    "8 prompts of 256": (8, 256, 256),
    "4 prompts of 512": (4, 512, 512),
    "16 prompts of 128": (16, 128, 128),
    "prompt of 2,048": (1, 2048, 2048),
    "its next 128 tokens": (1, 128, 2176),
}
GUARD = """
#include <c10/core/DeviceGuard.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""


def pretend(capability: tuple[int, int]) -> None:
    """Makes torch and Triton compile for a GPU that is not there."""
    if not torch.backends.cuda.is_built():
        register_device_guard()
    hopper = capability >= (9, 0)
    properties = SimpleNamespace(
        major=capability[0],
        minor=capability[1],
        name="none",
        gcnArchName="",
        multi_processor_count=132 if hopper else 72,
        max_threads_per_multi_processor=2048 if hopper else 1536,
        regs_per_multiprocessor=65536,
        warp_size=32,
        shared_memory_per_block_optin=232448 if hopper else 101376,
        shared_memory_per_block=49152,
        max_threads_per_block=1024,
        L2_cache_size=50 * 2**20 if hopper else 6 * 2**20,
    )
    cuda = device_interface.CudaInterface
    for owner in (torch.cuda, cuda, cuda.Worker):
        owner.get_device_properties = lambda *device: properties
        owner.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *device: capability
    cuda.get_compute_capability = lambda *device: 10 * capability[0] + capability[1]
    cuda.is_available = lambda: True
    cuda.is_bf16_supported = lambda *device, **more: True
    torch._C._cuda_getCurrentRawStream = lambda device: 0

    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": properties.shared_memory_per_block_optin
        }
    )
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_active_torch_device=lambda: torch.device("cuda", 0),
            utils=utils,
        )
    )
    triton_helpers.set_driver_to_gpu = lambda: None
    for module in list(sys.modules.values()):
        if module.__name__.startswith("torch.") and hasattr(module, "has_triton"):
            module.has_triton = lambda: True

    def compile_kernel(self, name, source, device_str="cuda"):
        kernel = async_compile._load_triton_kernel_from_source(name, source)
        kernel.precompile(warm_cache_only=True)
        return kernel

    async_compile.AsyncCompile.triton = compile_kernel


def register_device_guard() -> None:
    """A build of torch without CUDA has none."""
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        command = ["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", library]
        command += [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-lc10"]
        subprocess.run(command, check=True)
        ctypes.CDLL(library)


@contextlib.contextmanager
def recorded():
    """What torch.compile makes from here on: the text of each program. None is run."""
    programs = []
    compile_ = torch.compile

    def backend(program, inputs, options):
        def make(part, examples, **more):
            compile_fx.compile_fx_inner(part, examples, **more)
            outputs = part.graph.find_nodes(op="output")[0].args[0]
            values = [x.meta["val"] if hasattr(x, "meta") else x for x in outputs]

            def answer(arguments):
                return values

            answer._boxed_call = True
            return answer

        return compile_fx.compile_fx(program, inputs, inner_compile=make, config_patches=options)

    def replacement(function, dynamic=None, options=None):
        # Three passes of torch's would run something on the GPU.
        more = {"joint_graph_constant_folding": False, "shape_padding": False, "compile_threads": 1}
        options = {**(options or {}), **more, "force_disable_caches": True}
        return compile_(
            function, dynamic=dynamic, backend=functools.partial(backend, options=options)
        )

    save = mock.patch.object(graph.GraphLowering, "save_output_code", programs.append)
    with mock.patch.object(torch, "compile", replacement), save:
        yield programs


class CountLaunches(TorchDispatchMode):
    """Counts torch's operators but for those that only make a view or take memory; also those in
    our own operators, which torch.compile does not look into."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.in_ours = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "layerboost":
            before = self.count
            with self:
                out = getattr(gpu, function._opname)._init_fn(*arguments)
            self.in_ours += self.count - before
            return out
        is_free = function.is_view or function.namespace == "prim" or "empty" in str(function)
        self.count += not is_free
        return function(*arguments, **(keywords or {}))


def count(model: Model, call: str, block, programs: list[str]) -> str:
    """A row of the table."""
    B, T, room = CALLS[call]
    c = model.config
    cache = model.new_cache(B, room)
    x = torch.empty(B, T, c.hidden_size, dtype=torch.bfloat16, device="cuda:0")
    new = torch.zeros(B, dtype=torch.int64, device="cuda:0") if T > 1 else None
    rotary = model.rotary(T, cache.positions)
    arguments = (model.layers[0], x, rotary, cache.layers[0], cache.positions, new)
    with CountLaunches() as eager:
        Block.forward(*arguments)

    before = len(programs)
    start = time.perf_counter()
    block(*arguments)
    if len(programs) == before:
        return f"{eager.count} | an earlier program |  |  |  |  |"

    seconds = time.perf_counter() - start
    program = programs[-1].partition("def call(")[2]
    kernels, products = program.count(".run("), program.count("extern_kernels.")
    launches = kernels + products + eager.in_ours
    as_a_cache = rf"empty_strided_cuda\(\(\w+, {c.num_key_value_heads}, (?!1,)\w+, {c.head_dim}\)"
    copies = len(re.findall(as_a_cache, program)) if T == 1 else ""
    compiled = f"{launches} | {kernels} | {products} | {eager.in_ours} | {copies}"
    return f"{eager.count} | {compiled} | {seconds:.0f}"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="llama3.1-8b", choices=SHAPES, help="[%(default)s]")
    add("--capability", default="8.6", help="of the GPU: 8.6 is an A10, 9.0 an H100 [%(default)s]")
    add("--torch", action="store_true", help="kernels.py alone, without gpu.py")
    args = parser.parse_args(argv)

    if args.torch:
        gpu.runs = lambda x: False
    pretend(tuple(map(int, args.capability.split("."))))
    hidden, inner, _, *more = SHAPES[args.shape]
    SHAPES[args.shape] = (hidden, inner, 1, *more)
    print(f"{args.shape}, sm_{args.capability.replace('.', '')}, torch {torch.__version__}")
    print("| tier | call | eager | compiled | kernels | products | ours | as a cache | seconds |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    as_on_a_gpu = SimpleNamespace(compiled=True, on_gpu=True)
    with recorded() as programs, FAKE, torch.inference_mode():
        block = engine.Engine.block.fget(as_on_a_gpu)
        dense = build_shape(args.shape, torch.bfloat16, "cuda:0")
        for tier in "SL":
            model = engine.join_products(convert(dense, tier))
            for call in CALLS:
                print(f"| {tier} | {call} | {count(model, call, block, programs)} |", flush=True)


if __name__ == "__main__":
    main()
