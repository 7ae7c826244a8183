"""The tiers of a plan as modules with one interface.

S is `SoftmaxAttention`, the attention that a pretrained model comes with. L is `WindowLinearAttention`: the same
projections, and a feature map and one logit per head more. X has no module at all: the block skips its attention.

    y = attention(x, rotary)                        a whole sequence at once, for training and evaluation
    y = attention(x, rotary, cache, positions, lengths)   the next T tokens of every sequence of a batch: a prefill in any
                                                    split for T > 1, a decoding step for T = 1

x and y are [B, T, hidden_size]; rotary is the pair (cos, sin) of `apply_rotary` for these positions. A cache belongs
to one layer and is filled in place; positions [B] counts the tokens that each sequence has in it, and lengths [B] how
many of the T new ones are real where a batch was padded on the right. The formulas are in kernels.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import (Past, apply_rotary, causal_mask, favor_projection, feature_map, feature_size, softmax_attention,
                     window_linear_attention, window_linear_step)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class SoftmaxCache:
    """Keys and values of every token so far: 2 * G * D numbers a token."""

    def __init__(self, config, batch: int, max_tokens: int, dtype: torch.dtype, device):
        shape = (batch, config.num_key_value_heads, max_tokens, config.head_dim)
        self.key, self.value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))


class SoftmaxAttention(nn.Module):
    """Tier S: causal softmax attention with grouped key/value heads (arXiv 2305.13245)."""

    def __init__(self, config, layer: int):
        super().__init__()
        H, G, D, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.config, self.sliding_window = config, config.sliding_windows[layer]
        self.q_proj = nn.Linear(size, H * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, G * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, G * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * D, size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)

    def forward(self, x, rotary, cache=None, positions=None, lengths=None) -> Tensor:
        query, key, value = self.project(x, rotary)
        if cache is None:
            out = self.attend(query, key, value)
        else:
            out = self.advance(query, key, value, cache, positions, lengths)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, rotary) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, hidden_size] -> rotated query [B, H, T, D] and key [B, G, T, D], and value [B, G, T, D]."""
        query, key, value = (projection(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
                             for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return apply_rotary(query, *rotary), apply_rotary(key, *rotary), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, T, D] for a whole sequence."""
        mask = None
        if self.sliding_window and query.shape[2] > self.sliding_window:
            position = torch.arange(query.shape[2], device=query.device)
            mask = causal_mask(position, position, self.sliding_window)[None, None]
        return softmax_attention(query, key, value, mask)

    def new_cache(self, batch: int, max_tokens: int, dtype: torch.dtype, device) -> SoftmaxCache:
        return SoftmaxCache(self.config, batch, max_tokens, dtype, device)

    def advance(self, query, key, value, cache: SoftmaxCache, positions: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, H, T, D] for the T tokens after `positions`. Keys of padding are written too: they lie beyond their
        sequence's end, where no query sees them and the next token overwrites them."""
        position = positions[:, None] + torch.arange(query.shape[2], device=query.device)       # (B, T)
        sequence = torch.arange(query.shape[0], device=query.device)[:, None, None]
        head = torch.arange(key.shape[1], device=query.device)[:, None]
        cache.key[sequence, head, position[:, None]] = key
        cache.value[sequence, head, position[:, None]] = value
        stored = torch.arange(cache.key.shape[2], device=query.device)
        mask = causal_mask(position, stored, self.sliding_window)[:, None]                      # (B, 1, T, max_tokens)
        return softmax_attention(query, cache.key, cache.value, mask)


class WindowLinearCache:
    """`window` and `sinks` keys and values, and the sums S and z over all other tokens: one size for any length.

    The token at position p lies in slot p % window of the ring. S and z are float32: they are summed over thousands of
    tokens, each small against the sum.
    """

    def __init__(self, config, batch: int, dtype: torch.dtype, device):
        G, D, features = config.num_key_value_heads, config.head_dim, feature_size(config.feature_map, config.head_dim)
        pair = lambda tokens: [torch.zeros(batch, G, tokens, D, dtype=dtype, device=device) for _ in range(2)]
        self.ring_key, self.ring_value = pair(config.window)
        self.sink_key, self.sink_value = pair(config.sinks)
        self.state = torch.zeros(batch, G, features, D, device=device)
        self.norm = torch.zeros(batch, G, features, device=device)


class WindowLinearAttention(SoftmaxAttention):
    """Tier L: softmax over a window and the first tokens, linear attention over the rest (kernels.py has the formula)."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if config.feature_map != "none":
            rows = feature_size("favor", D) if config.feature_map == "favor" else D
            self.query_map = nn.Parameter(torch.empty(H, rows, D, dtype=torch.float32))
            self.key_map = nn.Parameter(torch.empty(G, rows, D, dtype=torch.float32))
            self.tail_logit = nn.Parameter(torch.empty(H, dtype=torch.float32))

    def initial_tail(self) -> dict[str, Tensor]:
        """The tail's parameters before any training: W the identity, and b = 0 for features that are normalised, so that
        the tail starts faint against the window; -8 for elu and relu, whose features grow with q and k."""
        H, G, D = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        if self.config.feature_map == "none":
            return {}
        start = -8.0 if self.config.feature_map in ("elu", "relu") else 0.0
        make = favor_projection if self.config.feature_map == "favor" else lambda heads, D: torch.eye(D).repeat(heads, 1, 1)
        return {"query_map": make(H, D), "key_map": make(G, D), "tail_logit": torch.full((H,), start)}

    def tail_parameters(self) -> list[nn.Parameter]:
        """What attention transfer trains: b, and W where it is learned (Performer's is fixed)."""
        kind = self.config.feature_map
        return {"none": [], "favor": ["tail_logit"]}.get(kind, ["query_map", "key_map", "tail_logit"])

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        B, G, tokens, D = key.shape
        zero = torch.zeros((), device=key.device)
        past = Past(torch.zeros(1, dtype=torch.int64, device=key.device), key[:, :, :self.config.sinks],
                    value[:, :, :self.config.sinks], zero.expand(B, G, self.features, D), zero.expand(B, G, self.features))
        return self.continue_from(past, query, *(F.pad(x, (0, 0, self.config.window, 0)) for x in (key, value)))[0]

    @property
    def features(self) -> int:
        return feature_size(self.config.feature_map, self.config.head_dim)

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
        phi_query = feature_map(query, self.config.feature_map, self.query_map)
        return window_linear_attention(query, key, value, phi_query, phi_key, self.tail_logit, past, window), phi_key

    def new_cache(self, batch: int, max_tokens: int, dtype: torch.dtype, device) -> WindowLinearCache:
        return WindowLinearCache(self.config, batch, dtype, device)

    def advance(self, query, key, value, cache: WindowLinearCache, positions: Tensor, lengths: Tensor | None) -> Tensor:
        past = Past(positions, cache.sink_key, cache.sink_value, cache.state, cache.norm)
        self.store_sinks(key, value, cache, positions)
        if query.shape[2] == 1 and lengths is None:
            self.push(key, value, cache, positions)
            if self.features == 0:
                return window_linear_step(query, None, None, cache.ring_key, cache.ring_value, past)
            phi_query = feature_map(query, self.config.feature_map, self.query_map)
            return window_linear_step(query, phi_query, self.tail_logit, cache.ring_key, cache.ring_value, past)
        return self.prefill(past, query, key, value, cache, lengths)

    def store_sinks(self, key: Tensor, value: Tensor, cache: WindowLinearCache, positions: Tensor) -> None:
        """Copies those of the new tokens that are among the first `sinks` of their sequence."""
        offset = torch.arange(self.config.sinks, device=key.device) - positions[:, None]                # (B, s)
        new = ((offset >= 0) & (offset < key.shape[2]))[:, None, :, None]
        index = offset.clamp(0, key.shape[2] - 1)[:, None, :, None].expand_as(cache.sink_key)
        for sink, x in ((cache.sink_key, key), (cache.sink_value, value)):
            sink.copy_(torch.where(new, x.gather(2, index), sink))

    def push(self, key: Tensor, value: Tensor, cache: WindowLinearCache, positions: Tensor) -> None:
        """Puts one token into the ring and the one that it displaces into S and z; without a window, into those at once."""
        old_key, old_value = key, value
        if self.config.window:
            slot = (positions % self.config.window)[:, None, None, None].expand_as(key)
            old_key, old_value = cache.ring_key.gather(2, slot), cache.ring_value.gather(2, slot)       # (B, G, 1, D)
            cache.ring_key.scatter_(2, slot, key)
            cache.ring_value.scatter_(2, slot, value)
        if self.features:
            in_tail = (positions - self.config.window >= self.config.sinks)[:, None, None, None]
            phi_key = feature_map(old_key, self.config.feature_map, self.key_map) * in_tail
            cache.state.add_(phi_key.transpose(-1, -2) * old_value.float())
            cache.norm.add_(phi_key[:, :, 0])

    def prefill(self, past: Past, query, key, value, cache: WindowLinearCache, lengths: Tensor | None) -> Tensor:
        """Many tokens: the parallel form from the cache's state, then the cache as it is after each sequence's last one."""
        window, tokens = self.config.window, query.shape[2]
        lengths = torch.full_like(past.start, tokens) if lengths is None else lengths
        recent = past.start[:, None] + torch.arange(window, device=key.device)                          # (B, w)
        if window:                                                                                      # oldest first
            slots = (recent % window)[:, None, :, None].expand_as(cache.ring_key)
            key = torch.cat((cache.ring_key.gather(2, slots), key), dim=2)
            value = torch.cat((cache.ring_value.gather(2, slots), value), dim=2)
        out, phi_key = self.continue_from(past, query, key, value)
        if self.features:
            real = (torch.arange(tokens, device=key.device) < lengths[:, None])[:, None, :, None]
            phi_key = phi_key * real
            cache.state.add_(phi_key.transpose(-1, -2) @ value[:, :, :tokens].float())
            cache.norm.add_(phi_key.sum(2))
        if window:
            last = (lengths[:, None] + torch.arange(window, device=key.device))[:, None, :, None].expand_as(cache.ring_key)
            slots = ((recent + lengths[:, None]) % window)[:, None, :, None].expand_as(cache.ring_key)
            cache.ring_key.scatter_(2, slots, key.gather(2, last))
            cache.ring_value.scatter_(2, slots, value.gather(2, last))
        return out
