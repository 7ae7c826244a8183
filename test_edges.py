"""Bad input and odd machines: no compiler, tensors that C++ must not read, files that are damaged
or of a kind that is not supported, the Hub out of reach, flags that do not fit together. Each ends
in one line that names the file or flag and the fix, or in a slower way to the same result.
"""

import dataclasses
import errno
import functools
import gzip
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import hypothesis
import pytest
import torch
from huggingface_hub import errors as hub_errors
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import bench
import chat
import cpu
import distill
import layerboost
import machine
import measure
import planner
import report
import scan as scan_module
import terminal
import tokenizer
from config import read_config
from conftest import GOLDEN, boosted, needs_cpp, short_run, write_model
from golden.make_golden import CONFIGS, SMALL
from hub import InputError, content_hash, hash_files
from model import load_model, load_tokenizer, rotary_frequencies, save_model
from text import read_documents
from tokenizer import Tokenizer

HERE = Path(__file__).parent

# --- a machine whose compiler is missing or does not work ----------------------------------------


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh process in the repository's folder."""
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_fresh_process_starts_at_once_and_without_a_compiler(llama, tmp_path):
    """torch's compiler takes three seconds to import, the Hub a third of one: neither --help nor
    --prompt needs them. Without g++ torch runs, and one line says so."""
    code = f"""
import sys, layerboost, model
print(model.load_model({str(llama)!r}, "SLX").generate([5, 6], 3).shape)
print({{"torch._dynamo", "huggingface_hub"}} & set(sys.modules))"""
    run = run_python(code, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert run.stdout.splitlines() == ["torch.Size([1, 5])", "set()"], run.stderr
    (line,) = run.stderr.splitlines()
    assert "cpu.cpp was not built, torch runs instead" in line and "no-such-compiler" in line


@pytest.fixture
def new_machine(monkeypatch, tmp_path) -> Path:
    """Nothing is built yet. Returns the folder where it will lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.library.cache_clear()
    cpu.try_compiler.cache_clear()
    yield tmp_path / "layerboost"
    cpu.library.cache_clear()
    cpu.try_compiler.cache_clear()


def write_compiler(path: Path) -> str:
    """One that does not know -fopenmp, as Apple's."""
    path.write_text("#!/bin/sh\necho \"error: unsupported option '-fopenmp'\" >&2\nexit 1\n")
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "clang", ""])
def test_what_cannot_be_built_is_said_once_and_not_needed(
    compiler, llama, monkeypatch, tmp_path, new_machine, capsys
):
    if compiler == "clang":
        compiler = write_compiler(tmp_path / "clang")
    monkeypatch.setenv("CXX", compiler)
    model = boosted(llama)
    ids = torch.randint(0, 700, (2, 20))
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model(ids), boosted(llama)(ids))
        model.generate(ids, 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert "cpu.cpp was not built" in line and "give --no-compile" in line
    assert not list(new_machine.iterdir())  # no half of a library


def test_no_compile_asks_for_no_compiler(llama, monkeypatch, new_machine, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    flags = ["--model", str(llama), "--dtype", "float32", "--prompt", "ab", "--no-compile"]
    assert layerboost.main(flags) == 0
    assert not capsys.readouterr().err


def test_a_cache_folder_that_others_can_write_is_not_trusted(new_machine, capsys):
    """What lies there would be executed."""
    new_machine.mkdir()
    new_machine.chmod(0o777)
    assert not cpu.compiler_works()
    assert f"{new_machine}: others can write there" in capsys.readouterr().err
    assert not list(new_machine.iterdir())


@needs_cpp
def test_the_cache_folder_is_the_users_own(new_machine):
    assert cpu.compiler_works()
    assert stat.S_IMODE(new_machine.stat().st_mode) == 0o700
    assert [path.suffix for path in new_machine.iterdir()] == [".so"]


@needs_cpp
@pytest.mark.slow
def test_two_processes_build_the_library_at_once_and_a_third_finds_it(tmp_path):
    code = (
        "import torch, cpu\n"
        "assert cpu.compiler_works()\n"
        "print(cpu.row_product(torch.ones(8), torch.ones(2, 8)))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    start = functools.partial(
        subprocess.Popen, [sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, text=True
    )
    both = [start(env=environment) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs == ["tensor([8., 8.])\n"] * 2
    assert [path.suffix for path in (tmp_path / "layerboost").iterdir()] == [".so"]

    third = start(env=environment | {"PATH": str(tmp_path)})  # where no compiler is
    assert third.communicate(timeout=120)[0] == outputs[0] and third.returncode == 0


# --- the boundary into C++ -----------------------------------------------------------------------


def step_arguments(B=2, H=4, G=2, D=12, room=10, features=6) -> dict:
    """Arguments of a step that are right."""
    return {
        "query": torch.randn(B, H, 1, D),
        "new_key": torch.randn(B, G, 1, D),
        "new_value": torch.randn(B, G, 1, D),
        "slot": torch.tensor([0, room - 1]),
        "key": torch.randn(B, G, room, D),
        "value": torch.randn(B, G, room, D),
        "end": torch.tensor([1, room]),
        "phi_query": torch.rand(B, H, 1, features),
        "phi_key": torch.rand(B, G, features),
        "left": torch.randn(B, G, D),
        "tail_logit": torch.randn(H),
        "state": torch.rand(B, G, features, D),
        "norm": torch.rand(B, G, features),
    }


FIVE_HEADS = {"phi_query": torch.rand(2, 5, 1, 6), "tail_logit": torch.randn(5)}
WRONG_STEPS = [
    {"key": torch.randn(2, 2, 10, 12).double()},
    {"new_key": torch.randn(2, 2, 1, 12).bfloat16()},
    {"norm": torch.rand(2, 2, 6).double()},
    {"slot": torch.tensor([0, 1], dtype=torch.int32)},
    {"new_value": torch.randn(2, 2, 1, 11)},
    {"value": torch.randn(2, 2, 9, 12)},
    {"phi_key": torch.rand(2, 2, 5)},
    {"left": torch.randn(1, 2, 12)},
    {"tail_logit": torch.randn(3)},
    {"query": torch.randn(2, 5, 1, 12), **FIVE_HEADS},  # on two key/value heads
    {"state": None},
    {"phi_key": None},
    {"key": torch.randn(2, 2, 12, 10).mT},  # not contiguous, and changed in place
    {"norm": torch.rand(1, 1, 6).expand(2, 2, 6)},
    {"slot": torch.tensor([0, 10])},
    {"slot": torch.tensor([-1, 0])},
    {"end": torch.tensor([1, 11])},
    {"end": torch.tensor([-1, 1])},
]


@needs_cpp
@pytest.mark.parametrize("wrong", WRONG_STEPS, ids=lambda wrong: "+".join(wrong))
def test_a_step_in_cpp_refuses_what_does_not_fit(wrong):
    """And changes nothing."""
    cpu.window_linear_step(**step_arguments())
    arguments = step_arguments() | wrong
    before = {name: x.clone() for name, x in arguments.items() if x is not None}
    with pytest.raises(ValueError, match="cpu.step: "):
        cpu.window_linear_step(**arguments)
    for name, x in before.items():
        assert torch.equal(arguments[name], x), name


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_cpp_refuses_numbers_of_another_dtype(dtype):
    arguments = step_arguments()
    for name in ("key", "value", "new_key", "new_value", "left"):
        arguments[name] = arguments[name].to(dtype)
    with pytest.raises(ValueError, match="cpu.step: "):
        cpu.window_linear_step(**arguments)
    with pytest.raises(ValueError, match="cpu.row_product: "):
        cpu.row_product(torch.ones(8), torch.ones(2, 8).to(dtype))


@needs_cpp
def test_cpp_takes_what_lies_apart_where_it_is_only_read():
    """It is copied. What only has to be read need not be contiguous."""
    arguments = step_arguments()
    apart = {"new_key", "left", "phi_query", "query"}
    strided = {}
    for name, x in arguments.items():
        strided[name] = torch.stack((x, x), -1)[..., 0] if name in apart else x.clone()
    expected = cpu.window_linear_step(**arguments)
    assert torch.equal(cpu.window_linear_step(**strided), expected)


@needs_cpp
def test_a_row_in_cpp_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="cpu.row_product: "):
        cpu.row_product(torch.ones(7), torch.ones(2, 8))


@needs_cpp
@torch.no_grad()
def test_layers_past_the_room_of_their_cache_stop(llama):
    """Also where they are run without `hidden`, which checks first."""
    model = load_model(str(llama))
    cache = model.new_cache(1, 4)
    model(torch.zeros(1, 4, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="call cache.resize"):
        model.run_layers(torch.randn(1, 1, 48), 0, 3, cache)


# --- bad input, a line each ----------------------------------------------------------------------


def config_with(**change):
    """Damages config.json; ... takes a field out."""

    def damage(folder: Path) -> str:
        path = folder / "model/config.json"
        content = json.loads(path.read_text()) | change
        kept = {name: value for name, value in content.items() if value is not ...}
        path.write_text(json.dumps(kept))
        return "--prompt a"

    return damage


def weights_with(change):
    """change(weights) in place, or bytes in the place of model.safetensors."""

    def damage(folder: Path) -> str:
        path = folder / "model/model.safetensors"
        if isinstance(change, bytes):
            path.write_bytes(change)
            return "--prompt a"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)
        return "--prompt a"

    return damage


def index_with(weight_map):
    def damage(folder: Path) -> str:
        (folder / "model/model.safetensors").rename(folder / "model/part.safetensors")
        shutil.copy(folder / "model/part.safetensors", folder / "model/again.safetensors")
        content = json.dumps({"weight_map": weight_map})
        (folder / "model/model.safetensors.index.json").write_text(content)
        return "--prompt a"

    return damage


def file_with(name: str, content, flags: str):
    """A file beside the model's folder, which the flags name as {}."""

    def damage(folder: Path) -> str:
        content_bytes = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(content_bytes)
        return flags.format(folder / name)

    return damage


def changed(name: str, change):
    """change(tensor) stands for one of the weights."""

    def change_weights(weights: dict) -> None:
        weights[name] = change(weights[name])

    return weights_with(change_weights)


NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
CHOICES = {"query": "why", "choices": ["a", "b"], "gold": 1}
OPTIONS = {"context_options": ["The cat", "The dog"], "continuation": "ran", "gold": 0}
LAST = {"context": "I saw a", "continuation": "dog"}


def questions(first, second):
    content = f"{json.dumps(first)}\n{json.dumps(second)}\n"
    return file_with("bad.jsonl", content, "--tasks {}"), "bad.jsonl: line 2: give query"


def scan_file(content: str):
    return file_with("s.json", content, "--scan {} --measure kl"), "s.json: "


BAD_CONFIGS = [
    (
        {"rope_scaling": {"type": ["yarn"], "factor": 4.0}},
        "is not supported; use default, linear, llama3, yarn",
    ),
    ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' needs 'factor'"),
    ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor is '4'; give a number"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; give a number"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; give an object"),
    ({"rope_theta": "1e4"}, "rope_theta is '1e4'; give a number"),
    ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported"),
    ({"model_type": ...}, "model_type None is not supported"),
    ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope' is not supported"),
    ({"quantization_config": {}}, "quantised"),
    ({"vocab_size": ...}, "'vocab_size' is missing"),
    ({"hidden_size": None}, "'hidden_size' is missing"),
    (
        {"vocab_size": 10**12},
        "vocab_size is 1000000000000; give a whole number from 1 to 16,777,216",
    ),
    ({"hidden_size": "48"}, "hidden_size is '48'; give a whole number"),
    ({"hidden_size": 48.0}, "hidden_size is 48.0"),
    ({"hidden_size": -48}, "hidden_size is -48"),
    ({"intermediate_size": 0}, "intermediate_size is 0"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_attention_heads": 5}, "hidden_size 48 is no multiple of num_attention_heads 5"),
    ({"num_key_value_heads": 3}, "4 is no multiple of num_key_value_heads 3"),
    ({"head_dim": 7}, "head_dim is 7; rotary embeddings need an even number"),
    ({"head_dim": [12]}, "head_dim is [12]"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ({"rms_norm_eps": "1e-05"}, "rms_norm_eps is '1e-05'; give a number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rms_norm_eps": {}}, "rms_norm_eps is {}"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; give true or false"),
    ({"attention_bias": 1}, "attention_bias is 1"),
    ({"sliding_window": "16"}, "sliding_window is '16'"),
    (
        {"model_type": "mistral", "sliding_window": 16, "layer_types": ["chunked_attention"] * 3},
        "layer_types: give 3 of full_attention and sliding_attention",
    ),
    ({"eos_token_id": 704}, "eos_token_id is 704; give ids below vocab_size 704"),
    ({"eos_token_id": ["2"]}, "eos_token_id is ['2']"),
    ({"layerboost": "SSS"}, "\"layerboost\" is 'SSS'"),
    ({"layerboost": {"plan": 5}}, '"layerboost": plan is 5; give a text'),
    ({"layerboost": {"plan": "SQ"}}, "give 3 letters"),
    ({"layerboost": {"window": "64"}}, "window is '64'"),
    ({"layerboost": {"removed": "zeros"}}, "use linear or nothing"),
    ({"layerboost": {"feature_map": "cosine"}}, "use one of"),
]
BAD_WEIGHTS = [
    (weights_with(b"not safetensors"), "model.safetensors: cannot be read as safetensors"),
    (weights_with(b"\xff" * 8), "model.safetensors: cannot be read as safetensors"),
    (weights_with(lambda w: w.pop(NORM)), "1 tensors do not fit config.json: missing norm.weight"),
    (weights_with(lambda w: w.pop("lm_head.weight")), "missing lm_head.weight"),
    (weights_with(lambda w: w.update(more=torch.zeros(1))), "unexpected more"),
    (weights_with(lambda w: w.update({"\x1b]0;": torch.zeros(1)})), r"unexpected \x1b]0;"),
    (weights_with(lambda w: w.update({NORM[6:]: w[NORM].clone()})), "is stored twice"),
    (changed(NORM, lambda x: x[:3].clone()), f"{NORM} has shape (3,), not (48,)"),
    (changed(NORM, torch.Tensor.int), f"{NORM} is of type I32; quantised weights"),
    (changed(EMBEDDING, lambda x: x.to(torch.float8_e4m3fn)), f"{EMBEDDING} is of type F8_E4M3"),
    (changed(EMBEDDING, lambda x: x / 0), f"{EMBEDDING} holds NaN or infinity"),
    (changed(NORM, lambda x: x.double() * 1e300), f"{NORM} holds NaN or infinity"),
    (index_with({"a": "missing.safetensors"}), "missing.safetensors: no such file"),
    (index_with({"a": "../model/part.safetensors"}), "is no .safetensors file of this folder"),
    (index_with({"a": "/etc/part.safetensors"}), "is no .safetensors file of this folder"),
    (index_with({"a": 5}), "5 is no .safetensors file of this folder"),
    (index_with({"a": "part.safetensors", "b": "again.safetensors"}), "is stored twice"),
    (index_with({}), "has no weight_map"),
    (index_with(["part.safetensors"]), "has no weight_map"),
]
BAD_FILES = [
    (file_with("model/config.json", "[]", ""), "config.json: holds no JSON object"),
    (file_with("model/config.json", "{", ""), "config.json: not valid JSON"),
    (file_with("model/config.json", b"\xff", ""), "config.json: not valid JSON"),
    (file_with("model/config.json", "[" * 100_000, ""), "config.json: not valid JSON (maximum"),
    (file_with("model/config.json", "9" * 5000, ""), "config.json: not valid JSON (Exceeds"),
    (file_with("model/generation_config.json", "{", ""), "generation_config.json: not valid JSON"),
    (file_with("a.jsonl", '{"text": 5}', "--data {}"), "a.jsonl: line 1: not a JSON object"),
    (file_with("a.json.gz", gzip.compress(b'[{"text": "a"}]'), "--data {}"), "a.json.gz: line 1: "),
    (file_with("a.jsonl.gz", gzip.compress(b"{}")[:-9], "--data {}"), "gzip that was cut short"),
    (file_with("a.txt", "", "--data {}"), "a.txt: too little text: it has 0 tokens"),
    (file_with("a.txt", "é".encode("cp1252"), "--data {}"), "byte 0 (0xe9) is not utf-8"),
    (file_with("a.csv", "text", "--data {}"), "a.csv: give one of .txt"),
    (file_with("a.jsonl", "", "--tasks {}"), "a.jsonl: is empty"),
    (file_with("a.jsonl", "{", "--tasks {}"), "a.jsonl: line 1: give query"),
    (file_with("a.jsonl", "[" * 100_000, "--tasks {}"), "a.jsonl: line 1: give query"),
    questions(LAST, {"question": 1}),
    questions(LAST, 5),
    questions(LAST, CHOICES),
    questions(LAST, LAST | {"continuation": ""}),
    questions(LAST, LAST | {"continuation": 4}),
    questions(LAST, LAST | {"context": " "}),
    questions(CHOICES, CHOICES | {"gold": 2}),
    questions(CHOICES, CHOICES | {"gold": "1"}),
    questions(CHOICES, CHOICES | {"choices": [3, 4]}),
    questions(CHOICES, CHOICES | {"choices": ["bl\ud83d", "red"]}),
    questions(OPTIONS, OPTIONS | {"context_options": "The cat"}),
    scan_file("{}"),
    scan_file('{"identity": {"window": 16}, "layers": [{"X": 5}]}'),
    scan_file('{"identity": {"window": 16}, "layers": [{"X": {"kl": 1.0}}, {"X": {}}]}'),
    scan_file('{"identity": {"window": 16}, "layers": [{"X": {"kl": NaN}, "L": {"kl": 1}}]}'),
    scan_file('{"identity": [], "layers": [{"X": {"kl": 1.0}, "L": {"kl": 1.0}}]}'),
]
BAD_FLAGS = [
    ("--keep 3 --drop 1", "--keep 3 --drop 1: 3 layers to keep and 1 to drop are more than"),
    ("--keep 50", "--keep 50: 50 layers to keep and 0 to drop are more than the 3"),
    ("--drop 3", "--drop 3: 1 layers to keep and 3 to drop"),
    ("--plan SL", "give 3 letters"),
    ("--plan uniform:Q", "give 3 letters"),
    ("--plan=", "give 3 letters"),
    ("--feature-map cosine", "--feature-map 'cosine'"),
    ("--window 0 --feature-map none", "would see nothing"),
    ("--window -1", "--window and --sinks"),
    ("--window 1234567890123", "--window and --sinks: give numbers of tokens, 0 to 1,048,576"),
    ("--measure task", "--tasks FILE"),
    ("--tasks nowhere.jsonl", "nowhere.jsonl: No such file"),
    ("--tokens 100", "give at least as many"),
    ("--data nowhere", "--data nowhere"),
    ("--data=", "--data : no such file"),
    ("--model ./nowhere", "./nowhere: no such folder"),
    ("--scan nowhere.json", "--scan nowhere.json: no such file"),
    ("--scan=", "--scan : no such file"),
    ("--prompt=", "--prompt is empty"),
    ("--prompt " + "word" * 1000, "--prompt: has "),
    ("--device meta", "--device meta"),
    ("--encoding utf-9", "--encoding utf-9: unknown; give cp1252"),
    ("--rank 1000000000", "healing: needs "),
    ("--tokens ten", "'ten' is not a number of tokens; write 200k, 10M or 4096"),
    ("--tokens infM", "'infM' is not a number of tokens"),
    ("--tokens k", "'k' is not a number of tokens"),
    ("--tokens 0", "'0' is not a number of tokens"),
    ("--tokens=-5k", "'-5k' is not a number of tokens"),
    ("--tokens 36k --minutes 10", "--tokens and --minutes: give one of them"),
    ("--minutes 0", "--minutes: 0 is not"),
    ("--minutes inf", "--minutes: inf is not"),
    ("--sequences 0", "--sequences: 0 is not 1 or more"),
    ("--passkeys 1000000000", "--passkeys: 1000000000 is not 1 to 10000"),
    ("--keep -1", "--keep: -1 is not 0 or more"),
    ("--keep many", "--keep: invalid number value: 'many'"),
    ("--measure luck", "--measure: 'luck': give kl, recall, task"),
    ("--batch 0", "--batch: 0 is not 1 or more"),
    ("--context 1", "--context: 1 is not 2 or more"),
    ("--rank 0", "--rank: 0 is not 1 or more"),
    ("--lr nan", "--lr: nan is not"),
    ("--lr inf", "--lr: inf is not"),
    ("--window 1.5", "--window: invalid int value: '1.5'"),
    ("--prompt a --top-k -1", "--top-k: -1 is not 1 or more"),
    ("--prompt a --top-p 1.5", "--top-p: 1.5 is not"),
    ("--prompt a --temperature nan", "--temperature: nan is not"),
    ("--prompt a --max-new-tokens 1000000000000", "--max-new-tokens: 1000000000000 is not"),
    ("--dtype int8", "bfloat16"),
    ("--prompt=a --chat", "--prompt and --chat: give one of them"),
    ("--prompt=a\udcff", "--prompt: is not UTF-8"),
    ("--temperature nan", "--temperature: nan is not 0.0"),
    ("--seed 1180591620717411303424", "--seed: 1180591620717411303424 is not"),
    ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
]
BAD_INPUT = [
    *((config_with(**change), message) for change, message in BAD_CONFIGS),
    *BAD_WEIGHTS,
    *BAD_FILES,
    *((lambda folder, flags=flags: flags, message) for flags, message in BAD_FLAGS),
]


@pytest.mark.parametrize(
    "damage,message", BAD_INPUT, ids=[f"{i}: {message}" for i, (_, message) in enumerate(BAD_INPUT)]
)
def test_bad_input_is_one_line_and_exit_code_2(
    damage, message, llama, text, tmp_path, capsys, monkeypatch
):
    """The line names what is wrong; nothing is written."""
    shutil.copytree(llama, tmp_path / "model")
    flags = damage(tmp_path).split()
    try:
        code = layerboost.main(short_run(tmp_path / "model", text, tmp_path / "out", *flags))
    except SystemExit as stopped:
        code = stopped.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and message in line
    assert not list(tmp_path.glob("out/**/*")) and not list(tmp_path.glob("**/*.partial"))


@pytest.mark.parametrize("flag", ["--data", "--valid"])
def test_text_that_cannot_be_read_stops_a_run_before_any_work(
    flag, llama, text, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(layerboost, "measure_rates", None)  # a call would be a traceback
    (tmp_path / "latin.txt").write_bytes("Fa\u00e7ade.\n\n".encode("latin-1") * 9)
    flags = short_run(llama, text, tmp_path / "out", flag, str(tmp_path / "latin.txt"))
    assert layerboost.main(flags) == 2
    assert "latin.txt: byte 2 (0xe7) is not utf-8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- fuzz ----------------------------------------------------------------------------------------

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)


def places(content) -> list[tuple]:
    """(parent, key) of all that a JSON value holds."""
    found, waiting = [], [content]
    for parent in waiting:
        inside = parent.items() if isinstance(parent, dict) else enumerate(parent)
        for key, value in inside:
            found.append((parent, key))
            waiting += [value] if isinstance(value, (dict, list)) else []
    return found


@st.composite
def damaged_json(draw, text: str):
    """A JSON text of which up to three places are taken out or hold something else."""
    content = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        if found := places(content):
            parent, key = draw(st.sampled_from(found))
            if draw(st.booleans()):
                parent[key] = draw(ANY_JSON)
            else:
                del parent[key]
    return json.dumps(content).encode()


@st.composite
def damaged_bytes(draw, content: bytes, head: int):
    """Bytes of which up to four of the first `head` differ, or the end is missing."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        changed[draw(st.integers(0, head - 1))] = draw(st.integers(0, 255))
    return bytes(changed[: draw(st.integers(0, len(content)) | st.just(len(content)))])


def small_checkpoint(path: Path) -> bytes:
    """A checkpoint's metadata, and a tensor."""
    identity = dataclasses.asdict(distill.Healing(2048, context=512))
    state = {"step": 2, "curve": {"train": [], "valid": []}, "identity": identity}
    metadata = {name: json.dumps(value) for name, value in state.items()}
    tensors = {"x": torch.zeros(3)}
    save_file(tensors, path, metadata | {"hash": content_hash(tensors, metadata)})
    return path.read_bytes()


SCAN = {"identity": {"window": 8}, "of": 2, "layers": [{"X": {"kl": 1.0}, "L": {"kl": 0.5}}] * 2}
FUZZED = ("config", "layerboost", "index", "header", "weights", "checkpoint", "scan", "tasks")
FUZZED += ("tokenizer",)


def small_tokenizer(kind: str) -> str:
    """A golden tokenizer.json with few tokens, so that damage is seldom there."""
    spec = json.loads((GOLDEN / f"tokenizers/{kind}/tokenizer.json").read_text())
    model = spec["model"]
    model["merges"] = model["merges"][:4]
    tokens = {*"Hi5é", *itertools.chain(*model["merges"]), *map("".join, model["merges"])}
    tokens |= {token["content"] for token in spec["added_tokens"]}
    model["vocab"] = {token: id for token, id in model["vocab"].items() if token in tokens}
    model["byte_fallback"] = False
    return json.dumps(spec)


def encode_and_decode(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.decode(tokenizer.encode("Hi xx  5 <tool>é\x00"))


def fuzz_target(kind: str, llama: Path, folder: Path):
    """The file that is damaged, a strategy for its content, and what reads it."""
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    config, weights = folder / "config.json", folder / "model.safetensors"
    content = weights.read_bytes()
    if kind in ("config", "layerboost"):
        raw = json.loads(config.read_text())
        boosted = {"plan": "SSS", "removed": "linear", "window": 8, "healed_context": 9}
        more = {"sliding_window": 4, "use_sliding_window": True, "head_dim": 12}
        raw |= {"layerboost": boosted} if kind == "layerboost" else more
        return config, damaged_json(json.dumps(raw)), lambda: load_model(str(folder))
    if kind == "index":
        index = folder / "model.safetensors.index.json"
        names = dict.fromkeys(load_file(weights), "part.safetensors")
        weights.rename(folder / "part.safetensors")
        strategy = damaged_json(json.dumps({"metadata": {}, "weight_map": names}))
        return index, strategy, lambda: load_model(str(folder))
    if kind == "header":
        size = int.from_bytes(content[:8], "little")
        header = damaged_json(content[8 : 8 + size].decode())
        strategy = header.map(lambda x: len(x).to_bytes(8, "little") + x + content[8 + size :])
        return weights, strategy, lambda: load_model(str(folder))
    if kind == "weights":
        return weights, damaged_bytes(content, 400), lambda: load_model(str(folder))
    if kind == "checkpoint":
        path = folder / "healing.safetensors"
        content = small_checkpoint(path)
        return path, damaged_bytes(content, len(content)), lambda: distill.healed_tokens(path)
    if kind == "scan":
        path = folder / "scan.json"
        read = functools.partial(scan_module.check_scan, path, {"window": 8}, ["kl"], 2)
        return path, damaged_json(json.dumps(SCAN)), read
    if kind == "tokenizer":
        path, kinds = folder / "tokenizer.json", ("smollm", "qwen2", "llama2", "mistral")
        strategy = st.one_of([damaged_json(small_tokenizer(kind)) for kind in kinds])
        return path, strategy, lambda: encode_and_decode(folder)
    path = folder / "task.jsonl"
    items = damaged_json(json.dumps(CHOICES)) | damaged_json(json.dumps(OPTIONS))
    prompts = functools.partial(measure.task_prompts, tokenizer=load_tokenizer(str(llama)), reach=9)
    return path, items, lambda: prompts(measure.read_task(str(path)))


FUZZ = int(os.environ.get("FUZZ", 1000))  # examples of each kind under -m slow


@pytest.mark.parametrize("examples", [25, pytest.param(FUZZ, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FUZZED)
def test_a_damaged_file_is_read_or_refused_in_one_line(kind, examples, llama, tmp_path, capsys):
    """Nothing but InputError, no memory beyond that of the file and a model of this size."""
    path, strategy, read = fuzz_target(kind, llama, tmp_path)
    load_model(str(llama))  # the first one imports some of torch

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,  # which would count what other processes take
        database=None,
        derandomize=examples < 100,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(strategy)
    def run(content: bytes) -> None:
        path.write_bytes(content)
        before, start = peak(), time.process_time()
        try:
            read()
        except InputError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
        except OSError as error:
            assert error.filename
        assert peak() - before < 200 * 1024  # KiB
        assert time.process_time() - start < 5

    run()


def test_nothing_executes_what_lies_in_a_folder():
    """No pickle, no eval, no import of a folder's code."""
    forbidden = re.compile(
        r"pickle|torch\.load\b|(?<![.\w])(eval|exec|compile|__import__)\(|importlib|marshal|"
        r"trust_remote_code|yaml|os\.system|shell=True"
    )
    for path in HERE.glob("*.py"):
        if not path.name.startswith("test_"):
            code = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            assert not forbidden.findall(code), path.name


# --- a model's files -----------------------------------------------------------------------------


def test_nulls_and_other_spellings_that_do_no_harm_are_read(tmp_path):
    content = SMALL | CONFIGS["llama"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    plain = read_config(tmp_path)
    names = "num_key_value_heads head_dim quantization_config attention_bias mlp_bias layerboost"
    names += " sliding_window use_sliding_window max_window_layers layer_types rope_scaling"
    content |= dict.fromkeys(names.split()) | {"hidden_act": "swish", "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert dataclasses.replace(read_config(tmp_path), raw=plain.raw) == plain


@pytest.mark.parametrize("theta", [10**28, 2, 1e28])
def test_rope_theta_may_be_a_whole_number_of_any_size(theta, tmp_path):
    """As JSON can hold."""
    (tmp_path / "config.json").write_text(
        json.dumps(SMALL | CONFIGS["llama"] | {"rope_theta": theta})
    )
    frequencies = rotary_frequencies(read_config(tmp_path))
    D = 2 * len(frequencies)
    expected = [theta ** (-2 * j / D) for j in range(D // 2)]
    torch.testing.assert_close(frequencies, torch.tensor(expected))


def test_a_stored_head_of_a_tied_model_is_used_where_it_differs(tmp_path):
    """As transformers 5 does; one stored alone is the embedding, too."""
    folder = write_model(tmp_path / "tied", CONFIGS["llama"] | {"tie_word_embeddings": True})
    weights = load_file(folder / "model.safetensors")
    tied = load_model(str(folder))
    ids = torch.arange(9)[None]

    for stored in (
        weights | {"lm_head.weight": weights[EMBEDDING].clone()},
        {name: x for name, x in weights.items() if name != EMBEDDING}
        | {"lm_head.weight": weights[EMBEDDING]},
    ):
        save_file(stored, folder / "model.safetensors")
        model = load_model(str(folder))
        assert model.lm_head is None and torch.equal(model(ids), tied(ids))

    save_file(weights | {"lm_head.weight": -weights[EMBEDDING]}, folder / "model.safetensors")
    untied = load_model(str(folder))
    torch.testing.assert_close(untied(ids), -tied(ids))
    save_model(untied, tmp_path / "saved", folder)
    assert torch.equal(load_model(str(tmp_path / "saved"))(ids), untied(ids))


def test_a_saved_model_leaves_no_shards_of_another(llama, tmp_path):
    """model.safetensors is read where there is one, as transformers does; saving deletes the shards
    and the index that lie beside it, and no other file."""
    write_model(tmp_path, CONFIGS["llama"], shards=3)
    (tmp_path / "notes.safetensors").write_bytes(b"")
    model = load_model(str(llama))
    index = tmp_path / "model.safetensors.index.json"
    stale = index.read_bytes()
    save_model(model, tmp_path, llama)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors*")) == [
        "model.safetensors",
        "notes.safetensors",
    ]
    index.write_bytes(stale)
    assert torch.equal(load_model(str(tmp_path)).norm.weight, model.norm.weight)


def test_too_little_memory_or_disk_is_said_with_both_numbers(
    llama, text, tmp_path, monkeypatch, capsys
):
    flags = short_run(llama, text, tmp_path / "out")
    monkeypatch.setattr(machine, "available_memory", lambda device: 1000)
    assert layerboost.main(flags) == 2
    needs = f"{llama}: needs 0.0 GiB of memory at least, 0.0 are free; take a smaller model"
    assert capsys.readouterr().err == f"layerboost: {needs}\n"
    monkeypatch.undo()

    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert layerboost.main(flags) == 2
    error = capsys.readouterr().err
    assert f"--out {tmp_path}/out: needs 0.0 GiB at least, 0.0 are free on its disk" in error
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert layerboost.main(flags) == 2
    assert f"{tmp_path}/out cannot be written; give another" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_end_of_a_text_is_that_of_generation_config_where_it_has_one(tmp_path):
    content = SMALL | CONFIGS["llama"] | {"eos_token_id": 7}
    (tmp_path / "config.json").write_text(json.dumps(content))
    for content, ends in (
        ({"eos_token_id": [8, 9]}, (8, 9)),
        ({"eos_token_id": None}, (7,)),
        ({}, (7,)),
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        assert read_config(tmp_path).eos_token_ids == ends


def test_wrong_weights_are_named(tmp_path):
    folder = write_model(tmp_path, CONFIGS["llama"])
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.extra"] = torch.zeros(1)
    weights["model.norm.weight"] = torch.zeros(3)
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError) as error:
        load_model(str(folder))
    for part in (
        "unexpected model.layers.0.mlp.extra",
        "model.norm.weight has shape (3,), not (48,)",
        "missing layers.1.self_attn.q_proj.weight",
    ):
        assert part in str(error.value)

    # Its name is part of that of another one that is there, and misshapen.
    weights["model.layers.0.input_layernorm.weight"] = torch.zeros(3)
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match="missing norm.weight"):
        load_model(str(folder))


def test_files_that_hold_no_weights_say_so(tmp_path):
    folder = write_model(tmp_path, CONFIGS["llama"])
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_model(str(folder))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=".bin files are never loaded"):
        load_model(str(folder))


def test_an_attention_that_was_removed_does_not_come_back(llama, tmp_path):
    save_model(load_model(str(llama), "SLX"), tmp_path, llama)
    with pytest.raises(InputError, match="layer 2 has no attention left"):
        load_model(str(tmp_path), "SSS")


def test_a_prompt_without_tokens_is_refused(llama):
    with pytest.raises(ValueError, match="no tokens"):
        load_model(str(llama)).generate(torch.zeros(1, 0, dtype=torch.int64), 5)


def test_a_model_that_ends_the_text_at_once_says_why(llama, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    ids = load_tokenizer(str(llama)).encode("the key of")
    first = int(load_model(str(llama)).generate(ids, 1)[0, -1])
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": first}
    (folder / "config.json").write_text(json.dumps(config))

    flags = ["--model", str(folder), "--prompt", "the key of", "--dtype", "float32"]
    assert layerboost.main([*flags, "--temperature", "0"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "the key of\n"
    assert (
        "as an instruct model does without its chat format; talk to it with --chat" in printed.err
    )
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("ids", ["text", ["text"], [[1, 2], [3]], [1.5], torch.tensor(3), None])
def test_what_is_no_ids_is_told_to_encode_text_first(ids, llama):
    model = load_model(str(llama))
    with pytest.raises(TypeError, match="encode text with the tokenizer first"):
        model.generate(ids, 5)


def test_several_rows_are_no_text(llama):
    with pytest.raises(ValueError, match="give one row of them"):
        load_tokenizer(str(llama)).decode(torch.zeros(2, 3, dtype=torch.int64))


def tokenizer_with(tmp_path: Path, change, kind: str = "smollm") -> Tokenizer:
    """A golden tokenizer.json, changed in place."""
    spec = json.loads((GOLDEN / f"tokenizers/{kind}/tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    return load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "path,value,message",
    [
        ("model.type", "Unigram", "a Unigram tokenizer is not supported"),
        ("model.dropout", 0.1, "dropout 0.1 is not supported"),
        ("model.end_of_word_suffix", "</w>", "end_of_word_suffix '</w>' is not"),
        ("model.continuing_subword_prefix", "##", "continuing_subword_prefix '##' is not"),
        ("normalizer", {"type": "Lowercase"}, "a Lowercase normalizer is not supported"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre-tokenizer of the kind Whitespace"),
        ("post_processor", {"type": "BertProcessing"}, "a BertProcessing post-processor"),
        ("added_tokens.0.lstrip", True, "strips"),
        ("model", None, "damaged .*; download it again"),
        ("model.vocab", ["a"], "damaged"),
        ("model.vocab", {"a": "1"}, "damaged .*'1' is no id"),
        ("model.vocab", {"a": -1}, "damaged .*-1 is no id"),
        ("model.merges", None, "damaged"),
        ("model.merges", ["a b c"], "damaged"),
        ("model.merges", [["é", "zz"]], "damaged .*KeyError"),
        ("added_tokens", [{"id": 1}], "damaged .*'content'"),
        ("added_tokens.0.id", 1.5, "damaged .*1.5 is no id"),
        ("normalizer", {"type": "Prepend", "prepend": 1}, "damaged"),
        ("normalizer", "NFC", "damaged"),
        ("pre_tokenizer", [], None),
        ("pre_tokenizer.pretokenizers.0", {"type": "Split"}, "damaged"),
        ("post_processor", {"type": "TemplateProcessing"}, "damaged .*'single'"),
        ("decoder", [1], "damaged"),
    ],
)
def test_tokenizers_that_are_not_supported_say_so(path, value, message, tmp_path):
    def change(spec):
        *parents, last = path.split(".")
        for name in parents:
            spec = spec[int(name) if name.isdigit() else name]
        spec[int(last) if last.isdigit() else last] = value

    if message is None:
        assert tokenizer_with(tmp_path, change).encode("a b")
        return
    with pytest.raises(InputError, match=message) as caught:
        tokenizer_with(tmp_path, change)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'}: ")
    assert "\n" not in str(caught.value)


def test_a_pattern_that_is_none_says_so(tmp_path):
    def change(spec):
        split = {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": "(a"}}
        spec["pre_tokenizer"]["pretokenizers"][0] = split

    with pytest.raises(InputError, match="damaged .*download it again"):
        tokenizer_with(tmp_path, change)


def test_a_pattern_that_backtracks_without_end_is_named(tmp_path, monkeypatch):
    def change(spec):
        split = {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": "(?:a|aa)+$"}}
        spec["pre_tokenizer"]["pretokenizers"][0] = split

    monkeypatch.setattr(tokenizer, "SPLIT_SECONDS", 0.1)
    evil = tokenizer_with(tmp_path, change)
    assert evil.encode("a" * 60) and evil.encode("ab" * 5000)
    with pytest.raises(InputError, match=r"json: its pattern '\(\?:a\|aa\)\+\$' takes too long"):
        evil.encode("a" * 60 + "b")


def test_bytes_for_only_some_characters_are_refused(tmp_path):
    def change(spec):
        spec["model"]["vocab"]["lost"] = spec["model"]["vocab"].pop("<0x41>")

    with pytest.raises(InputError, match="byte_fallback without a token for every byte"):
        tokenizer_with(tmp_path, change, "llama2")


def test_a_token_beyond_the_embedding_is_named_where_a_text_has_it(llama, tmp_path):
    shutil.copy(llama / "config.json", tmp_path)
    tokenizer = tokenizer_with(tmp_path, lambda spec: spec["added_tokens"][-1].update(id=704))
    assert tokenizer.encode("as long as there is none")
    with pytest.raises(InputError, match="tokenizer.json: '<tool>' has id 704, and the model 704"):
        tokenizer.encode("here <tool> there")


def test_half_a_character_becomes_the_replacement_character(llama):
    tokenizer = load_tokenizer(str(llama))
    assert tokenizer.encode("a\udc80b") == tokenizer.encode("a\ufffdb")


def test_a_sentencepiece_model_says_what_is_supported(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match="tokenizer.model without tokenizer.json is not supported"):
        load_tokenizer(str(tmp_path))


# --- the Hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error,message",
    [
        (hub_errors.GatedRepoError, "gated"),
        (hub_errors.RepositoryNotFoundError, "neither a local path nor on the Hub"),
        (hub_errors.RevisionNotFoundError, "no revision 'v9'"),
        (hub_errors.LocalEntryNotFoundError, "cannot be reached"),
        (hub_errors.OfflineModeIsEnabled, "cannot be reached"),
        (ConnectionError, "cannot be reached"),
        (hub_errors.EntryNotFoundError, "no such file"),
        (hub_errors.HfHubHTTPError, "owner/name: "),
        (hub_errors.HTTPError, "owner/name: "),
    ],
)
def test_hub_errors_are_one_line(error, message, monkeypatch):
    def download(**arguments):
        assert arguments["repo_id"] == "owner/name" and arguments["revision"] == "v9"
        assert "*.safetensors" in arguments["allow_patterns"]
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=message) as caught:
        load_model("owner/name", revision="v9")
    assert "\n" not in str(caught.value)


def test_what_the_hub_gives_is_loaded(llama, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **arguments: str(llama))
    assert load_model("owner/name").plan == "SSS"


# --- text, questions and checkpoints -------------------------------------------------------------


def test_text_that_cannot_be_read_is_named_by_file_and_line(tmp_path):
    def read(source, flag="--data"):
        return list(read_documents(str(source), flag))

    path = tmp_path / "b.jsonl"
    for second, cause in (
        ("{", "not a JSON object"),
        ('["text"]', "not a JSON object with a `text` field .'list'"),
        ('{"text": 5}', "`text` is 5"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "4300 digits"),
        ("[" * 100_000, "recursion depth exceeded while decoding a JSON array"),
    ):
        path.write_text('{"text": "line"}\n' + second)
        with pytest.raises(InputError, match=f"--data .*b.jsonl: line 2: .*{cause}"):
            read(path)
    for name, content, cause in (
        ("d.jsonl.gz", b"not zipped", "not a sound gzip"),
        ("e.jsonl.gz", gzip.compress(b'{"text": "cut"}')[:-9], "gzip that was cut short"),
        ("f.txt", "Two caf\u00e9s".encode("cp1252"), r"byte 7 \(0xe9\) is not utf-8.*cp1252"),
        ("g.txt", b"\x81 and \xe9", "byte 0 .*--encoding latin-1"),
        ("h.jsonl", "\ufeff{}".encode("utf-16"), "byte 0 .*--encoding utf-16"),
        ("i.jsonl.gz", gzip.compress(b'{"text": ""}\n\xe9'), "byte 13 "),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"--data .*{name}: .*{cause}"):
            read(tmp_path / name)
    with pytest.raises(InputError, match="f.txt: byte .* is not utf-16.*--encoding cp1252"):
        list(read_documents(str(tmp_path / "f.txt"), encoding="utf-16"))
    with pytest.raises(InputError, match="the file one of .txt"):
        read("hub:owner/dataset/part.parquet")
    with pytest.raises(InputError, match="--valid .*nowhere: no such file"):
        read(tmp_path / "nowhere", "--valid")


def test_lines_without_text_are_skipped_and_counted(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    lines = ['\ufeff{"text": "one"}', "", '{"text": null}', '{"body": 1}', '{"text": "two"}', "  "]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert list(read_documents(str(path))) == ["one", "two"]
    (note,) = capsys.readouterr().err.splitlines()
    assert note == f"--data {path}: skipped 4 of 6 lines, which have no `text`"


def test_question_files(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text("{")
    with pytest.raises(InputError, match="task.jsonl: line 1"):
        measure.read_task(str(path))

    separated = LAST | {"context": "two\u2028lines"}  # which is no end of a line in JSON
    path.write_text(json.dumps(separated, ensure_ascii=False) + "\n", encoding="utf-8")
    assert measure.read_task(str(path)) == [separated]
    with pytest.raises(InputError, match="different names"):
        measure.read_tasks([str(path), str(path)])


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "healing.safetensors"
    path.write_bytes(b"half of it")
    with pytest.raises(InputError, match="healing.safetensors: cannot be read .*; delete it"):
        distill.find_checkpoint(path, distill.Healing(), {})


# --- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command,message",
    [
        ("decode --lengths 10", "10 tokens are too few"),
        ("serve --memory 0.00001GB", "--memory: 0.0 GiB"),
        ("decode --model=", "--model: give a folder or Hub id"),
    ],
)
def test_bad_flags_of_a_measurement_are_one_line_and_exit_code_2(
    command, message, llama, capsys, monkeypatch
):
    monkeypatch.setattr(bench, "measure_hardware", lambda *_: bench.Hardware(1e10, 1e11))
    flags = ["--model", str(llama), "--no-compile", "--dtype", "float32"]
    name, *own = command.split()
    assert bench.main([name, *flags, *own]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bench: ") and message in error


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--valid {model}", "no such file, or a folder without"),
        ("--base {model} --valid {text}", "compare a model with its own original"),
        ("--valid {text} --tasks nowhere.jsonl", "nowhere.jsonl: No such file"),
    ],
)
def test_bad_flags_of_a_report_are_one_line_and_exit_code_2(
    flags, message, llama, text, tmp_path, capsys
):
    write_model(tmp_path, CONFIGS["llama"])
    (tmp_path / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    flags = flags.format(model=llama, text=text)
    assert report.main([str(tmp_path), "--dtype", "float32", *flags.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("report: ") and message in error


# --- what an earlier run left ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--scan {scan} --window 32", "was measured with window 16, this run has 32"),
        ("--scan {scan} --measure recall", "was measured with --measure kl, this run has recall"),
        ("--out {made} --plan SSL --window 8", "was made with window = 16, not 8"),
        ("--out {made} --plan {plan} --dtype bfloat16", "was made with dtype = float32"),
        ("--out {made} --plan {plan} --compile", "was made with compile = False"),
        ("--model {made}", "is converted already"),
        ("--out {model}", "is the folder of the original"),
    ],
)
def test_what_was_made_otherwise_is_refused_with_the_difference(
    flags, message, made, llama, text, tmp_path, capsys
):
    plan = json.loads((made / "report.json").read_text())["plan"]
    flags = flags.format(made=made, scan=made / "scan.json", model=llama, plan=plan)
    same = ["--measure", "kl", "--tokens", "1k"]
    assert layerboost.main(short_run(llama, text, tmp_path / "new", *same, *flags.split())) == 2
    assert message in capsys.readouterr().err


def test_a_task_measure_belongs_to_its_question_file(llama, text, tmp_path, capsys):
    task = tmp_path / "task.jsonl"
    identity = {"task file": "another"}
    layer = {"X": {"task": 0.0}, "L": {"task": 0.0}}
    scan = {"identity": identity, "layers": [layer] * 3}
    task.write_text(json.dumps(CHOICES))
    (tmp_path / "scan.json").write_text(json.dumps(scan))
    with pytest.raises(InputError, match="was measured with task file another, this run has"):
        made_for = {"task file": hash_files(str(task))}
        scan_module.check_scan(tmp_path / "scan.json", made_for, ["task"], 3)


@pytest.mark.parametrize("column", [("window 16", -0.5), ("window x", 0.5), ("window -16", 0.5)])
def test_a_scan_with_a_window_that_cannot_be_is_refused(column, tmp_path):
    path = tmp_path / "scan.json"
    layers = [{"X": {"kl": 1.0}, "L": {"kl": 0.5, "window 16": 0.5}}]
    path.write_text(json.dumps({"identity": {"window": 8}, "layers": layers}))
    assert planner.windows_of(scan_module.read_scan(path)["layers"]) == [16]
    layers[0]["L"] = {"kl": 0.5} | dict([column])
    path.write_text(json.dumps({"identity": {"window": 8}, "layers": layers}))
    with pytest.raises(InputError, match="is no scan file, or damaged"):
        scan_module.read_scan(path)


def test_a_scan_with_a_layer_between_that_is_not_whole_is_refused(tmp_path):
    path = tmp_path / "scan.json"
    layers = [{"X": {"kl": 1.0}}, {"X": {"kl": 1.0}, "L": {"kl": 0.5}}]
    path.write_text(json.dumps({"identity": {"window": 8}, "layers": layers}))
    with pytest.raises(InputError, match="is no scan file, or damaged"):
        scan_module.read_scan(path)


def test_a_scan_made_on_other_text_is_used_and_the_difference_stays_known(tmp_path, capsys):
    path = tmp_path / "scan.json"
    layers = [{"X": {"kl": 1.0}, "L": {"kl": 0.5}}, {"X": {"kl": 2.0}}]
    path.write_text(json.dumps({"identity": {"data": "one", "window": 8}, "layers": layers}))
    for data, said in (("one", 0), ("other", 1)):
        identity = {"data": data, "window": 8}
        assert scan_module.check_scan(path, identity, ["kl"], 2) == layers
        assert capsys.readouterr().out.count("was measured on other text") == said
    assert identity["data"] == "several texts"  # what the rest of it is written with


@pytest.mark.parametrize("weighed,said", [(64, 0), (128, 1), ("128", 0), (None, 0)])
def test_windows_weighed_for_other_texts_are_used_and_told(weighed, said, tmp_path, capsys):
    path = tmp_path / "scan.json"
    layers = [{"X": {"kl": 1.0}, "L": {"kl": 0.5, "window 16": 0.5}}]
    path.write_text(json.dumps({"identity": {"served": weighed}, "layers": layers}))
    assert scan_module.check_scan(path, {"served": 64}, ["kl"], 1) == layers
    assert (
        capsys.readouterr().out.count("weighed windows for texts of 128 tokens, not of 64") == said
    )


def test_part_of_a_scan_is_no_scan(made, llama, text, tmp_path, capsys):
    whole = json.loads((made / "scan.json").read_text())
    part = tmp_path / "part.json"
    for count, message in ((1, "holds 1 of 3 layers"), (0, "part.json: is no scan file")):
        part.write_text(json.dumps(whole | {"layers": whole["layers"][:count]}))
        flags = ["--measure", "kl", "--scan", str(part)]
        assert layerboost.main(short_run(llama, text, tmp_path / "new", *flags)) == 2
        assert message in capsys.readouterr().err


def test_a_scan_of_another_budget_serves_and_is_not_gone_on_with(made):
    """Layers measured on longer prompts do not compare with those measured on shorter ones."""
    identity = json.loads((made / "scan.json").read_text())["identity"] | {"sizes": "more"}
    assert len(scan_module.check_scan(made / "scan.json", identity, ["kl"], 3)) == 3
    with pytest.raises(InputError, match="was measured with sizes 1 x 512 tokens, .* has more"):
        scan_module.check_scan(made / "scan.json", identity, ["kl"], 4)


# --- runs that stop ------------------------------------------------------------------------------


def test_a_scan_that_found_no_damage_is_drawn():
    layers = [{tier: {"task": 0.0} for tier in "XL"}] * 3
    assert planner.chart(layers, ["task"], "SLX").count("0.0000") == 6


def test_a_broken_model_stops_the_scan(llama, text, tmp_path, capsys):
    model = load_model(str(llama))
    model.layers[1].mlp.down_proj.weight.fill_(3e38)
    save_model(model, tmp_path / "broken", llama)
    flags = short_run(tmp_path / "broken", text, tmp_path / "out", "--measure", "kl")
    assert layerboost.main(flags) == 1
    message = "the damage of layer 0 as X is not a finite number; kept: nothing yet"
    assert message in capsys.readouterr().err


def run_until(monkeypatch, module, name: str, count: int, flags: list[str]) -> None:
    """Runs layerboost.py, stopped by Ctrl-C in the count-th call of a function."""
    function, calls = getattr(module, name), itertools.count(1)

    def counting(*arguments):
        if next(calls) == count:
            raise KeyboardInterrupt
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, counting)
        assert layerboost.main(flags) == 130


def test_ctrl_c_says_what_is_kept_and_nothing_is_done_again(
    llama, text, tmp_path, capsys, monkeypatch
):
    flags = short_run(llama, text, tmp_path, "--measure", "kl", "--tokens", "1k")
    run_until(monkeypatch, layerboost, "load_tokenizer", 1, flags)
    assert capsys.readouterr().err == "layerboost: stopped; kept: nothing yet\n"
    for name in ("scan.json", "healing.safetensors", "evaluation.json"):  # damaged
        (tmp_path / name).write_text("{")
    run_until(monkeypatch, layerboost, "load_tokenizer", 1, flags)
    assert capsys.readouterr().err == "layerboost: stopped; kept: nothing yet\n"
    for name in ("scan.json", "healing.safetensors", "evaluation.json"):
        (tmp_path / name).unlink()

    run_until(monkeypatch, scan_module, "write_json", 4, flags)  # the fourth trial is lost
    scanned = f"scan of 1.5 of 3 layers in {tmp_path}/scan.json"
    assert capsys.readouterr().err == f"layerboost: stopped; kept: {scanned}\n"
    before = json.loads((tmp_path / "scan.json").read_text())["layers"]

    run_until(monkeypatch, measure, "passkey_recall", 2, flags)
    printed = capsys.readouterr()
    assert f"resumed at layer 1 of 3, from {tmp_path}/scan.json" in printed.out
    assert f"healing of 512 of 512 tokens in {tmp_path}/healing.safetensors" in printed.err
    evaluated = "text of base, passkeys of base, text of converted"
    assert f"{evaluated} in {tmp_path}/evaluation.json" in printed.err
    layers = json.loads((tmp_path / "scan.json").read_text())["layers"]
    assert layers[0] == before[0] and layers[1]["X"] == before[1]["X"] and len(layers) == 3

    recall = measure.passkey_recall
    asked = []
    monkeypatch.setattr(measure, "passkey_recall", lambda *a: asked.append(a[0].plan) or recall(*a))
    monkeypatch.delattr(scan_module, "scan")
    assert layerboost.main(flags) == 0
    plan = json.loads((tmp_path / "report.json").read_text())["plan"]
    assert asked == [plan, plan]  # of the converted and the healed one alone
    assert "resumed at 512 of 512 tokens" in capsys.readouterr().out


def test_a_full_disk_is_one_line_at_each_write_and_loses_nothing(
    made, llama, text, tmp_path, capsys, monkeypatch
):
    flags = ["--measure", "kl", "--tokens", "1k"]
    replace = os.replace
    left = [0]

    def full(source, target):
        left[0] -= 1
        if str(source).endswith(".partial") and left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    out = tmp_path / "out"
    named = set()
    for left[0] in range(0, 30, 6):  # so many files fit
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            code = layerboost.main(short_run(llama, text, out, *flags))
        if code == 0:
            break
        line = capsys.readouterr().err.splitlines()[-1]
        assert code == 2 and line.endswith(f": {os.strerror(errno.ENOSPC)}")
        named.add(Path(line.split(": ")[1]).name)
        assert not list(tmp_path.glob("**/*.partial"))
    assert code == 0 and named >= {"scan.json", "healing.safetensors"}
    for name in ("model.safetensors", "scan.json", "config.json"):
        assert (out / name).read_bytes() == (made / name).read_bytes(), name


def test_a_run_that_is_killed_ends_with_the_same_files(made, llama, text, tmp_path):
    """SIGKILL at a random moment of scan or healing. results/faults.py does that many times."""
    out = tmp_path / "out"
    flags = short_run(llama, text, out, "--measure", "kl", "--tokens", "1k")
    code = f"import distill, layerboost\ndistill.CHECKPOINT_SECONDS = 0\nlayerboost.main({flags})"
    with subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None and not (out / "scan.json").exists():
            time.sleep(0.005)
        time.sleep(random.Random(0).uniform(0, 0.5))
        run.kill()
    assert run.returncode == -signal.SIGKILL

    assert layerboost.main(flags) == 0
    for name in ("model.safetensors", "scan.json", "config.json"):
        assert (out / name).read_bytes() == (made / name).read_bytes(), name


def test_two_processes_do_not_share_a_folder(tmp_path, capsys):
    """The lock of one that is killed goes with it."""
    out = tmp_path / "out"
    code = f"import machine, pathlib; machine.hold_folder(pathlib.Path({str(out)!r})); print(1)\n"
    holds = [sys.executable, "-c", code + "import time; time.sleep(60)"]
    with subprocess.Popen(holds, cwd=HERE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "1\n"
        assert terminal.run_program("layerboost", lambda: machine.hold_folder(out)) == 2
        other.kill()
    assert f"--out {out}: another process works there" in capsys.readouterr().err

    (out / "scan.json.partial").write_text("half")
    assert terminal.run_program("layerboost", lambda: machine.hold_folder(out)) == 0
    assert out.exists() and not list(out.iterdir())  # it was there before
    new = tmp_path / "new"
    assert terminal.run_program("layerboost", lambda: machine.hold_folder(new)) == 0
    assert not new.exists()  # nothing was written


def test_output_that_nobody_reads_ends_the_run_without_a_word(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert terminal.run_program("layerboost", lambda: terminal.say("a line")) == 141
        assert terminal.run_program("report", lambda: print("a line")) == 0  # goes nowhere
    assert not capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")
def test_output_onto_a_full_disk_is_one_line(monkeypatch, capsys):
    def bad_input():
        raise InputError("wrong")

    for name, run in (("stdout", lambda: print("a line")), ("stderr", bad_input)):
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, name, full)
            assert terminal.run_program("layerboost", run) == 2
    assert capsys.readouterr().err == f"layerboost: --out: {os.strerror(errno.ENOSPC)}\n"


def test_a_closed_terminal_ends_the_run_without_a_word(monkeypatch):
    """stderr whose reader has left, and streams that were closed before the start."""

    def bad_input():
        raise InputError("wrong")

    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert terminal.run_program("layerboost", bad_input) == 2
        assert terminal.run_program("layerboost", lambda: print("a", file=sys.stderr)) in (0, 141)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert terminal.run_program("layerboost", lambda: print("a")) == 0
    assert terminal.run_program("layerboost", bad_input) == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_a_terminal_cannot_show_is_a_question_mark(encoding, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", shown)
    assert terminal.run_program("layerboost", lambda: terminal.say("\u2588 \udcff \u0431 a")) == 0
    assert shown.buffer.getvalue() == b"? ? ? a\n"


def test_what_a_model_writes_cannot_steer_the_terminal(llama, monkeypatch, capsys):
    """Nor what is typed: control characters are shown. Line breaks and tabs are text."""
    title = "a\x1b]0;title\x07\x9b2J\r\b\tb\n\x7f"
    safe = "a\\x1b]0;title\\x07\\x9b2J\\x0d\\x08\tb\n\\x7f"
    assert terminal.visible(title) == safe
    model, tokenizer = load_model(str(llama)), load_tokenizer(str(llama))
    ids = tokenizer.encode(title)
    monkeypatch.setattr(model, "stream", lambda *given: iter(torch.tensor(ids)[:, None]))
    args = layerboost.parse_arguments(["--prompt", title])
    chat.generate_text(model, tokenizer, args)
    assert capsys.readouterr().out == safe + safe + "\n"

    monkeypatch.setattr(model, "generate", lambda *given, **sampling: torch.tensor([ids]))
    shown = report.continuation(model, tokenizer, torch.tensor(ids)[None])
    assert "\x1b" not in shown and "title" in shown


@pytest.mark.parametrize(
    "template,message",
    [
        (None, "has no chat template (chat_template.jinja, or chat_template in tokenizer_config"),
        ("{{ raise_exception('no\\nsystem\x1b[2J') }}", "template fails: no system\\x1b[2J"),
        ("{% for x %}", "chat_template.jinja: the chat template fails: expected token"),
        ("{{ 1 / 0 }}", "template fails: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "template fails: access to attribute '__class__'"),
        ("{{ x.y.z }}", "template fails: 'x' is undefined"),
    ],
)
def test_a_chat_without_a_sound_template_is_one_line(
    template, message, llama, tmp_path, monkeypatch, capsys
):
    folder = shutil.copytree(llama, tmp_path / "model")
    if template:
        (folder / "chat_template.jinja").write_text(template)
    monkeypatch.setattr("builtins.input", lambda prompt: "hello")
    assert layerboost.main(["--model", str(folder), "--chat", "--dtype", "float32"]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_chat_beyond_the_positions_of_its_model_says_so(llama, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    asked = iter(["ab " * 600])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked, None) or exit_chat())
    assert layerboost.main(["--model", str(folder), "--chat", "--dtype", "float32"]) == 0
    assert "the model has 512 positions; try /reset" in capsys.readouterr().out


def exit_chat():
    raise EOFError


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda path: path.write_bytes(b"text"), "cannot be read as safetensors"),
        (lambda path: save_file({"a": torch.ones(1)}, path), "is no adapter of this program"),
        (lambda path: save_file({"a": torch.ones(1)}, path, {"layerboost": "{"}), "not valid JSON"),
        (lambda path: path.unlink(), "cannot be read as safetensors"),
    ],
)
def test_a_file_that_is_no_adapter_is_one_line(change, message, llama, tmp_path, capsys):
    path = tmp_path / "adapter.safetensors"
    path.touch()
    change(path)
    flags = ["--model", str(llama), "--adapter", str(path), "--out", str(tmp_path / "out")]
    assert layerboost.main(flags) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_bar_moves_within_a_step_and_is_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0)
    with terminal.progress(total=2, desc="a step"):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 and all(line.startswith("a step:   0%|") for line in lines)

    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    with terminal.progress(total=2, desc="a step"):
        time.sleep(0.2)
    bars = screen.getvalue()
    assert bars.count("a step:   0%|") > 2 and "\n" not in bars and bars.endswith(" \r")


def test_the_threads_of_bars_end_before_python_does():
    lines = (
        "import atexit, threading",
        "atexit.register(lambda: print([t.name for t in threading.enumerate()]))",
        "import terminal",
        "bar = terminal.progress(total=2)",
        "print(sum(t.name == 'bar' for t in threading.enumerate()))",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["1", "['MainThread']"]


def test_a_folder_that_cannot_be_written_is_named(llama, text, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = short_run(llama, text, tmp_path / "file" / "out", "--plan", "SLX")
    assert layerboost.main(flags) == 2
    assert f"{tmp_path}/file/out: Not a directory" in capsys.readouterr().err


def test_too_little_text_is_said(llama, tmp_path, capsys):
    """Of the flag that was given, with what there is and what is needed."""
    mine, other = tmp_path / "a.txt", tmp_path / "b.txt"
    mine.write_text("a few words")
    other.write_text("many words " * 1000)
    for data, valid, flag, needed in (
        (mine, None, f"--data {mine}", "1,032"),
        (mine, other, f"--data {mine}", "520"),
        (other, mine, f"--valid {mine}", "520"),
    ):
        flags = ["--model", str(llama), "--data", str(data), "--out", str(tmp_path / "out")]
        flags += ["--valid", str(valid)] if valid else []
        assert layerboost.main([*flags, "--dtype", "float32"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{flag}: too little text: it has 8 tokens, {needed} are needed" in error
