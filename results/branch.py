"""Ends a long healing run now, on the side, while the run itself goes on:

    python results/branch.py OUT/healing.safetensors --model DIR --data TEXT --valid TEXT --out BRANCH [--tail-steps 24]

In stage 2 a run takes the same steps whatever its budget, but for attention transfer, a hundredth of it, and the average of its weights is
its result at any time. So a copy of the checkpoint, its weights replaced by their average, goes on with stage 3, in as many steps of one
sequence of 4,096 as `--tail-steps` says, and BRANCH becomes a model folder.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import bench
from distill import Healing, heal, pack, read_documents
from model import convert, load_model, load_tokenizer, save_model, write_file

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint")
for flag in ("--model", "--data", "--valid", "--out"):
    parser.add_argument(flag, required=True)
parser.add_argument("--tail-steps", type=int, default=24)
args = parser.parse_args()

bench.set_up(eager=False)
out = Path(args.out)
out.mkdir(parents=True, exist_ok=True)
with safe_open(args.checkpoint, framework="pt") as file:
    metadata, names = file.metadata(), set(file.keys())
    tensors = {name: file.get_tensor(f"{name}/average" if f"{name}/average" in names else name).clone() for name in names}
identity, step = json.loads(metadata["identity"]), int(metadata["step"])
settings = Healing(**{field.name: identity[field.name] for field in fields(Healing)})
settings.short_steps, settings.steps = step, step + args.tail_steps
recorded = len(json.loads(metadata["curve"])["valid"])
settings.validates = lambda i: i < recorded or i in (settings.short_steps, settings.steps)
if not (out / "healing.safetensors").exists():
    write_file(out / "healing.safetensors", lambda path: save_file(tensors, path, metadata=metadata))

base, tokenizer = load_model(args.model, dtype=getattr(torch, identity["dtype"])), load_tokenizer(args.model)
base.compiled_shapes.add((settings.batch, settings.context))
student = convert(base, identity["plan"], identity["window"], identity["sinks"], identity["feature_map"])
eos = base.config.eos_token_ids
train = pack(read_documents(args.data), tokenizer, eos, settings.context, settings.trained_tokens)
valid = pack(read_documents(args.valid, "--valid"), tokenizer, eos, 1024, 8 * 1024)
curve = heal(base, student, train, valid, settings, out / "healing.safetensors", identity)
save_model(student, out, args.model)
print(json.dumps({"tokens": settings.tokens_after(settings.steps), "steps": settings.steps, "transfer_steps": settings.transfer_steps, **curve}))
