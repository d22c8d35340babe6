"""The losses against their formulas in float64, and the chunked form against the whole."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.optim.losses import (
    hidden_kl,
    hidden_reconstruction,
    kl_divergence,
    reconstruction_loss,
)

N, V, H = 7, 11, 5


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(1)


def naive_kl(teacher, student, tau):
    """Eq. 3 of one token, written out."""
    p = [math.exp(z / tau) for z in teacher.tolist()]
    q = [math.exp(z / tau) for z in student.tolist()]
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    return tau**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_kl_is_the_formula(rng, tau):
    teacher = torch.randn(N, V, generator=rng, dtype=torch.float64)
    student = torch.randn(N, V, generator=rng, dtype=torch.float64)
    expected = [naive_kl(t, s, tau) for t, s in zip(teacher, student, strict=True)]
    assert kl_divergence(teacher, student, tau).tolist() == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(teacher, teacher, tau).abs().max() == 0


def test_reconstruction_is_the_mean_negative_log_probability(rng):
    logits = torch.randn(N, V, generator=rng, dtype=torch.float64)
    targets = torch.randint(0, V, (N,), generator=rng)
    expected = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        expected -= row[target] - math.log(sum(math.exp(z) for z in row))
    assert reconstruction_loss(logits, targets).item() == pytest.approx(expected / N, rel=1e-6)


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_chunked_kl_and_its_gradient_equal_the_whole(rng, monkeypatch, tau, chunk):
    monkeypatch.setattr("trainer.optim.losses.CACHED_ROWS", 2)
    weight = torch.randn(V, H, generator=rng)
    teacher = torch.randn(N, H, generator=rng)
    student = torch.randn(N, H, generator=rng)
    upstream = torch.rand(N, generator=rng)

    def head(hidden):
        return hidden @ weight.T

    one, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    whole = kl_divergence(head(teacher), head(one), tau)
    chunked = hidden_kl(teacher, other, head, tau=tau, chunk=chunk)
    assert torch.allclose(whole, chunked, atol=1e-6)
    (whole * upstream).sum().backward()
    (chunked * upstream).sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-6)
    assert one.grad.abs().max() > 0


def test_chunked_reconstruction_equals_the_whole(rng):
    weight = torch.randn(V, H, generator=rng)
    states = torch.randn(N, H, generator=rng)
    targets = torch.randint(0, V, (N,), generator=rng)
    one, other = states.clone().requires_grad_(), states.clone().requires_grad_()
    whole = reconstruction_loss(one @ weight.T, targets)
    chunked = hidden_reconstruction(other, targets, lambda h: h @ weight.T, chunk=3).mean()
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    whole.backward()
    chunked.backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-6)


def test_no_gradient_is_computed_where_none_is_wanted(rng):
    weight = torch.randn(V, H, generator=rng)
    states = torch.randn(N, H, generator=rng)
    with torch.no_grad():
        kl = hidden_kl(states, states, lambda h: h @ weight.T)
    assert not kl.requires_grad
    assert kl.abs().max() == 0
