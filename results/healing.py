"""Short healing runs that differ in one thing, to see what a change of the recipe or of the plan
buys at equal tokens:

    python results/healing.py MODEL DATA VALID [--tokens 48k] NAME...

NAME is a row of RECIPES or PLANS below. Each heals on the first tokens of a fixed shuffle of DATA,
the learning rate warmed up over a twentieth of the steps and lowered to zero along a cosine (the
product's, until "the rate constant until a last fifth" beat it). It ends with KL and top-1
agreement on 16 sequences of VALID, KL on the same text from position 2,048 of longer ones on, and
passkey recall, 10 prompts a length. Rows are appended to results/healing.jsonl. What is not in the
product (hidden-state alignment, least squares, temperature and so on) is written out here.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import Optimizer, add_adapters, distillation, merge_adapters, tail_names
from divergence import sliced_kl
from kernels import swiglu
from measure import compare_by_position, passkey_recall, quantile
from model import Model, convert, load_model
from terminal import token_count
from text import pack_sequences, read_documents
from tokenizer import load_tokenizer

TRANSFER_RATE = 1e-2

# All settings, with their values in the first row. The plans are SmolLM2's.
DEFAULT = {
    "plan": "LLSLSLXLXXLXLLLSLXSLSSSSLLXLLL",  # --keep 8 --drop 6, results/smollm2-200k/scan.json
    "window": 64,
    "sinks": 4,
    "feature_map": "hedgehog",
    "batch": 1,
    "context": 1024,
    "lr": 1e-3,
    "rank": 16,
    "full": False,  # all weights of the blocks instead of adapters
    "adapters": "",  # only those with this in their names
    "norms": False,  # trained too
    "muon": False,  # on the adapters
    "tail_rate_factor": 1.0,
    "cooldown": 0.0,  # share of the steps in which a constant rate falls; 0 for a cosine
    "transfer": 0.05,  # share of the steps for attention transfer
    "hidden": 0.0,  # weight of hidden-state alignment
    "solve": 0,  # tokens for least squares
    "temperature": 1.0,
    "cross_entropy": 0.0,  # its share of the loss
    "narrow": 0,  # window of every fourth step
    "own_text": False,  # sampled from the teacher
}
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
    "sequences of 512, a tenth of the loss the text's own cross-entropy": {
        "context": 512,
        "cross_entropy": 0.1,
    },
    "sequences of 512, a window of 16 in every fourth step": {"context": 512, "narrow": 16},
    "sequences of 512, sampled from the teacher": {"context": 512, "own_text": True},
    "sequences of 512, the norms trained too": {"context": 512, "norms": True},
    "sequences of 512, adapters on the MLPs alone": {"context": 512, "adapters": ".mlp."},
    "sequences of 2048": {"context": 2048},
    "sequences of 512, rank 64": {"context": 512, "rank": 64},
    "sequences of 512, the tails at ten times the rate": {"context": 512, "tail_rate_factor": 10.0},
    "sequences of 512, the rate constant until a last fifth": {"context": 512, "cooldown": 0.2},
    "sequences of 512, after least squares": {"context": 512, "solve": 24576},
    "sequences of 512, all weights of the blocks, lr 3e-4": {
        "context": 512,
        "full": True,
        "lr": 3e-4,
    },
}

# The window of 30 L layers that keep as many bytes of 1,024 tokens as 8 S and 16 L layers.
EQUAL_CACHE = 244
LINEAR = {"plan": "L" * 30, "window": 0, "sinks": 0}
# All with sequences of 512: the row of that name in RECIPES is the tier plan's.
PLANS = {
    "tier, L without its tail": {"feature_map": "none"},
    "tier, none removed": {"plan": "LLLLSLLLSLLLLLLSLLSLSSSSLLLLLL"},  # --keep 8 --drop 0
    "paper": {"plan": "SSLLLLLLXXLLXLLSSXSSSLLLSXXLLL"},
    # The same softmax layers; X drawn with seed 0.
    "random attention removed": {"plan": "LXSLSLLLLLXLLLXSXLSXSSSSXLLLLL"},
    "uniform L (LoLCATs)": {"plan": "L" * 30, "window": EQUAL_CACHE},
    "uniform window and sinks (StreamingLLM)": {
        "plan": "L" * 30,
        "window": EQUAL_CACHE + 130,
        "feature_map": "none",
    },
    "uniform linear, hedgehog": LINEAR,
    "uniform linear, relu (SUPRA)": LINEAR | {"feature_map": "relu"},
    "uniform linear, favor (Performer)": LINEAR | {"feature_map": "favor"},
}


# --- other losses ------------------------------------------------------------------------------


def hidden_states(model: Model, ids: Tensor) -> list[Tensor]:
    """The residual stream after each layer."""
    x = model.embed_tokens(ids)
    states = []
    for i in range(len(model.layers)):
        x = model.run_layers(x, i, i + 1)
        states.append(x)
    return states


def attention_transfer(teacher: Model, student: Model, ids: Tensor, weight=1.0) -> Tensor:
    """Stage 1 on ids [B, T]. Adds the gradients of the error, averaged over the layers with tails
    and the sequences, and returns it; both times `weight`. The layers are independent, so the
    gradient of each is taken at once and no activations are kept."""
    total = torch.zeros((), device=ids.device)
    rotary = teacher.rotary(ids.shape[1])
    x = teacher.embed_tokens(ids)  # (B, T, d)
    with_tails = {int(name.split(".")[1]) for name in tail_names(student)}
    for i, (ours, theirs) in enumerate(zip(student.layers, teacher.layers, strict=True)):
        if i in with_tails:
            normed = theirs.input_layernorm(x)
            with torch.no_grad():
                target = theirs.self_attn(normed, rotary).float()
            difference = ours.self_attn(normed, rotary).float() - target
            error = difference.square().mean((1, 2)) / target.square().mean((1, 2))  # (B)
            error = error.mean() * weight / len(with_tails)
            error.backward()
            total += error.detach()
        with torch.no_grad():
            x = teacher.run_layers(x, i, i + 1)
    return total


def aligned_distillation(teacher: Model, student: Model, ids: Tensor, weight: float) -> Tensor:
    """KL plus `weight` times the squared distance of the residual streams after each layer,
    relative to the teacher's, averaged."""
    with torch.no_grad():
        theirs = hidden_states(teacher, ids)
    ours = hidden_states(student, ids)
    target = teacher.norm(theirs[-1]).flatten(0, 1)
    kl = sliced_kl(student.norm(ours[-1]).flatten(0, 1), target, student.head, teacher.head)

    distances = []
    for a, b in zip(ours, theirs, strict=True):
        difference = (a.float() - b.float()).square().sum(-1)
        distances.append((difference / b.float().square().sum(-1)).mean())
    (kl + weight * sum(distances) / len(distances)).backward()
    return kl.detach()


def softened_distillation(
    teacher: Model, student: Model, ids: Tensor, temperature: float, share: float
) -> Tensor:
    """(1 - share) times tau^2 KL of the distributions at temperature tau (arXiv 1503.02531), plus
    `share` times the cross-entropy of the text."""
    with torch.no_grad():
        target = teacher.hidden(ids).flatten(0, 1) / temperature
    hidden = student.hidden(ids)
    softened = hidden.flatten(0, 1) / temperature
    kl = sliced_kl(softened, target, student.head, teacher.head) * temperature**2

    loss = (1 - share) * kl
    if share:
        logits = (hidden[:, :-1].flatten(0, 1) @ student.head.T).float()
        loss = loss + share * F.cross_entropy(logits, ids[:, 1:].flatten())
    loss.backward()
    return kl.detach()


@torch.no_grad()
def least_squares(teacher: Model, student: Model, ids: Tensor, ridge: float = 1e-2) -> None:
    """Gives every MLP's last matrix, one layer after the other, the values that bring the student's
    residual stream nearest to the teacher's in least squares, each token weighed by the inverse
    square of its teacher's length. No gradients."""
    rotary = teacher.rotary(ids.shape[1])
    theirs = [teacher.embed_tokens(part) for part in ids.split(4)]
    ours = [x.clone() for x in theirs]
    for teachers, students in zip(teacher.layers, student.layers, strict=True):
        theirs = [teachers(x, rotary) for x in theirs]
        if students.self_attn is not None:
            ours = [x + students.self_attn(students.input_layernorm(x), rotary) for x in ours]

        mlp = students.mlp
        old = mlp.down_proj.weight
        gram, cross = 0, 0
        inner = []
        for x, y in zip(ours, theirs, strict=True):
            normed = students.post_attention_layernorm(x)
            a = swiglu(mlp.gate_proj(normed), mlp.up_proj(normed))
            weight = y.float().square().mean(-1, keepdim=True).rsqrt()
            missing = y.float() - x.float() - (a @ old.T).float()
            missing = (missing * weight).flatten(0, 1)
            scaled = (a.float() * weight).flatten(0, 1)
            gram = gram + scaled.T @ scaled
            cross = cross + missing.T @ scaled
            inner.append(a)

        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram))
        new = (old.float() + torch.linalg.solve(gram, cross.T).T).to(old.dtype)
        mlp.down_proj.weight = nn.Parameter(new, requires_grad=False)
        ours = [x + a @ new.T for x, a in zip(ours, inner, strict=True)]


@torch.inference_mode()
def sample_text(teacher: Model, starts: Tensor, context: int) -> Tensor:
    """Sequences [N, context] that the teacher writes on from 16 tokens each, at temperature 1."""
    texts = []
    for i, ids in enumerate(starts.split(32)):
        texts.append(teacher.generate(ids[:, :16], context - 16, temperature=1.0, seed=i))
    return torch.cat(texts).clone()


# --- what learns -------------------------------------------------------------------------------


class Muon:
    """For the adapters' factors: the direction of steepest descent in the spectral norm (Muon,
    arXiv 2502.16982), momentum M = 0.95 M + G, update (G + 0.95 M) orthogonalised, its entries
    scaled to a mean square of 1, as Adam's are. Exact, since the Gram matrix of a factor is
    rank x rank."""

    def __init__(self, factors: list[nn.Parameter]):
        self.momentum = {p: torch.zeros_like(p) for p in factors}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for p, m in self.momentum.items():
            if p.grad is None:
                continue
            m.mul_(0.95).add_(p.grad)
            g = p.grad + 0.95 * m
            tall = g.shape[0] > g.shape[1]
            g = g if tall else g.T  # (long, rank)
            values, vectors = torch.linalg.eigh(g.T @ g)
            scale = (values.clamp(min=0) + 1e-6 * values[-1] + 1e-30).rsqrt()
            g = (g @ vectors) * scale @ vectors.T * len(g) ** 0.5
            p.sub_(rate * (g if tall else g.T))
            p.grad = None


def own_weights(model: nn.Module) -> None:
    """Copies of its parameters, in place of those that it shares."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))


def make_trainable(student: Model, o: dict) -> dict[str, nn.Parameter]:
    """Returns what learns, by name."""
    tails = tail_names(student)
    if o["full"]:
        own_weights(student)
    else:
        add_adapters(student, o["rank"], 0)
    if o["norms"]:
        for layer in student.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                if norm is not None:
                    own_weights(norm)
    student.requires_grad_(False)

    trained = {}
    for name, parameter in student.named_parameters():
        is_adapter = name.endswith((".A", ".B")) and o["adapters"] in name
        is_norm = o["norms"] and "layernorm" in name
        is_weight = o["full"] and "embed" not in name and not name.endswith("_map")
        if name in tails or is_adapter or is_norm or is_weight:
            trained[name] = parameter
    return trained


class MasterOptimizer(Optimizer):
    """Trains float32 copies, and rounds them to weights that are bf16."""

    def __init__(self, weights: dict[str, nn.Parameter]):
        self.weights = weights
        super().__init__({name: nn.Parameter(x.detach().float()) for name, x in weights.items()})

    @torch.no_grad()
    def step(self, rate: float, t: int) -> None:
        for name, weight in self.weights.items():
            self.trained[name].grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        super().step(rate, t)
        for name, weight in self.weights.items():
            weight.copy_(self.trained[name])


class Optimizers:
    """Adam for most, at another rate for the tails where that is asked for, and Muon for the
    adapters where that is."""

    def __init__(self, trained: dict[str, nn.Parameter], tails: set[str], o: dict):
        factors, fast, rest = {}, {}, {}
        for name, parameter in trained.items():
            parameter.requires_grad_(True)
            if o["muon"] and name.endswith((".A", ".B")):
                factors[name] = parameter
            elif o["tail_rate_factor"] != 1 and name in tails:
                fast[name] = parameter
            else:
                rest[name] = parameter
        self.muon = Muon(list(factors.values()))
        self.adams = [(MasterOptimizer(rest), 1.0)] if rest else []
        if fast:
            self.adams.append((MasterOptimizer(fast), o["tail_rate_factor"]))

    def step(self, rate: float, transfer: bool, t: int) -> None:
        self.muon.step(rate)
        for adam, factor in self.adams:
            adam.step(rate * (1.0 if transfer else factor), t)


# --- a run -------------------------------------------------------------------------------------


@torch.no_grad()
def judge(teacher: Model, student: Model, valid: Tensor) -> dict[str, float]:
    """KL and agreement on 16 sequences of 1,024 tokens; KL on the same text as 4 of 4,096, from
    position 2,048 on."""
    kl, same = compare(teacher, student, valid)
    late_kl, _ = compare(teacher, student, valid.view(-1, 4096))
    return {
        "kl": float(kl.mean()),
        "agreement": float(same.mean()),
        "kl_from_2048": float(late_kl[:, 2048:].mean()),
    }


def compare(teacher: Model, student: Model, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """KL and agreement [N, T] at each position of sequences [N, T]."""
    parts = []
    for ids in sequences.split(4096 // sequences.shape[1]):
        heads = (student.head, teacher.head)
        following = F.pad(ids[:, 1:], (0, 1))
        hidden, target = student.hidden(ids), teacher.hidden(ids)
        parts.append(compare_by_position(hidden, target, *heads, following))
    _, kl, same = torch.cat(parts, dim=1)
    return kl, same


def shuffle(train: Tensor, context: int) -> Tensor:
    """Sequences [N, context] in a fixed order."""
    count = train.numel() // context
    sequences = train.flatten()[: count * context].view(count, context)
    return sequences[torch.randperm(count, generator=torch.Generator().manual_seed(1))]


def learning_rate(done: int, steps: int, peak: float, cooldown: float) -> float:
    """Of a stage's step after `done` of its `steps`."""
    left = (steps - done) / steps
    fall = 0.5 * (1 - math.cos(math.pi * left))
    if cooldown:
        fall = min(1, left / cooldown)
    return peak * min(1, (done + 1) / max(1, steps * 0.05)) * fall


def loss_of(teacher: Model, student: Model, ids: Tensor, transfer: bool, o: dict) -> Tensor:
    """Adds the gradients and returns the loss."""
    if transfer:
        return attention_transfer(teacher, student, ids)
    if o["hidden"]:
        return aligned_distillation(teacher, student, ids, o["hidden"])
    if o["temperature"] != 1 or o["cross_entropy"]:
        return softened_distillation(teacher, student, ids, o["temperature"], o["cross_entropy"])
    return distillation(teacher, student, ids, compiled=o["compile"])


def heal(teacher: Model, student: Model, train: Tensor, steps: int, o: dict) -> float:
    """Heals the student in place. Returns tokens a second."""
    tails = tail_names(student)
    trained = make_trainable(student, o)
    optimizers = Optimizers(trained, tails, o)
    transfer_steps = round(o["transfer"] * steps) if tails else 0
    if o["compile"]:
        teacher.compiled_shapes.add((o["batch"], o["context"]))

    seconds = []
    for step in range(steps):
        start = time.monotonic()
        transfer = step < transfer_steps
        for name, parameter in trained.items():
            parameter.requires_grad_(not transfer or name in tails)
        narrow = o["narrow"] and step % 4 == 3
        student.config.window = o["narrow"] if narrow else o["window"]

        ids = train[step * o["batch"] : (step + 1) * o["batch"]]
        loss = loss_of(teacher, student, ids, transfer, o)
        done, count, peak = step - transfer_steps, steps - transfer_steps, o["lr"]
        if transfer:
            done, count, peak = step, transfer_steps, TRANSFER_RATE
        optimizers.step(learning_rate(done, count, peak, o["cooldown"]), transfer, done + 1)

        seconds.append(time.monotonic() - start)
        if (step + 1) % max(1, steps // 10) == 0:
            progress = f"  step {step + 1} of {steps}, loss {float(loss):.4f}"
            print(progress, file=sys.stderr, flush=True)

    student.config.window = o["window"]
    if not o["full"]:
        merge_adapters(student)
    return o["batch"] * o["context"] / quantile(seconds, 0.5)


def trial(teacher: Model, tokenizer, train: Tensor, valid: Tensor, tokens: int, o: dict) -> dict:
    """The figures of one row."""
    started = time.monotonic()
    torch.manual_seed(0)
    train = shuffle(train, o["context"])
    if o["own_text"]:
        train = sample_text(teacher, train[: tokens // o["context"]], o["context"])
    student = convert(teacher, o["plan"], o["window"], o["sinks"], o["feature_map"])
    figures = {"before": judge(teacher, student, valid)}

    used = o["solve"] // o["context"]
    if used:
        least_squares(teacher, student, train[:used])
        figures["after_least_squares"] = judge(teacher, student, valid)
    steps = (tokens - used * o["context"]) // (o["batch"] * o["context"])
    rate = heal(teacher, student, train[used:], steps, o)

    figures |= judge(teacher, student, valid)
    figures["recall"] = passkey_recall(student, tokenizer, valid, (512, 2048), 2)
    return figures | {"tokens_per_second": rate, "seconds": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL")
    add("data", metavar="DATA")
    add("valid", metavar="VALID")
    add("names", nargs="+", metavar="NAME", choices=[*RECIPES, *PLANS])
    add("--tokens", type=token_count, default=49152, help="of each row [%(default)s]")
    add("--plan", help="of the rows in RECIPES [SmolLM2's]")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="[%(default)s]")
    add("--compile", action="store_true", help="run healing through torch.compile")
    out = Path(__file__).with_name("healing.jsonl")
    add("--out", type=Path, default=out, help="rows are appended to it [results/healing.jsonl]")
    args = parser.parse_args()

    teacher = load_model(args.model, dtype=getattr(torch, args.dtype))
    tokenizer = load_tokenizer(args.model)
    eos = teacher.config.eos_token_ids
    train = pack_sequences(read_documents(args.data), tokenizer, eos, 1024)
    valid = pack_sequences(read_documents(args.valid, "--valid"), tokenizer, eos, 1024, 16 * 1024)
    for name in args.names:
        changed = RECIPES[name] if name in RECIPES else {"context": 512} | PLANS[name]
        settings = DEFAULT | changed
        if args.plan and name in RECIPES:
            settings["plan"] = args.plan
        settings["compile"] = args.compile
        row = {"name": name, "tokens": args.tokens, **settings}
        row |= trial(teacher, tokenizer, train, valid, args.tokens, settings)
        print(json.dumps(row), flush=True)
        with args.out.open("a") as rows:
            rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
