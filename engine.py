"""Continuous batching: many requests decoded together (Orca, OSDI 2022).

A step gives every live sequence its next token, each at its own position. A prompt is read
("prefilled") in a cache of its own, a chunk between two steps so that the others need not wait
long, and then moves into the next slot. When a sequence ends, the last live one moves into its
slot, so the live ones lie together. A step reads the slots of the live ones, rounded up to SLOTS,
and the room of the longest of them in the softmax caches, rounded up to BUCKET: it costs what they
cost.
"""

import copy
import functools
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attention import SoftmaxCache
from model import Cache, Model, cache_tensors

BUCKET = 128  # softmax caches have room for a multiple of this many tokens
CHUNK = 512  # tokens of a prompt that are prefilled between two steps
SLOTS = 4  # a step is taken by a multiple of this many slots


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


def likeliest(logits: Tensor) -> Tensor:
    """[B, V] -> [B]: greedy decoding."""
    return logits.argmax(-1)


class Engine:
    """Serves requests with `slots` sequences at a time.

    pick(logits [B, V]) -> ids [B] chooses the tokens. `compiled` runs the steps through
    torch.compile: once for any number of slots and all lengths, but that takes one or two minutes
    for 30 layers, so it is for long service."""

    @torch.inference_mode()
    def __init__(self, model: Model, slots: int, pick=likeliest, compiled: bool = False):
        self.model = model
        self.slots = slots
        self.pick = pick
        self.compiled = compiled
        self.live: list[Request] = []  # the sequence of live[i] is in slot i
        self.cache = model.new_cache(slots, BUCKET)
        self.token = torch.zeros(slots, dtype=torch.int64, device=model.device)  # each one's last
        self.weights = weights_version(model) if compiled else ""
        self.size = (0, 0)  # slots and room of the part that takes part in a step
        self.active_cache: Cache | None = None  # that part of the cache
        self.active_token: Tensor | None = None  # and of the tokens

    @torch.inference_mode()
    def run(self, waiting: deque[Request]):
        """Serves the requests until none is left, those put into `waiting` meanwhile too. Yields a
        request after each token that joins its output."""
        self.weights = weights_version(self.model) if self.compiled else ""
        reading = None  # the request whose prompt is being read
        while waiting or reading or self.live:
            if waiting and not reading and len(self.live) < self.slots:
                reading = waiting.popleft()
                prompt_cache = self.model.new_cache(1, 0)
                chunks = prefill(self.model, reading.prompt, prompt_cache)

            if reading:
                hidden, last = next(chunks)
                if last:
                    self.admit(reading, prompt_cache, hidden)
                    yield reading
                    reading = None
                    self.release()

            if self.live:
                for request, token in zip(self.live, self.step().tolist()):
                    request.output.append(token)
                    yield request
                self.release()

    def admit(self, request: Request, prompt_cache: Cache, hidden: Tensor) -> None:
        """A prompt that has been read moves into the next slot and gets its first token."""
        slot = len(self.live)
        self.live.append(request)
        self.make_room()
        move_sequence(prompt_cache, 0, self.cache, slot)
        self.token[slot] = self.pick(self.model.logits(hidden))
        request.output.append(int(self.token[slot]))

    def release(self) -> None:
        """Frees the slots of finished requests; the last live sequence moves into each."""
        for slot in reversed(range(len(self.live))):
            if self.live[slot].done:
                last = len(self.live) - 1
                if slot < last:
                    self.live[slot] = self.live[last]
                    self.token[slot] = self.token[last]
                    move_sequence(self.cache, last, self.cache, slot)
                self.live.pop()
                self.cache.positions[last] = 0

    def make_room(self) -> None:
        """Gives the softmax caches the room of the longest live sequence, and takes the slots of
        all live ones as active."""
        longest = max(len(request.prompt) + len(request.output) for request in self.live)
        count = min(round_up(len(self.live), SLOTS), self.slots)
        size = (count, round_up(longest, BUCKET))
        if self.size != size:
            self.active_cache = None  # lets go of the memory of the smaller room
            self.cache.resize(size[1])
            self.size = size
            self.active_cache = first_sequences(self.cache, count)
            self.active_token = self.token[:count]
            mark_dynamic_sizes(self.active_cache, self.active_token)

    def step(self) -> Tensor:
        """The next token of every live sequence, [live]."""
        self.make_room()
        run = compiled_next_tokens(self.model.device) if self.compiled else next_tokens
        cache, token = self.active_cache, self.active_token
        token.copy_(run(self.model, token, cache.layers, cache.positions, self.pick, self.weights))
        self.cache.positions[: len(self.live)] += 1
        return self.token[: len(self.live)]


def prefill(model: Model, prompt: Tensor, cache: Cache):
    """Reads a prompt [T] into an empty cache of one sequence, a chunk at a time. Yields the last
    hidden state [1, hidden_size] and whether that was the last chunk. The cache has room for what
    has been read and no more, so no chunk reads what is still empty."""
    for start in range(0, len(prompt), CHUNK):
        end = min(start + CHUNK, len(prompt))
        cache.resize(end)
        yield model.hidden(prompt[None, start:end], cache)[:, -1], end == len(prompt)


def next_tokens(
    model: Model, token: Tensor, layers: list, positions: Tensor, pick, weights: str = ""
) -> Tensor:
    """One step of every sequence: its last token [B] and position [B] -> its next token [B]. Fills
    the caches of `layers`. `weights` tells a compiled program when to be made anew."""
    len(weights)  # a compiled program is guarded by what it reads alone
    x = model.embed_tokens(token[:, None])
    x = model.run_layers(x, 0, len(model.layers), Cache(layers, positions))
    return pick(model.logits(model.norm(x)[:, 0]))


@functools.cache
def compiled_next_tokens(device: torch.device):
    """One program for all engines of a model. On a GPU, CUDA graphs. On a CPU the weights become
    constants, laid out once as its products want them, those that share an input as one: a second
    copy of them in memory."""
    if device.type == "cuda":
        return torch.compile(next_tokens, mode="reduce-overhead")
    options = {"freezing": True, "cpp.enable_concat_linear": True}
    return torch._inductor.config.patch(options)(torch.compile(next_tokens))


def weights_version(model: Model) -> str:
    """Changes when a weight is written in place or replaced, since constants would not follow."""
    versions = []
    for p in model.parameters():
        versions.append((p.data_ptr(), 0 if p.is_inference() else p._version))
    return str(hash(tuple(versions)))


# --- moving sequences between caches -----------------------------------------------------------


def move_sequence(source: Cache, index: int, target: Cache, slot: int) -> None:
    """Sequence `index` of `source`, which has no more room, becomes sequence `slot` of `target`."""
    target.positions[slot] = source.positions[index]
    for from_layer, to_layer in zip(source.layers, target.layers):
        for name, x in cache_tensors(from_layer).items():
            getattr(to_layer, name)[slot, :, : x.shape[2]] = x[index]


def first_sequences(cache: Cache, count: int) -> Cache:
    """The first `count` sequences, in the same memory."""
    layers = [copy.copy(layer) for layer in cache.layers]
    for layer in layers:
        for name, x in cache_tensors(layer).items():
            setattr(layer, name, x[:count])
    return Cache(layers, cache.positions[:count])


def mark_dynamic_sizes(cache: Cache, token: Tensor) -> None:
    """Tells torch.compile which sizes differ from step to step, the number of slots and the room in
    the softmax caches, and that a CUDA graph may write to these tensors where they lie."""
    for layer in cache.layers:
        for x in cache_tensors(layer).values():
            if x.is_cuda:  # elsewhere this would make the cache one of the constants
                torch._dynamo.mark_static_address(x)
            if isinstance(layer, SoftmaxCache):
                torch._dynamo.mark_dynamic(x, 2)
            if len(x) > 1:
                torch._dynamo.mark_dynamic(x, 0)
    if len(token) > 1:
        torch._dynamo.mark_dynamic(cache.positions, 0)
        torch._dynamo.mark_dynamic(token, 0)


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
