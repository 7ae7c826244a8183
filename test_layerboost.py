"""The method's promises as tests: every fast form against its naive formula, every cache against the whole sequence, our
logits and token ids against Hugging Face's (golden/), and the command line as a user meets it."""

import argparse
import gzip
import itertools
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

import attention
import bench
import distill
import kernels
import layerboost
import model as model_module
from golden.make_golden import CONFIGS, NASTY, SMALL, formula_weight, golden_ids
from kernels import (Past, feature_map, naive_window_linear_attention, softmax_step, window_linear_attention,
                     window_linear_step)
from model import Engine, InputError, Request, convert, load_model, load_tokenizer, read_config, save_model

GOLDEN = Path(__file__).parent / "golden"


def write_model(folder: Path, config: dict, shards: int = 1) -> Path:
    """A model folder as the Hub has it, its weights by formula_weight."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SMALL | config))
    with torch.device("meta"):
        shapes = {k: p.shape for k, p in model_module.Model(read_config(folder)).named_parameters()}
    names = {k if k == "lm_head.weight" else f"model.{k}": shape for k, shape in shapes.items()}
    weights = {name: formula_weight(name, shape) for name, shape in names.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
    else:
        parts = [dict(list(weights.items())[i::shards]) for i in range(shards)]
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        for file, part in zip(files, parts):
            save_file(part, folder / file)
        index = {name: file for file, part in zip(files, parts) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.fixture(autouse=True)
def eager():
    """Compiling takes longer than any test: those that are about it ask for it."""
    torch.compiler.set_stance("force_eager")
    kernels.CPP = True


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A small model with a tokenizer: what the tests of the later stages work on."""
    folder = write_model(tmp_path_factory.mktemp("models") / "llama", CONFIGS["llama"] | {"vocab_size": 704, "max_position_embeddings": 512, "eos_token_id": 700})
    (folder / "tokenizer.json").write_bytes((GOLDEN / "tokenizers/smollm/tokenizer.json").read_bytes())
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Training text: 40 documents of random words."""
    draw, words = random.Random(0), " ".join(NASTY).split() + ["the", "key", "of", "and", "model"]
    path = tmp_path_factory.mktemp("text") / "text.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for _ in range(40):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=120))}) + "\n")
    return path


# --- tier L: four forms, one result ------------------------------------------------------------------------------

SETTINGS = [(8, 2, "hedgehog"), (8, 0, "hedgehog"), (0, 0, "hedgehog"), (0, 3, "elu"), (0, 0, "relu"), (5, 4, "relu"), (8, 2, "favor"),
            (0, 0, "favor"), (8, 2, "none"), (8, 0, "none"), (1, 0, "none"), (16, 20, "hedgehog")]


def random_inputs(tokens: int, kind: str, dtype=torch.float32, batch=2, H=4, G=2, D=8):
    torch.manual_seed(tokens)
    query, key, value = (torch.randn(batch, heads, tokens, D).to(dtype) * 1.5 for heads in (H, G, G))
    if kind == "none":
        return query, key, value, None, None, None, None, None
    if kind == "favor":
        maps = [kernels.favor_projection(heads, D) for heads in (H, G)]
    else:
        maps = [torch.eye(D) + 0.3 * torch.randn(heads, D, D) for heads in (H, G)]
    return query, key, value, maps[0], maps[1], torch.randn(H), feature_map(query, kind, maps[0]), feature_map(key, kind, maps[1])


def fast_form(query, key, value, phi_query, phi_key, b, window, sinks, chunk=16):
    """The chunked form from nothing, called with the arguments of the naive one."""
    B, G, T, D = key.shape
    F_ = 0 if phi_key is None else phi_key.shape[-1]
    past = Past(torch.zeros(1, dtype=torch.int64), key[:, :, :sinks], value[:, :, :sinks], torch.zeros(B, G, F_, D), torch.zeros(B, G, F_))
    pad = lambda x: torch.nn.functional.pad(x, (0, 0, window, 0))
    if phi_key is not None:
        leaving = torch.arange(T) - window
        phi_key = pad(phi_key)[:, :, :T] * (leaving >= sinks)[:, None]
    return window_linear_attention(query, pad(key), pad(value), phi_query, phi_key, b, past, window, chunk)


@pytest.mark.parametrize("window,sinks,kind", SETTINGS)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 17, 100])
def test_chunked_form_equals_the_formula(window, sinks, kind, tokens):
    query, key, value, _, _, b, phi_query, phi_key = random_inputs(tokens, kind)
    expected = naive_window_linear_attention(query, key, value, phi_query, phi_key, b, window, sinks)
    torch.testing.assert_close(fast_form(query, key, value, phi_query, phi_key, b, window, sinks), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1000, 1500])
def test_chunked_form_equals_the_formula_in_long_text(tokens):
    query, key, value, _, _, b, phi_query, phi_key = random_inputs(tokens, "hedgehog", batch=1)
    expected = naive_window_linear_attention(query, key, value, phi_query, phi_key, b, 64, 4)
    actual = fast_form(query, key, value, phi_query, phi_key, b, 64, 4, chunk=64)
    assert (actual - expected).norm() / expected.norm() < 1e-5
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window,sinks,kind", SETTINGS)
def test_gradients_equal_those_of_the_formula(window, sinks, kind):
    inputs = random_inputs(45, kind)
    leaves = [x.detach().requires_grad_(True) for x in inputs[:6] if x is not None]
    weight = torch.randn(2, 4, 45, 8)

    def gradients(form):
        query, key, value = leaves[:3]
        phi = (None, None, None) if kind == "none" else (feature_map(query, kind, leaves[3]), feature_map(key, kind, leaves[4]), leaves[5])
        out = form(query, key, value, phi[0], phi[1], phi[2], window, sinks)
        return torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    for leaf, fast, naive in zip(leaves, gradients(fast_form), gradients(naive_window_linear_attention)):
        fast, naive = (torch.zeros_like(leaf) if g is None else g for g in (fast, naive))       # b cancels where nothing is local
        torch.testing.assert_close(fast, naive, rtol=1e-4, atol=1e-4)


def test_both_terms_stand_on_one_scale():
    """Adding a constant to every local score and to b must change nothing: the mix may not depend on what is subtracted."""
    query, key, value, _, _, b, phi_query, phi_key = random_inputs(60, "hedgehog", batch=1)
    query, key = (torch.cat((x, torch.full_like(x[..., :1], c)), -1) for x, c in ((query, 9.0), (key, 5.0)))      # a_i + 15
    value = torch.cat((value, value[..., :1]), -1)
    expected = naive_window_linear_attention(query, key, value, phi_query, phi_key, b + 15, 8, 2)
    torch.testing.assert_close(fast_form(query, key, value, phi_query, phi_key, b + 15, 8, 2), expected, rtol=1e-4, atol=1e-5)
    large = fast_form(query * 20, key, value, phi_query, phi_key, b + 300, 8, 2)                                  # scores of several hundred
    assert torch.isfinite(large).all()


def layer_of(kind: str, window: int, sinks: int, tier=attention.WindowLinearAttention):
    """One attention layer with random weights, grouped heads, and a tail that is not at its start."""
    raw = SMALL | CONFIGS["llama"]
    config = model_module.Config(**{k: raw[k] for k in ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                                        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")},
                                 head_dim=12, rope={"rope_type": "default", "rope_theta": 10000.0}, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False,
                                 sliding_windows=(None,) * 3, eos_token_ids=(), plan="LLL", window=window, sinks=sinks, feature_map=kind)
    torch.manual_seed(1)
    layer = tier(config, 0)
    if hasattr(layer, "query_map"):
        for name, value in layer.initial_tail().items():
            getattr(layer, name).data = value + (0 if kind == "favor" else 0.2 * torch.randn_like(value))
    return layer.requires_grad_(False), model_module.rotary_frequencies(config)


def run_layer(layer, frequencies, x, splits=None, dtype=torch.float32):
    """x through the layer at once (splits None) or in pieces of these sizes through a cache."""
    def rotary(positions):
        angle = positions[:, None, :, None] * frequencies
        return angle.cos(), angle.sin()
    if splits is None:
        return layer(x, rotary(torch.arange(x.shape[1])[None]))
    cache, positions, pieces = layer.new_cache(x.shape[0], x.shape[1], dtype, "cpu"), torch.zeros(x.shape[0], dtype=torch.int64), []
    for piece in x.split(splits, dim=1):
        pieces.append(layer(piece, rotary(positions[:, None] + torch.arange(piece.shape[1])), cache, positions))
        positions = positions + piece.shape[1]
    return torch.cat(pieces, 1)


@pytest.mark.parametrize("window,sinks,kind", SETTINGS)
@pytest.mark.parametrize("splits", [[1] * 70, [69, 1], [5, 30] + [1] * 35, [1, 1, 1, 17, 50], [8, 8, 8, 8, 8, 8, 8, 14]])
def test_prefill_in_any_split_then_steps_equals_the_whole(window, sinks, kind, splits):
    layer, frequencies = layer_of(kind, window, sinks)
    x = torch.randn(2, 70, 48)
    torch.testing.assert_close(run_layer(layer, frequencies, x, splits), run_layer(layer, frequencies, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window,sinks,kind", SETTINGS)
@pytest.mark.parametrize("splits", [None, [5, 30] + [1] * 35, [70]])
def test_tier_l_in_cpp_equals_that_of_torch(window, sinks, kind, splits):
    layer, frequencies = layer_of(kind, window, sinks)
    x = torch.randn(2, 70, 48)
    expected = run_layer(layer, frequencies, x)
    with torch.no_grad():
        torch.testing.assert_close(run_layer(layer, frequencies, x, splits), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_tail_fades_beyond_the_healed_context(grad):
    layer, frequencies = layer_of("hedgehog", 8, 2)
    x = torch.randn(2, 70, 48)
    with torch.set_grad_enabled(grad):                      # without gradients in C++
        whole = run_layer(layer, frequencies, x)
        layer.config.healed_context = 30
        faded = run_layer(layer, frequencies, x)
        torch.testing.assert_close(faded[:, :30], whole[:, :30], rtol=1e-5, atol=1e-5)
        for splits in ([1] * 70, [5, 30] + [1] * 35, [31, 39]):
            torch.testing.assert_close(run_layer(layer, frequencies, x, splits), faded, rtol=1e-5, atol=1e-5)
        layer.config.healed_context = None
        b = layer.tail_logit.clone()
        for token in (40, 69):                              # the same as a smaller b, by position
            layer.tail_logit.copy_(b + 2 * math.log(30 / (token + 1)))
            torch.testing.assert_close(run_layer(layer, frequencies, x)[:, token], faded[:, token], rtol=1e-5, atol=1e-5)
            assert (whole[:, token] - faded[:, token]).abs().max() > 1e-3


def test_forms_agree_at_1500_tokens():
    layer, frequencies = layer_of("hedgehog", 64, 4)
    x = torch.randn(1, 1500, 48)
    whole = run_layer(layer, frequencies, x)
    for splits in ([700] + [1] * 20 + [780], [1] * 1500):
        other = run_layer(layer, frequencies, x, splits)
        assert (other - whole).norm() / whole.norm() < 1e-5


@pytest.mark.parametrize("H,G,D", [(9, 3, 16), (4, 4, 32), (8, 1, 20)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_steps_in_cpp_equal_those_of_torch(H, G, D, dtype, tolerance, monkeypatch):
    """Keys from one to three blocks, none at all beside a tail, and not from the first on; the caches change alike."""
    B, room, features = 5, 300, 24
    caches = [torch.randn(B, G, room, D).to(dtype), torch.randn(B, G, room, D).to(dtype), torch.rand(B, G, features, D), torch.rand(B, G, features)]
    query, new_key, new_value = torch.randn(B, H, 1, D).to(dtype), *torch.randn(2, B, G, 1, D).to(dtype)
    tail = torch.rand(B, H, 1, features), torch.rand(B, G, features), torch.randn(B, G, D).to(dtype), torch.randn(H)
    outputs = []
    for compiled in (True, False):
        monkeypatch.setattr(kernels, "CPP", compiled)
        key, value, state, norm = (x.clone() for x in caches)
        outputs.append([
            softmax_step(query, new_key, new_value, torch.tensor([0, 299, 149, 232, 7]), key, value, torch.tensor([0, 0, 7, 100, 299]), torch.tensor([1, 300, 150, 233, 300])),
            window_linear_step(query, new_key, new_value, torch.tensor([3, 0, 5, 66, 9]), key, value, torch.tensor([0, 1, 68, 150, 300]), *tail, state, norm),
            key, value, state, norm])
    for ours, theirs in zip(*outputs):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_row_in_cpp_equals_that_of_torch(dtype, tolerance):
    weight, bias, x = torch.randn(37, 100).to(dtype), torch.randn(37).to(dtype), torch.randn(2, 1, 100).to(dtype)
    for b in (None, bias):
        with torch.no_grad():
            ours = kernels.linear(x[:1], weight, b)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, torch.nn.functional.linear(x, weight, b)[:1], rtol=tolerance, atol=tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_formulas_in_cpp_equal_those_in_torch(dtype, monkeypatch):
    torch.manual_seed(0)
    x, weight, product = (torch.randn(*shape).to(dtype) * 3 for shape in ((2, 5, 48), (48,), (2, 5, 80)))
    heads, angle = torch.randn(2, 5, 64).to(dtype).unflatten(-1, (4, 16)).transpose(1, 2), torch.randn(2, 1, 5, 8)
    def results():
        return (kernels.rms_norm(x, weight, 1e-5), kernels.swiglu(*product.split(40, dim=-1)), kernels.swiglu(x - 90, x), kernels.swiglu(x + 90, x),
                *(kernels.apply_rotary(heads, angle[:count].cos(), angle[:count].sin()) for count in (1, 2)))
    with torch.inference_mode():
        ours = results()
        monkeypatch.setattr(kernels, "CPP", False)
        for mine, torchs in zip(ours, results()):
            torch.testing.assert_close(mine, torchs, rtol=1e-5 if dtype == torch.float32 else 2**-6, atol=1e-5)


@pytest.mark.parametrize("sliding_window", [None, 40])
@pytest.mark.parametrize("tokens,keys", [(1, 1), (23, 23), (24, 90), (150, 150), (77, 200)])
def test_softmax_attention_in_bfloat16_equals_the_formula(tokens, keys, sliding_window):
    query, key, value = (x.bfloat16() for x in random_inputs(keys, "none", D=64)[:3])
    expected = kernels.naive_softmax_attention(query.float(), key.float(), value.float(), sliding_window)[:, :, -tokens:]
    room = torch.nn.functional.pad(torch.stack((key, value)), (0, 0, 0, 5), value=9.0)      # what lies beyond them is not read
    with torch.inference_mode():
        actual = kernels.softmax_attention(query[:, :, -tokens:].contiguous(), *room, torch.tensor([keys - tokens] * 2), sliding_window)
    assert (actual.float() - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("dtype,near", [(torch.bfloat16, 2**-8), (torch.float32, 1e-5)])
def test_packed_products_equal_those_of_torch(llama, dtype, near):
    """Of every split of the rows into tiles, with their gradients, alone and joined, and in a model some of whose matrices fit."""
    first, second, third = (torch.nn.Parameter(torch.randn(rows, 70).to(dtype), requires_grad=False) for rows in (96, 32, 16))
    with torch.inference_mode():                                                      # as an engine does, before any gradient
        kernels.pack(first, second), kernels.pack(third)
    if not hasattr(first, "joined"):
        pytest.skip("a processor on which torch's products are the fastest")
    joined = first.joined
    kernels.pack(first, second)
    assert first.joined is joined and not joined.is_inference() and not hasattr(third, "joined")
    for rows in (1, 3, 4, 7, 12, 31, 8000):
        x = torch.randn(2, rows, 70).to(dtype).requires_grad_()
        exact = x.detach().float() @ torch.cat((first, second)).float().T
        torch.testing.assert_close(torch.ops.layerboost.packed_product(x, joined, None).float(), exact, rtol=near, atol=1e-4)
        for weight, part in ((first, exact[..., :96]), (second, exact[..., 96:])):
            y = kernels.linear(x, weight)
            torch.testing.assert_close(y.float(), part, rtol=near, atol=1e-4)
            grad = torch.randn_like(y)
            torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], grad @ weight)
    first.requires_grad_(True)                                                        # what learns is not read from a copy of it
    assert torch.autograd.grad(kernels.linear(x, first).sum(), first)[0].any()
    layers = [attention.Linear(70, len(w), bias=False) for w in (first, second)]
    for layer, weight in zip(layers, (first, second)):
        layer.weight = weight.requires_grad_(False)
        layer.to(torch.float32 if dtype == torch.bfloat16 else torch.bfloat16)
    with torch.no_grad():                                                             # nor what has another precision by now
        x = x.to(first.dtype)
        for y, layer in zip(attention.linears(x, *layers), layers):
            assert torch.equal(y, x @ layer.weight.T) and torch.equal(layer(x), y)
    for folder in (llama, write_model(llama / "qwen2", CONFIGS["qwen2"])):             # the second has biases
        model, ids = load_model(str(folder), dtype=dtype), torch.randint(0, 90, (2, 50))
        with torch.no_grad():
            exact, before = load_model(str(folder), dtype=torch.float64)(ids), model(ids)
            model.pack()
            attend, mlp = model.layers[0].self_attn, model.layers[0].mlp
            assert all(hasattr(w, "joined") for w in (attend.q_proj.weight, mlp.gate_proj.weight, model.head)) and not hasattr(mlp.down_proj.weight, "joined")
            assert (model(ids) - exact).std() < 1.2 * (before - exact).std() < 0.05          # no further from the exact ones than without


def test_a_missing_compiler_is_named(llama, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernels.library.cache_clear()
    assert layerboost.main(["--model", str(llama), "--dtype", "float32", "--prompt", "ab"]) == 2
    assert "no-such-compiler cannot compile" in capsys.readouterr().err
    assert layerboost.main(["--model", str(llama), "--dtype", "float32", "--prompt", "ab", "--no-compile"]) == 0


@pytest.mark.parametrize("kind", ["hedgehog", "none"])
def test_forms_agree_in_bfloat16(kind):
    layer, frequencies = layer_of(kind, 8, 2)
    x = torch.randn(2, 50, 48)
    exact = run_layer(layer, frequencies, x)
    for name, parameter in layer.named_parameters():
        if name.endswith("weight"):
            parameter.data = parameter.data.bfloat16()
    for splits in (None, [50], [20] + [1] * 30):
        out = run_layer(layer, frequencies, x.bfloat16(), splits, dtype=torch.bfloat16)
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).norm() / exact.norm() < 0.02
    cache = layer.new_cache(1, 1, torch.bfloat16, "cpu")
    assert cache.state.dtype == cache.norm.dtype == torch.float32


def test_a_window_over_everything_is_softmax_attention():
    window, frequencies = layer_of("none", 40, 0)
    softmax, _ = layer_of("none", 40, 0, attention.SoftmaxAttention)
    x = torch.randn(2, 40, 48)
    torch.testing.assert_close(run_layer(window, frequencies, x), run_layer(softmax, frequencies, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sliding_window", [None, 40])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150])
def test_softmax_attention_in_blocks_equals_the_formula(tokens, sliding_window):
    inputs = [x.requires_grad_(True) for x in random_inputs(tokens, "none")[:3]]
    expected = kernels.naive_softmax_attention(*inputs, sliding_window)
    actual, weight = kernels.softmax_attention(*inputs, None, sliding_window), torch.randn(expected.shape)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (actual, expected))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_performer_features_estimate_the_softmax_kernel():
    torch.manual_seed(0)
    query, key = (0.5 * torch.randn(1, 1, 64, 32) for _ in range(2))
    weight = kernels.favor_projection(1, 32)
    many = torch.cat([torch.linalg.qr(torch.randn(32, 32)).Q * torch.randn(32, 32).norm(dim=-1, keepdim=True) for _ in range(200)])[None]
    exact = torch.exp(query @ key.transpose(-1, -2) * 32 ** -0.5)
    estimate = feature_map(query, "favor", many) @ feature_map(key, "favor", many).transpose(-1, -2)
    assert ((estimate - exact).abs() / exact).mean() < 0.05
    assert (feature_map(query, "favor", weight) > 0).all()


# --- the model ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_hugging_face(name, tmp_path):
    expected = load_file(GOLDEN / "logits.safetensors")[name]
    model = load_model(str(write_model(tmp_path, CONFIGS[name], shards=3 if name == "qwen3" else 1)))
    ids = golden_ids(SMALL["vocab_size"])
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=2e-4)
    cache = model.new_cache(2, 48)
    pieces = [model(piece, cache) for piece in ids.split([20, 1, 25, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=2e-4)


SMOLLM2 = os.environ.get("SMOLLM2", "")


@pytest.mark.skipif(not SMOLLM2, reason="set SMOLLM2 to the folder of the real model, and VALID to the validation text")
def test_smollm2_equals_hugging_face():
    golden, expected = load_file(GOLDEN / "smollm2.safetensors"), json.loads((GOLDEN / "smollm2.json").read_text())
    logits = load_model(SMOLLM2)(golden["ids"])[0, 31::32, ::16]
    print("largest difference of logits:", float((logits - golden["logits"]).abs().max()))
    torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=2e-4)
    import hashlib
    tokenizer = load_tokenizer(SMOLLM2)
    ids = [tokenizer.encode(t) for t in distill.read_documents(os.environ["VALID"])]
    assert (sum(map(len, ids)), hashlib.sha256(json.dumps(ids).encode()).hexdigest()) == (expected["valid_tokens"], expected["valid_sha256"])
    assert [tokenizer.encode(line) for line in NASTY] == expected["nasty"]


def boosted(folder, plan="SLX", **settings):
    """The small model converted, its tails moved away from their start."""
    torch.manual_seed(3)
    model = load_model(str(folder), plan, **{"window": 8, "sinks": 2, **settings})
    for name, parameter in model.named_parameters():
        if name.endswith(("_map", "tail_logit")):
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def test_nothing_sees_the_future(llama):
    model = boosted(llama)
    ids = torch.randint(0, 700, (1, 100))
    logits = model(ids)
    changed = ids.clone()
    changed[:, 60:] = torch.randint(0, 700, (1, 40))
    torch.testing.assert_close(model(changed)[:, :60], logits[:, :60], rtol=1e-5, atol=1e-5)
    assert (model(changed)[:, 60:] - logits[:, 60:]).abs().max() > 0.1


def test_batches_of_different_lengths_equal_each_alone(llama):
    model = boosted(llama)
    torch.manual_seed(0)
    lengths = torch.tensor([1, 3, 9, 31, 50])
    ids = torch.randint(0, 700, (5, 50))
    together = model.generate(ids, 30, lengths=lengths)
    assert together.shape == (5, 80)
    for row, length in enumerate(lengths.tolist()):
        alone = model.generate(ids[row:row + 1, :length], 30)
        assert together[row, :length + 30].tolist() == alone[0].tolist()
        step_by_step = ids[row:row + 1, :length]
        for _ in range(30):
            if step_by_step[0, -1] in model.config.eos_token_ids and step_by_step.shape[1] > length:
                break
            step_by_step = torch.cat((step_by_step, model(step_by_step)[:, -1:].argmax(-1)), 1)
        assert alone[0, :step_by_step.shape[1]].tolist() == step_by_step[0].tolist()


def requests_of(count, seed=0):
    """Prompts of 1 to 60 tokens with 1 to 40 to follow; as a small vocabulary meets its end of text, some stop early."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    return [Request(torch.randint(0, 700, (draw.randint(1, 60),), generator=generator), draw.randint(1, 40), (5, 6, 7)) for _ in range(count)]


def test_continuous_batching_is_exact(llama, monkeypatch):
    """40 requests through 7 slots, half of them sent later, give what each gives alone and what the whole model says."""
    monkeypatch.setattr(model_module, "BUCKET", 16)
    monkeypatch.setattr(model_module, "CHUNK", 13)
    monkeypatch.setattr(model_module, "SLOTS", 2)
    model, requests, alone = boosted(llama), requests_of(40), requests_of(40)
    engine, later = Engine(model, 7), requests[20:]
    waiting, rooms, tokens = deque(requests[:20]), set(), 0
    for request in engine.run(waiting):
        rooms.add(engine.cache.layers[0].key.shape[2])
        tokens += 1
        if request.done and later:
            waiting.append(later.pop(0))
    assert tokens == sum(len(request.output) for request in requests) and not engine.live
    assert len(rooms) > 2 and max(rooms) <= 112
    for request, single in zip(requests, alone):
        list(Engine(model, 1).run(deque([single])))
        assert request.output == single.output
    assert any(len(r.output) < r.max_new_tokens for r in requests)
    request = max(requests, key=lambda r: len(r.output))
    ids = torch.cat((request.prompt, torch.tensor(request.output)))
    assert model(ids[None])[0, len(request.prompt) - 1:-1].argmax(-1).tolist() == request.output


def test_softmax_caches_have_the_room_of_the_longest_live_sequence(llama, monkeypatch):
    monkeypatch.setattr(model_module, "BUCKET", 16)
    engine = Engine(boosted(llama), 2)
    room = {}
    for request in engine.run(deque([Request(torch.zeros(50, dtype=torch.int64), 3), Request(torch.ones(3, dtype=torch.int64), 9)])):
        room[len(request.prompt), len(request.output)] = engine.cache.layers[0].key.shape[2]
    assert room[50, 3] == 64 and room[3, 9] == 16


@torch.inference_mode()
def test_a_step_maps_no_memory_at_any_depth_of_the_stack(llama):
    """Page faults of a step, the least of three, called from every depth until CPython has gone through two pieces of its stack."""
    engine = Engine(boosted(llama), 1)
    engine.live = requests_of(1)

    def faults(depth: int) -> int:
        if depth:
            return faults(depth - 1)
        counts = []
        for _ in range(4):
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
            engine.cache.positions.fill_(len(engine.live[0].prompt))
            engine.step()
        return min(after - before for before, after in zip(counts, counts[1:]))
    assert max(faults(depth) for depth in range(0, 300, 3)) < 10


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_step_is_compiled_once_and_equals_the_eager_one(llama, monkeypatch):
    """Through four sizes of the softmax cache, three numbers of slots, two engines and every kind of layer."""
    torch.compiler.set_stance("default"), torch._dynamo.reset()
    monkeypatch.setattr(model_module, "SLOTS", 2)
    monkeypatch.setattr(model_module, "BUCKET", 16)
    model, outputs = boosted(llama), []
    for compiled in (True, False):
        requests, sizes = requests_of(20, seed=1), set()
        for slots in (5, 6):
            engine = Engine(model, slots, compiled=compiled)
            for _ in engine.run(deque(requests[slots % 2::2])):
                sizes.add(engine.active[:2])
        outputs.append([request.output for request in requests])
    assert outputs[0] == outputs[1]
    assert {2, 4, 5, 6} == {count for count, _ in sizes} and len({room for _, room in sizes}) > 3


def test_sampling():
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]]).repeat(500, 1)
    draw = lambda **how: set(model_module.sample(logits, how.pop("temperature", 1.0), how.get("top_k"), how.get("top_p"), torch.Generator().manual_seed(0)).tolist())
    assert draw(temperature=0) == {1}
    assert draw() == {0, 1, 2, 3}
    assert draw(top_k=2) == {1, 2}
    assert draw(top_p=0.5) == {1} and draw(top_p=0.9) == {1, 2}


def test_generation_repeats_under_a_seed_and_stops_at_the_end_of_text(llama):
    model = load_model(str(llama))
    ids = torch.tensor([[5, 6, 7]])
    first, again, other = (model.generate(ids, 20, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    stop = model.generate(ids, 20)[0, 5].item()
    model.config.eos_token_ids = (stop,)
    seen = []
    out = model.generate(ids, 20, on_token=lambda row, token: seen.append(token))
    assert seen[-1] == stop and len(seen) <= 3 and set(out[0, 2 + len(seen):].tolist()) == {stop}
    assert torch.equal(model.generate(ids, 0), ids)
    with pytest.raises(ValueError, match="no tokens"):
        model.generate(ids, 5, lengths=torch.tensor([0]))


def test_a_full_cache_takes_no_more(llama):
    model, ids = load_model(str(llama)), torch.randint(0, 700, (1, 8))
    for first, more in ((4, 1), (2, 4)):
        cache = model.new_cache(1, 4)
        model(ids[:, :first], cache=cache)
        with pytest.raises(ValueError, match="room for 4 tokens"):
            model(ids[:, first:first + more], cache=cache)
    cache = convert(model, "LLL").new_cache(1, 0)
    assert convert(model, "LLL")(ids, cache=cache).shape[1] == 8        # tier L needs none


def test_save_then_load_gives_the_same_logits(llama, tmp_path):
    model = boosted(llama)
    model.config.healed_context = 20
    save_model(model, tmp_path / "saved", llama)
    again = load_model(str(tmp_path / "saved"))
    ids = torch.randint(0, 700, (2, 50))
    assert again.plan == "SLX" and (again.config.window, again.config.sinks) == (8, 2)
    assert torch.equal(again(ids), model(ids))
    stored = load_file(tmp_path / "saved/model.safetensors")
    assert not any("layers.2.self_attn" in name or "layers.2.input_layernorm" in name for name in stored)
    assert load_tokenizer(str(tmp_path / "saved")).encode("a b") == load_tokenizer(str(llama)).encode("a b")
    assert json.loads((tmp_path / "saved/config.json").read_text())["model_type"] == "layerboost"
    save_model(load_model(str(llama), "SLS"), tmp_path / "first", llama)
    save_model(load_model(str(tmp_path / "first"), "SSS"), tmp_path / "back", llama)
    assert "architectures" not in json.loads((tmp_path / "back/config.json").read_text())
    with pytest.raises(InputError, match="layer 2 has no attention left"):
        load_model(str(tmp_path / "saved"), "SSS")


def test_to_another_dtype_is_as_loading_in_it(llama, tmp_path):
    """Frequencies and tails stay float32: a frequency rounded to bf16 is off by up to a radian after 512 tokens."""
    model, ids = boosted(llama), torch.randint(0, 700, (2, 50))
    save_model(model, tmp_path, llama)
    with torch.no_grad():
        expected = load_model(str(tmp_path), dtype=torch.bfloat16)(ids)
        assert torch.equal(model.to(torch.bfloat16)(ids), expected)
        assert torch.equal(model.to("cpu").generate(ids, 5), load_model(str(tmp_path), dtype=torch.bfloat16).generate(ids, 5))


def test_conversion_shares_the_weights(llama):
    model = load_model(str(llama))
    other = convert(model, "LXS")
    assert other.layers[0].self_attn.q_proj.weight is model.layers[0].self_attn.q_proj.weight
    assert other.layers[1].self_attn is None and other.head is other.lm_head.weight is model.lm_head.weight
    ids = torch.randint(0, 700, (1, 30))
    assert torch.equal(convert(model, "SSS")(ids), model(ids))


def test_compiled_blocks_equal_eager_ones(llama):
    torch.compiler.set_stance("default")
    model = boosted(llama)
    ids = torch.randint(0, 700, (2, 96))
    expected = model(ids)
    model.compiled_shapes.add((2, 96))
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change,message", [
    ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported"), ({"hidden_act": "gelu"}, "hidden_act"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"), ({"rope_scaling": {"type": "linear"}}, "needs 'factor'"),
    ({"quantization_config": {}}, "quantised"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor")])
def test_configs_that_are_not_supported_say_so(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | CONFIGS["llama"] | change))
    with pytest.raises(InputError, match=message):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json: holds no JSON object"):
        read_config(tmp_path)


def test_the_end_of_a_text_is_that_of_generation_config_where_it_has_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | CONFIGS["llama"] | {"eos_token_id": 7}))
    for content, expected in (({"eos_token_id": [8, 9]}, (8, 9)), ({"eos_token_id": None}, (7,)), ({}, (7,))):
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        assert read_config(tmp_path).eos_token_ids == expected


def test_wrong_weights_are_named(tmp_path):
    folder = write_model(tmp_path, CONFIGS["llama"])
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.extra"] = torch.zeros(1)
    weights["model.norm.weight"] = torch.zeros(3)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        load_model(str(folder))
    for part in ("unexpected model.layers.0.mlp.extra", r"model.norm.weight has shape (3,), not (48,)", "missing layers.1.self_attn.q_proj.weight"):
        assert part in str(error.value)
    weights["model.layers.0.input_layernorm.weight"] = torch.zeros(3)           # its name holds that of one that is missing
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match="missing norm.weight"):
        load_model(str(folder))
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_model(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="never .bin files"):
        load_model(str(folder))


@pytest.mark.parametrize("error,message", [
    (hub_errors.GatedRepoError, "gated"), (hub_errors.RepositoryNotFoundError, "neither a local path nor on the Hub"),
    (hub_errors.RevisionNotFoundError, "no revision 'v9'"), (hub_errors.LocalEntryNotFoundError, "cannot be reached"),
    (hub_errors.OfflineModeIsEnabled, "cannot be reached"), (hub_errors.EntryNotFoundError, "no such file"), (ConnectionError, "cannot be reached"),
    (hub_errors.HfHubHTTPError, "owner/name: "), (hub_errors.HTTPError, "owner/name: ")])
def test_hub_errors_are_one_line(error, message, monkeypatch):
    def download(**arguments):
        assert arguments["repo_id"] == "owner/name" and "*.safetensors" in arguments["allow_patterns"]
        raise error.__new__(error)
    monkeypatch.setattr(model_module, "snapshot_download", download)
    with pytest.raises(InputError, match=message) as caught:
        load_model("owner/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_hub_download_is_loaded(llama, monkeypatch):
    monkeypatch.setattr(model_module, "snapshot_download", lambda **arguments: str(llama))
    assert load_model("owner/name").plan == "SSS"


# --- tokenizer ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["gpt2", "smollm", "llama3", "qwen2"])
def test_token_ids_equal_hugging_face(kind):
    tokenizer = load_tokenizer(str(GOLDEN / "tokenizers" / kind))
    for line, expected in zip(NASTY, json.loads((GOLDEN / "tokenizers" / kind / "ids.json").read_text())):
        assert tokenizer.encode(line) == expected, repr(line)
        if kind != "qwen2":     # NFC changes the text
            assert tokenizer.decode(tokenizer.encode(line, special=False)) == line


@pytest.mark.parametrize("change,message", [
    (lambda s: s["model"].update(byte_fallback=True), "SentencePiece"), (lambda s: s.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer of the kind Whitespace"),
    (lambda s: s["model"]["merges"].reverse(), "order of its merges"), (lambda s: s["added_tokens"][0].update(lstrip=True), "strips")])
def test_tokenizers_that_are_not_supported_say_so(change, message, tmp_path):
    spec = json.loads((GOLDEN / "tokenizers/smollm/tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match=message):
        load_tokenizer(str(tmp_path))


def test_a_sentencepiece_model_says_what_is_supported(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match="byte-level BPE of the Llama-3"):
        load_tokenizer(str(tmp_path))


# --- scan and plan -----------------------------------------------------------------------------------------------

TIERS = {"window": 8, "sinks": 2, "feature_map": "hedgehog"}


def test_scan_gives_the_numbers_of_a_naive_scan_in_half_the_blocks(llama, tmp_path, monkeypatch):
    model, tokenizer = load_model(str(llama)), load_tokenizer(str(llama))
    monkeypatch.setattr(layerboost, "SCAN_RECALL", {96: 2})
    torch.manual_seed(0)
    sequences = torch.randint(0, 700, (2, 128))
    with torch.inference_mode():
        probes = [layerboost.kl_probe(model, sequences), layerboost.recall_probe(model, tokenizer, sequences)]
    calls, run = [0], model_module.Block.forward
    monkeypatch.setattr(model_module.Block, "forward", lambda *a: (calls.__setitem__(0, calls[0] + 1), run(*a))[1])
    layers = layerboost.scan(model, probes, TIERS, tmp_path / "scan.json", {}, [])
    scanned, calls[0] = calls[0], 0
    for i, tier in itertools.product(range(3), "XL"):
        naive = layerboost.measure_plan(model, probes, TIERS, "SSS"[:i] + tier + "SSS"[i + 1:])
        for column, value in naive.items():
            assert layers[i][tier][column] == pytest.approx(value, abs=1e-5)
    assert scanned < calls[0]
    assert {"kl", "recall", "kl, text 1", "recall at 96"} <= set(layers[0]["X"])
    resumed = layerboost.scan(model, probes, TIERS, tmp_path / "scan.json", {}, layers[:1])
    assert resumed == layers == json.loads((tmp_path / "scan.json").read_text())["layers"]


def test_planners():
    draw = random.Random(0)
    costs = [{"S": 0.0, "L": draw.random(), "X": draw.random()} for _ in range(7)]
    total = lambda plan: sum(cost[tier] for cost, tier in zip(costs, plan))
    plans = ["".join(p) for p in set(itertools.permutations("SSXXLLL"))]
    best = min(plans, key=total)
    assert layerboost.plan_tier(costs, 2, 2) == best
    paper = layerboost.plan_paper(costs, 2, 2)
    by_x = sorted(range(7), key=lambda i: costs[i]["X"])
    assert all(paper[i] == "X" for i in by_x[:2]) and all(paper[i] == "S" for i in by_x[-2:]) and paper.count("L") == 3
    greedy = layerboost.plan_greedy(costs, 2, 2, total)
    assert (greedy.count("S"), greedy.count("X")) == (2, 2) and total(greedy) >= total(best)
    assert layerboost.plan_tier(costs, 7, 0) == "S" * 7 and layerboost.plan_tier(costs, 0, 7) == "X" * 7


def test_a_greedy_planning_that_was_stopped_goes_on(tmp_path):
    """What it has measured is not measured again, but for another model."""
    costs, measured = [{"S": 0.0, "L": i / 8, "X": 1 - i / 8} for i in range(7)], []

    def planning(model, stop_after):
        def measure(plan):
            if len(measured) == stop_after:
                raise KeyboardInterrupt
            measured.append(plan)
            return sum(cost[tier] for cost, tier in zip(costs, plan))
        return layerboost.plan_greedy(costs, 2, 2, layerboost.remembered(tmp_path / "greedy.json", {"model": model}, measure))
    with pytest.raises(KeyboardInterrupt):
        planning("a", 9)
    plan = planning("a", 99)
    assert len(measured) == len(set(measured)) == 4 + 4 + 4 + 4 + 3
    assert planning("a", 19) == plan
    with pytest.raises(KeyboardInterrupt):
        planning("b", 19)


def test_spearman():
    assert layerboost.spearman([1, 2, 3, 4], [10, 20, 30, 100]) == pytest.approx(1)
    assert layerboost.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert layerboost.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)      # scipy.stats.spearmanr
    assert layerboost.spearman([0, 0, 0], [1, 2, 3]) == 0


# --- healing -----------------------------------------------------------------------------------------------------

def test_sliced_kl_equals_the_formula_and_its_gradients(monkeypatch):
    monkeypatch.setattr(kernels, "ROWS", 16)            # 50 positions: three whole slices, compiled, and a part of one
    torch.compiler.set_stance("default")
    torch.manual_seed(0)
    student, teacher, head, other = torch.randn(50, 16), torch.randn(50, 16), torch.randn(90, 16), torch.randn(90, 16)
    results = []
    naive = lambda student, teacher, head, other: kernels.logit_kl(student @ head.T, teacher @ other.T).mean()
    for form in (kernels.sliced_kl, naive):
        leaves = [student.clone().requires_grad_(True), head.clone().requires_grad_(True)]
        loss = form(leaves[0], teacher, leaves[1], other)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for fast, naive in zip(*results):
        torch.testing.assert_close(fast, naive, rtol=1e-4, atol=1e-6)
    alone = head.clone().requires_grad_(True)                           # the head's gradient where the student is frozen
    kernels.sliced_kl(student, teacher, alone, other).backward()
    torch.testing.assert_close(alone.grad, results[0][2])


def test_packing_puts_an_end_of_text_between_documents(llama):
    tokenizer = load_tokenizer(str(llama))
    documents = ["one two", "three", "four five six " * 20]
    ids = [id for d in documents for id in tokenizer.encode(d) + [700]]
    packed = distill.pack(iter(documents), tokenizer, (700,), 8)
    assert packed.flatten().tolist() == ids[:len(ids) // 8 * 8]
    assert distill.pack(iter(documents), tokenizer, (700,), 8, tokens=17).shape == (3, 8)


def test_documents_are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "line"}\n{"text": "other"}\n')
    with gzip.open(tmp_path / "c.json.gz", "wt") as file:
        file.write('{"text": "zipped"}\n')
    assert list(distill.read_documents(str(tmp_path))) == ["plain", "line", "other", "zipped"]
    for second in ('{"body": 1}', '{"text": null}', "{"):
        (tmp_path / "b.jsonl").write_text('{"text": "line"}\n' + second)
        with pytest.raises(InputError, match="b.jsonl: line 2"):
            list(distill.read_documents(str(tmp_path / "b.jsonl")))
    for name, content in (("d.jsonl.gz", b"not zipped"), ("e.jsonl", "\ufeff{}".encode("utf-16"))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: line 1"):
            list(distill.read_documents(str(tmp_path / name)))
    with pytest.raises(InputError, match="the file one of .txt"):
        list(distill.read_documents("hub:owner/dataset/part.parquet"))
    with pytest.raises(InputError, match="--valid .*nowhere: no such file"):
        list(distill.read_documents(str(tmp_path / "nowhere"), "--valid"))


def test_adapters_start_silent_and_merge_exactly(llama):
    base = load_model(str(llama))
    student, ids = convert(base, "SLX", **TIERS), torch.randint(0, 700, (1, 40))
    expected, original = student(ids), base.layers[0].mlp.up_proj.weight.clone()
    distill.add_adapters(student, 4, seed=0)
    torch.testing.assert_close(student(ids), expected)
    assert sum(isinstance(m, distill.LoRALinear) for m in student.modules()) == 4 + 4 + 3 * 3
    for module in student.modules():
        if isinstance(module, distill.LoRALinear):
            module.B.data.normal_(std=0.1)
    adapted = student(ids)
    assert (adapted - expected).abs().max() > 0.1
    distill.merge_adapters(student)
    torch.testing.assert_close(student(ids), adapted, rtol=1e-4, atol=1e-4)
    assert torch.equal(base.layers[0].mlp.up_proj.weight, original)


def heal_small(folder, checkpoint, interrupt_at=None, monkeypatch=None, **settings):
    torch.manual_seed(0)
    base = load_model(str(folder))
    student = convert(base, "LLX", **TIERS)
    data = torch.randint(0, 700, (12, 32), generator=torch.Generator().manual_seed(0))
    run = distill.Healing(**{"tokens": 32 * 4 * 10 + 64 * 4 * 2, "context": 32, "long_context": 64, "long_share": 2 / 7, "batch": 4, "rank": 4, "transfer_steps": 3, "warm_up": 1, "lr": 3e-3, **settings})
    if interrupt_at is not None:
        step, original = [0], distill.Optimizer.step
        def stepping(self, *arguments):
            original(self, *arguments)
            step[0] += 1
            if step[0] == interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(distill.Optimizer, "step", stepping)
        with pytest.raises(KeyboardInterrupt):
            distill.heal(base, student, data, data[:2], run, checkpoint, {"plan": "LLX"})
        monkeypatch.setattr(distill.Optimizer, "step", original)
        return None, None
    return student, distill.heal(base, student, data, data[:2], run, checkpoint, {"plan": "LLX"})


def test_each_stage_of_healing_warms_up_stays_at_its_rate_and_falls_late():
    settings = distill.Healing(tokens=1_000_000)
    ends = (0, settings.transfer_steps, settings.short_steps, settings.steps)
    for first, last, peak in zip(ends, ends[1:], (settings.tail_lr, settings.lr, settings.tail_lr)):
        rates = [settings.learning_rate(step) / peak for step in range(first, last)]
        warm_up = settings.warm_up if peak == settings.lr else max(1, (last - first) // 20)
        assert rates[0] == pytest.approx(1 / warm_up) and set(rates[warm_up:distill.STEADY]) == {1.0}
        assert all(rate**2 * t == pytest.approx(distill.STEADY) for t, rate in list(enumerate(rates, 1))[distill.STEADY:])
        assert all(settings.stage(step) == (first, last, peak) for step in range(first, last))
    assert settings.short_steps > 2 * distill.STEADY            # so the fall is seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_of_the_weights_counts_late_steps_more(dtype):
    """Step t counts as t (t + 1) ... (t + AVERAGE - 1), by the closed form of the recursion; what has no gradient stays."""
    weight, still = (torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(2))
    optimizer, seen = distill.Optimizer({"weight": weight, "still": still}), []
    for t in range(1, 8):
        weight.grad = torch.tensor([1.0, -1.0, t - 4.5]).to(dtype)
        optimizer.step(0.1, t)
        seen.append(optimizer.masters["weight"].detach().clone())
    counts = torch.tensor([float(math.prod(range(t, t + distill.AVERAGE))) for t in range(1, 8)])
    average = (counts[:, None] * torch.stack(seen)).sum(0) / counts.sum()
    torch.testing.assert_close(optimizer.averages["weight"], average)
    optimizer.exchange()
    torch.testing.assert_close(weight.detach(), average.to(dtype))
    optimizer.exchange()
    assert torch.equal(weight.detach(), seen[-1].to(dtype)) and not still.any()
    optimizer.end_stage()
    torch.testing.assert_close(optimizer.masters["weight"].detach(), average)


@pytest.mark.parametrize("full", [False, True])
def test_healing_helps_and_resumes_exactly(llama, tmp_path, monkeypatch, full):
    """Stopped by Ctrl-C in any stage and gone on, a run ends with the same weights, bit for bit."""
    lr = 5e-4 if full else 3e-3
    student, curve = heal_small(llama, tmp_path / "whole.safetensors", full=full, lr=lr)
    assert curve["valid"][-1][1] < 0.8 * curve["valid"][0][1] and len(curve["train"]) == 12
    assert curve["train"][2] < curve["train"][0]                                # attention transfer learns, too
    for stop in (2, 4, 5):                                                      # after steps 2, 6 and 11
        heal_small(llama, tmp_path / "cut.safetensors", stop, monkeypatch, full=full, lr=lr)
    resumed, curve_again = heal_small(llama, tmp_path / "cut.safetensors", full=full, lr=lr)
    assert curve_again == curve
    for (name, a), b in zip(student.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), name
    again, _ = heal_small(llama, tmp_path / "cut.safetensors", full=full, lr=lr)       # a finished run is only read back
    assert torch.equal(again.norm.weight, resumed.norm.weight)
    with pytest.raises(InputError, match=f"was made with lr = {lr}, not 0.1"):
        heal_small(llama, tmp_path / "cut.safetensors", lr=0.1, full=full)
    (tmp_path / "cut.safetensors").write_bytes(b"half of it")
    with pytest.raises(InputError, match="cut.safetensors: cannot be read"):
        heal_small(llama, tmp_path / "cut.safetensors", full=full)


def test_a_run_goes_on_to_more_tokens_and_ends_at_fewer(llama, tmp_path, monkeypatch):
    """Made longer after its end, or cut short, it is the run that had the other budget from the start, bit for bit."""
    short, long = {"tokens": 32 * 4 * 10 + 64 * 4 * 2}, {"tokens": 32 * 4 * 15 + 64 * 4 * 3, "long_share": 2 / 7}
    expected = {tokens["tokens"]: heal_small(llama, tmp_path / f"{i}.safetensors", **tokens) for i, tokens in enumerate((short, long))}
    grown, cut = (tmp_path / name / "healing.safetensors" for name in ("grown", "cut"))
    for folder in (grown.parent, cut.parent):
        folder.mkdir()
    heal_small(llama, grown, **short)
    heal_small(llama, cut, 7, monkeypatch, **long)
    for settings, checkpoint in ((long, grown), (short, cut)):
        student, curve = heal_small(llama, checkpoint, **settings)
        same, same_curve = expected[settings["tokens"]]
        assert curve["train"] == same_curve["train"] and curve["valid"][-1] == same_curve["valid"][-1]
        for (name, a), b in zip(student.named_parameters(), same.parameters()):
            assert torch.equal(a, b), name
    with pytest.raises(InputError, match="--tokens 1792: the run in .*grown is at 2,688 tokens; give more"):
        heal_small(llama, grown, **short)


def test_the_last_stage_trains_the_tails_alone(llama, tmp_path):
    """With it and without, the adapters end the same; the tails do not."""
    without, _ = heal_small(llama, tmp_path / "short.safetensors", tokens=32 * 4 * 10, long_share=0.0)
    whole, curve = heal_small(llama, tmp_path / "whole.safetensors")
    assert [tokens for tokens, _ in curve["valid"]][-2:] == [32 * 4 * 10 + 64 * 4, 32 * 4 * 10 + 64 * 4 * 2]
    for (name, a), b in zip(without.named_parameters(), whole.parameters()):
        assert torch.equal(a, b) != name.endswith(("_map", "tail_logit")), name


def test_a_loss_that_is_not_finite_stops_the_run(llama, tmp_path):
    with pytest.raises(distill.Diverged, match="try a lower --lr"):
        heal_small(llama, tmp_path / "c.safetensors", lr=1e30)


def test_activation_checkpointing_gives_the_same_gradients_from_less(llama):
    """Fewer tensors are kept for the backward pass: 96 tokens, where the blocks' activations are most of what there is."""
    base, kept, gradients, ids = load_model(str(llama)), [], [], torch.arange(192).view(2, 96)
    for recompute in (False, True):
        student = convert(base, "SLX", **TIERS)
        distill.add_adapters(student, 4, seed=0)
        student.recompute = recompute
        sizes: list = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            loss = distill.sliced_kl(student.hidden(ids).flatten(0, 1), base.hidden(ids).flatten(0, 1), student.head, base.head)
        loss.backward()
        kept.append(sum(sizes))
        gradients.append([m.B.grad for m in student.modules() if isinstance(m, distill.LoRALinear)])
    assert kept[1] < 0.3 * kept[0]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_attention_transfer_trains_the_tails_alone(llama):
    base = load_model(str(llama))
    student = convert(base, "LSX", **TIERS)
    for name in student.layers[0].self_attn.tail_parameters():
        getattr(student.layers[0].self_attn, name).requires_grad_(True)
    ids = torch.randint(0, 700, (2, 64))
    error = distill.attention_transfer(base, student, ids)
    assert 0 < error < 1 and student.layers[0].self_attn.query_map.grad.abs().sum() > 0
    wide = convert(base, "LSX", window=64, sinks=0, feature_map="hedgehog")     # the window sees everything: nothing to learn
    assert distill.attention_transfer(base, wide.requires_grad_(True), ids) < 1e-9


@pytest.mark.parametrize("kind", kernels.FEATURE_MAPS)
def test_what_a_tail_can_learn_is_what_gets_a_gradient(llama, kind):
    base, ids = load_model(str(llama)), torch.randint(0, 700, (2, 64))
    for window, sinks in ((8, 2), (0, 2), (8, 0), (0, 0)):
        if kind == "none" and not window:
            continue
        student = convert(base, "SLX", window, sinks, kind).requires_grad_(True)
        student.hidden(ids).sin().sum().backward()
        learns = {name for name, p in student.named_parameters() if name.endswith(("_map", "tail_logit")) and p.grad is not None and p.grad.abs().sum() > 1e-6}
        assert distill.tail_names(student) == {name for name in learns if kind != "favor" or "_map" not in name}


def test_every_sequence_is_read_once_a_pass():
    run = distill.Healing(tokens=4 * 8 * 30 + 4 * 16 * 3, batch=4, context=8, long_context=16, long_share=1 / 6)
    train = torch.arange(24 * 8).view(24, 8)
    order = torch.cat([run.read(step, train) for step in range(12)])[:, 0] // 8
    assert sorted(order[:24].tolist()) == sorted(order[24:].tolist()) == list(range(24))
    assert order[:24].tolist() != order[24:].tolist()
    assert (run.short_steps, run.steps, run.tokens_after(31), run.trained_tokens) == (30, 33, 4 * 8 * 30 + 64, run.tokens)
    long = torch.cat([run.read(step, train) for step in range(30, 33)])         # the same text, twice as much at a time
    assert torch.equal(long[long[:, 0].argsort()], train.view(12, 16))


# --- measurements ------------------------------------------------------------------------------------------------

def test_text_quality_by_its_definition(llama):
    base, other, tokenizer = load_model(str(llama)), boosted(llama), load_tokenizer(str(llama))
    ids = torch.randint(0, 700, (3, 40))
    ids[0, 7] = tokenizer.added["<|endoftext|>"]
    figures = bench.text_quality({"base": base, "other": other}, base, tokenizer, ids, batch=2)
    p, q = base(ids).log_softmax(-1), other(ids).log_softmax(-1)
    loss = torch.nn.functional.cross_entropy(q[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert figures["other"]["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    size = sum(len(tokenizer.decode_bytes([id])) for id in ids[:, 1:].flatten().tolist() if id not in tokenizer.added.values())
    assert figures["other"]["bits_per_byte"] == pytest.approx(float(loss) / math.log(2) * 3 * 39 / size, rel=1e-4)
    assert figures["other"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert figures["other"]["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert figures["base"]["kl"] == 0 and figures["base"]["agreement"] == 1


def test_answers_are_scored_by_their_own_tokens(llama):
    model = load_model(str(llama))
    prompts = [([1, 2, 3], [4, 5]), ([9], [8]), ([7] * 20, [1, 2, 3])]
    for (context, answer), scored in zip(prompts, bench.score_answers(model, prompts, batch_tokens=50)):
        log_p = model(torch.tensor([context + answer])).log_softmax(-1)[0]
        expected = sum(log_p[len(context) - 1 + i, token] for i, token in enumerate(answer))
        assert scored.log_likelihood == pytest.approx(float(expected), rel=1e-4)
        assert scored.greedy == all(log_p[len(context) - 1 + i].argmax() == token for i, token in enumerate(answer))


def test_tasks_are_read_and_judged(llama, tmp_path):
    tokenizer = load_tokenizer(str(llama))
    item = {"query": "Question: why\n", "choices": ["a", "because it is so"], "gold": 1}
    context, answer = bench.task_prompts(item, tokenizer)[1]
    assert tokenizer.decode(context) == "Question: why\nAnswer:" and tokenizer.decode(answer) == " because it is so"
    S = bench.Scored
    assert bench.task_accuracy([item], [[S(-2.0, False), S(-4.0, False)]]) == {"items": 1, "accuracy": 0, "accuracy_norm": 1}
    options = {"context_options": ["The cat", "The dog"], "continuation": "ran", "gold": 0}
    assert [tokenizer.decode(c) for c, _ in bench.task_prompts(options, tokenizer)] == ["The cat", "The dog"]
    assert bench.task_accuracy([options], [[S(-1.0, False), S(-2.0, False)]]) == {"items": 1, "accuracy": 1}
    last = {"context": "I saw a", "continuation": "dog"}
    assert bench.task_accuracy([last, last], [[S(-1.0, True)], [S(-3.0, False)]]) == {"items": 2, "accuracy": 0.5, "perplexity": pytest.approx(7.389, abs=1e-3)}
    bad = tmp_path / "bad.jsonl"
    for first, second in ((last, {"question": 1}), (last, 5), (last, item), (last, last | {"continuation": ""}), (last, last | {"context": " "}),
                          (last, last | {"continuation": 4}), (item, item | {"gold": 2}), (item, item | {"gold": "1"}), (item, item | {"choices": [3, 4]}),
                          (options, options | {"context_options": "The cat"})):
        bad.write_text(json.dumps(first) + f"\n{json.dumps(second)}\n")
        with pytest.raises(InputError, match="bad.jsonl: line 2"):
            bench.read_task(str(bad))
    bad.write_text("{")
    with pytest.raises(InputError, match="bad.jsonl: line 1"):
        bench.read_task(str(bad))
    bad.write_text(json.dumps(last | {"context": "two\u2028lines"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert bench.read_task(str(bad))[0]["context"] == "two\u2028lines"
    with pytest.raises(InputError, match="different names"):
        bench.read_tasks([str(bad), str(bad)], 1)


def test_passkeys_are_hidden_where_they_should_be(llama):
    tokenizer, text = load_tokenizer(str(llama)), torch.full((4, 400), 300)
    for depth, (context, answer) in bench.passkey_prompts(tokenizer, text, 512, (0.0, 0.5, 1.0), count=2):
        assert len(context) + len(answer) == 512
        number = tokenizer.decode(answer).strip()
        assert len(number) == 5 and tokenizer.decode(context).count(number) == 2
        place = tokenizer.decode(context).index(number) / len(tokenizer.decode(context))
        assert abs(place - depth) < 0.35


# --- the embedded model ------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def tiny():
    return load_model(str(layerboost.TINY)), load_tokenizer(str(layerboost.TINY))


def test_the_embedded_model_is_small_trained_and_uses_its_context(tiny):
    model, tokenizer = tiny
    config = model.config
    assert sum(path.stat().st_size for path in layerboost.TINY.iterdir() if path.is_file()) < 24e6
    assert config.num_hidden_layers >= 12 and config.num_key_value_heads < config.num_attention_heads and config.tie_word_embeddings
    valid = distill.pack(distill.read_documents(str(layerboost.TINY / "valid.jsonl.gz")), tokenizer, config.eos_token_ids, 1024, 8192)
    assert bench.text_quality({"tiny": model}, model, tokenizer, valid)["tiny"]["bits_per_byte"] < 1.75
    assert min(bench.passkey_recall(model, tokenizer, valid, (256, 512), count=8)["recall"].values()) >= 0.9


def test_healing_brings_a_trained_model_back(tmp_path, monkeypatch):
    """The embedded defaults, but for the plan, which is stated, a short budget, and less to evaluate on."""
    monkeypatch.setattr(layerboost, "VALID_SEQUENCES", 8)
    monkeypatch.setattr(bench, "RECALL_LENGTHS", (512,))
    assert layerboost.main(["--tokens", "33k", "--plan", "SSSSLLSSLXLX", "--out", str(tmp_path / "healed")]) == 0
    report = json.loads((tmp_path / "healed/report.json").read_text())
    assert report["healed"]["kl"] < 0.8 * report["converted"]["kl"]
    assert report["healed"]["agreement"] > report["converted"]["agreement"]
    assert report["healed"]["recall"]["512"] >= report["base"]["recall"]["512"] - 0.1


# --- speed -------------------------------------------------------------------------------------------------------

def test_the_floor_counts_what_a_model_holds(llama):
    """Its weights but the embedding's rows and the norms, and its caches."""
    for plan in ("SSS", "SLX", "LLL"):
        model = boosted(llama, plan).bfloat16()
        costs = bench.step_costs(model, 3, 200)
        matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name]       # phi's have three
        assert costs["weights"][0] + costs["head"][0] == sum(p.numel() * (4 if p.dim() == 3 else 2) for p in matrices)
        assert costs["weights"][1] + costs["head"][1] == 3 * sum(p.numel() * 2 for p in matrices)
        cache = costs["softmax cache"][0] + costs["window"][0] + costs["state"][0] / 2
        assert cache == 3 * bench.cache_bytes(model, 200)
    dense, converted = (bench.step_costs(boosted(llama, plan), 1, 10**6) for plan in ("SSS", "SLX"))
    assert bench.floor_seconds(converted, bench.HARDWARE["a10"]) == pytest.approx(bench.floor_seconds(dense, bench.HARDWARE["a10"]) / 3, rel=0.05)


@pytest.mark.parametrize("command,keys", [
    ("decode --lengths 40,80 --batch 2 --steps 3", {"step_ms", "floor_ms", "gain", "cache_mib", "prefill_tokens_per_second"}),
    ("serve --concurrency 2,3 --prompt 20 --output 12 --requests 5", {"tokens_per_second", "first_token_s", "per_token_ms", "slots"})])
def test_speed_commands_measure_both_models(command, keys, llama, capsys):
    assert bench.main([*command.split(), "--model", str(llama), "--plan", "SLX", "--no-compile", "--dtype", "float32"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])["report"]
    assert [figures["model"] for figures in report] == ["dense", "converted"] * 2
    assert all(keys <= set(figures) for figures in report)


@pytest.mark.parametrize("arguments,message", [("decode --lengths 10", "10 tokens are too few"), ("serve --prompt 2", "2 tokens are too few"),
                                               ("decode --plot nowhere/a.svg", "in a folder that exists"), ("quality --valid {model}", "no such file, or a folder without")])
def test_bad_input_to_a_measurement_is_one_line_and_exit_code_2(arguments, message, llama, capsys):
    assert bench.main([*arguments.format(model=llama).split(), "--model", str(llama), "--no-compile", "--dtype", "float32"]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_does_not_fit_in_memory_waits(llama, capsys):
    model = load_model(str(llama))
    memory = bench.weight_bytes(model) + 2.5 * bench.cache_bytes(model, 40)
    arguments = ["serve", "--model", str(llama), "--plan", "SLX", "--no-compile", "--dtype", "float32", "--concurrency", "4", "--prompt", "16", "--output", "16"]
    assert bench.main([*arguments, "--memory", f"{memory / 1e9}GB"]) == 0
    dense, converted = json.loads(capsys.readouterr().out.splitlines()[-1])["report"]
    assert (dense["slots"], dense["requests"]) == (2, 4) and converted["slots"] > 2
    assert bench.main([*arguments, "--memory", "0.00001GB"]) == 2
    assert "--memory, --hardware: 0.0 GiB" in capsys.readouterr().err


def test_spread_is_how_far_lengths_lie_from_their_means(llama):
    args = argparse.Namespace(prompt=40, output=20, spread=0.25, seed=0, requests=200)
    lengths = lambda: [(len(r.prompt), r.max_new_tokens) for r in bench.make_requests(args, 1, load_model(str(llama)))]
    assert [(min(x), max(x)) for x in zip(*lengths())] == [(30, 50), (15, 25)]
    args.spread = 0.0
    assert set(lengths()) == {(40, 20)}


def test_roofline_of_a_known_shape(capsys):
    assert bench.main("roofline --shape smollm2-135m --hardware a10 --lengths 8192 --concurrency 200 --dtype bfloat16".split()) == 0
    a10 = json.loads(capsys.readouterr().out.splitlines()[-1])["report"]["a10"]
    assert sum(row["mb"] for row in a10["parts"] if row["model"] == "dense" and row["part"] in ("weights", "head")) == pytest.approx(2 * 134.5, rel=0.01)
    dense, converted = a10["gains"]
    assert dense["slots"] < converted["slots"] == 200 and converted["gain"] > 2.5
    assert bench.main("roofline --shape smollm2-135m --hardware a10 --lengths 1 --plan uniform:X --dtype float32".split()) == 0


# --- the command line --------------------------------------------------------------------------------------------

def command(llama, text, out, *more):
    return ["--model", str(llama), "--data", str(text), "--valid", str(text), "--tokens", "12k", "--window", "16", "--sinks", "2", "--device", "cpu",
            "--dtype", "float32", "--no-compile", "--lr", "3e-4", "--out", str(out), *more]


def test_the_whole_story(llama, text, tmp_path, capsys):
    task = tmp_path / "task.jsonl"
    task.write_text('{"query": "the key", "choices": ["of", "and"], "gold": 0}\n')
    out = tmp_path / "out"
    assert layerboost.main(command(llama, text, out, "--keep", "1", "--drop", "1", "--tasks", str(task), "--measure", "kl+recall+task")) == 0
    printed = capsys.readouterr().out
    assert "Plan:" in printed and "Spearman" in printed and "| perplexity" in printed
    report = json.loads((out / "report.json").read_text())
    for name in ("base", "converted", "healed"):
        assert {"perplexity", "kl", "agreement", "recall", "tasks"} <= set(report[name])
        assert set(report[name]["recall"]) == {"256", "512"} and report[name]["tasks"]["task"]["items"] == 1
    assert report["base"]["kl"] == 0 and report["healed"]["kl"] < report["converted"]["kl"]
    assert sorted(report["plan"]) == ["L", "S", "X"] and (out / "report.md").exists()
    healed = load_model(str(out))
    assert healed.plan == report["plan"] and healed.config.healed_context == report["healing"]["settings"]["long_context"]

    layers = json.loads((out / "scan.json").read_text())["layers"]              # a second plan from the same scan
    assert layerboost.main(command(llama, text, tmp_path / "again", "--keep", "2", "--drop", "0", "--tasks", str(task), "--measure", "kl+recall+task",
                                   "--scan", str(out / "scan.json"))) == 0
    assert json.loads((tmp_path / "again/report.json").read_text())["scan"] == layers
    task.write_text('{"query": "the key", "choices": ["of", "or"], "gold": 0}\n')
    assert layerboost.main(command(llama, text, tmp_path / "again", "--tasks", str(task), "--measure", "task", "--scan", str(out / "scan.json"))) == 2
    assert "was measured with task file" in capsys.readouterr().err

    assert layerboost.main(["--model", str(out), "--prompt", "the key of", "--max-new-tokens", "8", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("the key of")
    assert bench.main(["quality", "--model", str(out), "--base", str(llama), "--valid", str(text), "--dtype", "float32"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["report"]
    assert figures["model"]["kl"] == pytest.approx(report["healed"]["kl"], rel=1e-3) and figures["base"]["kl"] == 0


def test_two_processes_scan_and_heal_as_one_does(llama, text, tmp_path):
    """torchrun over gloo: the same scan, and the same loss curve at the same global batch; with text to validate on for one of them alone."""
    script, report, valid = str(Path(layerboost.__file__)), {}, tmp_path / "valid.txt"
    valid.write_text("the key of and model " * 120)
    tokenizer = load_tokenizer(str(llama))
    assert len(distill.pack(distill.read_documents(str(valid)), tokenizer, (700,), 512)) == 1
    for name, launcher, more in (("one", [], ["--batch", "2", "--micro-batch", "1"]), ("two", ["-m", "torch.distributed.run", "--nproc-per-node=2"], [])):
        arguments = command(llama, text, tmp_path / name, "--keep", "1", "--drop", "1", "--measure", "kl", "--valid", str(valid), *more)
        run = subprocess.run([sys.executable, *launcher, script, *arguments], capture_output=True, text=True, timeout=200)
        assert run.returncode == 0 and run.stdout.count("Plan:") == 1, run.stderr
        report[name] = json.loads((tmp_path / name / "report.json").read_text())
    one, two = report["one"], report["two"]
    assert two["plan"] == one["plan"]
    for a, b in zip(one["scan"], two["scan"], strict=True):
        assert b["X"] == pytest.approx(a["X"], abs=1e-5) and b["L"] == pytest.approx(a["L"], abs=1e-5)
    assert two["healing"]["train"] == pytest.approx(one["healing"]["train"], rel=1e-3)
    assert two["healing"]["valid"] == [[tokens, pytest.approx(kl, rel=1e-3)] for tokens, kl in one["healing"]["valid"]]
    with pytest.raises(InputError, match="--batch, --micro-batch, --context: give numbers"):
        layerboost.check_arguments(load_model(str(llama)), layerboost.parse_arguments([*arguments, "--micro-batch", "0"]))


def test_without_validation_text_the_last_documents_are_held_out(llama, text, tmp_path):
    args = layerboost.parse_arguments(["--model", str(llama), "--data", str(text)])
    train, valid = layerboost.read_text(args, load_tokenizer(str(llama)), load_model(str(llama)), distill.Healing(tokens=10**6))
    documents = list(distill.read_documents(str(text)))
    tokenizer = load_tokenizer(str(llama))
    assert valid.flatten()[:50].tolist() == tokenizer.encode(documents[-1])[:50]
    assert train.flatten()[:50].tolist() == tokenizer.encode(documents[0])[:50]
    assert train.numel() + valid.numel() <= sum(len(tokenizer.encode(d)) + 1 for d in documents)


@pytest.mark.parametrize("more,message", [
    (["--keep", "3", "--drop", "1"], "--keep 3 --drop 1"), (["--plan", "SL"], "give 3 letters"), (["--plan", "uniform:Q"], "give 3 letters"),
    (["--feature-map", "cosine"], "--feature-map 'cosine'"), (["--window", "0", "--feature-map", "none"], "would see nothing"),
    (["--measure", "luck"], "--measure luck"), (["--tokens", "100"], "give at least as many"), (["--measure", "task"], "--tasks FILE"), (["--tasks", "nowhere.jsonl"], "--tasks nowhere.jsonl"),
    (["--data", "nowhere"], "--data nowhere"), (["--model", "./nowhere"], "./nowhere: no such folder"), (["--scan", "nowhere.json"], "--scan nowhere.json"),
    (["--prompt", ""], "--prompt is empty"), (["--prompt", "a", "--temperature", "1", "--top-k", "-1"], "--top-k"), (["--tasks", os.devnull], "is empty"), (["--device", "meta"], "--device meta")])
def test_bad_input_is_one_line_and_exit_code_2(more, message, llama, text, tmp_path, capsys):
    assert layerboost.main(command(llama, text, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("layerboost: ") and message in error


def test_a_scan_serves_every_precision_of_its_model(llama):
    marks = {layerboost.fingerprint(*load_model(str(llama), dtype=dtype).parameters()) for dtype in (torch.float32, torch.bfloat16)}
    assert len(marks) == 1
    assert layerboost.fingerprint(torch.tensor([1000])) != layerboost.fingerprint(torch.tensor([1001]))     # ids are not rounded


def test_a_scan_of_something_else_is_refused_with_the_difference(llama, text, tmp_path, capsys):
    out, task = tmp_path / "out", tmp_path / "task.jsonl"
    task.write_text('{"query": "the key", "choices": ["of", "and"], "gold": 0}\n')
    assert layerboost.main(command(llama, text, out, "--keep", "1", "--drop", "1")) == 0
    assert "dtype" not in json.loads((out / "scan.json").read_text())["identity"]
    assert layerboost.main(command(llama, text, tmp_path / "new", "--scan", str(out / "scan.json"), "--window", "32")) == 2
    assert "was measured with window 16, this run has 32" in capsys.readouterr().err
    assert layerboost.main(command(llama, text, tmp_path / "new", "--scan", str(out / "scan.json"), "--tasks", str(task), "--measure", "task")) == 2
    assert "was measured with --measure kl+recall, this run has task" in capsys.readouterr().err
    assert layerboost.main(command(llama, text, out, "--plan", "SSL", "--window", "8", "--tokens", "4k")) == 2      # the scan.json there is not read
    assert "healing.safetensors: was made with window = 16" in capsys.readouterr().err
    whole = json.loads((out / "scan.json").read_text())
    for count, message in ((1, "part.json: holds 1 of 3 layers"), (0, "part.json: is no scan file")):
        (tmp_path / "part.json").write_text(json.dumps(whole | {"layers": whole["layers"][:count]}))
        assert layerboost.main(command(llama, text, tmp_path / "new", "--scan", str(tmp_path / "part.json"))) == 2
        assert message in capsys.readouterr().err
    assert layerboost.main(["--model", str(out), "--data", str(text), "--out", str(tmp_path / "new")]) == 2
    assert "is converted already" in capsys.readouterr().err
    assert layerboost.main(command(llama, text, llama)) == 2
    assert "is the folder of the original" in capsys.readouterr().err


def test_a_scan_that_found_no_damage_is_drawn_and_one_of_a_broken_model_stops(llama, text, tmp_path, capsys):
    layers = [{tier: {"task": 0.0} for tier in "XL"}] * 3
    assert layerboost.chart(layers, ["task"], "SLX").count("0.0000") == 6
    model = load_model(str(llama))
    model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
    save_model(model, tmp_path / "broken", llama)
    assert layerboost.main(command(tmp_path / "broken", text, tmp_path / "out", "--measure", "kl")) == 1
    assert "layer 0 as X is not a finite number" in capsys.readouterr().err


def test_token_counts():
    assert [layerboost.token_count(t) for t in ("200k", "10M", "1.5k", "4096")] == [200_000, 10_000_000, 1500, 4096]
    for bad in ("k", "ten", "", "infM"):
        with pytest.raises(Exception, match="not a number of tokens"):
            layerboost.token_count(bad)
