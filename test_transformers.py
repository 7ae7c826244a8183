"""What comes out runs in Hugging Face transformers as it does here. Skipped where transformers is
not installed; `.ci/run` runs it in an environment that has it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": tempfile.mkdtemp()}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error"}
transformers = pytest.importorskip("transformers")

from conftest import boosted, write_model  # noqa: E402
from golden.make_golden import CONFIGS  # noqa: E402
from model import load_model, load_tokenizer, save_model  # noqa: E402

FAMILIES = ("llama", "llama3-scaled", "llama-linear-new-spelling", "mistral", "qwen2")
FAMILIES += ("qwen2-sliding", "qwen3")
SETTINGS = [{"feature_map": name} for name in ("elu", "relu", "favor", "none")]
SETTINGS += [{"window": 0}, {"sinks": 0}, {"window": 0, "sinks": 0}, {"window": 100}]
SETTINGS += [{"feature_map": "none", "sinks": 0}, {"removed": "linear"}, {"healed_context": 20}]
CASES = [(family, plan, {}) for family in FAMILIES for plan in ("SLX", "LSL")]
CASES += [("qwen3", "LXS", settings) for settings in SETTINGS]
CASES += [("llama", "LXL", {}), ("llama", "XLL", {"removed": "linear"})]


def both(folder: Path, family="llama", plan="SLX", healed_context=None, **settings):
    """A model of ours, and what transformers makes of the folder that it is saved in."""
    source = write_model(folder / "source", CONFIGS[family])
    ours = boosted(source, plan, **settings)
    ours.config.healed_context = healed_context
    ours.config.eos_token_ids = ()
    if settings.get("removed") == "linear":
        for layer in ours.layers:
            if hasattr(layer.self_attn, "map"):
                layer.self_attn.map.weight += 0.05 * torch.randn_like(layer.self_attn.map.weight)
    save_model(ours, folder / "out", source)
    return ours, load(folder / "out")


def load(folder: Path, **arguments):
    arguments = {"dtype": torch.float32, "trust_remote_code": True} | arguments
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()
    model.generation_config.eos_token_id = None
    return model


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(3, 96, shape)


def padded_left(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and attention_mask [B, longest] of prompts of these lengths."""
    ids, longest = ids_of(len(lengths), max(lengths)), max(lengths)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


@pytest.mark.parametrize("family, plan, settings", CASES)
@torch.no_grad()
def test_logits_equal_ours_at_once_and_in_any_split(tmp_path, family, plan, settings):
    ours, theirs = both(tmp_path, family, plan, **settings)
    ids = ids_of(2, 45)
    expected = ours(ids)
    torch.testing.assert_close(theirs(ids).logits, expected, atol=2e-4, rtol=0)

    for first in (7, 8, 9):  # around the window
        cache, parts = None, []
        for part in ids.split([first, 1, 9, *[1] * 15, 20 - first], dim=1):
            output = theirs(part, past_key_values=cache)
            cache = output.past_key_values
            parts.append(output.logits)
        torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("family, plan, settings", CASES)
@torch.no_grad()
def test_generation_equals_ours_with_padding_longer_than_the_window(
    tmp_path, family, plan, settings
):
    ours, theirs = both(tmp_path, family, plan, **settings)
    ids, mask = padded_left([1, 30, 12])
    new = 128 if plan == "SLX" else 40
    output = theirs.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    for row, real, out in zip(ids, mask.bool(), output, strict=True):
        assert torch.equal(out[-new:], ours.generate(row[real], new)[0, -new:])


@torch.no_grad()
def test_padding_on_either_side_and_in_prefills_changes_nothing(tmp_path):
    ours, theirs = both(tmp_path, plan="LSL")
    ids, left = padded_left([3, 40, 14])
    for mask in (left, left.flip(1)):
        logits = theirs(ids, attention_mask=mask).logits
        for row, real, got in zip(ids, mask.bool(), logits, strict=True):
            torch.testing.assert_close(got[real], ours(row[real][None])[0], atol=2e-4, rtol=0)

    logits = theirs(ids, attention_mask=left).logits[:, -1]
    cache = None
    for end in (5, 20, 21, 40):  # of a row, the first prefills are padding alone
        start = 0 if cache is None else cache.get_seq_length()
        output = theirs(ids[:, start:end], attention_mask=left[:, :end], past_key_values=cache)
        cache = output.past_key_values
    torch.testing.assert_close(output.logits[:, -1], logits, atol=2e-4, rtol=0)


@torch.no_grad()
def test_beams_equal_those_without_a_cache_and_what_takes_tokens_back_is_refused(tmp_path):
    _, theirs = both(tmp_path, plan="XLS")
    ids, mask = padded_left([20, 4])
    beams = {"attention_mask": mask, "max_new_tokens": 20, "num_beams": 3, "do_sample": False}
    expected = theirs.generate(ids, **beams, use_cache=False)
    assert torch.equal(theirs.generate(ids, **beams), expected)

    one = ids[:1]
    sampled = theirs.generate(one, max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert sampled.shape == (3, one.shape[1] + 5)
    for refused in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": theirs}):
        with pytest.raises(ValueError, match="assisted generation is not supported"):
            theirs.generate(one, max_new_tokens=10, **refused)
    with pytest.raises(ValueError, match="not with a StaticCache"):
        cache = transformers.StaticCache(config=theirs.config, max_cache_len=50)
        theirs(one, past_key_values=cache)


@torch.no_grad()
def test_saved_again_by_transformers_it_loads_in_both(tmp_path):
    ours, theirs = both(tmp_path, "qwen3", "SLX", healed_context=20, removed="linear")
    theirs.save_pretrained(tmp_path / "again")
    ids = ids_of(2, 50)
    assert torch.equal(load(tmp_path / "again")(ids).logits, theirs(ids).logits)
    assert torch.equal(load_model(str(tmp_path / "again"))(ids), ours(ids))


@torch.no_grad()
def test_in_bf16_the_tails_stay_float32(tmp_path):
    ours, theirs = both(tmp_path, plan="LLS")
    ids = ids_of(2, 50)
    for model in (load(tmp_path / "out", dtype=torch.bfloat16), theirs.bfloat16()):
        attention = model.model.layers[0].self_attn
        assert attention.q_proj.weight.dtype == torch.bfloat16
        for name, parameter in attention.named_parameters(recurse=False):
            expected = ours.get_parameter(f"layers.0.self_attn.{name}")
            assert torch.equal(parameter, expected), name

        output = model(ids)
        tensors = output.past_key_values.layers[0].tensors
        assert tensors["key"].dtype == torch.bfloat16
        assert tensors["state"].dtype == tensors["norm"].dtype == torch.float32
        error = (output.logits.float().log_softmax(-1) - ours(ids).log_softmax(-1)).abs().mean()
        assert error < 0.05


def test_it_trains_with_checkpointing_and_peft(tmp_path):
    _, model = both(tmp_path, plan="LSX", removed="linear")
    ids = ids_of(2, 40)
    model(ids, labels=ids).loss.backward()
    names = ("query_map", "key_map", "tail_logit", "q_proj.weight")
    layer = model.model.layers[0].self_attn
    expected = [layer.get_parameter(name).grad.clone() for name in names]
    assert all(gradient.abs().sum() > 0 for gradient in expected)

    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()(ids, labels=ids).loss.backward()
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(layer.get_parameter(name).grad, gradient)

    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    adapted(input_ids=ids, labels=ids).loss.backward()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(gradients) >= 2 * 3 * 3 and all(g is not None for g in gradients.values())


def test_the_folder_stands_alone(llama, tmp_path):
    """Away from this repository, by a pipeline, on the devices that accelerate chooses."""
    model = boosted(llama, "SLX")
    model.config.eos_token_ids = ()
    save_model(model, tmp_path / "out", llama)
    script = """
import transformers
pipe = transformers.pipeline(
    "text-generation", "out", trust_remote_code=True, device_map="auto", dtype="float32")
pipe.tokenizer.pad_token_id, pipe.tokenizer.padding_side = 0, "left"
texts = ["a b", "the key of the model"]
both = pipe(texts, batch_size=2, max_new_tokens=6, do_sample=False)
print([answers[0]["generated_text"] for answers in both])
"""
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tokenizer = load_tokenizer(str(llama))
    texts = ["a b", "the key of the model"]
    answers = [model.generate(tokenizer.encode(text), 6)[0] for text in texts]
    assert run.stdout.strip() == str([tokenizer.decode(ids) for ids in answers])
