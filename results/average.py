"""What averages of the weights buy in a healing run whose rate stays, and how late steps should count in them:

    python results/average.py MODEL DATA VALID [--lr 1e-3] [--tokens 48k,150k,300k]

One run of stage 2 alone, one sequence of 512 tokens a step. Step t counts as t^p in an average, one for each p of POWERS. At each
number of tokens a line: validation KL, 16 sequences of 1,024 tokens, of the weights and of each average.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import bench
from distill import Optimizer, add_adapters, distillation, pack, read_documents, tail_names, validation_kl
from healing import TIER
from layerboost import token_count
from model import convert, load_model, load_tokenizer

POWERS = (1, 3, 8, 16)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name in ("model", "data", "valid"):
    parser.add_argument(name)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--tokens", default="48k,150k,300k")
args = parser.parse_args()
marks = {token_count(text) // 512 for text in args.tokens.split(",")}

bench.set_up(eager=False)
base, tokenizer = load_model(args.model, dtype=torch.bfloat16), load_tokenizer(args.model)
base.compiled_shapes.add((1, 512))
student = convert(base, TIER)
valid = pack(read_documents(args.valid), tokenizer, base.config.eos_token_ids, 1024, 16 * 1024)
train = pack(read_documents(args.data), tokenizer, base.config.eos_token_ids, 512, 2_000_000)
train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
with torch.no_grad():
    targets = [(ids, base.hidden(ids)) for ids in valid.split(4)]
tails = tail_names(student)
add_adapters(student, rank=16, seed=0)
student.requires_grad_(False)
trained = {name: p.requires_grad_(True) for name, p in student.named_parameters() if name in tails or name.endswith((".A", ".B"))}
optimizer = Optimizer(trained)
averages = {power: {name: p.detach().clone() for name, p in trained.items()} for power in POWERS}


@torch.no_grad()
def kl_of(weights: dict) -> float:
    kept = {name: p.clone() for name, p in trained.items()}
    for name, p in trained.items():
        p.copy_(weights[name])
    kl = validation_kl(student, base.head, targets)
    for name, p in trained.items():
        p.copy_(kept[name])
    return round(kl, 4)


for t in range(1, max(marks) + 1):
    distillation(base, student, train[t - 1][None])
    optimizer.step(args.lr * min(1, t / 50))
    with torch.no_grad():
        for power, average in averages.items():
            for name, p in trained.items():
                average[name].lerp_(p, (power + 1) / (power + t))
    if t in marks:
        print(json.dumps({"lr": args.lr, "tokens": t * 512, "weights": kl_of(trained)} | {f"t^{p}": kl_of(a) for p, a in averages.items()}), flush=True)
