"""A Llama-style decoder from scratch, its conversion to a plan, and generation.

    x = embed(ids)
    for each layer:   x = x + attention(norm(x))     of the tier in the plan
                      x = x + mlp(norm(x))
    logits = head(norm(x))

A model is a folder in the Hub's layout or a Hub id. Families: Llama 2 and 3, SmolLM 1 and 2,
Mistral, Qwen2 and 2.5, Qwen3.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import Joined, Linear, RMSNorm, SoftmaxCache, join, linear, products, tier_of
from config import Config, check_settings, default_window, parse_plan, read_config
from hub import InputError, find_model
from kernels import swiglu
from machine import require_memory
from tokenizer import load_tokenizer as load_tokenizer  # so that one import serves all three
from weights import FLOAT32, read_weights
from weights import save_model as save_model

# --- decoder -----------------------------------------------------------------------------------


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, config: Config):
        super().__init__()
        size, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(size, inner, bias=bias)
        self.up_proj = Linear(size, inner, bias=bias)
        self.down_proj = Linear(inner, size, bias=bias)
        self.joined: Joined | None = None  # gate and up

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*products(x, self.joined, self.gate_proj, self.up_proj)))

    def join(self) -> None:
        self.joined = join(self.gate_proj, self.up_proj)


class Block(nn.Module):
    """One layer; `self_attn` is None if attention was removed without a replacement."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        tier = tier_of(config, layer)
        self.input_layernorm = tier and RMSNorm(size, eps)
        self.self_attn = tier and tier(config, layer)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary, cache=None, positions=None, new=None) -> Tensor:
        if self.self_attn is not None:
            x = x + self.self_attn(self.input_layernorm(x), rotary, cache, positions, new)
        return x + self.mlp(self.post_attention_layernorm(x))


@functools.cache
def compiled_forward():
    """Block.forward compiled for the layers of all models: one program for each tier and shape;
    fixed shapes run faster."""
    return torch.compile(Block.forward, dynamic=False)


def compiled_block(*arguments) -> Tensor:
    # Teacher and student, two lengths, three tiers: more programs than the usual limit of 8.
    with torch._dynamo.config.patch(recompile_limit=64):
        return compiled_forward()(*arguments)


@dataclass
class Cache:
    """One entry per layer (None for X), and how many tokens each sequence has so far, [B]."""

    layers: list
    positions: Tensor

    def resize(self, max_tokens: int) -> None:
        """Room for this many tokens a sequence in the softmax layers; the others need none."""
        for layer in self.layers:
            if isinstance(layer, SoftmaxCache):
                layer.resize(max_tokens)

    @property
    def room(self) -> float:
        """Tokens a sequence that the softmax layers have room for."""
        rooms = [layer.key.shape[2] for layer in self.layers if isinstance(layer, SoftmaxCache)]
        return min(rooms, default=math.inf)

    @property
    def bytes(self) -> int:
        tensors = [x for layer in self.layers for x in cache_tensors(layer).values()]
        return sum(x.numel() * x.element_size() for x in tensors)


def cache_tensors(layer) -> dict[str, Tensor]:
    """What a layer's cache holds, by name; nothing for a layer without attention."""
    if layer is None:
        return {}
    return {name: x for name, x in vars(layer).items() if isinstance(x, Tensor)}


class Model(nn.Module):
    """The decoder.

    compiled_shapes: the [B, T] for which a block runs through torch.compile; all else runs the same
        code eagerly. Shared with the models that `convert` makes of this one.
    recompute: a block keeps only its input for the backward pass and runs again there (activation
        checkpointing, arXiv 1604.06174).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.compiled_shapes: set[tuple[int, int]] = set()
        self.recompute = False

        size = config.hidden_size
        # nn.Embedding(...) would initialise it and, on "meta", import torch's compiler: 2 s.
        embedding = torch.empty(config.vocab_size, size)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(size, config.vocab_size, bias=False)
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)

    def _apply(self, function, recurse=True):
        """`.to(dtype)`, `.bfloat16()` and the like leave what is FLOAT32 as it is: a frequency
        rounded to bf16 is off by up to a radian after 512 tokens."""
        exact = {name: x.data for name, x in self.named_tensors() if FLOAT32.search(name)}
        super()._apply(function, recurse)
        for name, x in self.named_tensors():
            if name in exact and x.dtype != torch.float32:
                x.data = exact[name].to(x.device)
        return self

    def named_tensors(self):
        yield from self.named_parameters()
        yield from self.named_buffers()

    @property
    def plan(self) -> str:
        return self.config.plan

    @property
    def head(self) -> Tensor:
        """[V, hidden_size]: logits = hidden @ head.T"""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """ids [B, T] int64 -> logits [B, T, V]. With a cache the T tokens continue what it holds,
        and it is filled in place. Raises ValueError if it has no room for them."""
        return self.logits(self.hidden(ids, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] after the final norm -> [..., V]"""
        return linear(hidden, self.head)

    def hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """`forward` up to the head: [B, T, hidden_size] after the final norm."""
        tokens = ids.shape[1]
        if cache is not None and int(cache.positions.max()) + tokens > cache.room:
            raise ValueError(
                f"the cache has room for {cache.room} tokens, too few for {tokens} more; "
                "call cache.resize"
            )

        x = self.run_layers(self.embed_tokens(ids), 0, len(self.layers), cache)
        if cache is not None:
            cache.positions += tokens
        return self.norm(x)

    def run_layers(
        self,
        x: Tensor,
        first: int,
        last: int,
        cache: Cache | None = None,
        new: Tensor | None = None,
        block=None,
    ) -> Tensor:
        """Layers first..last-1 on a residual stream x [B, T, hidden_size]. Of the T tokens of each
        sequence the first `new` [B] are real, the rest padding; all where it is None. `block` runs
        a layer in place of Block.forward."""
        block = block or Block.forward
        if cache is None and tuple(x.shape[:2]) in self.compiled_shapes:
            block = compiled_block
        if self.recompute and torch.is_grad_enabled():
            block = functools.partial(checkpoint, block, use_reentrant=False)

        positions = None if cache is None else cache.positions
        rotary = self.rotary(x.shape[1], positions)
        for i in range(first, last):
            layer_cache = None if cache is None else cache.layers[i]
            x = block(self.layers[i], x, rotary, layer_cache, positions, new)
        return x

    def rotary(self, tokens: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, 1, T, D / 2] of the T positions that follow `positions` [B] (None:
        from 0)."""
        position = torch.arange(tokens, device=self.device)[None]
        if positions is not None:
            position = positions[:, None] + position
        angle = position[:, None, :, None] * self.frequencies
        scale = rotary_scale(self.config.rope)
        return angle.cos() * scale, angle.sin() * scale

    def new_cache(self, batch: int, max_tokens: int, device=None) -> Cache:
        """An empty cache for `batch` sequences of up to `max_tokens` tokens each; device "meta"
        makes one that takes no memory."""
        dtype, device = self.norm.weight.dtype, device or self.device
        layers = []
        for layer in self.layers:
            attention = layer.self_attn
            layers.append(attention and attention.new_cache(batch, max_tokens, dtype, device))
        return Cache(layers, torch.zeros(batch, dtype=torch.int64, device=device))

    def generate(self, ids, max_new_tokens: int = 100, **sampling) -> Tensor:
        """ids [B, T] or [T], as tensor or list -> [B, T + max_new_tokens]; B is 1 for [T]. A row
        is filled with its end-of-text token after it. `sampling` and errors as in `stream`."""
        ids = token_rows(ids, self.device)
        tokens = list(self.stream(ids, max_new_tokens, **sampling))
        tokens += tokens[-1:] * (max_new_tokens - len(tokens))
        return torch.cat((ids, *(token[:, None] for token in tokens)), dim=1)

    @torch.inference_mode()
    def stream(
        self,
        ids,
        max_new_tokens: int = 100,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        cache: Cache | None = None,
    ):
        """Yields the next token of every row, [B] int64, up to `max_new_tokens` times.

        temperature 0 is greedy; otherwise tokens are drawn from the `top_k` likeliest, or the
        smallest set that holds `top_p` of the probability (arXiv 1904.09751). `cache` holds the
        tokens before `ids`, and afterwards all but the last one. Raises TypeError for anything but
        ids, such as text that was not encoded, and ValueError for a prompt without tokens."""
        ids = token_rows(ids, self.device)
        if ids.shape[1] < 1:
            raise ValueError("generate: the prompt has no tokens; give it one at least")

        generator = None
        if seed is not None:
            generator = torch.Generator(ids.device).manual_seed(seed % 2**63)
        eos = torch.tensor(self.config.eos_token_ids, dtype=torch.int64, device=ids.device)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        cache = cache or self.new_cache(len(ids), 0)
        cache.resize(int(cache.positions.max()) + ids.shape[1] + max_new_tokens)
        token = None
        for _ in range(max_new_tokens):
            hidden = self.hidden(ids if token is None else token[:, None], cache)[:, -1]
            drawn = sample(self.logits(hidden), temperature, top_k, top_p, generator)
            token = drawn if token is None else torch.where(ended, token, drawn)
            ended |= torch.isin(token, eos)
            yield token
            if ended.all():
                return


def token_rows(ids, device: torch.device) -> Tensor:
    """A list of ids, lists of one length, or a tensor [T] or [B, T] -> [B, T] int64. Raises
    TypeError for anything else."""
    try:
        ids = torch.as_tensor(ids)
        is_ids = ids.ndim in (1, 2) and not (ids.numel() and ids.is_floating_point())
    except (TypeError, ValueError, RuntimeError):  # text, or lists of several lengths
        is_ids = False
    if not is_ids:
        raise TypeError(
            "generate: takes token ids: a list, lists of one length, or a tensor [T] or [B, T]; "
            "encode text with the tokenizer first: model.generate(tokenizer.encode(text))"
        )
    ids = ids.to(device, torch.int64)
    return ids if ids.ndim == 2 else ids[None]


def sample(logits: Tensor, temperature: float, top_k=None, top_p=None, generator=None) -> Tensor:
    """logits [B, V] -> ids [B]. Raises ValueError for limits that are negative or not a number."""
    for name, x in {"temperature": temperature, "top_k": top_k, "top_p": top_p}.items():
        if x is not None and not x >= 0:
            raise ValueError(f"generate: {name} {x}: give 0 or more")
    if temperature < 1e-6:  # the likeliest would have all the probability, or overflow
        return logits.argmax(-1)

    logits = logits.float() / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(-1, descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p
        beyond[:, 0] = False
        ordered = ordered.masked_fill(beyond, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def rotary_frequencies(config: Config) -> Tensor:
    """theta^(-2j / D) for each pair j, [D / 2]. `linear` divides all by the factor; `llama3` and
    `yarn` only the low ones, which make few turns in the original context, with a ramp between:
    along the number of turns (Llama 3.1's rule), or along j (arXiv 2309.00071, section 3.2)."""
    rope, D = config.rope, config.head_dim
    j = torch.arange(0, D, 2, dtype=torch.float32, device="cpu")
    frequency = rope["rope_theta"] ** (-j / D)
    if rope["rope_type"] == "default":
        return frequency
    if rope["rope_type"] == "linear":
        return frequency / rope["factor"]

    original = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        first, last = (
            D * math.log(original / (2 * math.pi * turns)) / (2 * math.log(rope["rope_theta"]))
            for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
        )
        if rope.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, D - 1)
        last += 0.001 * (first == last)
        keep = 1 - ((j / 2 - first) / (last - first)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / rope["factor"]


def rotary_scale(rope: dict) -> float:
    """The factor that YaRN multiplies cos and sin by, to keep softmax as sharp among more tokens
    (arXiv 2309.00071, equation 22); mscale and mscale_all_dim as in transformers."""
    if rope["rope_type"] != "yarn":
        return 1.0
    if "attention_factor" in rope:
        return rope["attention_factor"]
    growth = 0.1 * math.log(max(rope["factor"], 1.0))
    scale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if scale and all_dim:
        return (scale * growth + 1) / (all_dim * growth + 1)
    return growth + 1


def cache_bytes(model: Model, tokens: int) -> int:
    """Bytes that the cache of one sequence of this many tokens takes."""
    return model.new_cache(1, tokens, "meta").bytes


def weight_bytes(model: Model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


# --- conversion --------------------------------------------------------------------------------


def convert(
    model: Model,
    plan: str,
    window: int | None = None,
    sinks: int = 4,
    feature_map: str = "softmax",
    removed: str = "nothing",
) -> Model:
    """A model with another plan that shares the weights of `model`: no tensor is copied. L layers
    that `model` does not have, or has with other settings, start with an untrained tail, X layers
    with a map that is zero (`fit.fit_maps` finds a better one). Raises InputError for a layer that
    has no attention left."""
    window = default_window(model.config) if window is None else window
    settings = {"window": window, "sinks": sinks, "feature_map": feature_map, "removed": removed}
    config = replace(model.config, plan=plan, **settings)
    check_settings(config)
    with torch.device("meta"):
        new = Model(config)

    same_settings = all(getattr(model.config, name) == value for name, value in settings.items())
    weights = dict(model.named_parameters())
    for i, (old_tier, tier) in enumerate(zip(model.plan, plan)):
        if old_tier == "X" and (tier != "X" or removed != model.config.removed):
            raise InputError(
                f"--plan {plan}: layer {i} has no attention left in this model; "
                "start from the original"
            )
        attention = new.layers[i].self_attn
        is_new = tier != old_tier or tier == "L" and not same_settings
        if attention is not None and is_new:
            for name, x in attention.initial_parameters().items():
                dtype = x.dtype if FLOAT32.search(name) else model.norm.weight.dtype
                weights[f"layers.{i}.self_attn.{name}"] = nn.Parameter(x.to(model.device, dtype))

    new.load_state_dict({name: weights[name] for name, _ in new.named_parameters()}, assign=True)
    new.frequencies = model.frequencies
    new.compiled_shapes = model.compiled_shapes
    return new.requires_grad_(False).eval()


# --- from a folder -----------------------------------------------------------------------------


def load_model(
    path_or_hub_id: str,
    plan: str | None = None,
    window: int | None = None,
    sinks: int = 4,
    feature_map: str = "softmax",
    removed: str = "nothing",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    revision: str | None = None,
) -> Model:
    """A model from a folder or the Hub, with its own plan or converted to `plan` (letters, or
    uniform:L).

    window, sinks, feature_map and removed are for a `plan` that is given; a converted folder brings
    its own. The parameters do not ask for gradients. Raises InputError where the folder, the Hub or
    a tensor is not as it should be."""
    folder = find_model(path_or_hub_id, revision)
    config = read_config(folder)
    with torch.device("meta"):
        model = Model(config)
    require_memory(dtype.itemsize * sum(p.numel() for p in model.parameters()), device, str(folder))

    weights = read_weights(folder, model, dtype, device)
    if "lm_head.weight" in weights and model.lm_head is None:  # it differs from the embedding
        config.tie_word_embeddings = False
        with torch.device("meta"):
            model = Model(config)
    model.load_state_dict(weights, assign=True)
    model.frequencies = model.frequencies.to(device)
    model.requires_grad_(False).eval()
    if plan is None:
        return model
    plan = parse_plan(plan, len(model.layers))
    return convert(model, plan, window, sinks, feature_map, removed)
