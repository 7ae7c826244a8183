"""How alike the rankings of the layers are that a scan's columns give:

    python results/ranks.py SCAN.json

Spearman's correlation between measures, between the two halves of the text, early and late
positions, short and long contexts, and X and L: 1 the same order, 0 unrelated. Prints JSON.
"""

import itertools
import json
import sys
from pathlib import Path

import torch

MEASURES = ("kl", "recall", "task")


def rank_agreements(layers: list[dict]) -> dict[str, float]:
    """{"kl against recall (X)": correlation} of the `layers` of a scan."""
    names = list(layers[0]["X"])
    measured = [name for name in MEASURES if name in names]
    pairs = list(itertools.combinations(measured, 2))
    for kind in ("kl, text", "kl, tokens", "recall at"):
        group = [name for name in names if name.startswith(kind)]
        if len(group) > 1:
            pairs.append((group[0], group[-1]))

    def column(tier: str, name: str) -> list[float]:
        return [row[tier][name] for row in layers]

    agreements = {}
    for a, b in pairs:
        for tier in "XL":
            agreements[f"{a} against {b} ({tier})"] = spearman(column(tier, a), column(tier, b))
    for name in measured:
        agreements[f"X against L by {name}"] = spearman(column("X", name), column("L", name))
    return agreements


def spearman(a: list[float], b: list[float]) -> float:
    """The correlation of two rankings; ties share their mean rank."""
    ranks = []
    for values in (torch.tensor(a), torch.tensor(b)):
        below = (values[:, None] > values).sum(1)
        same = (values[:, None] == values).sum(1)
        ranks.append(below + (same - 1) / 2)
    return float(torch.nan_to_num(torch.corrcoef(torch.stack(ranks)))[0, 1])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    scan = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(rank_agreements(scan["layers"]), indent=1))
