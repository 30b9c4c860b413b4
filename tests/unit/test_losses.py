"""Losses: padding never counts, and a batch of eight has the gradient of eight batches of one."""

import pytest
import torch

from qrealign.calibrate.losses import alignment_loss, divergence, reconstruction_loss


def test_padding_never_enters_the_reconstruction():
    output, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    loss = reconstruction_loss(output, target, mask)
    output[0, 3:] = 1e6
    assert torch.equal(reconstruction_loss(output, target, mask), loss)
    assert loss[0] == pytest.approx(float((output[0, :3] - target[0, :3]).square().mean()), rel=1e-6)


def test_a_batch_has_the_mean_gradient_of_its_samples():
    torch.manual_seed(0)
    weight = torch.randn(6, 6, requires_grad=True)
    x, target = torch.randn(8, 5, 6), torch.randn(8, 5, 6)
    mask = (torch.arange(5)[None] < torch.randint(2, 6, (8, 1))).long()
    reconstruction_loss(x @ weight, target, mask).mean().backward()
    together, weight.grad = weight.grad.clone(), None
    for row in range(8):
        (
            reconstruction_loss(x[row : row + 1] @ weight, target[row : row + 1], mask[row : row + 1]).mean() / 8
        ).backward()
    assert torch.allclose(weight.grad, together, rtol=1e-5, atol=1e-7)


def test_alignment_loss_falls_as_the_probe_says_malicious():
    losses = alignment_loss(torch.tensor([-5.0, 0.0, 5.0]))
    assert losses[0] > losses[1] > losses[2] > 0
    assert float(losses[1]) == pytest.approx(0.6931, abs=1e-4)


def test_divergence_is_kl():
    teacher, student = torch.randn(4, 11), torch.randn(4, 11)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher), torch.distributions.Categorical(logits=student)
    )
    assert torch.allclose(divergence(teacher, student), expected, atol=1e-5)
    assert torch.allclose(divergence(teacher, teacher), torch.zeros(4), atol=1e-6)
