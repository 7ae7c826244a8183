"""Trains the embedded model, a 12-layer Llama of 9.3M parameters, with this repository's own decoder.

    python tiny/train.py --data heal.jsonl.gz --valid valid.jsonl.gz --out tiny

6.2 million tokens, 40 minutes on two CPU cores. The same command goes on where it was stopped. A folder
without tokenizer.json gets one first, which needs `pip install tokenizers`.

A model this small learns to look far back only if the text rewards it, and ordinary text seldom does. So a third of the
rows, toward the end two thirds, are synthetic: they repeat a passage, or random tokens, or hide passkeys and ask for them in
the very words of bench.py's passkey test. Recall here shows that the attention still reaches, not that a small model generalises.

Matrices are trained by Muon (torch.optim.Muon), the embedding and the norms by AdamW, in bf16 with float32 weights.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import passkey_prompts, passkey_recall, text_quality
from distill import pack, read_documents
from kernels import apply_rotary
from model import Model, Tokenizer, load_tokenizer, read_config, save_model, write_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4096, "hidden_size": 256,
    "intermediate_size": 640, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}
STEP_TOKENS = 8192
# Until this step: rows, tokens a row, share of passkey rows.
STAGES = (
    (520, 32, 256, 1 / 5),
    (640, 16, 512, 1 / 3),
    (760, 8, 1024, 1 / 2))
STEPS = STAGES[-1][0]
COPIES, BLOCKS = 1 / 16, 1 / 16         # shares of the other synthetic rows
MATRIX_LR, EMBEDDING_LR, NORM_LR = 0.02, 0.03, 0.0005


def train_tokenizer(documents, path: Path) -> None:
    """Byte-level BPE whose pre-tokenizer lets digits stand alone, as SmolLM's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(documents, trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    write_file(path, lambda temporary: tokenizer.save(str(temporary)))


def make_row(text: Tensor, tokenizer: Tokenizer, draw: random.Random, passkeys: float) -> Tensor:
    """text [T] as it is, or with a passage of it repeated, or 4 to T / 2 tokens, drawn from a random alphabet of 8 or
    more, over and over, or as filler of passkey prompts."""
    kind, T = draw.random(), len(text)
    if kind < COPIES:
        length = draw.randint(16, T // 3)
        first = draw.randint(0, T - 2 * length)
        again = draw.randint(first + length, T - length)
        text = text.clone()
        text[again:again + length] = text[first:first + length]
    elif kind < COPIES + BLOCKS:
        alphabet = draw.sample(range(1, CONFIG["vocab_size"]), k=int(8 * 500 ** draw.random()))
        block = draw.choices(alphabet, k=int(4 * (T / 8) ** draw.random()))
        text = torch.tensor(block * (T // len(block) + 1))[:T]
    elif kind < COPIES + BLOCKS + passkeys:
        row: list[int] = []
        while T - len(row) >= 96:
            length = draw.randint(96, T - len(row))
            [(_, (context, answer))] = passkey_prompts(tokenizer, text, length, [draw.random()], 1, seed=draw.random())
            row += context + answer
        text = torch.cat((torch.tensor(row), text[len(row):]))
    return text


def initial_model(folder: Path) -> Model:
    """Random weights; what writes to the residual stream starts at zero, but for the heads of `wire_induction`. The embedding
    is as large as what the layers soon add to it (with the usual 0.02 they drown it, and what is drowned cannot be
    copied); since it is the head too, the last norm starts small."""
    model = Model(read_config(folder))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
        else:
            std = 0.0 if "o_proj" in name or "down_proj" in name else 1.0 if "embed" in name else parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, std=std)
    torch.nn.init.constant_(model.norm.weight, 0.05)
    wire_induction(model)
    return model


@torch.no_grad()
def wire_induction(model: Model) -> None:
    """Starts two induction circuits (arXiv 2209.11895): to go on from here, find where the text stood so before and copy what
    followed. Left to itself this model had not learned to copy after 500 steps; wired for one token of context alone, it
    never learned to go by two, and so lost its place in numbers that repeat a digit.

    Head 0 of layer 0 looks one token back, head 1 two: its keys are one constant vector, its queries the same rotated by that
    many positions, and it writes the token that it finds, seen through `now`, into directions of its own, `before[head]`.
    In layer 2, head 0 seeks its own token among the first of these, which finds what followed it; head 1 seeks the token
    before its own among the second. Both do so through the slow pairs of the rotary embedding, which keep their phase over a
    thousand tokens, and copy what they find there. ("Head" is a key/value head with its first query head.)
    """
    d, D, G = CONFIG["hidden_size"], CONFIG["head_dim"], CONFIG["num_key_value_heads"]
    orthogonal = lambda n: torch.linalg.qr(torch.randn(n, n)).Q
    basis = F.pad(orthogonal(d - 1), (1, 0))                # directions [d - 1, d] beside that of the constant, 0
    now, before = basis[:D], basis[D:3 * D].view(G, D, d)
    model.embed_tokens.weight[:, 0] = 4
    fast, slow = torch.zeros(D), torch.ones(D, 1)
    fast[:5], slow[:D // 4], slow[D // 2:3 * D // 4] = 1, 0, 0
    for g in range(G):
        angle = -(g + 1) * model.frequencies
        back = apply_rotary(fast.view(1, 1, 1, D), angle.cos(), angle.sin()).flatten()
        query, pair = slice(g * D * 2, g * D * 2 + D), slice(g * D, (g + 1) * D)      # rows of its query head, and its own
        first = model.layers[0].self_attn
        for projection, rows, row in ((first.q_proj, query, 6 * back), (first.k_proj, pair, fast)):
            projection.weight[rows] = 0
            projection.weight[rows, 0] = row
        first.v_proj.weight[pair], first.o_proj.weight[:, query] = now, 1.5 * before[g].T
        later, copied = model.layers[2].self_attn, orthogonal(d)[:D]
        later.q_proj.weight[query] = slow * (5 * now if g == 0 else 3.3 * before[0])
        later.k_proj.weight[pair] = slow * before[g]
        later.v_proj.weight[pair], later.o_proj.weight[:, query] = copied, 8 * copied.T


@torch.compile(dynamic=False)
def next_token_loss(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """The last position predicts nothing: its target is ignored."""
    following = F.pad(ids[:, 1:], (0, 1), value=-100)
    return F.cross_entropy((hidden @ head.T).float().flatten(0, 1), following.flatten())


def evaluate(model: Model, tokenizer: Tokenizer, valid: Tensor) -> str:
    with torch.autocast("cpu", torch.bfloat16):
        recall = passkey_recall(model, tokenizer, valid, (256, 512))["recall"]
        bits = text_quality({"model": model}, model, tokenizer, valid)["model"]["bits_per_byte"]
        return (f"{bits:.4f} bits per byte, passkey recall "
                + ", ".join(f"{share:.0%} at {length}" for length, share in recall.items()))


def save(path: Path, model: Model, optimizers: list, step: int) -> None:
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for p, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{p}/{key}": x for key, x in state.items()}
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata={"step": str(step)}))


def load(path: Path, model: Model, optimizers: list) -> int:
    with safe_open(path, framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name, _ in model.named_parameters()})
        for i, optimizer in enumerate(optimizers):
            state: dict = {}
            for name in file.keys():
                kind, _, rest = name.partition(f"optimizer/{i}/")
                if rest:
                    p, key = rest.split("/")
                    state.setdefault(int(p), {})[key] = file.get_tensor(name)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return int(file.metadata()["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="text to train on")
    parser.add_argument("--valid", required=True, help="text to measure bits per byte on")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    args = parser.parse_args()
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    if not (args.out / "tokenizer.json").exists():
        train_tokenizer(read_documents(args.data), args.out / "tokenizer.json")
    tokenizer, model = load_tokenizer(str(args.out)), initial_model(args.out)
    documents = list(read_documents(args.data))
    random.Random(0).shuffle(documents)
    text = pack(documents, tokenizer, (0,), STEP_TOKENS, STEPS * STEP_TOKENS)    # a row for each step
    text = text[torch.randperm(len(text))]
    valid = pack(read_documents(args.valid, "--valid"), tokenizer, (0,), 1024)
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and name.startswith("layers")]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizers = [torch.optim.Muon(matrices, weight_decay=0.0),
                  torch.optim.AdamW([{"params": [model.embed_tokens.weight]}, {"params": norms}], betas=(0.9, 0.95), weight_decay=0.0)]
    checkpoint, saved = args.out / "training.safetensors", time.monotonic()
    step = load(checkpoint, model, optimizers) if checkpoint.exists() else 0
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    with tqdm(total=STEPS, initial=step, unit="step", desc="training") as bar:
        for step in range(step, STEPS):
            _, rows, context, passkeys = next(stage for stage in STAGES if step < stage[0])
            draw = random.Random(f"row {step}")
            ids = torch.stack([make_row(row, tokenizer, draw, passkeys) for row in text[step].view(rows, context)])
            model.compiled_shapes = {tuple(ids.shape)}
            with torch.autocast("cpu", torch.bfloat16):
                loss = next_token_loss(model.hidden(ids), model.head, ids)
            loss.backward()
            for group, peak in zip(groups, (MATRIX_LR, EMBEDDING_LR, NORM_LR)):
                group["lr"] = peak * min(1, (step + 1) / 30, (STEPS - step) / 500)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            bar.set_postfix_str(f"loss {loss.item():.3f}")
            bar.update()
            if (step + 1) % 100 == 0:
                bar.write(f"step {step + 1}: {evaluate(model, tokenizer, valid[:16])}")
            if time.monotonic() - saved > 300:
                save(checkpoint, model, optimizers, step + 1)
                saved = time.monotonic()
    for parameter in model.parameters():            # not model.to(): the rotary frequencies stay float32
        parameter.data = parameter.data.bfloat16()
    save_model(model, args.out, args.out)
    print(f"{args.out}: {evaluate(model, tokenizer, valid)} on all {valid.numel():,} tokens of {args.valid}")
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
