"""Question files for the lm-eval harness, and its figures beside ours, item by item. In an
environment that has lm_eval, transformers and the program's own requirements:

    python results/lm_eval_tasks.py EVAL TASKS
    lm_eval as in README, with --include_path TASKS --limit 100 --log_samples \\
        --output_path TASKS/logged
    python results/lm_eval_tasks.py EVAL TASKS --model OUT

EVAL holds arc_easy.jsonl, piqa.jsonl and lambada_openai.jsonl. The tasks are the harness's own,
word for word, but for the data, which they read from TASKS in their original fields instead of from
the Hub. The last command scores the same items with measure.py.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import yaml

from measure import mean, score_answers, task_accuracy, task_prompts
from model import load_model, load_tokenizer

SOURCES = {
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}


def original(name: str, item: dict) -> dict:
    """An item in the fields of the data set on the Hub."""
    if name == "lambada_openai":
        return {"text": f"{item['context']} {item['continuation']}"}
    question = item["query"].strip().removeprefix("Question: ")
    if name == "piqa":
        first, second = item["choices"]
        return {"goal": question, "sol1": first, "sol2": second, "label": item["gold"]}
    labels = "ABCDE"[: len(item["choices"])]
    choices = {"text": item["choices"], "label": list(labels)}
    return {"question": question, "choices": choices, "answerKey": labels[item["gold"]]}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_tasks(source: Path, folder: Path) -> None:
    import lm_eval

    folder.mkdir(parents=True, exist_ok=True)
    for name, file in SOURCES.items():
        data = folder.absolute() / f"{name}.jsonl"
        items = [original(name, item) for item in read(source / f"{name}.jsonl")]
        data.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")

        task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / file).read_text())
        for key in ("dataset_name", "training_split", "validation_split", "tag"):
            task.pop(key, None)
        task |= {"dataset_path": "json", "test_split": "test"}
        task["dataset_kwargs"] = {"data_files": {"test": str(data)}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def compare(name: str, source: Path, folder: Path, model, tokenizer) -> None:
    logged = max((folder / "logged").rglob(f"samples_{name}_*.jsonl"))  # the newest, by its name
    theirs = sorted(read(logged), key=lambda sample: sample["doc_id"])
    items = read(source / f"{name}.jsonl")[: len(theirs)]

    by_item = task_prompts(items, tokenizer, model.config.max_position_embeddings)
    scores = iter(score_answers(model, list(itertools.chain(*by_item)), name))
    ours = [[next(scores) for _ in prompts] for prompts in by_item]

    figures = task_accuracy(items, ours)
    harness = {"accuracy": mean(float(sample["acc"]) for sample in theirs)}
    if "acc_norm" in theirs[0]:
        harness["accuracy_norm"] = mean(float(sample["acc_norm"]) for sample in theirs)
    else:
        harness["perplexity"] = math.exp(-mean(float(s["perplexity"]) for s in theirs))
    print(f"\n{name}, {len(items)} items")
    for key, value in harness.items():
        print(f"  {key:15} lm-eval {value:.6f}   ours {figures[key]:.6f}")

    largest = 0.0
    differ = 0
    for number, (item, mine, sample) in enumerate(zip(items, ours, theirs)):
        values = [float(response[0]) for response in sample["filtered_resps"]]
        gaps = [abs(a.log_likelihood - b) for a, b in zip(mine, values, strict=True)]
        largest = max(largest, max(gaps))
        alone = task_accuracy([item], [mine])
        same = alone["accuracy"] == float(sample["acc"])
        if "acc_norm" in sample:
            same &= alone["accuracy_norm"] == float(sample["acc_norm"])
        if not same or max(gaps) > 1e-3:
            differ += 1
            print(f"  item {number}: {mine} {sample['filtered_resps']} {sample['arguments']}")
    print(f"  items that differ: {differ}; largest difference of a log-likelihood: {largest:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="the converted folder that the harness has scored")
    args = parser.parse_args()
    if args.model is None:
        write_tasks(args.source, args.folder)
        return
    model = load_model(args.model, dtype=torch.float32)
    for name in SOURCES:
        compare(name, args.source, args.folder, model, load_tokenizer(args.model))


if __name__ == "__main__":
    main()
