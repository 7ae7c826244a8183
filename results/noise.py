"""How much of recall should count, when a few prompts measured it?

    python results/noise.py [SCAN.json ...]

Plans made from small scans by four rules, judged by another scan of the same model that has other
text and other prompts (sensitivity/scan.json): so a plan that noise chose looks no better than it
is. Prints KL and recall summed over the layers of each plan, and the nats that count as noise.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import planner
import scan
from measure import mean, standard_error
from terminal import format_table

RESULTS = Path(__file__).resolve().parent
SCANS = [RESULTS / name / "scan.json" for name in ("smollm2-maps", "smollm2-default")]
SCANS += sorted((RESULTS / "noise").glob("*.json"))
SPLITS = ((12, 0), (8, 0), (11, 2), (8, 6))


def spread_of_lengths(layers: list[dict]) -> list[dict[str, float]]:
    """Per layer the standard error of its recall, from how its context lengths differ."""
    errors = []
    for row in layers:
        by_tier = {}
        for tier, columns in row.items():
            lengths = [value for name, value in columns.items() if name.startswith("recall at")]
            by_tier[tier] = standard_error(torch.tensor(lengths))
        errors.append(by_tier)
    return errors


def median_size(layers: list[dict]) -> dict[str, float]:
    """Of a tier: the standard deviation that the median size of recall would be of."""
    sizes = {tier: [abs(row[tier]["recall"]) for row in layers] for tier in scan.TRIALS}
    return {tier: statistics.median(values) / 0.6745 for tier, values in sizes.items()}


RULES = {
    "all of it": lambda layers: [dict.fromkeys(scan.TRIALS, 0.0)] * len(layers),
    "beyond its own standard error": spread_of_lengths,
    "beyond the median size": lambda layers: [median_size(layers)] * len(layers),
    "beyond the size of gains (the program's)": lambda layers: (
        [planner.recall_noise(layers)] * len(layers)
    ),
}


def judged(columns: dict[str, float]) -> tuple[float, float]:
    """KL on text, and recall to 2,048 tokens, of one trial of the judging scan."""
    kl = [x for name, x in columns.items() if name.startswith(("textbooks", "novels"))]
    recall = [x for name, x in columns.items() if name.startswith(("recall at 512", "recall at 2"))]
    return mean(kl), mean(recall)


def main() -> None:
    judge = scan.read_scan(RESULTS / "sensitivity" / "scan.json")["layers"]
    rows = [["scan", "recall counts", *(f"{s} S, {x} X: KL, recall" for s, x in SPLITS)]]
    for path in [Path(name).resolve() for name in sys.argv[1:]] or SCANS:
        layers = scan.read_scan(path)["layers"]
        for name, rule in RULES.items():
            costs = []
            for row, noise in zip(layers, rule(layers)):
                cost = {"S": 0.0}
                for tier in scan.TRIALS:
                    damage = row[tier]
                    cost[tier] = damage["kl"] + max(0.0, damage["recall"] - noise[tier])
                costs.append(cost)
            best = planner.best_plans(costs)
            cells = [str(path.relative_to(RESULTS)), name]
            for split in SPLITS:
                changed = zip(judge, best[split][1])
                damages = [judged(row[tier]) for row, tier in changed if tier != "S"]
                kl, recall = map(sum, zip(*damages))
                cells.append(f"{kl:.3f}, {recall:+.2f}")
            rows.append(cells)
    print(format_table(rows))


if __name__ == "__main__":
    main()
