"""The tiers of a plan as modules with one interface.

S is `SoftmaxAttention`, the attention that a pretrained model comes with. L is `WindowLinearAttention`: the same
projections, and a feature map and one logit per head more. X has no module at all: the block skips its attention.

    y = attention(x, rotary)                        a whole sequence at once, for training and evaluation
    y = attention(x, rotary, cache, positions)      the next T tokens of every sequence of a batch: a prefill in any split
                                                    for T > 1, a decoding step for T = 1

x and y are [B, T, hidden_size]; rotary is the pair (cos, sin) of `apply_rotary` for these positions. A cache belongs
to one layer and is filled in place; positions [B] counts the tokens that each sequence has in it. The formulas are in
kernels.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import (Past, apply_rotary, favor_projection, feature_map, feature_size, in_cpp, linear, rms_norm,
                     softmax_attention, softmax_step, window_linear_attention, window_linear_step)


class Linear(nn.Linear):
    """W x + b."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linears(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """What each of these gives for x: one product where their weights were packed together."""
    joined = getattr(getattr(layers[0], "weight", None), "joined", None)
    if joined is None or joined.dtype != x.dtype or not in_cpp(x):
        return [layer(x) for layer in layers]
    parts = torch.ops.layerboost.packed_product(x, joined).split([layer.out_features for layer in layers], dim=-1)
    return [part if layer.bias is None else part + layer.bias for part, layer in zip(parts, layers)]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SoftmaxCache:
    """Keys and values of every token so far: 2 * G * D numbers a token."""

    def __init__(self, config, batch: int, max_tokens: int, dtype: torch.dtype, device):
        shape = (batch, config.num_key_value_heads, 0, config.head_dim)
        self.key, self.value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.resize(max_tokens)

    def resize(self, max_tokens: int) -> None:
        """Room for this many tokens and no more: a step reads all of it, and products of matrices want it in one piece."""
        more = max_tokens - self.key.shape[2]
        if more:
            self.key, self.value = (F.pad(x, (0, 0, 0, more)).contiguous() for x in (self.key, self.value))


class SoftmaxAttention(nn.Module):
    """Tier S: causal softmax attention with grouped key/value heads (arXiv 2305.13245)."""

    def __init__(self, config, layer: int):
        super().__init__()
        H, G, D, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.config, self.sliding_window = config, config.sliding_windows[layer]
        self.q_proj = Linear(size, H * D, bias=config.qkv_bias)
        self.k_proj = Linear(size, G * D, bias=config.qkv_bias)
        self.v_proj = Linear(size, G * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)

    def forward(self, x, rotary, cache=None, positions=None) -> Tensor:
        query, key, value = self.project(x, rotary)
        out = self.attend(query, key, value) if cache is None else self.advance(query, key, value, cache, positions)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, rotary) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, hidden_size] -> rotated query [B, H, T, D] and key [B, G, T, D], and value [B, G, T, D]."""
        query, key, value = (y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
                             for y in linears(x, self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return apply_rotary(query, *rotary), apply_rotary(key, *rotary), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, T, D] for a whole sequence."""
        return softmax_attention(query, key, value, None, self.sliding_window)

    def new_cache(self, batch: int, max_tokens: int, dtype: torch.dtype, device) -> SoftmaxCache:
        return SoftmaxCache(self.config, batch, max_tokens, dtype, device)

    def advance(self, query, key, value, cache: SoftmaxCache, positions: Tensor) -> Tensor:
        """[B, H, T, D] for the T tokens after `positions`."""
        if 1 < query.shape[2] == cache.key.shape[2]:            # they take all of the room: nothing came before them
            cache.key.copy_(key), cache.value.copy_(value)
            return self.attend(query, key, value)
        if query.shape[2] == 1:
            first = (positions + 1 - (self.sliding_window or cache.key.shape[2])).clamp(min=0)
            return softmax_step(query, key, value, positions, cache.key, cache.value, first, positions + 1)
        position = positions[:, None] + torch.arange(query.shape[2], device=query.device)       # (B, T)
        sequence = torch.arange(query.shape[0], device=query.device)[:, None, None]
        head = torch.arange(key.shape[1], device=query.device)[:, None]
        cache.key[sequence, head, position[:, None]] = key
        cache.value[sequence, head, position[:, None]] = value
        return softmax_attention(query, cache.key, cache.value, positions, self.sliding_window)


class WindowLinearCache:
    """`sinks + window` keys and values, and the sums S and z over all other tokens: one size for any length.

    A sink lies in the slot of its position; the other tokens go round in the slots after those (one that is never read
    where there is no window). S and z are float32: they are summed over thousands of tokens, each small against the sum.
    """

    def __init__(self, config, batch: int, dtype: torch.dtype, device):
        G, D, features = config.num_key_value_heads, config.head_dim, feature_size(config.feature_map, config.head_dim)
        self.window, self.sinks = config.window, config.sinks
        shape = (batch, G, config.sinks + max(config.window, 1), D)
        self.key, self.value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.state = torch.zeros(batch, G, features, D, device=device)
        self.norm = torch.zeros(batch, G, features, device=device)

    def slot(self, position: Tensor) -> Tensor:
        """Where the token at a position lies."""
        is_sink = (position >= 0) & (position < self.sinks)
        return torch.where(is_sink, position, self.sinks + (position - self.sinks) % max(self.window, 1))


class WindowLinearAttention(SoftmaxAttention):
    """Tier L: softmax over a window and the first tokens, linear attention over the rest (kernels.py has the formula)."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        self.features = feature_size(config.feature_map, config.head_dim)
        for name, x in self.initial_tail().items():
            setattr(self, name, nn.Parameter(x))

    def initial_tail(self) -> dict[str, Tensor]:
        """The tail's parameters before any training: W the identity, and b = 0 for features that are normalised, so that
        the tail starts faint against the window; -8 for elu and relu, whose features grow with q and k."""
        H, G, D = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        if self.config.feature_map == "none":
            return {}
        start = -8.0 if self.config.feature_map in ("elu", "relu") else 0.0
        make = favor_projection if self.config.feature_map == "favor" else lambda heads, D: torch.eye(D).repeat(heads, 1, 1)
        return {"query_map": make(H, D), "key_map": make(G, D), "tail_logit": torch.full((H,), start)}

    def tail_parameters(self) -> list[str]:
        """What attention transfer trains: W where it is learned (Performer's is fixed), and b, which cancels out where nothing
        is local."""
        c = self.config
        maps = ["query_map", "key_map"] if c.feature_map not in ("none", "favor") else []
        return maps + (["tail_logit"] if c.feature_map != "none" and c.window + c.sinks else [])

    def query_features(self, query: Tensor, position: Tensor) -> Tensor:
        """phi(q_t) [B, H, T, F] for position [B or 1, T], times (n / (t + 1))^2 beyond the n tokens that the tails were healed on: S and z
        go on growing there, and nothing taught the tail what they should weigh then (results/healing.md)."""
        phi_query, n = feature_map(query, self.config.feature_map, self.query_map), self.config.healed_context
        return phi_query if n is None else phi_query * (n / (position + 1).clamp(min=n)).square()[:, None, :, None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        B, G, tokens, D = key.shape
        zero = torch.zeros((), device=key.device)
        past = Past(torch.zeros(1, dtype=torch.int64, device=key.device), key[:, :, :self.config.sinks],
                    value[:, :, :self.config.sinks], zero.expand(B, G, self.features, D), zero.expand(B, G, self.features))
        return self.continue_from(past, query, *(F.pad(x, (0, 0, self.config.window, 0)) for x in (key, value)))[0]

    def continue_from(self, past: Past, query: Tensor, key: Tensor, value: Tensor):
        """Attention over `past`, the window before the first query and the queries' own tokens (key, value
        [B, G, window + T, D]). Returns it [B, H, T, D], and the features [B, G, T, F] of the token that leaves the window
        as each query arrives."""
        window, sinks = self.config.window, self.config.sinks
        if self.config.feature_map == "none":
            return window_linear_attention(query, key, value, None, None, None, past, window), None
        leaving = past.start[:, None] + torch.arange(query.shape[2], device=query.device) - window      # (B, T)
        phi_key = feature_map(key[:, :, :query.shape[2]], self.config.feature_map, self.key_map)
        phi_key = phi_key * (leaving >= sinks)[:, None, :, None]
        phi_query = self.query_features(query, leaving + window)
        return window_linear_attention(query, key, value, phi_query, phi_key, self.tail_logit, past, window), phi_key

    def new_cache(self, batch: int, max_tokens: int, dtype: torch.dtype, device) -> WindowLinearCache:
        return WindowLinearCache(self.config, batch, dtype, device)

    def advance(self, query, key, value, cache: WindowLinearCache, positions: Tensor) -> Tensor:
        if query.shape[2] > 1:
            return self.prefill(query, key, value, cache, positions)
        slot, end = cache.slot(positions), (positions + 1).clamp(max=cache.sinks + cache.window)        # slots before `end` are filled
        local = query, key, value, slot, cache.key, cache.value
        if not self.features:
            return softmax_step(*local, torch.zeros_like(end), end)
        left_key, left_value = key[:, :, 0], value[:, :, 0]             # without a window a token goes into the tail at once
        if cache.window:
            sequence = torch.arange(len(slot), device=slot.device)
            left_key, left_value = cache.key[sequence, :, slot], cache.value[sequence, :, slot]         # (B, G, D)
        phi_query = self.query_features(query, positions[:, None])
        phi_key = feature_map(left_key[:, :, None], self.config.feature_map, self.key_map)[:, :, 0]     # (B, G, F)
        phi_key = phi_key * (positions - cache.window >= cache.sinks)[:, None, None]
        return window_linear_step(*local, end, phi_query, phi_key, left_value, self.tail_logit, cache.state, cache.norm)

    def prefill(self, query, key, value, cache: WindowLinearCache, positions: Tensor) -> Tensor:
        """Many tokens: the parallel form from the cache's state, then the cache as it is after the last one."""
        window, sinks, tokens = cache.window, cache.sinks, query.shape[2]
        across = lambda index, x: index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        first, around = torch.arange(sinks, device=key.device), torch.arange(window, device=key.device)
        offset = first - positions[:, None]                                                             # (B, s)
        new = ((offset >= 0) & (offset < tokens))[:, None, :, None]
        for kept, x in ((cache.key, key), (cache.value, value)):
            kept[:, :, :sinks] = torch.where(new, x.gather(2, across(offset.clamp(0, tokens - 1), x)), kept[:, :, :sinks])
        before = cache.slot(positions[:, None] - window + around)                                       # (B, w), oldest first
        key, value = (torch.cat((kept.gather(2, across(before, kept)), x), dim=2)
                      for kept, x in ((cache.key, key), (cache.value, value)))                          # (B, G, w + T, D)
        past = Past(positions, cache.key[:, :, :sinks], cache.value[:, :, :sinks], cache.state, cache.norm)
        out, phi_key = self.continue_from(past, query, key, value)
        if self.features:
            cache.state.add_(phi_key.transpose(-1, -2) @ value[:, :, :tokens].float())
            cache.norm.add_(phi_key.sum(2))
        after = cache.slot(positions[:, None] + tokens - window + around)                               # (B, w)
        for kept, x in ((cache.key, key), (cache.value, value)):
            kept.scatter_(2, across(after, kept), x[:, :, tokens:])
        return out
