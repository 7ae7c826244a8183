"""What the parts of the L layers are worth in a healed model:

    python results/tail.py MODEL --base DIR --valid FILE [--off tail window sinks fade]

Reads sequences of 8,192 tokens (or what the model was made for) and gives KL to the base and top-1
agreement by position, with the model as it is and with the tail, the window, the sinks or the
tail's fade of all its L layers off; passkey recall with the same; and for each L layer the share of
the attention's weight that goes to the tail, by position in the first sequence, averaged over
heads. The last line is one JSON document.
"""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from measure import RECALL_DEPTHS, compare_by_position, passkey_recall
from model import Model, load_model
from terminal import format_table
from text import pack_sequences, read_documents
from tokenizer import load_tokenizer

EDGES = (0, 1024, 2048, 4096, 8192)


def tail_share(query, key, value, phi_query, phi_key, tail_logit, past, window, chunk=64):
    """[T]: exp(b) phi(q)^T z over the whole denominator, averaged over batch and heads."""
    leaving = kernels.leaving_window(value, query.shape[2], window).float()
    _, tail = kernels.tail_attention(phi_query, phi_key, leaving, past, chunk)
    _, log_sum = kernels.local_attention(query, key, value, past, window, chunk)
    tail = tail * torch.exp(tail_logit.view(-1, 1, 1) - log_sum)
    return (tail / (tail + 1)).mean((0, 1, 3))


def tail_shares(model: Model, ids: Tensor) -> dict[int, Tensor]:
    """{layer: [T]} for the L layers, on ids [1, T]."""
    shares = []
    attention = kernels.window_linear_attention

    def recording(*inputs):
        shares.append(tail_share(*inputs))
        return attention(*inputs)

    with mock.patch.object(kernels, "window_linear_attention", recording):
        model.hidden(ids)
    layers = [i for i, tier in enumerate(model.plan) if tier == "L"]
    return dict(zip(layers, shares, strict=True))


def switch_off(model: Model, part: str) -> None:
    """In place: `tail`, `window`, `sinks` or `fade` of every L layer."""
    if part == "tail":
        for layer, tier in zip(model.layers, model.plan, strict=True):
            if tier == "L":
                layer.self_attn.tail_logit.fill_(-torch.inf)
    elif part == "fade":
        model.config.healed_context = None
    else:
        setattr(model.config, part, 0)


@torch.no_grad()
def compare(model: Model, base: Model, ids: Tensor, targets: list[Tensor]) -> tuple[Tensor, Tensor]:
    """KL to the base and top-1 agreement [T] by position, over ids [N, T] and the base's hidden
    states [1, T, d] on each row."""
    total = torch.zeros(3, ids.shape[1])
    for row, target in zip(ids.split(1), targets, strict=True):
        hidden = model.hidden(row)
        following = F.pad(row[:, 1:], (0, 1))
        figures = compare_by_position(hidden, target, model.head, base.head, following)
        total += figures[:, 0]
    _, kl, same = total / len(ids)
    return kl, same


def by_position(values: Tensor, edges: list[int]) -> list[float]:
    """The mean between each two edges."""
    return [float(values[a:b].mean()) for a, b in pairwise(edges)]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="a healed model, a folder")
    add("--base", required=True, help="the original")
    add("--valid", required=True, help="text to read")
    add("--sequences", type=int, default=4, help="[%(default)s]")
    add("--passkeys", type=int, default=20, help="prompts at each length [%(default)s]")
    parts = ("tail", "window", "sinks", "fade")
    add("--off", nargs="*", choices=parts, default=list(parts[:3]), help="[all but fade]")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="[%(default)s]")
    return parser.parse_args()


def print_tables(report: dict, edges: list[int]) -> None:
    spans = [f"{a:,}-{b:,}" for a, b in pairwise(edges)]
    lengths = report["variants"]["all parts"]["recall"]
    head = ["", *(f"KL {span}" for span in spans), *(f"agreement {span}" for span in spans)]
    rows = [head + [f"recall {length}" for length in lengths]]
    for name, figures in report["variants"].items():
        row = [name, *(f"{x:.4f}" for x in figures["kl"])]
        row += [f"{x:.1%}" for x in figures["agreement"]]
        row += [f"{x:.0%}" for x in figures["recall"].values()]
        rows.append(row)
    print(format_table(rows))

    rows = [["tail share, layer", *spans]]
    for layer, shares in report["tail_share"].items():
        rows.append([str(layer), *(f"{x:.1%}" for x in shares)])
    print(format_table(rows))


@torch.inference_mode()
def main() -> None:
    args = parse_arguments()
    dtype = getattr(torch, args.dtype)
    base = load_model(args.base, dtype=dtype)
    tokenizer = load_tokenizer(args.base)
    context = min(EDGES[-1], base.config.max_position_embeddings)
    edges = [edge for edge in EDGES if edge < context] + [context]
    documents = read_documents(args.valid, "--valid")
    eos = base.config.eos_token_ids
    ids = pack_sequences(documents, tokenizer, eos, context, args.sequences * context)

    report: dict = {"tokens": ids.numel(), "variants": {}, "tail_share": {}}
    for layer, share in tail_shares(load_model(args.model, dtype=dtype), ids[:1]).items():
        report["tail_share"][layer] = by_position(share, edges)

    targets = [base.hidden(row) for row in ids.split(1)]
    lengths = tuple(length for length in (512, 1024, 2048) if length <= context)
    count = max(1, args.passkeys // len(RECALL_DEPTHS))
    for part in ("", *args.off):
        model = load_model(args.model, dtype=dtype)
        if part:
            switch_off(model, part)
        kl, same = compare(model, base, ids, targets)
        name = f"{part} off" if part else "all parts"
        report["variants"][name] = {
            "kl": by_position(kl, edges),
            "agreement": by_position(same, edges),
            "recall": passkey_recall(model, tokenizer, ids, lengths, count),
        }
        print(f"{name}: done", file=sys.stderr)

    print_tables(report, edges)
    print(json.dumps({**vars(args), "report": report}))


if __name__ == "__main__":
    main()
