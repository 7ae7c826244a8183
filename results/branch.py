"""Ends a long healing run early, on the side: what it would have reached with a smaller budget, while the run itself goes on.

    python results/branch.py OUT/healing.safetensors --model DIR --data TEXT --valid TEXT --tokens 300k --out BRANCH [--cool-down 0.4] [--tail-lr 1e-2]

Until its rate falls a run takes the same steps whatever its budget, but for attention transfer, a hundredth of it. So a copy of the
checkpoint goes on with the rate of a run of `tokens` in all, stage 3 included. The checkpoint should be of a little before the rate of
such a run begins to fall (72% of the tokens); of a later one the rate falls at once to where it would be. `--cool-down` is the part of
stage 2 in which its rate falls, a fifth if not given. `--tail-lr` is the rate of stage 3, if it shall not be the run's; with 0 there is
no stage 3, and its BRANCH/healing.safetensors is what others can go on from.
"""

import argparse
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from safetensors import safe_open

import bench
from distill import Healing, heal, pack, read_documents
from layerboost import token_count
from model import convert, load_model, load_tokenizer, save_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint")
for flag in ("--model", "--data", "--valid", "--out"):
    parser.add_argument(flag, required=True)
parser.add_argument("--tokens", required=True, type=token_count)
parser.add_argument("--cool-down", type=float, default=0.2)
parser.add_argument("--tail-lr", type=float)
args = parser.parse_args()

bench.set_up(eager=False)
out = Path(args.out)
out.mkdir(parents=True, exist_ok=True)
if not (out / "healing.safetensors").exists():
    shutil.copy(args.checkpoint, out / "healing.safetensors")
with safe_open(out / "healing.safetensors", framework="pt") as file:
    identity, start, recorded = (json.loads(file.metadata()[name]) for name in ("identity", "step", "curve"))
whole = Healing(**{field.name: identity[field.name] for field in fields(Healing)})
settings = Healing(**{field.name: identity[field.name] for field in fields(Healing)} | {"tokens": args.tokens})
settings.tokens, settings.transfer_steps = whole.tokens, whole.transfer_steps          # what the checkpoint was made with
settings.validates = lambda step: step < len(recorded["valid"]) if step <= start else step in (settings.short_steps, settings.steps)
if args.tail_lr == 0:
    settings.steps = settings.short_steps


def learning_rate(step: int) -> float:
    if step >= settings.short_steps:
        return Healing.learning_rate(settings, step) * (args.tail_lr / settings.tail_lr if args.tail_lr else 1)
    return settings.lr * min(1.0, (settings.short_steps - step) / (args.cool_down * (settings.short_steps - settings.transfer_steps)))


settings.learning_rate = learning_rate

base, tokenizer = load_model(args.model, dtype=getattr(torch, identity["dtype"])), load_tokenizer(args.model)
base.compiled_shapes.add((settings.batch, settings.context))
student = convert(base, identity["plan"], identity["window"], identity["sinks"], identity["feature_map"])
eos = base.config.eos_token_ids
train = pack(read_documents(args.data), tokenizer, eos, settings.context, whole.trained_tokens)
valid = pack(read_documents(args.valid, "--valid"), tokenizer, eos, 1024, 8 * 1024)
curve = heal(base, student, train, valid, settings, out / "healing.safetensors", identity)
save_model(student, out, args.model)
print(json.dumps({"tokens": settings.trained_tokens, "steps": settings.steps, "transfer_steps": settings.transfer_steps, **curve}))
