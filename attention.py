"""The tiers of a plan as modules with one interface.

S is `SoftmaxAttention`, the attention that a pretrained model comes with. L is
`WindowLinearAttention`: the same projections, plus a feature map and one logit per head. X is
`LinearMap`, which replaces attention that was removed, or None: then the block skips attention.

    y = attention(x, rotary)                     a whole sequence, for training and evaluation
    y = attention(x, rotary, cache, positions)   the next T tokens of every sequence: a prefill in
                                                 any split for T > 1, a decoding step for T = 1

x and y are [B, T, hidden_size]; rotary is the pair (cos, sin) of `apply_rotary` for these
positions. A cache belongs to one layer, has tensors [B, G, ...] and is filled in place; positions
[B] counts the tokens that each sequence has in it. When prompts of different lengths are prefilled
together, `new` [B] is the length of each, and the rest of its row is padding. The formulas are in
kernels.py; cpu.py and gpu.py have faster twins of some.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cpu
import gpu
import kernels
from kernels import (
    Past,
    apply_rotary,
    favor_projection,
    feature_map,
    feature_size,
    leaving_window,
    rms_norm,
)


def twin(name: str, x: Tensor):
    """A function of kernels.py, or its faster namesake in cpu.py or gpu.py if that accepts x."""
    for module in (cpu, gpu):
        if hasattr(module, name) and module.runs(x):
            return getattr(module, name)
    return getattr(kernels, name)


def compiles(device: torch.device) -> bool:
    """Whether torch.compile works on a device; if not, a warning has been printed."""
    return gpu.compiler_works(device) if device.type == "cuda" else cpu.compiler_works()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b: [..., inputs] -> [..., outputs]."""
    if x.shape[:-1].numel() > 1 or not cpu.runs(weight):
        return F.linear(x, weight, bias)
    y = cpu.row_product(x, weight)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Joined(NamedTuple):
    """Linear layers with the same input as one, whose outputs are these sizes."""

    weight: Tensor
    bias: Tensor | None
    sizes: list[int]


def join(*layers: nn.Module) -> Joined | None:
    """Layers with the same input as one product. Their parameters become views of the joined ones,
    so there is no second copy. None where a layer is not plain, as with adapters."""
    if any(type(layer) is not Linear for layer in layers):
        return None
    biases = [layer.bias for layer in layers if layer.bias is not None]
    weight = side_by_side([layer.weight for layer in layers])
    bias = side_by_side(biases) if biases else None
    return Joined(weight, bias, [layer.out_features for layer in layers])


def side_by_side(parts: list[Tensor]) -> Tensor:
    """Parameters [n_i, ...] as one tensor, of which they become views, unless they are views of one
    already: another model may share them."""
    storages = {part.untyped_storage().data_ptr() for part in parts}
    starts = [part.storage_offset() - parts[0].storage_offset() for part in parts]
    if len(storages) == 1 and starts == [0, *accumulate(x.numel() for x in parts[:-1])]:
        size = (sum(map(len, parts)), *parts[0].shape[1:])
        return parts[0].data.as_strided(size, parts[0].stride())

    with torch.inference_mode(parts[0].is_inference()):  # whichever the parameters were made in
        together = torch.cat([part.data for part in parts])
        for part, view in zip(parts, together.split([len(part) for part in parts]), strict=True):
            part.data = view
    if together.is_cuda:
        torch.cuda.empty_cache()  # else the freed parts stay reserved, each too small for the next
    return together


def products(x: Tensor, joined: Joined | None, *layers: nn.Module):
    """layer(x) of each, by one product where they are joined."""
    if joined is None:
        return [layer(x) for layer in layers]
    return linear(x, joined.weight, joined.bias).split(joined.sizes, dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


# --- tier S ------------------------------------------------------------------------------------


class SoftmaxCache:
    """Keys and values of every token so far: 2 * G * D numbers a token."""

    def __init__(self, config, batch: int, max_tokens: int, dtype: torch.dtype, device):
        shape = (batch, config.num_key_value_heads, max_tokens, config.head_dim)
        self.key = torch.zeros(shape, dtype=dtype, device=device)
        self.value = torch.zeros(shape, dtype=dtype, device=device)

    def resize(self, max_tokens: int) -> None:
        """Makes room for exactly this many tokens, contiguous."""
        more = max_tokens - self.key.shape[2]
        if more:
            self.key = F.pad(self.key, (0, 0, 0, more)).contiguous()
            self.value = F.pad(self.value, (0, 0, 0, more)).contiguous()


class SoftmaxAttention(nn.Module):
    """Tier S: causal softmax attention with grouped key/value heads (arXiv 2305.13245)."""

    def __init__(self, config, layer: int):
        super().__init__()
        self.config = config
        self.sliding_window = config.sliding_windows[layer]

        H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        size = config.hidden_size
        self.q_proj = Linear(size, H * D, bias=config.qkv_bias)
        self.k_proj = Linear(size, G * D, bias=config.qkv_bias)
        self.v_proj = Linear(size, G * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.rms_norm_eps)
            self.k_norm = RMSNorm(D, config.rms_norm_eps)
        self.joined: Joined | None = None  # query, key and value

    def forward(self, x: Tensor, rotary, cache=None, positions=None, new=None) -> Tensor:
        query, key, value = self.project(x, rotary)
        if cache is None:
            out = self.attend(query, key, value)
        elif x.shape[1] == 1:
            out = self.step(query, key, value, cache, positions)
        else:
            out = self.prefill(query, key, value, cache, positions, new)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, rotary) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, hidden_size] -> rotated query [B, H, T, D] and key [B, G, T, D], value [B, G, T,
        D]."""
        D = self.config.head_dim
        heads = products(x, self.joined, self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (y.unflatten(-1, (-1, D)).transpose(1, 2) for y in heads)
        if self.config.qk_norm:
            query = self.q_norm(query)
            key = self.k_norm(key)
        return apply_rotary(query, *rotary), apply_rotary(key, *rotary), value

    def join(self) -> None:
        self.joined = join(self.q_proj, self.k_proj, self.v_proj)

    # Each of these three gives [B, H, T, D].

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A whole sequence."""
        attend = twin("softmax_attention", key)
        return attend(query, key, value, None, self.sliding_window)

    def step(self, query, key, value, cache: SoftmaxCache, positions: Tensor) -> Tensor:
        """One token of every sequence."""
        local = (query, key, value, positions, cache.key, cache.value, positions + 1)
        return twin("softmax_step", key)(*local, self.sliding_window)

    def prefill(self, query, key, value, cache: SoftmaxCache, positions: Tensor, new) -> Tensor:
        """The T tokens after `positions`. The keys of padding are stored, and overwritten before a
        query sees them."""
        tokens = query.shape[2]
        if tokens == cache.key.shape[2]:  # they take all of the room: nothing came before them
            cache.key.copy_(key)
            cache.value.copy_(value)
            return self.attend(query, key, value)

        slot = positions[:, None] + torch.arange(tokens, device=query.device)  # (B, T)
        put(cache.key, slot, key)
        put(cache.value, slot, value)
        attend = twin("softmax_attention", key)
        return attend(query, cache.key, cache.value, positions, self.sliding_window)

    def initial_parameters(self) -> dict[str, Tensor]:
        """Initial values of the parameters that a pretrained checkpoint lacks."""
        return {}

    def tail_parameters(self) -> list[str]:
        """Names of the trainable ones among them."""
        return []

    def new_cache(self, batch: int, max_tokens: int, dtype: torch.dtype, device) -> SoftmaxCache:
        return SoftmaxCache(self.config, batch, max_tokens, dtype, device)


# --- tier L ------------------------------------------------------------------------------------

FAINT = -8.0  # initial b: an untrained tail is all but silent


class WindowLinearCache:
    """`sinks + window` keys and values, and the sums S and z over all other tokens: the same size
    at any length.

    A sink sits in the slot of its position; the other tokens share a ring of slots after those (of
    one slot, never read, if there is no window). S and z are float32: they add up thousands of
    tokens, each small against the sum."""

    def __init__(self, config, batch: int, dtype: torch.dtype, device):
        G, D = config.num_key_value_heads, config.head_dim
        features = feature_size(config.feature_map, D)
        self.window = config.window
        self.sinks = config.sinks

        shape = (batch, G, config.sinks + max(config.window, 1), D)
        self.key = torch.zeros(shape, dtype=dtype, device=device)
        self.value = torch.zeros(shape, dtype=dtype, device=device)
        self.state = torch.zeros(batch, G, features, D, device=device)
        self.norm = torch.zeros(batch, G, features, device=device)

    def slot(self, position: Tensor) -> Tensor:
        """The slot that holds the token at `position`."""
        is_sink = (position >= 0) & (position < self.sinks)
        ring = self.sinks + (position - self.sinks) % max(self.window, 1)
        return torch.where(is_sink, position, ring)


class WindowLinearAttention(SoftmaxAttention):
    """Tier L: softmax over a window and the first tokens, linear attention over the rest."""

    def __init__(self, config, layer: int):
        super().__init__(config, layer)
        for name, value in self.initial_parameters().items():
            setattr(self, name, nn.Parameter(value))

    @property
    def has_tail(self) -> bool:
        return self.config.feature_map != "none"

    def initial_parameters(self) -> dict[str, Tensor]:
        """W is the identity (for half as many features, the sums of the pairs that rotary embedding
        turns), and b so low that an untrained tail does no harm. Its gradient is small, but the
        size of Adam's steps does not depend on that of the gradient."""
        c = self.config
        H, G, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        if not self.has_tail:
            return {}

        if c.feature_map == "favor":
            maps = favor_projection(H, D), favor_projection(G, D)
        else:
            W = torch.eye(D, device="cpu")  # on "meta" it would import torch's compiler: 2 s
            if c.feature_map == "softmax":
                W = (W[: D // 2] + W[D // 2 :]) * 0.5**0.5
            maps = W.repeat(H, 1, 1), W.repeat(G, 1, 1)
        return {"query_map": maps[0], "key_map": maps[1], "tail_logit": torch.full((H,), FAINT)}

    def tail_parameters(self) -> list[str]:
        """W unless it is fixed, as Performer's is, and b unless there is no local term, so that it
        cancels."""
        c = self.config
        names = []
        if c.feature_map not in ("none", "favor"):
            names += ["query_map", "key_map"]
        if c.feature_map != "none" and c.window + c.sinks:
            names += ["tail_logit"]
        return names

    def query_features(self, query: Tensor, position: Tensor) -> Tensor:
        """phi(q_t) [B, H, T, F] for position t [B or 1, T].

        Past the n tokens seen in healing, scaled by (n / (t + 1))^2: S and z keep growing, and the
        tail was never trained to weigh sums that large (results/healing.md)."""
        phi_query = feature_map(query, self.config.feature_map, self.query_map)
        n = self.config.healed_context
        if n is None:
            return phi_query
        fade = (n / (position + 1).clamp(min=n)).square()
        return phi_query * fade[:, None, :, None]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        B, G, _, D = key.shape
        sinks = self.config.sinks
        features = feature_size(self.config.feature_map, D)
        past = Past(
            start=torch.zeros(1, dtype=torch.int64, device=key.device),
            sink_key=key[:, :, :sinks],
            sink_value=value[:, :, :sinks],
            state=torch.zeros(B, G, features, D, device=key.device),
            norm=torch.zeros(B, G, features, device=key.device),
        )
        return self.continue_from(past, query, key, value)[0]

    def continue_from(
        self, past: Past, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over `past`, up to `window` tokens before the first query and the queries' own
        (key, value [B, G, before + T, D]). Returns its output [B, H, T, D], and phi [B, G, T, F] of
        the token that leaves the window as each query arrives; None if none does."""
        tokens, window = query.shape[2], self.config.window
        if key.shape[2] == tokens <= window:  # nothing comes before, nothing leaves
            return twin("softmax_attention", key)(query, key, value), None

        run = kernels.window_linear_attention
        if not self.has_tail or key.shape[2] <= window:  # nothing leaves the window
            return run(query, key, value, None, None, None, past, window), None

        position = past.start[:, None] + torch.arange(tokens, device=query.device)  # (B, T)
        joins = position - window >= self.config.sinks
        leaving = leaving_window(key, tokens, window)
        phi_key = feature_map(leaving, self.config.feature_map, self.key_map)
        phi_key = phi_key * joins[:, None, :, None]
        phi_query = self.query_features(query, position)
        out = run(query, key, value, phi_query, phi_key, self.tail_logit, past, window)
        return out, phi_key

    def step(self, query, key, value, cache: WindowLinearCache, positions: Tensor) -> Tensor:
        slot = cache.slot(positions)
        end = (positions + 1).clamp(max=cache.sinks + cache.window)  # slots before it are filled
        local = (query, key, value, slot, cache.key, cache.value)
        if not self.has_tail:
            return twin("softmax_step", key)(*local, end)

        # The token that leaves the window is in the slot that the new one takes; without a window
        # it is the new token itself.
        left_key = key[:, :, 0]
        left_value = value[:, :, 0]
        if cache.window:
            sequence = torch.arange(len(slot), device=slot.device)
            left_key = cache.key[sequence, :, slot]  # (B, G, D)
            left_value = cache.value[sequence, :, slot]
        joins = positions - cache.window >= cache.sinks

        phi_query = self.query_features(query, positions[:, None])
        phi_key = feature_map(left_key[:, :, None], self.config.feature_map, self.key_map)[:, :, 0]
        phi_key = phi_key * joins[:, None, None]  # (B, G, F)
        tail = (phi_query, phi_key, left_value, self.tail_logit, cache.state, cache.norm)
        return twin("window_linear_step", key)(*local, end, *tail)

    def prefill(self, query, key, value, cache: WindowLinearCache, positions, new) -> Tensor:
        """Runs the parallel form from the cache's state, then updates the cache to the last real
        token."""
        window, sinks, tokens = cache.window, cache.sinks, query.shape[2]

        # Tokens before the first query. To read how many there are would wait for a GPU, and break
        # a compiled program in two.
        before = window
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            before = min(window, int(positions.max()))
        if before == 0 and tokens <= window:  # every token's slot is its position
            cache.key[:, :, :tokens] = key
            cache.value[:, :, :tokens] = value
            return self.attend(query, key, value)

        # Those, oldest first, then the new tokens.
        position = positions[:, None] - before + torch.arange(before, device=key.device)
        slot = cache.slot(position)  # (B, before)
        keys = torch.cat((take(cache.key, slot), key), dim=2)  # (B, G, before + T, D)
        values = torch.cat((take(cache.value, slot), value), dim=2)

        # Sinks among the new tokens.
        offset = torch.arange(sinks, device=key.device) - positions[:, None]  # (B, s)
        end = tokens if new is None else new[:, None]  # of each sequence's tokens, before padding
        is_new = ((offset >= 0) & (offset < end))[:, None, :, None]
        offset = offset.clamp(0, tokens - 1)
        sink_key = cache.key[:, :, :sinks]
        sink_value = cache.value[:, :, :sinks]
        sink_key.copy_(torch.where(is_new, take(key, offset), sink_key))
        sink_value.copy_(torch.where(is_new, take(value, offset), sink_value))

        # The first `window` queries of a sequence see all tokens before them: softmax attention.
        alone = 0 if before else window
        past = Past(positions + alone, sink_key, sink_value, cache.state, cache.norm)
        out, phi_key = self.continue_from(past, query[:, :, alone:], keys, values)
        if alone:
            first = self.attend(query[:, :, :alone], key[:, :, :alone], value[:, :, :alone])
            out = torch.cat((first, out), dim=2)
        if phi_key is not None:
            n = phi_key.shape[2]
            if new is not None:
                real = torch.arange(tokens - n, tokens, device=key.device) < end
                phi_key = phi_key * real[:, None, :, None]
            cache.state += phi_key.mT @ leaving_window(values, n, window).float()
            cache.norm += phi_key.sum(2)

        # The last tokens to their slots: a window of them in a compiled program, which serves any
        # number of tokens, or as many as are new.
        count = window if torch.compiler.is_compiling() else min(window, tokens)
        last = end + torch.arange(-count, 0, device=key.device)
        slot = cache.slot(positions[:, None] + last)
        last = (before + last).clamp(min=0).expand(len(key), -1)
        put(cache.key, slot, take(keys, last))
        put(cache.value, slot, take(values, last))
        return out

    def new_cache(self, batch: int, max_tokens: int, dtype: torch.dtype, device):
        return WindowLinearCache(self.config, batch, dtype, device)


def take(x: Tensor, index: Tensor) -> Tensor:
    """The tokens `index` [B, n] of x [B, G, T, D]: [B, G, n, D]."""
    sequence = torch.arange(len(x), device=x.device)[:, None]
    return x[sequence, :, index].transpose(1, 2)


def put(x: Tensor, index: Tensor, new: Tensor) -> None:
    """Writes `new` [B, G, n, D] to the tokens `index` [B, n] of x [B, G, T, D]."""
    sequence = torch.arange(len(x), device=x.device)[:, None]
    x[sequence, :, index] = new.transpose(1, 2)


# --- tier X ------------------------------------------------------------------------------------


class LinearMap(nn.Module):
    """Tier X: attention is removed, and W x + c of each token takes its place. fit.py finds W and c
    (Neural Block Linearization, arXiv 2505.21077)."""

    def __init__(self, config, layer: int):
        super().__init__()
        self.map = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotary, cache=None, positions=None, new=None) -> Tensor:
        return self.map(x)

    def tail_parameters(self) -> list[str]:
        return []

    def initial_parameters(self) -> dict[str, Tensor]:
        """Zero, so no contribution, until it is fitted."""
        size = self.map.in_features
        return {"map.weight": torch.zeros(size, size), "map.bias": torch.zeros(size)}

    def new_cache(self, batch: int, max_tokens: int, dtype: torch.dtype, device) -> None:
        return None


TIERS = {"S": SoftmaxAttention, "L": WindowLinearAttention, "X": LinearMap}


def tier_of(config, layer: int) -> type[nn.Module] | None:
    """The module of a layer; None if attention is removed without a replacement."""
    letter = config.plan[layer]
    return None if letter == "X" and config.removed == "nothing" else TIERS[letter]
