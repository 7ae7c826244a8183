"""Known architectures with random weights: as fast as the real ones, for whoever has only their
sizes. bench.py takes the folder that this writes as a --model:

    python results/shapes.py llama3.2-1b DIR
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from config import read_config
from model import Model, rotary_frequencies, save_model

SHAPE_FIELDS = (
    "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim vocab_size tie_word_embeddings"
).split()
SHAPES = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152, True),
    "llama3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama3.2-3b": (3072, 8192, 28, 24, 8, 128, 128256, True),
    "llama3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 128, 152064, False),
}


def build_shape(name: str, dtype: torch.dtype, device: str) -> Model:
    """A known architecture with random weights, as fast as the real one."""
    raw = dict(zip(SHAPE_FIELDS, SHAPES[name], strict=True))
    raw |= {"model_type": "qwen2" if "qwen" in name else "llama", "rms_norm_eps": 1e-5}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(raw))
        config = read_config(Path(folder))
    with torch.device("meta"):
        model = Model(config)

    weights = {}
    for key, parameter in model.named_parameters():
        weights[key] = torch.empty_like(parameter, dtype=dtype, device=device).normal_(std=0.02)
    model.load_state_dict(weights, assign=True)
    model.frequencies = rotary_frequencies(config).to(device)
    return model.requires_grad_(False)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in SHAPES:
        sys.exit(f"{__doc__}\nShapes: {', '.join(SHAPES)}")
    save_model(build_shape(sys.argv[1], torch.bfloat16, "cpu"), sys.argv[2], sys.argv[2])
