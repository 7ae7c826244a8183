"""KL(teacher || student), how far a model's next-token distribution is from the original's: the
scan measures it, and healing lowers it. Logits over a vocabulary of V tokens are large, so they
are computed for a slice of positions at a time.
"""

import functools

import torch
from torch import Tensor


def logit_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v p_v (log p_v - log q_v); logits [rows, V] -> nats [rows]."""
    log_q = student.log_softmax(-1, dtype=torch.float32)
    log_p = teacher.log_softmax(-1, dtype=torch.float32)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def logit_kl_gradient(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and its gradient with respect to the student's logits: q - p, [rows, V] in their
    dtype."""
    log_q = student.log_softmax(-1, dtype=torch.float32)
    log_p = teacher.log_softmax(-1, dtype=torch.float32)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), (log_q.exp() - p).to(student.dtype)


@functools.cache
def compiled(function):
    """Compiled, the passes over [rows, V] become two or three."""
    return torch.compile(function, dynamic=False)


def slice_rows(device: torch.device) -> int:
    """Positions whose logits exist at one time: few enough for a CPU's caches, many enough to fill
    a GPU."""
    return 64 if device.type == "cpu" else 512


class SlicedKL(torch.autograd.Function):
    """KL(teacher || student) summed over positions, from hidden states, a slice of positions at a
    time. The gradient is computed in the forward pass, while the slice's logits exist, so no
    tensor of [tokens, V] is ever alive."""

    @staticmethod
    def forward(ctx, student, teacher, student_head, teacher_head, compile):
        kl_and_gradient = compiled(logit_kl_gradient) if compile else logit_kl_gradient
        gradient = torch.empty_like(student)
        total = torch.zeros((), device=student.device)
        rows = slice_rows(student.device)

        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            student_logits = student[part] @ student_head.T  # (rows, V)
            kl, grad_logits = kl_and_gradient(student_logits, teacher[part] @ teacher_head.T)
            total += kl.sum()
            gradient[part] = grad_logits @ student_head

        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None


def sliced_kl(
    student: Tensor,
    teacher: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    compile: bool = False,
) -> Tensor:
    """Mean KL(teacher || student) per token. student, teacher [N, d]: hidden states after the final
    norm; the heads [V, d]. Gradients reach `student` alone."""
    total = SlicedKL.apply(student, teacher, student_head, teacher_head, compile)
    return total / len(student)
