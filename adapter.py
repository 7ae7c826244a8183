"""What healing learns, in a small file: low-rank adapters on every linear layer (LoRA, arXiv
2106.09685), the tails of the L layers, and the linear maps of the X layers. SmolLM2's take 12 MB,
its weights 270. With the original, they give the healed model in seconds.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from hub import fingerprint, open_safetensors, parse_json, require, save_safetensors
from machine import rank_and_world
from model import Model, convert

ADAPTER_SETTINGS = ("plan", "window", "sinks", "feature_map", "removed", "healed_context")


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank one, W x + 2 B A x, with A [rank, inputs] and
    B [outputs, rank]. B starts at zero, so at first nothing changes."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.linear = linear
        outputs, inputs = linear.weight.shape
        start = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
        self.A = nn.Parameter(start.to(linear.weight.device))
        self.B = nn.Parameter(torch.zeros(outputs, rank, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.A.to(x.dtype).T) @ (2 * self.B).to(x.dtype).T

    def merged(self) -> nn.Linear:
        """The layer with a new tensor W + 2 B A; the teacher keeps using W. A and B are rounded to
        the layer's dtype, as in `forward`; the sum is rounded once."""
        weight = self.linear.weight
        A, B = (x.to(weight.dtype).float() for x in (self.A, self.B))
        weight = (weight.float() + 2 * B @ A).to(weight.dtype)
        self.linear.weight = nn.Parameter(weight, requires_grad=False)
        return self.linear


def add_adapters(model: Model, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    replace_linears(model, nn.Linear, lambda linear: LoRALinear(linear, rank, generator))


@torch.no_grad()
def merge_adapters(model: Model) -> None:
    replace_linears(model, LoRALinear, LoRALinear.merged)


def replace_linears(model: Model, kind: type, make) -> None:
    """Replaces every module of this kind inside the blocks by make(module)."""
    for parent in [m for m in model.layers.modules() if not isinstance(m, LoRALinear)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))


# --- the file ----------------------------------------------------------------------------------


def learned(original: Model, healed: Model) -> dict[str, Tensor]:
    """The parameters of a model with adapters that its original lacks: A, B, tails, maps."""
    known = {name for name, _ in original.named_parameters()}
    return {
        name: x.detach()
        for name, x in healed.named_parameters()
        if name.replace(".linear.", ".") not in known
    }


def save_adapter(original: Model, healed: Model, rank: int, path: Path) -> None:
    """Writes what is `learned`, A and B in the model's dtype, with the metadata that `load_adapter`
    needs."""
    dtype = healed.norm.weight.dtype
    tensors = {
        name: x.to(dtype) if name.endswith((".A", ".B")) else x
        for name, x in learned(original, healed).items()
    }
    about = {name: getattr(healed.config, name) for name in ADAPTER_SETTINGS}
    about |= {"base": fingerprint(*original.parameters()), "rank": rank}
    about["dtype"] = str(dtype).removeprefix("torch.")
    if rank_and_world()[0] == 0:
        save_safetensors(tensors, path, {"layerboost": json.dumps(about)})


def read_adapter(path: Path) -> dict:
    """The metadata of an adapter. Raises InputError for another kind of file."""
    fix = "give the adapter.safetensors of a run"
    with open_safetensors(path, fix) as file:
        about = parse_json((file.metadata() or {}).get("layerboost", "{}"), path)
    wanted = {*ADAPTER_SETTINGS, "base", "rank", "dtype"}
    require(
        wanted <= set(about) and about["dtype"] in ("bfloat16", "float32"),
        f"{path}: is no adapter of this program; {fix}",
    )
    return about


@torch.no_grad()
def load_adapter(model: Model, path: Path) -> Model:
    """The original `model`, healed by an adapter. Raises InputError for another original."""
    about = read_adapter(path)
    base = fingerprint(*model.parameters())
    require(
        about["base"] == base,
        f"{path}: was learned on another model (fingerprint {about['base']}, this one has {base}); "
        "give the --model that it is from",
    )
    tiers = {name: about[name] for name in ("window", "sinks", "feature_map", "removed")}
    healed = convert(model, about["plan"], **tiers)
    add_adapters(healed, about["rank"], seed=0)
    tensors = learned(model, healed)
    with open_safetensors(path) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        require(
            shapes == {name: tuple(x.shape) for name, x in tensors.items()},
            f"{path}: its tensors do not fit its plan; download it again",
        )
        for name, x in tensors.items():
            x.copy_(file.get_tensor(name))
    merge_adapters(healed)
    healed.config.healed_context = about["healed_context"]
    return healed.requires_grad_(False)
