"""What both test files use: small models in folders as the Hub has them, text, the flags of a short
run.
"""

import gzip
import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import budget
import cpu
import layerboost
import report
import terminal
from config import read_config
from golden.make_golden import CONFIGS, NASTY, SMALL, formula_weight
from model import Model, load_model

GOLDEN = Path(__file__).parent / "golden"
TIERS = {"window": 8, "sinks": 2, "feature_map": "hedgehog"}

# Small tensors: two threads would wait for each other longer than they compute.
torch.set_num_threads(1)

# Nobody reads the speed of these models.
budget.MEASURING = 0.0  # seconds
report.DECODED = 1024  # tokens

needs_cpp = pytest.mark.skipif(not cpu.compiler_works(), reason="needs a C++ compiler with OpenMP")


@pytest.fixture(autouse=True)
def every_test_starts_alike(monkeypatch):
    """With the same random numbers, with the C++ that --no-compile switches off, and without lines
    of bars, which a slow machine would put among the others."""
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "enabled", True)
    monkeypatch.setattr(terminal, "LINE_SECONDS", math.inf)


def write_model(folder: Path, config: dict, shards: int = 1) -> Path:
    """A model folder as the Hub has it, its weights by `formula_weight`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SMALL | config))
    with torch.device("meta"):
        model = Model(read_config(folder))

    weights = {}
    for name, parameter in model.named_parameters():
        stored = name if name == "lm_head.weight" else f"model.{name}"
        weights[stored] = formula_weight(stored, parameter.shape)
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder

    file_of = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[shard::shards])
        save_file(part, folder / file)
        file_of |= dict.fromkeys(part, file)
    index = {"weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A model of three layers with a tokenizer: what most tests work on. Head size 12, two query
    heads a key/value head."""
    sizes = {"vocab_size": 704, "max_position_embeddings": 512, "eos_token_id": 700}
    folder = tmp_path_factory.mktemp("models") / "llama"
    write_model(folder, CONFIGS["llama"] | sizes)
    tokenizer = GOLDEN / "tokenizers/smollm/tokenizer.json"
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Training text: 24 documents of random words."""
    draw = random.Random(0)
    words = " ".join(NASTY).split() + ["the", "key", "of", "and", "model"]
    path = tmp_path_factory.mktemp("text") / "text.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for _ in range(24):
            document = " ".join(draw.choices(words, k=120))
            file.write(json.dumps({"text": document}) + "\n")
    return path


@pytest.fixture(scope="session")
def made(llama, text, tmp_path_factory) -> Path:
    """The folder of a run with window 16, only to read."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert layerboost.main(short_run(llama, text, out, "--measure", "kl", "--tokens", "1k")) == 0
    return out


def boosted(folder: Path, plan: str = "SLX", **settings) -> Model:
    """A model converted to `plan`, its tails moved away from their start."""
    torch.manual_seed(3)
    model = load_model(str(folder), plan, **TIERS | settings)
    for name, parameter in model.named_parameters():
        if name.endswith("tail_logit"):
            parameter.zero_()  # so that it weighs something
        if name.endswith(("_map", "tail_logit")):
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def short_run(folder: Path, text: Path, out: Path, *more: str) -> list[str]:
    """The flags of a run of the whole story in seconds."""
    flags = "--tokens 6k --window 16 --sinks 2 --lr 3e-4 --sequences 4 --passkeys 5"
    machine = "--device cpu --dtype float32"
    paths = ["--model", str(folder), "--data", str(text), "--valid", str(text), "--out", str(out)]
    return [*paths, *flags.split(), *machine.split(), *more]
