"""A Llama-style decoder from scratch: its config, its tokenizer, its weights in and out, and generation.

    x = embed(ids)
    for each layer:   x = x + attention(norm(x))     the tier that the plan gives this layer; none for X
                      x = x + mlp(norm(x))
    logits = head(norm(x))

A model is a folder in the Hub's layout or a Hub id. What the conversion adds to a folder: the plan and the tier settings in
config.json under "layerboost", the tail parameters of the L layers in model.safetensors; the attention of X layers is not
stored. Families: Llama 2 and 3, SmolLM 1 and 2, Mistral, Qwen2 and 2.5, Qwen3.
"""

import copy
import functools
import json
import math
import os
import re
import unicodedata
from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import Linear, RMSNorm, SoftmaxAttention, SoftmaxCache, WindowLinearAttention, linears
from kernels import FEATURE_MAPS, in_cpp, linear, pack, swiglu

FLOAT32 = re.compile(r"(query_map|key_map|tail_logit|frequencies)$")        # these keep it, whatever the model's dtype
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class InputError(ValueError):
    """Something the user can mend: the message is one line that names the file or flag and the fix."""


# --- config ------------------------------------------------------------------------------------------------------

@dataclass
class Config:
    """What config.json says, under its own names, and the plan with its tier settings."""
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: dict                                  # rope_type, rope_theta, and what llama3 and linear scaling need
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    sliding_windows: tuple[int | None, ...]     # per layer: how far its softmax attention sees, None for all
    eos_token_ids: tuple[int, ...]
    plan: str                                   # one letter per layer: S softmax, L sliding-window linear, X removed
    window: int = 64
    sinks: int = 4
    feature_map: str = "hedgehog"
    healed_context: int | None = None           # the longest sequences that the tails were healed on
    raw: dict = field(default_factory=dict, repr=False)     # config.json as it was read


def read_config(folder: Path) -> Config:
    """config.json of a model folder. Raises InputError for a family, rope kind or activation that is not supported."""
    path = folder / "config.json"
    raw = read_json(path)
    boosted = raw.get("layerboost", {})
    kind = boosted.get("base_model_type", raw.get("model_type"))
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise InputError(f"{path}: model_type {kind!r} is not supported; use llama, mistral, qwen2 or qwen3")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported; these families use silu")
    if "quantization_config" in raw:
        raise InputError(f"{path}: quantised weights are not supported; use the float checkpoint of this model")
    try:
        layers, heads = raw["num_hidden_layers"], raw["num_attention_heads"]
        config = Config(
            model_type=kind, vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"], num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=raw.get("max_position_embeddings", 2048), rms_norm_eps=raw["rms_norm_eps"],
            rope=read_rope(raw, path), qkv_bias=kind == "qwen2" or raw.get("attention_bias", False),
            o_bias=kind != "qwen2" and raw.get("attention_bias", False), mlp_bias=raw.get("mlp_bias", False),
            qk_norm=kind == "qwen3", tie_word_embeddings=raw.get("tie_word_embeddings", False),
            sliding_windows=read_sliding_windows(raw, kind, layers), eos_token_ids=read_eos(raw, folder),
            plan=boosted.get("plan", "S" * layers), raw=raw)
    except KeyError as missing:
        raise InputError(f"{path}: {missing} is missing") from None
    for name in ("window", "sinks", "feature_map", "healed_context"):
        setattr(config, name, boosted.get(name, getattr(config, name)))
    check_settings(config.plan, config)
    return config


def read_rope(raw: dict, path: Path) -> dict:
    """Both spellings: rope_theta with rope_scaling, and rope_parameters that holds all."""
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **(raw.get("rope_parameters") or raw.get("rope_scaling") or {})}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type", "default")
    needed = {"default": (), "linear": ("factor",),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if rope["rope_type"] not in needed:
        raise InputError(f"{path}: rope type {rope['rope_type']!r} is not supported; use default, linear or llama3")
    if raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        raise InputError(f"{path}: partial_rotary_factor is not supported")
    for name in needed[rope["rope_type"]]:
        if name not in rope:
            raise InputError(f"{path}: rope type {rope['rope_type']!r} needs {name!r}")
    return rope


def read_sliding_windows(raw: dict, kind: str, layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if not window or kind == "llama" or (kind != "mistral" and not raw.get("use_sliding_window", False)):
        return (None,) * layers
    first = 0 if kind == "mistral" else raw.get("max_window_layers", layers)
    kinds = raw.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_eos(raw: dict, folder: Path) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json's where it has them (chat models name several), or config.json's."""
    path = folder / "generation_config.json"
    eos = read_json(path).get("eos_token_id") if path.exists() else None
    eos = raw.get("eos_token_id") if eos is None else eos
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a model has config.json, *.safetensors and tokenizer.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object")
    return content


def parse_plan(text: str, layers: int) -> str:
    """`SSLX...`, one letter per layer, or `uniform:L` for all layers alike."""
    plan = text.split(":", 1)[1] * layers if text.startswith("uniform:") else text
    if len(plan) != layers or set(plan) - set("SLX"):
        raise InputError(f"--plan {text!r}: give {layers} letters out of S (softmax), L (sliding-window linear) and "
                         "X (removed), or uniform:S, uniform:L, uniform:X")
    return plan


def check_settings(plan: str, config: Config) -> None:
    parse_plan(plan, config.num_hidden_layers)
    if config.feature_map not in FEATURE_MAPS:
        raise InputError(f"--feature-map {config.feature_map!r}: use one of {', '.join(FEATURE_MAPS)}")
    if config.window < 0 or config.sinks < 0:
        raise InputError("--window and --sinks: give numbers of tokens, 0 or more")
    if config.feature_map == "none" and config.window == 0:
        raise InputError("--feature-map none --window 0: an L layer would see nothing; give it a window or a feature map")


# --- decoder -----------------------------------------------------------------------------------------------------

class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linears(x, self.gate_proj, self.up_proj)
        return self.down_proj(swiglu(gate, up))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        tier = config.plan[layer]
        self.input_layernorm = None if tier == "X" else RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = None if tier == "X" else {"S": SoftmaxAttention, "L": WindowLinearAttention}[tier](config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary, cache=None, positions=None) -> Tensor:
        if self.self_attn is not None:
            x = x + self.self_attn(self.input_layernorm(x), rotary, cache, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


# One graph per tier and shape, shared by all layers of all models. Shapes are static: that makes the faster code.
compiled_block = torch.compile(Block.forward, dynamic=False)
torch._dynamo.config.recompile_limit = 64


def with_stack(function):
    """Runs a function, and all that it calls, in one piece of CPython's stack, by a frame too large for the rest of the last one.

    That stack is pieces of 16 KiB, and a call beyond the end of one maps memory, its return unmaps it (CPython's issue 142183, mended
    for 3.13 and later in 2026). At an unlucky depth all calls of a decoding step do, and it takes twice as long (results/speed.md)."""
    function.__code__ = function.__code__.replace(co_stacksize=4096)
    return function


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

    def put(self, slot: int, other: "Cache", index: int = 0) -> None:
        """Sequence `index` of `other`, which has no more room, becomes sequence `slot` of this one."""
        self.positions[slot] = other.positions[index]
        for mine, its in zip(self.layers, other.layers):
            for name, x in layer_tensors(its).items():
                getattr(mine, name)[slot, :, :x.shape[2]] = x[index]

    def first(self, count: int) -> "Cache":
        """The first `count` sequences, in the same memory."""
        layers = [copy.copy(layer) for layer in self.layers]
        for layer in layers:
            for name, x in layer_tensors(layer).items():
                setattr(layer, name, x[:count])
        return Cache(layers, self.positions[:count])

    @property
    def room(self) -> float:
        """Tokens a sequence that the softmax layers have room for."""
        return min((layer.key.shape[2] for layer in self.layers if isinstance(layer, SoftmaxCache)), default=math.inf)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer_tensors(layer).values())


def layer_tensors(cache) -> dict[str, Tensor]:
    """What a layer's cache holds, by name; nothing for a layer without attention."""
    return {name: x for name, x in vars(cache).items() if isinstance(x, Tensor)} if cache else {}


class Model(nn.Module):
    """The decoder. `compiled_shapes` holds the [B, T] for which a block runs through torch.compile, those of the long
    stages; all else runs the same code eagerly. With `recompute`, a block keeps only its input for the backward pass and runs
    again there (activation checkpointing, arXiv 1604.06174)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.compiled_shapes, self.recompute = config, set(), False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("frequencies", rotary_frequencies(config), persistent=False)

    def _apply(self, function, recurse=True):
        """`.to(dtype)`, `.bfloat16()` and the like, which leave what is FLOAT32 as it is."""
        exact = {name: x.data for name, x in (*self.named_parameters(), *self.named_buffers()) if FLOAT32.search(name)}
        super()._apply(function, recurse)
        for name, x in (*self.named_parameters(), *self.named_buffers()):
            if name in exact and x.dtype != torch.float32:
                x.data = exact[name].to(x.device)
        return self

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
        """ids [B, T] int64 -> logits [B, T, V]. With a cache the T tokens go on from what it holds, and it is filled in
        place. Raises ValueError where it has no room for them."""
        if cache is not None and int(cache.positions.max()) + ids.shape[1] > cache.room:
            raise ValueError(f"the cache has room for {cache.room} tokens, too few for {ids.shape[1]} more; call cache.resize")
        return self.logits(self.hidden(ids, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] after the final norm -> [..., V]"""
        return linear(hidden, self.head)

    def pack(self) -> None:
        """Lays the weights out for products in C++ where this processor has them (`pack` of kernels.py), those that read the same input
        together: a second copy of them in memory, one for all plans of a model, for long work on weights that stay. Gradients need the first."""
        for layer in self.layers:
            a, mlp = layer.self_attn, layer.mlp
            for group in ((mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)) + (((a.q_proj, a.k_proj, a.v_proj), (a.o_proj,)) if a else ()):
                pack(*(linear.weight for linear in group))
        pack(self.head)

    @with_stack
    def hidden(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """The same up to the head: [B, T, hidden_size] after the final norm."""
        x = self.run_layers(self.embed_tokens(ids), 0, len(self.layers), cache)
        if cache is not None:
            cache.positions += ids.shape[1]
        return self.norm(x)

    def run_layers(self, x: Tensor, first: int, last: int, cache: Cache | None = None) -> Tensor:
        """Layers first..last-1 on a residual stream x [B, T, hidden_size]."""
        block = compiled_block if cache is None and x.shape[:2] in self.compiled_shapes else Block.forward
        positions = None if cache is None else cache.positions
        rotary = self.rotary(x.shape[1], positions)
        if self.recompute and torch.is_grad_enabled():
            block = functools.partial(checkpoint, block, use_reentrant=False)
        for layer in range(first, last):
            x = block(self.layers[layer], x, rotary, cache and cache.layers[layer], positions)
        return x

    def rotary(self, tokens: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, 1, T, D / 2] of the T positions that follow `positions` [B] (None: from 0)."""
        position = torch.arange(tokens, device=self.device)[None]
        if positions is not None:
            position = positions[:, None] + position
        angle = position[:, None, :, None] * self.frequencies
        return angle.cos(), angle.sin()

    def new_cache(self, batch: int, max_tokens: int, device: str | torch.device | None = None) -> Cache:
        """An empty cache for `batch` sequences of up to `max_tokens` tokens each; device "meta" makes one of no memory."""
        dtype, device = self.norm.weight.dtype, device or self.device
        layers = [layer.self_attn and layer.self_attn.new_cache(batch, max_tokens, dtype, device) for layer in self.layers]
        return Cache(layers, torch.zeros(batch, dtype=torch.int64, device=device))

    def generate(self, ids: Tensor, max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None, seed: int | None = None, lengths: Tensor | None = None,
                 on_token=None) -> Tensor:
        """ids [B, T], shorter prompts padded on the right with their `lengths` [B] given -> [B, T + max_new_tokens].

        A row's new tokens follow its own prompt; what follows the last of them is filled with it, an end-of-text token in
        most cases. temperature 0 is greedy; otherwise tokens are drawn from the `top_k` likeliest, or the smallest set that
        holds `top_p` of the probability (arXiv 1904.09751). `on_token(row, id)` is called for every new token.
        Raises ValueError for a prompt without tokens.
        """
        generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
        engine = Engine(self, len(ids), lambda logits: sample(logits, temperature, top_k, top_p, generator))
        lengths = [ids.shape[1]] * len(ids) if lengths is None else lengths.tolist()
        if min(lengths) < 1:
            raise ValueError("generate: a prompt has no tokens; give each one at least")
        if max_new_tokens < 1:
            return ids
        requests = [Request(row[:length], max_new_tokens, self.config.eos_token_ids) for row, length in zip(ids, lengths)]
        for request in engine.run(deque(requests)):
            if on_token:
                on_token(requests.index(request), request.output[-1])
        out = F.pad(ids, (0, max_new_tokens))
        for row, length, request in zip(out, lengths, requests):
            row[length:] = request.output[-1]
            row[length:length + len(request.output)] = torch.tensor(request.output)
        return out


def sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator) -> Tensor:
    """logits [B, V] -> ids [B]."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p:
        ordered, order = logits.sort(-1, descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered.masked_fill(beyond, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def rotary_frequencies(config: Config) -> Tensor:
    """theta^(-2j / D) for each pair j, [D / 2]; `linear` divides all by the factor, `llama3` only those whose wavelength
    is long against the original context, with a ramp between (Llama 3.1's rule: low_freq_factor, high_freq_factor)."""
    rope, D = config.rope, config.head_dim
    frequency = rope["rope_theta"] ** (-torch.arange(0, D, 2, dtype=torch.float32, device="cpu") / D)
    if rope["rope_type"] == "linear":
        return frequency / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequency + (1 - keep) * frequency / rope["factor"]
    return frequency


# --- decoding engine ---------------------------------------------------------------------------------------------

BUCKET = 128        # softmax caches have room for a multiple of this many tokens
CHUNK = 512         # tokens of a prompt that are prefilled between two steps
SLOTS = 4           # a step is taken by a multiple of this many slots


@dataclass(eq=False)
class Request:
    """A prompt [T] and how many tokens are to follow it; fewer where one of `stop` comes first."""
    prompt: Tensor
    max_new_tokens: int
    stop: tuple[int, ...] = ()
    output: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.output) >= self.max_new_tokens or self.output[-1] in self.stop


class Engine:
    """Decodes many requests at once: continuous batching (Orca, OSDI 2022).

    A step gives each live sequence its next token, every one at its own position. A prompt is prefilled in a cache of its own, a
    chunk between two steps so that the others need not wait long, and then moves into the next slot. When a sequence ends, the
    last live one moves into its slot: so the live ones lie together, and a step costs what they cost. It is taken by their slots,
    rounded up to SLOTS, with the room of the longest of them in the softmax caches, rounded up to BUCKET.

    `pick(logits [B, V]) -> ids [B]` chooses the tokens, by default the likeliest. `compiled` runs the steps through
    torch.compile: once for any number of slots and all lengths, but one or two minutes for 30 layers, so it is for long service.
    """

    @torch.inference_mode()
    def __init__(self, model: Model, slots: int, pick=lambda logits: logits.argmax(-1), compiled: bool = False):
        self.model, self.slots, self.pick = model, slots, pick
        self.decode = compile_decode(model.device) if compiled else decode
        if compiled:
            model.pack()
        self.live: list[Request] = []                                               # the sequence of live[i] is in slot i
        self.cache = model.new_cache(slots, BUCKET)
        self.token = torch.zeros(slots, dtype=torch.int64, device=model.device)     # the last one of each sequence
        self.active: tuple = ()                                                     # the part of both that takes part in a step

    @torch.inference_mode()
    def run(self, waiting: deque[Request]):
        """Serves the requests until none is left, those put into `waiting` meanwhile too. Yields a request after each token
        that joins its output."""
        reading = None                                                              # the request whose prompt is being read
        while waiting or reading or self.live:
            if waiting and not reading and len(self.live) < self.slots:
                reading = waiting.popleft()
                staged = self.model.new_cache(1, 0)
                chunks = prefill(self.model, reading.prompt, staged)
            if reading:
                hidden, last = next(chunks)
                if last:                                                            # its cache moves into the next slot
                    self.live.append(reading)
                    self.make_room()
                    slot = len(self.live) - 1
                    self.cache.put(slot, staged)
                    self.token[slot] = self.pick(self.model.logits(hidden))
                    reading.output.append(int(self.token[slot]))
                    yield reading
                    reading = None
                    self.release()
            if self.live:
                for request, token in zip(self.live, self.step().tolist()):
                    request.output.append(token)
                    yield request
                self.release()

    def release(self) -> None:
        """Frees the slots of finished requests; the last live sequence moves into each."""
        for slot in reversed(range(len(self.live))):
            if self.live[slot].done:
                last = len(self.live) - 1
                if slot < last:
                    self.live[slot], self.token[slot] = self.live[last], self.token[last]
                    self.cache.put(slot, self.cache, last)
                self.live.pop()
                self.cache.positions[last] = 0

    def make_room(self) -> None:
        """Gives the softmax caches the room of the longest live sequence, and `active` the slots of all live ones."""
        count = min(round_up(len(self.live), SLOTS), self.slots)
        room = round_up(max(len(r.prompt) + len(r.output) for r in self.live), BUCKET)
        if self.active[:2] != (count, room):
            self.active = ()                                                        # lets go of the memory of the smaller room
            self.cache.resize(room)
            self.active = count, room, self.cache.first(count), self.token[:count]
            mark_varying(*self.active[2:])

    @with_stack
    def step(self) -> Tensor:
        """The next token of every live sequence."""
        self.make_room()
        _, _, cache, token = self.active
        token.copy_(self.decode(self.model, token, cache.layers, cache.positions, self.pick))
        self.cache.positions[:len(self.live)] += 1
        return self.token[:len(self.live)]


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def prefill(model: Model, prompt: Tensor, cache: Cache):
    """Reads a prompt [T] into an empty cache of one sequence, a chunk at a time; yields the last hidden state [1, hidden_size] and
    whether that was the last chunk. The cache has room for what has been read and no more: no chunk reads what is still empty."""
    for start in range(0, len(prompt), CHUNK):
        end = min(start + CHUNK, len(prompt))
        cache.resize(end)
        yield model.hidden(prompt[None, start:end], cache)[:, -1], end == len(prompt)


def decode(model: Model, token: Tensor, layers: list, positions: Tensor, pick) -> Tensor:
    """One step of every sequence: its last token [B] and position [B] -> its next token [B]; fills the caches of `layers`."""
    x = model.run_layers(model.embed_tokens(token[:, None]), 0, len(model.layers), Cache(layers, positions))
    return pick(model.logits(model.norm(x)[:, 0]))


@functools.cache
def compile_decode(device: torch.device):
    """One program for all engines of a model. On a GPU, CUDA graphs. On a CPU the weights become constants; those that `Model.pack`
    left as they are get laid out once as torch's products want them, those that share an input as one (query, key and value; gate
    and up). Either way a second copy of them is in memory."""
    if device.type == "cuda":
        return torch.compile(decode, mode="reduce-overhead")
    return torch._inductor.config.patch({"freezing": True, "cpp.enable_concat_linear": True})(torch.compile(decode))


def mark_varying(cache: Cache, token: Tensor) -> None:
    """Tells torch.compile which sizes differ from step to step, the number of slots and the room in the softmax caches, and that a
    CUDA graph may write to these tensors where they lie."""
    for layer in cache.layers:
        for x in layer_tensors(layer).values():
            if x.is_cuda:                       # elsewhere this would make the cache one of the constants
                torch._dynamo.mark_static_address(x)
            if isinstance(layer, SoftmaxCache):
                torch._dynamo.mark_dynamic(x, 2)
            if len(x) > 1:
                torch._dynamo.mark_dynamic(x, 0)
    for x in (cache.positions, token) if len(token) > 1 else ():
        torch._dynamo.mark_dynamic(x, 0)


# --- conversion and weights --------------------------------------------------------------------------------------

def convert(model: Model, plan: str, window: int = 64, sinks: int = 4, feature_map: str = "hedgehog") -> Model:
    """A model with another plan that shares the weights of `model`: no tensor is copied. L layers that `model` does not
    have start with an untrained tail."""
    config = replace(model.config, plan=plan, window=window, sinks=sinks, feature_map=feature_map)
    check_settings(plan, config)
    with torch.device("meta"):
        new = Model(config)
    weights = dict(model.named_parameters())
    settings = (window, sinks, feature_map)
    for i, (old, tier) in enumerate(zip(model.plan, plan)):
        if old == "X" and tier != "X":
            raise InputError(f"--plan {plan}: layer {i} has no attention left in this model; start from the original")
        if tier == "L" and (old != "L" or settings != (model.config.window, model.config.sinks, model.config.feature_map)):
            tail = new.layers[i].self_attn.initial_tail()
            weights |= {f"layers.{i}.self_attn.{name}": nn.Parameter(x.to(model.device)) for name, x in tail.items()}
    new.load_state_dict({name: weights[name] for name, _ in new.named_parameters()}, assign=True)
    new.frequencies, new.compiled_shapes = model.frequencies, model.compiled_shapes
    return new.requires_grad_(False)


def load_model(path_or_hub_id: str, plan: str | None = None, window: int = 64, sinks: int = 4,
               feature_map: str = "hedgehog", dtype: torch.dtype = torch.float32, device: str = "cpu",
               revision: str | None = None) -> Model:
    """A model from a folder or the Hub, with its own plan or converted to `plan` (letters, or uniform:L).

    window, sinks and feature_map are for a `plan` that is given; a converted folder brings its own. The parameters do not
    ask for gradients. Raises InputError where the folder, the Hub or a tensor is not as it should be.
    """
    folder = find_model(path_or_hub_id, revision)
    config = read_config(folder)
    with torch.device("meta"):
        model = Model(config)
    model.load_state_dict(read_weights(folder, model, dtype, device), assign=True)
    model.frequencies = model.frequencies.to(device)
    model.requires_grad_(False).eval()
    return model if plan is None else convert(model, parse_plan(plan, config.num_hidden_layers), window, sinks, feature_map)


def find_model(path_or_hub_id: str, revision: str | None = None) -> Path:
    """The local folder of a model; a Hub id is downloaded (only the files that are read) or found in the Hub's cache."""
    if os.path.isdir(path_or_hub_id):
        return Path(path_or_hub_id)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path_or_hub_id) or path_or_hub_id.startswith("."):
        raise InputError(f"{path_or_hub_id}: no such folder; give that of a model, or a Hub id")
    patterns = ["config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
    return Path(from_hub(snapshot_download, path_or_hub_id, repo_id=path_or_hub_id, revision=revision, allow_patterns=patterns))


def from_hub(download, what: str, **arguments) -> str:
    """Calls a huggingface_hub download; its many errors become one line each."""
    try:
        return download(**arguments)
    except hub_errors.GatedRepoError:
        raise InputError(f"{what}: gated; accept its licence on its Hub page and run `hf auth login`") from None
    except hub_errors.RevisionNotFoundError:
        raise InputError(f"{what}: has no revision {arguments.get('revision')!r}; check --revision") from None
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError):
        raise InputError(f"{what}: neither a local path nor on the Hub; a private repository needs `hf auth login`") from None
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError, TimeoutError):
        raise InputError(f"{what}: not a local path, and the Hub cannot be reached; check either") from None
    except hub_errors.EntryNotFoundError:
        raise InputError(f"{what}: no such file on the Hub") from None
    except hub_errors.HTTPError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise InputError(f"{what}: {first_line}") from None


def read_weights(folder: Path, model: Model, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The tensors of all safetensors files, one at a time: never two copies of a model in memory. Tail parameters stay
    float32, all else becomes `dtype`. Raises InputError naming each tensor that is missing, unexpected or misshapen."""
    index = folder / "model.safetensors.index.json"
    names = set(read_json(index).get("weight_map", {}).values()) if index.exists() else {"model.safetensors"}
    files = [folder / name for name in sorted(names)]
    wanted = dict(model.named_parameters())
    weights, wrong = {}, []
    for file in files:
        if not file.exists():
            other = " (only safetensors are loaded, never .bin files)" if list(folder.glob("*.bin")) else ""
            raise InputError(f"{file}: no such file{other}")
        try:
            opened = safe_open(file, framework="pt", device="cpu")
        except Exception as error:      # safetensors raises several kinds for a damaged file; all mean the same here
            raise InputError(f"{file}: cannot be read as safetensors ({error}); download it again") from None
        with opened as tensors:
            for stored in tensors.keys():
                name = stored.removeprefix("model.")
                if name not in wanted:
                    if not (name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight" and model.lm_head is None):
                        wrong.append(f"unexpected {stored}")
                    continue
                shape = tuple(tensors.get_slice(stored).get_shape())
                if shape != tuple(wanted[name].shape):
                    wrong.append(f"{stored} has shape {shape}, not {tuple(wanted[name].shape)}")
                    weights[name] = None
                    continue
                target = torch.float32 if FLOAT32.search(name) else dtype
                weights[name] = torch.empty(shape, dtype=target, device=device).copy_(tensors.get_tensor(stored))
    wrong += [f"missing {name}" for name in wanted if name not in weights]
    if wrong:
        shown = "; ".join(wrong[:6]) + (" ..." if wrong[6:] else "")
        raise InputError(f"{folder}: {len(wrong)} tensors do not fit config.json: {shown}")
    return weights


def save_model(model: Model, folder: str | Path, source: str | Path) -> None:
    """Writes a Hub-style folder: config.json with the plan and the tier settings, model.safetensors, and the tokenizer
    files of `source`. Each file is written under a temporary name and renamed."""
    folder, config = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    raw = {key: x for key, x in config.raw.items() if key not in ("torch_dtype", "layerboost") and x != ["LayerBoostForCausalLM"]}
    raw |= {"model_type": config.model_type, "dtype": str(model.norm.weight.dtype).removeprefix("torch.")}
    if set(config.plan) != {"S"}:      # another name, so that no other program takes it for an ordinary checkpoint
        raw |= {"model_type": "layerboost", "architectures": ["LayerBoostForCausalLM"], "layerboost": {
            "base_model_type": config.model_type, "plan": config.plan, "window": config.window, "sinks": config.sinks,
            "feature_map": config.feature_map, "healed_context": config.healed_context}}
    weights = {name if name == "lm_head.weight" else f"model.{name}": x.detach().contiguous()
               for name, x in model.named_parameters()}
    write_file(folder / "model.safetensors", lambda path: save_file(weights, path, metadata={"format": "pt"}))
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            content = (Path(source) / name).read_bytes()
            write_file(folder / name, lambda path: path.write_bytes(content))
    write_file(folder / "config.json", lambda path: path.write_text(json.dumps(raw, indent=2) + "\n"))


def write_file(path: Path, write) -> None:
    """write(temporary path), then rename: a file is whole or not there. Raises OSError where it cannot be written."""
    temporary = path.with_name(path.name + ".partial")
    try:
        write(temporary)
    except SafetensorError as error:                # says so of a full disk
        raise OSError(None, str(error), str(path)) from None
    os.replace(temporary, path)


# --- tokenizer ---------------------------------------------------------------------------------------------------

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# SmolLM cuts out single digits first and runs the GPT-2 pattern on what lies between; as one pattern, a digit stands
# alone and white space before a digit stays whole, since there its piece ends.
DIGITS_GPT2_PATTERN = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


class Tokenizer:
    """Byte-level BPE from tokenizer.json, run by tiktoken: the Llama-3, Qwen2/3, SmolLM and GPT-2 kinds.

    `encode(text)` gives the ids that Hugging Face's tokenizer gives, the leading BOS (or trailing EOS) of its
    post-processor included; `special=False` leaves those out. Special tokens that stand in the text become their ids.
    """

    def __init__(self, folder: Path):
        self.path = folder / "tokenizer.json"
        if not self.path.exists() and (folder / "tokenizer.model").exists():
            raise self.unsupported("a SentencePiece tokenizer (tokenizer.model)")
        spec = read_json(self.path)
        model = spec["model"]
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
            kind = "SentencePiece-style" if model.get("byte_fallback") else model["type"]
            raise self.unsupported(f"a {kind} tokenizer")
        added = {token["content"]: token for token in spec.get("added_tokens", [])}
        if any(token.get("lstrip") or token.get("rstrip") or token.get("single_word") for token in added.values()):
            raise self.unsupported("an added token that strips the text around it")
        self.added = {text: token["id"] for text, token in added.items()}
        self.normalise = self.read_normalizer(spec.get("normalizer"))
        ranks = self.read_ranks(model)
        self.encoding = tiktoken.Encoding(str(self.path), pat_str=self.read_pattern(spec.get("pre_tokenizer")),
                                          mergeable_ranks=ranks, special_tokens=self.added)
        self.bytes = {rank: token for token, rank in ranks.items()} | {id: text.encode() for text, id in self.added.items()}
        by_length = sorted(self.added, key=len, reverse=True)
        self.splitter = re.compile("(" + "|".join(map(re.escape, by_length)) + ")") if by_length else None
        self.prefix, self.suffix = self.read_template(spec.get("post_processor"))

    def unsupported(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what} is not supported; "
                          "byte-level BPE of the Llama-3, Qwen2/3, SmolLM and GPT-2 kinds is")

    def read_ranks(self, model: dict) -> dict[bytes, int]:
        """tiktoken merges by the id of the result, tokenizer.json by the place of the merge: the same where ids rise with
        the merges."""
        table = byte_table()
        try:
            ranks = {bytes(table[c] for c in token): id for token, id in model["vocab"].items() if token not in self.added}
        except KeyError:
            raise self.unsupported("a vocabulary that is not byte-level") from None
        merges = [m.replace(" ", "", 1) if isinstance(m, str) else "".join(m) for m in model["merges"]]
        ids = list(dict.fromkeys(model["vocab"][m] for m in merges))
        if ids != sorted(ids):
            raise self.unsupported("a vocabulary whose ids do not follow the order of its merges")
        return ranks

    def read_pattern(self, pre: dict | None) -> str:
        parts = (pre or {}).get("pretokenizers") or [pre or {"type": None}]
        kinds = [part["type"] for part in parts]
        if any(part.get("add_prefix_space") for part in parts):
            raise self.unsupported("a pre-tokenizer with add_prefix_space")
        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
            return GPT2_PATTERN
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            return DIGITS_GPT2_PATTERN
        if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
            split = parts[0]
            if "Regex" in split["pattern"] and split["behavior"] == "Isolated" and not split.get("invert"):
                return split["pattern"]["Regex"]
        raise self.unsupported(f"a pre-tokenizer of the kind {' + '.join(map(str, kinds))}")

    def read_normalizer(self, spec: dict | None):
        if spec is None:
            return lambda text: text
        if spec["type"] in ("NFC", "NFKC", "NFD", "NFKD"):
            return lambda text: unicodedata.normalize(spec["type"], text)
        raise self.unsupported(f"a {spec['type']} normalizer")

    def read_template(self, post: dict | None) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before and after a text."""
        steps = [] if post is None else post.get("processors", [post])
        for step in steps:
            if step["type"] == "TemplateProcessing":
                special = lambda piece: step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
                text = next(i for i, piece in enumerate(step["single"]) if "Sequence" in piece)
                before, after = step["single"][:text], step["single"][text + 1:]
                return sum(map(special, before), []), sum(map(special, after), [])
            if step["type"] != "ByteLevel":
                raise self.unsupported(f"a {step['type']} post-processor")
        return [], []

    def encode(self, text: str, special: bool = True) -> list[int]:
        pieces = self.splitter.split(text) if self.splitter else [text]
        ids = [id for piece in pieces if piece for id in
               ([self.added[piece]] if piece in self.added else self.encoding.encode_ordinary(self.normalise(piece)))]
        return self.prefix + ids + self.suffix if special else ids

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Ids beyond the vocabulary (a padded head can name them) decode to nothing."""
        return b"".join(self.bytes.get(id, b"") for id in ids)


def byte_table() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte: itself where it prints, else the next free character from 256 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in prints]
    return {chr(b): b for b in prints} | {chr(256 + i): b for i, b in enumerate(rest)}


def load_tokenizer(path_or_hub_id: str) -> Tokenizer:
    """The tokenizer of a model folder or Hub id. Raises InputError where its kind is not supported."""
    return Tokenizer(find_model(path_or_hub_id))
