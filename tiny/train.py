"""Trains the embedded model, a 12-layer Llama of 9.3M parameters, with this repository's decoder.

    python tiny/train.py --data heal.jsonl.gz --valid valid.jsonl.gz --out tiny

6.2 million tokens, 40 minutes on two CPU cores. The same command goes on where it was stopped. A
folder without tokenizer.json gets one first, which needs `pip install tokenizers`.

A model this small learns to look far back only if the text rewards it, and ordinary text seldom
does. So a third of the rows, toward the end two thirds, are synthetic: they repeat a passage, or
random tokens, or hide passkeys and ask for them in the very words of measure.py's passkey test.
Recall here shows that the attention still reaches, not that a small model generalises.

Matrices are trained by Muon (torch.optim.Muon), the embedding and the norms by AdamW, in bf16 with
float32 weights.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from config import read_config
from hub import open_safetensors, save_safetensors, write_file
from kernels import apply_rotary
from measure import passkey_prompts, passkey_recall, text_quality
from model import Model, save_model
from text import pack_sequences, read_documents
from tokenizer import Tokenizer, load_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
STEP_TOKENS = 8192
# Until this step: rows, tokens a row, share of passkey rows.
STAGES = ((520, 32, 256, 1 / 5), (640, 16, 512, 1 / 3), (760, 8, 1024, 1 / 2))
STEPS = STAGES[-1][0]
COPIES, BLOCKS = 1 / 16, 1 / 16  # shares of the other synthetic rows
MATRIX_LR, EMBEDDING_LR, NORM_LR = 0.02, 0.03, 0.0005


# --- text --------------------------------------------------------------------------------------


def train_tokenizer(documents, path: Path) -> None:
    """Byte-level BPE whose pre-tokenizer lets digits stand alone, as SmolLM's does."""
    from tokenizers import Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer = Tokenizer(models.BPE())
    digits = Digits(individual_digits=True)
    tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(documents, trainer)
    write_file(path, lambda temporary: tokenizer.save(str(temporary)))


def make_row(text: Tensor, tokenizer: Tokenizer, draw: random.Random, passkeys: float) -> Tensor:
    """text [T] as it is, or with a passage of it repeated, or 4 to T / 2 tokens, drawn from a
    random alphabet of 8 or more, over and over, or as filler of passkey prompts."""
    kind = draw.random()
    if kind < COPIES:
        return repeat_passage(text, draw)
    if kind < COPIES + BLOCKS:
        return repeat_block(len(text), draw)
    if kind < COPIES + BLOCKS + passkeys:
        return hide_passkeys(text, tokenizer, draw)
    return text


def repeat_passage(text: Tensor, draw: random.Random) -> Tensor:
    T = len(text)
    length = draw.randint(16, T // 3)
    first = draw.randint(0, T - 2 * length)
    again = draw.randint(first + length, T - length)
    text = text.clone()
    text[again : again + length] = text[first : first + length]
    return text


def repeat_block(T: int, draw: random.Random) -> Tensor:
    size = int(8 * 500 ** draw.random())
    alphabet = draw.sample(range(1, CONFIG["vocab_size"]), k=size)
    block = draw.choices(alphabet, k=int(4 * (T / 8) ** draw.random()))
    return torch.tensor(block * (T // len(block) + 1))[:T]


def hide_passkeys(text: Tensor, tokenizer: Tokenizer, draw: random.Random) -> Tensor:
    T = len(text)
    row: list[int] = []
    while T - len(row) >= 96:
        length = draw.randint(96, T - len(row))
        depths = (draw.random(),)
        seed = draw.random()
        [(_, (context, answer))] = passkey_prompts(tokenizer, text, length, depths, 1, seed)
        row += context + answer
    return torch.cat((torch.tensor(row), text[len(row) :]))


# --- the model at the start --------------------------------------------------------------------


def initial_model(folder: Path) -> Model:
    """Random weights; what writes to the residual stream starts at zero, but for the heads of
    `wire_induction`. The embedding is as large as what the layers soon add to it (with the usual
    0.02 they drown it, and what is drowned cannot be copied); since it is the head too, the last
    norm starts small."""
    model = Model(read_config(folder))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
            continue
        std = parameter.shape[1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            std = 0.0
        elif "embed" in name:
            std = 1.0
        torch.nn.init.normal_(parameter, std=std)
    torch.nn.init.constant_(model.norm.weight, 0.05)
    wire_induction(model)
    return model


@torch.no_grad()
def wire_induction(model: Model) -> None:
    """Starts two induction circuits (arXiv 2209.11895): to go on from here, find where the text
    stood so before and copy what followed. Left to itself this model had not learned to copy after
    500 steps; wired for one token of context alone, it never learned to go by two, and so lost its
    place in numbers that repeat a digit.

    Head 0 of layer 0 looks one token back, head 1 two: its keys are one constant vector, its
    queries the same rotated by that many positions, and it writes the token that it finds, seen
    through `now`, into directions of its own, `before[head]`. In layer 2, head 0 seeks its own
    token among the first of these, which finds what followed it; head 1 seeks the token before its
    own among the second. Both do so through the slow pairs of the rotary embedding, which keep
    their phase over a thousand tokens, and copy what they find there. ("Head" is a key/value head
    with its first query head.)
    """
    d, D, G = CONFIG["hidden_size"], CONFIG["head_dim"], CONFIG["num_key_value_heads"]
    first = model.layers[0].self_attn
    later = model.layers[2].self_attn

    basis = F.pad(orthogonal(d - 1), (1, 0))  # directions [d - 1, d] beside that of the constant, 0
    now = basis[:D]
    before = basis[D : 3 * D].view(G, D, d)
    model.embed_tokens.weight[:, 0] = 4
    fast = torch.zeros(D)
    fast[:5] = 1
    slow = torch.ones(D, 1)
    slow[: D // 4] = 0
    slow[D // 2 : 3 * D // 4] = 0

    for g in range(G):
        query = slice(g * D * 2, g * D * 2 + D)  # rows of its query head
        pair = slice(g * D, (g + 1) * D)  # and its own

        angle = -(g + 1) * model.frequencies
        back = apply_rotary(fast.view(1, 1, 1, D), angle.cos(), angle.sin()).flatten()
        first.q_proj.weight[query] = 0
        first.q_proj.weight[query, 0] = 6 * back
        first.k_proj.weight[pair] = 0
        first.k_proj.weight[pair, 0] = fast
        first.v_proj.weight[pair] = now
        first.o_proj.weight[:, query] = 1.5 * before[g].T

        copied = orthogonal(d)[:D]
        later.q_proj.weight[query] = slow * (5 * now if g == 0 else 3.3 * before[0])
        later.k_proj.weight[pair] = slow * before[g]
        later.v_proj.weight[pair] = copied
        later.o_proj.weight[:, query] = 8 * copied.T


def orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n)).Q


# --- training ----------------------------------------------------------------------------------


@torch.compile(dynamic=False)
def next_token_loss(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """The last position predicts nothing: its target is ignored."""
    following = F.pad(ids[:, 1:], (0, 1), value=-100)
    return F.cross_entropy((hidden @ head.T).float().flatten(0, 1), following.flatten())


def make_optimizers(model: Model) -> list[torch.optim.Optimizer]:
    """Their parameter groups are the matrices, the embedding and the norms."""
    matrices = []
    norms = []
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            norms.append(parameter)
        elif name.startswith("layers"):
            matrices.append(parameter)
    others = [{"params": [model.embed_tokens.weight]}, {"params": norms}]
    muon = torch.optim.Muon(matrices, weight_decay=0.0)
    return [muon, torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)]


def train_step(model: Model, optimizers: list, ids: Tensor, step: int) -> float:
    """On ids [B, T]. Returns the loss."""
    model.compiled_shapes = {tuple(ids.shape)}
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(model.hidden(ids), model.head, ids)
    loss.backward()

    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, peak in zip(groups, (MATRIX_LR, EMBEDDING_LR, NORM_LR), strict=True):
        group["lr"] = peak * min(1, (step + 1) / 30, (STEPS - step) / 500)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def read_step(text: Tensor, tokenizer: Tokenizer, step: int) -> Tensor:
    """The rows of a step, [B, T], from its part of the text [STEPS, STEP_TOKENS]."""
    _, rows, context, passkeys = next(stage for stage in STAGES if step < stage[0])
    draw = random.Random(f"row {step}")
    parts = text[step].view(rows, context)
    return torch.stack([make_row(part, tokenizer, draw, passkeys) for part in parts])


def evaluate(model: Model, tokenizer: Tokenizer, valid: Tensor) -> str:
    with torch.autocast("cpu", torch.bfloat16):
        recall = passkey_recall(model, tokenizer, valid, (256, 512))
        bits = text_quality(model, model, tokenizer, valid)["bits_per_byte"]
    recalled = ", ".join(f"{share:.0%} at {length}" for length, share in recall.items())
    return f"{bits:.4f} bits per byte, passkey recall {recalled}"


def save(path: Path, model: Model, optimizers: list, step: int) -> None:
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for p, state in optimizer.state_dict()["state"].items():
            for key, x in state.items():
                tensors[f"optimizer/{i}/{p}/{key}"] = x
    save_safetensors(tensors, path, {"step": str(step)})


def load(path: Path, model: Model, optimizers: list) -> int:
    """Returns the step to go on with."""
    with open_safetensors(path, "delete it to start anew") as file:
        weights = {name: file.get_tensor(name) for name, _ in model.named_parameters()}
        states: list[dict] = [{} for _ in optimizers]
        for name in file.keys():
            if name.startswith("optimizer/"):
                _, i, p, key = name.split("/")
                states[int(i)].setdefault(int(p), {})[key] = file.get_tensor(name)
        step = int(file.metadata()["step"])

    model.load_state_dict(weights)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step


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
    tokenizer = load_tokenizer(str(args.out))
    model = initial_model(args.out)
    optimizers = make_optimizers(model)

    documents = list(read_documents(args.data))
    random.Random(0).shuffle(documents)
    text = pack_sequences(documents, tokenizer, (0,), STEP_TOKENS, STEPS * STEP_TOKENS)
    text = text[torch.randperm(len(text))]  # a row for each step
    valid = pack_sequences(read_documents(args.valid, "--valid"), tokenizer, (0,), 1024)

    checkpoint = args.out / "training.safetensors"
    start = load(checkpoint, model, optimizers) if checkpoint.exists() else 0
    saved = time.monotonic()
    with tqdm(total=STEPS, initial=start, unit="step", desc="training") as bar:
        for step in range(start, STEPS):
            loss = train_step(model, optimizers, read_step(text, tokenizer, step), step)
            bar.set_postfix_str(f"loss {loss:.3f}")
            bar.update()
            if (step + 1) % 100 == 0:
                bar.write(f"step {step + 1}: {evaluate(model, tokenizer, valid[:16])}")
            if time.monotonic() - saved > 300:
                save(checkpoint, model, optimizers, step + 1)
                saved = time.monotonic()

    model.bfloat16()
    save_model(model, args.out, args.out)
    quality = evaluate(model, tokenizer, valid)
    print(f"{args.out}: {quality} on all {valid.numel():,} tokens of {args.valid}")
    checkpoint.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
