"""Draws the validation KL of healing runs against the tokens seen, with matplotlib:

python results/curve.py OUT.svg REPORT.json...    a line for each report of layerboost.py
"""

import json
import sys
from pathlib import Path

from matplotlib import pyplot


def add_line(report: dict) -> None:
    healed = report["healed"]
    tokens, kl = zip(*report["healing"]["valid"], strict=True)
    counts = ", ".join(f"{healed['plan'].count(tier)} {tier}" for tier in "SLX")
    figures = f"KL {healed['kl']:.3f}, agreement {healed['agreement']:.1%}"
    label = f"{counts}, {tokens[-1]:,} tokens: {figures}"
    shown = [max(count, 5e3) for count in tokens]  # a logarithmic axis has no 0
    pyplot.plot(shown, kl, marker="o", markersize=3, label=label)


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out, *paths = sys.argv[1:]

    pyplot.rcParams["svg.hashsalt"] = "layerboost"  # the same file for the same figures
    pyplot.figure(figsize=(7, 4))
    for path in paths:
        add_line(json.loads(Path(path).read_text()))
    pyplot.xscale("log")
    pyplot.ylim(0, 0.9)  # the legend lies above the curves
    pyplot.grid(alpha=0.3)
    pyplot.xlabel("tokens seen (at the left edge: none)")
    pyplot.ylabel("validation KL to the original, nats a token")
    title = "the figures are those of the reports"
    pyplot.legend(fontsize="small", title=title, title_fontsize="small")
    pyplot.savefig(out, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
