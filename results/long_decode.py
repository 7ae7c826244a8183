"""How far decoding drifts: 100,000 tokens of one L layer, one at a time in bfloat16 with sums in
float32, beside the parallel form in float64.

    python results/long_decode.py 100000 --out results/trust/long_decode.svg

Both get the same queries, keys, values and features, rounded to bfloat16 where decoding has them so
(SmolLM2's heads: 9 queries on 3 keys of 64 numbers, Hedgehog's features, window 64, 4 sinks). The
error of a token is |step - exact| / |exact| over all heads. A bfloat16 number is 2^-9 = 0.2% off at
most, so that is what the output alone may cost; what grows with length would be the sums'.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor

import cpu
import kernels
from kernels import feature_map

H, G, D, WINDOW, SINKS = 9, 3, 64, 64, 4
BLOCK = 1000  # tokens between two exact ones that are compared one after the other


def draw(tokens: int, seed: int = 0) -> tuple[Tensor, ...]:
    """query [1, H, T, D], key and value [1, G, T, D] in bfloat16. Keys and values have a mean, as
    real ones do, so that the sums grow with every token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    query, key, value = (normal(1, heads, tokens, D) for heads in (H, G, G))
    key += normal(1, G, 1, D)
    value += normal(1, G, 1, D)
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


@torch.no_grad()
def decode(query: Tensor, key: Tensor, value: Tensor, b: Tensor) -> Tensor:
    """One token after the other: [1, H, T, D]."""
    window_linear_step = cpu.window_linear_step if cpu.runs(key) else kernels.window_linear_step
    queries, keys = torch.eye(D).repeat(H, 1, 1), torch.eye(D).repeat(G, 1, 1)
    cache_key, cache_value = torch.zeros(2, 1, G, SINKS + WINDOW, D, dtype=key.dtype)
    state, norm = torch.zeros(1, G, 2 * D, D), torch.zeros(1, G, 2 * D)
    outs = []
    for t in range(query.shape[2]):
        now = slice(t, t + 1)
        slot = t if t < SINKS else SINKS + (t - SINKS) % WINDOW
        left_key, left_value = cache_key[:, :, slot].clone(), cache_value[:, :, slot].clone()
        phi_query = feature_map(query[:, :, now], "hedgehog", queries)
        phi_key = feature_map(left_key[:, :, None], "hedgehog", keys)[:, :, 0]
        phi_key = phi_key * (t - WINDOW >= SINKS)
        local = (query[:, :, now], key[:, :, now].clone(), value[:, :, now].clone())
        cache = (torch.tensor([slot]), cache_key, cache_value)
        end = torch.tensor([min(t + 1, SINKS + WINDOW)])
        outs.append(
            window_linear_step(*local, *cache, end, phi_query, phi_key, left_value, b, state, norm)
        )
    return torch.cat(outs, 2)


def exact(query: Tensor, key: Tensor, value: Tensor, b: Tensor) -> Tensor:
    """The formula at the head of kernels.py in float64, BLOCK queries at a time: [1, H, T, D]."""
    maps = torch.eye(D, dtype=torch.float64).repeat(H, 1, 1)
    query, key, value = query.double(), key.double(), value.double()
    state, norm = 0.0, 0.0  # of the tail before the block
    joined = SINKS
    outs = []
    for first in range(0, query.shape[2], BLOCK):
        last = min(first + BLOCK, query.shape[2])

        # What left the window before the block's first query; the rest is seen one by one.
        while joined <= first - WINDOW:
            until = first - WINDOW + 1
            phi = features(key[:, :, joined:until], maps[:G])
            state = state + phi.mT @ value[:, :, joined:until]
            norm = norm + phi.sum(2)
            joined = until

        positions = torch.cat((torch.arange(min(SINKS, last)), torch.arange(joined, last)))
        k = key[:, :, positions].repeat_interleave(H // G, 1)  # (1, H, keys, D)
        v = value[:, :, positions].repeat_interleave(H // G, 1)
        q = query[:, :, first:last]
        t = torch.arange(first, last)[:, None]
        local = (positions <= t) & ((positions < SINKS) | (positions > t - WINDOW))
        tail = (positions <= t) & ~local

        phi_query = features(q, maps)
        weights = torch.exp(q @ k.mT * D**-0.5) * local
        weights += b.double().exp().view(-1, 1, 1) * (phi_query @ features(k, maps).mT) * tail
        numerator, denominator = weights @ v, weights.sum(-1, keepdim=True)
        if joined > SINKS:
            phi_query = phi_query * b.double().exp().view(-1, 1, 1)
            numerator += phi_query @ state.repeat_interleave(H // G, 1)
            denominator += phi_query @ norm.repeat_interleave(H // G, 1)[..., None]
        outs.append(numerator / denominator)
    return torch.cat(outs, 2)


def features(x: Tensor, weight: Tensor) -> Tensor:
    """Hedgehog's in float64."""
    y = torch.einsum("bhtd,hfd->bhtf", x, weight)
    return torch.cat((y.softmax(-1), (-y).softmax(-1)), dim=-1)


def errors(tokens: int) -> Tensor:
    """The relative error of each token, [T]."""
    inputs = draw(tokens)
    b = torch.linspace(-2, 2, H)
    expected = exact(*inputs, b)
    off = (decode(*inputs, b).double() - expected).norm(dim=(1, 3)) / expected.norm(dim=(1, 3))
    return off[0]


def plot(error: Tensor, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    count = max(1, len(error) // 200)
    blocks = error[: len(error) // count * count].view(-1, count)
    position = torch.arange(1, len(blocks) + 1) * count
    pyplot.figure(figsize=(7, 3.2))
    pyplot.plot(position, blocks.amax(1), label="largest", linewidth=1)
    pyplot.plot(position, blocks.mean(1), label="mean", linewidth=1)
    pyplot.axhline(1e-2, color="grey", linestyle=":", label="promised")
    pyplot.yscale("log")
    pyplot.xlabel("tokens decoded")
    pyplot.ylabel("relative error")
    pyplot.legend()
    pyplot.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    pyplot.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    error = errors(args.tokens)
    for first in (0, args.tokens // 2, args.tokens * 9 // 10):
        part = error[first : first + args.tokens // 10]
        end = first + len(part)
        print(f"tokens {first:,} to {end:,}: mean {part.mean():.1e}, largest {part.max():.1e}")
    print(f"largest of all {error.max():.2e}")
    if args.out:
        plot(error, args.out)
