"""The scan and the plan: how much each layer suffers when its attention is changed, and which tier
each layer gets.

For each layer alone, X (attention removed, a linear map or nothing in its place) and L
(sliding-window linear attention) are tried, and the damage against the untouched model is measured
by

    kl       KL(base || altered) on calibration text, in nats a token
    recall   the drop in the log-probability of a passkey hidden in long text, in nats
    task     the drop in accuracy on a question file (the paper's benchmark degradation)

The hidden state that enters layer i does not depend on what happens in layer i. So the base's
residual streams are carried from layer to layer, and a trial starts at its own layer: half the work
of running every altered model whole.

`best_plans` finds, for every number of softmax layers (S) and of removed ones (X), the plan of the
least summed damage, exactly; `frontier` keeps those that no other beats in damage and in speed or
cache, so a budget of any of the three picks one. `plan_paper` ranks layers by their X column alone
(arXiv 2604.22050).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fit import BATCH, fit_map
from hub import fingerprint, read_json, require, write_json
from machine import Diverged, gather, rank_and_world
from measure import (
    hidden_states,
    kl_by_position,
    mean,
    pad_prompts,
    passkey_prompts,
    read_task,
    score_rows,
    standard_error,
    task_accuracy,
    task_prompts,
)
from model import Model, cache_bytes, convert
from roofline import floor_seconds, plan_costs
from terminal import progress, say
from tokenizer import Tokenizer

TASK_ITEMS = 100  # of the first question file, of the task measure
MEASURES = ("kl", "recall", "task")
TRIALS = "XL"  # the tiers that every layer is tried in
SPEEDUPS = (1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0, 4.0)  # that the frontier shows


# --- measures of damage ------------------------------------------------------------------------


class Probe(NamedTuple):
    """One measure: what is read, and what to make of an altered model's hidden states on it."""

    batches: list[Tensor]  # of ids [B, T]
    damage: Callable[[list[Tensor]], dict[str, float]]  # {column: damage}, 0 for none


def kl_probe(model: Model, sequences: Tensor) -> Probe:
    """Columns besides `kl`: either half of the text, early and late positions. Every fourth
    position is judged, since the head costs as much as a third of the layers."""
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
    quarter of their positions: damage grows with position, which is no error. 0 for one sequence,
    which tells nothing about it."""
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
        scored = [score_rows(x, model.head, group) for x, group in zip(hiddens, groups.values())]
        return [[answer.log_likelihood for answer in group] for group in scored]

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
) -> list[Probe]:
    """calibration [N, T] and text, of any shape, are ids; prompts: {length: count} of the passkeys
    hidden in the text; `task` takes the first of `tasks`."""
    probes = []
    if "kl" in measures:
        probes.append(kl_probe(model, calibration))
    if "recall" in measures:
        probes.append(recall_probe(model, tokenizer, text, prompts))
    if "task" in measures:
        probes.append(task_probe(model, tokenizer, tasks[0]))
    return probes


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
) -> list[dict]:
    """Changes each layer alone to X and to L: [{"X": {column: damage}, "L": ...} per layer],
    several trials at a time under torchrun.

    tiers: the settings of L and X; fitting: ids [N, T] that the linear maps of X are fitted on.
    Goes on after the trials in `layers`, which an earlier run has made, and writes all of them to
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
    entered = 0  # the layer that the streams enter
    tokens = sum(ids.numel() for probe in probes for ids in probe.batches)
    last = max(own, default=(0, ""))[0]
    blocks = last + sum(n - i for i, _ in own)
    work = blocks * tokens + last * sum(x.shape[:2].numel() for x in fitted)
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with progress(total=work, desc="scanning", bar_format=bar_format) as bar:
        for i, tier in own + [(n, "")] * idle:
            columns = {}
            streams = [advance(model, stream, entered, i, bar) for stream in streams]
            fitted = advance(model, fitted, entered, i, bar)
            entered = i
            if tier == "X" and fitted:
                fit_map(model.layers[i], altered[tier].layers[i], fitted, fitted, rotary)
            for probe, stream in zip(probes, streams if tier else ()):
                changed = advance(altered[tier], stream, i, i + 1, bar)
                ends = advance(model, changed, i + 1, n, bar)
                columns |= probe.damage([model.norm(x) for x in ends])
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

    def is_damage(columns) -> bool:
        numbers = columns.values() if isinstance(columns, dict) else ()
        return bool(numbers) and all(type(x) in (int, float) and abs(x) < 1e30 for x in numbers)

    def is_row(row) -> bool:
        return isinstance(row, dict) and "X" in row and not set(row) - {"X", "L"}

    made = read_json(path)
    layers, identity = made.get("layers"), made.get("identity")
    rows = layers if isinstance(layers, list) and all(map(is_row, layers)) else []
    damages = [damage for row in rows for damage in row.values()]
    require(
        isinstance(identity, dict)
        and identity
        and damages
        and all(map(is_damage, damages))
        and all(damage.keys() == damages[0].keys() for damage in damages)
        and all(len(row) == 2 for row in rows[:-1]),
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
            key == "data" or before == value or (key == "sizes" and not unfinished),
            f"{path}: was measured with {key} {before}, this run has {value}; {again}",
        )
    if made["identity"].get("data") != identity.get("data"):
        say(f"{path} was measured on other text than this run's; it is used all the same.")
        identity["data"] = "several texts"  # if this run goes on with it
    return made["layers"]


def identity_of(model: Model, text: Tensor, tiers: dict) -> dict:
    """What must be the same where a run goes on from an earlier one."""
    return {"model": fingerprint(*model.parameters()), "data": fingerprint(text), **tiers}


# --- planners ----------------------------------------------------------------------------------


def costs_of(layers: list[dict], measures: list[str]) -> list[dict[str, float]]:
    """Per layer the damage of each tier, none for S: the sum of the chosen measures, none of them
    below zero. Of recall counts what is beyond its noise, which on a few prompts is larger than the
    KL of most layers."""
    noise = recall_noise(layers)
    costs = []
    for row in layers:
        cost = {"S": 0.0}
        for tier in "LX":
            damage = dict(row[tier])
            if "recall" in damage:
                damage["recall"] -= noise[tier]
            cost[tier] = sum(max(0.0, damage[name]) for name in measures)
        costs.append(cost)
    return costs


def recall_noise(layers: list[dict]) -> dict[str, float]:
    """The standard deviation of recall's noise, by tier. Damage lowers recall and noise goes both
    ways, so the layers without which passkeys came out likelier show how large it is."""
    noise = {}
    for tier in TRIALS:
        gains = [row[tier]["recall"] for row in layers if row[tier].get("recall", 0.0) < 0]
        noise[tier] = mean(gain**2 for gain in gains) ** 0.5 if gains else 0.0
    return noise


def plan_paper(costs: list[dict], keep: int, drop: int) -> str:
    """Three bands by the X column: the `keep` most sensitive stay S, the `drop` least become X."""
    order = sorted(range(len(costs)), key=lambda i: costs[i]["X"])
    plan = ["L"] * len(costs)
    for i in order[len(order) - keep :]:
        plan[i] = "S"
    for i in order[:drop]:
        plan[i] = "X"
    return "".join(plan)


def best_plans(costs: list[dict]) -> dict[tuple[int, int], tuple[float, str]]:
    """{(S layers, X layers): (damage, plan)} of the least summed damage for every split, by dynamic
    programming over the layers: best[s, x] is the cheapest way to give those so far s S and x X."""
    best = {(0, 0): (0.0, "")}
    for cost in costs:
        longer: dict = {}
        for (s, x), (total, plan) in best.items():
            for tier, state in (("S", (s + 1, x)), ("L", (s, x)), ("X", (s, x + 1))):
                candidate = (total + cost[tier], plan + tier)
                longer[state] = min(longer.get(state, (math.inf, "")), candidate)
        best = longer
    return best


def plan_tier(costs: list[dict], keep: int, drop: int) -> str:
    """The plan with `keep` S and `drop` X of the least summed damage."""
    return best_plans(costs)[keep, drop][1]


PLANNERS = {"tier": plan_tier, "paper": plan_paper}


class Choice(NamedTuple):
    """A plan and what is predicted of it."""

    plan: str
    damage: float  # the sum over its layers, before healing
    speedup: float  # of a decoding step, at the floor that roofline.py counts
    cache: float  # bytes of a sequence's cache, as a share of the original's

    @property
    def gain(self) -> dict[str, float]:
        return {"speedup": self.speedup, "cache": -self.cache}


def price_plans(model: Model, costs: list[dict], tiers: dict, workload, hardware) -> list[Choice]:
    """Of each split the plan of the least damage. workload: (sequences, tokens that each holds).

    What a step costs depends on how many layers have each tier alone, since layers are alike: so
    the best plans of all splits contain the best plan of any budget."""

    def cost_of(plan: str) -> tuple[float, float]:
        """Seconds of a step, and bytes of the caches."""
        config = replace(model.config, plan=plan, **tiers)
        parts = plan_costs(config, model.norm.weight.element_size(), *workload)
        cache = parts["softmax cache"][0] + parts["window"][0] + parts["state"][0] / 2
        return floor_seconds(parts, hardware), cache

    seconds, cache = cost_of("S" * len(costs))
    choices = []
    for damage, plan in best_plans(costs).values():
        plan_seconds, plan_cache = cost_of(plan)
        choices.append(Choice(plan, damage, seconds / plan_seconds, plan_cache / cache))
    return choices


def frontier(choices: list[Choice], by: str = "speedup") -> list[Choice]:
    """Those that no other beats in damage and in `by`, "speedup" or "cache"; least damage first."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.damage, -choice.gain[by])):
        if not kept or choice.gain[by] > kept[-1].gain[by]:
            kept.append(choice)
    return kept


def choose(choices: list[Choice], budget: str, limit: float) -> Choice:
    """The plan of the least damage that is `limit` times as fast (budget "speedup") or keeps at
    most that share of the cache ("cache"), or the fastest of at most that "damage". Raises
    InputError where none is."""
    if budget == "damage":
        return [choice for choice in frontier(choices) if choice.damage <= limit][-1]

    front = frontier(choices, budget)
    limit = -limit if budget == "cache" else limit
    enough = [choice for choice in front if choice.gain[budget] >= limit]
    best = abs(front[-1].gain[budget])
    require(
        enough,
        f"--{budget} {abs(limit):g}: no plan goes beyond {best:.2f} at this --workload; "
        "give that, or a longer context",
    )
    return enough[0]


# --- what is shown -----------------------------------------------------------------------------


def chart(layers: list[dict], measures: list[str], plan: str) -> str:
    """Bars of the damage by layer as the planner counts it, on a logarithmic scale since it spans
    three decades, with standard errors."""
    low = 1e-3
    costs = costs_of(layers, measures)
    high = max(max(cost["X"], cost["L"]) for cost in costs) + 2 * low

    def bar(cost: float, columns: dict[str, float]) -> str:
        length = 15 * math.log(max(cost, low) / low) / math.log(high / low)
        error = damage_error(columns, cost)
        shown = f"±{error:.4f}" if error else ""
        return f"{'█' * int(length):15} {cost:8.4f}{shown:8}"

    measured = " + ".join(measures)
    lines = [
        f"damage of changing one layer alone, {measured} (logarithmic bars, {low:g} to {high:.2g})",
        f"layer  {'attention removed (X)':34}{'window and linear tail (L)':34}plan",
    ]
    for i, (cost, row, tier) in enumerate(zip(costs, layers, plan)):
        lines.append(f"{i:5}  {bar(cost['X'], row['X'])}  {bar(cost['L'], row['L'])}  {tier}")
    if "recall" in measures:
        beyond = " and ".join(
            f"{noise:.3f} ({tier})" for tier, noise in recall_noise(layers).items()
        )
        lines.append(f"recall counts beyond its noise, {beyond} nats")
    return "\n".join(lines)


def damage_error(columns: dict[str, float], cost: float) -> float:
    """The standard error of a damage of which `cost` counts, as far as the scan tells: of recall,
    where it counts, from how the context lengths differ, each a draw of prompts."""
    error = columns.get("kl, error", 0.0)
    if cost > max(0.0, columns.get("kl", 0.0)):
        by_length = [value for name, value in columns.items() if name.startswith("recall at")]
        error = math.hypot(error, standard_error(torch.tensor(by_length)))
    return error


def frontier_chart(choices: list[Choice], chosen: str, title: str) -> str:
    """A line for the plan of least damage at each of SPEEDUPS, and one for the plan chosen."""
    front = frontier(choices)
    shown = [next((c for c in front if c.speedup >= least), None) for least in SPEEDUPS]
    shown += [choice for choice in choices if choice.plan == chosen]
    shown = sorted({choice for choice in shown if choice}, key=lambda choice: choice.speedup)

    most = max(choice.damage for choice in shown) or 1.0
    lines = [title, "speedup  cache   S  L  X   damage"]
    for choice in shown:
        letters = "".join(f"{choice.plan.count(tier):3}" for tier in "SLX")
        bar = "█" * round(24 * choice.damage / most)
        mark = "  <- plan" if choice.plan == chosen else ""
        line = f"{choice.speedup:7.2f} {choice.cache:6.2f} {letters} {choice.damage:8.3f}  {bar}"
        lines.append(line + mark)
    return "\n".join(lines)


def describe_plan(
    model: Model, plan: str, tiers: dict, layers: list[dict], measures: list[str]
) -> list[str]:
    """What a plan is predicted to cost before healing, where there is a scan, and what it saves."""
    lines = []
    if layers:
        changed = [(row[tier], tier) for row, tier in zip(layers, plan) if tier != "S"]
        sums = [f"{name} {sum(row[name] for row, _ in changed):.3f}" for name in measures]
        lines.append(f"  predicted before healing, as the sum over its layers: {', '.join(sums)}")

    before = cache_bytes(model, 8192) / 2**20
    after = cache_bytes(convert(model, plan, **tiers), 8192) / 2**20
    lines.append(
        f"  {plan.count('S')} softmax, {plan.count('L')} sliding-window linear, {plan.count('X')} "
        f"removed; cache of a sequence at 8k tokens {after:.1f} MiB, was {before:.1f} MiB"
    )
    return lines
