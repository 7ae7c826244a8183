"""Stage 3 of healing alone, on a model that was healed without it:

    python results/long_stage.py MODEL --base DIR --data TEXT --out OUT [--steps 8] [--context 4096] [--lr 1e-2]

Trains the tails on KL to the base over `steps` sequences from the last part of the text, and saves the model; tail.py measures it.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

from distill import Optimizer, distillation, pack, read_documents
from model import load_model, load_tokenizer, save_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
for flag in ("--base", "--data", "--out"):
    parser.add_argument(flag, required=True)
parser.add_argument("--steps", type=int, default=8), parser.add_argument("--context", type=int, default=4096)
parser.add_argument("--lr", type=float, default=1e-2)
args = parser.parse_args()

base, student = (load_model(path, dtype=torch.bfloat16) for path in (args.base, args.model))
tokenizer = load_tokenizer(args.base)
train = pack(read_documents(args.data), tokenizer, base.config.eos_token_ids, args.context)[-args.steps:]
optimizer = Optimizer({name: p.requires_grad_(True) for name, p in student.named_parameters() if name.endswith(("_map", "tail_logit"))})
for step, ids in enumerate(train):
    loss = distillation(base, student, ids[None])
    optimizer.step(args.lr * min(1, (step + 1) / 2) * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
    print(f"step {step}, KL {float(loss):.4f}", flush=True)
save_model(student.requires_grad_(False), Path(args.out), Path(args.base))
