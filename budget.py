"""What a run may cost. --tokens sets how much text the model is healed on, and thereby how much
work the scan, the validation and the evaluation may take:

    scan          at most a half of healing's work
    validation    at most a tenth
    evaluation    at most a quarter

or their smallest useful forms. Each has a ladder of sizes and takes the last rung that its share
allows, at least the first. Linear maps (fit.py) take a fixed amount, since on less text they do
harm. --minutes finds the number of tokens for which the whole run takes that long.

Work is counted, not timed, so that a run repeats on any machine. One token through all layers is 1;
one token of healing is 6 (the teacher; the student, forward and back). A trial of the scan runs the
layers from its own on, (n - i) / n. Where text is judged, the output heads of both models are
added, by their size, and their softmaxes.

Seconds follow from two rates of this machine, of a forward pass and of a step of healing: one can
be fast (bf16 products in AMX, say) where the other is not.
"""

import bisect
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from config import default_window
from distill import Healing, Optimizer, distillation, prepare
from hub import read_json, require, write_json
from machine import gather, is_main_process, rank_and_world
from measure import LEAST_WRITTEN, RECALL_DEPTHS, RECALL_LENGTHS
from model import Model, convert
from terminal import clock, progress, say
from text import CONTEXT

HEALING = 6  # the work of a token that is healed on
DECODING = 7_000  # the work of timing three models as they decode; a constant
WRITING = 40_000  # that of writing with three models, if enough text is judged for it
LEAST_STEPS = 8  # of healing, for which --minutes must have room
MEASURING = 2.0  # seconds in which the speed of this machine is measured
SUSTAINED = 0.9  # of that speed, since a processor slows down once it is warm

# Sequences, the tokens of each, prompts of the recall measure.
SCANS = (
    (1, 1024, {512: 2}),
    (2, 1024, {512: 2, 1024: 1}),
    (2, 1024, {512: 2, 1024: 2, 2048: 1}),
    (2, 2048, {512: 2, 1024: 2, 2048: 2}),
    (2, 2048, {512: 2, 1024: 2, 2048: 2, 4096: 1}),
    (4, 2048, {512: 4, 1024: 4, 2048: 4, 4096: 4}),
)

SCAN_TOKENS = SCANS[-1][0] * SCANS[-1][1]  # at most, in a scan

# WEIGHING, FITTING and SOFTMAX lie between what two processors took (results/work.py).
SERVED = 8192  # tokens at most of the text on which windows are weighed
WEIGHING = 2  # the work per token of it

FITTED = 28  # tokens per input that a linear map is fitted on
FITTING = 1.5  # the work per token of it

SOFTMAX = 400  # the work of a softmax over the vocabulary, as columns of an output head

# Validations, and the sequences of each.
VALIDATIONS = (2, 1), (4, 1), (6, 1), (8, 2), (8, 3), (8, 4)

# Sequences, passkeys at each length, the greatest length.
EVALUATIONS = (2, 5, 512), (2, 5, 1024), (2, 5, 2048), (4, 5, 2048), (8, 10, 2048), (16, 20, 4096)


@dataclass
class Budget:
    """The sizes of a run that heals on `tokens` tokens, and the work of its parts: scan, healing,
    validation, evaluation. `sequences` and `passkeys` are kept if they are given."""

    tokens: int
    n_layers: int
    reach: int  # positions of the model
    heads: float  # the work of two output heads and their softmaxes on a token
    measures: list[str]  # of the scan
    scans: bool = True  # False where the plan, or a scan, is given
    served: int = 0  # tokens of the text that the scan weighs windows on
    inputs: int = 0  # of the linear maps, 0 where none are fitted
    removes: bool = False  # whether the plan will have X layers
    sequences: int | None = None  # to evaluate on
    passkeys: int | None = None  # at each of `recall_lengths`

    def __post_init__(self):
        self.context = min(CONTEXT, self.reach)  # tokens of a sequence to evaluate on
        self.healing = HEALING * self.tokens

        self.fitted = FITTED * self.inputs  # tokens

        self.scan_size = climb(SCANS, self.scan_work, self.healing / 2)
        self.scan = self.scan_work(*self.scan_size) if self.scans else 0.0
        scan_sequences, scan_context, prompts = self.scan_size
        self.calibration = (scan_sequences, min(scan_context, self.reach))  # [N, T]
        self.prompts = self.within_reach(prompts)

        validation = climb(VALIDATIONS, self.validation_work, self.healing / 10)
        self.validation = self.validation_work(*validation)
        self.validations, self.watched = validation

        farthest = max(RECALL_LENGTHS)
        rungs = [
            (self.sequences or count, self.passkeys or keys, farthest if self.passkeys else longest)
            for count, keys, longest in EVALUATIONS
        ]
        evaluation = climb(rungs, self.evaluation_work, self.healing / 4)
        self.evaluation = self.evaluation_work(*evaluation)
        self.sequences, self.passkeys, longest = evaluation
        self.recall_lengths = self.lengths_to(longest)

    def settle(self, sequences: int, fitted: int) -> None:
        """Counts what text there is: sequences to judge on, and tokens to fit maps on."""
        self.fitted = min(self.fitted, fitted)
        self.sequences = min(self.sequences, sequences)
        self.watched = min(self.watched, sequences)
        longest = self.recall_lengths[-1]
        self.validation = self.validation_work(self.validations, self.watched)
        self.evaluation = self.evaluation_work(self.sequences, self.passkeys, longest)

    @property
    def maps(self) -> float:
        """The work of fitting maps before healing, where both models read the text."""
        return (1 + FITTING) * self.fitted * self.removes

    @property
    def total(self) -> float:
        parts = self.scan, self.healing, self.maps, self.validation, self.evaluation
        return sum(parts) + DECODING

    def scan_work(self, sequences: int, context: int, prompts: dict, first: int = 0) -> float:
        """Of the layers from `first` on: two passes of the base, two trials a layer. Every fourth
        position is judged."""
        n = self.n_layers
        passes = 2 + sum(2 * (n - i) / n for i in range(first, n))
        judging = (1 + 2 * (n - first)) * self.heads / 4
        work = FITTING * self.fitted + WEIGHING * self.served
        if "kl" in self.measures:
            work += sequences * min(context, self.reach) * (passes + judging)
        if "recall" in self.measures:
            prompts = self.within_reach(prompts)
            work += sum(length * count for length, count in prompts.items()) * passes
        return work

    def validation_work(self, count: int, sequences: int) -> float:
        """The teacher reads the sequences once, the student each time."""
        return (count + 1) * sequences * self.context * (1 + self.heads)

    def evaluation_work(self, sequences: int, passkeys: int, longest: int) -> float:
        """One process measures three models while the others wait."""
        prompts = max(1, passkeys // len(RECALL_DEPTHS)) * len(RECALL_DEPTHS)
        text = sequences * self.context * (1 + self.heads)
        writing = WRITING if sequences >= LEAST_WRITTEN else 0
        reading = 3 * (text + prompts * sum(self.lengths_to(longest)))
        return (reading + writing) * rank_and_world()[1]

    def within_reach(self, prompts: dict[int, int]) -> dict[int, int]:
        return {length: count for length, count in prompts.items() if length <= self.reach}

    def lengths_to(self, longest: int) -> tuple[int, ...]:
        return tuple(length for length in RECALL_LENGTHS if length <= min(longest, self.reach))


def fits_maps(args) -> bool:
    """Whether a run may have an X layer with a linear map, or scans for one."""
    return args.removed == "linear" and (args.plan is None or "X" in args.plan)


def weighs_windows(args) -> bool:
    """Whether the plan's budget also chooses the window."""
    return args.window is None and args.plan is None and "keep" not in args.limits


def recomputes(args, window: int, model: Model) -> bool:
    """Whether to use activation checkpointing: as asked, else for windows beyond the default, whose
    activations take gigabytes."""
    wide = window > default_window(model.config)
    return wide if args.activation_checkpointing is None else args.activation_checkpointing


def climb(rungs, work, limit: float):
    """The last rung whose work is within the limit, at least the first."""
    fitting = [rung for rung in rungs if work(*rung) <= limit]
    return fitting[-1] if fitting else rungs[0]


class Rates(NamedTuple):
    """What all processes together do in a second."""

    work: float
    healing: float  # tokens that are healed on

    def seconds(self, work: float, healed: int = 0) -> float:
        return work / self.work + healed / self.healing

    def of(self, budget: Budget) -> float:
        """Seconds of a whole run."""
        return self.seconds(budget.total - budget.healing, budget.tokens)


def make_budget(model: Model, args, step: int, rates: Rates) -> Budget:
    """The budget of --tokens, or of --minutes at these rates: then OUT/budget.json keeps the tokens
    for when the run is repeated. step: tokens of a step of healing. Raises InputError for too few
    minutes."""
    blocks = sum(parameter.numel() for parameter in model.layers.parameters())
    shape = {
        "n_layers": len(model.layers),
        "reach": model.config.max_position_embeddings,
        "heads": 2 * len(model.head) * (model.config.hidden_size + SOFTMAX) / blocks,
        "measures": args.measure,
        "scans": not (args.plan or args.scan),
        "served": min(args.workload[1], SERVED) if weighs_windows(args) else 0,
        "inputs": model.config.hidden_size if fits_maps(args) else 0,
        "removes": args.drop != 0 if args.plan is None else "X" in args.plan,
        "sequences": args.sequences,
        "passkeys": args.passkeys,
    }
    if args.minutes is None:
        return Budget(args.tokens, **shape)

    path = Path(args.out) / "budget.json"
    made = read_json(path) if path.exists() else {}
    if made.get("minutes") != args.minutes:
        tokens = tokens_in(args.minutes, rates, step, shape)
        made = {"minutes": args.minutes, "tokens": tokens, "rates": rates._asdict()}
        if is_main_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, made)
    return Budget(made["tokens"], **shape)


def tokens_in(minutes: float, rates: Rates, step: int, shape: dict) -> int:
    """The tokens, in whole steps, for which a run of this shape takes at most so many minutes."""

    def needed(tokens: int) -> float:
        return rates.of(Budget(tokens, **shape)) / 60

    choices = range(LEAST_STEPS * step, 10**10, step)
    fitting = bisect.bisect_right(choices, minutes, key=needed)
    require(
        fitting,
        f"--minutes {minutes:g}: too few for the smallest run on this machine; "
        f"give {math.ceil(needed(choices[0]))} or more",
    )
    return choices[fitting - 1]


# --- said at the start -------------------------------------------------------------------------


def announce(model: Model, budget: Budget, rates: Rates, scanned: int, tokens: int, args) -> None:
    """Says what is going to happen and about how long it will take. scanned: layers that an earlier
    run has measured; tokens: of healing."""
    n = len(model.layers)
    ((name, limit),) = args.limits.items()
    kept = f"that keeps {args.keep} layers, drops {args.drop}"
    if name != "keep":
        kept = f"of {name} {limit:g}"
    if args.plan:
        first = f"1. plan      {args.plan}, as given"
    elif scanned == n:
        first = f"1. plan      one {kept}, from a scan made before"
    else:
        scanning = budget.scan_work(*budget.scan_size, scanned)
        first = f"1. scan      {2 * (n - scanned)} trials"
        first += f", then a plan {kept}   about {clock(rates.seconds(scanning))}"
    healing = clock(rates.seconds(budget.maps + budget.validation, budget.tokens))
    evaluation = clock(rates.seconds(budget.evaluation + DECODING))
    watched = f"{budget.validations} validations on {budget.watched * budget.context:,} tokens"
    text = f"{budget.sequences * budget.context:,} tokens"
    passkeys = f"{budget.passkeys} passkeys at each length to {budget.recall_lengths[-1]:,}"

    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    say(
        f"{args.model}: {n} layers, {parameters:.1f}M parameters, {args.dtype} on {args.device}; "
        f"reads {rates.work:,.0f} tokens/s here, heals on {rates.healing:,.0f}",
        first,
        f"2. heal      {tokens:,} tokens, {watched}   about {healing}",
        f"3. evaluate  three models on {text} and {passkeys}   about {evaluation}"
        + (" and the task files" if args.tasks else ""),
        f"All goes to {args.out}. Ctrl-C is safe: the same command goes on where it stopped.",
    )


def measure_rates(model: Model, settings: Healing, args) -> Rates:
    """The rates of forward passes and of steps of healing that this machine sustains, from the
    medians of a few. The first of each is slower, and left out unless it takes so long that there
    is no second. Most layers of the student are linear, with a window such as a plan has, since
    the time of a step depends on that."""
    tokens = min(1024, model.config.max_position_embeddings)
    text = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)

    n = len(model.layers)
    window = args.window
    if window is None:
        window = (2 if weighs_windows(args) else 1) * default_window(model.config)
    student = convert(model, ("LLSLL" * n)[:n], window)
    student.recompute = recomputes(args, window, model)
    optimizer = Optimizer(prepare(student, settings))
    for parameter in optimizer.trained.values():
        parameter.requires_grad_(True)
    shape = (settings.together, settings.context)
    read = torch.zeros(shape, dtype=torch.int64, device=model.device)

    rounds: list[tuple[float, float]] = []  # seconds of a pass and of a step
    began = time.perf_counter()
    for t in progress(range(1, 8), desc="measuring this machine"):
        start = time.perf_counter()
        with torch.inference_mode():
            float(model.hidden(text).sum())
        between = time.perf_counter()
        loss = distillation(model, student, read)
        optimizer.step(0.0, t)
        float(loss)
        end = time.perf_counter()
        rounds.append((between - start, end - between))
        if end - began > MEASURING * (1 if rounds[1:] else 4):
            break
    passing, stepping = map(statistics.median, zip(*(rounds[1:] or rounds)))
    own = SUSTAINED * tokens / passing, SUSTAINED * read.numel() / stepping
    return Rates(*map(sum, zip(*gather(own))))
