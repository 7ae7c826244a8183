"""What should tier L be, at equal bytes of a decoding step?

    python results/forms.py MODEL --data FILE --valid FILE --tokens 48k --out DIR [FORM ...]

Every feature map below gets the window with which a step reads and writes as many bytes as one of
64 tokens, 4 sinks and a Hedgehog tail in float32. Each is converted, healed, and measured on
sequences of 8,192 tokens by position, and on passkeys. DIR gets FORM.json at once, and what is
there is not measured again.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from distill import Healing, heal
from hub import fingerprint, write_json
from kernels import feature_size
from measure import passkey_recall
from model import Model, convert, load_model
from tail import by_position, compare
from terminal import token_count
from text import pack_sequences, read_documents
from tokenizer import load_tokenizer

PLAN = "LLLLSLLLSLLLLLLSLLSLSSSSLLLLLL"  # results/smollm2-200k/scan.json, --keep 8 --drop 0
EDGES = (0, 512, 1024, 2048, 4096, 8192)
LENGTHS = (512, 1024, 2048, 4096)
FORMS = ("hedgehog", "softmax", "none")


def window_of(feature_map: str, head_dim: int, sinks: int = 4) -> int:
    """The window that leaves a step its bytes, with keys and values in bf16."""

    def state(kind: str) -> int:
        return 8 * feature_size(kind, head_dim) * (head_dim + 1)

    token = 4 * head_dim
    whole = state("hedgehog") + (64 + sinks) * token
    return (whole - state(feature_map)) // token - sinks


@torch.no_grad()
def figures(model: Model, base: Model, tokenizer, valid, targets, passkeys: int) -> dict:
    kl, same = compare(model, base, valid, targets)
    edges = [edge for edge in EDGES if edge <= valid.shape[1]]
    result = {"kl": by_position(kl, edges), "agreement": by_position(same, edges)}
    if passkeys:
        result["recall"] = passkey_recall(model, tokenizer, valid, LENGTHS, passkeys // 5)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("model")
    add("forms", nargs="*", default=FORMS)
    add("--data", required=True)
    add("--valid", required=True)
    add("--tokens", type=token_count, default=48_000)
    add("--sequences", type=int, default=2)
    add("--passkeys", type=int, default=20)
    add("--plan", default=PLAN)
    add("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    base = load_model(args.model, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(args.model)
    eos = base.config.eos_token_ids
    reach = min(EDGES[-1], base.config.max_position_embeddings)
    documents = read_documents(args.valid, "--valid")
    valid = pack_sequences(documents, tokenizer, eos, reach, args.sequences * reach)
    train = pack_sequences(read_documents(args.data), tokenizer, eos, 512, 4 * args.tokens)
    with torch.inference_mode():
        targets = [base.hidden(ids) for ids in valid.split(1)]

    path = args.out / "base.json"
    if not path.exists() and args.passkeys:
        write_json(path, passkey_recall(base, tokenizer, valid, LENGTHS, args.passkeys // 5))
    for form in args.forms:
        path = args.out / f"{form}.json"
        if path.exists():
            continue
        start = time.monotonic()
        window = window_of(form, base.config.head_dim)
        student = convert(base, args.plan, window, 4, form)
        has_tail = student.layers[0].self_attn.has_tail
        result = {"form": form, "window": window, "plan": args.plan, "tokens": args.tokens}
        result["converted"] = figures(student, base, tokenizer, valid, targets, 0)
        print(json.dumps(result), flush=True)
        if args.tokens:
            settings = Healing(args.tokens, validations=2)
            if not has_tail:
                settings = replace(settings, long_share=0.0)
            identity = {"model": fingerprint(*base.parameters()), "plan": args.plan, "form": form}
            checkpoint = args.out / f"{form}.safetensors"
            heal(base, student, train, valid[:1, :1024], settings, checkpoint, identity)
        result["healed"] = figures(student, base, tokenizer, valid, targets, args.passkeys)
        result["seconds"] = time.monotonic() - start
        print(json.dumps(result), flush=True)
        write_json(path, result)


if __name__ == "__main__":
    main()
