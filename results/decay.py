"""Does a tail that forgets earn more? A healed model's linear tails go on learning, as in stage 3, with one thing more:

    python results/decay.py DIR ADAPTERS DATA VALID NAME... [--steps 24] [--sequences 4]

NAME is `none` (the tail as it was healed, fading nowhere), `length=a` or `beyond=a` (its weight times (n / t)^a from t = n tokens in the tail
on, n = 1,024, or 4,096, the length that the tails were healed at), `decay=x` (gamma = exp(-x) in all heads, S_t = gamma S_{t-1} + phi(k) v^T
and z_t alike; RetNet, arXiv 2307.08621) or `gate` (gamma of each token, a learned function of the value that enters; in the spirit of GLA,
arXiv 2312.06635). ADAPTERS is a file of results/adapters.py. `--steps` of one sequence of 4,096 tokens at stage 3's rate, tails and gates
alone, averaged as the product does; then KL and agreement on sequences of 8,192 tokens, by position.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import torch.nn.functional as F
from torch import nn

import kernels
from adapters import healed
from distill import Healing, Optimizer, distillation, pack, read_documents, tail_names
from model import load_model, load_tokenizer
from tail import EDGES, compare

FADES_FROM = {"length": 1024, "beyond": 4096}


class Gate(nn.Module):
    """log gamma [B, G, T], at most 0, of tokens with these values [B, G, T, D]; -1 / 22,000 for all at the start. Adam moves a parameter by
    about its rate a step: times 20, a dozen steps can matter."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_key_value_heads, config.head_dim))
        self.bias = nn.Parameter(torch.zeros(config.num_key_value_heads))

    def forward(self, value):
        direction = value / value.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-6)
        return -F.softplus(20 * (torch.einsum("bgtd,gd->bgt", direction, self.weight) + self.bias[:, None]) - 10)


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


def attend(layer, name, x, query, key, value):
    """`WindowLinearAttention.attend` with another tail."""
    c, tokens = layer.config, key.shape[2]
    past = kernels.Past(torch.zeros(1, dtype=torch.int64), key[:, :, :c.sinks], value[:, :, :c.sinks], None, None)
    key, value = (F.pad(y, (0, 0, c.window, 0)) for y in (key, value))
    in_tail = (torch.arange(tokens) - c.window - c.sinks + 1).clamp(min=0)
    phi_key = kernels.feature_map(key[:, :, :tokens], c.feature_map, layer.key_map) * (in_tail > 0)[:, None]
    phi_query = kernels.feature_map(query, c.feature_map, layer.query_map)
    if name in FADES_FROM:
        phi_query = phi_query * (FADES_FROM[name] / in_tail.clamp(min=FADES_FROM[name]))[:, None] ** x
    left = value[:, :, :tokens].float()
    log_gamma = layer.gate(left) if name == "gate" else torch.full(left.shape[:3], -x if name == "decay" else 0.0)
    numerator, denominator = forgetting_tail(phi_query, phi_key, left, log_gamma, min(64, tokens))
    local_numerator, local_denominator, largest = kernels.local_attention(query, key, value, past, c.window, min(64, tokens))
    scale = torch.exp(layer.tail_logit.view(-1, 1, 1) - largest)            # b stays below 20 or so: nothing overflows in float32
    return ((local_numerator + scale * numerator) / (local_denominator + scale * denominator)).to(query.dtype)


def trial(name, x, teacher, adapters, train, valid, targets, steps: int) -> dict:
    started = time.monotonic()
    student = healed(teacher, adapters).requires_grad_(False)
    student.config.healed_context = None
    trained = {key: dict(student.named_parameters())[key] for key in tail_names(student)}
    for i, tier in enumerate(student.plan):
        if tier == "L" and name != "none":
            layer = student.layers[i].self_attn
            layer.attend = lambda *inputs, layer=layer: attend(layer, name, x, *inputs)
            if name == "gate":
                layer.gate = Gate(student.config)
                trained |= {f"layers.{i}.self_attn.gate.{key}": p for key, p in layer.gate.named_parameters()}
    settings = Healing(tokens=10**9)
    optimizer = Optimizer({key: p.requires_grad_(True) for key, p in trained.items()})
    for step in range(steps):
        loss = distillation(teacher, student, train[step:step + 1])
        optimizer.step(settings.tail_lr, step + 1)
        print(f"  {name}: step {step + 1} of {steps}, KL {float(loss):.4f}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    optimizer.end_stage()
    kl, same = compare(student, teacher, valid, targets)
    figures = {f"{a:,}-{b:,}": (round(float(kl[a:b].mean()), 4), round(float(same[a:b].mean()), 4)) for a, b in zip(EDGES, EDGES[1:])}
    return {"by_position": figures, "seconds": round(time.monotonic() - started)}


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
        print(json.dumps(row | trial(name, float(x or 0), teacher, args.adapters, train, valid, targets, args.steps)), flush=True)


if __name__ == "__main__":
    main()
