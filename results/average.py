"""What averages of the weights buy in a healing run, and which rate, rank and optimizer go with them:

    python results/average.py MODEL DATA VALID [--start HEALED] [--tokens 48k,150k,300k] [SETTINGS ...]

SETTINGS is what a run changes, "lr=2e-3,rank=64" say, or "" for the recipe as it is: lr, rank, decay (the rate falls as t^-decay after the
first 100 steps), full (1: all weights of the blocks instead of adapters), soap (1: Adam in the eigenbasis of the gradient's second moment
on an adapter's short side, 2: on both; arXiv 2409.11321). Stage 2 alone, sequences of 512 tokens, the same in every run, from the converted
model or from one that has been healed, by new adapters. Step t counts as t^p in an average, one for each p of POWERS. At each number of
tokens a line: validation KL, 16 sequences of 1,024 tokens, of the weights and of each average.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import bench
from distill import Optimizer, add_adapters, pack, read_documents, tail_names, validation_kl
from healing import TIER
from kernels import sliced_kl
from layerboost import token_count
from model import convert, load_model, load_tokenizer

POWERS = (1, 3, 8)
RECIPE = {"lr": 1e-3, "rank": 16, "decay": 0.0, "full": 0, "soap": 0}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("model", "data", "valid"):
    parser.add_argument(name)
parser.add_argument("settings", nargs="*", default=[""])
parser.add_argument("--start")
parser.add_argument("--tokens", default="48k,150k,300k")
args = parser.parse_intermixed_args()
marks = {token_count(text) // 512 for text in args.tokens.split(",")}

bench.set_up(eager=False)
base, tokenizer = load_model(args.model, dtype=torch.bfloat16), load_tokenizer(args.model)
base.compiled_shapes.add((1, 512))
valid = pack(read_documents(args.valid), tokenizer, base.config.eos_token_ids, 1024, 16 * 1024)
train = pack(read_documents(args.data), tokenizer, base.config.eos_token_ids, 512, 2_000_000)
train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))][:max(marks)]
with torch.no_grad():
    targets = [(ids, base.hidden(ids)) for ids in valid.split(4)]
    teacher = torch.cat([base.hidden(ids[None]) for ids in train])


def run(o: dict) -> None:
    student = load_model(args.start, dtype=torch.bfloat16) if args.start else convert(base, TIER)
    student.compiled_shapes = base.compiled_shapes
    tails = tail_names(student)
    if not o["full"]:
        add_adapters(student, rank=o["rank"], seed=0)
    for parameter in student.layers.parameters() if o["full"] else ():
        parameter.data = parameter.data.clone()                                 # the teacher keeps the original
    learns = lambda name: name in tails or name.startswith("layers.") and o["full"] or name.endswith((".A", ".B"))
    trained = {name: p for name, p in student.named_parameters() if learns(name)}
    student.requires_grad_(False)
    for p in trained.values():
        p.requires_grad_(True)
    optimizer = Optimizer(trained)
    weights = optimizer.masters
    if o["soap"]:
        optimizer.adam = Soap(weights, o["soap"])
    averages = {power: {name: p.detach().clone() for name, p in weights.items()} for power in POWERS}
    seconds = []

    @torch.no_grad()
    def kl_of(average: dict) -> float:
        optimizer.averages = {name: p.clone() for name, p in average.items()}
        optimizer.exchange()
        kl = validation_kl(student, base.head, targets)
        optimizer.exchange()
        return round(kl, 4)

    for t in range(1, max(marks) + 1):
        begun = time.monotonic()
        rows = slice(t - 1, t)
        sliced_kl(student.hidden(train[rows]).flatten(0, 1), teacher[rows].flatten(0, 1), student.head, base.head).backward()
        optimizer.step(o["lr"] * min(1, t / 50) * max(1, t / 100) ** -o["decay"])
        with torch.no_grad():
            for power, average in averages.items():
                torch._foreach_lerp_(list(average.values()), list(weights.values()), (power + 1) / (power + t))
        seconds.append(time.monotonic() - begun)
        if t in marks:
            print(json.dumps({key: x for key, x in o.items() if x != RECIPE[key]} | {"tokens": t * 512, "weights": kl_of(weights)}
                             | {f"t^{p}": kl_of(a) for p, a in averages.items()} | {"step_s": round(sorted(seconds)[len(seconds) // 2], 3)}), flush=True)


class Soap:
    """Adam on Q^T G P, where Q and P are the eigenvectors of the running means of G G^T and G^T G of an adapter's factor, its short side
    first; P the identity where `sides` is 1."""

    def __init__(self, masters: dict, sides: int, betas=(0.9, 0.99), every: int = 5):
        self.masters, self.sides, self.betas, self.every, self.param_groups = masters, sides, betas, every, [{"lr": 0.0}]
        self.state, alike = {}, {}
        for name, p in masters.items():
            alike.setdefault((p.shape, name.endswith((".A", ".B"))), []).append(name)
        self.batches = [(adapter, names[i:i + 64]) for (_, adapter), names in alike.items() for i in range(0, len(names), 64)]

    @torch.no_grad()
    def step(self) -> None:
        b1, b2 = self.betas
        for adapter, names in self.batches:
            G = torch.stack([self.masters[name].grad for name in names])
            turned = adapter and G.shape[1] > G.shape[2]
            G = G.transpose(1, 2) if turned else G
            s = self.state.setdefault(names[0], {"t": 0, "m": torch.zeros_like(G), "v": torch.zeros_like(G), "C": 0, "D": 0, "Q": None, "P": None})
            s["t"] += 1
            t = s["t"]
            into = back = lambda x: x
            if adapter:
                s["C"] = b2 * s["C"] + (1 - b2) * G @ G.mT
                if t <= 20 or t % self.every == 0:
                    s["Q"] = torch.linalg.eigh(s["C"]).eigenvectors
                if self.sides == 2:
                    s["D"] = b2 * s["D"] + (1 - b2) * G.mT @ G
                    if t in (1, 3, 10, 30) or t % (10 * self.every) == 0:
                        s["P"] = torch.linalg.eigh(s["D"]).eigenvectors
                into = lambda x: s["Q"].mT @ (x if s["P"] is None else x @ s["P"])
                back = lambda x: s["Q"] @ (x if s["P"] is None else x @ s["P"].mT)
            s["m"].lerp_(G, 1 - b1)
            s["v"].lerp_(into(G).square(), 1 - b2)
            update = back(into(s["m"]) / (1 - b1**t) / ((s["v"] / (1 - b2**t)).sqrt() + 1e-8))
            for name, x in zip(names, update.mT if turned else update):
                self.masters[name].add_(x, alpha=-self.param_groups[0]["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.masters.values():
            p.grad = None


for text in args.settings:
    changed = dict(part.split("=") for part in text.split(",") if part)
    run(RECIPE | {key: type(RECIPE[key])(x) for key, x in changed.items()})
