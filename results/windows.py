"""What L with other windows does, layer by layer, beside what is predicted from one window; then
models in which each layer has a window of its own, at one cache.

    python results/windows.py MODEL --data heal.jsonl.gz --valid valid.jsonl.gz

Trials of three windows on two sequences of 4,096 tokens and two passkeys a length take 20 minutes
for SmolLM2 on two cores; results/windows/scan.json has them. The models are not healed; they are
judged on four other sequences of 4,096 tokens and ten passkeys a length.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from torch import Tensor

import measure
import planner
import scan
from hub import read_json
from model import Model, convert, load_model
from text import pack_sequences, read_documents
from tokenizer import load_tokenizer

RESULTS = Path(__file__).resolve().parent
LONG = 4096
TRIED = {"A": 256, "B": 512, "C": 1024}  # the letters of the trials in scan.json
WINDOWS = [64 * times for times in scan.WINDOWS]
STATE = 36.5  # tokens of cache that sinks and state take
EDGES = (0, 1024, 2048, LONG)
LENGTHS = (1024, 2048, LONG)


def scan_windows(model: Model, tokenizer, text: Tensor, path: Path) -> list[dict]:
    """Each layer with each window: {letter: columns}, as scan.scan has them."""

    def with_window(model: Model, letters: str, **_) -> Model:
        return convert(model, "L" * len(letters), window=TRIED[letters[0]])

    scan.TRIALS, scan.convert = "".join(TRIED), with_window
    prompts = dict.fromkeys((512, *LENGTHS), 2)
    probes = scan.make_probes(model, tokenizer, ["kl", "recall"], text, text, prompts, [])
    return scan.scan(model, probes, {}, path, {"windows": str(TRIED)}, [])


@torch.inference_mode()
def predict(model: Model, text: Tensor) -> list[dict[int, float]]:
    """By layer, how many times the damage of the first window each of WINDOWS does."""
    factors = []
    x = model.embed_tokens(text)
    for i in range(len(model.layers)):
        columns = scan.window_factors(model, i, x, TRIED["A"], 4, LONG)
        factors.append({w: columns[f"window {w}"] for w in WINDOWS})
        x = model.run_layers(x, i, i + 1)
    return factors


def own_windows(costs: list[dict], cache: float) -> tuple:
    """Of each layer "S" or a window, of the least summed cost within so many tokens of cache."""
    unit = 16  # tokens
    best = {0: (0.0, ())}
    for cost in costs:
        longer: dict = {}
        for used, (total, chosen) in best.items():
            for option, damage in cost.items():
                more = LONG if option == "S" else option + STATE
                state = used + math.ceil(more / unit)
                if state * unit <= cache:
                    candidate = (total + damage, (*chosen, option))
                    longer[state] = min(
                        longer.get(state, (math.inf,)), candidate, key=lambda x: x[0]
                    )
        best = longer
    return min(best.values(), key=lambda x: x[0])[1]


def build(base: Model, chosen: tuple) -> Model:
    model = convert(base, "".join("S" if x == "S" else "L" for x in chosen))
    for window in set(chosen) - {"S"}:
        other = convert(base, model.plan, window=window)
        for i, x in enumerate(chosen):
            if x == window:
                model.layers[i] = other.layers[i]
    return model


@torch.inference_mode()
def judge(base: Model, model: Model, valid: Tensor, prompts: dict) -> str:
    """KL between each two EDGES, agreement, and by length passkeys and their log-likelihood."""
    figures = []
    for ids in valid.split(1):
        heads = model.head, base.head
        following = F.pad(ids[:, 1:], (0, 1))
        states = model.hidden(ids), base.hidden(ids)
        figures.append(measure.compare_by_position(*states, *heads, following)[1:, 0])
    kl, same = torch.stack(figures).mean(0)
    said = " / ".join(f"{kl[a:b].mean():.4f}" for a, b in zip(EDGES, EDGES[1:]))
    said = f"KL {said}, agreement {same.mean():.1%}, passkeys"
    for length, group in prompts.items():
        scored = measure.score_answers(model, group, f"passkey at {length}")
        found = measure.mean(answer.greedy for answer in scored)
        nats = measure.mean(answer.log_likelihood for answer in scored)
        said += f" {found:.0%} ({nats:.2f}) at {length:,}"
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--valid", required=True)
    args = parser.parse_args()

    model = load_model(args.model, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(args.model)
    eos = model.config.eos_token_ids
    documents = read_documents(args.data, "--data")
    text = pack_sequences(documents, tokenizer, eos, LONG, 98_304 + 2 * LONG)[-2:]
    path = RESULTS / "windows" / "scan.json"
    layers = (
        read_json(path)["layers"] if path.exists() else scan_windows(model, tokenizer, text, path)
    )
    factors = predict(model, text[:1])

    # Within the widest window nothing but rounding differs.
    rounding = [row["C"]["kl, tokens to 1024"] for row in layers]
    for name, floors in {"as measured": [0.0] * len(layers), "less rounding": rounding}.items():
        for letter in "BC":
            trials = list(zip(layers, floors, factors))
            measured = [max(1e-6, row[letter]["kl"] - floor) for row, floor, _ in trials]
            predicted = [(row["A"]["kl"] - floor) * x[TRIED[letter]] for row, floor, x in trials]
            logs = torch.tensor([measured, predicted]).log()
            correlation = float(torch.corrcoef(logs)[0, 1])
            sums = f"measured {sum(measured):.3f}, predicted {sum(predicted):.3f}"
            said = f"KL {name}, summed: {sums}; correlation of logs {correlation:.3f}"
            print(f"window {TRIED[letter]}: {said}")

    noise = planner.recall_noise(layers)["A"]
    heard = [i for i, row in enumerate(layers) if row["A"]["recall"] > noise]
    for letter in "BC":
        measured = sum(layers[i][letter]["recall"] for i in heard)
        said = f"recall of {len(heard)} layers: measured {measured:.2f} nats a token"
        for power, name in ((0.5, "by the error"), (1, "by its square")):
            times = [factors[i][TRIED[letter]] ** power for i in heard]
            predicted = sum(x * layers[i]["A"]["recall"] for i, x in zip(heard, times))
            said += f", {name} {predicted:.2f}"
        print(f"window {TRIED[letter]}: {said}")
    cache = 0.3 * len(layers) * LONG + 64
    rows = {"4 S, windows of 773": tuple("S" if i in (7, 18, 20, 23) else 773 for i in range(30))}
    for name, recall in (("kl", 0), ("kl + recall", 1)):
        costs = []
        for row, floor, x in zip(layers, rounding, factors):
            kl, nats = row["A"]["kl"] - floor, recall * max(0.0, row["A"]["recall"] - noise)
            costs.append({"S": 0.0} | {w: kl * e + nats * e**0.5 for w, e in x.items()})
        rows[f"windows of their own, by {name}"] = own_windows(costs, cache)

    documents = read_documents(args.valid, "--valid")
    valid = pack_sequences(documents, tokenizer, eos, LONG, 8 * LONG)
    prompts = {n: measure.passkey_prompts(tokenizer, valid, n, count=2) for n in LENGTHS}
    for name, chosen in rows.items():
        counts = {str(x): chosen.count(x) for x in sorted(set(chosen), key=str)}
        print(
            f"{name} {counts}: {judge(model, build(model, chosen), valid[:4], prompts)}", flush=True
        )


if __name__ == "__main__":
    main()
