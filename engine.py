"""Continuous batching: many requests decoded together (Orca, OSDI 2022).

A step gives every live sequence its next token, each at its own position. Prompts are read
("prefilled") together in a cache of their own, one chunk between two steps so that live sequences
do not wait long, and then move into free slots. The caches are allocated once. A step covers the
first slots up to the last live sequence, rounded up to one of a few sizes. On a GPU the step of
each size is recorded as a CUDA graph and replayed: launching its kernels one by one would take
longer than running them.
"""

import copy
import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from attention import SoftmaxCache, compiles
from kernels import feature_size
from model import Block, Cache, Model, cache_bytes, cache_tensors

CHUNK = 2048  # tokens of prompts that are read between two steps: enough to keep a GPU busy
SMALLEST = 4  # slots of a step, and what its sizes differ by at least
GRAPHS = 2**28  # bytes that recorded steps and cuBLAS take for themselves
PADDING = 128  # on a GPU, prompts are padded to a multiple of this many tokens
# For torch.compile, which otherwise copies a whole cache in order to write one token of it.
IN_PLACE = {"reorder_for_locality": False, "realize_reads_threshold": 3}


@dataclass(eq=False)
class Request:
    """A prompt [T] and how many tokens to generate; fewer if one of `stop` comes first."""

    prompt: Tensor
    max_new_tokens: int
    stop: tuple[int, ...] = ()
    output: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        is_full = len(self.output) >= self.max_new_tokens
        return is_full or bool(self.output) and self.output[-1] in self.stop


class InFlight(NamedTuple):
    """Tokens that the device is computing, one for each request; None stands for a free slot."""

    requests: list[Request | None]
    tokens: Tensor  # on the host
    computed: torch.cuda.Event | None  # None on a CPU, which has computed them already


class Engine:
    """Decodes requests greedily, `slots` sequences of up to `room` tokens at a time.

    `compiled` runs the steps through torch.compile if that works here. It compiles once for all
    sizes and lengths, but takes a minute or two, so it pays in long service only."""

    @torch.inference_mode()
    def __init__(self, model: Model, slots: int, room: int, compiled: bool = False):
        self.given = model
        self.room = room
        self.compiled = compiled and compiles(model.device)
        self.on_gpu = runs_ahead(model.device)
        self.sizes = step_sizes(slots)
        self.live: list[Request | None] = [None] * slots  # whose sequence is in each slot
        self.cache = model.new_cache(slots, padded(room, model.device))
        self.token = torch.zeros(slots, dtype=torch.int64, device=model.device)  # each one's last
        self.advance = torch.zeros_like(self.token)  # 1 for a live slot, 0 for a free one
        self.take_weights()

    @torch.inference_mode()
    def run(self, waiting: deque[Request]):
        """Serves the requests until none is left, including those that join `waiting` meanwhile.
        Yields a request after each token that is added to its output. Raises ValueError for a
        request that is longer than a slot."""
        self.prepare()
        # A GPU gets its next step before the host looks at the tokens of the last one, so that it
        # never waits. What it computes for a request that has just ended is dropped.
        ahead = 1 if self.on_gpu else 0
        in_flight: deque[InFlight] = deque()
        reading: list[Request] = []
        while waiting or reading or in_flight or any(self.live):
            if waiting and not reading and None in self.live:
                reading = self.take_prompts(waiting)
                prompt_cache = self.model.new_cache(len(reading), 0)
                prompts = [request.prompt for request in reading]
                chunks = prefill(self.model, prompts, prompt_cache, self.block)

            if reading:
                hidden, last = next(chunks)
                if last:
                    in_flight.append(self.admit(reading, prompt_cache, hidden))
                    reading = []

            while len(in_flight) > ahead:
                yield from self.finish(in_flight.popleft())

            if any(self.live):
                tokens = self.step()
                in_flight.append(self.send_to_host(self.live[: len(tokens)], tokens))
            while len(in_flight) > (ahead if any(self.live) else 0):
                yield from self.finish(in_flight.popleft())

    @property
    def block(self):
        """The function that runs a layer on a GPU; None for the model's own."""
        return serve_layer if self.compiled and self.on_gpu else None

    # --- requests come and go ---

    def take_prompts(self, waiting: deque[Request]) -> list[Request]:
        """The next requests: as many as there are free slots for and as fit one chunk, padded to
        the longest; at least one."""
        taken: list[Request] = []
        longest = 0
        while waiting and len(taken) < self.live.count(None):
            tokens = len(waiting[0].prompt)
            if tokens + waiting[0].max_new_tokens > self.room:
                raise ValueError(
                    f"a request of {tokens} + {waiting[0].max_new_tokens} tokens is longer than a "
                    f"slot, {self.room} tokens; give the engine more room"
                )
            longest = max(longest, padded(tokens, self.model.device))
            if taken and longest * (len(taken) + 1) > CHUNK:
                break
            taken.append(waiting.popleft())
        return taken

    def admit(self, requests: list[Request], prompt_cache: Cache, hidden: Tensor) -> InFlight:
        """Prompts that have been read move into free slots and get their first tokens."""
        free = [slot for slot, request in enumerate(self.live) if request is None]
        slots = free[: len(requests)]
        for slot, request in zip(slots, requests):
            self.live[slot] = request
        move_sequences(prompt_cache, list(range(len(requests))), self.cache, slots)
        tokens = self.model.logits(hidden).argmax(-1)
        self.token[as_tensor(slots, tokens.device)] = tokens
        self.mark_live()
        return self.send_to_host(requests, tokens)

    def send_to_host(self, requests: list[Request | None], tokens: Tensor) -> InFlight:
        if not tokens.is_cuda:
            return InFlight(requests, tokens.clone(), None)
        tokens = tokens.to("cpu", non_blocking=True)
        computed = torch.cuda.Event()
        computed.record()
        return InFlight(requests, tokens, computed)

    def finish(self, flight: InFlight):
        """Hands out the tokens of a step, and frees the slots of the requests that end with it."""
        if flight.computed:
            flight.computed.synchronize()
        for request, token in zip(flight.requests, flight.tokens.tolist()):
            if request and not request.done:
                request.output.append(token)
                yield request

        ended = [slot for slot, request in enumerate(self.live) if request and request.done]
        if ended:
            for slot in ended:
                self.live[slot] = None
            self.close_gaps()
            self.mark_live()

    def close_gaps(self) -> None:
        """Moves the last live sequences into free slots if a smaller step then covers all."""
        slots = [slot for slot, request in enumerate(self.live) if request]
        if not slots or self.size_for(len(slots)) == self.size_for(slots[-1] + 1):
            return
        size = self.size_for(len(slots))
        sources = [slot for slot in slots if slot >= size]
        targets = [slot for slot in range(size) if self.live[slot] is None][: len(sources)]
        for source, target in zip(sources, targets):
            self.live[target] = self.live[source]
            self.live[source] = None
        source, target = (as_tensor(x, self.token.device) for x in (sources, targets))
        self.token[target] = self.token[source]
        move_sequences(self.cache, sources, self.cache, targets)

    def mark_live(self) -> None:
        """Tells the device which slots are live. A free slot is put at position 0, where it costs
        least."""
        live = [int(request is not None) for request in self.live]
        self.advance.copy_(as_tensor(live, self.advance.device))
        self.cache.positions *= self.advance

    # --- the step ---

    def size_for(self, count: int) -> int:
        return next(size for size in self.sizes if size >= count)

    def step(self) -> Tensor:
        """The next tokens [size] of the first slots, which hold all live sequences."""
        last = max(slot for slot, request in enumerate(self.live) if request)
        size = self.size_for(last + 1)
        if size not in self.steps:
            self.steps[size] = self.make_step(size)
        self.steps[size]()
        return self.token[:size]

    def prepare(self) -> None:
        """Discards steps that were made for other weights. On a GPU, makes those of all sizes:
        making one runs it, which must not happen while a sequence is live. The largest comes first,
        so that the others can share its memory."""
        if weights_version(self.given) != self.weights:
            self.take_weights()
        if self.on_gpu:
            for size in reversed(self.sizes):
                if size not in self.steps:
                    self.steps[size] = self.make_step(size)
            self.mark_live()

    def take_weights(self) -> None:
        self.model = join_products(self.given) if self.on_gpu else self.given
        self.weights = weights_version(self.given)
        self.steps: dict[int, Callable[[], None]] = {}  # by size
        # Graphs that run one after the other can share memory.
        self.graph_memory = torch.cuda.graph_pool_handle() if self.token.is_cuda else None

    def make_step(self, size: int) -> Callable[[], None]:
        """The step of the first `size` slots, always on the same memory."""
        cache = first_sequences(self.cache, size)
        token, advance = self.token[:size], self.advance[:size]
        run = next_tokens
        if self.compiled and not self.on_gpu:
            run = compiled_next_tokens()
            for layer in cache.layers:
                vary_cache(layer)
            vary(cache.positions, 0)
            vary(token, 0)

        def step() -> None:
            layers, positions = cache.layers, cache.positions
            token.copy_(run(self.model, token, layers, positions, self.block, self.weights))
            positions.add_(advance)

        return record(step, self.graph_memory) if self.on_gpu else step


def step_sizes(slots: int) -> list[int]:
    """4, 8, 12, ... up to `slots`; each is larger than the one before by a quarter at most, and by
    SMALLEST at least."""
    sizes = []
    size = SMALLEST
    while size < slots:
        sizes.append(size)
        size += max(SMALLEST, 2 ** (size.bit_length() - 1) // 4)
    return [*sizes, slots]


def runs_ahead(device: torch.device) -> bool:
    """Whether work on the device is asynchronous, as on a GPU."""
    return device.type == "cuda"


def padded(tokens: int, device: torch.device) -> int:
    """The length at which a prompt is read."""
    return -(-tokens // PADDING) * PADDING if runs_ahead(device) else tokens


def working_bytes(model: Model, room: int, shortest: int) -> tuple[float, float]:
    """An upper bound of the memory that eager serving takes besides weights and caches: bytes in
    total, and bytes per slot. `shortest` is the length of the shortest prompt.

    In total: the cache of the prompts that are read together, and the activations of one layer on a
    chunk. Per slot: the activations of one layer on a token, and the logits."""
    c = model.config
    size = model.norm.weight.element_size()
    shortest = padded(shortest, model.device)
    together = max(1, CHUNK // shortest)
    prompts = max(cache_bytes(model, room), together * cache_bytes(model, shortest))

    # Gate, up, silu(gate) and their product; the residual stream before and after, its norm.
    token = size * 4 * (c.intermediate_size + c.hidden_size)
    state = 0
    if "L" in c.plan:
        F, D = feature_size(c.feature_map, c.head_dim), c.head_dim
        # Scores, their weights, and both again in half precision; about six vectors of each head
        # and four of its features, counted as float32.
        seen = c.window + c.sinks + max(64, c.window // 4)  # by a query, and beside it in its chunk
        token = max(token, c.num_attention_heads * 4 * (3 * seen + 6 * D + 4 * F))
        state = 4 * c.num_key_value_heads * F * (D + 1)
    return prompts + CHUNK * token + GRAPHS, token + state + size * c.vocab_size


def prefill(model: Model, prompts: list[Tensor], cache: Cache, block=None):
    """Reads prompts ([T] each; several only if they fit one chunk, padded) into an empty cache, a
    chunk at a time. Yields the hidden states [B, hidden_size] of the last tokens, and whether that
    was the last chunk. The cache grows with what has been read, so no chunk reads empty slots."""
    lengths = as_tensor([len(prompt) for prompt in prompts], model.device)
    ids = pad_sequence(prompts, batch_first=True)
    ids = F.pad(ids, (0, padded(ids.shape[1], ids.device) - ids.shape[1]))

    sequence = torch.arange(len(prompts), device=model.device)
    read = 0
    for chunk in ids.split(CHUNK, dim=1):
        tokens = chunk.shape[1]
        cache.resize(read + tokens)
        new = (lengths - read).clamp(max=tokens)
        x = model.embed_tokens(chunk)
        x = model.run_layers(x, 0, len(model.layers), cache, new, block)
        cache.positions += new
        read += tokens
        yield model.norm(x[sequence, new - 1]), read == ids.shape[1]


def next_tokens(
    model: Model, token: Tensor, layers: list, positions: Tensor, block=None, weights: str = ""
) -> Tensor:
    """One step of every sequence: its last token [B] and position [B] -> its next token [B]. Fills
    the caches of `layers`. When `weights` changes, a compiled program is compiled again."""
    len(weights)  # only what is read guards a compiled program
    x = model.embed_tokens(token[:, None])
    x = model.run_layers(x, 0, len(model.layers), Cache(layers, positions), block=block)
    return model.logits(model.norm(x)[:, 0]).argmax(-1)


def record(run: Callable[[], None], memory=None) -> Callable[[], None]:
    """`run` as a CUDA graph: its kernels on the memory that they use now, replayed by one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles it, and lets cuBLAS set itself up
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory):
        run()
    return graph.replay


@functools.cache
def serving_program():
    return torch.compile(Block.forward, options=IN_PLACE)


def serve_layer(layer, x: Tensor, rotary, cache, positions: Tensor, new) -> Tensor:
    """Block.forward compiled for the steps and prompts of all engines on a GPU. Programs are shared
    by the layers of a tier, and by all sizes but 1."""
    vary(x, 0, 1)
    for angles in rotary:
        vary(angles, 0, 2)
    vary_cache(cache)
    vary(positions, 0)
    if new is not None:
        vary(new, 0)
    # One sequence or many, three tiers, a step or a chunk: more programs than the limit of 8.
    with torch._dynamo.config.patch(recompile_limit=64):
        return serving_program()(layer, x, rotary, cache, positions, new)


@functools.cache
def compiled_next_tokens():
    """On a CPU, one program for all engines of a model. The weights become constants, laid out once
    as its products want them, those that share an input as one: a second copy of them in memory."""
    options = {"freezing": True, "cpp.enable_concat_linear": True}
    return torch._inductor.config.patch(options)(torch.compile(next_tokens))


def weights_version(model: Model) -> str:
    """Changes when a weight is written in place or replaced: compiled constants would be stale."""
    versions = []
    for p in model.parameters():
        versions.append((p.data_ptr(), 0 if p.is_inference() else p._version))
    return str(hash(tuple(versions)))


def join_products(model: Model) -> Model:
    """A model of the same parameters in which query, key and value are one product, and gate and up
    another: fewer kernels to launch. The given model computes as before, and notices nothing but
    that its parameters have moved."""

    def copy_of(module: nn.Module) -> nn.Module:
        new = copy.copy(module)
        children = module._modules.items()
        new._modules = {name: child and copy_of(child) for name, child in children}
        if hasattr(new, "join"):
            new.join()
        return new

    return copy_of(model)


# --- sequences in caches -----------------------------------------------------------------------


def move_sequences(source: Cache, rows: list[int], target: Cache, slots: list[int]) -> None:
    """Sequences `rows` of `source`, which has no more room, become sequences `slots` of
    `target`."""
    row = as_tensor(rows, source.positions.device)
    slot = as_tensor(slots, source.positions.device)
    target.positions[slot] = source.positions[row]
    for from_layer, to_layer in zip(source.layers, target.layers):
        for name, x in cache_tensors(from_layer).items():
            getattr(to_layer, name)[slot, :, : x.shape[2]] = x[row]


def first_sequences(cache: Cache, count: int) -> Cache:
    """The first `count` sequences, in the same memory."""
    layers = [copy.copy(layer) for layer in cache.layers]
    for layer in layers:
        for name, x in cache_tensors(layer).items():
            setattr(layer, name, x[:count])
    return Cache(layers, cache.positions[:count])


def vary(x: Tensor, *dims: int) -> None:
    """Tells torch.compile that these sizes differ from call to call. A size of 1 has a program of
    its own."""
    for dim in dims:
        if x.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(x, dim)


def vary_cache(layer) -> None:
    """`vary` for the number of sequences, and the room in a softmax cache."""
    for x in cache_tensors(layer).values():
        vary(x, *((0, 2) if isinstance(layer, SoftmaxCache) else (0,)))


def as_tensor(numbers: list[int], device: torch.device) -> Tensor:
    """[n] int64 on a device, sent there without waiting for it."""
    on_host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
