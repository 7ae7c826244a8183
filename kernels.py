"""The arithmetic of LayerBoost as functions of tensors: first the defining formula, then the
implementation that is used.

Tier L, sliding-window linear attention, mixes two kinds of attention under one denominator. For the
query at position t, the first `sinks` positions and the last `window` ones (t - window < i <= t)
are *local* and get softmax weights; every older position is the *tail* and is attended linearly,
through a feature map phi:

           sum_local exp(a_i) v_i  +  exp(b) phi(q_t)^T S_t
    o_t = --------------------------------------------------
             sum_local exp(a_i)  +  exp(b) phi(q_t)^T z_t

    a_i = q_t . k_i / sqrt(D)      S_t = sum_tail phi(k_i) v_i^T      z_t = sum_tail phi(k_i)

b is a learned logit per query head. Hedgehog and LoLCATs mix the same two terms (arXiv 2402.04347,
2410.10254); the sinks are StreamingLLM's (arXiv 2309.17453). Both terms share one scale: the
maximum that is subtracted for numerical stability is subtracted from a_i and from b, so the mix
does not drift from query to query.

`naive_window_linear_attention` is that formula with [T, T] masks, the reference for all else.
`window_linear_attention` computes it in chunks: O(T (window + sinks + F)) time, O(T) memory.
`window_linear_step` computes one token of it in O(window + sinks + F), whatever the context length.

Shapes: B batch, T tokens, H query heads, G key/value heads (each serves R = H / G query heads), D
head size, F features, V vocabulary. This file depends only on torch.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS = ("softmax", "hedgehog", "elu", "relu", "favor", "none")
LARGEST = 1e12  # feature: the product of two, times a value, summed over a text, is still a float32


# --- norm, activation, rotary embedding --------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 (arXiv 1910.07467, eq.
    4)."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202, section 2)."""
    return F.silu(gate) * up


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_j, x_{j + D/2}) by the angles of their position (arXiv 2104.09864, 3.4).

    x [B, heads, T, D]; cos, sin [B or 1, 1, T, D / 2] in float32. Computed in float32, returned in
    x's dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


# --- feature maps ------------------------------------------------------------------------------


def feature_size(kind: str, head_dim: int) -> int:
    """F, the number of features that `feature_map` makes from a head of size `head_dim`."""
    halves = {"softmax": 1, "elu": 2, "relu": 2, "hedgehog": 4, "favor": 4, "none": 0}
    return halves[kind] * head_dim // 2


def feature_map(x: Tensor, kind: str, weight: Tensor) -> Tensor:
    """phi: positive features, so that phi(q) . phi(k) can stand for exp(q . k / sqrt(D)).

    x [B, heads, T, D] -> [B, heads, T, F] in float32. weight W is [heads, F, D] ([heads, D, D] of
    hedgehog), learned but for favor's.

    softmax:  softmax(W x), of F = D / 2 features
    hedgehog: softmax(W x) joined with softmax(-W x)             (arXiv 2402.04347, section 4)
    elu:      elu(W x) + 1                                       (arXiv 2006.16236, section 3.2)
    relu:     relu(W x) + 0.001, so that no denominator is zero  (arXiv 2103.13076, 2405.06640)
    favor:    exp(W y - |y|^2 / 2) / sqrt(F), y = x / D^(1/4)    (arXiv 2009.14794, eq. 5)
    """
    x = x.float()
    if kind == "favor":
        x = x * x.shape[-1] ** -0.25

    y = torch.einsum("bhtd,hfd->bhtf", x, weight)
    if kind == "hedgehog":
        return torch.cat((y.softmax(-1), (-y).softmax(-1)), dim=-1)
    if kind == "softmax":
        return y.softmax(-1)
    if kind == "elu":
        phi = F.elu(y) + 1
    elif kind == "relu":
        phi = F.relu(y) + 1e-3
    else:
        phi = torch.exp(y - x.square().sum(-1, keepdim=True) / 2) * weight.shape[1] ** -0.5
    return phi.clamp(max=LARGEST)


def favor_projection(heads: int, head_dim: int) -> Tensor:
    """W of `favor` [heads, F, D]: blocks of D orthogonal directions whose lengths are a Gaussian's
    (arXiv 2009.14794, 2.4). One seed for all heads, since query and key must share it."""
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for _ in range(2):
        gaussian = torch.randn(head_dim, head_dim, generator=generator)
        blocks.append(torch.linalg.qr(gaussian).Q)

    lengths = torch.randn(2 * head_dim, head_dim, generator=generator).norm(dim=-1, keepdim=True)
    return (torch.cat(blocks) * lengths).expand(heads, -1, -1).contiguous()


# --- tier S: softmax attention -----------------------------------------------------------------


def naive_softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, sliding_window: int | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the past. query [B, H, T, D]; key, value [B, G, T, D]."""
    ratio = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(ratio, 1)  # (B, H, T, D)
    value = value.repeat_interleave(ratio, 1)
    position = torch.arange(query.shape[2], device=query.device)

    scores = query @ key.mT * query.shape[-1] ** -0.5  # (B, H, T, T)
    seen = causal_mask(position, position, sliding_window)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """The same by torch's fused kernel, for a whole sequence or the next T tokens of one.

    query [B, H, T, D] at the positions from `start` [B] on (None: from 0); key, value
    [B, G, keys, D] at the positions from 0 on; those after the last query may hold anything.
    Returns [B, H, T, D].
    """
    tokens = query.shape[2]
    if start is None and not (sliding_window and tokens > sliding_window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    position = torch.arange(tokens, device=query.device)[None]
    if start is not None:
        position = position + start[:, None]  # (B, T)
    key_position = torch.arange(key.shape[2], device=query.device)
    seen = causal_mask(position, key_position, sliding_window)[:, None]  # (B or 1, 1, T, keys)
    return F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for a few queries: [B, H, T, D] over key, value [B, G, keys, D],
    of which `seen` [B, T, keys] are seen. The query heads of a key/value head are rows of one
    product, so each key is read once."""
    rows = group_heads(query * query.shape[-1] ** -0.5, key.shape[1])  # (B, G, R * T, D)
    scores = rows @ key.mT

    # Adding 0 or -inf is several times as fast as filling under a mask.
    bias = torch.where(seen, 0.0, -torch.inf).to(scores.dtype)
    scores = scores.unflatten(2, (-1, query.shape[2])) + bias[:, None, None]  # (B, G, R, T, keys)
    return (scores.flatten(2, 3).softmax(-1) @ value).view(query.shape)


def softmax_step(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    slot: Tensor,
    key: Tensor,
    value: Tensor,
    end: Tensor,
    sliding_window: int | None = None,
) -> Tensor:
    """A decoding step: a new key and value [B, G, 1, D] go to `slot` [B] of key and value
    [B, G, room, D], in place; then one query a sequence [B, H, 1, D] sees the slots before `end`
    [B], the last `sliding_window` of them. Returns [B, H, 1, D]."""
    write_slot(key, value, slot, new_key, new_value)
    i = torch.arange(key.shape[2], device=key.device)
    seen = i < end[:, None]  # (B, room)
    if sliding_window:
        seen &= i >= end[:, None] - sliding_window
    return attend(query, key, value, seen[:, None])


def write_slot(
    key: Tensor, value: Tensor, slot: Tensor, new_key: Tensor, new_value: Tensor
) -> None:
    sequence = torch.arange(len(slot), device=slot.device)
    key[sequence, :, slot] = new_key[:, :, 0]
    value[sequence, :, slot] = new_value[:, :, 0]


def group_heads(x: Tensor, groups: int) -> Tensor:
    """[B, H, T, D] -> [B, G, R * T, D]: the query heads of a key/value head as rows of one
    matrix."""
    return x.reshape(x.shape[0], groups, -1, x.shape[-1])


def causal_mask(
    query_position: Tensor, key_position: Tensor, sliding_window: int | None = None
) -> Tensor:
    """[..., T] and [..., keys] positions -> [..., T, keys], True where a query sees a key."""
    query_position = query_position[..., :, None]
    key_position = key_position[..., None, :]
    seen = key_position <= query_position
    if sliding_window is not None:
        seen &= key_position > query_position - sliding_window
    return seen


# --- tier L: sliding-window linear attention ---------------------------------------------------


class Past(NamedTuple):
    """State of tier L from a sequence's earlier tokens, besides the keys in the window."""

    start: Tensor  # [B] int64: how many tokens came before, the position of the next one
    sink_key: Tensor  # [B, G, sinks, D]
    sink_value: Tensor  # [B, G, sinks, D]
    state: Tensor  # [B, G, F, D] float32: S, the sum of phi(k_i) v_i^T over the tail
    norm: Tensor  # [B, G, F] float32: z, the sum of phi(k_i) over the tail


def naive_window_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor | None,
    phi_key: Tensor | None,
    tail_logit: Tensor | None,
    window: int,
    sinks: int,
) -> Tensor:
    """The formula at the head of this file, with [T, T] masks: O(T^2).

    query [B, H, T, D]; key, value [B, G, T, D]; phi_query [B, H, T, F], phi_key [B, G, T, F],
    tail_logit b [H], these three None for no tail. Returns [B, H, T, D].
    """
    ratio = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(ratio, 1)  # (B, H, T, D)
    value = value.repeat_interleave(ratio, 1).float()

    t = torch.arange(query.shape[2], device=query.device)[:, None]
    i = t.T
    local = (i <= t) & ((i < sinks) | (i > t - window))  # (T, T)
    tail = (i <= t) & ~local

    scores = (query @ key.mT * query.shape[-1] ** -0.5).float()  # a_i, (B, H, T, T)
    scores = scores.masked_fill(~local, -torch.inf)
    m = scores.amax(-1, keepdim=True)
    if phi_query is None:
        weights = torch.exp(scores - m)
    else:
        b = tail_logit.view(-1, 1, 1).where(tail.any(-1, keepdim=True), -torch.inf)  # (H, T, 1)
        m = torch.maximum(m, b)
        linear = phi_query @ phi_key.repeat_interleave(ratio, 1).mT  # phi(q_t) . phi(k_i)
        weights = torch.exp(scores - m) + torch.exp(b - m) * linear * tail
    return (weights @ value / weights.sum(-1, keepdim=True)).to(query.dtype)


def window_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_query: Tensor | None,
    phi_key: Tensor | None,
    tail_logit: Tensor | None,
    past: Past,
    window: int,
    chunk: int = 64,
) -> Tensor:
    """The same in chunks, going on from `past`: linear in T in time and memory.

    query [B, H, T, D]; key, value [B, G, before + T, D]: those of up to `window` tokens before the
    first query (arbitrary where there are none), then those of the queries; phi_query [B, H, T, F];
    phi_key [B, G, T, F]: the features of `leaving_window(key, T, window)`, zero where that is a
    sink or no token. Returns [B, H, T, D]."""
    tokens = query.shape[2]
    wide = max(chunk, window // 4)  # wider chunks, whose bands overlap less
    if not torch.compiler.is_compiling():  # one program serves any number of tokens
        chunk, wide = min(chunk, tokens), min(wide, tokens)
    if phi_query is None:
        return local_attention(query, key, value, past, window, wide)[0]

    leaving = leaving_window(value, tokens, window).float()
    numerator, denominator = tail_attention(phi_query, phi_key, leaving, past, chunk)
    if not window + past.sink_key.shape[2]:
        return (numerator / denominator).to(query.dtype)
    local, log_sum = local_attention(query, key, value, past, window, wide)
    b = tail_logit.view(-1, 1, 1).where(denominator > 0, -torch.inf)  # (B, H, T, 1)
    return join_terms(local, log_sum, numerator, denominator, b).to(query.dtype)


def leaving_window(x: Tensor, tokens: int, window: int) -> Tensor:
    """The keys or values that leave the window as each of the last `tokens` of x [B, G, before + T,
    D] arrives: [B, G, T, D], zero where none does."""
    before = x.shape[2] - tokens
    return F.pad(x, (0, 0, window - before, 0))[:, :, :tokens]


def join_terms(
    local: Tensor, log_sum: Tensor, numerator: Tensor, denominator: Tensor, b: Tensor
) -> Tensor:
    """The formula at the head of this file, from the softmax attention over the local keys alone
    [..., D], log sum_local exp(a_i) [..., 1], and the tail's terms without exp(b); b is -inf where
    there is no tail yet. Both terms on one scale, m."""
    m = torch.maximum(log_sum, b).detach()
    local_scale = torch.exp(log_sum - m)
    tail_scale = torch.exp(b - m)
    joined = local_scale * local + tail_scale * numerator
    return joined / (local_scale + tail_scale * denominator)


def local_attention(
    query: Tensor, key: Tensor, value: Tensor, past: Past, window: int, chunk: int
) -> tuple[Tensor, Tensor]:
    """The local terms: softmax attention over the local keys alone [B, H, T, D], and
    log sum_local exp(a_i) [B, H, T, 1] in float32.

    A chunk of C queries reads a band of up to window + C keys, the last of which is its own last
    token; each query sees its window of it, and those sinks that are no longer in its window.
    """
    B, G, _, D = key.shape
    tokens = query.shape[2]
    query = split_chunks(query * D**-0.5, G, chunk)  # (B, G, n, R * C, D)
    n = query.shape[2]
    before = key.shape[2] - tokens
    reach = window  # w, the most tokens that precede a chunk
    if before < window:
        reach = min(window, before + (n - 1) * chunk)

    def bands(x: Tensor, sinks: Tensor) -> Tensor:
        """What each chunk reads of them, [B * n, G, s + w + C, D]."""
        x = F.pad(x, (0, 0, reach - before, n * chunk - tokens))
        band = x.unfold(2, chunk + reach, chunk).mT
        sinks = sinks[:, :, None].expand(-1, -1, n, -1, -1)
        return torch.cat((sinks, band), dim=3).transpose(1, 2).flatten(0, 1)

    position = torch.arange(n * chunk, device=query.device).view(n, chunk)
    position = past.start[:, None, None] + position  # (B or 1, n, C)
    band = torch.arange(-reach, chunk, device=query.device) + position[..., :1]
    seen_band = causal_mask(position, band, window) & (band >= 0)[..., None, :]
    sink = torch.arange(past.sink_key.shape[2], device=query.device)
    seen_sink = sink <= position[..., None] - window
    seen = torch.cat((seen_sink, seen_band), dim=-1)  # (B or 1, n, C, s + w + C)

    bias = torch.where(seen, 0.0, -torch.inf).to(query.dtype)
    bias = bias.repeat(1, 1, query.shape[3] // chunk, 1).expand(B, -1, -1, -1)
    bias = bias.flatten(0, 1)[:, None]  # (B * n, 1, R * C, s + w + C)
    query = query.transpose(1, 2).flatten(0, 1)  # (B * n, G, R * C, D)
    attend = FusedAttention.apply if query.device.type == "cpu" else attend_with_sum
    parts = attend(query, bands(key, past.sink_key), bands(value, past.sink_value), bias)
    return tuple(join_chunks(x.unflatten(0, (B, n)).transpose(1, 2), tokens, chunk) for x in parts)


def attend_with_sum(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T + bias) v [..., queries, D], and the log of its denominators [..., queries, 1]
    in float32."""
    scores = (query @ key.mT).float() + bias
    log_sum = scores.logsumexp(-1, keepdim=True)
    return scores.softmax(-1).to(value.dtype) @ value, log_sum


class FusedAttention(torch.autograd.Function):
    """`attend_with_sum` by the kernel behind F.scaled_dot_product_attention on a CPU, which never
    holds all the scores. It has no gradient of the log-sum l. With w the weights,

        dL/da_i = w_i (do . v_i - do . o + dl)

    and `o` enters the kernel's backward pass in that product alone: so it is given an o' with
    do . o' = do . o - dl. (`join_terms` has a gradient of l only where it has one of o.)
    """

    @staticmethod
    def forward(ctx, query, key, value, bias):
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = attend(query, key, value, attn_mask=bias, scale=1.0)
        ctx.save_for_backward(query, key, value, bias, out, log_sum)
        return out, log_sum[..., None]

    @staticmethod
    def backward(ctx, grad_out, grad_log_sum):
        query, key, value, bias, out, log_sum = ctx.saved_tensors
        square = grad_out.float().square().sum(-1, keepdim=True)
        shift = grad_log_sum / square.clamp(min=torch.finfo(torch.float32).tiny)
        shifted = (out - shift * grad_out).to(out.dtype)

        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        whole = (grad_out.contiguous(), query, key, value, shifted, log_sum)
        return *backward(*whole, 0.0, False, attn_mask=bias, scale=1.0), None


def tail_attention(
    phi_query: Tensor, phi_key: Tensor, value: Tensor, past: Past, chunk: int
) -> tuple[Tensor, Tensor]:
    """The tail terms without exp(b): phi(q_t)^T S_t and phi(q_t)^T z_t, causal linear attention
    over the tokens that have left the window. A chunk reads the sums of all earlier chunks, and its
    own tokens under a causal mask.

    phi_query [B, H, T, F]; phi_key [B, G, T, F] and value [B, G, T, D] of the token that leaves at
    each t, in float32. Returns float32 [B, H, T, D] and [B, H, T, 1].
    """
    tokens, groups = phi_query.shape[2], phi_key.shape[1]
    phi_query = split_chunks(phi_query, groups, chunk)  # (B, G, n, R * C, F)
    phi_key = split_chunks(phi_key, groups, chunk)  # (B, G, n, C, F)
    value = split_chunks(value, groups, chunk)  # (B, G, n, C, D)

    # S and z before each chunk.
    added_state = (phi_key.mT @ value)[:, :, :-1]
    added_norm = phi_key.sum(3)[:, :, :-1]
    states = torch.cat((past.state[:, :, None], added_state), dim=2).cumsum(2)  # (B, G, n, F, D)
    norms = torch.cat((past.norm[:, :, None], added_norm), dim=2).cumsum(2)  # (B, G, n, F)

    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=value.device).tril()
    scores = (phi_query @ phi_key.mT).unflatten(3, (-1, chunk))  # (B, G, n, R, C, C)
    scores = scores.masked_fill(~causal, 0).flatten(3, 4)
    numerator = scores @ value + phi_query @ states  # (B, G, n, R * C, D)
    denominator = scores.sum(-1, keepdim=True) + phi_query @ norms[..., None]
    return join_chunks(numerator, tokens, chunk), join_chunks(denominator, tokens, chunk)


def split_chunks(x: Tensor, groups: int, chunk: int) -> Tensor:
    """[B, heads, T, D] -> [B, G, n, R * C, D], T padded with zeros to n * C: the query heads of a
    key/value head become rows of one product, so no key is repeated."""
    B, heads, T, D = x.shape
    n = -(-T // chunk)
    x = F.pad(x, (0, 0, 0, n * chunk - T)).view(B, groups, heads // groups, n, chunk, D)
    return x.transpose(2, 3).reshape(B, groups, n, heads // groups * chunk, D)


def join_chunks(x: Tensor, tokens: int, chunk: int) -> Tensor:
    """[B, G, n, R * C, D] -> [B, G * R, T, D]: the way back from `split_chunks`."""
    x = x.unflatten(3, (-1, chunk)).transpose(2, 3)  # (B, G, R, n, C, D)
    return x.flatten(3, 4).flatten(1, 2)[:, :, :tokens]


def window_linear_step(
    query: Tensor,
    new_key: Tensor,
    new_value: Tensor,
    slot: Tensor,
    key: Tensor,
    value: Tensor,
    end: Tensor,
    phi_query: Tensor,
    phi_key: Tensor,
    left: Tensor,
    tail_logit: Tensor,
    state: Tensor,
    norm: Tensor,
) -> Tensor:
    """A decoding step of tier L, O(window + sinks + F) at any position.

    As `softmax_step`, with local keys and values in any order, the first `end` of them seen;
    phi_query [B, H, 1, F]; phi_key [B, G, F] (zero where no token leaves) and value `left` [B, G,
    D] of the token that leaves the window; S `state` [B, G, F, D] and z `norm` [B, G, F], which
    change in place. Returns [B, H, 1, D]."""
    write_slot(key, value, slot, new_key, new_value)
    used = torch.arange(key.shape[2], device=key.device) < end[:, None]
    bias = torch.where(used, 0.0, -torch.inf)[:, None, None]  # (B, 1, 1, slots)
    rows = group_heads(query * query.shape[-1] ** -0.5, key.shape[1])  # (B, G, R, D)
    local, log_sum = attend_with_sum(rows, key, value, bias)
    local = local.nan_to_num()  # where no slot is in use, as without a window

    numerator, denominator, b = join_tail(phi_query, phi_key, left, tail_logit, state, norm)
    out = join_terms(local, log_sum, numerator, denominator, b)
    return out.view_as(query).to(query.dtype)


def join_tail(phi_query, phi_key, left, tail_logit, state, norm) -> tuple[Tensor, Tensor, Tensor]:
    """Adds the token that leaves the window to the tail. Returns phi(q)^T S [B, G, R, D],
    phi(q)^T z and b [B, G, R, 1], -inf where there is no tail yet.

    The sums are read before that token is added: then torch.compile writes them once, in place."""
    groups = norm.shape[1]
    left = left.float()[:, :, None]  # (B, G, 1, D)
    phi_query = group_heads(phi_query, groups)  # (B, G, R, F)
    added = (phi_query * phi_key[:, :, None]).sum(-1, keepdim=True)
    numerator = phi_query @ state + added * left
    denominator = (phi_query * norm[:, :, None]).sum(-1, keepdim=True) + added
    state += phi_key[..., None] * left
    norm += phi_key
    b = tail_logit.view(groups, -1, 1).where(denominator > 0, -torch.inf)
    return numerator, denominator, b
