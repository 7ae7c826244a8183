"""Healing: the converted model learns to answer as the original did, on about 10M tokens of any text.

The teacher is the original model. The student is the same weights under a plan (`convert` shares the tensors), with
low-rank adapters on every linear layer, so one copy of the weights serves both. Three stages share the token budget:

1. attention transfer: each L layer reads what the teacher's layer reads, and its feature map and tail logit learn to give
   what the teacher's attention gives: mean |student - teacher|^2 / mean |teacher|^2 (LoLCATs, arXiv 2410.10254, 3.2).
   The layers are independent, so each one's gradient is taken at once and nothing is kept.
2. distillation: KL(teacher || student) on the next-token distribution (arXiv 1503.02531), training the adapters
   (LoRA, arXiv 2106.09685: W x + 2 B A x, with B started at zero) and the tails. Sequences are short, one a step: this loss
   is so clean that the number of steps counts for more than their size (results/healing.md).
3. the same loss on long sequences, training the tails alone: a tail's weight grows with the tokens in it, and what it should
   weigh after thousands cannot be learned from hundreds.

A stage ends with the average of its weights (`Optimizer`), since they circle around what they have learned.

A run of N tokens is a fixed list of steps: step i reads sequences that depend on the seed alone, so a run that goes on from
a checkpoint ends with the same weights as one that was never stopped. Its first two stages begin the longer runs too: one
that has ended can go on to a larger N, and one that takes too long can end at a smaller (N of 60 short steps or more, since
less would be all warm-up). Under torchrun every process holds the model, takes its share of a step's sequences, and the
gradients are summed (data parallelism: the adapters are all that travels).
"""

import gzip
import json
import math
import signal
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from attention import Linear
from kernels import sliced_kl
from model import InputError, Model, Tokenizer, from_hub, write_file

C4 = "hub:allenai/c4/en/c4-train.00000-of-01024.json.gz"         # the text to heal on when none is named
TEXT_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json.gz")
AVERAGE = 3                     # how late steps count in the average of a stage's weights
STEADY = 600                    # steps of a stage up to which its rate stays


class Diverged(RuntimeError):
    """The loss became infinite or not a number."""


# --- text to sequences -------------------------------------------------------------------------------------------

def read_documents(source: str, flag: str = "--data"):
    """Yields the texts of a .txt file, the `text` fields of a .jsonl, .jsonl.gz or .json.gz file, those of a folder of
    such files in the order of their names, or of `hub:OWNER/DATASET/FILE`. Raises InputError naming the file and line."""
    if source.startswith("hub:"):
        owner, dataset, file = (source[4:].split("/", 2) + ["", ""])[:3]
        if not file.endswith(TEXT_SUFFIXES):
            raise InputError(f"{flag} {source}: give hub:OWNER/DATASET/FILE, the file one of {', '.join(TEXT_SUFFIXES)}")
        source = from_hub(hf_hub_download, f"{flag} {source}", repo_id=f"{owner}/{dataset}", filename=file,
                          repo_type="dataset")
    path = Path(source)
    files = sorted(f for f in path.rglob("*") if f.name.endswith(TEXT_SUFFIXES)) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise InputError(f"{flag} {source}: no such file, or a folder without {', '.join(TEXT_SUFFIXES)} files")
    for file in files:
        if file.suffix == ".txt":
            yield file.read_text(encoding="utf-8", errors="replace")
            continue
        if not file.name.endswith(TEXT_SUFFIXES):
            raise InputError(f"{flag} {file}: give a .txt, .jsonl, .jsonl.gz or .json.gz file, or a folder of them")
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            number = 1
            try:
                for number, line in enumerate(lines, 1):
                    text = json.loads(line)["text"]
                    if not isinstance(text, str):
                        raise TypeError
                    yield text
            except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error):
                raise InputError(f"{flag} {file}: line {number}: not a JSON object with a `text` field") from None


def pack(documents, tokenizer: Tokenizer, eos: tuple[int, ...], context: int, tokens: int | None = None) -> Tensor:
    """Joins documents with an end-of-text token after each and cuts them into sequences: [N, context] int64, at most
    `tokens` tokens in all (rounded up to whole sequences). What is left of the last document is dropped."""
    wanted = math.inf if tokens is None else -(-tokens // context) * context
    ids: list[int] = []
    with tqdm(total=wanted, desc="reading text", unit="tok", unit_scale=True, leave=False) as bar:
        for text in documents:
            before = len(ids)
            ids += tokenizer.encode(text) + list(eos[:1])
            bar.update(len(ids) - before)
            if len(ids) >= wanted:
                break
    count = int(min(len(ids), wanted)) // context
    return torch.tensor(ids[:count * context], dtype=torch.int64).view(count, context)


# --- adapters ----------------------------------------------------------------------------------------------------

class LoRALinear(nn.Module):
    """A frozen linear layer and a trained low-rank one beside it: W x + 2 B A x."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        device = linear.weight.device
        self.linear = linear
        start = torch.randn(rank, linear.in_features, generator=generator) * linear.in_features ** -0.5
        self.A = nn.Parameter(start.to(device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.A.to(x.dtype).T) @ (2 * self.B).to(x.dtype).T

    def merged(self) -> Linear:
        weight = (self.linear.weight.float() + 2 * self.B @ self.A).to(self.linear.weight.dtype)
        linear = Linear(self.linear.in_features, self.linear.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.linear.bias
        return linear


def replace_linears(model: nn.Module, kind: type, make) -> None:
    """Puts make(module) in the place of every module of this kind inside the blocks."""
    for parent in [m for m in model.layers.modules() if not isinstance(m, LoRALinear)]:
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                setattr(parent, name, make(child))


def add_adapters(model: Model, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    replace_linears(model, nn.Linear, lambda linear: LoRALinear(linear, rank, generator))


@torch.no_grad()
def merge_adapters(model: Model) -> None:
    """W + 2 B A becomes the weight. The original's tensors, which the adapters stood on, are left as they are."""
    replace_linears(model, LoRALinear, LoRALinear.merged)


# --- several processes -------------------------------------------------------------------------------------------

def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this is: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes; they travel as one."""
    if dist.is_initialized() and tensors:
        joined = torch.cat([x.flatten().float() for x in tensors])
        dist.all_reduce(joined)
        for x, total in zip(tensors, joined.split([x.numel() for x in tensors])):
            x.copy_(total.view_as(x))


def gather(item) -> list:
    """The items of all processes, in the order of their ranks."""
    items = [item]
    if dist.is_initialized():
        items = [None] * dist.get_world_size()
        dist.all_gather_object(items, item)
    return items


# --- the healing run ---------------------------------------------------------------------------------------------

@dataclass
class Healing:
    """The settings of a run. A checkpoint goes on only under the same ones, but for `tokens`."""
    tokens: int = 10_000_000            # all that the three stages train on
    transfer_steps: int = 10            # of attention transfer
    warm_up: int = 20                   # steps in which the rate of stage 2 rises
    long_share: float = 0.1             # of all tokens, for stage 3
    rank: int = 16                      # of the adapters; ignored by `full`
    full: bool = False                  # train every weight instead
    lr: float = 1e-3
    tail_lr: float = 1e-2               # where the tails learn alone
    context: int = 512                  # tokens a sequence
    long_context: int = 4096            # the same in stage 3
    batch: int = 1                      # sequences a step, over all processes
    micro_batch: int | None = None      # sequences that go through the model at a time, if fewer
    seed: int = 0

    def __post_init__(self):
        if self.batch % rank_and_world()[1]:
            raise InputError(f"--batch {self.batch}: give a multiple of the {rank_and_world()[1]} processes")
        long_steps = round(self.long_share * self.tokens / (self.batch * self.long_context))
        self.short_steps = (self.tokens - long_steps * self.batch * self.long_context) // (self.batch * self.context)
        if self.short_steps < 1:
            raise InputError(f"--tokens {self.tokens}: a step takes {self.batch * self.context:,}; give at least as many")
        self.transfer_steps, self.warm_up = (min(n, self.short_steps // 3) for n in (self.transfer_steps, self.warm_up))
        self.steps = self.short_steps + long_steps
        self.longest = self.long_context if long_steps else self.context    # tokens of the longest sequences
        self.trained_tokens = self.tokens_after(self.steps)                 # the budget in whole steps

    def tokens_after(self, step: int) -> int:
        return self.batch * (min(step, self.short_steps) * self.context + max(0, step - self.short_steps) * self.long_context)

    def stage(self, step: int) -> tuple[int, int, float]:
        """The first step of the stage that this one is in, the first after it, and the stage's learning rate."""
        if step < self.transfer_steps:
            return 0, self.transfer_steps, self.tail_lr
        if step < self.short_steps:
            return self.transfer_steps, self.short_steps, self.lr
        return self.short_steps, self.steps, self.tail_lr

    def learning_rate(self, step: int) -> float:
        """A stage stays at its rate up to its step STEADY and falls as 1 / sqrt(t) from there on. Stage 2 warms up before, for a
        number of steps that does not depend on its length, since the average (`Optimizer`) is its result at any step; the others
        for a twentieth of theirs."""
        first, last, peak = self.stage(step)
        t, warm_up = step - first + 1, self.warm_up if first == self.transfer_steps else (last - first) // 20
        return peak * min(1.0, t / max(1, warm_up), (STEADY / t) ** 0.5)

    def validates(self, step: int) -> bool:
        """Ten times in a run, before it, between the stages, and at its end."""
        return step % max(1, self.steps // 10) == 0 or step in (self.transfer_steps, self.short_steps, self.steps)

    def read(self, step: int, train: Tensor) -> Tensor:
        """The sequences of a step [batch, tokens]: passes over all of `train` [N, context], each in an order of its own; in
        stage 3 over the same text in longer sequences."""
        tokens, before = (self.long_context, self.short_steps) if step >= self.short_steps else (self.context, 0)
        count = train.numel() // tokens
        order = lambda i: torch.randperm(count, generator=torch.Generator().manual_seed(self.seed + i))
        positions = range((step - before) * self.batch, (step - before + 1) * self.batch)
        passes = {i // count: order(i // count) for i in positions}
        rows = torch.stack([passes[i // count][i % count] for i in positions])
        return train.flatten()[:count * tokens].view(count, tokens)[rows]


def tail_names(student: Model) -> set[str]:
    """The parameters of the L layers' tails that can learn, by their names in the model."""
    return {f"layers.{i}.self_attn.{name}" for i, tier in enumerate(student.plan) if tier == "L"
            for name in student.layers[i].self_attn.tail_parameters()}


def heal(teacher: Model, student: Model, train: Tensor, valid: Tensor, settings: Healing, checkpoint: Path,
         identity: dict, checkpoint_every: float = 180.0) -> dict:
    """Heals `student` in place and merges its adapters. Returns the curve: under `train` the loss of every step (stage 1's
    is the transfer error), under `valid` pairs of tokens seen and KL on `valid`.

    teacher: the original; student: `convert(teacher, plan)`; train, valid [N, context] ids. The run is saved to
    `checkpoint` every `checkpoint_every` seconds, at Ctrl-C (then KeyboardInterrupt is raised) and at its end, and goes on
    from there; `identity` says what else must be the same for that (the model, the plan, the data). What stage 2 ends with is kept
    beside it, for a run of more tokens to go on from.
    Raises Diverged when the loss is not finite, InputError when the checkpoint was made with other settings or is past `tokens`.
    """
    tails = tail_names(student)
    if settings.full:
        for name, parameter in list(student.named_parameters()):       # the teacher keeps the original tensors
            parent, _, leaf = name.rpartition(".")
            setattr(student.get_submodule(parent), leaf, nn.Parameter(parameter.detach().clone()))
    else:
        add_adapters(student, settings.rank, settings.seed)
    learns = lambda name: name in tails or name.endswith((".A", ".B")) or settings.full and not name.endswith("_map")
    trained = {name: parameter for name, parameter in student.named_parameters() if learns(name)}
    student.requires_grad_(False)
    optimizer = Optimizer(trained)
    identity = json.loads(json.dumps({**identity, **asdict(settings), "average": AVERAGE, "steady": STEADY}))
    distilled = checkpoint.with_name(f"{checkpoint.stem}-distilled.safetensors")
    saved_state = find_checkpoint([checkpoint, distilled], settings, identity)
    step, curve = optimizer.load(saved_state) if saved_state else (0, {"train": [], "valid": []})

    rank, world = rank_and_world()
    targets = [(ids, teacher.hidden(ids)) for ids in valid.to(teacher.device)[rank::world].split(4) if len(ids)]
    stop, saved = Interrupt(), time.monotonic()
    tokens = settings.tokens_after
    with stop, tqdm(total=tokens(settings.steps), initial=tokens(step), desc="healing", unit="tok", unit_scale=True) as bar:
        while True:
            if settings.validates(step) and not (curve["valid"] and curve["valid"][-1][0] == tokens(step)):
                optimizer.exchange()
                curve["valid"].append([tokens(step), validation_kl(student, teacher.head, targets)])
                optimizer.exchange()
                first, kl = curve["valid"][0][1], curve["valid"][-1][1]
                bar.write(f"  {tokens(step):>10,} tokens   validation KL {kl:.4f}  {'█' * round(32 * min(1.0, kl / max(first, 1e-9)))}")
            asked = torch.tensor(float(stop.asked), device=teacher.device)
            sum_over_processes([asked])                         # all stop before the same step
            if rank == 0 and (step == settings.steps or asked or time.monotonic() - saved > checkpoint_every):
                optimizer.save(checkpoint, step, curve, identity)
                saved = time.monotonic()
            if rank == 0 and step == settings.short_steps < settings.steps:
                optimizer.save(distilled, step, curve, identity)
            if asked:
                raise KeyboardInterrupt
            if step in (settings.transfer_steps, settings.short_steps, settings.steps):
                optimizer.end_stage()
            if step == settings.steps:
                break
            transfer = step < settings.transfer_steps
            tails_alone = transfer or step >= settings.short_steps
            for name, parameter in trained.items():
                parameter.requires_grad_(not tails_alone or name in tails)
            ids = settings.read(step, train)[rank::world].to(teacher.device)
            loss = torch.zeros((), device=teacher.device)
            for part in ids.split(settings.micro_batch or len(ids)):
                loss += (attention_transfer if transfer else distillation)(teacher, student, part, len(part) / settings.batch)
            sum_over_processes([loss] + [p.grad for p in trained.values() if p.grad is not None])
            loss = float(loss)
            if not math.isfinite(loss):
                hint = "" if tails_alone else "; try a lower --lr"
                raise Diverged(f"the loss is {loss} at step {step} ({tokens(step):,} tokens){hint}")
            optimizer.step(settings.learning_rate(step), step - settings.stage(step)[0] + 1)
            step += 1
            curve["train"].append(round(loss, 5))
            bar.set_postfix_str(f"{'transfer error' if transfer else 'KL'} {loss:.4f}")
            bar.update(tokens(step) - bar.n)
    if not settings.full:
        merge_adapters(student)
    student.requires_grad_(False)
    student.config.healed_context = settings.longest
    return curve


def find_checkpoint(paths: list[Path], settings: Healing, identity: dict) -> Path | None:
    """The first of these files that a run can go on from, None where there is none yet: it was made with the same tokens, or has not
    gone beyond the second stage, neither its own nor that of `settings`."""
    done = 0
    for path in filter(Path.exists, paths):
        try:
            with safe_open(path, framework="pt") as file:
                made_with, step = json.loads(file.metadata()["identity"]), int(file.metadata()["step"])
        except SafetensorError as error:
            raise InputError(f"{path}: cannot be read as safetensors ({error}); delete it to start anew") from None
        for key in identity:
            if key != "tokens" and made_with.get(key) != identity[key]:
                raise InputError(f"{path}: was made with {key} = {made_with.get(key)}, not {identity[key]}; repeat that "
                                 "command to go on, or give another --out, or delete the file")
        made = replace(settings, tokens=made_with["tokens"])
        if made.tokens == settings.tokens or step <= min(made.short_steps, settings.short_steps):
            return path
        done = max(done, made.tokens_after(step))
    if done:
        raise InputError(f"--tokens {settings.tokens}: the run in {paths[0].parent} is at {done:,} tokens; give more, or another --out")
    return None


def attention_transfer(teacher: Model, student: Model, ids: Tensor, weight: float = 1.0) -> Tensor:
    """Adds the gradients of stage 1 and returns its error, averaged over the L layers and the sequences; both times `weight`."""
    errors = [torch.zeros((), device=ids.device)]
    rotary = teacher.rotary(ids.shape[1])
    x = teacher.embed_tokens(ids)
    for i, (ours, theirs) in enumerate(zip(student.layers, teacher.layers)):
        if student.plan[i] == "L":
            normed = theirs.input_layernorm(x)
            with torch.no_grad():
                target = theirs.self_attn(normed, rotary).float()
            error = (ours.self_attn(normed, rotary).float() - target).square().mean((1, 2)) / target.square().mean((1, 2))
            error = error.mean() * weight / student.plan.count("L")
            error.backward()
            errors.append(error.detach())
        with torch.no_grad():
            x = teacher.run_layers(x, i, i + 1)
    return torch.stack(errors).sum()


def distillation(teacher: Model, student: Model, ids: Tensor, weight: float = 1.0) -> Tensor:
    """Adds the gradients of stage 2 and returns its loss, KL(teacher || student) per token; both times `weight`."""
    with torch.no_grad():
        target = teacher.hidden(ids)
    loss = weight * sliced_kl(student.hidden(ids).flatten(0, 1), target.flatten(0, 1), student.head, teacher.head)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def validation_kl(student: Model, teacher_head: Tensor, targets: list[tuple[Tensor, Tensor]]) -> float:
    """KL per token over pairs of ids [B, T] and the teacher's hidden states [B, T, hidden_size], those of all processes."""
    total = torch.zeros(2, device=teacher_head.device)                     # nats, tokens
    for ids, target in targets:
        kl = sliced_kl(student.hidden(ids).flatten(0, 1), target.flatten(0, 1), student.head, teacher_head)
        total += torch.stack((kl * ids.numel(), torch.tensor(float(ids.numel()), device=kl.device)))
    sum_over_processes([total])
    return float(total[0] / total[1])


class Optimizer:
    """AdamW (arXiv 1711.05101) without weight decay, gradients clipped to norm 1, in float32: a bf16 weight that `full`
    trains has a float32 master here. Its whole state goes into one safetensors file.

    Beside the weights w_t it keeps their average, in which step t of a stage counts about as t^AVERAGE (arXiv 1212.1824, section 4):

        average_t = (1 - c) average_{t-1} + c w_t      c = (AVERAGE + 1) / (AVERAGE + t)

    w_t soon only circles around a point that moves on slowly; the average is that point (results/healing.md).
    """

    def __init__(self, trained: dict[str, nn.Parameter]):
        self.trained = trained
        self.masters = {name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
                        for name, p in trained.items()}
        self.averages = {name: master.detach().clone() for name, master in self.masters.items()}
        self.adam = torch.optim.AdamW(self.masters.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self, learning_rate: float, t: int = 1) -> None:
        """With the gradients of the t-th step of a stage, from 1 on; at the first the average is the weight itself."""
        for name, parameter in self.trained.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        self.adam.step()
        for name, master in self.masters.items():
            if master.grad is not None:
                self.averages[name].lerp_(master, (AVERAGE + 1) / (AVERAGE + t))
        self.adam.zero_grad(set_to_none=True)
        self.publish()

    @torch.no_grad()
    def exchange(self) -> None:
        """The averages become the weights, and the weights are kept in their place."""
        for name, master in self.masters.items():
            weight = master.clone()
            master.copy_(self.averages[name])
            self.averages[name].copy_(weight)
        self.publish()

    @torch.no_grad()
    def end_stage(self) -> None:
        """The averages become the weights, for good."""
        for name, master in self.masters.items():
            master.copy_(self.averages[name])
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        for name, parameter in self.trained.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def save(self, path: Path, step: int, curve: dict, identity: dict) -> None:
        tensors = {name: master.detach() for name, master in self.masters.items()}
        tensors |= {f"{name}/average": average for name, average in self.averages.items()}
        for name, master in self.masters.items():
            tensors |= {f"{name}/{key}": x for key, x in self.adam.state[master].items()}
        metadata = {"step": str(step), "curve": json.dumps(curve), "identity": json.dumps(identity)}
        write_file(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @torch.no_grad()
    def load(self, path: Path) -> tuple[int, dict]:
        with safe_open(path, framework="pt") as file:
            metadata, stored = file.metadata(), set(file.keys())
            for name, master in self.masters.items():
                master.copy_(file.get_tensor(name))
                self.averages[name].copy_(file.get_tensor(f"{name}/average"))
                if f"{name}/step" in stored:                    # a parameter that has been stepped
                    self.adam.state[master] = {key: file.get_tensor(f"{name}/{key}").to(master.device) for key in ("step", "exp_avg", "exp_avg_sq")}
        self.publish()
        return int(metadata["step"]), json.loads(metadata["curve"])


class Interrupt:
    """Turns the first Ctrl-C into a request that the loop answers between two steps; a second one stops at once."""

    asked = False

    def __enter__(self):
        self.previous = signal.signal(signal.SIGINT, self.ask)

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.previous)

    def ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("stopping after this step ...")
