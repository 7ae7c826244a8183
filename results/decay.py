"""Does a tail that forgets, or fades, earn more? The linear tails of a healed model go on learning,
as in stage 2, with one thing more:

    python results/decay.py DIR ADAPTERS DATA VALID NAME... [--steps 24] [--sequences 4]

DIR is the original and ADAPTERS the adapter.safetensors of a run. NAME is one of

    none        the tail as it was healed, fading nowhere
    length=a    its weight times (n / t)^a from t = n tokens in the tail on, n = 1,024
    beyond=a    the same with n = 4,096, the length that the tails were healed on
    decay=x     S_t = gamma S_{t-1} + phi(k_t) v_t^T with gamma = exp(-x), and z_t alike (RetNet,
                arXiv 2307.08621)
    gate        a gamma for each token, a learned function of the value that enters (in the spirit
                of GLA, arXiv 2312.06635)

Trains on --steps sequences of 4,096 tokens at stage 2's rate, tails and gates alone, averaged as
the product does; then measures KL and agreement on sequences of 8,192 tokens, by position.
"""

import argparse
import functools
import json
import sys
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from adapter import load_adapter
from distill import Healing, Optimizer, distillation, tail_names
from model import Model, load_model
from tail import EDGES, compare
from text import pack_sequences, read_documents
from tokenizer import load_tokenizer

FADES_FROM = {"length": 1024, "beyond": 4096}
TRAIN_CONTEXT = 4096


class Gate(nn.Module):
    """log gamma [B, G, T], at most 0, of tokens with these values [B, G, T, D]; -1 / 22,000 for all
    at the start. Adam moves a parameter by about its rate a step: times 20, a dozen steps can
    matter."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_key_value_heads, config.head_dim))
        self.bias = nn.Parameter(torch.zeros(config.num_key_value_heads))

    def forward(self, value: Tensor) -> Tensor:
        length = value.square().sum(-1, keepdim=True).sqrt()
        direction = value / length.clamp(min=1e-6)
        gate = torch.einsum("bgtd,gd->bgt", direction, self.weight) + self.bias[:, None]
        return -F.softplus(20 * gate - 10)


def forgetting_tail(phi_query, phi_key, value, log_gamma, chunk: int) -> tuple[Tensor, Tensor]:
    """As `kernels.tail_attention` from no past, with S_t = gamma_t S_{t-1} + phi(k_t) v_t^T.

    Within a chunk the weight of token j for query t is exp(A_t - A_j), A the sum of log gamma from
    the chunk's start; the state before the chunk counts exp(A_t)."""
    tokens, groups = phi_query.shape[2], phi_key.shape[1]
    phi_query = kernels.split_chunks(phi_query, groups, chunk)  # (B, G, n, R * C, F)
    phi_key = kernels.split_chunks(phi_key, groups, chunk)  # (B, G, n, C, F)
    value = torch.cat((value, torch.ones_like(value[..., :1])), dim=-1)  # z beside S
    value = kernels.split_chunks(value, groups, chunk)  # (B, G, n, C, D + 1)
    log_gamma = kernels.split_chunks(log_gamma[..., None], groups, chunk)[..., 0]
    A = log_gamma.cumsum(-1)  # (B, G, n, C)

    # S and z before each chunk.
    kept = torch.exp(A[..., -1:] - A)
    added = (phi_key * kept[..., None]).mT @ value  # (B, G, n, F, D + 1)
    state = torch.zeros_like(added[:, :, 0])
    states = []
    for i in range(added.shape[2]):
        states.append(state)
        state = state * torch.exp(A[:, :, i, -1])[..., None, None] + added[:, :, i]
    states = torch.stack(states, dim=2)

    # Its own tokens, the later ones hidden.
    causal = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    between = A[..., :, None] - A[..., None, :]  # (B, G, n, C, C)
    between = torch.exp(between.masked_fill(~causal, -torch.inf))
    scores = (phi_query @ phi_key.mT).unflatten(3, (-1, chunk)) * between[:, :, :, None]

    since = torch.exp(A).repeat(1, 1, 1, phi_query.shape[3] // chunk)  # (B, G, n, R * C)
    out = scores.flatten(3, 4) @ value + since[..., None] * (phi_query @ states)
    out = kernels.join_chunks(out, tokens, chunk)
    return out[..., :-1], out[..., -1:]


def attend(layer, name: str, x: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`WindowLinearAttention.attend` with another tail."""
    c = layer.config
    tokens = key.shape[2]
    chunk = min(64, tokens)
    start = torch.zeros(1, dtype=torch.int64)
    past = kernels.Past(start, key[:, :, : c.sinks], value[:, :, : c.sinks], None, None)
    in_tail = (torch.arange(tokens) - c.window - c.sinks + 1).clamp(min=0)
    phi_key = kernels.feature_map(
        kernels.leaving_window(key, tokens, c.window), c.feature_map, layer.key_map
    )
    phi_key = phi_key * (in_tail > 0)[:, None]
    phi_query = kernels.feature_map(query, c.feature_map, layer.query_map)
    if name in FADES_FROM:
        n = FADES_FROM[name]
        phi_query = phi_query * (n / in_tail.clamp(min=n))[:, None] ** x

    left = kernels.leaving_window(value, tokens, c.window).float()
    log_gamma = torch.full(left.shape[:3], -x if name == "decay" else 0.0)
    if name == "gate":
        log_gamma = layer.gate(left)
    numerator, denominator = forgetting_tail(phi_query, phi_key, left, log_gamma, chunk)

    local = kernels.local_attention(query, key, value, past, c.window, chunk)
    b = layer.tail_logit.view(-1, 1, 1).where(denominator > 0, -torch.inf)
    return kernels.join_terms(*local, numerator, denominator, b).to(query.dtype)


def change_tails(student: Model, name: str, x: float) -> dict[str, nn.Parameter]:
    """Gives the student these tails. Returns what learns, by name."""
    parameters = dict(student.named_parameters())
    trained = {key: parameters[key] for key in tail_names(student)}
    for i, tier in enumerate(student.plan):
        if tier == "L" and name != "none":
            layer = student.layers[i].self_attn
            layer.attend = functools.partial(attend, layer, name, x)
            if name == "gate":
                layer.gate = Gate(student.config)
                for key, parameter in layer.gate.named_parameters():
                    trained[f"layers.{i}.self_attn.gate.{key}"] = parameter
    return trained


def trial(given: str, teacher: Model, train, valid, targets, args) -> dict:
    """The figures of one NAME."""
    started = time.monotonic()
    name, _, x = given.partition("=")
    student = load_adapter(teacher, args.adapters)
    student.config.healed_context = None
    trained = change_tails(student, name, float(x or 0))
    for parameter in trained.values():
        parameter.requires_grad_(True)

    optimizer = Optimizer(trained)
    rate = Healing(tokens=10**9).tail_lr
    for step in range(args.steps):
        loss = distillation(teacher, student, train[step : step + 1])
        optimizer.step(rate, step + 1)
        seconds = time.monotonic() - started
        progress = f"  {given}: step {step + 1} of {args.steps}, KL {float(loss):.4f}"
        print(f"{progress}, {seconds:.0f} s", file=sys.stderr, flush=True)
    optimizer.end_stage()

    kl, same = compare(student, teacher, valid, targets)
    figures = {}
    for a, b in pairwise(EDGES):
        means = (float(kl[a:b].mean()), float(same[a:b].mean()))
        figures[f"{a:,}-{b:,}"] = [round(mean, 4) for mean in means]
    return {"by_position": figures, "seconds": round(time.monotonic() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="DIR")
    add("adapters", type=Path, metavar="ADAPTERS")
    add("data", metavar="DATA")
    add("valid", metavar="VALID")
    add("names", nargs="+", metavar="NAME")
    add("--steps", type=int, default=24, help="[%(default)s]")
    add("--sequences", type=int, default=4, help="to measure on [%(default)s]")
    args = parser.parse_args()

    teacher = load_model(args.model)
    tokenizer = load_tokenizer(args.model)
    eos = teacher.config.eos_token_ids
    context = EDGES[-1]
    train = pack_sequences(read_documents(args.data), tokenizer, eos, context, 24 * context)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(7))
    train = train[order].view(-1, TRAIN_CONTEXT)
    documents = read_documents(args.valid, "--valid")
    valid = pack_sequences(documents, tokenizer, eos, context, args.sequences * context)
    with torch.no_grad():
        targets = [teacher.hidden(row) for row in valid.split(1)]

    for given in args.names:
        row = {"name": given, "steps": args.steps, "sequences": args.sequences}
        row |= trial(given, teacher, train, valid, targets, args)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
