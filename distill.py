"""Healing: the converted model learns to predict as the original does, on up to 10M tokens of text.

The teacher is the original model. The student is the same weights under a plan (`convert` shares
the tensors), with low-rank adapters on every linear layer, so one copy of the weights serves both.
Two stages share the token budget:

1. distillation: KL(teacher || student) on the next token (arXiv 1503.02531) trains the adapters
   (LoRA, arXiv 2106.09685) and the tails. Sequences are short and a step takes one: many small
   steps learn more from the same tokens than a few large ones (results/healing.md).
2. the same loss on long sequences trains only the tails. A tail's weight grows with the number of
   tokens in it; what it should be after thousands cannot be learned from hundreds.

Each stage ends with the average of its weights (`Optimizer`).

A run of N tokens is a fixed list of steps, and what a step reads depends only on the seed. So a run
that resumes from a checkpoint ends with the same weights, bit for bit, as one that was never
stopped. It can also be extended to a larger N or cut to a smaller one, since stage 1 begins the
same way for all N. Under torchrun every process takes its share of each step's sequences, and the
gradients are summed (data parallelism).
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from adapter import add_adapters, merge_adapters, save_adapter
from divergence import sliced_kl
from hub import InputError, content_hash, open_safetensors, require, save_safetensors
from machine import Diverged, gather, rank_and_world, sum_over_processes
from measure import hidden_states, kl_by_position
from model import Model
from terminal import Interrupt, progress, say

EPS = 1e-15  # of Adam: smaller than the gradient of a faint tail's b
AVERAGE = 3  # step t of a stage counts as t^AVERAGE in the average of its weights
STEADY = 600  # steps of a stage at its full learning rate
CHECKPOINT_SECONDS = 180  # between two checkpoints


@dataclass
class Healing:
    """The settings of a run. A checkpoint resumes only under the same ones, but for `tokens` and
    `validations`."""

    tokens: int = 10_000_000  # that both stages train on, in all
    warm_up: int = 20  # steps in which the learning rate of stage 1 rises
    long_share: float = 0.1  # of the tokens, for stage 2
    rank: int = 16  # of the adapters
    lr: float = 1e-3  # of stage 1
    tail_lr: float = 1e-2  # of stage 2, where the tails learn alone
    context: int = 512  # tokens of a sequence in stage 1
    long_context: int = 4096  # the same in stage 2
    batch: int = 1  # sequences of a step, over all processes
    validations: int = 8  # at most, over the run
    compile: bool = False  # run the KL, and the blocks of stage 1, through torch.compile
    seed: int = 0

    def __post_init__(self):
        world = rank_and_world()[1]
        require(
            self.batch % world == 0,
            f"--batch {self.batch}: give a multiple of the {world} processes",
        )

        short = self.batch * self.context  # tokens of a step
        long = self.batch * self.long_context
        long_steps = round(self.long_share * self.tokens / long)
        self.short_steps = (self.tokens - long_steps * long) // short
        require(
            self.short_steps > 0,
            f"--tokens {self.tokens}: a step is {short:,}; give at least as many",
        )

        self.steps = self.short_steps + long_steps
        self.stage_ends = (self.short_steps, self.steps)
        self.trained_tokens = self.tokens_after(self.steps)
        self.longest = self.long_context if long_steps else self.context
        self.together = self.batch // world

    def tokens_after(self, step: int) -> int:
        """Tokens in the first `step` steps."""
        short = min(step, self.short_steps)
        return self.batch * (short * self.context + (step - short) * self.long_context)

    def stage(self, step: int) -> tuple[int, int, float]:
        """The stage of a step: its first step, the first one after it, its learning rate."""
        if step < self.short_steps:
            return 0, self.short_steps, self.lr
        return self.short_steps, self.steps, self.tail_lr

    def validates(self, step: int) -> bool:
        """Whether to validate before this step: before the run and at its end; from three
        validations on, also between the stages and evenly in between."""
        spans = self.validations - 2
        if spans < 1:
            return step in (0, self.steps)
        return step % math.ceil(self.steps / spans) == 0 or step in self.stage_ends

    def learning_rate(self, step: int) -> float:
        """The rate of a stage's t-th step, t from 1 on: the warm-up and the fall of arXiv
        1706.03762, section 5.3, with a plateau between them.

            rate_t = peak * min(1, t / warm_up, sqrt(STEADY / t))

        In stage 1 nothing depends on the stage's length, so a longer run begins like a shorter one.
        Stage 2 warms up for a twentieth of its steps.
        """
        first, last, peak = self.stage(step)
        t = step - first + 1
        warm_up = (last - first) // 20 if first else self.warm_up
        return peak * min(1.0, t / max(1, warm_up), (STEADY / t) ** 0.5)

    def read(self, step: int, train: Tensor) -> Tensor:
        """The sequences of a step, [batch, tokens], from train [N, context]: pass after pass over
        all of it, each in its own order. Stage 2 reads the same text in longer sequences."""
        long = step >= self.short_steps
        first = self.short_steps if long else 0
        tokens = self.long_context if long else self.context
        count = train.numel() // tokens
        sequences = train.flatten()[: count * tokens].view(count, tokens)

        rows = []
        for i in range((step - first) * self.batch, (step - first + 1) * self.batch):
            generator = torch.Generator().manual_seed(self.seed + i // count)
            order = torch.randperm(count, generator=generator)
            rows.append(order[i % count])
        return sequences[torch.stack(rows)]


# --- the run -----------------------------------------------------------------------------------


def heal(
    teacher: Model,
    student: Model,
    train: Tensor,
    valid: Tensor,
    settings: Healing,
    checkpoint: Path,
    identity: dict,
) -> dict:
    """Heals `student` in place and merges its adapters. Returns the curve: under `train` the loss
    of every step, under `valid` pairs of tokens seen and KL, under `sequences` the number of
    sequences in that KL.

    teacher: the original; student: `convert(teacher, plan)`; train, valid: ids [N, context].
    The run is saved to `checkpoint` every CHECKPOINT_SECONDS, at Ctrl-C (which then raises
    KeyboardInterrupt) and at its end, and resumes from there if `identity` (the model, the plan,
    the data) is the same. The previous checkpoint is kept, in case this one is damaged, and so is
    the end of stage 1, for a run of more tokens. Raises Diverged if the loss is not finite,
    InputError if the checkpoint was made with other settings or is past `tokens`.
    """
    run = Run(teacher, student, valid, settings, checkpoint, identity)
    if settings.compile:
        teacher.compiled_shapes.add((settings.together, settings.context))

    seen = settings.tokens_after(run.step)
    total = settings.trained_tokens
    bar = progress(total=total, initial=seen, desc="healing", unit="tok", unit_scale=True)
    saved = time.monotonic()
    with bar, Interrupt() as interrupt:
        while True:
            if settings.validates(run.step):
                bar.set_postfix_str("validating")
                run.validate()

            ended = run.step == settings.steps
            stopped = any(gather(interrupt.asked))  # all processes stop before the same step
            if ended or stopped or time.monotonic() - saved > CHECKPOINT_SECONDS:
                run.save(run.checkpoint)
                saved = time.monotonic()
            if run.step == settings.short_steps and not ended:
                run.save(run.distilled)
            if stopped:
                raise KeyboardInterrupt

            if run.step in settings.stage_ends:
                run.optimizer.end_stage()
            if ended:
                break

            loss = run.train(train)
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update(settings.tokens_after(run.step) - settings.tokens_after(run.step - 1))

    run.finish()
    return run.curve


class Run:
    """The state of a run: the two models, the optimizer, the number of steps done, the curve."""

    def __init__(self, teacher, student, valid, settings, checkpoint, identity):
        self.teacher = teacher
        self.student = student
        self.settings = settings
        self.optimizer = Optimizer(prepare(student, settings))
        self.start = {name: x.detach().clone() for name, x in self.optimizer.trained.items()}
        self.tails = tail_names(student)
        self.step = 0
        self.curve = {"train": [], "valid": [], "sequences": len(valid)}

        self.checkpoint, self.before, self.distilled = checkpoint_files(checkpoint)
        fixed = {"average": AVERAGE, "steady": STEADY, "stages": len(settings.stage_ends)}
        everything = identity | asdict(settings) | fixed
        self.identity = json.loads(json.dumps(everything))  # as a checkpoint gives it back
        path, state, tensors = find_checkpoint(checkpoint, settings, self.identity)
        if path:
            self.load(path, state, tensors)
        self.is_sound = path == checkpoint  # what is there, so that it may replace the one before

        rank, world = rank_and_world()
        share = valid[rank::world].to(teacher.device).split(4)
        parts = [ids for ids in share if len(ids)]
        self.targets = list(zip(parts, hidden_states(teacher, parts)))

    def load(self, path: Path, state: dict, tensors: dict[str, Tensor]) -> None:
        own = self.optimizer.state().items()
        fits = all(name in tensors and tensors[name].shape == x.shape for name, x in own)
        require(fits, f"{path}: holds other tensors than this run learns; delete it to start anew")
        self.optimizer.load(tensors)
        self.step = state["step"]
        curve = state["curve"]
        if curve.get("sequences") != self.curve["sequences"]:
            del curve["valid"]  # what another budget validated on does not compare
        self.curve |= curve | {"sequences": self.curve["sequences"]}
        seen = self.settings.tokens_after(self.step)
        say(f"resumed at {seen:,} of {self.settings.trained_tokens:,} tokens")

    def save(self, path: Path) -> None:
        """Writes a checkpoint. A sound one is first renamed to be the previous one, so that there
        is a whole one at every moment."""
        if rank_and_world()[0] > 0:
            return
        state = {"step": self.step, "curve": self.curve, "identity": self.identity}
        metadata = {name: json.dumps(value) for name, value in state.items()}
        tensors = self.optimizer.state()
        metadata["hash"] = content_hash(tensors, metadata)
        if path == self.checkpoint and self.is_sound:
            os.replace(path, self.before)
            self.is_sound = False
        save_safetensors(tensors, path, metadata)
        self.is_sound |= path == self.checkpoint

    @torch.no_grad()
    def validate(self) -> None:
        """Adds KL(teacher || student) per token, with the averaged weights, to the curve."""
        curve = self.curve["valid"]
        seen = self.settings.tokens_after(self.step)
        if curve and curve[-1][0] == seen:  # from the checkpoint
            return

        self.optimizer.exchange()
        total = torch.zeros(2, device=self.teacher.device)  # nats, tokens
        for ids, target in self.targets:
            hidden = self.student.hidden(ids)
            kl = kl_by_position(hidden, target, self.student.head, self.teacher.head)  # (B, T)
            total[0] += kl.sum()
            total[1] += kl.numel()
        sum_over_processes([total])
        self.optimizer.exchange()

        kl = float(total[0] / total[1])
        curve.append([seen, kl])
        share = min(1.0, kl / max(curve[0][1], 1e-9))
        say(f"  {seen:>10,} tokens   validation KL {kl:.4f}  {'█' * round(32 * share)}")

    def train(self, train: Tensor) -> float:
        """One step on its sequences of train [N, context]. Returns the loss."""
        settings = self.settings
        trained = self.optimizer.trained
        tails_alone = self.step >= settings.short_steps
        for name, parameter in trained.items():
            parameter.requires_grad_(not tails_alone or name in self.tails)

        rank, world = rank_and_world()
        ids = settings.read(self.step, train)[rank::world].to(self.teacher.device)
        share = len(ids) / settings.batch
        total = distillation(self.teacher, self.student, ids, share, settings.compile)

        gradients = [x.grad for x in trained.values() if x.grad is not None]
        sum_over_processes([total, *gradients])
        loss = float(total)
        if not math.isfinite(loss):
            seen = settings.tokens_after(self.step)
            hint = "--dtype float32 or another --feature-map" if tails_alone else "a lower --lr"
            raise Diverged(f"the loss is {loss} at step {self.step} ({seen:,} tokens); try {hint}")

        t = self.step - settings.stage(self.step)[0] + 1
        self.optimizer.step(settings.learning_rate(self.step), t)
        self.step += 1
        self.curve["train"].append(round(loss, 5))
        return loss

    @torch.no_grad()
    def finish(self) -> None:
        """Writes what was learned to adapter.safetensors and merges it into the weights. If
        validation says that healing did harm, as a few steps can on a plan of little damage, the
        initial values, which change nothing, take its place."""
        student, settings = self.student, self.settings
        student.config.healed_context = settings.longest
        (seen, first), (_, last) = self.curve["valid"][0], self.curve["valid"][-1]
        if seen == 0 and last > first:
            say(
                f"Healing did harm (validation KL {first:.4f} -> {last:.4f}): what it learned is "
                "left out, the model is as converted. More --tokens or a lower --lr may heal it."
            )
            for name, x in self.optimizer.trained.items():
                x.copy_(self.start[name])
        path = self.checkpoint.with_name("adapter.safetensors")
        save_adapter(self.teacher, student, settings.rank, path)

        parts = [ids for ids, _ in self.targets]
        unmerged = hidden_states(student, parts)
        merge_adapters(student)
        student.requires_grad_(False)
        if parts:
            head, merged = student.head, map(student.hidden, parts)
            kl = torch.cat([kl_by_position(x, y, head, head) for x, y in zip(merged, unmerged)])
            kl = max(0.0, float(kl.mean()))  # rounding can make it less
            how = "each weight rounded once"
            say(f"Merging the adapters, {how}, changes the model by KL {kl:.1e}.")


def checkpoint_files(path: Path) -> tuple[Path, Path, Path]:
    """The checkpoint of a run, the previous one, and the one at the end of stage 1."""
    before, distilled = (f"{path.stem}-{name}.safetensors" for name in ("before", "distilled"))
    return path, path.with_name(before), path.with_name(distilled)


def read_checkpoint(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The state and the tensors in a checkpoint. Raises InputError for one that is damaged."""
    fix = "delete it to start anew"
    with open_safetensors(path, fix) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    intact = metadata.pop("hash", None) == content_hash(tensors, metadata)
    require(intact, f"{path}: is damaged: its content and its hash differ; {fix}")
    return {name: json.loads(value) for name, value in metadata.items()}, tensors


def find_checkpoint(checkpoint: Path, settings: Healing, identity: dict) -> tuple:
    """The first checkpoint that the run can resume from, with its content: one made with the same
    budget, or one that is not past stage 1 of either budget. One that is damaged, or differs in
    more than the budget, is named and skipped. (None, {}, {}) if there is no file; InputError if
    there are files and none will do."""
    done, wrong = 0, []
    for path in filter(Path.exists, checkpoint_files(checkpoint)):
        try:
            state, tensors = read_checkpoint(path)
            check_identity(path, state["identity"], identity)
        except InputError as error:
            wrong.append(error)
            continue

        made = replace(settings, tokens=state["identity"]["tokens"])
        least = min(made.short_steps, settings.short_steps)
        if made.tokens == settings.tokens or state["step"] <= least:
            say(*wrong, *[f"the one before it is used: {path}"] * bool(wrong))
            return path, state, tensors
        done = max(done, made.tokens_after(state["step"]))

    if wrong:
        raise wrong[0]
    require(
        not done,
        f"--tokens {settings.tokens}: the run in {checkpoint.parent} is at {done:,} tokens; "
        "give more, or another --out",
    )
    return None, {}, {}


def check_identity(path: Path, made_with: dict, identity: dict) -> None:
    """Raises InputError naming the first thing but the budget that differs."""
    for key, value in identity.items():
        require(
            key in ("tokens", "validations") or made_with.get(key) == value,
            f"{path}: was made with {key} = {made_with.get(key)}, not {value}; repeat that "
            "command to go on, or give another --out, or delete the file",
        )


def healed_tokens(checkpoint: Path) -> tuple[int, int]:
    """How many tokens a run has trained on at a checkpoint, and how many it will in all."""
    state, _ = read_checkpoint(checkpoint)
    made_with = state["identity"]
    settings = Healing(**{field.name: made_with[field.name] for field in fields(Healing)})
    return settings.tokens_after(state["step"]), settings.trained_tokens


def healing_bytes(model: Model, settings: Healing) -> tuple[int, int]:
    """A lower bound of what healing takes, in memory besides the model and on disk: the merged
    weights; for the adapters their weights, average, two moments and, in memory, gradients, all
    float32; and the residual stream of every layer on the longest sequences."""
    weights, adapters = 0, 0
    for x in model.layers.parameters():
        if x.ndim == 2:
            weights += x.numel() * x.element_size()
            adapters += settings.rank * sum(x.shape) * 4
    tokens = settings.longest * settings.together
    stream = len(model.layers) * tokens * model.config.hidden_size * model.head.element_size()
    return weights + 5 * adapters + stream, weights + 4 * adapters


# --- losses ------------------------------------------------------------------------------------


def distillation(teacher: Model, student: Model, ids: Tensor, weight=1.0, compiled=False) -> Tensor:
    """Adds the gradients of weight * KL(teacher || student) per token on ids [B, T], and returns
    that value."""
    with torch.no_grad():
        target = teacher.hidden(ids).flatten(0, 1)  # (B T, d)
    hidden = student.hidden(ids).flatten(0, 1)
    loss = weight * sliced_kl(hidden, target, student.head, teacher.head, compiled)
    loss.backward()
    return loss.detach()


# --- what learns -------------------------------------------------------------------------------


def prepare(student: Model, settings: Healing) -> dict[str, nn.Parameter]:
    """Adds adapters to the student. Returns the parameters to train by name: adapters and tails."""
    add_adapters(student, settings.rank, settings.seed)
    student.requires_grad_(False)
    tails = tail_names(student)
    return {
        name: parameter
        for name, parameter in student.named_parameters()
        if name in tails or name.endswith((".A", ".B"))
    }


def tail_names(student: Model) -> set[str]:
    """The names of the trainable parameters of the tails."""
    names = set()
    for i, layer in enumerate(student.layers):
        if layer.self_attn is not None:
            names |= {f"layers.{i}.self_attn.{name}" for name in layer.self_attn.tail_parameters()}
    return names


# --- the optimizer -----------------------------------------------------------------------------


class Optimizer:
    """AdamW (arXiv 1711.05101) without weight decay, gradients clipped to norm 1. Trained
    parameters are float32, whatever the model's dtype.

    It also keeps an average of the weights w_t, in which step t of a stage counts about as
    t^AVERAGE (arXiv 1212.1824, section 4):

        average_t = (1 - c) average_{t-1} + c w_t        c = (AVERAGE + 1) / (AVERAGE + t)

    The weights soon circle around a point that moves slowly; the average is close to that point.
    """

    def __init__(self, trained: dict[str, nn.Parameter]):
        self.trained = trained
        self.averages = {name: x.detach().clone() for name, x in trained.items()}
        self.adam = torch.optim.AdamW(
            trained.values(), lr=0.0, betas=(0.9, 0.99), eps=EPS, weight_decay=0.0, fused=True
        )

    @torch.no_grad()
    def step(self, learning_rate: float, t: int) -> None:
        """Takes the t-th step of a stage, t from 1 on. What has no gradient does not change."""
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

        c = (AVERAGE + 1) / (AVERAGE + t)  # 1 at first: the average starts as the weight
        torch._foreach_lerp_(list(self.averages.values()), list(self.trained.values()), c)

    @torch.no_grad()
    def exchange(self) -> None:
        """Swaps weights and averages."""
        for name, parameter in self.trained.items():
            weight = parameter.clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(weight)

    @torch.no_grad()
    def end_stage(self) -> None:
        """Sets the weights to their averages."""
        for name, parameter in self.trained.items():
            parameter.copy_(self.averages[name])

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a step depends on: NAME, NAME/average, and Adam's NAME/exp_avg,
        NAME/exp_avg_sq and NAME/step where a step has been taken."""
        tensors = {}
        for name, parameter in self.trained.items():
            tensors[name] = parameter.detach()
            tensors[f"{name}/average"] = self.averages[name]
            for key, x in self.adam.state[parameter].items():
                tensors[f"{name}/{key}"] = x
        return tensors

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restores a `state`."""
        for name, parameter in self.trained.items():
            parameter.copy_(state[name])
            self.averages[name].copy_(state[f"{name}/average"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (x := state.get(f"{name}/{key}")) is not None:
                    self.adam.state[parameter][key] = x.to(parameter.device, copy=True)
