"""One cache, spent in many ways: what knowing the layers is worth, at equal bytes.

    python results/equal.py MODEL [ROW ...] --data FILE --valid FILE [--tasks FILE ...]
    python results/equal.py MODEL ROW ... --data FILE --valid FILE --recall 200
    python results/equal.py MODEL --data FILE --valid FILE --speed
    python results/equal.py --table [--beside ROW]

Every row keeps as many bytes of a sequence of 4,096 tokens as 8 S, 16 L and 6 X layers with the
default tier L do (30% of SmolLM2's own): its L layers get the window that this leaves them, but
--paper's, which is fixed, and those that have no window at all. Every row learns from the same 48k
tokens, those that maps are fitted on among them. Judged on held-out text by position, passkeys,
what the model writes and question files; DIR gets ROW.json at once, and what is there is not
measured again. --recall measures more passkeys alone, of the original, of rows that are healed
(their checkpoints are in DIR) and of converted folders, into recall.json. --speed runs decoding
steps of 16 x 4,096 of all rows in turn.
"""

import argparse
import itertools
import json
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from torch import Tensor

import measure
import planner
import scan
from bench import decode_times
from config import default_window
from distill import Healing, heal, tail_names
from engine import Engine
from fit import fit_maps
from hub import fingerprint, read_json, write_json
from model import Model, cache_bytes, convert, load_model
from roofline import HARDWARE
from terminal import format_table, token_count
from text import pack_sequences, read_documents
from tokenizer import load_tokenizer

RESULTS = Path(__file__).resolve().parent
MAPS = RESULTS / "smollm2-maps" / "scan.json"  # the default tiers, one window
WINDOWS = RESULTS / "smollm2-windows" / "scan.json"  # the same, and what other windows do
NOTHING = RESULTS / "smollm2-200k" / "scan.json"  # --paper's tiers
CONTEXT = 4096
EDGES = (0, 1024, 2048, 4096)
LENGTHS = (512, 1024, 2048, 4096)
FITTED = 16_384  # tokens that maps are fitted on
PLANNED = "planned, 7 S"
WIDE = 512  # beyond this window, sequences of 512 tokens teach nothing


def weigh_windows(model: Model) -> dict:
    """The plan and window that `--cache 0.3` has."""
    layers = scan.read_scan(WINDOWS)["layers"]
    costs = {
        window: planner.costs_of(layers, ["kl", "recall"], window)
        for window in planner.windows_of(layers)
    }
    tiers = {"sinks": 4, "feature_map": "softmax", "removed": "linear"}
    choices = planner.price_plans(model, costs, tiers, (16, CONTEXT), HARDWARE["a10"])
    choice = planner.choose(choices, "cache", 0.3)
    return {"plan": choice.plan, "window": choice.window, "removed": "linear"}


def make_rows(model: Model) -> dict[str, dict]:
    """{name: settings}: `plan` and the tiers' settings; a `window` of None is the one that is left;
    `context` is that of healing's sequences."""
    n = len(model.layers)
    costs = planner.costs_of(scan.read_scan(MAPS)["layers"], ["kl", "recall"])
    by_nothing = planner.costs_of(scan.read_scan(NOTHING)["layers"], ["kl"])
    best = planner.best_plans(costs)
    removed = {"plan": best[8, 6][1], "window": default_window(model.config)}
    uniform = {"plan": "L" * n}
    linear = uniform | {"window": 0, "sinks": 0}
    paper = {"plan": planner.plan_paper(by_nothing, 8, 6), "window": 64, "feature_map": "hedgehog"}

    rows = {
        "6 removed, maps": removed | {"removed": "linear"},
        PLANNED: {"plan": best[7, 0][1]},
        "uniform window": uniform | {"feature_map": "none"},
        "planned, 4 S": {"plan": best[4, 0][1]},
        "planned, 2 S": {"plan": best[2, 0][1]},
        "6 removed, nothing": removed,
        "--paper": paper,
    }
    for count, draw in itertools.product((7, 4), range(3)):
        kept = random.Random(draw).sample(range(n), count)
        plan = "".join("LS"[i in kept] for i in range(n))
        rows[f"random, {count} S, draw {draw}"] = {"plan": plan}
    return rows | {
        "uniform L": uniform,
        "LoLCATs": uniform | {"feature_map": "hedgehog"},
        "pruning alone, maps": {"plan": best[9, n - 9][1], "removed": "linear"},
        "SUPRA": linear | {"feature_map": "relu"},
        "Performer": linear | {"feature_map": "favor"},
        "--cache 0.3": weigh_windows(model),
        "6 S, 3 removed, windows of 512": {  # where recall weighs six times as much
            "plan": "LLLLLLXSXLLLLLLXLLSLSSSSLLLLLL",
            "window": 512,
            "removed": "linear",
        },
        "planned, 7 S, healed on 2,048": {"plan": best[7, 0][1], "context": 2048},
    }


def settle(model: Model, settings: dict, budget: int) -> dict:
    """The settings with the window that makes the cache of a sequence `budget` bytes at most, and
    the length of healing's sequences."""
    tiers = {name: x for name, x in settings.items() if name not in ("plan", "window", "context")}
    window = settings.get("window")
    if window is None:
        window = 1
        if "L" in settings["plan"]:
            narrow, wide = (
                cache_bytes(convert(model, settings["plan"], w, **tiers), CONTEXT) for w in (64, 65)
            )
            window = 64 + (budget - narrow) // (wide - narrow)
    context = settings.get("context", 512 if window < WIDE else 2048)
    return {"plan": settings["plan"], "window": window, "context": context} | tiers


# --- measures ----------------------------------------------------------------------------------


class Judge:
    """What is read, and what the original makes of it."""

    def __init__(self, base: Model, tokenizer, valid: Tensor, passkeys: int, tasks: dict):
        self.base, self.tokenizer = base, tokenizer
        self.valid, self.passkeys, self.tasks = valid, passkeys, tasks
        self.targets = measure.hidden_states(base, valid.split(1))
        self.prompts = valid.view(-1, 2048)[:8, :256]
        self.written = measure.write_on(base, self.prompts)

    @torch.inference_mode()
    def on_text(self, model: Model) -> dict:
        """KL and agreement of each sequence between each two EDGES: {name: [N][spans]}."""
        figures = {"kl": [], "agreement": []}
        for ids, target in zip(self.valid.split(1), self.targets):
            hidden, following = model.hidden(ids), F.pad(ids[:, 1:], (0, 1))
            heads = model.head, self.base.head
            _, kl, same = measure.compare_by_position(hidden, target, *heads, following)[:, 0]
            for name, values in (("kl", kl), ("agreement", same)):
                figures[name].append([float(values[a:b].mean()) for a, b in spans()])
        return figures

    def on_prompts(self, model: Model) -> dict:
        """{length: whether each passkey is repeated}, question files, and what is written."""
        recall = recall_by_length(model, self.tokenizer, self.valid, self.passkeys, LENGTHS)
        figures = {"recall": recall, "tasks": {}}
        for name, items in self.tasks.items():
            quality = measure.task_quality(model, self.tokenizer, name, items)
            figures["tasks"][name] = quality
        ours = self.written if model is self.base else measure.write_on(model, self.prompts)
        written = measure.writing_quality(self.base, self.prompts, ours, self.written)
        return figures | {"writing": written}


def recall_by_length(
    model: Model, tokenizer, text: Tensor, passkeys: int, lengths
) -> dict[str, list[int]]:
    """Of each passkey whether it is repeated."""
    recalled = {}
    for length in lengths:
        count = passkeys // len(measure.RECALL_DEPTHS)
        prompts = measure.passkey_prompts(tokenizer, text, length, count=count)
        scored = measure.score_answers(model, prompts, f"passkey at {length}")
        recalled[str(length)] = [int(answer.greedy) for answer in scored]
    return recalled


def spans():
    return zip(EDGES, EDGES[1:])


def heal_row(
    base: Model, valid: Tensor, train: Tensor, settings: dict, tokens: int, path: Path
) -> tuple[Model, int]:
    """Converts, fits and heals, or goes on from a checkpoint. Returns the model, and how many
    tokens it was healed on."""
    plan, context = settings["plan"], settings["context"]
    tiers = {key: x for key, x in settings.items() if key not in ("plan", "context")}
    student = convert(base, plan, **tiers)
    student.recompute = context > 512  # wide windows keep 9 GB on 4,096 tokens
    if tiers.get("removed") == "linear":
        fit_maps(base, student, train.view(-1, 512)[-FITTED // 512 :])
        tokens -= FITTED

    healing = Healing(tokens, context=context, validations=2)
    if not tail_names(student):  # nothing to train alone
        healing = replace(healing, long_share=0.0)
    identity = {"model": fingerprint(*base.parameters()), "plan": plan, "settings": settings}
    checkpoint = path.with_suffix(".safetensors")
    text = train.view(-1, context)
    heal(base, student, text, valid[:2, :2048], healing, checkpoint, identity)
    return student, healing.trained_tokens


def run_row(
    base: Model, judge: Judge, train: Tensor, name: str, settings: dict, tokens: int, path: Path
) -> None:
    """Heals and measures one row, and writes its file."""
    start = time.monotonic()
    student, healed_tokens = heal_row(base, judge.valid, train, settings, tokens, path)
    result = {"name": name, "settings": settings, "cache_bytes": cache_bytes(student, CONTEXT)}
    result["healed"] = judge.on_text(student) | judge.on_prompts(student)
    result["healed_tokens"] = healed_tokens
    result["seconds"] = time.monotonic() - start
    write_json(path, result)


# --- tables ------------------------------------------------------------------------------------


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean, and its standard error."""
    values = torch.tensor(values, dtype=torch.float64)
    return float(values.mean()), measure.standard_error(values)


def whole(by_span: list[list[float]]) -> list[float]:
    """Of each sequence the mean over all its positions."""
    shares = [(b - a) / EDGES[-1] for a, b in spans()]
    return [sum(x * share for x, share in zip(row, shares)) for row in by_span]


def file_of(folder: Path, name: str) -> Path:
    """Of a row."""
    return folder / (re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def print_tables(folder: Path, beside: str) -> None:
    """All rows that are there, by their KL, and how each differs from one, text by text and prompt
    by prompt."""
    files = {path.stem: read_json(path) for path in folder.glob("*.json")}
    made = {row.get("name", stem): row for stem, row in files.items()}
    speeds = made.pop("speed", {})
    recall = made.pop("recall", {})
    original = made.pop("original")
    made = {"original": {"healed": original}} | made
    made = dict(sorted(made.items(), key=lambda row: measure.mean(whole(row[1]["healed"]["kl"]))))
    head = ["", "window", "cache MiB", *(f"KL {a:,}-{b:,}" for a, b in spans()), "agreement"]
    head += [f"recall {n:,}" for n in LENGTHS] + ["writes, nats", "repeated", *original["tasks"]]
    rows = [head + ["step, ms"]]
    for name, row in made.items():
        healed = row["healed"]
        settings = row.get("settings", {})
        cells = [name, str(settings.get("window", ""))]
        cells.append(f"{row['cache_bytes'] / 2**20:.1f}" if settings else "")
        for by_sequence in zip(*healed["kl"]):
            cells.append("{:.4f} ±{:.4f}".format(*mean_and_error(by_sequence)))
        cells.append("{:.1%} ±{:.1%}".format(*mean_and_error(whole(healed["agreement"]))))
        cells += [f"{measure.mean(x):.0%}" for x in healed["recall"].values()]
        writing = healed["writing"]
        cells.append(f"{writing['nats']:.3f} ±{writing['errors']['nats']:.3f}")
        cells.append(f"{writing['repeated']:.1%}")
        cells += [f"{x['accuracy']:.1%}" for x in healed["tasks"].values()]
        cells.append(f"{1e3 * measure.quantile(speeds[name], 0.5):.1f}" if name in speeds else "")
        rows.append(cells)
    print(format_table(rows))

    other = made[beside]["healed"]
    rows = [[f"less {beside}", "KL", *(f"recall {n:,}" for n in LENGTHS)]]
    for name, row in made.items():
        healed = row["healed"]
        pairs = [(whole(healed["kl"]), whole(other["kl"]), "{:+.4f} ±{:.4f}")]
        for length, recalled in healed["recall"].items():
            pairs.append((recalled, other["recall"][length], "{:+.0%} ±{:.0%}"))
        cells = [name]
        for ours, theirs, form in pairs:
            cells.append(form.format(*mean_and_error([a - b for a, b in zip(ours, theirs)])))
        rows.append(cells)
    print(f"\n{format_table(rows)}")
    if recall:
        print_recall(recall, beside)


def print_recall(recall: dict[str, dict[str, list[int]]], beside: str) -> None:
    """The recall of more passkeys, and how each row differs from one, passkey by passkey."""
    other = recall.get(beside, recall["original"])
    lengths = sorted(other, key=int)
    rows = [[f"less {beside}", *(f"recall {int(n):,}, of {len(other[n])}" for n in lengths)]]
    for name, row in recall.items():
        cells = [name]
        for length in lengths:
            if length not in row:
                cells.append("")
                continue
            share, error = mean_and_error(row[length])
            more, spread = mean_and_error([a - b for a, b in zip(row[length], other[length])])
            cells.append(f"{share:.1%} ±{error:.1%}, {more:+.1%} ±{spread:.1%}")
        rows.append(cells)
    print(f"\n{format_table(rows)}")


def run_recall(
    base: Model, tokenizer, valid: Tensor, train: Tensor, rows: dict, args, path: Path
) -> None:
    """Passkeys of the original, of healed rows and of models in folders; what is in the file is not
    measured again."""
    made = read_json(path) if path.exists() else {}
    for length, name in itertools.product(args.lengths, ["original", *args.rows]):
        recalled = made.setdefault(Path(name).name, {})
        if str(length) in recalled:
            continue
        model = base
        if name in rows:
            file = file_of(args.out, name)
            model, _ = heal_row(base, valid, train, rows[name], args.tokens, file)
        elif name != "original":
            model = load_model(name, dtype=torch.bfloat16)
        recalled |= recall_by_length(model, tokenizer, valid, args.recall, [length])
        write_json(path, made)


def run_speed(base: Model, rows: dict[str, dict], path: Path) -> None:
    """Seconds of decoding steps of 16 x 4,096, all rows in turn, untrained and eager."""
    engines = {"original": Engine(base, 16, CONTEXT)}
    for name, settings in rows.items():
        tiers = {key: x for key, x in settings.items() if key != "context"}
        engines[name] = Engine(convert(base, **tiers), 16, CONTEXT)
    write_json(path, decode_times(engines, CONTEXT))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?")
    add("rows", nargs="*", help="[all]")
    add("--data")
    add("--valid")
    add("--tasks", nargs="*", default=[], help="question files")
    add("--items", type=int, default=200, help="of each question file [%(default)s]")
    add("--tokens", type=token_count, default=49_152, help="[%(default)s]")
    add("--sequences", type=int, default=8, help="of 4,096 tokens [%(default)s]")
    add("--passkeys", type=int, default=10, help="a length [%(default)s]")
    add("--recall", type=int, metavar="N", help="measure N passkeys a length alone")
    add("--lengths", nargs="+", type=int, default=[1024, 2048, 4096], help="for --recall")
    add("--speed", action="store_true")
    add("--table", action="store_true")
    add("--beside", default=PLANNED, help="row that others are compared with [%(default)s]")
    add("--out", type=Path, default=RESULTS / "equal")
    args = parser.parse_args()
    if args.table:
        print_tables(args.out, args.beside)
        return

    base = load_model(args.model, dtype=torch.bfloat16)
    rows = make_rows(base)
    reference = {key: x for key, x in rows["6 removed, maps"].items() if key != "context"}
    budget = cache_bytes(convert(base, **reference), CONTEXT)
    rows = {name: settle(base, row, budget) for name, row in rows.items()}
    if args.speed:
        run_speed(base, rows, args.out / "speed.json")
        return

    tokenizer = load_tokenizer(args.model)
    eos = base.config.eos_token_ids
    documents = read_documents(args.valid, "--valid")
    valid = pack_sequences(documents, tokenizer, eos, CONTEXT, args.sequences * CONTEXT)
    text = read_documents(args.data)
    train = pack_sequences(text, tokenizer, eos, CONTEXT, 2 * args.tokens)
    tasks = {name: x[: args.items] for name, x in measure.read_tasks(args.tasks).items()}

    if args.recall:
        run_recall(base, tokenizer, valid, train, rows, args, args.out / "recall.json")
        return

    judge = Judge(base, tokenizer, valid, args.passkeys, tasks)
    path = args.out / "original.json"
    if not path.exists():
        write_json(path, judge.on_text(base) | judge.on_prompts(base))
    for name in args.rows or rows:
        path = file_of(args.out, name)
        print(json.dumps({name: rows[name]}), flush=True)
        if not path.exists():
            run_row(base, judge, train, name, rows[name], args.tokens, path)


if __name__ == "__main__":
    main()
