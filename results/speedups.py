"""What `--speedup` promises on this machine, and what a decoding step then gains:

    python results/speedups.py MODEL SCAN.json [16x4096]

Plans of the least damage for speedups of 1.3, 1.7 and 2.2, predicted for this machine, run in turn
with the original, all eagerly. Prints a table, and one JSON document.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import planner
import scan
from bench import decode_times, print_figures
from engine import Engine
from layerboost import workload
from machine import pick_dtype
from measure import quantile
from model import convert, load_model
from roofline import measure_hardware

SPEEDUPS = (1.3, 1.7, 2.2)


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    batch, context = workload((sys.argv[3:] or ["16x4096"])[0])
    dtype = getattr(torch, pick_dtype("cpu"))
    model = load_model(sys.argv[1], dtype=dtype)
    made = scan.read_scan(Path(sys.argv[2]))
    names = ("window", "sinks", "feature_map", "removed")
    tiers = {name: made["identity"][name] for name in names}

    hardware = measure_hardware("cpu", dtype)
    costs = {
        window: planner.costs_of(made["layers"], ["kl", "recall"], window)
        for window in planner.windows_of(made["layers"]) or [tiers["window"]]
    }
    choices = planner.price_plans(model, costs, tiers, (batch, context), hardware)
    chosen = {f"{x:g}": planner.choose(choices, "speedup", x) for x in SPEEDUPS}

    models = {"original": model}
    models |= {
        name: convert(model, choice.plan, **tiers | {"window": choice.window})
        for name, choice in chosen.items()
    }
    engines = {name: Engine(each, batch, context) for name, each in models.items()}
    times = decode_times(engines, context)
    dense = quantile(times["original"], 0.5)
    rows = []
    for name, seconds in times.items():
        step = quantile(seconds, 0.5)
        row = {"asked": name, "step_ms": 1e3 * step, "measured": dense / step}
        row["quartiles_ms"] = [1e3 * quantile(seconds, q) for q in (0.25, 0.75)]
        choice = chosen.get(name, planner.Choice(model.plan, 0, 0.0, 1.0, 1.0))
        rows.append(row | choice._asdict())
    rates = f"{hardware.bandwidth / 1e9:.1f} GB/s, {hardware.rate / 1e12:.2f} Tflop/s"
    print(f"{batch} x {context}, {rates}")
    print_figures(rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
