"""Writes the golden files of the tests with Hugging Face transformers and tokenizers, in an
environment of its own:

    pip install torch==2.13.0 transformers safetensors
    python golden/make_golden.py [SMOLLM2_DIR VALID_JSONL_GZ]

logits.safetensors: float32 logits of small models of every family, whose weights are a formula
(`formula_weight`), so that only the logits are stored. tokenizers/KIND/tokenizer.json: small
BPE tokenizers, four byte-level, two of the SentencePiece kind, with ids.json: what Hugging Face's
tokenizer makes of every line of `NASTY`. They learn from the text of this file, so another form of
it makes others. chat.json: what transformers' apply_chat_template makes of conversations by three
templates, on these tokenizers. With the two arguments also smollm2.safetensors: logits of the real
model at some positions, and smollm2.json: a digest of its ids over the whole validation text.
"""

import gzip
import hashlib
import json
import sys
import tempfile
import zlib
from pathlib import Path

import torch

HERE = Path(__file__).parent

# --- models ------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "rope_theta": 1000000.0,
    "sliding_window": 16,
}
CONFIGS = {
    "llama": LLAMA | {"rope_theta": 10000.0},
    "llama3-scaled": LLAMA
    | {
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": True,
    },
    "llama-linear-new-spelling": LLAMA
    | {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0},
    },
    "llama-yarn-new-spelling": LLAMA
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 4,
            "beta_slow": 0.5,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        }
    },
    "mistral": {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "rope_theta": 10000.0,
        "sliding_window": 16,
        "head_dim": 16,
    },
    "qwen2": QWEN2 | {"use_sliding_window": False},
    "qwen2-sliding": QWEN2
    | {"use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen2-yarn": QWEN2
    | {
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},  # the other one counts
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "qwen3": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "rope_theta": 1000000.0,
        "head_dim": 20,
        "tie_word_embeddings": True,
    },
}


def formula_weight(name: str, shape) -> torch.Tensor:
    """Weights that need no storing: a hash-like sine of the index, 1 + small for norms."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    phase = zlib.crc32(name.encode()) % 1000
    uniform = torch.frac(torch.sin(i * 12.9898 + phase) * 43758.5453).reshape(shape)
    return (1 + 0.2 * uniform if "norm" in name else 0.3 * uniform).float()


def golden_ids(vocabulary: int, tokens: int = 48) -> torch.Tensor:
    """[2, tokens]"""
    i = torch.arange(2 * tokens)
    return ((i * 37 + i**2 * 11) % vocabulary).view(2, tokens)


@torch.no_grad()
def make_logits() -> None:
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    logits = {}
    for name, changes in CONFIGS.items():
        config = SMALL | changes
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config))
            read = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(read, attn_implementation="eager").float().eval()
        for key, parameter in model.named_parameters():
            parameter.copy_(formula_weight(key, parameter.shape))
        if config["tie_word_embeddings"]:
            model.tie_weights()
        logits[name] = model(golden_ids(SMALL["vocab_size"])).logits.contiguous()
        print(name, logits[name].abs().max())
    save_file(logits, HERE / "logits.safetensors")


# --- tokenizers --------------------------------------------------------------------------------

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\t\t x",
    "a  b   c    d",
    "  leading",
    "trailing  ",
    "line\r\nbreak\r\r\n",
    "tab\tand  spaces \n \n x",
    "1234567890",
    " 12 345  6789",
    "3.14159 x10^-8",
    "v2.0.1 rc 3",
    "a1b2c3 4 d",
    "½ ² ٣ Ⅷ 五",
    "don't WON'T it'S we'Re I'LL",
    "'tis 'S 'll",
    "emoji 😀 👩‍👩‍👧‍👦 🇨🇭 ok",
    "naïve café e\u0301 A\u030a ﬁ",
    "Привет мир",
    "你好，世界。",
    "مرحبا بالعالم ١٢٣",
    "हिन्दी भाषा",
    "日本語とカタカナ",
    "שלום",
    "<|endoftext|>",
    "a<|endoftext|>b <|im_start|>user\n<|im_end|>",
    "<|end",
    "<|im_start|><|im_start|>",
    "<tool>x</tool>",
    "\u00a0nbsp\u2003em\u200bzero",
    "\x00\x01\x7f\ufeff",
    "def f(x):\n    return x**2  # ok\n\n\n",
    "!!!???...,,,;;;",
    "-----=====*****",
    "https://example.org/a_b?c=d&e=%20",
    "ÀÉÎÕÜ ßẞ",
    "x" * 300,
    " " * 67 + "y",
]


def make_tokenizers() -> None:
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    joined = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    llama3 = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    qwen2 = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
    kinds = {
        "gpt2": byte_level,
        "smollm": pre_tokenizers.Sequence([digits, byte_level]),
        "llama3": pre_tokenizers.Sequence([llama3, joined]),
        "qwen2": pre_tokenizers.Sequence([qwen2, joined]),
    }
    tokenizers = {kind: train_tokenizer(kind, split) for kind, split in kinds.items()}
    tokenizers |= {kind: train_sentencepiece(kind) for kind in ("llama2", "mistral")}
    for kind, tokenizer in tokenizers.items():
        folder = HERE / "tokenizers" / kind
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        ids = [tokenizer.encode(line).ids for line in NASTY]
        (folder / "ids.json").write_text(json.dumps(ids))
        print(kind, tokenizer.get_vocab_size())


def train_tokenizer(kind: str, pre_tokenizer):
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()

    text = [Path(__file__).read_text(encoding="utf-8"), *NASTY, *(line * 3 for line in NASTY)]
    alphabet = ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    if kind == "llama3":
        add_template(tokenizer)
    return tokenizer


def train_sentencepiece(kind: str):
    """Of the form that Llama 2's and Mistral's first tokenizer.json have, or the newer one."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers.pre_tokenizers import Metaspace, Split

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    blanks = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
    tokenizer.pre_tokenizer = Split(Regex("▁+[^▁]*"), "isolated")

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, limit_alphabet=100, show_progress=False
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8"), *NASTY], trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # the bytes are none
    spec["pre_tokenizer"] = None

    tokenizer = Tokenizer.from_str(json.dumps(spec))
    if kind == "mistral":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def add_template(tokenizer) -> None:
    """A text begins with <|im_start|>, as Llama 3's with its BOS token."""
    from tokenizers import processors

    start = ("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))
    template = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A <|im_start|> $B:1", special_tokens=[start]
    )
    byte_level = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([byte_level, template])


# --- chats -------------------------------------------------------------------------------------

QWEN = {"tokens": ["<think>", "</think>", "<tool_response>"], "eos_token": "<|im_end|>"}
CHATS = {  # SmolLM2's template, one that does with text what Qwen3's does, Llama 3's
    "smollm": {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "tokens": [],
        "chat_template": """{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\
<|im_end|>\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    },
    "qwen2": QWEN
    | {
        "chat_template": """
{%- set found = namespace(last=messages|length - 1, open=true) %}
{%- for message in messages[::-1] %}
    {%- if found.open and message.role == "user"
        and not message.content.startswith('<tool_response>') %}
        {%- set found.open = false %}
        {%- set found.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == "assistant" and '</think>' in content and loop.index0 < found.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
    },
    "llama3": {
        "bos_token": {"__type": "AddedToken", "content": "<|begin_of_text|>", "special": True},
        "eos_token": "<|eot_id|>",
        "tokens": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        "chat_template": """{% for message in messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
    + message['content'] | trim + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{- content }}
{%- endfor %}
{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
""",
    },
}
SYSTEM = {"role": "system", "content": "Be brief, and kind."}
CONVERSATION = [
    {"role": "user", "content": "  Where is the Eiffel tower? 12 345\n"},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nIn Paris, naïve 😀.  "},
    {"role": "user", "content": "And <b>who</b>\n\n  built it, 'Gustave'?"},
]
MESSAGES = [CONVERSATION[:1], [SYSTEM, *CONVERSATION[:1]], CONVERSATION, [SYSTEM, *CONVERSATION]]


def write_chat(kind: str, folder: Path) -> None:
    """A folder with a tokenizer of this kind, its template and the tokens of that."""
    spec = json.loads((HERE / "tokenizers" / kind / "tokenizer.json").read_text())
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    for id, token in enumerate(CHATS[kind]["tokens"], 704):
        special = "think" not in token and "tool" not in token
        spec["added_tokens"].append({"id": id, "content": token, "special": special, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(CHATS[kind]))


def make_chats() -> None:
    from transformers import PreTrainedTokenizerFast

    chats = {}
    for kind, config in CHATS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_chat(kind, Path(folder))
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        assert tokenizer.chat_template == config["chat_template"]
        chats[kind] = []
        for messages in MESSAGES:
            options = {"add_generation_prompt": True, "return_dict": False}
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            ids = tokenizer.apply_chat_template(messages, **options)
            chats[kind].append({"text": text, "ids": ids})
            print(text, len(ids))
    (HERE / "chat.json").write_text(json.dumps(chats))


# --- the real model ----------------------------------------------------------------------------


@torch.no_grad()
def make_smollm2(folder: str, valid: str) -> None:
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    with gzip.open(valid, "rt", encoding="utf-8") as lines:
        ids = [tokenizer.encode(json.loads(line)["text"]).ids for line in lines]
    content = {
        "valid_tokens": sum(map(len, ids)),
        "valid_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "nasty": [tokenizer.encode(line).ids for line in NASTY],
    }
    (HERE / "smollm2.json").write_text(json.dumps(content))

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    prompt = torch.tensor([ids[0][:512]])
    logits = model.eval()(prompt).logits[0, 31::32, ::16].contiguous()
    save_file({"ids": prompt, "logits": logits}, HERE / "smollm2.safetensors")
    print("smollm2", logits.shape, content["valid_tokens"])


if __name__ == "__main__":
    make_logits()
    make_tokenizers()
    make_chats()
    if len(sys.argv) == 3:
        make_smollm2(*sys.argv[1:])
