"""Short healing runs that differ in one thing, to see what a change of the recipe or of the plan buys at equal tokens:

    python results/healing.py MODEL DATA VALID [--tokens 48k] NAME...        the rows of RECIPES and PLANS below by their names

Each row heals on the first `tokens` tokens of a fixed shuffle of DATA's sequences of 1,024 tokens, learning rate warmed up over a
twentieth and lowered to zero along a cosine (the product's, until "the rate constant until a last fifth" beat it). It ends with KL and
top-1 agreement on 16 sequences of VALID, KL on the same text from position 2,048 of longer ones on, and passkey recall, 10 prompts a
length. Rows are appended to results/healing.jsonl. What is not in the product (hidden-state alignment, least squares, temperature and
so on) is written out here.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import torch.nn.functional as F
from torch import nn

import bench
from distill import Optimizer, add_adapters, attention_transfer, distillation, merge_adapters, pack, read_documents, tail_names
from kernels import sliced_kl
from layerboost import token_count
from model import convert, load_model, load_tokenizer

TIER = "LLSLSLXLXXLXLLLSLXSLSSSSLLXLLL"         # --keep 8 --drop 6 from results/smollm2-200k/scan.json
DEFAULT = {"plan": TIER, "window": 64, "sinks": 4, "feature_map": "hedgehog", "batch": 1, "context": 1024, "lr": 1e-3, "rank": 16,
           "full": False, "hidden": 0.0, "solve": 0, "transfer": 0.05, "muon": False, "temperature": 1.0, "cross_entropy": 0.0, "narrow": 0,
           "own_text": False, "norms": False, "adapters": "", "tail_rate_factor": 1.0, "cooldown": 0.0}
RECIPES = {
    "batch 1": {},
    "batch 4": {"batch": 4},
    "batch 1, lr 3e-3": {"lr": 3e-3},
    "sequences of 512": {"context": 512},
    "sequences of 256": {"context": 256},
    "sequences of 512, lr 3e-3": {"context": 512, "lr": 3e-3},
    "rank 64": {"rank": 64},
    "all weights of the blocks, lr 1e-4": {"full": True, "lr": 1e-4},
    "hidden-state alignment beside KL, weight 1": {"hidden": 1.0},
    "half of the tokens on least squares, then KL": {"solve": 24576},
    "sequences of 512, no attention transfer": {"context": 512, "transfer": 0.0},
    "sequences of 512, Muon on the adapters": {"context": 512, "muon": True},
    "sequences of 512, temperature 2": {"context": 512, "temperature": 2.0},
    "sequences of 512, a tenth of the loss the text's own cross-entropy": {"context": 512, "cross_entropy": 0.1},
    "sequences of 512, a window of 16 in every fourth step": {"context": 512, "narrow": 16},
    "sequences of 512, sampled from the teacher": {"context": 512, "own_text": True},
    "sequences of 512, the norms trained too": {"context": 512, "norms": True},
    "sequences of 512, adapters on the MLPs alone": {"context": 512, "adapters": ".mlp."},
    "sequences of 2048": {"context": 2048},
    "sequences of 512, rank 64": {"context": 512, "rank": 64},
    "sequences of 512, the tails at ten times the rate": {"context": 512, "tail_rate_factor": 10.0},
    "sequences of 512, the rate constant until a last fifth": {"context": 512, "cooldown": 0.2},
    "sequences of 512, after least squares": {"context": 512, "solve": 24576},
    "sequences of 512, all weights of the blocks, lr 3e-4": {"context": 512, "full": True, "lr": 3e-4},
}
EQUAL_CACHE = 244       # the window of 30 L layers that keep as many bytes of a sequence of 1,024 tokens as 8 S and 16 L layers
PLANS = {               # all with sequences of 512: the row of that name in RECIPES is the tier plan's
    "tier, L without its tail": {"feature_map": "none"},
    "tier, none removed": {"plan": "LLLLSLLLSLLLLLLSLLSLSSSSLLLLLL"},                   # --keep 8 --drop 0
    "paper": {"plan": "SSLLLLLLXXLLXLLSSXSSSLLLSXXLLL"},
    "greedy": {"plan": "LLSLLLXLSXLLXLLSLXSLSSSSLXXLLL"},                           # --keep 8 --drop 6 --planner greedy
    "random attention removed": {"plan": "LXSLSLLLLLXLLLXSXLSXSSSSXLLLLL"},      # the same softmax layers; X drawn with seed 0
    "uniform L (LoLCATs)": {"plan": "L" * 30, "window": EQUAL_CACHE},
    "uniform window and sinks (StreamingLLM)": {"plan": "L" * 30, "window": EQUAL_CACHE + 130, "feature_map": "none"},
    "uniform linear, hedgehog": {"plan": "L" * 30, "window": 0, "sinks": 0},
    "uniform linear, relu (SUPRA)": {"plan": "L" * 30, "window": 0, "sinks": 0, "feature_map": "relu"},
    "uniform linear, favor (Performer)": {"plan": "L" * 30, "window": 0, "sinks": 0, "feature_map": "favor"},
}


def hidden_states(model, ids):
    """The residual stream after each layer."""
    x, states = model.embed_tokens(ids), []
    for i in range(len(model.layers)):
        x = model.run_layers(x, i, i + 1)
        states.append(x)
    return states


def softened_distillation(teacher, student, ids, temperature: float, share: float):
    """(1 - share) times tau^2 KL of the distributions at temperature tau (arXiv 1503.02531), plus `share` times the cross-entropy
    of the text."""
    with torch.no_grad():
        theirs = teacher.hidden(ids)
    ours = student.hidden(ids)
    kl = sliced_kl(ours.flatten(0, 1) / temperature, theirs.flatten(0, 1) / temperature, student.head, teacher.head) * temperature**2
    loss = (1 - share) * kl
    if share:
        loss = loss + share * F.cross_entropy((ours[:, :-1].flatten(0, 1) @ student.head.T).float(), ids[:, 1:].flatten())
    loss.backward()
    return kl.detach()


@torch.inference_mode()
def sampled(teacher, starts, context: int, together: int = 32):
    """Sequences [N, context] that the teacher writes on from 16 tokens each, at temperature 1."""
    return torch.cat([teacher.generate(ids[:, :16], context - 16, 1.0, seed=i) for i, ids in enumerate(starts.split(together))]).clone()


def aligned_distillation(teacher, student, ids, weight: float):
    """KL plus `weight` times the squared distance of the residual streams after each layer, relative to the teacher's, averaged."""
    with torch.no_grad():
        theirs = hidden_states(teacher, ids)
    ours = hidden_states(student, ids)
    kl = sliced_kl(student.norm(ours[-1]).flatten(0, 1), teacher.norm(theirs[-1]).flatten(0, 1), student.head, teacher.head)
    square = lambda x: x.float().square().sum(-1)
    distance = sum((square(a.float() - b.float()) / square(b)).mean() for a, b in zip(ours, theirs)) / len(ours)
    (kl + weight * distance).backward()
    return kl.detach()


@torch.no_grad()
def least_squares(teacher, student, ids, ridge: float = 1e-2) -> None:
    """Gives every MLP's last matrix, one layer after the other, the values that bring the student's residual stream nearest to
    the teacher's in least squares, each token weighed by the inverse square of its teacher's length. No gradients."""
    rotary = teacher.rotary(ids.shape[1])
    theirs = [teacher.embed_tokens(x) for x in ids.split(4)]
    ours = [x.clone() for x in theirs]
    for t, s in zip(teacher.layers, student.layers):
        theirs = [t(x, rotary) for x in theirs]
        if s.self_attn is not None:
            ours = [x + s.self_attn(s.input_layernorm(x), rotary) for x in ours]
        old, gram, cross, inner = s.mlp.down_proj.weight, 0, 0, []
        for x, y in zip(ours, theirs):
            h = s.post_attention_layernorm(x)
            a = F.silu(s.mlp.gate_proj(h)) * s.mlp.up_proj(h)
            weight = y.float().square().mean(-1, keepdim=True).rsqrt()
            missing = ((y.float() - x.float() - (a @ old.T).float()) * weight).flatten(0, 1)
            scaled = (a.float() * weight).flatten(0, 1)
            gram, cross = gram + scaled.T @ scaled, cross + missing.T @ scaled
            inner.append(a)
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
        new = (old.float() + torch.linalg.solve(gram, cross.T).T).to(old.dtype)
        s.mlp.down_proj = nn.Linear(*new.T.shape, bias=False, device="meta")
        s.mlp.down_proj.weight = nn.Parameter(new, requires_grad=False)
        ours = [x + a @ new.T for x, a in zip(ours, inner)]


class Muon:
    """For the adapters' factors: the direction of steepest descent in the spectral norm (Muon, arXiv 2502.16982), momentum M =
    0.95 M + G, update (G + 0.95 M) orthogonalised, its entries scaled to a mean square of 1, as Adam's are. Exact, since the Gram
    matrix of a factor is rank x rank."""

    def __init__(self, factors):
        self.momentum = {p: torch.zeros_like(p) for p in factors}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for p, m in self.momentum.items():
            if p.grad is not None:
                m.mul_(0.95).add_(p.grad)
                g = p.grad + 0.95 * m
                g = g if g.shape[0] > g.shape[1] else g.T                   # (long, rank)
                values, vectors = torch.linalg.eigh(g.T @ g)
                g = (g @ vectors) * (values.clamp(min=0) + 1e-6 * values[-1] + 1e-30).rsqrt() @ vectors.T * len(g) ** 0.5
                p.sub_(rate * (g if g.shape == p.shape else g.T))
                p.grad = None


@torch.no_grad()
def judge(teacher, student, valid) -> dict:
    """KL and agreement on 16 sequences of 1,024 tokens; KL on the same text as 4 of 4,096, from position 2,048 on."""
    figures = {}
    for name, sequences, first in (("kl", valid, 0), ("kl_from_2048", valid.view(-1, 4096), 2048)):
        total = torch.zeros(3, dtype=torch.float64)
        for ids in sequences.split(4096 // sequences.shape[1]):
            for ours, theirs, row in zip(student.hidden(ids), teacher.hidden(ids), ids):
                total += bench.compare_rows(ours[first:], student.head, theirs[first:], teacher.head, row[first:])
        count = sequences[:, first:].numel()
        figures |= {name: float(total[1]) / count} | ({} if first else {"agreement": float(total[2]) / count})
    return figures


def trial(teacher, tokenizer, train, valid, tokens: int, o: dict) -> dict:
    started = time.monotonic()
    torch.manual_seed(0)
    train = train.flatten()[:train.numel() // o["context"] * o["context"]].view(-1, o["context"])
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(1))]
    if o["own_text"]:
        train = sampled(teacher, train[:tokens // o["context"]], o["context"])
    student = convert(teacher, o["plan"], o["window"], o["sinks"], o["feature_map"])
    tails = tail_names(student)
    teacher.compiled_shapes.add((o["batch"], o["context"]))
    figures = {"before": judge(teacher, student, valid)}
    used = o["solve"] // o["context"]
    if used:
        least_squares(teacher, student, train[:used])
        figures["after_least_squares"] = judge(teacher, student, valid)
    if o["full"]:
        for name, p in list(student.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            setattr(student.get_submodule(parent), leaf, nn.Parameter(p.detach().clone()))
    else:
        add_adapters(student, o["rank"], 0)
    if o["norms"]:
        for layer in student.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                if norm is not None:
                    norm.weight = nn.Parameter(norm.weight.detach().clone())
    learns = lambda name: name in tails or name.endswith((".A", ".B")) and o["adapters"] in name or o["norms"] and "layernorm" in name \
        or o["full"] and "embed" not in name and not name.endswith("_map")
    trained = {name: p for name, p in student.named_parameters() if learns(name)}
    student.requires_grad_(False)
    factors = {name for name in trained if o["muon"] and name.endswith((".A", ".B"))}
    muon = Muon([p for name, p in trained.items() if name in factors])
    apart = lambda name: name in tails and o["tail_rate_factor"] != 1
    optimizers = [(Optimizer({name: p.requires_grad_(True) for name, p in trained.items() if name not in factors and apart(name) == tail}), times)
                  for tail, times in ((False, 1.0), (True, o["tail_rate_factor"])) if not tail or o["tail_rate_factor"] != 1]
    steps = (tokens - used * o["context"]) // (o["batch"] * o["context"])
    transfer_steps = round(o["transfer"] * steps) if tails else 0
    seconds = []
    for step in range(steps):
        begun = time.monotonic()
        ids = train[used + step * o["batch"]:used + (step + 1) * o["batch"]]
        transfer = step < transfer_steps
        student.config.window = o["narrow"] if o["narrow"] and step % 4 == 3 else o["window"]
        first, last, peak = (0, transfer_steps, 1e-2) if transfer else (transfer_steps, steps, o["lr"])
        for name, p in trained.items():
            p.requires_grad_(not transfer or name in tails)
        if transfer:
            loss = attention_transfer(teacher, student, ids)
        elif o["hidden"]:
            loss = aligned_distillation(teacher, student, ids, o["hidden"])
        elif o["temperature"] != 1 or o["cross_entropy"]:
            loss = softened_distillation(teacher, student, ids, o["temperature"], o["cross_entropy"])
        else:
            loss = distillation(teacher, student, ids)
        done, warm_up = step - first, max(1, (last - first) * 0.05)
        left = (last - step) / (last - first)
        fall = min(1, left / o["cooldown"]) if o["cooldown"] else 0.5 * (1 - math.cos(math.pi * left))
        rate = peak * min(1, (done + 1) / warm_up) * fall
        muon.step(rate)
        for optimizer, times in optimizers:
            optimizer.step(rate * (1.0 if transfer else times))
        seconds.append(time.monotonic() - begun)
        if (step + 1) % max(1, steps // 10) == 0:
            print(f"  step {step + 1} of {steps}, loss {float(loss):.4f}", file=sys.stderr, flush=True)
    student.config.window = o["window"]
    if not o["full"]:
        merge_adapters(student)
    rate = o["batch"] * o["context"] / sorted(seconds)[len(seconds) // 2]
    recall = bench.passkey_recall(student, tokenizer, valid, (512, 2048), 2)["recall"]
    return figures | judge(teacher, student, valid) | {"recall": recall, "tokens_per_second": rate, "seconds": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "valid"):
        parser.add_argument(name)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--tokens", type=token_count, default=49152)
    args = parser.parse_args()
    teacher, tokenizer = load_model(args.model, dtype=torch.bfloat16), load_tokenizer(args.model)
    teacher.pack()
    eos = teacher.config.eos_token_ids
    train = pack(read_documents(args.data), tokenizer, eos, 1024)
    valid = pack(read_documents(args.valid, "--valid"), tokenizer, eos, 1024, 16 * 1024)
    for name in args.names:
        changed = RECIPES[name] if name in RECIPES else {"context": 512} | PLANS[name]
        row = {"name": name, "tokens": args.tokens, **DEFAULT, **changed, **trial(teacher, tokenizer, train, valid, args.tokens, DEFAULT | changed)}
        print(json.dumps(row), flush=True)
        with open(Path(__file__).parent / "healing.jsonl", "a") as rows:
            rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
