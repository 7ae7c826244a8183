"""Whether a last part of healing on what the student itself writes (arXiv 2306.13649) mends its
writing, at equal tokens.

    python results/on_policy.py MODEL --data heal.jsonl.gz --valid valid.jsonl.gz --out OUT.json

equal.py's row "6 removed, maps", whose writing is worse than its KL suggests: maps fitted on 16k
tokens, then 64 steps of 512. In one arm all are text; in the others the last steps read sequences
of which the student, as it is by then, has drawn three quarters after a beginning of text. The loss
is KL(original || student) for both. One run an arm; judged as in equal.py, but on 32 continuations.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch import Tensor

import equal
import measure
from distill import Healing, Run
from fit import copy_maps, fit_maps
from hub import read_json, write_json
from model import Model, convert, load_model
from text import pack_sequences, read_documents
from tokenizer import load_tokenizer

STEPS = 64
CONTEXT = 512
BEGINNING = 128  # tokens of text that the student goes on from
ARMS = (0, 16, 32)  # steps on its own writing


def write(student: Model, beginnings: Tensor) -> Tensor:
    """[N, BEGINNING] -> [N, CONTEXT], drawn at temperature 1."""
    drawn = student.generate(beginnings, CONTEXT - BEGINNING, temperature=1.0, seed=0)
    return drawn.clone()  # outside of inference mode


def heal_arm(base: Model, student: Model, text: Tensor, valid: Tensor, own: int, path: Path):
    """Heals in place: STEPS - own steps on text [N, CONTEXT], the others on its own writing."""
    settings = Healing(STEPS * CONTEXT, long_share=0.0, context=CONTEXT, validations=2)
    run = Run(base, student, valid, settings, path, {"own": own})
    run.validate()
    while run.step < STEPS - own:
        run.train(text)
    if own:
        run.optimizer.exchange()  # it writes with the averaged weights
        ours = write(student, text[-own:, :BEGINNING])
        run.optimizer.exchange()
        while run.step < STEPS:
            run.train(ours)
    run.validate()
    run.optimizer.end_stage()
    run.finish()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model")
    add("--data", required=True)
    add("--valid", required=True)
    add("--out", type=Path, required=True)
    args = parser.parse_args()

    base, tokenizer = load_model(args.model, dtype=torch.bfloat16), load_tokenizer(args.model)
    eos = base.config.eos_token_ids
    documents = read_documents(args.valid, "--valid")
    valid = pack_sequences(documents, tokenizer, eos, equal.CONTEXT, 8 * equal.CONTEXT)
    text = pack_sequences(read_documents(args.data), tokenizer, eos, CONTEXT, 2**17)
    judge = equal.Judge(base, tokenizer, valid, 20, {})
    judge.prompts = valid.view(-1, 1024)[:, :256]  # 32
    judge.written = measure.write_on(base, judge.prompts)

    row = equal.make_rows(base)["6 removed, maps"]
    tiers = {name: x for name, x in row.items() if name != "plan"}
    converted = convert(base, row["plan"], **tiers)
    fit_maps(base, converted, text[-equal.FITTED // CONTEXT :])

    made = read_json(args.out) if args.out.exists() else {}
    for arm in itertools.chain(["original", "converted"], ARMS):
        if str(arm) in made:
            continue
        model = {"original": base, "converted": converted}.get(arm)
        if model is None:
            model = convert(base, row["plan"], **tiers)
            copy_maps(converted, model)
            heal_arm(base, model, text, valid[:2, :2048], arm, args.out.with_suffix(f".{arm}"))
        ours = judge.written if model is base else measure.write_on(model, judge.prompts)
        writing = measure.writing_quality(base, judge.prompts, ours, judge.written)
        recall = equal.recall_by_length(model, tokenizer, valid, 20, [512, 2048])
        made[str(arm)] = judge.on_text(model) | {"writing": writing, "recall": recall}
        write_json(args.out, made)

    for arm, figures in made.items():
        kl = [measure.mean(x) for x in zip(*figures["kl"])]
        writing, errors = figures["writing"], figures["writing"]["errors"]
        recall = ", ".join(f"{measure.mean(x):.0%} at {n}" for n, x in figures["recall"].items())
        print(
            f"{arm:>9}: KL {' / '.join(f'{x:.4f}' for x in kl)}; writes {writing['nats']:.3f} "
            f"±{errors['nats']:.3f} nats, {writing['repeated']:.1%} repeated, as the original for "
            f"{writing['as_base']:.0f} ±{errors['as_base']:.0f} tokens; recall {recall}"
        )


if __name__ == "__main__":
    main()
