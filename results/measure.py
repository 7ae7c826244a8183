"""Two figures of the method's cost, measured:

    python results/measure.py scan MODEL        our scan against a naive one that runs every altered model whole, same numbers
    python results/measure.py memory            peak memory of tier L's parallel form against the number of tokens
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch

import layerboost
from attention import WindowLinearAttention
from model import load_model, load_tokenizer


def scan_cost(path: str) -> dict:
    model, tokenizer = load_model(path, dtype=torch.bfloat16), load_tokenizer(path)
    layerboost.SCAN_RECALL = {768: 1}                   # the product's measures on an eighth of its text
    torch.manual_seed(0)
    sequences = torch.randint(100, model.config.vocab_size - 100, (1, 1024))
    probe = lambda: layerboost.make_probes(model, tokenizer, ["kl", "recall"], sequences, sequences, [])
    tiers, n = {"window": 64, "sinks": 4, "feature_map": "hedgehog"}, len(model.layers)
    times = {"ours": [], "naive": []}
    for _ in range(2):                                  # alternating, since the machine's speed drifts by a tenth
        start = time.perf_counter()
        probes = probe()
        with tempfile.TemporaryDirectory() as folder:
            layers = layerboost.scan(model, probes, tiers, Path(folder) / "scan.json", {}, [])
        times["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        probes = probe()
        naive = [{tier: layerboost.measure_plan(model, probes, tiers, "S" * i + tier + "S" * (n - i - 1)) for tier in "XL"} for i in range(n)]
        times["naive"].append(time.perf_counter() - start)
    largest = max(abs(value - naive[i][tier][name]) for i in range(n) for tier in "XL" for name, value in layers[i][tier].items())
    return {"seconds": times, "ratio": sum(times["ours"]) / sum(times["naive"]), "largest_difference": largest}


def peak_bytes(tokens: int) -> int:
    """Peak resident memory that tier L's forward and backward add, in a process of its own."""
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}; import measure; print(measure.added_bytes({tokens}))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def added_bytes(tokens: int) -> int:
    """SmolLM2's head shape (9 query and 3 key/value heads of 64), window 64, 4 sinks, hedgehog, float32, forward and backward."""
    import types
    torch.manual_seed(0)
    config = types.SimpleNamespace(num_attention_heads=9, num_key_value_heads=3, head_dim=64, hidden_size=576, sliding_windows=(None,), qkv_bias=False,
                                   o_bias=False, qk_norm=False, window=64, sinks=4, feature_map="hedgehog")
    layer = WindowLinearAttention(config, 0)
    for name, value in layer.initial_tail().items():
        getattr(layer, name).data = value
    small = [torch.randn(1, heads, 64, 64, requires_grad=True) for heads in (9, 3, 3)]
    layer.attend(*small).sum().backward()               # the libraries' own memory is not the method's
    inputs = [torch.randn(1, heads, tokens, 64, requires_grad=True) for heads in (9, 3, 3)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layer.attend(*inputs).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["scan"] and len(sys.argv) == 3:
        print(json.dumps(scan_cost(sys.argv[2])))
    elif sys.argv[1:] == ["memory"]:
        print(json.dumps({str(tokens): peak_bytes(tokens) for tokens in (1024, 2048, 4096, 8192, 16384)}))
    else:
        sys.exit(__doc__)
