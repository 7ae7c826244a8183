"""The plan: which tier each layer gets, and which window L has, from what a scan has measured.

`best_plans` finds, for every number of softmax layers (S) and of removed ones (X), the plan of the
least summed damage, exactly; of those, for all windows, `choose` picks one by a budget of damage,
speed or cache. `plan_paper` ranks layers by their X column alone (arXiv 2604.22050).
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from hub import require
from measure import mean, standard_error
from model import Model, cache_bytes, convert
from roofline import floor_seconds, plan_costs
from scan import MEASURES, ROUNDING

SPEEDUPS = (1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0, 4.0)  # of the plans that are shown


# --- what a layer costs -------------------------------------------------------------------------


def windows_of(layers: list[dict]) -> list[int]:
    """The windows whose damage a scan tells (`scan.window_factors`)."""
    names = [name for name in layers[0].get("L", {}) if name.startswith("window ")]
    return [int(name.removeprefix("window ")) for name in names]


def window_factor(columns: dict[str, float], measure: str, window: int | None) -> float:
    """How many times the damage that was measured L would do with another window. KL goes with the
    squared error of the layer's output, since its gradient is zero where nothing is changed; the
    log-likelihood of an answer scales with the error itself (results/windows.py)."""
    squared = columns.get(f"window {window}", 1.0)
    return squared if measure == "kl" else squared**0.5


def damages_of(layers: list[dict], window: int | None = None) -> list[dict[str, dict[str, float]]]:
    """Per layer {tier: {measure: damage}}, less noise and at least zero. The noise of KL is
    rounding, from computing the same attention in another order: in bfloat16 a fifth of L's column,
    and all of it in some layers. That of recall, on a few prompts, exceeds most layers' KL.
    window: of L, one of `windows_of`; None for the one that the scan tried."""
    by_tier = recall_noise(layers)
    damages = []
    for row in layers:
        damage: dict = {}
        for tier, columns in row.items():
            noise = {"kl": row["L"].get(ROUNDING, 0.0), "recall": by_tier[tier]}
            damage[tier] = {
                name: window_factor(columns, name, window)
                * max(0.0, columns[name] - noise.get(name, 0.0))
                for name in MEASURES
                if name in columns
            }
        damages.append(damage)
    return damages


def costs_of(
    layers: list[dict], measures: list[str], window: int | None = None
) -> list[dict[str, float]]:
    """Per layer the damage of each tier, none for S: the sum of the chosen measures."""
    costs = []
    for damage in damages_of(layers, window):
        sums = {tier: sum(by_measure[x] for x in measures) for tier, by_measure in damage.items()}
        costs.append({"S": 0.0} | sums)
    return costs


def recall_noise(layers: list[dict]) -> dict[str, float]:
    """The standard deviation of recall's noise, by tier. Damage lowers recall and noise goes both
    ways, so the layers whose change raised recall show how large it is."""
    noise = {}
    for tier in layers[0]:
        gains = [row[tier]["recall"] for row in layers if row[tier].get("recall", 0.0) < 0]
        noise[tier] = mean(gain**2 for gain in gains) ** 0.5 if gains else 0.0
    return noise


# --- planners ----------------------------------------------------------------------------------


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
    programming over the layers: best[s, x] is the cheapest way to give those so far s S and x X,
    and any other tiers to the rest."""
    best = {(0, 0): (0.0, "")}
    for cost in costs:
        longer: dict = {}
        for (s, x), (total, plan) in best.items():
            for tier, damage in cost.items():
                state = (s + (tier == "S"), x + (tier == "X"))
                candidate = (total + damage, plan + tier)
                longer[state] = min(longer.get(state, (math.inf, "")), candidate)
        best = longer
    return best


def plan_tier(costs: list[dict], keep: int, drop: int) -> str:
    """The plan with `keep` S and `drop` X of the least summed damage."""
    return best_plans(costs)[keep, drop][1]


class Choice(NamedTuple):
    """A plan, its window, and what is predicted of them."""

    plan: str
    window: int  # of its L layers
    damage: float  # the sum over its layers, before healing
    speedup: float  # of a decoding step, at the floor that roofline.py counts
    cache: float  # bytes of a sequence's cache, as a share of the original's


def price_plans(
    model: Model, costs: dict[int, list[dict]], tiers: dict, workload, hardware
) -> list[Choice]:
    """Of each window and split the plan of the least damage. costs: {window: those of `costs_of`};
    workload: (sequences, tokens that each holds).

    What a step costs depends on how many layers have each tier alone, since layers are alike: so
    the best plans of all splits contain the best plan of any budget."""

    def cost_of(plan: str, window: int) -> tuple[float, float]:
        """Seconds of a step, and bytes of the caches."""
        config = replace(model.config, plan=plan, **tiers | {"window": window})
        parts = plan_costs(config, model.norm.weight.element_size(), *workload)
        cache = parts["softmax cache"][0] + parts["window"][0] + parts["state"][0] / 2
        return floor_seconds(parts, hardware), cache

    seconds, cache = cost_of("S" * len(model.layers), 0)
    choices = []
    for window, its_costs in costs.items():
        for damage, plan in best_plans(its_costs).values():
            plan_seconds, plan_cache = cost_of(plan, window)
            gain = seconds / plan_seconds, plan_cache / cache
            choices.append(Choice(plan, window, damage, *gain))
    return choices


def choose(choices: list[Choice], budget: str, limit: float) -> Choice:
    """The plan of least damage that is `limit` times as fast (budget "speedup") or keeps at most
    that share of the cache ("cache"), or the fastest plan of at most that "damage". Raises
    InputError if there is none."""
    if budget == "damage":
        fits = [choice for choice in choices if choice.damage <= limit]
        return max(fits, key=lambda choice: (choice.speedup, -choice.damage))

    if budget == "speedup":
        best = max(choice.speedup for choice in choices)
        fits = [choice for choice in choices if choice.speedup >= limit]
    else:
        best = min(choice.cache for choice in choices)
        fits = [choice for choice in choices if choice.cache <= limit]
    require(
        fits,
        f"--{budget} {limit:g}: no plan goes beyond {best:.2f} at this --workload; "
        "give that, or a longer context",
    )
    return min(fits, key=lambda choice: (choice.damage, -choice.speedup))


# --- what is shown -----------------------------------------------------------------------------


def chart(layers: list[dict], measures: list[str], plan: str, window: int | None = None) -> str:
    """Bars of the damage by layer as the planner counts it, on a logarithmic scale since it spans
    three decades, with standard errors."""
    low = 1e-3
    costs = costs_of(layers, measures, window)
    damages = damages_of(layers, window)
    high = max(max(cost["X"], cost["L"]) for cost in costs) + 2 * low

    def bar(i: int, tier: str) -> str:
        cost, columns = costs[i][tier], layers[i][tier]
        length = 15 * math.log(max(cost, low) / low) / math.log(high / low)
        heard = "recall" in measures and damages[i][tier]["recall"] > 0
        error = damage_error(columns, heard, window)
        shown = f"±{error:.4f}" if error else ""
        return f"{'█' * int(length):15} {cost:8.4f}{shown:8}"

    measured = " + ".join(measures)
    lines = [
        f"damage of changing one layer alone, {measured} (logarithmic bars, {low:g} to {high:.2g})",
        f"layer  {'attention removed (X)':34}{'window and linear tail (L)':34}plan",
    ]
    lines += [f"{i:5}  {bar(i, 'X')}  {bar(i, 'L')}  {tier}" for i, tier in enumerate(plan)]

    rounding = mean(row["L"].get(ROUNDING, 0.0) for row in layers)
    if "kl" in measures and rounding > low / 10:
        lines.append(f"KL counts beyond what rounding does, {rounding:.4f} nats a layer")
    if "recall" in measures:
        noise = recall_noise(layers).items()
        beyond = " and ".join(f"{nats:.3f} ({tier})" for tier, nats in noise)
        lines.append(f"recall counts beyond its noise, {beyond} nats")
    return "\n".join(lines)


def damage_error(columns: dict[str, float], heard: bool, window: int | None = None) -> float:
    """The standard error of a damage, as far as the scan can tell: that of recall, if it counts
    (`heard`), from how the context lengths differ, each a draw of prompts."""
    error = window_factor(columns, "kl", window) * columns.get("kl, error", 0.0)
    if heard:
        by_length = [value for name, value in columns.items() if name.startswith("recall at")]
        factor = window_factor(columns, "recall", window)
        error = math.hypot(error, factor * standard_error(torch.tensor(by_length)))
    return error


def frontier_chart(choices: list[Choice], plan: str, window: int, title: str) -> str:
    """A line for the plan of least damage at each of SPEEDUPS, and one for the chosen plan."""
    fastest = max(choice.speedup for choice in choices)
    shown = {choose(choices, "speedup", least) for least in SPEEDUPS if least <= fastest}
    shown |= {choice for choice in choices if (choice.plan, choice.window) == (plan, window)}
    shown = sorted(shown, key=lambda choice: choice.speedup)

    most = max(choice.damage for choice in shown) or 1.0
    lines = [title, "speedup  cache   S  L  X  window   damage"]
    for choice in shown:
        letters = "".join(f"{choice.plan.count(tier):3}" for tier in "SLX")
        bar = "█" * round(24 * choice.damage / most)
        mark = "  <- plan" if (choice.plan, choice.window) == (plan, window) else ""
        line = f"{choice.speedup:7.2f} {choice.cache:6.2f} {letters} {choice.window:7,}"
        lines.append(f"{line} {choice.damage:8.3f}  {bar}{mark}")
    return "\n".join(lines)


def describe_plan(
    model: Model, plan: str, tiers: dict, layers: list[dict], measures: list[str]
) -> list[str]:
    """The predicted cost of a plan before healing, if there is a scan, and what it saves."""
    lines = []
    if layers:
        damages = damages_of(layers, tiers["window"])
        changed = [damage[tier] for damage, tier in zip(damages, plan) if tier != "S"]
        sums = [f"{name} {sum(damage[name] for damage in changed):.3f}" for name in measures]
        lines.append(f"  predicted before healing, as the sum over its layers: {', '.join(sums)}")

    before = cache_bytes(model, 8192) / 2**20
    after = cache_bytes(convert(model, plan, **tiers), 8192) / 2**20
    lines.append(
        f"  {plan.count('S')} softmax, {plan.count('L')} sliding-window linear (window "
        f"{tiers['window']:,}), {plan.count('X')} removed; cache of a sequence at 8k tokens "
        f"{after:.1f} MiB, was {before:.1f} MiB"
    )
    return lines
