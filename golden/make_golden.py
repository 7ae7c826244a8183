"""Writes the golden files of the tests with Hugging Face transformers and tokenizers, in a scratch environment:

    pip install torch==2.13.0 transformers safetensors && python golden/make_golden.py [SMOLLM2_DIR VALID_JSONL_GZ]

logits.safetensors: float32 logits of small models of every family, whose weights are a formula (`formula_weight`), so that
only the logits are stored. tokenizers/KIND/tokenizer.json: small byte-level BPE tokenizers of the four kinds, with
ids.json: what Hugging Face's tokenizer makes of every line of `NASTY`. With the two arguments also smollm2.safetensors:
logits of the real model at some positions, and a digest of its ids over the whole validation text.
"""

import hashlib
import json
import sys
import zlib
from pathlib import Path

import torch

HERE = Path(__file__).parent
SMALL = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
         "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 10000.0},
    "llama3-scaled": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_theta": 500000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
    "llama-linear-new-spelling": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True,
                                  "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}},
    "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "rope_theta": 10000.0, "sliding_window": 16, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 16},
    "qwen2-sliding": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0, "use_sliding_window": True,
                      "sliding_window": 16, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rope_theta": 1000000.0, "head_dim": 20, "tie_word_embeddings": True},
}
SPLIT = {"llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
         "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}
NASTY = [
    "", " ", "   ", "\n", "\n\n\n", "\t\t x", "a  b   c    d", "  leading", "trailing  ", "line\r\nbreak\r\r\n", "tab\tand  spaces \n \n x",
    "1234567890", " 12 345  6789", "3.14159 x10^-8", "v2.0.1 rc 3", "a1b2c3 4 d", "½ ² ٣ Ⅷ 五", "don't WON'T it'S we'Re I'LL", "'tis 'S 'll",
    "emoji 😀 👩‍👩‍👧‍👦 🇨🇭 ok", "naïve café e\u0301 A\u030a ﬁ", "Привет мир", "你好，世界。", "مرحبا بالعالم ١٢٣", "हिन्दी भाषा", "日本語とカタカナ", "שלום",
    "<|endoftext|>", "a<|endoftext|>b <|im_start|>user\n<|im_end|>", "<|end", "<|im_start|><|im_start|>", "<tool>x</tool>", "\u00a0nbsp\u2003em\u200bzero",
    "\x00\x01\x7f\ufeff", "def f(x):\n    return x**2  # ok\n\n\n", "!!!???...,,,;;;", "-----=====*****", "https://example.org/a_b?c=d&e=%20", "ÀÉÎÕÜ ßẞ", "x" * 300, " " * 67 + "y",
]


def formula_weight(name: str, shape) -> torch.Tensor:
    """Weights that need no storing: a hash-like sine of the index, 1 + small for norms."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    uniform = torch.frac(torch.sin(i * 12.9898 + zlib.crc32(name.encode()) % 1000) * 43758.5453).reshape(shape)
    return (1 + 0.2 * uniform if "norm" in name else 0.3 * uniform).float()


def golden_ids(vocabulary: int, tokens: int = 48) -> torch.Tensor:
    return ((torch.arange(2 * tokens) * 37 + torch.arange(2 * tokens) ** 2 * 11) % vocabulary).view(2, tokens)


def main():
    import tempfile
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    logits = {}
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(SMALL | config))
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager").float().eval()
        tied = (SMALL | config)["tie_word_embeddings"]
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(formula_weight(key, parameter.shape))
            if tied:
                model.tie_weights()
            logits[name] = model(golden_ids(SMALL["vocab_size"])).logits.contiguous()
        print(name, logits[name].abs().max())
    save_file(logits, HERE / "logits.safetensors")
    tokenizers()
    if len(sys.argv) == 3:
        smollm2(*sys.argv[1:])


def tokenizers():
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    byte_level = pre_tokenizers.ByteLevel
    kinds = {"gpt2": byte_level(add_prefix_space=False), "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(add_prefix_space=False)])}
    kinds |= {kind: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(add_prefix_space=False, use_regex=False)]) for kind, pattern in SPLIT.items()}
    text = [Path(__file__).read_text(encoding="utf-8"), *NASTY, *(word * 3 for word in NASTY)]
    for kind, pre in kinds.items():
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
        if kind == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=700, initial_alphabet=byte_level.alphabet(), show_progress=False))
        tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
        if kind == "llama3":
            tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
                single="<|im_start|> $A", pair="<|im_start|> $A <|im_start|> $B:1", special_tokens=[("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))])])
        folder = HERE / "tokenizers" / kind
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "ids.json").write_text(json.dumps([tokenizer.encode(line).ids for line in NASTY]))
        print(kind, tokenizer.get_vocab_size())


def smollm2(folder: str, valid: str):
    import gzip
    from safetensors.torch import save_file
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    ids = [tokenizer.encode(json.loads(line)["text"]).ids for line in gzip.open(valid, "rt", encoding="utf-8")]
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    nasty = [tokenizer.encode(line).ids for line in NASTY]
    (HERE / "smollm2.json").write_text(json.dumps({"valid_tokens": sum(map(len, ids)), "valid_sha256": digest, "nasty": nasty}))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = torch.tensor([ids[0][:512]])
    with torch.no_grad():
        logits = model(prompt).logits[0, 31::32, ::16].contiguous()
    save_file({"ids": prompt, "logits": logits}, HERE / "smollm2.safetensors")
    print("smollm2", logits.shape, sum(map(len, ids)))


if __name__ == "__main__":
    main()
