"""The weights of a model: loading from safetensors, saving to a folder in the Hub's layout.

Conversion adds to a folder: the plan and the tier settings in config.json under "layerboost", and
the tail parameters of the L layers in model.safetensors; the attention of X layers is not stored.
"""

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from hub import (
    TOKENIZER_FILES,
    InputError,
    open_safetensors,
    read_json,
    require,
    save_safetensors,
    write_file,
    write_json,
)
from terminal import progress

# The parameters and buffers that stay float32 whatever the model's dtype.
FLOAT32 = re.compile(r"(query_map|key_map|tail_logit|frequencies)$")


def read_weights(
    folder: Path, model: nn.Module, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """The tensors of all safetensors files, one at a time: never two copies of a model in memory.
    Of a tied model the head is among them where one is stored that differs from the embedding.
    Raises InputError naming the tensors that are missing, unexpected, misshapen, stored twice, no
    floating point numbers, or not finite."""
    wanted = {name: tuple(x.shape) for name, x in model.named_parameters()}
    shapes = {"lm_head.weight": wanted["embed_tokens.weight"]} | wanted
    weights: dict[str, Tensor | None] = {}
    wrong = []
    for file in weight_files(folder):
        with open_safetensors(file) as tensors:
            for stored in progress(tensors.keys(), desc=f"loading {file.name}"):
                name = stored.removeprefix("model.")
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                fault = tensor_fault(tensors.get_slice(stored), shapes.get(name), name in weights)
                if fault:
                    wrong.append(fault.format(stored))
                    weights[name] = None
                    continue

                target = torch.float32 if FLOAT32.search(name) else dtype
                tensor = torch.empty(shapes[name], dtype=target, device=device)
                weights[name] = tensor.copy_(tensors.get_tensor(stored))
                # A sum is fast, and finite where all its terms are and it does not overflow.
                if not tensor.sum().isfinite() and not tensor.isfinite().all():
                    wrong.append(f"{stored} holds NaN or infinity")

    head = weights.get("lm_head.weight") if model.lm_head is None else None
    if head is not None:
        weights.setdefault("embed_tokens.weight", head)
    wrong += [f"missing {name}" for name in wanted if name not in weights]
    if wrong:
        shown = "; ".join(wrong[:6]) + (" ..." if wrong[6:] else "")
        raise InputError(f"{folder}: {len(wrong)} tensors do not fit config.json: {shown}")
    if head is not None and torch.equal(head, weights["embed_tokens.weight"]):
        del weights["lm_head.weight"]
    return weights


def tensor_fault(tensor, shape: tuple | None, twice: bool) -> str:
    """What is wrong with a stored tensor, or nothing; {} stands for its name."""
    if shape is None:
        return "unexpected {}"
    if twice:
        return "{} is stored twice"
    if tensor.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        return f"{{}} is of type {tensor.get_dtype()}; quantised weights are not supported"
    stored = tuple(tensor.get_shape())
    return "" if stored == shape else f"{{}} has shape {stored}, not {shape}"


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors or, where there is none, the shards that an index names. Raises InputError
    for one that is missing or outside the folder."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).exists() and index.exists():
        files = read_json(index).get("weight_map")
        require(files and isinstance(files, dict), f"{index}: has no weight_map; download it again")
        for name in files.values():
            plain = isinstance(name, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", name)
            require(plain, f"{index}: {name!r:.80} is no .safetensors file of this folder")
        names = sorted(set(files.values()))

    files = [folder / name for name in names]
    for file in files:
        if not file.exists():
            other = " (.bin files are never loaded)" if list(folder.glob("*.bin")) else ""
            raise InputError(f"{file}: no such file{other}; download the model again")
    return files


def save_model(model: nn.Module, folder: str | Path, source: str | Path) -> None:
    """Writes a folder in the Hub's layout: config.json with the plan and the tier settings,
    model.safetensors, the tokenizer files of `source`, and of a converted model the two files by
    which transformers runs it. Shards and an index of another model that lie there are deleted."""
    folder, config = Path(folder), model.config
    folder.mkdir(parents=True, exist_ok=True)
    copies = [Path(source) / name for name in TOKENIZER_FILES]

    raw = {key: x for key, x in config.raw.items() if key not in ("torch_dtype", "layerboost")}
    if "layerboost" in config.raw:
        for name in ("architectures", "auto_map"):
            raw.pop(name, None)
    raw["model_type"] = config.model_type
    raw["tie_word_embeddings"] = config.tie_word_embeddings
    raw["dtype"] = str(model.norm.weight.dtype).removeprefix("torch.")
    if set(config.plan) != {"S"}:
        # Under another name, so that no other program takes it for an ordinary checkpoint.
        # transformers runs it by the copies of two files, of which auto_map names the classes.
        family = "LayerBoost" + config.model_type.capitalize()
        module = "modeling_layerboost"
        raw["model_type"] = "layerboost"
        raw["architectures"] = [family]
        raw["auto_map"] = {
            "AutoConfig": f"{module}.{family}Config",
            "AutoModelForCausalLM": f"{module}.{family}",
        }
        copies += [Path(__file__).parent / name for name in (f"{module}.py", "kernels.py")]
        raw["layerboost"] = {
            "base_model_type": config.model_type,
            "plan": config.plan,
            "removed": config.removed,
            "window": config.window,
            "sinks": config.sinks,
            "feature_map": config.feature_map,
            "healed_context": config.healed_context,
        }

    weights = {}
    for name, x in model.named_parameters():
        stored = name if name == "lm_head.weight" else f"model.{name}"
        weights[stored] = x.detach().contiguous()
    save_safetensors(weights, folder / "model.safetensors", {"format": "pt"})

    for file in filter(Path.exists, copies):
        content = file.read_bytes()
        write_file(folder / file.name, lambda path, content=content: path.write_bytes(content))
    write_json(folder / "config.json", raw)
    for old in folder.glob("model*.safetensors*"):
        if re.fullmatch(r"model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json", old.name):
            old.unlink()
