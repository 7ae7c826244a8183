"""What parts of a run take, in forward passes of a token: the constants of budget.py.

python results/work.py MODEL    SmolLM2, in bf16, alone on the machine; a minute
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from fit import fit_map
from measure import kl_by_position
from model import convert, load_model
from scan import window_factors


def seconds(run) -> float:
    """The median of four runs after a first one."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@torch.inference_mode()
def main() -> None:
    model = load_model(sys.argv[1], dtype=torch.bfloat16)
    vocabulary, size = model.head.shape
    layers = len(model.layers)

    def ids(sequences: int, tokens: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, (sequences, tokens))

    text = ids(1, 1024)
    token = seconds(lambda: model.hidden(text)) / text.numel()
    print(f"a pass: {1e6 * token:.0f} us a token")

    hidden = model.hidden(text)[:, ::4]
    other = hidden + 0.01 * torch.randn_like(hidden)
    judged = seconds(lambda: kl_by_position(other, hidden, model.head, model.head))
    column = 2 * vocabulary / sum(x.numel() for x in model.layers.parameters())
    softmax = judged / hidden.shape[1] / token / column - size
    print(f"SOFTMAX: {softmax:.0f} columns")

    removed = convert(model, "X" + "S" * (layers - 1), removed="linear")
    stream = [model.embed_tokens(ids(4, 512)) for _ in range(8)]
    blocks = model.layers[0], removed.layers[0]
    fitting = seconds(lambda: fit_map(*blocks, stream, stream, model.rotary(512)))
    print(f"FITTING: {layers * fitting / (32 * 512) / token:.2f} a token")

    served = model.embed_tokens(ids(1, 4096))
    weighing = seconds(lambda: window_factors(model, 3, served, 256, 4, 1024))
    print(f"WEIGHING: {layers * weighing / 4096 / token:.2f} a token")


if __name__ == "__main__":
    main()
