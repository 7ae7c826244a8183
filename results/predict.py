"""What a plan can gain, before anything is run: tokens/s at the floor that roofline.py counts, of
the original and of the plan.

    python results/predict.py llama3.1-8b --plan uniform:L --hardware a10,h100

decode: steps of sequences at the full context; served: requests whose context is half prompt, half
output. As many sequences as clients, or as fit into the memory. The last line is one JSON document.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from bench import add_gains, counts, print_figures
from config import parse_plan
from hub import require
from model import Model, convert, load_model
from roofline import (
    HARDWARE,
    Hardware,
    fitting_slots,
    floor_seconds,
    measure_hardware,
    serving_floor,
    step_costs,
)
from shapes import SHAPES, build_shape
from terminal import run_program

MEMORY = {"a10": 24e9, "h100": 80e9}  # bytes


def predict(model: Model, clients: int, context: int, hardware: Hardware, memory: float) -> dict:
    half = max(1, context // 2)
    slots = fitting_slots(model, context, memory, clients)
    return {
        "slots": slots,
        "decode": slots / floor_seconds(step_costs(model, slots, context), hardware),
        "served": serving_floor(model, half, half, slots, hardware),
    }


def predict_pair(models: dict[str, Model], args, hardware: Hardware, memory: float) -> list:
    """A row for each number of clients, context and model."""
    rows = []
    for clients, context in itertools.product(args.concurrency, args.lengths):
        for name, model in models.items():
            row = {"clients": clients, "context": context, "model": name}
            rows.append(row | predict(model, clients, context, hardware, memory))
    add_gains(rows, "decode")
    add_gains(rows, "served", "served_gain")
    return rows


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help=f"a folder or Hub id, or one of {', '.join(SHAPES)}")
    add("--plan", default="uniform:L", help="[%(default)s]")
    add("--window", type=int, default=64, help="[%(default)s]")
    add("--sinks", type=int, default=4, help="[%(default)s]")
    add("--hardware", default="a10,h100", help="some of a10, h100, this (its CPU) [%(default)s]")
    add("--lengths", type=counts, default="512,2048,8192", help="[%(default)s]")
    add("--concurrency", type=counts, default="50,100,200", help="clients [%(default)s]")
    args = parser.parse_args(argv)

    dtype = torch.bfloat16
    if args.model in SHAPES:
        dense = build_shape(args.model, dtype, "meta")
    else:
        dense = load_model(args.model, dtype=dtype)
    plan = parse_plan(args.plan, len(dense.layers))
    models = {"dense": dense, "converted": convert(dense, plan, args.window, args.sinks)}

    report = {}
    for name in args.hardware.split(","):
        if name == "this":
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            hardware = measure_hardware("cpu", dtype)
        else:
            known = ", ".join(HARDWARE)
            require(name in HARDWARE, f"--hardware {name}: give some of {known}, this")
            hardware, memory = HARDWARE[name], MEMORY[name]
        print(
            f"\n{name}: {hardware.bandwidth / 1e9:,.0f} GB/s, {hardware.rate / 1e12:,.2f} Tflop/s, "
            f"{memory / 1e9:,.0f} GB"
        )
        report[name] = predict_pair(models, args, hardware, memory)
        print_figures(report[name])
    print(json.dumps(vars(args) | {"report": report}))


if __name__ == "__main__":
    sys.exit(run_program("predict", main))
