"""Draws the validation KL of healing runs against the tokens seen, with matplotlib:

    python results/curve.py OUT.svg REPORT.json...         a line for each report.json that layerboost.py wrote
"""

import json
import sys

from matplotlib import pyplot

out, *reports = sys.argv[1:]
pyplot.rcParams["svg.hashsalt"] = "layerboost"              # the same file for the same figures
pyplot.figure(figsize=(7, 4))
for report in (json.load(open(path)) for path in reports):
    tokens, kl = zip(*report["healing"]["valid"])
    plan = report["healed"]["plan"]
    pyplot.plot([max(t, 5e3) for t in tokens], kl, marker="o", markersize=3,
                label=f"{plan.count('S')} S, {plan.count('L')} L, {plan.count('X')} X, {tokens[-1]:,} tokens: KL {report['healed']['kl']:.3f}, agreement {report['healed']['agreement']:.1%}")
pyplot.xscale("log"), pyplot.ylim(0, 0.9), pyplot.grid(alpha=0.3)         # the legend lies above the curves
pyplot.xlabel("tokens seen (at the left edge: none)"), pyplot.ylabel("validation KL to the original, nats a token")
pyplot.legend(fontsize="small", title="the figures are those of the reports", title_fontsize="small")
pyplot.savefig(out, bbox_inches="tight", metadata={"Date": None})
