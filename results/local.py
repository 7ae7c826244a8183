"""Tier L's attention of one layer, forward and back, as healing computes it on a CPU, with torch's
fused kernel for the window and with the plain form.

    python results/local.py

SmolLM2's shape: 9 query heads on 3 key/value heads of 64, one sequence, a tail of 32 features.
Medians of five, the two forms in turn.
"""

import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import kernels
from terminal import format_table

H, G, D, FEATURES, SINKS = 9, 3, 64, 32, 4
CASES = ((512, 256), (1024, 512), (2048, 768), (2048, 1024), (4096, 256))  # tokens, window
FORMS = {"plain": kernels.attend_with_sum, "fused": kernels.FusedAttention.apply}


def attention(tokens: int, window: int, dtype: torch.dtype):
    """A whole sequence of random numbers, to be called: its output and what it may learn."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, n, tokens, D, dtype=dtype) for n in (H, G, G))
    phi_query, phi_key = (torch.rand(1, n, tokens, FEATURES) for n in (H, G))
    leaves = [x.requires_grad_(True) for x in (query, key, value, phi_query, phi_key)]
    start = torch.zeros(1, dtype=torch.int64)
    state, norm = torch.zeros(1, G, FEATURES, D), torch.zeros(1, G, FEATURES)
    past = kernels.Past(start, key[:, :, :SINKS], value[:, :, :SINKS], state, norm)
    b = torch.full((H,), -8.0)

    def run():
        joins = (torch.arange(tokens) - window >= SINKS)[:, None]
        leaving = kernels.leaving_window(phi_key, tokens, window) * joins
        local = (query, key, value, phi_query, leaving)
        return kernels.window_linear_attention(*local, b, past, window)

    return run, leaves


def seconds(run, leaves, form) -> tuple[float, float]:
    """Of a forward and a backward pass."""
    with mock.patch.object(kernels, "FusedAttention", SimpleNamespace(apply=form)):
        start = time.perf_counter()
        out = run()
        between = time.perf_counter()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        return between - start, time.perf_counter() - between


def main() -> None:
    rows = [["dtype", "tokens", "window", *(f"{x}, ms" for x in FORMS), "plain / fused"]]
    for dtype in (torch.bfloat16, torch.float32):
        for tokens, window in CASES:
            run, leaves = attention(tokens, window, dtype)
            times = {name: [] for name in FORMS}
            for _ in range(6):
                for name, form in FORMS.items():
                    times[name].append(seconds(run, leaves, form))
            medians = {
                name: [1e3 * statistics.median(x) for x in zip(*passes[1:])]
                for name, passes in times.items()
            }
            shown = [f"{forward:.0f} + {back:.0f}" for forward, back in medians.values()]
            plain, fused = map(sum, medians.values())
            shape = [str(dtype).removeprefix("torch."), f"{tokens:,}", f"{window:,}"]
            rows.append([*shape, *shown, f"{plain / fused:.1f}"])
    print(format_table(rows))


if __name__ == "__main__":
    main()
