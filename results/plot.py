"""Draws what bench.py measured, dense and converted, with matplotlib:

python results/plot.py OUT.svg OUTPUT [X Y]    OUTPUT: what `bench.py decode` or `serve` printed

X and Y are columns of its table, `context step_ms` unless given; of `serve`, `clients
tokens_per_second`.
"""

import json
import sys
from pathlib import Path

from matplotlib import pyplot


def main() -> None:
    if len(sys.argv) not in (3, 5):
        sys.exit(__doc__)
    out, output = sys.argv[1:3]
    x, y = sys.argv[3:] or ("context", "step_ms")
    report = json.loads(Path(output).read_text().splitlines()[-1])["report"]

    for model in ("dense", "converted"):
        points = sorted((figures[x], figures[y]) for figures in report if figures["model"] == model)
        pyplot.plot(*zip(*points, strict=True), marker="o", label=model)
    pyplot.xlabel(x)
    pyplot.ylabel(y)
    pyplot.ylim(0)
    pyplot.legend()
    pyplot.grid(alpha=0.3)
    pyplot.savefig(out, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
