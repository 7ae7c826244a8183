"""The arithmetic of LayerBoost as functions of tensors: the formula first, then the form that runs.

Tier L, sliding-window linear attention, mixes two kinds of attention under one denominator. For the query at position
t, the first `sinks` positions and the last `window` ones (t - window < i <= t) are *local* and are attended with
softmax weights; every older position is the *tail* and is attended with linear attention, through a feature map phi:

    o_t = ( sum_local exp(a_i) v_i  +  exp(b) phi(q_t)^T S_t ) / ( sum_local exp(a_i)  +  exp(b) phi(q_t)^T z_t )

    a_i = q_t . k_i / sqrt(D)      S_t = sum_tail phi(k_i) v_i^T      z_t = sum_tail phi(k_i)

b is a learned logit per query head (Hedgehog and LoLCATs mix the same two terms: arXiv 2402.04347, 2410.10254; the
sinks are StreamingLLM's: arXiv 2309.17453). Both terms stand on one absolute scale: whatever is subtracted from the
exponents for safety is subtracted from a_i and from b alike, so the mix does not drift from query to query. (Beyond the n
tokens that a tail was healed on, exp(b) counts (n / (t + 1))^2: `query_features` in attention.py.)

`naive_window_linear_attention` is that formula with [T, T] masks, and the reference for all else in this file.
`window_linear_attention` is the same in chunks: O(T (window + sinks + F)) time and O(T) memory. `window_linear_step`
is one token of it in O(window + sinks + F), whatever the context length. Not all of it is torch: on a CPU attention and short
formulas without gradients, and products with frozen weights, run in C++ where that is faster (towards the end).

Shapes: B batch, T tokens, H query heads, G key/value heads (each serves H / G query heads), D head size, F features.
"""

import ctypes
import functools
import os
import subprocess
import tempfile
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SCORES = 2**17    # scores of a head of tier S that exist at one time on a CPU, for 16 to 64 queries
FEATURE_MAPS = ("hedgehog", "elu", "relu", "favor", "none")


# --- linear layers, rotary embedding and feature maps ------------------------------------------------------------

def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b: [..., inputs] -> [..., outputs]. In C++ where W was packed (`pack`) and does not learn, and for one row alone, as in the
    decoding of one sequence, which takes as long as reading W."""
    packed = getattr(weight, "packed", None)
    if CPP and packed is not None and packed.dtype == x.dtype and not weight.requires_grad:
        y = torch.ops.layerboost.packed_product(x, packed, weight)
    elif x.shape[:-1].numel() == 1 and in_cpp(weight):
        y = torch.ops.layerboost.row_product(x.float(), weight).to(x.dtype)
    else:
        return F.linear(x, weight, bias)
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (arXiv 1910.07467, eq. 4)."""
    if eager_in_cpp(x) and weight.dtype == x.dtype:
        return call("rms_norm", (1, 1, x.dtype), x.new_empty(x.shape), (x.numel() // len(weight), len(weight), eps), (x, weight))
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202, section 2), with silu(x) = x / (1 + exp(-x))."""
    if not eager_in_cpp(gate):
        return F.silu(gate) * up
    rows = [x.flatten(0, -2) for x in (gate, up)]                       # parts of the rows of one product, or all of two
    return call("swiglu", (1, 1, gate.dtype), gate.new_empty(gate.shape), (*rows[0].shape, rows[0].stride(0), rows[1].stride(0)), rows,
                strided=True)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_j, x_{j + D/2}) by the angles of their position (RoFormer, arXiv 2104.09864, section 3.4).

    x [B, heads, T, D]; cos, sin [B or 1, 1, T, D / 2] in float32. Computed in float32, returned in x's dtype.
    """
    if eager_in_cpp(x):
        B, heads, tokens, D = x.shape
        return call("rotary", (1, 1, x.dtype), x.new_empty(x.shape), (B, heads, tokens, D // 2, *x.stride()[:3], len(cos) > 1),
                    (x, cos.contiguous(), sin.contiguous()), strided=True)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def feature_size(kind: str, head_dim: int) -> int:
    """F, the number of features that `feature_map` makes from a head of size `head_dim`."""
    return {"hedgehog": 2 * head_dim, "favor": 2 * head_dim, "elu": head_dim, "relu": head_dim, "none": 0}[kind]


def feature_map(x: Tensor, kind: str, weight: Tensor) -> Tensor:
    """phi: positive features, so that phi(q) . phi(k) can stand for exp(q . k / sqrt(D)).

    x [B, heads, T, D], weight W [heads, D, D] (learned, started at the identity; [heads, F, D] and fixed for `favor`)
    -> [B, heads, T, F] in float32.

    hedgehog: softmax(W x) joined with softmax(-W x)             (arXiv 2402.04347, section 4)
    elu:      elu(W x) + 1                                       (linear transformers, arXiv 2006.16236, section 3.2)
    relu:     relu(W x) + 0.001, so that no denominator is zero  (T2R, SUPRA: arXiv 2103.13076, 2405.06640)
    favor:    exp(W y - |y|^2 / 2) / sqrt(F), y = x / D^(1/4)    (Performer's positive features, arXiv 2009.14794, eq. 5)
    """
    x = x.float()
    if kind == "favor":
        x = x * x.shape[-1] ** -0.25
    y = torch.einsum("bhtd,hfd->bhtf", x, weight)
    if kind == "hedgehog":
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), dim=-1)
    if kind == "elu":
        return F.elu(y) + 1
    if kind == "relu":
        return F.relu(y) + 1e-3
    return torch.exp(y - x.square().sum(-1, keepdim=True) / 2) * weight.shape[1] ** -0.5


def favor_projection(heads: int, head_dim: int) -> Tensor:
    """W of `favor` [heads, F, D]: blocks of D orthogonal directions, their lengths drawn as a Gaussian's
    (arXiv 2009.14794, section 2.4). The same for every head and always from the same seed, since q and k must share it."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator)).Q for _ in range(2)]
    lengths = torch.randn(2 * head_dim, head_dim, generator=generator).norm(dim=-1, keepdim=True)
    return (torch.cat(blocks) * lengths).expand(heads, -1, -1).contiguous()


# --- tier S: softmax attention -----------------------------------------------------------------------------------

def naive_softmax_attention(query: Tensor, key: Tensor, value: Tensor, sliding_window: int | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the past, by its formula. query [B, H, T, D], key, value [B, G, T, D]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    position = torch.arange(query.shape[2], device=query.device)
    seen = causal_mask(position, position, sliding_window)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, start: Tensor | None = None,
                      sliding_window: int | None = None) -> Tensor:
    """The same without [T, keys] weights in memory, for queries at the positions from `start` [B] on (None: 0) and the keys of all
    positions from 0 on, as many as there is room for.

    On a GPU by torch's fused kernel. That one runs at a fifth of a CPU's rate of multiplying matrices; so here a block of
    queries at a time, whose scores stay in the processor's cache, from position 0 on over no keys beyond them; in C++ where that has
    the faster products.
    """
    tokens, keys = query.shape[2], key.shape[2]
    if in_cpp(key) and multiplies_pairs(key) and key.shape[3] % 32 == 0:
        start = torch.zeros(len(key), dtype=torch.int64) if start is None else start
        return torch.ops.layerboost.attention_prompt(query, key, value, start, sliding_window or 0)
    position = torch.arange(tokens, device=query.device) + (0 if start is None else start[:, None])     # (T) or (B, T)
    if query.is_cuda:
        whole = start is None and (not sliding_window or tokens <= sliding_window)
        mask = None if whole else causal_mask(position, torch.arange(keys, device=query.device), sliding_window)
        mask = mask if whole or start is None else mask[:, None]
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=whole, enable_gqa=True)
    size, out = max(16, min(64, BLOCK_SCORES // keys)), []
    for first in range(0, tokens, size):
        block = slice(first, min(first + size, tokens))
        seen = torch.arange(block.stop if start is None else keys, device=query.device)
        out.append(attend_block(query[:, :, block], key[:, :, :len(seen)], value[:, :, :len(seen)],
                                causal_mask(position[..., block], seen, sliding_window).expand(len(key), -1, -1)))
    return torch.cat(out, dim=2)


def attend_block(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for a few queries a sequence, or one: [B, H, T, D] over key, value [B, G, keys, D], of which
    `seen` [B or 1, T, keys] are seen. As products in which a key/value head meets all of its query heads at once it reads
    each key once, which is what a decoding step's time goes into."""
    scores = group_heads(query * query.shape[-1] ** -0.5, key.shape[1]) @ key.transpose(-1, -2)     # (B, G, R * T, keys)
    bias = torch.where(seen, 0.0, -torch.inf).to(scores.dtype)          # to add it is five times as fast as to fill under a mask
    scores = (scores.unflatten(2, (-1, query.shape[2])) + bias[:, None, None]).flatten(2, 3)
    return (scores.softmax(-1) @ value).view(query.shape)


def softmax_step(query: Tensor, new_key: Tensor, new_value: Tensor, slot: Tensor, key: Tensor, value: Tensor, first: Tensor,
                 end: Tensor) -> Tensor:
    """A decoding step: a new key and value [B, G, 1, D] go to `slot` [B] of key and value [B, G, room, D], then one query a
    sequence, [B, H, 1, D], sees those from `first` to `end` [B]. Returns [B, H, 1, D]."""
    if in_cpp(key):
        return torch.ops.layerboost.attention_step(scaled(query), new_key, new_value, slot, key, value, first, end).to(query.dtype)
    put(new_key, new_value, slot, key, value)
    i = torch.arange(key.shape[2], device=key.device)
    return attend_block(query, key, value, ((i >= first[:, None]) & (i < end[:, None]))[:, None])


def put(new_key: Tensor, new_value: Tensor, slot: Tensor, key: Tensor, value: Tensor) -> None:
    sequence = torch.arange(len(slot), device=slot.device)
    key[sequence, :, slot], value[sequence, :, slot] = new_key[:, :, 0], new_value[:, :, 0]


def group_heads(x: Tensor, groups: int) -> Tensor:
    """[B, H, T, D] -> [B, G, H / G * T, D]: the query heads that share a key/value head, as rows of one matrix."""
    return x.reshape(x.shape[0], groups, -1, x.shape[-1])


def causal_mask(query_position: Tensor, key_position: Tensor, sliding_window: int | None = None) -> Tensor:
    """[..., T] and [..., keys] positions -> [..., T, keys], True where a query sees a key."""
    query_position, key_position = query_position[..., :, None], key_position[..., None, :]
    seen = key_position <= query_position
    return seen & (key_position > query_position - sliding_window) if sliding_window else seen


# --- tier L: sliding-window linear attention ---------------------------------------------------------------------

class Past(NamedTuple):
    """What a sequence's earlier tokens left behind for tier L. `window` key/value pairs travel beside it."""
    start: Tensor       # [B] int64: how many tokens came before, the position of the next one
    sink_key: Tensor    # [B, G, sinks, D]
    sink_value: Tensor  # [B, G, sinks, D]
    state: Tensor       # [B, G, F, D] float32: S, the sum of phi(k_i) v_i^T over the tail
    norm: Tensor        # [B, G, F] float32: z, the sum of phi(k_i) over the tail


def naive_window_linear_attention(query: Tensor, key: Tensor, value: Tensor, phi_query: Tensor | None,
                                  phi_key: Tensor | None, tail_logit: Tensor | None, window: int, sinks: int) -> Tensor:
    """The formula at the head of this file, with [T, T] masks: O(T^2).

    query [B, H, T, D], key, value [B, G, T, D], phi_query [B, H, T, F], phi_key [B, G, T, F], tail_logit b [H]
    (the last three None for no tail) -> [B, H, T, D].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    t = torch.arange(query.shape[2], device=query.device)[:, None]
    i = t.T
    local = (i <= t) & ((i < sinks) | (i > t - window))
    tail = (i <= t) & ~local

    scores = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).float().masked_fill(~local, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    if phi_query is not None:
        largest = torch.maximum(largest, tail_logit.view(-1, 1, 1))
    weights = torch.exp(scores - largest)
    if phi_query is not None:
        linear = phi_query @ phi_key.repeat_interleave(groups, 1).transpose(-1, -2)
        weights = weights + torch.exp(tail_logit.view(-1, 1, 1) - largest) * linear * tail
    return (weights @ value.float() / weights.sum(-1, keepdim=True)).to(query.dtype)


def window_linear_attention(query: Tensor, key: Tensor, value: Tensor, phi_query: Tensor | None, phi_key: Tensor | None,
                            tail_logit: Tensor | None, past: Past, window: int, chunk: int = 64) -> Tensor:
    """The same in chunks, going on from `past`: linear in T in time and memory.

    query [B, H, T, D]; key, value [B, G, window + T, D]: the `window` tokens before the first query (anything where
    there are none), then those of the queries; phi_query [B, H, T, F]; phi_key [B, G, T, F]: the features of
    key[:, :, :T], the tokens that leave the window as each query arrives, zero where that is a sink or no token
    -> [B, H, T, D].

    Local and tail terms come from `local_attention` and `tail_attention`; here they are put on one scale. On a CPU and without
    gradients it is the recurrence, token by token, in C++ (`chunk` below).
    """
    tokens = query.shape[2]
    if in_cpp(key):
        tail = (phi_query, phi_key, tail_logit, past.state, past.norm) if phi_query is not None else (None,) * 5
        return torch.ops.layerboost.attention_chunk(scaled(query), key, value, past.start.expand(len(key)), *past[1:3],
                                                    *tail).to(query.dtype)
    chunk = min(chunk, tokens)
    if phi_query is None:
        numerator, denominator, _ = local_attention(query, key, value, past, window, chunk)
    else:
        numerator, denominator = tail_attention(phi_query, phi_key, value[:, :, :tokens].float(), past, chunk)
        if window or past.sink_key.shape[2]:
            local_numerator, local_denominator, local_largest = local_attention(query, key, value, past, window, chunk)
            b = tail_logit.view(-1, 1, 1)
            largest = torch.maximum(local_largest, b.detach())
            local_scale, tail_scale = torch.exp(local_largest - largest), torch.exp(b - largest)
            numerator = local_scale * local_numerator + tail_scale * numerator
            denominator = local_scale * local_denominator + tail_scale * denominator
    return (numerator / denominator).to(query.dtype)


def local_attention(query: Tensor, key: Tensor, value: Tensor, past: Past, window: int, chunk: int):
    """The local terms, sum_local exp(a_i - m) v_i and sum_local exp(a_i - m), with m = max_local a_i.

    A chunk of queries sees a band of `window + chunk` keys: query j of the chunk sees the keys j < i <= j + window of its
    band, and those sinks that are no longer in its window. Returns [B, H, T, D] in value's dtype, float32 [B, H, T, 1] and m
    [B, H, T, 1].
    """
    tokens = query.shape[2]
    query = split_chunks(query * query.shape[-1] ** -0.5, key.shape[1], chunk)              # (B, G, n, R * C, D)
    n = query.shape[2]
    band_key, band_value = (F.pad(x, (0, 0, 0, n * chunk + window - x.shape[2])).unfold(2, chunk + window, chunk)
                            for x in (key, value))                                          # (B, G, n, D, C + w)
    position = past.start[:, None, None] + torch.arange(n * chunk, device=query.device).view(n, chunk)    # (B, n, C)
    j = torch.arange(chunk, device=query.device)[:, None]
    i = torch.arange(chunk + window, device=query.device)
    exists = position[..., :1] - window + i >= 0                                            # (B, n, C + w)
    seen_band = ((i > j) & (i <= j + window)) & exists[..., None, :]                        # (B, n, C, C + w)
    sink = torch.arange(past.sink_key.shape[2], device=query.device)
    seen_sink = sink <= position[..., None] - window                                        # (B, n, C, s)

    scores = torch.cat((query @ past.sink_key[:, :, None].transpose(-1, -2), query @ band_key), dim=-1).float()
    seen = torch.cat((seen_sink, seen_band), dim=-1)[:, None, :, None]                      # (B, 1, n, 1, C, s + C + w)
    scores = (scores.unflatten(3, (-1, chunk)) + torch.where(seen, 0.0, -torch.inf)).flatten(3, 4)      # (B, G, n, R * C, s + C + w)
    largest = scores.detach().amax(-1, keepdim=True)
    weights = torch.exp(scores - largest)
    sink_weights, band_weights = weights.to(value.dtype).split((sink.numel(), chunk + window), dim=-1)
    numerator = band_weights @ band_value.transpose(-1, -2) + sink_weights @ past.sink_value[:, :, None]
    denominator = weights.sum(-1, keepdim=True)
    return (join_chunks(x, tokens, chunk) for x in (numerator, denominator, largest))


def tail_attention(phi_query: Tensor, phi_key: Tensor, value: Tensor, past: Past, chunk: int):
    """The tail terms without exp(b), phi(q_t)^T S_t and phi(q_t)^T z_t: causal linear attention over the tokens that have
    left the window. A chunk reads the sum of all earlier chunks, and its own tokens under a causal mask.

    phi_query [B, H, T, F]; phi_key [B, G, T, F] and value [B, G, T, D] of the token that leaves at each t, in float32.
    Returns float32 [B, H, T, D], [B, H, T, 1].
    """
    tokens, groups = phi_query.shape[2], phi_key.shape[1]
    phi_query = split_chunks(phi_query, groups, chunk)                                      # (B, G, n, R * C, F)
    phi_key, value = split_chunks(phi_key, groups, chunk), split_chunks(value, groups, chunk)   # (B, G, n, C, F or D)
    states = torch.cat((past.state[:, :, None], (phi_key.transpose(-1, -2) @ value)[:, :, :-1]), dim=2).cumsum(2)
    norms = torch.cat((past.norm[:, :, None], phi_key.sum(3)[:, :, :-1]), dim=2).cumsum(2)  # (B, G, n, F)
    left = torch.ones(chunk, chunk, dtype=torch.bool, device=value.device).tril()
    scores = (phi_query @ phi_key.transpose(-1, -2)).unflatten(3, (-1, chunk)).masked_fill(~left, 0).flatten(3, 4)
    numerator = scores @ value + phi_query @ states                                         # (B, G, n, R * C, D)
    denominator = scores.sum(-1, keepdim=True) + phi_query @ norms[..., None]
    return join_chunks(numerator, tokens, chunk), join_chunks(denominator, tokens, chunk)


def split_chunks(x: Tensor, groups: int, chunk: int) -> Tensor:
    """[B, heads, T, D] -> [B, G, n, R * chunk, D] with R = heads / G: the query heads that share a key/value head lie
    together as more rows of one product, so no key is repeated. T is padded with zeros to n * chunk."""
    B, heads, T, D = x.shape
    n = -(-T // chunk)
    x = F.pad(x, (0, 0, 0, n * chunk - T)).view(B, groups, heads // groups, n, chunk, D)
    return x.transpose(2, 3).reshape(B, groups, n, heads // groups * chunk, D)


def join_chunks(x: Tensor, tokens: int, chunk: int) -> Tensor:
    """[B, G, n, R * chunk, D] -> [B, G * R, T, D], the padding cut off: the way back from `split_chunks`."""
    return x.unflatten(3, (-1, chunk)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :, :tokens]


def window_linear_step(query: Tensor, new_key: Tensor, new_value: Tensor, slot: Tensor, key: Tensor, value: Tensor, end: Tensor,
                       phi_query: Tensor, phi_key: Tensor, left: Tensor, tail_logit: Tensor, state: Tensor, norm: Tensor) -> Tensor:
    """A decoding step of tier L, O(window + sinks + F) at any position: the new key and value go to `slot` and the token that lay
    there into the tail, then the query is answered.

    As `softmax_step`, with local keys and values in any order, the first `end` of them seen; phi_query [B, H, 1, F]; phi_key
    [B, G, F] (zero where no token leaves) and value `left` [B, G, D] of the token that leaves; state S [B, G, F, D] and
    norm z [B, G, F], which change in place.
    """
    if in_cpp(key):
        return torch.ops.layerboost.attention_step(scaled(query), new_key, new_value, slot, key, value, torch.zeros_like(end), end,
                                                   phi_query, phi_key, left, tail_logit, state, norm).to(query.dtype)
    put(new_key, new_value, slot, key, value)
    state.addcmul_(phi_key[..., None], left.float()[:, :, None])
    norm.add_(phi_key)
    scores = (group_heads(query, key.shape[1]) @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5       # (B, G, R, slots)
    seen = torch.arange(key.shape[2], device=key.device) < end[:, None]                                 # (B, slots)
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    b = tail_logit.view(key.shape[1], -1, 1)
    largest = torch.maximum(scores.amax(-1, keepdim=True), b)
    weights, tail_scale = torch.exp(scores - largest), torch.exp(b - largest)
    phi_query = group_heads(phi_query, key.shape[1])
    numerator = weights.to(value.dtype) @ value + tail_scale * (phi_query @ state)
    denominator = weights.sum(-1, keepdim=True) + tail_scale * (phi_query * norm[:, :, None]).sum(-1, keepdim=True)
    return (numerator / denominator).view(query.shape).to(query.dtype)


# --- in C++, on a CPU --------------------------------------------------------------------------------------------
#
# A decoding step's time goes into reading caches and weights. torch's products of a few rows read them at half of the speed of
# memory, and caches for all sequences as far as the longest goes; here each sequence's own keys and values are read once. And
# tier L is a recurrence whose state fits into the processor's nearest cache: taken one token after the other it costs less than
# the many passes over memory of its form in chunks. A formula of elementwise work is one pass here, and five to ten eagerly.
# Products with weights are torch's, but of a single row, and of weights that `pack` laid out; these alone have a gradient.

CPP = True          # False where there is no C++ compiler (--no-compile): torch's products everywhere
NUMBERS = {torch.float32: "float", torch.bfloat16: "uint16_t"}
SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

static float number(float x) { return x; }

static float number(uint16_t bfloat16) {
    uint32_t bits = uint32_t(bfloat16) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static void store(float x, float* to) { *to = x; }

static void store(float x, uint16_t* to) {          // to the nearest, the even one of two
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    *to = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static float exponential(float x) {         // e^x for x <= 0, as 2^n e^r with |r| <= ln(2) / 2 and the series of e^r
    x = std::max(x, -87.0f);
    int32_t n = int32_t(x * 1.44269504f - 0.5f), bits = (n + 127) << 23;
    float r = x - n * 0.693147181f, power;
    memcpy(&power, &bits, sizeof power);
    return power * (1 + r * (1 + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r / 720))))));
}

// The R query heads of a key/value head. With a_i = q . k_i and m the largest a_i so far:
struct Attention {
    float numerator[R][D] = {};             // sum_i exp(a_i - m) v_i
    float denominator[R] = {};              // sum_i exp(a_i - m)
    float largest[R];                       // m

    Attention() { std::fill_n(largest, R, -1e30f); }

    // The tail: S += phi(k) v^T and z += phi(k) of the token that leaves the window, then phi(q)^T S and phi(q)^T z, at m = b.
    // Heads lie `stride` features apart.
    void tail(const float* phi_query, int64_t stride, const float* phi_key, const NUMBER* left, const float* b, float* S, float* z,
              int64_t features) {
        std::copy_n(b, R, largest);
        for (int64_t f = 0; f < features; f++, S += D) {
            z[f] += phi_key[f];
            for (int d = 0; d < D; d++) S[d] += phi_key[f] * number(left[d]);
            for (int r = 0; r < R; r++) {
                float phi = phi_query[r * stride + f];
                denominator[r] += phi * z[f];
                for (int d = 0; d < D; d++) numerator[r][d] += phi * S[d];
            }
        }
    }

    // Softmax over `count` keys, a block at a time; m rises from block to block (arXiv 1805.02867). Heads lie `stride` numbers apart.
    void keys(const float* q, int64_t stride, const NUMBER* key, const NUMBER* value, int64_t count) {
        float query[R][D], weight[R][BLOCK];
        for (int r = 0; r < R; r++) std::copy_n(q + r * stride, D, query[r]);
        for (; count > 0; count -= BLOCK, key += BLOCK * D, value += BLOCK * D) {
            int n = std::min<int64_t>(BLOCK, count);
            for (int i = 0; i < n; i++) {
                float a[R] = {};
                for (int d = 0; d < D; d += 32) __builtin_prefetch(value + i * D + d);
                #pragma omp simd reduction(+:a[:R])
                for (int d = 0; d < D; d++)
                    for (int r = 0; r < R; r++) a[r] += query[r][d] * number(key[i * D + d]);
                for (int r = 0; r < R; r++) weight[r][i] = a[r];
            }
            for (int r = 0; r < R; r++) {
                float m = largest[r], sum = 0;
                #pragma omp simd reduction(max:m)
                for (int i = 0; i < n; i++) m = std::max(m, weight[r][i]);
                for (int i = 0; i < n; i++) sum += weight[r][i] = exponential(weight[r][i] - m);
                float scale = exponential(largest[r] - m);
                for (int d = 0; d < D; d++) numerator[r][d] *= scale;
                denominator[r] = denominator[r] * scale + sum;
                largest[r] = m;
            }
            for (int i = 0; i < n; i++) {
                for (int d = 0; d < D; d += 32) __builtin_prefetch(key + (i + BLOCK) * D + d);
                for (int r = 0; r < R; r++)
                    for (int d = 0; d < D; d++) numerator[r][d] += weight[r][i] * number(value[i * D + d]);
            }
        }
    }

    void write(float* out, int64_t stride) {
        for (int r = 0; r < R; r++)
            for (int d = 0; d < D; d++) out[r * stride + d] = numerator[r][d] / denominator[r];
    }
};

// One token of every sequence, tier S (no features) or L: new_key and new_value go to `slot`, keys `first` to `end` are seen.
extern "C" void step(int64_t batch, int64_t groups, int64_t room, int64_t features, float* out, const float* query, const NUMBER* new_key,
                     const NUMBER* new_value, const int64_t* slot, NUMBER* key, NUMBER* value, const int64_t* first, const int64_t* end,
                     const float* phi_query, const float* phi_key, const NUMBER* left, const float* tail_logit, float* state, float* norm) {
    #pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < batch * groups; i++) {
        std::copy_n(new_key + i * D, D, key + (i * room + slot[i / groups]) * D);
        std::copy_n(new_value + i * D, D, value + (i * room + slot[i / groups]) * D);
        Attention attention;
        if (features)
            attention.tail(phi_query + i * R * features, features, phi_key + i * features, left + i * D, tail_logit + i % groups * R,
                           state + i * features * D, norm + i * features, features);
        int64_t from = first[i / groups], start = (i * room + from) * D;
        attention.keys(query + i * R * D, D, key + start, value + start, end[i / groups] - from);
        attention.write(out + i * R * D, D);
    }
}

// Many tokens of tier L, one after the other. Key j of the `window + tokens` lies at position start + j - window.
extern "C" void chunk(int64_t batch, int64_t groups, int64_t tokens, int64_t window, int64_t sinks, int64_t features, float* out,
                      const float* query, const NUMBER* key, const NUMBER* value, const int64_t* start, const NUMBER* sink_key,
                      const NUMBER* sink_value, const float* phi_query, const float* phi_key, const float* tail_logit, const float* state,
                      const float* norm) {
    #pragma omp parallel for schedule(dynamic)
    for (int64_t i = 0; i < batch * groups; i++) {
        std::vector<float> S, z;
        if (features) S.assign(state + i * features * D, state + (i + 1) * features * D), z.assign(norm + i * features, norm + (i + 1) * features);
        const NUMBER *k = key + i * (window + tokens) * D, *v = value + i * (window + tokens) * D;
        for (int64_t t = 0; t < tokens; t++) {
            int64_t position = start[i / groups] + t, head = i * R * tokens + t;
            Attention attention;
            if (features)
                attention.tail(phi_query + head * features, tokens * features, phi_key + (i * tokens + t) * features, v + t * D,
                               tail_logit + i % groups * R, S.data(), z.data(), features);
            int64_t old = std::clamp<int64_t>(position - window + 1, 0, sinks), local = std::min(window, position + 1);
            int64_t from = (t + 1 + window - local) * D;
            attention.keys(query + head * D, tokens * D, sink_key + i * sinks * D, sink_value + i * sinks * D, old);
            attention.keys(query + head * D, tokens * D, k + from, v + from, local);
            attention.write(out + head * D, tokens * D);
        }
    }
}

// x times the rows of a matrix, one after the other: memory gives two streams half of what it gives one.
extern "C" void row_product(int64_t rows, int64_t columns, float* out, const float* x, const NUMBER* matrix) {
    #pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        float sum = 0;
        for (int64_t j = 0; j < columns; j++) sum += x[j] * number(matrix[i * columns + j]);
        out[i] = sum;
    }
}

extern "C" void rms_norm(int64_t rows, int64_t size, double eps, NUMBER* out, const NUMBER* x, const NUMBER* weight) {
    #pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        float sum = 0;
        for (int64_t j = 0; j < size; j++) sum += number(x[i * size + j]) * number(x[i * size + j]);
        float scale = 1 / std::sqrt(sum / size + float(eps));
        for (int64_t j = 0; j < size; j++) store(number(x[i * size + j]) * scale * number(weight[j]), out + i * size + j);
    }
}

extern "C" void swiglu(int64_t rows, int64_t size, int64_t gate_row, int64_t up_row, NUMBER* out, const NUMBER* gate, const NUMBER* up) {
    #pragma omp parallel for
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < size; j++) {
            float x = number(gate[i * gate_row + j]), e = exponential(-std::abs(x));         // sigmoid(x) = 1 / (1 + e^-x) = e^x / (1 + e^x)
            store(x * (x < 0 ? e : 1) / (1 + e) * number(up[i * up_row + j]), out + i * size + j);
        }
}

// x [B, heads, T, 2 * half] lies in memory as the strides say. Sequences may have the same angles, or each its own.
extern "C" void rotary(int64_t batch, int64_t heads, int64_t tokens, int64_t half, int64_t of_sequence, int64_t of_head, int64_t of_token,
                       int64_t own_angles, NUMBER* out, const NUMBER* x, const float* cos, const float* sin) {
    #pragma omp parallel for
    for (int64_t i = 0; i < batch * heads * tokens; i++) {
        int64_t t = i % tokens, h = i / tokens % heads, b = i / tokens / heads, angle = (own_angles * b * tokens + t) * half;
        const NUMBER* row = x + b * of_sequence + h * of_head + t * of_token;
        for (int64_t j = 0; j < half; j++) {
            float first = number(row[j]), second = number(row[j + half]);
            store(first * cos[angle + j] - second * sin[angle + j], out + 2 * half * i + j);
            store(second * cos[angle + j] + first * sin[angle + j], out + 2 * half * i + half + j);
        }
    }
}

// M rows of x times 16 outputs, whose weights lie side by side. The sums stay in registers, of which AVX2 has enough for six rows.
typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

template <int M> static void float_tile(int64_t inputs, const float* x, const float* weights, float* out, int64_t out_row) {
    Eight sum[M][2] = {};
    for (int64_t k = 0; k < inputs; k++) {
        Eight first = *(const Eight*)(weights + k * 16), second = *(const Eight*)(weights + k * 16 + 8);
        #pragma GCC unroll 6
        for (int m = 0; m < M; m++) sum[m][0] += x[m * inputs + k] * first, sum[m][1] += x[m * inputs + k] * second;
    }
    #pragma GCC unroll 6
    for (int m = 0; m < M; m++) *(Eight*)(out + m * out_row) = sum[m][0], *(Eight*)(out + m * out_row + 8) = sum[m][1];
}

extern "C" void float_product(int64_t rows, int64_t outputs, int64_t inputs, float* out, const float* x, const float* weights) {
    int64_t block = std::max<int64_t>(1, (1 << 20) / inputs / 6) * 6, blocks = (rows + block - 1) / block;  // of rows: 4 MiB stay in a cache
    #pragma omp parallel for schedule(dynamic, 4)
    for (int64_t i = 0; i < blocks * (outputs / 16); i++) {
        int64_t o = i % (outputs / 16) * 16, r = i / (outputs / 16) * block, end = std::min(rows, r + block);
        for (; r + 6 <= end; r += 6) float_tile<6>(inputs, x + r * inputs, weights + o * inputs, out + r * outputs + o, outputs);
        for (; r + 2 <= end; r += 2) float_tile<2>(inputs, x + r * inputs, weights + o * inputs, out + r * outputs + o, outputs);
        for (; r < end; r++) float_tile<1>(inputs, x + r * inputs, weights + o * inputs, out + r * outputs + o, outputs);
    }
}

#ifdef __AVX512BF16__
#include <immintrin.h>

// The same in bf16, for 32 outputs, a pair of inputs at a time; meanwhile the weights of the next 32 are fetched. The pairs of 16 outputs
// lie side by side, as vdpbf16ps takes them, and `stripe` numbers further those of the next 16.
template <int M> static void tile(int64_t pairs, const int32_t* x, int64_t row, const uint16_t* weights, int64_t stripe, uint16_t* out,
                                  int64_t out_row, bool fetch) {
    __m512 sum[M][2] = {};
    for (int64_t k = 0; k < pairs; k++) {
        const uint16_t *w = weights + k * 32, *next = w + 2 * stripe;
        if (fetch) _mm_prefetch(next, _MM_HINT_T0), _mm_prefetch(next + stripe, _MM_HINT_T0);
        __m512bh first = (__m512bh)_mm512_loadu_si512(w), second = (__m512bh)_mm512_loadu_si512(w + stripe);
        #pragma GCC unroll 12
        for (int m = 0; m < M; m++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32(x[m * row + k]);
            sum[m][0] = _mm512_dpbf16_ps(sum[m][0], first, pair), sum[m][1] = _mm512_dpbf16_ps(sum[m][1], second, pair);
        }
    }
    #pragma GCC unroll 12
    for (int m = 0; m < M; m++)
        _mm512_storeu_si512(out + m * out_row, (__m512i)_mm512_cvtne2ps_pbh(sum[m][1], sum[m][0]));
}

static void tiles(int64_t rows, int64_t pairs, const int32_t* x, int64_t row, const uint16_t* weights, int64_t stripe, uint16_t* out,
                  int64_t out_row, bool fetch = false) {
    int64_t r = 0;
    for (; r + 12 <= rows; r += 12) tile<12>(pairs, x + r * row, row, weights, stripe, out + r * out_row, out_row, fetch && !r);
    for (; r + 4 <= rows; r += 4) tile<4>(pairs, x + r * row, row, weights, stripe, out + r * out_row, out_row, fetch && !r);
    for (; r < rows; r++) tile<1>(pairs, x + r * row, row, weights, stripe, out + r * out_row, out_row, fetch && !r);
}

extern "C" void packed_product(int64_t rows, int64_t outputs, int64_t inputs, uint16_t* out, const int32_t* x, const uint16_t* weights) {
    #pragma omp parallel for
    for (int64_t o = 0; o < outputs; o += 32)
        tiles(rows, inputs / 2, x, inputs / 2, weights + o * inputs, 16 * inputs, out + o, outputs, true);
}

// Tier S for many queries, BLOCK_QUERIES of a head at a time: q k^T by tiles, softmax, and weights times values by tiles. Query t lies at
// position start + t, key j at position j. `size` is the head's.
extern "C" void attention_prompt(int64_t batch, int64_t heads, int64_t groups, int64_t tokens, int64_t room, int64_t size, int64_t sliding_window,
                                 uint16_t* out, const uint16_t* query, const uint16_t* key, const uint16_t* value, const int64_t* start) {
    const int64_t BLOCK_QUERIES = 24, keys = (room + 31) / 32 * 32, blocks = (tokens + BLOCK_QUERIES - 1) / BLOCK_QUERIES;
    std::vector<uint16_t> key_pairs(batch * groups * keys * size), value_pairs(batch * groups * keys * size);
    #pragma omp parallel
    {
        #pragma omp for
        for (int64_t i = 0; i < batch * groups * room; i++)
            for (int64_t d = 0, g = i / room, j = i % room; d < size; d++) {
                key_pairs[g * keys * size + (j / 16 * size + d / 2 * 2) * 16 + j % 16 * 2 + d % 2] = key[i * size + d];
                value_pairs[g * keys * size + (d / 16 * keys + j / 2 * 2) * 16 + d % 16 * 2 + j % 2] = value[i * size + d];
            }
        std::vector<uint16_t> scores(BLOCK_QUERIES * keys);
        std::vector<float> weight(keys);
        #pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < batch * heads * blocks; i++) {
            int64_t head = i % (batch * heads), t = (blocks - 1 - i / (batch * heads)) * BLOCK_QUERIES, rows = std::min(BLOCK_QUERIES, tokens - t);
            int64_t position = start[head / heads] + t, g = head / (heads / groups) * keys * size;
            auto first = [&](int64_t p) { return sliding_window ? std::max<int64_t>(p + 1 - sliding_window, 0) : 0; };
            int64_t from = first(position) / 32 * 32, to = (position + rows + 31) / 32 * 32;
            const int32_t* q = (const int32_t*)(query + (head * tokens + t) * size);
            for (int64_t j = from; j < to; j += 32)
                tiles(rows, size / 2, q, size / 2, key_pairs.data() + g + j * size, 16 * size, scores.data() + j, keys);
            for (int64_t r = 0; r < rows; r++) {
                uint16_t* score = scores.data() + r * keys;
                int64_t low = first(position + r), high = position + r + 1;
                float largest = -1e30f, sum = 0, scale = 1 / std::sqrt(float(size));
                #pragma omp simd reduction(max:largest)
                for (int64_t j = low; j < high; j++) largest = std::max(largest, number(score[j]));
                for (int64_t j = low; j < high; j++) sum += weight[j] = exponential((number(score[j]) - largest) * scale);
                std::fill(score + from, score + low, 0), std::fill(score + high, score + to, 0);
                for (int64_t j = low; j < high; j++) store(weight[j] * (1 / sum), score + j);
            }
            for (int64_t d = 0; d < size; d += 32)
                tiles(rows, (to - from) / 2, (const int32_t*)(scores.data() + from), keys / 2, value_pairs.data() + g + d * keys + from * 16,
                      16 * keys, out + (head * tokens + t) * size + d, size);
        }
    }
}
#endif
"""


def in_cpp(x: Tensor) -> bool:
    return CPP and x.device.type == "cpu" and x.dtype in NUMBERS and not torch.is_grad_enabled()


def eager_in_cpp(x: Tensor) -> bool:
    """For short formulas: in a compiled program torch fuses them with what surrounds them."""
    return in_cpp(x) and not torch.compiler.is_compiling()


def multiplies_pairs(x: Tensor) -> bool:
    """Whether products of pairs of bf16 in C++ exist for this, and are the fastest: they are on processors with AVX-512 bf16 and without
    AMX (Zen 4, say)."""
    cpu = torch.cpu.get_capabilities()
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and bool(cpu.get("avx512_bf16")) and not cpu.get("amx_bf16")


def multiplies_eights(x: Tensor) -> bool:
    """The same for float32, eight at a time, on processors with AVX2 and without AVX-512 (Zen 3, say)."""
    cpu = torch.cpu.get_capabilities()
    return x.device.type == "cpu" and x.dtype == torch.float32 and bool(cpu.get("avx2")) and not cpu.get("avx512_f")


def scaled(query: Tensor) -> Tensor:
    return query.float() * query.shape[-1] ** -0.5


class NoCompiler(RuntimeError):
    """There is no C++ compiler, or it cannot compile SOURCE."""


@functools.cache
def library(rows: int, head_dim: int, dtype: torch.dtype) -> ctypes.CDLL:
    """SOURCE for `rows` query heads a key/value head. The sums may be taken in any order, as vectors do. Raises NoCompiler."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "attention.so")
        command = [os.environ.get("CXX", "g++"), "-O3", "-march=native", "-fopenmp", "-fassociative-math", "-fno-signed-zeros",
                   "-fno-trapping-math", f"-DR={rows}", f"-DD={head_dim}", f"-DNUMBER={NUMBERS[dtype]}", "-DBLOCK=128",
                   "-std=c++17", "-shared", "-fPIC", "-x", "c++", "-", "-o", path]
        try:
            subprocess.run(command, input=SOURCE, text=True, check=True, capture_output=True)
            return ctypes.CDLL(path)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NoCompiler(f"{command[0]} cannot compile the C++ of kernels.py; install g++, name another compiler with "
                             f"OpenMP in CXX, or give --no-compile ({getattr(error, 'stderr', error)})") from None


def attention_step(query, new_key, new_value, slot, key, value, first, end, phi_query=None, phi_key=None, left=None, tail_logit=None,
                   state=None, norm=None) -> Tensor:
    assert all(x is None or x.is_contiguous() for x in (key, value, state, norm)), "a copy would be changed in their place"
    (B, H), (G, room), features = query.shape[:2], key.shape[1:3], 0 if phi_key is None else phi_key.shape[-1]
    return call("step", (H // G, query.shape[-1], key.dtype), query.new_empty(query.shape), (B, G, room, features),
                (query, new_key, new_value, slot, key, value, first, end, phi_query, phi_key, left, tail_logit, state, norm))


def attention_chunk(query, key, value, start, sink_key, sink_value, phi_query, phi_key, tail_logit, state, norm) -> Tensor:
    (B, H, tokens), (G, keys), features = query.shape[:3], key.shape[1:3], 0 if phi_key is None else phi_key.shape[-1]
    return call("chunk", (H // G, query.shape[-1], key.dtype), query.new_empty(query.shape),
                (B, G, tokens, keys - tokens, sink_key.shape[2], features),
                (query, key, value, start, sink_key, sink_value, phi_query, phi_key, tail_logit, state, norm))


def row_product(x, weight) -> Tensor:
    return call("row_product", (1, 1, weight.dtype), x.new_empty((*x.shape[:-1], len(weight))), weight.shape, (x, weight))


@torch.inference_mode(False)            # an engine asks for it in that mode, and healing can come after
def pack(*weights: Tensor) -> None:
    """Lays frozen matrices with the same input out as products in C++ read them, where those are the fastest: [outputs / 16, inputs / P,
    16, P], with P = 2 in bf16 and 1 in float32. Kept with the first as `joined`, one below the other, and with each as `packed`, its part
    of that, where `linear` finds it; so it is made once, and what is written to a matrix later is not seen."""
    first, outputs, inputs = weights[0], sum(map(len, weights)), weights[0].shape[1]
    pair = 2 if first.dtype == torch.bfloat16 else 1
    if not CPP or not (multiplies_pairs(first) or multiplies_eights(first)) or outputs % 32 or inputs % pair or hasattr(first, "joined"):
        return
    first.joined = torch.cat([w.detach() for w in weights]).view(outputs // 16, 16, inputs // pair, pair).transpose(1, 2).contiguous()
    if not any(len(w) % 32 for w in weights):
        for weight, part in zip(weights, first.joined.split([len(w) // 16 for w in weights])):
            weight.packed = part


def packed_product(x, packed, weight=None) -> Tensor:
    """x W^T from the packed W; its gradient, by x alone, needs W as it was."""
    outputs, inputs = packed.shape[0] * 16, x.shape[-1]
    return call("packed_product" if x.dtype == torch.bfloat16 else "float_product", (1, 1, x.dtype), x.new_empty((*x.shape[:-1], outputs)),
                (x.numel() // inputs, outputs, inputs), (x, packed))


def attention_prompt(query, key, value, start, sliding_window) -> Tensor:
    (B, H, tokens, D), (G, keys) = query.shape, key.shape[1:3]
    return call("attention_prompt", (1, 1, key.dtype), query.new_empty(query.shape),
                (B, H, G, tokens, keys, D, sliding_window), (query, key, value, start.expand(B)))


def call(function: str, variant: tuple, out: Tensor, numbers: tuple, tensors: tuple[Tensor | None, ...], strided: bool = False) -> Tensor:
    """A function of SOURCE on its numbers, its output and its tensors; None becomes NULL, and what does not lie in one piece is copied,
    unless the numbers tell how it lies."""
    whole = [x if x is None or strided else x.contiguous() for x in (out, *tensors)]    # as variables: they must live until the call is over
    pointers = [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in whole]
    numbers = [ctypes.c_double(n) if isinstance(n, float) else ctypes.c_int64(n) for n in numbers]
    getattr(library(*variant), function)(*numbers, *pointers)
    return out


# As operators they can be part of a compiled program. (c!) marks what changes in place.
for run, fake, schema in (
        (attention_step, lambda query, *rest: query.new_empty(query.shape),
         "Tensor query, Tensor new_key, Tensor new_value, Tensor slot, Tensor(a!) key, Tensor(b!) value, Tensor first, Tensor end, "
         "Tensor? phi_query=None, Tensor? phi_key=None, Tensor? left=None, Tensor? tail_logit=None, Tensor(c!)? state=None, "
         "Tensor(d!)? norm=None"),
        (attention_chunk, lambda query, *rest: query.new_empty(query.shape),
         "Tensor query, Tensor key, Tensor value, Tensor start, Tensor sink_key, Tensor sink_value, Tensor? phi_query, Tensor? phi_key, "
         "Tensor? tail_logit, Tensor? state, Tensor? norm"),
        (attention_prompt, lambda query, *rest: query.new_empty(query.shape),
         "Tensor query, Tensor key, Tensor value, Tensor start, int sliding_window"),
        (row_product, lambda x, weight: x.new_empty((*x.shape[:-1], len(weight))), "Tensor x, Tensor weight"),
        (packed_product, lambda x, packed, weight=None: x.new_empty((*x.shape[:-1], packed.shape[0] * 16)),
         "Tensor x, Tensor packed, Tensor? weight=None")):
    torch.library.define(f"layerboost::{run.__name__}", f"({schema}) -> Tensor")
    torch.library.impl(f"layerboost::{run.__name__}", "CPU", run)
    torch.library.register_fake(f"layerboost::{run.__name__}", fake)
torch.library.register_autograd("layerboost::packed_product", lambda ctx, grad: (grad @ ctx.saved_tensors[0], None, None),
                                setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[2]))


# --- divergence of two models ------------------------------------------------------------------------------------

ROWS = 512      # positions whose logits over the vocabulary exist at one time


def logit_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v p_v (log p_v - log q_v), logits [rows, V] -> nats [rows] in float32."""
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def logit_kl_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and its gradient by the student's logits, q - p [rows, V] in their dtype."""
    log_q, log_p = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), (log_q.exp() - p).to(student.dtype)


def by_rows(function):
    """Fuses the many passes over [rows, V] into two or three, for slices of exactly ROWS rows; others run eagerly."""
    compiled = torch.compile(function, dynamic=False)
    return lambda *logits: (compiled if logits[0].shape[0] == ROWS else function)(*logits)


fused_kl, fused_kl_gradient = by_rows(logit_kl), by_rows(logit_kl_gradient)


class SlicedKL(torch.autograd.Function):
    """KL(teacher || student) summed over positions, from hidden states, a slice of positions at a time.

    The gradient is made in the forward pass, while the slice's logits exist, so that no float32 tensor of
    [tokens, vocabulary] is ever alive.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor):
        total = torch.zeros((), device=student.device)
        grad_student = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(student_head, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for start in range(0, student.shape[0], ROWS):
            part = slice(start, start + ROWS)
            logits = linear(student[part], student_head), linear(teacher[part], teacher_head)        # (rows, V)
            if grad_student is None and grad_head is None:
                total += fused_kl(*logits).sum()
                continue
            kl, grad_logits = fused_kl_gradient(*logits)
            total += kl.sum()
            if grad_student is not None:
                grad_student[part] = grad_logits @ student_head
            if grad_head is not None:
                grad_head += (grad_logits.T @ student[part]).float()
        ctx.save_for_backward(grad_student, grad_head)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_student, grad_head = (g if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return grad_student, None, grad_head, None


def sliced_kl(student: Tensor, teacher: Tensor, student_head: Tensor, teacher_head: Tensor) -> Tensor:
    """Mean KL(teacher || student) per token. student, teacher [N, d]: hidden states after the final norm; the heads [V, d].
    Gradients reach `student`, and `student_head` where it asks for them."""
    return SlicedKL.apply(student, teacher, student_head, teacher_head) / student.shape[0]
