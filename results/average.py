"""What averages of the weights buy in a healing run, and which rate, rank and optimizer go with them:

    python results/average.py MODEL DATA VALID [--tokens 48k,150k,300k] [SETTINGS ...]

SETTINGS is what a run changes, "lr=2e-3,rank=64" say, or "" for the recipe as it is: lr, rank, b_rate (the rate of B over that of A:
LoRA+, arXiv 2402.12354), decay (the rate falls as t^-decay after the first 100 steps), aligned (so many rounds of the power method turn A to what the gradient reads). Stage 2 alone, sequences of 512 tokens, the same in every run. Step t counts as t^p in an
average, one for each p of POWERS. At each number of tokens a line: validation KL, 16 sequences of 1,024 tokens, of the weights and of
each average. What the teacher gives is kept, so a run takes two thirds of its time in the product.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from torch import nn

import bench
from distill import LoRALinear, Optimizer, add_adapters, pack, read_documents, tail_names, validation_kl
from healing import TIER
from kernels import sliced_kl
from layerboost import token_count
from model import convert, load_model, load_tokenizer

POWERS = (1, 3, 8)
RECIPE = {"lr": 1e-3, "rank": 16, "b_rate": 1.0, "decay": 0.0, "aligned": 0}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("model", "data", "valid"):
    parser.add_argument(name)
parser.add_argument("settings", nargs="*", default=[""])
parser.add_argument("--tokens", default="48k,150k,300k")
args = parser.parse_args()
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
    student = convert(base, TIER)
    tails = tail_names(student)
    add_adapters(student, rank=o["rank"], seed=0)
    trained = {name: p for name, p in student.named_parameters() if name in tails or name.endswith((".A", ".B"))}
    student.requires_grad_(False)
    for p in trained.values():
        p.requires_grad_(True)
    for _ in range(o["aligned"]):
        align(student, [(train[i][None], teacher[i][None]) for i in range(8)])
    optimizer = Optimizer(trained)
    optimizer.adam = torch.optim.AdamW([{"params": [m for name, m in optimizer.masters.items() if name.endswith(".B") == b]} for b in (False, True)],
                                       lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    weights = optimizer.masters
    averages = {power: {name: p.detach().clone() for name, p in weights.items()} for power in POWERS}
    seconds = []

    @torch.no_grad()
    def kl_of(average: dict) -> float:
        kept = {name: p.clone() for name, p in weights.items()}
        for name, p in weights.items():
            p.copy_(average[name])
        optimizer.publish()
        kl = validation_kl(student, base.head, targets)
        for name, p in weights.items():
            p.copy_(kept[name])
        optimizer.publish()
        return round(kl, 4)

    for t in range(1, max(marks) + 1):
        begun = time.monotonic()
        rows = slice(t - 1, t)
        sliced_kl(student.hidden(train[rows]).flatten(0, 1), teacher[rows].flatten(0, 1), student.head, base.head).backward()
        rate = o["lr"] * min(1, t / 50) * max(1, t / 100) ** -o["decay"]
        step_with(optimizer, rate, rate * o["b_rate"])
        with torch.no_grad():
            for power, average in averages.items():
                torch._foreach_lerp_(list(average.values()), list(weights.values()), (power + 1) / (power + t))
        seconds.append(time.monotonic() - begun)
        if t in marks:
            print(json.dumps({key: x for key, x in o.items() if x != RECIPE[key]} | {"tokens": t * 512, "weights": kl_of(weights)}
                             | {f"t^{p}": kl_of(a) for p, a in averages.items()} | {"step_s": round(sorted(seconds)[len(seconds) // 2], 3)}), flush=True)


def align(student, batches) -> None:
    """A round of the power method for the largest singular vectors of every weight's gradient G, by passes with adapters that change
    nothing: with A = 0 the gradient of A is 2 B^T G, with B = 0 that of B is 2 G A^T. Ends with A [rank, inputs] of rows as long as
    those of its random start, and B = 0."""
    adapters = [m for m in student.modules() if isinstance(m, LoRALinear)]

    def gradients(of: str):
        for ids, target in batches:
            sliced_kl(student.hidden(ids).flatten(0, 1), target.flatten(0, 1), student.head, base.head).backward()
        grads = [getattr(m, of).grad for m in adapters]
        for p in student.parameters():
            p.grad = None
        return grads
    orthonormal = lambda x: torch.linalg.qr(x).Q                                # of columns
    for m, g in zip(adapters, gradients("B")):                                  # A as it is, B = 0
        m.B.data = orthonormal(g + 1e-20 * torch.randn_like(g))
        m.A.data.zero_()
    for m, g in zip(adapters, gradients("A")):
        m.A.data = orthonormal(g.T).T.contiguous()
        m.B.data.zero_()


@torch.no_grad()
def step_with(optimizer: Optimizer, rate: float, rate_of_b: float) -> None:
    """`Optimizer.step` without its average, with a rate of its own for B."""
    for name, parameter in optimizer.trained.items():
        master = optimizer.masters[name]
        if master is not parameter and parameter.grad is not None:
            master.grad, parameter.grad = parameter.grad.float(), None
    nn.utils.clip_grad_norm_(optimizer.masters.values(), 1.0)
    for group, x in zip(optimizer.adam.param_groups, (rate, rate_of_b)):
        group["lr"] = x
    optimizer.adam.step()
    optimizer.adam.zero_grad(set_to_none=True)
    optimizer.publish()


for text in args.settings:
    changed = dict(part.split("=") for part in text.split(",") if part)
    run(RECIPE | {key: type(RECIPE[key])(x) for key, x in changed.items()})
