"""Does the ranking of the layers hold? A scan whose columns are text domains, contexts and passkey
lengths, each with its single sequences, so that errors are known:

    python results/sensitivity.py scan MODEL DATA OUT      30 layers as X (a map) and as L
    python results/sensitivity.py plans MODEL DATA OUT     what 20 plans of it do, before healing
    python results/sensitivity.py show OUT                 tables, and OUT/ranks.svg, OUT/plans.svg

DATA is a .jsonl.gz whose lines name their source ("openstax/...", or a novel); the code is that of
torch. OUT gets scan.json after each trial and plans.json after each plan; both go on from there.
"""

import itertools
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor

import planner
import scan
from fit import fit_maps
from hub import read_json, write_json
from measure import hidden_states, kl_by_position, pad_prompts, passkey_prompts, score_rows
from model import Model, convert, load_model
from ranks import spearman
from roofline import HARDWARE
from tokenizer import load_tokenizer

TIERS = {"window": 256, "sinks": 4, "feature_map": "none", "removed": "linear"}
LONG = 4096
CONTEXTS = {"KL to 512": (0, 512), "KL to 2,048": (512, 2048), "KL to 4,096": (2048, 4096)}
PROMPTS = {512: 4, 2048: 2, 4096: 1}
KEEP, DROP = 8, 6
RESAMPLES = 200

# --- the text ----------------------------------------------------------------------------------


def read_domain(data: str, domain: str, tokenizer, tokens: int, skip: int = 0) -> Tensor:
    """[tokens] ids, of documents of one domain joined."""
    if domain == "code":
        folder = Path(torch.__file__).parent / "nn" / "modules"
        texts = (path.read_text() for path in sorted(folder.glob("*.py")))
    else:
        import gzip

        lines = map(json.loads, gzip.open(data, "rt"))
        is_textbook = domain == "textbooks"
        texts = (x["text"] for x in lines if x["source"].startswith("openstax") == is_textbook)
    ids: list[int] = []
    for text in itertools.islice(texts, skip, None):
        ids += tokenizer.encode(text[:4000])
        if len(ids) >= tokens:
            return torch.tensor(ids[:tokens])
    raise SystemExit(f"{data}: too little text of {domain}")


# --- the scan ----------------------------------------------------------------------------------


def domain_probe(model: Model, name: str, sequences: Tensor) -> scan.Probe:
    batches = [sequences]
    (base,) = [x[:, ::4] for x in hidden_states(model, batches)]

    def damage(hiddens: list[Tensor]) -> dict[str, float]:
        kl = kl_by_position(hiddens[0][:, ::4], base, model.head, model.head)
        return {f"{name} #{i}": float(x) for i, x in enumerate(kl.mean(1))}

    return scan.Probe(batches, damage)


def context_probe(model: Model, sequences: Tensor) -> scan.Probe:
    batches = list(sequences.split(1))
    base = [x[:, ::4] for x in hidden_states(model, batches)]

    def damage(hiddens: list[Tensor]) -> dict[str, float]:
        columns = {}
        for i, (hidden, target) in enumerate(zip(hiddens, base)):
            kl = kl_by_position(hidden[:, ::4], target, model.head, model.head)[0]
            for name, (first, last) in CONTEXTS.items():
                columns[f"{name} #{i}"] = float(kl[first // 4 : last // 4].mean())
        return columns

    return scan.Probe(batches, damage)


def recall_probe(model: Model, tokenizer, text: Tensor) -> scan.Probe:
    groups = {
        length: passkey_prompts(tokenizer, text, length, [(i + 0.5) / n for i in range(n)], 1, 1)
        for length, n in PROMPTS.items()
    }
    batches = [pad_prompts(group) for group in groups.values()]

    def scores(hiddens: list[Tensor]) -> dict[str, float]:
        found = {}
        for hidden, (length, group) in zip(hiddens, groups.items()):
            for i, answer in enumerate(score_rows(hidden, model.head, group)):
                found[f"recall at {length:,} #{i}"] = answer.log_likelihood
        return found

    base = scores(hidden_states(model, batches))
    return scan.Probe(batches, lambda hiddens: {k: base[k] - x for k, x in scores(hiddens).items()})


def load(model_path: str, data: str):
    model = load_model(model_path, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(model_path)
    fitting = read_domain(data, "novels", tokenizer, 16 * 1024, skip=600).view(16, 1024)
    return model, tokenizer, fitting


@torch.inference_mode()
def run_scan(model_path: str, data: str, out: Path) -> None:
    model, tokenizer, fitting = load(model_path, data)
    probes = []
    for name in ("textbooks", "novels", "code"):
        ids = read_domain(data, name, tokenizer, 4 * 512)
        probes.append(domain_probe(model, name, ids.view(4, 512)))
    both = [read_domain(data, name, tokenizer, LONG, 50) for name in ("textbooks", "novels")]
    probes.append(context_probe(model, torch.stack(both)))
    probes.append(recall_probe(model, tokenizer, read_domain(data, "novels", tokenizer, 8192, 90)))

    path = out / "scan.json"
    layers = read_json(path)["layers"] if path.exists() else []
    scan.scan(model, probes, TIERS, path, TIERS, layers, fitting)


# --- plans -------------------------------------------------------------------------------------


def grouped(row: dict[str, float]) -> dict[str, list[float]]:
    """{column: its single sequences}"""
    columns: dict[str, list[float]] = {}
    for name, value in row.items():
        columns.setdefault(name.split(" #")[0], []).append(value)
    return columns


def costs_by(layers: list[dict], columns: list[str]) -> list[dict[str, float]]:
    """Per layer the summed damage of the named columns, as `planner.costs_of` has it."""
    costs = []
    for row in layers:
        cost = {"S": 0.0}
        for tier in "LX":
            means = {k: sum(v) / len(v) for k, v in grouped(row[tier]).items()}
            cost[tier] = sum(max(0.0, means[name]) for name in columns)
        costs.append(cost)
    return costs


@torch.inference_mode()
def run_plans(model_path: str, data: str, out: Path) -> None:
    """20 plans of growing damage from the frontier, and random ones of the same letters: KL on
    long text that the scan did not see."""
    model, tokenizer, fitting = load(model_path, data)
    layers = read_json(out / "scan.json")["layers"]
    costs = costs_by(layers, ["KL to 4,096"])
    choices = planner.price_plans(
        model, {TIERS["window"]: costs}, TIERS, (16, LONG), HARDWARE["a10"]
    )
    front: list[planner.Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.damage, -choice.speedup)):
        if not front or choice.speedup > front[-1].speedup:
            front.append(choice)
    front = front[1 :: max(1, len(front) // 10)][:10]
    plans = [choice.plan for choice in front]
    draw = random.Random(0)
    plans += ["".join(draw.sample(plan, len(plan))) for plan in plans]

    path = out / "plans.json"
    done = read_json(path) if path.exists() else {}
    ids = read_domain(data, "novels", tokenizer, 2 * LONG, skip=700).view(2, LONG)
    base = hidden_states(model, list(ids.split(1)))
    for plan in plans:
        if plan in done:
            continue
        altered = convert(model, plan, **TIERS)
        if "X" in plan:
            fit_maps(model, altered, fitting[:8])
        kl = []
        for row, target in zip(ids.split(1), base):
            late, target = altered.hidden(row)[:, 2048::4], target[:, 2048::4]
            kl.append(float(kl_by_position(late, target, model.head, model.head).mean()))
        predicted = sum(cost[tier] for cost, tier in zip(costs, plan))
        done[plan] = {"predicted": predicted, "measured": sum(kl) / 2, "each": kl}
        print(plan, done[plan], flush=True)
        write_json(path, done)


# --- what is shown -----------------------------------------------------------------------------


def show(out: Path) -> None:
    layers = read_json(out / "scan.json")["layers"]
    tables = {}
    for tier in "XL":
        for row in layers:
            for name, values in grouped(row[tier]).items():
                tables.setdefault(f"{name} ({tier})", []).append(values)
    names = list(tables)

    def column(name: str, draw: random.Random | None = None) -> list[float]:
        """The means of a column, or those of a draw of its sequences (bootstrap)."""
        values = tables[name]
        picks = range(len(values[0]))
        if draw:
            picks = draw.choices(picks, k=len(values[0]))
        return [sum(row[i] for i in picks) / len(picks) for row in values]

    matrix, errors = {}, {}
    for a, b in itertools.combinations(names, 2):
        draw = random.Random(f"{a}{b}")
        matrix[a, b] = matrix[b, a] = spearman(column(a), column(b))
        resampled = [spearman(column(a, draw), column(b, draw)) for _ in range(RESAMPLES)]
        errors[a, b] = errors[b, a] = float(torch.tensor(resampled).std())

    for tier in "XL":
        own = [name for name in names if name.endswith(f"({tier})")]
        print(f"\n| Spearman, {tier} | " + " | ".join(n[:-4] for n in own) + " |")
        print("|---|" + "---:|" * len(own))
        for a in own:
            cells = []
            for b in own:
                cells.append("1" if a == b else f"{matrix[a, b]:.2f} ±{errors[a, b]:.2f}")
            print(f"| {a[:-4]} | " + " | ".join(cells) + " |")
    print("\n| X against L | Spearman |\n|---|---:|")
    for name in (name[:-4] for name in names if name.endswith("(X)")):
        pair = f"{name} (X)", f"{name} (L)"
        print(f"| {name} | {matrix[pair]:.2f} ±{errors[pair]:.2f} |")

    columns = [name[:-4] for name in names if name.endswith("(X)")]
    print(
        f"\nDamage of the plan ({KEEP} S, {DROP} X) made from a row's column, under each column:\n"
    )
    print("| made from | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns))
    for source in columns:
        plan = planner.plan_tier(costs_by(layers, [source]), KEEP, DROP)
        cells = []
        for target in columns:
            costs = costs_by(layers, [target])
            cells.append(f"{sum(cost[tier] for cost, tier in zip(costs, plan)):.3f}")
        print(f"| {source} | " + " | ".join(cells) + " |")

    plans = read_json(out / "plans.json")
    predicted = [x["predicted"] for x in plans.values()]
    measured = [x["measured"] for x in plans.values()]
    alike = spearman(predicted, measured)
    print(f"\nPredicted and measured KL of {len(plans)} plans: Spearman {alike:.2f}")
    print("\n| plan | predicted | measured |\n|---|---:|---:|")
    for plan, x in plans.items():
        print(f"| `{plan}` | {x['predicted']:.3f} | {x['measured']:.3f} |")
    draw_pictures(out, names, matrix, predicted, measured)


def draw_pictures(out: Path, names, matrix, predicted, measured) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 8))
    grid = [[1.0 if a == b else matrix[a, b] for b in names] for a in names]
    image = axes.imshow(grid, cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(image, label="Spearman's correlation of the layers' ranks")
    figure.savefig(out / "ranks.svg", bbox_inches="tight")

    figure, axes = plt.subplots(figsize=(5, 4))
    axes.loglog(predicted, measured, "o")
    low, high = min(predicted + measured), max(predicted + measured)
    axes.loglog([low, high], [low, high], color="gray", linewidth=1)
    axes.set_xlabel("predicted: sum over the layers, nats/token")
    axes.set_ylabel("measured")
    figure.savefig(out / "plans.svg", bbox_inches="tight")


def main() -> None:
    command, *rest = sys.argv[1:] or [""]
    if command not in ("scan", "plans", "show") or len(rest) != (1 if command == "show" else 3):
        sys.exit(__doc__)
    out = Path(rest[-1])
    out.mkdir(parents=True, exist_ok=True)
    if command == "show":
        show(out)
    else:
        {"scan": run_scan, "plans": run_plans}[command](rest[0], rest[1], out)


if __name__ == "__main__":
    main()
