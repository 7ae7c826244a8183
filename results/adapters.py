"""What healing learned, small enough to keep, and back into a model without training:

    python results/adapters.py keep out/smollm2/healing.safetensors FILE
    python results/adapters.py merge DIR FILE OUT

`keep` takes the adapters, in bfloat16, and the linear tails, in float32, out of a checkpoint.
`merge` converts the original model in DIR, adds them, and writes a model folder OUT, which
`python report.py OUT --base DIR ...` measures.
"""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from distill import Healing, add_adapters, merge_adapters
from hub import open_safetensors, save_safetensors
from model import Model, convert, load_model, save_model


def keep(checkpoint: Path, path: Path) -> None:
    tensors = {}
    with open_safetensors(checkpoint) as file:
        identity = file.metadata()["identity"]
        for name in file.keys():
            parameter, _, kind = name.partition("/")
            if kind == "average":
                x = file.get_tensor(name)
                is_adapter = parameter.endswith((".A", ".B"))
                tensors[parameter] = x.bfloat16() if is_adapter else x
    save_safetensors(tensors, path, {"identity": identity})


def read_identity(path: Path) -> dict:
    """The settings of the run that a file is from."""
    with open_safetensors(path) as file:
        return json.loads(file.metadata()["identity"])


@torch.no_grad()
def healed(model: Model, path: Path) -> Model:
    """The original `model` converted, with what `keep` wrote merged into it."""
    identity = read_identity(path)
    tiers = {name: identity[name] for name in ("window", "sinks", "feature_map")}
    student = convert(model, identity["plan"], **tiers)
    add_adapters(student, identity["rank"], identity["seed"])

    parameters = dict(student.named_parameters())
    with open_safetensors(path) as file:
        for name in file.keys():
            parameters[name].copy_(file.get_tensor(name))
    merge_adapters(student)

    # Files of earlier forms of the program lack the younger settings.
    names = [field.name for field in fields(Healing) if field.name in identity]
    student.config.healed_context = Healing(**{name: identity[name] for name in names}).longest
    return student


def merge(folder: str, path: Path, out: Path) -> None:
    dtype = getattr(torch, read_identity(path)["dtype"])
    save_model(healed(load_model(folder, dtype=dtype), path), out, folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("keep").add_argument
    add("checkpoint", type=Path)
    add("file", type=Path)
    add = commands.add_parser("merge").add_argument
    add("model", help="the original, a folder")
    add("file", type=Path)
    add("out", type=Path)

    args = parser.parse_args()
    if args.command == "keep":
        keep(args.checkpoint, args.file)
    else:
        merge(args.model, args.file, args.out)


if __name__ == "__main__":
    main()
