"""The scan: the damage done by changing the attention of each layer.

For each layer alone, X (attention removed, a linear map or nothing in its place) and L
(sliding-window linear attention) are tried, and the damage against the untouched model is measured
by

    kl       KL(base || altered) on calibration text, in nats a token
    recall   the drop in the log-probability of a passkey hidden in long text, in nats a token
    task     the drop in accuracy on a question file (the paper's benchmark degradation)

The hidden state that enters layer i does not depend on what happens in layer i. So the base's
residual streams are carried from layer to layer, and a trial starts at its own layer: half the work
of running every altered model whole.

L is tried with one window. The damage of another one, at the context that the model is to serve,
needs no trial: it follows from the error of the layer's attention (`window_factors`).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fit import BATCH, fit_map
from hub import fingerprint, read_json, require, write_json
from kernels import attend, causal_mask
from machine import Diverged, gather, rank_and_world
from measure import (
    hidden_states,
    kl_by_position,
    mean,
    pad_prompts,
    passkey_prompts,
    read_task,
    score_rows,
    task_accuracy,
    task_prompts,
)
from model import Model, convert
from terminal import progress, say
from tokenizer import Tokenizer

TASK_ITEMS = 100  # of the first question file, of the task measure
MEASURES = ("kl", "recall", "task")
TRIALS = "XL"  # the tiers that every layer is tried in
ROUNDING = "kl, in the window"  # there L sees all that S sees, so the KL is that of rounding
WINDOWS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)  # of plans, times the head size
QUERIES = 128  # on which the error of a window is measured


# --- measures of damage ------------------------------------------------------------------------


class Probe(NamedTuple):
    """One measure: the text to read, and the damage from an altered model's hidden states on it."""

    batches: list[Tensor]  # of ids [B, T]
    damage: Callable[[list[Tensor]], dict[str, float]]  # {column: damage}, 0 for none


def kl_probe(model: Model, sequences: Tensor, local: int) -> Probe:
    """Columns besides `kl`: each half of the text, early and late positions, and those before
    `local`, where L sees every token. Every fourth position is judged, since the head costs as much
    as a third of the layers."""
    every = 4
    batches = list(sequences.to(model.device).split(2))
    base = [hidden[:, ::every] for hidden in hidden_states(model, batches)]

    def damage(hiddens: list[Tensor]) -> dict[str, float]:
        parts = []
        for hidden, base_hidden in zip(hiddens, base):
            hidden = hidden[:, ::every]
            parts.append(kl_by_position(hidden, base_hidden, model.head, model.head))
        kl = torch.cat(parts)  # (sequences, T / every)

        half, quarter = len(kl) // 2, kl.shape[1] // 4
        columns = {
            "kl": kl,
            ROUNDING: kl[:, : max(1, local // every)],
            f"kl, tokens to {every * quarter}": kl[:, :quarter],
            f"kl, tokens from {2 * every * quarter}": kl[:, 2 * quarter :],
        }
        if half:
            columns |= {"kl, text 1": kl[:half], "kl, text 2": kl[half:]}
        figures = {name: float(values.mean()) for name, values in columns.items()}
        return figures | {"kl, error": stratified_error(kl[:, : 4 * quarter])}

    return Probe(batches, damage)


def stratified_error(values: Tensor) -> float:
    """The standard error of the mean of values [N, T], from how the N sequences differ in each
    quarter of their positions: that damage grows with position is no error. 0 for one sequence,
    which cannot show it."""
    quarters = values.unflatten(1, (4, -1)).mean(2)  # (N, 4)
    variance = quarters.var(0).mean() if len(values) > 1 else torch.zeros(())
    return float(variance / quarters.numel()) ** 0.5


def recall_probe(
    model: Model, tokenizer: Tokenizer, text: Tensor, prompts: dict[int, int]
) -> Probe:
    """A column besides `recall` for each context length."""
    groups = {}  # length: prompts
    for length, count in prompts.items():
        depths = tuple((i + 0.5) / count for i in range(count))
        groups[length] = passkey_prompts(tokenizer, text, length, depths, 1, seed=1)
    batches = [pad_prompts(group).to(model.device) for group in groups.values()]

    def log_likelihoods(hiddens: list[Tensor]) -> list[list[float]]:
        figures = []
        for x, group in zip(hiddens, groups.values()):
            scored = zip(score_rows(x, model.head, group), group)
            figures.append([answer.log_likelihood / len(ids) for answer, (_, ids) in scored])
        return figures

    base = log_likelihoods(hidden_states(model, batches))

    def damage(hiddens: list[Tensor]) -> dict[str, float]:
        columns = {}
        drops = []
        for length, before, after in zip(groups, base, log_likelihoods(hiddens)):
            drop = [b - a for a, b in zip(after, before)]
            columns[f"recall at {length}"] = mean(drop)
            drops += drop
        return {"recall": mean(drops), **columns}

    return Probe(batches, damage)


def task_probe(model: Model, tokenizer: Tokenizer, path: str) -> Probe:
    items = read_task(path)[:TASK_ITEMS]
    groups = task_prompts(items, tokenizer, model.config.max_position_embeddings)
    batches = [pad_prompts(group).to(model.device) for group in groups]

    def accuracy(hiddens: list[Tensor]) -> float:
        scored = [score_rows(hidden, model.head, group) for hidden, group in zip(hiddens, groups)]
        return task_accuracy(items, scored)["accuracy"]

    base = accuracy(hidden_states(model, batches))
    return Probe(batches, lambda hiddens: {"task": base - accuracy(hiddens)})


@torch.inference_mode()
def make_probes(
    model: Model,
    tokenizer: Tokenizer,
    measures: list[str],
    calibration: Tensor,
    text: Tensor,
    prompts: dict[int, int],
    tasks: list[str],
    local: int = 0,
) -> list[Probe]:
    """calibration [N, T] and text, of any shape, are ids; prompts: {length: count} of the passkeys
    hidden in the text; `task` takes the first of `tasks`; local: tokens that L sees as S does."""
    probes = []
    if "kl" in measures:
        probes.append(kl_probe(model, calibration, local))
    if "recall" in measures:
        probes.append(recall_probe(model, tokenizer, text, prompts))
    if "task" in measures:
        probes.append(task_probe(model, tokenizer, tasks[0]))
    return probes


# --- windows -----------------------------------------------------------------------------------


def window_factors(
    model: Model, layer: int, x: Tensor, window: int, sinks: int, judged: int
) -> dict[str, float]:
    """{"window w": the squared error of a layer's attention that sees w tokens and the sinks, on
    x [B, T, hidden_size], the stream that enters the layer, as a multiple of that with `window` on
    the first `judged` tokens}."""
    block = model.layers[layer]
    attention = block.self_attn
    query, key, value = attention.project(block.input_layernorm(x), model.rotary(x.shape[1]))
    i = torch.arange(x.shape[1], device=x.device)
    t = i[:: max(1, len(i) // QUERIES)]
    query = query[:, :, t]
    causal = causal_mask(t, i, attention.sliding_window)
    exact = attention.o_proj(attend(query, key, value, causal[None]).transpose(1, 2).flatten(2))

    def errors(w: int) -> Tensor:
        """By position of the queries."""
        local = (i > t[:, None] - w) | (i < sinks)
        out = attend(query, key, value, (causal & local)[None])
        changed = attention.o_proj(out.transpose(1, 2).flatten(2))
        return (changed.float() - exact.float()).square().mean((0, 2))

    rounding = 1e-5 * float(exact.float().square().mean())
    measured = float(errors(window)[t < judged].mean()) + rounding
    widths = [times * attention.config.head_dim for times in WINDOWS]
    return {f"window {w}": (float(errors(w).mean()) + rounding) / measured for w in widths}


# --- the scan ----------------------------------------------------------------------------------


@torch.inference_mode()
def scan(
    model: Model,
    probes: list[Probe],
    tiers: dict,
    path: Path,
    identity: dict,
    layers: list[dict],
    fitting: Tensor | None = None,
    served: Tensor | None = None,
    judged: int = 0,
) -> list[dict]:
    """Changes each layer alone to X and to L: [{"X": {column: damage}, "L": ...} per layer],
    several trials at a time under torchrun.

    tiers: the settings of L and X; fitting: ids [N, T] that the linear maps of X are fitted on;
    served: ids [1, T], as long as texts will be, that other windows are weighed on, against the
    damage to texts of `judged` tokens.
    Resumes after the trials in `layers`, which an earlier run has made, and writes all of them to
    `path` after each. Raises Diverged for damage that is not finite.
    """
    n = len(model.layers)
    altered = {tier: convert(model, tier * n, **tiers) for tier in TRIALS}  # a trial takes a block
    rank, world = rank_and_world()
    trials = [(i, tier) for i in range(n) for tier in TRIALS][count_trials(layers) :]
    own = trials[rank::world]  # each process takes one of the next trials
    idle = math.ceil(len(trials) / world) - len(own)  # 1 where others have one more, else 0

    layers = [dict(row) for row in layers] + [{} for _ in range(n - len(layers))]
    streams = [[model.embed_tokens(ids) for ids in probe.batches] for probe in probes]
    fitted = []  # the stream on which maps are fitted
    if fitting is not None and tiers.get("removed") == "linear":
        fitted = [model.embed_tokens(ids) for ids in fitting.to(model.device).split(BATCH)]
        rotary = model.rotary(fitting.shape[1])
    long = [] if served is None else [model.embed_tokens(served.to(model.device))]
    entered = 0  # the layer that the streams enter
    tokens = sum(ids.numel() for probe in probes for ids in probe.batches)
    last = max(own, default=(0, ""))[0]
    blocks = last + sum(n - i for i, _ in own)
    work = blocks * tokens + last * sum(x.shape[:2].numel() for x in fitted + long)
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with progress(total=work, desc="scanning", bar_format=bar_format) as bar:
        for i, tier in own + [(n, "")] * idle:
            columns = {}
            streams = [advance(model, stream, entered, i, bar) for stream in streams]
            fitted = advance(model, fitted, entered, i, bar)
            long = advance(model, long, entered, i, bar)
            entered = i
            if tier == "X" and fitted:
                fit_map(model.layers[i], altered[tier].layers[i], fitted, fitted, rotary)
            for probe, stream in zip(probes, streams if tier else ()):
                changed = advance(altered[tier], stream, i, i + 1, bar)
                ends = advance(model, changed, i + 1, n, bar)
                columns |= probe.damage([model.norm(x) for x in ends])
            for x in long if tier == "L" else ():
                columns |= window_factors(model, i, x, tiers["window"], tiers["sinks"], judged)
            if not all(map(math.isfinite, columns.values())):
                raise Diverged(f"the damage of layer {i} as {tier} is not a finite number")
            shown = " ".join(f"{k} {columns[k]:.3f}" for k in MEASURES if k in columns)
            bar.set_postfix_str(f"layer {i} of {n} as {tier}: {shown}", refresh=False)

            for layer, letter, damage in gather((i, tier, columns)):
                if damage:
                    layers[layer][letter] = damage
            if rank == 0:
                done = [row for row in layers if row]
                write_json(path, {"identity": identity, "of": n, "layers": done})
    return layers


def advance(model: Model, stream: list[Tensor], first: int, last: int, bar: tqdm) -> list[Tensor]:
    """Runs layers first..last-1 on the residual stream of each batch of a probe, [B, T, d]."""
    ends = []
    for x in stream:
        for i in range(first, last):
            x = model.run_layers(x, i, i + 1)
            bar.update(x.shape[0] * x.shape[1])
        ends.append(x)
    return ends


def count_trials(layers: list[dict]) -> int:
    return sum(map(len, layers))


def read_scan(path: Path) -> dict:
    """A scan file: {"identity": {...}, "layers": [...]}, the layers as `scan` gives them. Raises
    InputError for one that is damaged."""

    def is_column(name: str, x) -> bool:
        if type(x) not in (int, float) or not abs(x) < 1e15:  # nats
            return False
        window = name.removeprefix("window ")
        return window == name or window.isdecimal() and len(window) < 8 and x >= 0

    def is_damage(columns) -> bool:
        items = columns.items() if isinstance(columns, dict) else ()
        return bool(items) and all(is_column(*item) for item in items)

    def is_row(row) -> bool:
        return isinstance(row, dict) and TRIALS[0] in row and not set(row) - set(TRIALS)

    made = read_json(path)
    layers, identity = made.get("layers"), made.get("identity")
    rows = layers if isinstance(layers, list) and all(map(is_row, layers)) else []
    damages = [damage for row in rows for damage in row.values()]
    require(
        isinstance(identity, dict)
        and identity
        and damages
        and all(map(is_damage, damages))
        and all(len(row) == len(TRIALS) for row in rows[:-1])
        and all(row[tier].keys() == rows[0][tier].keys() for row in rows for tier in row),
        f"{path}: is no scan file, or damaged; delete it and scan again",
    )
    return made


def check_scan(path: Path, identity: dict, measures: list[str], n: int) -> list[dict]:
    """The layers that a scan file holds, the last one perhaps as X alone. One that was made on
    other text will do, and a line says so. Raises InputError naming the first other thing in which
    it differs from this run: a whole one must have the measures that are asked for, one that is to
    be gone on with no others, and the same sizes."""
    again = "scan again (leave out --scan, or give another --out)"
    made = read_scan(path)
    made["identity"].setdefault("removed", "nothing")  # as before there were linear maps
    columns = [name for name in MEASURES if name in made["layers"][0]["X"]]
    unfinished = count_trials(made["layers"]) < len(TRIALS) * n
    require(
        set(measures) <= set(columns) and not (unfinished and set(measures) < set(columns)),
        f"{path}: was measured with --measure {'+'.join(columns)}, "
        f"this run has {'+'.join(measures)}; {again}",
    )
    for key, value in identity.items():
        before = made["identity"].get(key)
        require(
            key == "data" or before == value or (key in ("sizes", "served") and not unfinished),
            f"{path}: was measured with {key} {before}, this run has {value}; {again}",
        )
    if made["identity"].get("data") != identity.get("data"):
        say(f"{path} was measured on other text than this run's; it is used all the same.")
        identity["data"] = "several texts"  # if this run goes on with it
    served, weighed = identity.get("served"), made["identity"].get("served")
    if served and isinstance(weighed, int) and served != weighed > 0:
        say(f"{path} weighed windows for texts of {weighed:,} tokens, not of {served:,}.")
    return made["layers"]


def identity_of(model: Model, text: Tensor, tiers: dict) -> dict:
    """What must be the same where a run goes on from an earlier one."""
    return {"model": fingerprint(*model.parameters()), "data": fingerprint(text), **tiers}
