"""What healing learned, small enough to keep, and back into a model without training:

    python results/adapters.py keep out/smollm2/healing.safetensors FILE        adapters in bfloat16, the linear tails in float32
    python results/adapters.py merge DIR FILE OUT                               the original DIR converted and healed, as a model folder

then `python bench.py quality --model OUT --base DIR ...` measures it.
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distill import Healing, add_adapters, merge_adapters
from model import convert, load_model, save_model


def keep(checkpoint: str, path: str) -> None:
    with safe_open(checkpoint, framework="pt") as file:
        names = set(file.keys())                                             # Adam's moments and the weights' averages are NAME/...
        tensors = {name: file.get_tensor(f"{name}/average" if f"{name}/average" in names else name) for name in names if "/" not in name}
        identity = file.metadata()["identity"]
    tensors = {name: x.bfloat16() if name.endswith((".A", ".B")) else x for name, x in tensors.items()}
    save_file(tensors, path, metadata={"identity": identity})


def healed(model, path: str):
    """The original `model` converted, with what `keep` wrote merged into it."""
    with safe_open(path, framework="pt") as file:
        identity = json.loads(file.metadata()["identity"])
        student = convert(model, identity["plan"], identity["window"], identity["sinks"], identity["feature_map"])
        add_adapters(student, identity["rank"], identity["seed"])
        parameters = dict(student.named_parameters())
        with torch.no_grad():
            for name in file.keys():
                parameters[name].copy_(file.get_tensor(name))
    merge_adapters(student)
    student.config.healed_context = Healing(**{field.name: identity[field.name] for field in fields(Healing)}).longest
    return student


def merge(folder: str, path: str, out: str) -> None:
    with safe_open(path, framework="pt") as file:
        dtype = getattr(torch, json.loads(file.metadata()["identity"])["dtype"])
    save_model(healed(load_model(folder, dtype=dtype), path), out, folder)


if __name__ == "__main__":
    commands = {("keep", 4): keep, ("merge", 5): merge}
    command = commands.get((sys.argv[1] if len(sys.argv) > 1 else "", len(sys.argv)))
    command(*sys.argv[2:]) if command else sys.exit(__doc__)
