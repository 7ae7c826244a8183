"""What could stand where attention is removed, beside the linear map that does:

    python results/stand_ins.py MODEL [FORM ...] --data FILE --valid FILE

Every FORM is fitted from front to back (fit.py) for the six X layers of --keep 8 --drop 6
(results/smollm2-maps/scan.json), and measured on held-out text; those whose names end in "healed"
learn then from as many tokens as are left of 48k. Rows are appended to results/stand_ins.jsonl.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distill
import measure
import planner
import scan
from adapter import LoRALinear, add_adapters
from attention import LinearMap
from distill import Healing, heal
from fit import RIDGE
from model import Model, convert, load_model
from terminal import progress, token_count
from text import pack_sequences, read_documents
from tokenizer import load_tokenizer

RESULTS = Path(__file__).resolve().parent
TOKENS = 49_152  # fitted and healed
CONTEXT = 512
FITTED = 16_384


class TwoTokenMap(nn.Module):
    """W x_t + V x_{t-1} + c: one vector of cache."""

    def __init__(self, one: LinearMap):
        super().__init__()
        d = one.map.in_features
        self.map = nn.Linear(2 * d, d, dtype=one.map.weight.dtype).requires_grad_(False)

    def forward(self, x: Tensor, *_) -> Tensor:
        return self.map(with_before(x))

    def tail_parameters(self) -> list[str]:
        return []


def with_before(x: Tensor) -> Tensor:
    """[B, T, 2 d]: every token's vector and that of the token before."""
    return torch.cat((x, F.pad(x, (0, 0, 1, 0))[:, :-1]), dim=-1)


class FullLinear(LoRALinear):
    """W + B / 10, where B [d, d] learns: W itself, in float32, at a tenth of the adapters' rate, at
    which it would leave the fit in a few steps."""

    def __init__(self, adapted: LoRALinear):
        super().__init__(adapted.linear, 1, torch.Generator())
        d = adapted.linear.in_features
        del self.A
        self.register_buffer("A", torch.eye(d) / 20)
        self.B = nn.Parameter(torch.zeros(d, d))


def solve(inputs: list[Tensor], outputs: list[Tensor], constant=True, rank=None):
    """W and c of least squares, W of a rank if that is given: the part of its outputs that has the
    most variance."""
    x = torch.cat([part.flatten(0, 1) for part in inputs]).double()
    y = torch.cat([part.flatten(0, 1) for part in outputs]).double()
    mean_x, mean_y = (x.mean(0), y.mean(0)) if constant else (0 * x[0], 0 * y[0])
    xx = (x - mean_x).T @ (x - mean_x) / len(x)
    yx = (y - mean_y).T @ (x - mean_x) / len(x)
    xx.diagonal().add_(RIDGE * xx.diagonal().mean())
    weight = torch.linalg.solve(xx, yx, left=False)
    if rank:
        _, vectors = torch.linalg.eigh(weight @ xx @ weight.T)
        top = vectors[:, -rank:]
        weight = top @ top.T @ weight
    return weight, mean_y - weight @ mean_x


@torch.inference_mode()
def fit(original: Model, altered: Model, ids: Tensor, form: str) -> None:
    """Fits what stands in the X layers, in place, on ids [N, T]."""
    rank = int(form.split()[1]) if form.startswith("rank") else None
    theirs = [original.embed_tokens(part) for part in ids.split(4)]
    ours, entered, middle = theirs, theirs, theirs
    rotary = original.rotary(ids.shape[1])
    for i in progress(range(altered.plan.rindex("X") + 1), desc=f"fitting, {form}"):
        layer, before = altered.layers[i], original.layers[i]
        if altered.plan[i] == "X":
            attended = [x + before.self_attn(before.input_layernorm(x), rotary) for x in theirs]
            if form == "folded":
                added = [x - m for x, m in zip(ours, middle)]  # by the MLP of the layer before
                weight, _ = solve(added, [a - m for a, m in zip(attended, middle)], False)
                down = altered.layers[i - 1].mlp.down_proj
                folded = weight.to(down.weight.dtype) @ down.weight
                down.weight = nn.Parameter(folded, requires_grad=False)
                ours = [altered.run_layers(x, i - 1, i) for x in entered]
            else:
                normed = [layer.input_layernorm(x) for x in ours]
                if form.startswith("token before"):
                    layer.self_attn = TwoTokenMap(layer.self_attn)
                    normed = [with_before(x) for x in normed]
                weight, bias = solve(normed, [a - x for a, x in zip(attended, ours)], True, rank)
                layer.self_attn.map.weight.copy_(weight)
                layer.self_attn.map.bias.copy_(bias)
        entered = ours
        ours, middle = map(list, zip(*(split_layer(layer, x, rotary) for x in entered)))
        theirs = [original.run_layers(x, i, i + 1) for x in theirs]


def split_layer(layer, x: Tensor, rotary) -> tuple[Tensor, Tensor]:
    """The stream after a layer, and before its MLP."""
    middle = x
    if layer.self_attn is not None:
        middle = x + layer.self_attn(layer.input_layernorm(x), rotary)
    return middle + layer.mlp(layer.post_attention_layernorm(middle)), middle


def train_maps(model: Model, rank: int, seed: int) -> None:
    """Adapters on all linear layers, but on the maps, which learn themselves."""
    add_adapters(model, rank, seed)
    for layer, tier in zip(model.layers, model.plan, strict=True):
        if tier == "X":
            layer.self_attn.map = FullLinear(layer.self_attn.map)


FORMS = {  # the tokens that it is fitted on
    "4k": 4096,
    "16k": FITTED,
    "64k": 4 * FITTED,
    "rank 192": FITTED,
    "rank 96": FITTED,
    "rank 32": FITTED,
    "token before": FITTED,
    "folded": FITTED,
    "nothing": 0,
    "16k, healed": FITTED,
    "16k, W trained, healed": FITTED,
    "token before, healed": FITTED,
    "4k, healed": 4096,
    "folded, healed": FITTED,
    "nothing, healed": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model")
    add("forms", nargs="*", help="[all]")
    add("--data", required=True)
    add("--valid", required=True)
    add("--tokens", type=token_count, default=TOKENS)
    add("--sequences", type=int, default=16, help="of 1,024 tokens [%(default)s]")
    add("--out", type=Path, default=RESULTS / "stand_ins.jsonl")
    args = parser.parse_args()

    base = load_model(args.model, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(args.model)
    eos = base.config.eos_token_ids
    documents = read_documents(args.valid, "--valid")
    valid = pack_sequences(documents, tokenizer, eos, 1024, args.sequences * 1024)
    train = pack_sequences(read_documents(args.data), tokenizer, eos, CONTEXT, 4 * TOKENS)
    costs = planner.costs_of(
        scan.read_scan(RESULTS / "smollm2-maps" / "scan.json")["layers"], ["kl", "recall"]
    )
    plan = planner.plan_tier(costs, 8, 6)
    targets = measure.hidden_states(base, valid.split(4))

    def judge(model: Model) -> dict:
        return measure.text_quality(model, base, tokenizer, valid, targets)

    for form in args.forms or FORMS:
        start = time.monotonic()
        fitted = FORMS[form]
        removed = "linear" if fitted and form.split(",")[0] != "folded" else "nothing"
        student = convert(base, plan, removed=removed)
        if fitted:
            fit(base, student, train[-fitted // CONTEXT :], form)
        row = {"form": form, "fitted": fitted, "plan": plan, "converted": judge(student)}
        if form.endswith("healed"):
            settings = Healing(args.tokens - fitted, validations=2)
            adapters = train_maps if "W trained" in form else add_adapters
            with (
                mock.patch.object(distill, "add_adapters", adapters),
                tempfile.TemporaryDirectory() as folder,
            ):
                checkpoint = Path(folder) / "healing.safetensors"
                heal(base, student, train, valid[:2], settings, checkpoint, {"form": form})
            row |= {"healed": judge(student), "healed_tokens": settings.trained_tokens}
        row["seconds"] = time.monotonic() - start
        print(json.dumps(row), flush=True)
        with args.out.open("a") as rows:
            rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
