"""The functions of kernels.py that run faster on a GPU: tier S, and the window of a step of tier L,
through flash attention.

Each twin has the signature of its original. `runs(x)` says whether it can be used: on a GPU
from Ampere on, in half precision, without gradients. Nothing is built for it; the rest of tier L
needs none, since torch.compile fuses it, where `compiler_works`.
"""

import functools
import sys

import torch
from torch import Tensor

from kernels import group_heads, join_tail, join_terms, write_slot


def runs(x: Tensor) -> bool:
    """Whether the twins accept x, a key."""
    D = x.shape[-1]
    fits = x.dtype in (torch.bfloat16, torch.float16) and D % 8 == 0 and D <= 256
    if not (x.is_cuda and fits) or torch.is_grad_enabled():
        return False
    return torch.cuda.get_device_properties(x.device).major >= 8


@functools.cache
def compiler_works(device: torch.device) -> bool:
    """Whether torch.compile makes kernels for a GPU, by a trial. Where it does not, says why,
    once."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        return True
    except Exception as error:  # torch has no one kind for it
        cause = getattr(error, "inner_exception", error)
        reason = str(cause).strip().partition("\n")[0][:200]
        print(
            f"torch.compile does not work here, torch runs eagerly instead, slower ({reason}); "
            "install Triton and a C compiler, or give --no-compile",
            file=sys.stderr,
        )
        return False


def softmax_attention(query, key, value, start=None, sliding_window: int | None = None) -> Tensor:
    tokens = query.shape[2]
    end = (
        torch.full((len(query),), tokens, device=query.device) if start is None else start + tokens
    )
    return flash_attention(query, key, value, end, sliding_window or 0)[0].transpose(1, 2)


def softmax_step(
    query, new_key, new_value, slot, key, value, end, sliding_window: int | None = None
) -> Tensor:
    write_slot(key, value, slot, new_key, new_value)
    if sliding_window:
        return flash_attention(query, key, value, end, sliding_window)[0].transpose(1, 2)
    return step_attention(query, key, value, end)[0]


def window_linear_step(query, new_key, new_value, slot, key, value, end, *tail) -> Tensor:
    """The local term from flash attention: its output, and its log-sum-exp as the largest score."""
    write_slot(key, value, slot, new_key, new_value)
    local, log_sum = step_attention(query, key, value, end)
    local = group_heads(local, key.shape[1]).float()  # (B, G, R, D)
    is_empty = (end == 0)[:, None, None, None]  # as without a window
    log_sum = log_sum.masked_fill(is_empty, -torch.inf)

    numerator, denominator, b = join_tail(*tail)
    out = join_terms(local, log_sum, numerator, denominator, b)
    return out.view_as(query).to(query.dtype)


def step_attention(query: Tensor, key: Tensor, value: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v for one query a sequence [B, H, 1, D] over the slots before `end`
    [B] of key and value [B, G, room, D]; and log sum_i exp(a_i) [B, G, R, 1] in float32.

    Each key/value head is a sequence of its own, with R query heads: so the kernel neither copies
    the cache nor transposes query and output.
    """
    B, H, _, D = query.shape
    G, room = key.shape[1:3]
    i = torch.arange(B * G + 1, dtype=torch.int32, device=key.device)
    sequences = i.new_empty(3, B * G + 1)  # one tensor, so that torch.compile makes one kernel
    sequences[0] = i
    sequences[1] = i * room
    sequences[2, :-1].view(B, G).copy_(end[:, None])
    out, log_sum = flash_step(query.view(B * G, H // G, D), key, value, sequences)
    return out.view_as(query), log_sum.T.reshape(B, G, H // G, 1)


@torch.library.custom_op("layerboost::flash_step", mutates_args=())
def flash_step(
    query: Tensor, key: Tensor, value: Tensor, sequences: Tensor
) -> tuple[Tensor, Tensor]:
    """`flash_attention` for a decoding step of N sequences of one key/value head: query [N, R, D];
    key, value of N * room tokens. `sequences` [3, N + 1] int32: the first query of each, its first
    key, and how many keys are in use. Returns [N, R, D], and log sum_i exp(a_i) [R, N]."""
    D = query.shape[-1]
    first_query, first_key, used = sequences
    out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key.view(-1, 1, D),
        value.view(-1, 1, D),
        first_query,
        first_key,
        1,  # query a sequence
        key.shape[2],
        0.0,  # dropout
        False,  # causal
        False,
        seqused_k=used[:-1],
    )
    return out, log_sum


@flash_step.register_fake
def _(query, key, value, sequences):
    N, R, _ = query.shape
    return torch.empty_like(query), query.new_empty(R, N, dtype=torch.float32)


@torch.library.custom_op("layerboost::flash_attention", mutates_args=())
def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, end: Tensor, sliding_window: int
) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 (arXiv 2307.08691) as bundled with torch, on a cache without copying it.

    query [B, H, T, D]: the last T tokens of each sequence; key, value [B, G, room, D], of which the
    slots before `end` [B] are in use: no others are read. 0 for no sliding window. Returns
    [B, T, H, D], and log sum_i exp(a_i) [H, B * T] in float32. Unlike
    `F.scaled_dot_product_attention` it takes a length for each sequence and the causal rule from
    there on; cuDNN's form of that needs 70 ms to plan for each new length.
    """
    B, H, T, D = query.shape
    G, room = key.shape[1:3]
    if key.stride() != value.stride():
        key, value = key.contiguous(), value.contiguous()

    # All tokens in one row [tokens, G, D], as the kernel wants them: a view in any layout.
    token_stride = key.stride(2)
    apart = key.stride(0) // token_stride  # from one sequence to the next, in tokens
    size = (apart * (B - 1) + room, G, D)
    strides = (token_stride, key.stride(1), 1)
    first = torch.arange(B + 1, dtype=torch.int32, device=query.device)
    out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        query.transpose(1, 2).contiguous().view(B * T, H, D),
        key.as_strided(size, strides),
        value.as_strided(size, strides),
        first * T,
        first * apart,
        T,
        room,
        0.0,  # dropout
        T > 1,  # causal
        False,
        window_size_left=sliding_window - 1 if sliding_window else None,
        window_size_right=0 if sliding_window else None,
        seqused_k=end.to(torch.int32),
    )
    return out.view(B, T, H, D), log_sum


@flash_attention.register_fake
def _(query, key, value, end, sliding_window):
    B, H, T, D = query.shape
    return query.new_empty(B, T, H, D), query.new_empty(H, B * T, dtype=torch.float32)
