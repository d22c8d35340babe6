"""The losses of the paper as pure tensor functions. Shapes: N tokens, V vocabulary, H hidden size."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Head = Callable[[Tensor], Tensor]
CACHED_ROWS = 8
"""Rows of logits whose passes stay in a CPU's cache."""


def reconstruction_loss(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Eq. 1 and 2, as a mean: cross-entropy in nats a token of the text under teacher forcing."""
    return F.cross_entropy(logits_NV.float(), targets_N)


def kl_divergence(teacher_NV: Tensor, student_NV: Tensor, tau: float = 1.0) -> Tensor:
    """Eq. 3 before its mean: tau^2 KL(softmax(teacher / tau) || softmax(student / tau)) [N].

    The factor tau^2 keeps the size of the gradient independent of tau.
    """
    log_p = F.log_softmax(teacher_NV.float() / tau, dim=-1)
    log_q = F.log_softmax(student_NV.float() / tau, dim=-1)
    return tau * tau * (log_p.exp() * (log_p - log_q)).sum(-1)


def hidden_kl(teacher_NH: Tensor, student_NH: Tensor, head: Head, *, tau: float = 1.0, chunk: int = 256) -> Tensor:
    """`kl_divergence` of two sets of final hidden states [N], exact, without all logits in memory."""

    def loss(at: slice, logits_nV: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_nV = head(teacher_NH[at].to(student_NH.device, student_NH.dtype))
        kl_n: Tensor = _KL.apply(teacher_nV, logits_nV, tau)
        return kl_n

    return token_losses(student_NH, head, loss, chunk)


def hidden_reconstruction(student_NH: Tensor, targets_N: Tensor, head: Head, *, chunk: int = 256) -> Tensor:
    """Cross-entropy [N] of Eq. 1 and 2 from final hidden states, without all logits in memory."""

    def loss(at: slice, logits_nV: Tensor) -> Tensor:
        return F.cross_entropy(logits_nV.float(), targets_N[at], reduction="none")

    return token_losses(student_NH, head, loss, chunk)


def token_losses(student_NH: Tensor, head: Head, loss: Callable[[slice, Tensor], Tensor], chunk: int) -> Tensor:
    """A loss a token [N] of the head's logits, `chunk` x V numbers at a time.

    The head is frozen, so the gradient with respect to each state is known in the
    forward pass and is kept in place of the logits; the backward pass only scales it.
    """
    losses: Tensor = _TokenLosses.apply(student_NH, head, loss, chunk)
    return losses


class _KL(torch.autograd.Function):  # type: ignore[misc]
    """`kl_divergence` with its gradient in closed form, a few tokens at a time.

    The gradient with respect to the student's logits is tau (q - p). Ten passes over all logits in float32 took
    as long as the layers of a small model with a large vocabulary; in rows that fit the cache they do not.
    """

    @staticmethod
    def forward(ctx, teacher_NV, student_NV, tau):  # type: ignore[no-untyped-def]
        losses, grads = [], torch.empty_like(student_NV) if ctx.needs_input_grad[1] else None
        rows = CACHED_ROWS if student_NV.device.type == "cpu" else max(len(student_NV), 1)
        for start in range(0, len(student_NV), rows):
            at = slice(start, start + rows)
            log_p, log_q = (torch.log_softmax(logits[at].float() / tau, -1) for logits in (teacher_NV, student_NV))
            p = log_p.exp()
            losses.append(tau * tau * (p * log_p.sub_(log_q)).sum(-1))
            if grads is not None:
                grads[at] = log_q.exp_().sub_(p).mul_(tau)
        ctx.save_for_backward(grads)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def]
        (unit_NV,) = ctx.saved_tensors
        return None, unit_NV * grad_N[:, None].to(unit_NV.dtype), None


class _TokenLosses(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx, student_NH, head, loss, chunk):  # type: ignore[no-untyped-def]
        values, grads = [], []
        for start in range(0, len(student_NH), chunk):
            at = slice(start, start + chunk)
            with torch.enable_grad():
                states = student_NH[at].detach().requires_grad_(ctx.needs_input_grad[0])
                losses = loss(at, head(states))
                if states.requires_grad:
                    grads.append(torch.autograd.grad(losses.sum(), states)[0])
            values.append(losses.detach())
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        return torch.cat(values)

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def]
        (unit_NH,) = ctx.saved_tensors
        return (unit_NH * grad_N[:, None]).to(unit_NH.dtype), None, None, None
