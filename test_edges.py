"""Bad input and odd machines: no compiler, tensors that C++ must not read, files that are damaged
or of a kind that is not supported, the Hub out of reach, flags that do not fit together. Each ends
in one line that names the file or flag and the fix, or in a slower way to the same result.
"""

import functools
import gzip
import io
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

import bench
import cpu
import distill
import layerboost
import machine
import measure
import report
import scan as scan_module
from config import read_config
from conftest import GOLDEN, boosted, needs_cpp, short_run, write_model
from golden.make_golden import CONFIGS, SMALL
from hub import InputError, read_documents
from kernels import Past
from model import load_model, load_tokenizer, save_model
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


def test_without_a_compiler_torch_runs_and_one_line_says_so(tmp_path):
    code = "from model import *; print(load_model('tiny').generate(torch.tensor([[5, 6]]), 3))"
    run = run_python(code, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert run.returncode == 0 and run.stdout.startswith("tensor([[5, 6, ")
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
def test_a_prompt_and_a_row_in_cpp_refuse_what_does_not_fit():
    B, H, G, T, D, window = 2, 4, 2, 5, 12, 3
    query = torch.randn(B, H, T, D)
    key = torch.randn(B, G, window + T, D)
    sinks = torch.zeros(B, G, 0, D)
    state, norm = torch.zeros(B, G, 0, D), torch.zeros(B, G, 0)

    def run(query, key, value, start):
        past = Past(start, sinks, sinks, state, norm)
        return cpu.window_linear_attention(query, key, value, None, None, None, past, window)

    start = torch.zeros(B, dtype=torch.int64)
    assert run(query, key, key, start).isfinite().all()
    for wrong in (
        (query, key[:, :, : T - 1], key[:, :, : T - 1], start),  # fewer keys than queries
        (query, key, key[:1], start),
        (query[..., :8], key, key, start),
        (query, key, key, start - 1),
        (query, key, key, start.int()),
    ):
        with pytest.raises(ValueError, match="cpu.chunk: "):
            run(*wrong)
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


# --- a model's files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,message",
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": ["yarn"], "factor": 4.0}}, "rope type .* is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn' needs 'factor'"),
        ({"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor is '4'; give a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0; give a number"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; give an object"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'; give a number"),
        ({"rope_scaling": {"type": "linear"}}, "needs 'factor'"),
        ({"quantization_config": {}}, "quantised"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_configs_that_are_not_supported_say_so(change, message, tmp_path):
    content = SMALL | CONFIGS["llama"] | change
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "content,message",
    [("[]", "no JSON object"), ("{", "not valid JSON"), ('{"model_type": "llama"}', "missing")],
)
def test_damaged_configs_say_so(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=f"config.json: .*{message}"):
        read_config(tmp_path)


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
    with pytest.raises(InputError, match="never .bin files"):
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
    assert "as an instruct model does without its chat format" in printed.err
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


CHOICES = {"query": "why", "choices": ["a", "b"], "gold": 1}
OPTIONS = {"context_options": ["The cat", "The dog"], "continuation": "ran", "gold": 0}
LAST = {"context": "I saw a", "continuation": "dog"}


@pytest.mark.parametrize(
    "first,second",
    [
        (LAST, {"question": 1}),
        (LAST, 5),
        (LAST, CHOICES),
        (LAST, LAST | {"continuation": ""}),
        (LAST, LAST | {"continuation": 4}),
        (LAST, LAST | {"context": " "}),
        (CHOICES, CHOICES | {"gold": 2}),
        (CHOICES, CHOICES | {"gold": "1"}),
        (CHOICES, CHOICES | {"choices": [3, 4]}),
        (OPTIONS, OPTIONS | {"context_options": "The cat"}),
    ],
)
def test_a_question_that_is_in_no_format_is_named_by_its_line(first, second, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    with pytest.raises(InputError, match="bad.jsonl: line 2"):
        measure.read_task(str(path))


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
        distill.find_checkpoint([path], distill.Healing(), {})


# --- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--keep 3 --drop 1", "--keep 3 --drop 1: 3 layers to keep and 1 to drop are more than"),
        ("--keep 50", "layerboost: --keep 50: 50 layers to keep and 0 to drop are more than the 3"),
        ("--drop 3", "layerboost: --drop 3: 1 layers to keep and 3 to drop"),
        ("--plan SL", "give 3 letters"),
        ("--plan uniform:Q", "give 3 letters"),
        ("--feature-map cosine", "--feature-map 'cosine'"),
        ("--window 0 --feature-map none", "would see nothing"),
        ("--window -1", "--window and --sinks"),
        ("--measure task", "--tasks FILE"),
        ("--tasks nowhere.jsonl", "nowhere.jsonl: No such file"),
        (f"--tasks {os.devnull}", "is empty"),
        ("--tokens 100", "give at least as many"),
        ("--data nowhere", "--data nowhere"),
        ("--model ./nowhere", "./nowhere: no such folder"),
        ("--scan nowhere.json", "--scan nowhere.json"),
        ("--prompt=", "--prompt is empty"),
        ("--device meta", "--device meta"),
        ("--encoding utf-9", "--encoding utf-9: unknown; give cp1252"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(flags, message, llama, text, tmp_path, capsys):
    assert layerboost.main(short_run(llama, text, tmp_path / "out", *flags.split())) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("layerboost: ") and message in error


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--tokens ten", "'ten' is not a number of tokens; write 200k, 10M or 4096"),
        ("--tokens infM", "'infM' is not a number of tokens"),
        ("--tokens k", "'k' is not a number of tokens"),
        ("--tokens 36k --minutes 10", "--tokens and --minutes: give one of them"),
        ("--minutes 0", "--minutes: 0 is not"),
        ("--sequences 0", "--sequences: 0 is not 1 or more"),
        ("--keep -1", "--keep: -1 is not 0 or more"),
        ("--measure luck", "--measure: 'luck': give kl, recall, task"),
        ("--batch 0", "--batch: 0 is not 1 or more"),
        ("--context 1", "--context: 1 is not 2 or more"),
        ("--rank 0", "--rank: 0 is not 1 or more"),
        ("--lr nan", "--lr: nan is not"),
        ("--prompt a --temperature 1 --top-k -1", "--top-k: -1 is not 1 or more"),
        ("--dtype int8", "bfloat16"),
        ("--planner luck", "paper"),
    ],
)
def test_flags_that_are_no_values_show_what_is_one(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        layerboost.main(flags.split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err


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


@pytest.fixture(scope="module")
def made(llama, text, tmp_path_factory) -> Path:
    """The folder of a run with window 16."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert layerboost.main(short_run(llama, text, out, "--measure", "kl", "--tokens", "1k")) == 0
    return out


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
        made_for = {"task file": scan_module.hash_file(str(task))}
        scan_module.check_scan(tmp_path / "scan.json", made_for, ["task"], 3)


def test_a_scan_made_on_other_text_is_used_and_the_difference_stays_known(tmp_path, capsys):
    path = tmp_path / "scan.json"
    layers = [{"X": {"kl": 1.0}, "L": {"kl": 0.5}}, {"X": {"kl": 2.0}}]
    path.write_text(json.dumps({"identity": {"data": "one", "window": 8}, "layers": layers}))
    for data, said in (("one", 0), ("other", 1)):
        identity = {"data": data, "window": 8}
        assert scan_module.check_scan(path, identity, ["kl"], 2) == layers
        assert capsys.readouterr().out.count("was measured on other text") == said
    assert identity["data"] == "several texts"  # what the rest of it is written with


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
    assert scan_module.chart(layers, ["task"], "SLX").count("0.0000") == 6


def test_a_broken_model_stops_the_scan(llama, text, tmp_path, capsys):
    model = load_model(str(llama))
    model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
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


def test_output_that_nobody_reads_ends_the_run_without_a_word(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert machine.run_program("layerboost", lambda: machine.say("a line")) == 141
        assert machine.run_program("report", lambda: print("a line")) == 0  # goes nowhere
    assert not capsys.readouterr().err


def test_a_bar_moves_within_a_step_and_is_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(machine, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(machine, "LINE_SECONDS", 0)
    with machine.progress(total=2, desc="a step"):
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 2 and all(line.startswith("a step:   0%|") for line in lines)

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with machine.progress(total=2, desc="a step"):
        time.sleep(0.2)
    bars = terminal.getvalue()
    assert bars.count("a step:   0%|") > 2 and "\n" not in bars and bars.endswith(" \r")


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


def test_help_does_not_wait_for_what_it_does_not_need():
    """torch's compiler takes three seconds to import, the Hub a third of one."""
    code = "import sys, layerboost; print({'torch._dynamo', 'huggingface_hub'} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert run.stdout == "set()\n", run.stderr
