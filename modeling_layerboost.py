"""A model converted by LayerBoost, for Hugging Face transformers:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`save_model` copies this file, and kernels.py beside it, into the folder of a converted model. It
takes transformers' own model of the base family (transformers 5.4 or later), and puts into its
layers what the plan in config.json names: S layers keep transformers' attention (eager, sdpa,
flash), L layers get `WindowLinearAttention`, X layers a linear map or nothing.

A batch may be padded on either side. Positions, the window, the sinks and the tail of an L layer
count only the tokens that `attention_mask` marks as real.

Each layer has a cache of its own kind: S keeps keys and values as transformers does, L the sinks,
the window and two sums, X nothing. Beam search works on them. Assisted generation does not, since
a token cannot be taken out of a sum.

Shapes: B batch, T tokens, H query heads, G key/value heads, D head size, F features.
"""

import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import CacheLayerMixin

from .kernels import Past, apply_rotary, feature_map, feature_size, window_linear_attention

# --- caches ------------------------------------------------------------------------------------


class LayerCache(CacheLayerMixin):
    """The tensors that an L layer keeps, by name, or an X layer, which only counts tokens."""

    is_sliding = None  # neither kind of softmax attention: masks are made for the S layers' caches

    def __init__(self):
        super().__init__()
        self.tokens = 0  # so far, padding included
        self.tensors: dict[str, Tensor] = {}

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1  # no limit

    get_max_cache_shape = get_max_length  # its older name

    def lazy_initialization(self, *states):
        raise ValueError("LayerBoost: an L or X layer fills its cache itself")

    update = lazy_initialization

    def change(self, function) -> None:
        self.tensors = {name: function(x) for name, x in self.tensors.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.change(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        self.tokens = 0
        self.tensors = {}

    def crop(self, tokens: int) -> None:
        if tokens:
            raise ValueError("LayerBoost: an L layer cannot take tokens out of its sums")


# --- tiers -------------------------------------------------------------------------------------


class WindowLinearAttention(nn.Module):
    """Tier L: softmax over a window and the first tokens, linear attention over the rest. Takes
    over the projections of the attention that the model came with."""

    def __init__(self, attention: nn.Module, config, layer: int):
        super().__init__()
        for name, module in attention.named_children():
            setattr(self, name, module)
        self.layer, self.head_dim = layer, attention.head_dim
        self.settings = config.layerboost

        self.kind = self.settings["feature_map"]
        if self.kind != "none":
            H, G, D = config.num_attention_heads, config.num_key_value_heads, self.head_dim
            rows = D if self.kind == "hedgehog" else feature_size(self.kind, D)
            self.query_map = nn.Parameter(torch.zeros(H, rows, D, dtype=torch.float32))
            self.key_map = nn.Parameter(torch.zeros(G, rows, D, dtype=torch.float32))
            self.tail_logit = nn.Parameter(torch.zeros(H, dtype=torch.float32))

    def _apply(self, function, recurse=True):
        """`.to(dtype)`, `.bfloat16()` and the like leave the tail's own parameters float32."""
        exact = {name: x.data for name, x in self.named_parameters(recurse=False)}
        super()._apply(function, recurse)
        for name, x in self.named_parameters(recurse=False):
            if x.dtype != torch.float32:
                x.data = exact[name].to(x.device)
        return self

    def forward(
        self,
        hidden_states,
        position_embeddings,
        cache=None,
        past_key_values=None,
        real=None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """real [B, T]: False where a token is padding; None where none is. The cache is called
        past_key_values before transformers 5.24."""
        query, key, value = self.project(hidden_states, position_embeddings)
        if real is not None:  # padding goes behind the tokens, where none of them sees it
            order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
            query, key, value = (x.gather(2, across_heads(order, x)) for x in (query, key, value))

        cache = past_key_values if cache is None else cache
        cache = LayerCache() if cache is None else cache.layers[self.layer]
        with torch.autocast(query.device.type, enabled=False):
            out = self.attend(query, key, value, cache, real)

        if real is not None:
            out = out.gather(2, across_heads(order.argsort(dim=1), out))
        return self.o_proj(out.transpose(1, 2).flatten(2).to(hidden_states.dtype)), None

    def project(self, x: Tensor, rotary) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, hidden_size] -> rotated query [B, H, T, D] and key [B, G, T, D], value [B, G, T,
        D]."""
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        key = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)

        # transformers repeats each angle, once for each half of a head.
        cos, sin = (x[:, None, :, : self.head_dim // 2] for x in rotary)  # (B, 1, T, D / 2)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return apply_rotary(query, cos, sin), apply_rotary(key, cos, sin), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, real) -> Tensor:
        """The T tokens after those in the cache, which is filled; of each sequence, padding comes
        last. Returns [B, H, T, D]."""
        window, sinks, tokens = self.settings["window"], self.settings["sinks"], query.shape[2]
        before = self.stored(cache, key)
        start = before["start"]
        new = torch.full_like(start, tokens) if real is None else real.sum(1)  # (B)

        # The window before the first query, then the new tokens; sinks among those.
        keys = torch.cat((before["key"], key), dim=2)  # (B, G, w + T, D)
        values = torch.cat((before["value"], value), dim=2)
        offset = torch.arange(sinks, device=key.device) - start[:, None]  # (B, s)
        is_new = ((offset >= 0) & (offset < new[:, None]))[:, None, :, None]
        offset = across_heads(offset.clamp(0, tokens - 1), key)
        sink_key = torch.where(is_new, key.gather(2, offset), before["sink_key"])
        sink_value = torch.where(is_new, value.gather(2, offset), before["sink_value"])

        past = Past(start, sink_key, sink_value, before["state"], before["norm"])
        step = torch.arange(tokens, device=key.device)
        position = start[:, None] + step  # (B, T)
        phi_query, phi_key, tail_logit = self.features(query, keys[:, :, :tokens], position)
        out = window_linear_attention(
            query, keys, values, phi_query, phi_key, tail_logit, past, window
        )

        # What the next tokens need: the sums over what has left the window, and the new window.
        state, norm = past.state, past.norm
        if phi_key is not None:
            phi_key = phi_key * (step < new[:, None])[:, None, :, None]
            state = state + phi_key.mT @ values[:, :, :tokens].float()
            norm = norm + phi_key.sum(2)
        last = across_heads(new[:, None] + torch.arange(window, device=key.device), key)
        cache.tokens += tokens
        cache.tensors = {
            "start": start + new,
            "key": keys.gather(2, last),
            "value": values.gather(2, last),
            "sink_key": sink_key,
            "sink_value": sink_value,
            "state": state,
            "norm": norm,
        }
        return out

    def features(self, query: Tensor, leaving: Tensor, position: Tensor):
        """phi of the queries at `position` [B, T], and of the keys that leave the window as each
        arrives (zero where that is a sink or no token), and the tail's logit."""
        if self.kind == "none":
            return None, None, None

        phi_query = feature_map(query, self.kind, self.query_map)
        healed = self.settings["healed_context"]
        if healed is not None:  # beyond it the sums go on growing, and the tail fades
            fade = (healed / (position + 1).clamp(min=healed)).square()
            phi_query = phi_query * fade[:, None, :, None]

        joins = position - self.settings["window"] >= self.settings["sinks"]
        phi_key = feature_map(leaving, self.kind, self.key_map) * joins[:, None, :, None]
        return phi_query, phi_key, self.tail_logit

    def stored(self, cache: LayerCache, key: Tensor) -> dict[str, Tensor]:
        """The cache's tensors; for an empty cache, zeros."""
        if cache.tensors:
            cache.change(lambda x: x.to(key.device))
            return cache.tensors
        B, G, _, D = key.shape
        features = feature_size(self.kind, D)
        window = key.new_zeros(B, G, self.settings["window"], D)
        sinks = key.new_zeros(B, G, self.settings["sinks"], D)
        return {
            "start": torch.zeros(B, dtype=torch.int64, device=key.device),
            "key": window,
            "value": window,
            "sink_key": sinks,
            "sink_value": sinks,
            "state": torch.zeros(B, G, features, D, device=key.device),
            "norm": torch.zeros(B, G, features, device=key.device),
        }


def across_heads(index: Tensor, x: Tensor) -> Tensor:
    """index [B, n] of tokens -> [B, heads, n, D], for gather on x [B, heads, T, D]."""
    return index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


class Removed(nn.Module):
    """Tier X: a linear map W x + c in place of attention, or nothing."""

    def __init__(self, config, layer: int):
        super().__init__()
        self.layer, self.map = layer, None
        if config.layerboost["removed"] == "linear":
            self.map = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states, cache=None, past_key_values=None, **kwargs
    ) -> tuple[Tensor, None]:
        cache = past_key_values if cache is None else cache
        if cache is not None:
            cache.layers[self.layer].tokens += hidden_states.shape[1]
        if self.map is None:
            return torch.zeros_like(hidden_states), None
        return self.map(hidden_states), None


# --- models ------------------------------------------------------------------------------------


class LayerBoost:
    """Before a family's model among the bases of a class: puts the plan's tiers into its layers."""

    _is_stateful = True  # so that `generate` refuses to take tokens back (assisted generation)
    _keep_in_fp32_modules_strict = {"query_map", "key_map", "tail_logit"}

    def __init__(self, config):
        super().__init__(config)
        for i, (tier, layer) in enumerate(zip(config.layerboost["plan"], self.model.layers)):
            if tier == "L":
                layer.self_attn = WindowLinearAttention(layer.self_attn, config, i)
            if tier == "X":
                layer.self_attn = Removed(config, i)
                if layer.self_attn.map is None:
                    layer.input_layernorm = nn.Identity()
        self.post_init()
        self.model.register_forward_pre_hook(prepare, with_kwargs=True)


def prepare(model: nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
    """Before the layers run: passes them what transformers does not."""
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if mask is not None:
        if mask.ndim != 2:
            raise ValueError("LayerBoost: attention_mask must be [batch, tokens]")
        tokens = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
        real = mask[:, -tokens:].bool()
        inputs["real"] = None if real.all() else real
        if inputs.get("position_ids") is None:
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens:]

    use_cache = inputs.get("use_cache")
    if model.config.use_cache if use_cache is None else use_cache:
        name = "cache" if "cache" in inputs else "past_key_values"
        inputs[name] = own_layers(inputs.get(name), model.config)
    return args, inputs


def own_layers(cache: DynamicCache | None, config) -> DynamicCache:
    """A cache whose L and X layers have caches of their kind."""
    own = DynamicCache(config=config)
    cache = own if cache is None else cache
    if not isinstance(cache, DynamicCache):
        raise ValueError(f"LayerBoost: not with a {type(cache).__name__}; leave the cache out")
    cache.layers += own.layers[len(cache.layers) :]
    for i, tier in enumerate(config.layerboost["plan"]):
        if tier != "S" and not isinstance(cache.layers[i], LayerCache):
            cache.layers[i] = LayerCache()
    return cache


class LayerBoostLlamaConfig(LlamaConfig):
    model_type = "layerboost"


class LayerBoostMistralConfig(MistralConfig):
    model_type = "layerboost"


class LayerBoostQwen2Config(Qwen2Config):
    model_type = "layerboost"


class LayerBoostQwen3Config(Qwen3Config):
    model_type = "layerboost"


class LayerBoostLlama(LayerBoost, LlamaForCausalLM):
    config_class = LayerBoostLlamaConfig


class LayerBoostMistral(LayerBoost, MistralForCausalLM):
    config_class = LayerBoostMistralConfig


class LayerBoostQwen2(LayerBoost, Qwen2ForCausalLM):
    config_class = LayerBoostQwen2Config


class LayerBoostQwen3(LayerBoost, Qwen3ForCausalLM):
    config_class = LayerBoostQwen3Config
