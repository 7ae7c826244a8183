"""The floor: how fast a step could be, from its bytes and operations alone.

Serving has two phases. *Prefill* reads a prompt, all its tokens at once: its matrix products keep
the arithmetic units busy, so it costs operations. *Decoding* makes one token a step for each
sequence, and reads all weights and all caches to do so: it costs bytes. The batch shares the
weights, and each sequence has its own cache. So at large batch and long context the caches dominate
a step's time, and a plan makes them smaller.

A part of a step that moves b bytes and computes n operations takes at least

    max(b / bandwidth, n / rate)    seconds (the roofline model, CACM 52(4), 2009)
"""

import timeit
from typing import NamedTuple

import torch

from config import Config
from hub import require
from kernels import feature_size
from model import Model, cache_bytes, weight_bytes

# --- hardware ----------------------------------------------------------------------------------


class Hardware(NamedTuple):
    bandwidth: float  # bytes/s from memory
    rate: float  # operations/s in the model's dtype; a multiplication and an addition are two


HARDWARE = {  # by NVIDIA's data sheets, in bf16
    "a10": Hardware(600e9, 125e12),
    "h100": Hardware(3.35e12, 989e12),
}


def measure_hardware(device: str, dtype: torch.dtype) -> Hardware:
    """The rates at which this machine copies memory and multiplies matrices, x W^T as in a linear
    layer. The numbers are random: ones take less power, so a processor multiplies them faster."""
    wait = torch.get_device_module(device).synchronize
    source = torch.ones(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = fastest(lambda: target.copy_(source), wait)

    size = 8192 if device.startswith("cuda") else 2048
    x = torch.randn(size, size, device=device).to(dtype)
    multiplying = fastest(lambda: x @ x.T, wait)
    return Hardware(2 * source.numel() / copying, 2 * size**3 / multiplying)


def fastest(run, wait) -> float:
    """Seconds of the fastest of six runs."""
    return min(timeit.repeat(lambda: (run(), wait()), number=1, repeat=6))


# --- the floor ---------------------------------------------------------------------------------


def step_costs(model: Model, batch: int, context: int) -> dict[str, tuple[float, float]]:
    """`plan_costs` of a model's own plan, in its own dtype."""
    return plan_costs(model.config, model.norm.weight.element_size(), batch, context)


def plan_costs(
    config: Config, size: int, batch: int, context: int
) -> dict[str, tuple[float, float]]:
    """{part: (bytes, operations)} of one decoding step for `batch` sequences that hold `context`
    tokens each, in numbers of `size` bytes.

    Weights and head are read once for all. A softmax layer reads 2 G D numbers for every token of
    every sequence. An L layer reads those of its window and sinks, and reads and writes S and z,
    G F (D + 1) float32 numbers. The map of an X layer is one more product with weights.
    """
    softmax_layers = config.plan.count("S")
    linear_layers = config.plan.count("L")
    H = config.num_attention_heads
    G = config.num_key_value_heads
    D = config.head_dim
    F = feature_size(config.feature_map, D)

    attention = 2 * (H + G) * D * config.hidden_size
    mlp = 3 * config.hidden_size * config.intermediate_size
    head = config.vocab_size * config.hidden_size
    stand_ins = config.plan.count("X") if config.removed == "linear" else 0
    weights = (softmax_layers + linear_layers) * attention + len(config.plan) * mlp
    weights += stand_ins * config.hidden_size**2
    maps = linear_layers * (H + G) * D * D if F else 0  # float32

    tokens = softmax_layers * batch * context
    local = linear_layers * batch * min(context, config.window + config.sinks)
    state = linear_layers * batch * F * (D + 1)  # S and z of one head
    return {
        "weights": (size * weights + 4 * maps, 2 * (weights + maps) * batch),
        "softmax cache": (tokens * 2 * size * G * D, tokens * 4 * H * D),
        "window": (local * 2 * size * G * D, local * 4 * H * D),
        "state": (state * 8 * G, state * 2 * (G + H)),
        "head": (size * head, 2 * head * batch),
    }


def prefill_operations(model: Model, tokens: int) -> float:
    """For each token those of a step at half the context, with the head for the last token only."""
    costs = step_costs(model, 1, tokens // 2)
    _, head = costs.pop("head")
    return tokens * sum(operations for _, operations in costs.values()) + head


def floor_seconds(costs: dict[str, tuple[float, float]], hardware: Hardware) -> float:
    """The parts run one after the other, each for as long as its bytes or its operations take,
    whichever is longer."""
    seconds = 0.0
    for size, operations in costs.values():
        seconds += max(size / hardware.bandwidth, operations / hardware.rate)
    return seconds


def serving_floor(model: Model, prompt: int, output: int, slots: int, hardware: Hardware) -> float:
    """Output tokens/s of requests of these lengths. Each takes the operations of its prompt and,
    for every new token, its share of a step at the mean context."""
    reading = prefill_operations(model, prompt) / hardware.rate
    step = floor_seconds(step_costs(model, slots, prompt + output // 2), hardware)
    return output / (reading + output * step / slots)


def fitting_slots(
    model: Model, tokens: int, memory: float, clients: int, work: tuple[float, float] = (0, 0)
) -> int:
    """How many of `clients` sequences of this many tokens fit into memory beside the weights, where
    computing takes `work` bytes, in all and for each sequence. Raises InputError where none
    does."""
    weights = weight_bytes(model) + work[0]
    each = max(1, cache_bytes(model, tokens) + work[1])  # without attention there is no cache
    slots = int(min(clients, (memory - weights) / each))
    require(
        slots >= 1,
        f"--memory: {memory / 2**30:.1f} GiB hold the weights and what computing takes "
        f"({weights / 2**30:.1f} GiB) and no sequence of {tokens} tokens; give more",
    )
    return slots
