"""What the parts of the L layers are worth in a healed model:

    python results/tail.py MODEL --base DIR --valid FILE [--sequences 4] [--passkeys 20] [--off tail window sinks fade]

Reads sequences of 8,192 tokens (or what the model was made for) and gives KL to the base and top-1 agreement by position in the
text, with the model as it is and with the tail, the window, the sinks or the tail's fade of all its L layers off; passkey recall with the same;
and for each L layer the share of the attention's weight that goes to the tail, by position in the first sequence, averaged over heads.
The last line is one JSON document.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import attention
import bench
import kernels
from distill import pack, read_documents
from model import load_model, load_tokenizer

EDGES = (0, 1024, 2048, 4096, 8192)


def tail_share(query, key, value, phi_query, phi_key, tail_logit, past, window, chunk=64):
    """[T]: exp(b) phi(q)^T z over the whole denominator, averaged over batch and heads."""
    _, tail = kernels.tail_attention(phi_query, phi_key, value[:, :, :query.shape[2]].float(), past, chunk)
    _, local, largest = kernels.local_attention(query, key, value, past, window, chunk)
    tail = tail * torch.exp(tail_logit.view(-1, 1, 1) - largest)
    return (tail / (tail + local)).mean((0, 1, 3))


def switch_off(model, part: str) -> None:
    """In place: `tail`, `window`, `sinks` or `fade` of every L layer."""
    if part == "tail":
        for layer, tier in zip(model.layers, model.plan):
            if tier == "L":
                layer.self_attn.tail_logit.fill_(-torch.inf)
    elif part == "fade":
        model.config.healed_context = None
    else:
        setattr(model.config, part, 0)


@torch.no_grad()
def compare(model, base, ids, targets) -> tuple[torch.Tensor, torch.Tensor]:
    """KL to the base and top-1 agreement [T] by position, over ids [N, T] and the base's hidden states on them."""
    kl, same = torch.zeros(2, ids.shape[1])
    for row, target in zip(ids, targets):
        hidden = model.hidden(row[None])[0]
        for start in range(0, len(row), kernels.ROWS):
            part = slice(start, start + kernels.ROWS)
            ours, theirs = hidden[part] @ model.head.T, target[part] @ base.head.T
            kl[part] += kernels.fused_kl(ours, theirs) / len(ids)
            same[part] += (ours.argmax(-1) == theirs.argmax(-1)).float() / len(ids)
    return kl, same


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model"), parser.add_argument("--base", required=True), parser.add_argument("--valid", required=True)
    parser.add_argument("--sequences", type=int, default=4), parser.add_argument("--passkeys", type=int, default=20)
    parser.add_argument("--off", nargs="*", choices=("tail", "window", "sinks", "fade"), default=["tail", "window", "sinks"])
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    base, tokenizer = load_model(args.base, dtype=dtype), load_tokenizer(args.base)
    context = min(EDGES[-1], base.config.max_position_embeddings)
    ids = pack(read_documents(args.valid, "--valid"), tokenizer, base.config.eos_token_ids, context, args.sequences * context)
    edges = [edge for edge in EDGES if edge < context] + [context]
    report: dict = {"tokens": ids.numel(), "variants": {}, "tail_share": {}}

    shares, current = {}, []                # layer: [T]
    model = load_model(args.model, dtype=dtype)
    original = attention.window_linear_attention

    def recording(*inputs):
        shares.setdefault(current[-1], []).append(tail_share(*inputs))
        return original(*inputs)
    for i, tier in enumerate(model.plan):
        if tier == "L":
            model.layers[i].self_attn.register_forward_pre_hook(lambda *_, i=i: current.append(i))
    attention.window_linear_attention = recording
    model.hidden(ids[:1])
    attention.window_linear_attention = original
    for i, rows in shares.items():
        share = torch.stack(rows).mean(0)
        report["tail_share"][i] = [float(share[a:b].mean()) for a, b in zip(edges, edges[1:])]

    targets = [base.hidden(row[None])[0] for row in ids]
    for name in ("whole", *args.off):
        model = load_model(args.model, dtype=dtype)
        if name != "whole":
            switch_off(model, name)
        kl, same = compare(model, base, ids, targets)
        recall = bench.passkey_recall(model, tokenizer, ids, [n for n in (512, 1024, 2048) if n <= context], args.passkeys // 5)["recall"]
        by_position = lambda values: [float(values[a:b].mean()) for a, b in zip(edges, edges[1:])]
        report["variants"][name] = {"kl": by_position(kl), "agreement": by_position(same), "recall": recall}
        print(f"{'all parts' if name == 'whole' else name + ' off'}: done", file=sys.stderr)

    spans = [f"{a:,}-{b:,}" for a, b in zip(edges, edges[1:])]
    rows = [["", *(f"KL {s}" for s in spans), *(f"agreement {s}" for s in spans), *(f"recall {n}" for n in report["variants"]["whole"]["recall"])]]
    for name, figures in report["variants"].items():
        rows.append(["all parts" if name == "whole" else f"{name} off", *(f"{x:.4f}" for x in figures["kl"]),
                     *(f"{x:.1%}" for x in figures["agreement"]), *(f"{x:.0%}" for x in figures["recall"].values())])
    print(bench.format_table(rows))
    print(bench.format_table([["tail share, layer", *spans]] + [[str(i), *(f"{x:.1%}" for x in row)] for i, row in report["tail_share"].items()]))
    print(json.dumps({**vars(args), "report": report}))


if __name__ == "__main__":
    main()
