"""Does a tail that forgets earn more? A healed model's linear tails go on learning, as in stage 3, with one thing more:

    python results/decay.py DIR ADAPTERS DATA VALID NAME[=X]... [--steps 24] [--sequences 4]

NAME is `none` (nothing more), `length` (a learned a per head: the tail's logit is b - a log(max(1, n / 1,024)), n the tokens in the
tail), `beyond` (that from n = 4,096 on, the length that the tails were healed at), `decay` (a learned gamma per key/value head,
S_t = gamma S_{t-1} + phi(k) v^T and z_t alike; RetNet, arXiv 2307.08621) or `gate` (gamma of each token, a learned function of the value
that enters; in the spirit of GLA, arXiv 2312.06635). X is where a (`length`, `beyond`) or -log gamma (`decay`) starts in all heads, if not
near 0; with `--steps 0` it stays there. ADAPTERS is a file of results/adapters.py. `--steps` of one sequence of 4,096 tokens at stage 3's
rate, tails and gates alone, averaged as the product does; then quantiles of what was learned, and KL and agreement on sequences of
8,192 tokens, by position.
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
from safetensors import safe_open

import kernels
from distill import Healing, Optimizer, add_adapters, distillation, merge_adapters, pack, read_documents, tail_names
from model import convert, load_model, load_tokenizer

EDGES = (0, 1024, 2048, 4096, 8192)
# Adam moves a parameter by about its rate a step: these are scaled so that a dozen steps can matter.
FASTER = {"length": 5, "beyond": 5, "decay": 20, "gate": 20}


class Gate(nn.Module):
    """What one layer's tail forgets by."""

    def __init__(self, kind: str, config):
        super().__init__()
        self.kind = kind
        G, H, D = config.num_key_value_heads, config.num_attention_heads, config.head_dim
        self.bias = nn.Parameter(torch.zeros(H if kind in ("length", "beyond") else G))
        if kind == "gate":
            self.weight = nn.Parameter(torch.zeros(G, D))

    def log_gamma(self, value):
        """[B, G, T], at most 0; at the start -1 / 22,000 for every token."""
        x = FASTER[self.kind] * self.bias[None, :, None] - 10
        if self.kind == "gate":
            x = x + FASTER[self.kind] * torch.einsum("bgtd,gd->bgt", value, self.weight) / value.square().mean(-1).sqrt().clamp(min=1e-6) / value.shape[-1] ** 0.5
        return -F.softplus(x).expand(value.shape[:3])


def forgetting_tail(phi_query, phi_key, value, log_gamma, chunk: int):
    """As `kernels.tail_attention` from no past, with S_t = gamma_t S_{t-1} + phi(k_t) v_t^T. Within a chunk the weight of token j for query t
    is exp(A_t - A_j), A the sum of log gamma from the chunk's start; the state before the chunk counts exp(A_t)."""
    tokens, groups = phi_query.shape[2], phi_key.shape[1]
    phi_query = kernels.split_chunks(phi_query, groups, chunk)
    phi_key, value = kernels.split_chunks(phi_key, groups, chunk), kernels.split_chunks(value, groups, chunk)
    value = torch.cat((value, torch.ones_like(value[..., :1])), dim=-1)                         # z beside S
    A = kernels.split_chunks(log_gamma[..., None], groups, chunk)[..., 0].cumsum(-1)           # (B, G, n, C)
    added = (phi_key * torch.exp(A[..., -1:] - A)[..., None]).transpose(-1, -2) @ value        # (B, G, n, F, D + 1)
    states, state = [], torch.zeros_like(added[:, :, 0])
    for i in range(added.shape[2]):
        states.append(state)
        state = state * torch.exp(A[:, :, i, -1])[..., None, None] + added[:, :, i]
    left = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    between = torch.exp((A[..., :, None] - A[..., None, :]).masked_fill(~left, -torch.inf))    # (B, G, n, C, C)
    scores = (phi_query @ phi_key.transpose(-1, -2)).unflatten(3, (-1, chunk)) * between[:, :, :, None]
    since = torch.exp(A).repeat(1, 1, 1, phi_query.shape[3] // chunk)[..., None]
    out = kernels.join_chunks(scores.flatten(3, 4) @ value + since * (phi_query @ torch.stack(states, 2)), tokens, chunk)
    return out[..., :-1], out[..., -1:]


def attend(layer, query, key, value):
    """`WindowLinearAttention.attend` with what the layer's gate makes of its tail."""
    B, G, tokens, D = key.shape
    c, gate = layer.config, layer.gate
    start = torch.zeros(1, dtype=torch.int64)
    past = kernels.Past(start, key[:, :, :c.sinks], value[:, :, :c.sinks], None, None)
    key, value = (F.pad(x, (0, 0, c.window, 0)) for x in (key, value))
    in_tail = (torch.arange(tokens) - c.window - c.sinks + 1).clamp(min=0)
    phi_key = kernels.feature_map(key[:, :, :tokens], c.feature_map, layer.key_map) * (in_tail > 0)[:, None]
    phi_query = kernels.feature_map(query, c.feature_map, layer.query_map)
    left = value[:, :, :tokens].float()
    chunk, b = min(64, tokens), layer.tail_logit.view(-1, 1, 1)
    if gate.kind in ("length", "beyond"):
        b = b - FASTER[gate.kind] * gate.bias.view(-1, 1, 1) * torch.log((in_tail / (1024 if gate.kind == "length" else 4096)).clamp(min=1))[:, None]
        log_gamma = torch.zeros(left.shape[:3])
    else:
        log_gamma = gate.log_gamma(left)
    numerator, denominator = forgetting_tail(phi_query, phi_key, left, log_gamma, chunk)
    local_numerator, local_denominator, largest = kernels.local_attention(query, key, value, past, c.window, chunk)
    scale = torch.exp(b - largest)                  # b stays below 20 or so: nothing overflows in float32
    return ((local_numerator + scale * numerator) / (local_denominator + scale * denominator)).to(query.dtype)


@torch.no_grad()
def judge(student, teacher, ids, targets) -> dict:
    kl, same = torch.zeros(ids.shape[1]), torch.zeros(ids.shape[1])
    for row, theirs in zip(ids, targets):
        ours = student.hidden(row[None])[0]
        for start in range(0, len(row), kernels.ROWS):
            part = slice(start, start + kernels.ROWS)
            a, b = ours[part] @ student.head.T, theirs[part] @ teacher.head.T
            kl[part] += kernels.fused_kl(a, b) / len(ids)
            same[part] += (a.argmax(-1) == b.argmax(-1)).float() / len(ids)
    return {f"{a:,}-{b:,}": (round(float(kl[a:b].mean()), 4), round(float(same[a:b].mean()), 4)) for a, b in zip(EDGES, EDGES[1:])}


def trial(name, x, teacher, adapters, train, valid, targets, steps: int) -> dict:
    started = time.monotonic()
    with safe_open(adapters, framework="pt") as file:
        identity = json.loads(file.metadata()["identity"])
        student = convert(teacher, identity["plan"], identity["window"], identity["sinks"], identity["feature_map"])
        add_adapters(student, identity["rank"], identity["seed"])
        parameters = dict(student.named_parameters())
        with torch.no_grad():
            for key in file.keys():
                parameters[key].copy_(file.get_tensor(key))
    merge_adapters(student)
    student.requires_grad_(False)
    trained = {key: dict(student.named_parameters())[key] for key in tail_names(student)}
    if name != "none":
        for i, tier in enumerate(student.plan):
            if tier == "L":
                layer = student.layers[i].self_attn
                layer.gate = Gate(name, student.config).requires_grad_(False)
                layer.attend = lambda *inputs, layer=layer: attend(layer, *inputs)
                trained |= {f"layers.{i}.self_attn.gate.{key}": p for key, p in layer.gate.named_parameters()}
                if x:
                    layer.gate.bias.fill_((10 + math.log(math.expm1(float(x))) if name == "decay" else float(x)) / FASTER[name])
    settings = Healing(tokens=10**9)
    optimizer = Optimizer({key: p.requires_grad_(True) for key, p in trained.items()})
    for step in range(steps):
        loss = distillation(teacher, student, train[step:step + 1])
        optimizer.step(settings.tail_lr * min(1.0, (step + 1) / max(1, steps // 20)), step + 1)
        print(f"  {name}: step {step + 1} of {steps}, KL {float(loss):.4f}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    optimizer.end_stage()
    student.requires_grad_(False)
    biases = torch.stack([layer.self_attn.gate.bias for layer, tier in zip(student.layers, student.plan) if tier == "L"]) * FASTER[name] if name != "none" else None
    learned = {} if biases is None else {"learned": [round(float(x), 3) for x in biases.flatten().quantile(torch.tensor([0, .1, .5, .9, 1]))]}
    return learned | {"by_position": judge(student, teacher, valid, targets), "seconds": round(time.monotonic() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "adapters", "data", "valid"):
        parser.add_argument(name)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--steps", type=int, default=24), parser.add_argument("--sequences", type=int, default=4)
    args = parser.parse_args()
    teacher, tokenizer = load_model(args.model, dtype=torch.float32), load_tokenizer(args.model)
    teacher.pack()
    train = pack(read_documents(args.data), tokenizer, teacher.config.eos_token_ids, 8192, 24 * 8192)
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(7))].view(-1, 4096)
    valid = pack(read_documents(args.valid, "--valid"), tokenizer, teacher.config.eos_token_ids, 8192, args.sequences * 8192)
    with torch.no_grad():
        targets = [teacher.hidden(row[None])[0] for row in valid]
    for given in args.names:
        name, _, x = given.partition("=")
        row = {"name": given, "steps": args.steps, "sequences": args.sequences}
        print(json.dumps(row | trial(name, x, teacher, args.adapters, train, valid, targets, args.steps)), flush=True)


if __name__ == "__main__":
    main()
