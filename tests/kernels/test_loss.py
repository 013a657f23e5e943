import pytest
import torch
import torch.nn.functional as F

from rankwise.kernels.loss import cross_entropy

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=["fp32", "bf16"]
)


@DTYPES
@pytest.mark.parametrize("classes", [2, 100, 1003])
def test_losses_and_gradient_equal_float64_autograd(classes, dtype, tolerance):
    torch.manual_seed(0)
    logits = (4 * torch.randn(37, classes, dtype=torch.float64)).to(dtype)
    targets, weights = torch.randint(classes, (37,)), torch.rand(37)
    exact = logits.double().requires_grad_()
    want = F.cross_entropy(exact, targets, reduction="none")
    (want * weights.double()).sum().backward()
    spent = logits.clone()
    losses = cross_entropy(spent, targets, weights)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), want.detach(), rtol=1e-5, atol=1e-5)
    assert (spent.double() - exact.grad).norm() <= tolerance * exact.grad.norm()


@DTYPES
def test_without_weights_the_logits_are_left_alone(dtype, tolerance):
    logits = torch.randn(5, 33).to(dtype)
    before = logits.clone()
    cross_entropy(logits, torch.arange(5))
    assert torch.equal(logits, before)


@DTYPES
def test_not_a_number_stays_in_its_row(dtype, tolerance):
    logits = torch.randn(3, 40).to(dtype)
    logits[1, 7] = torch.nan
    losses = cross_entropy(logits, torch.zeros(3, dtype=torch.long))
    assert losses.isnan().tolist() == [False, True, False]


@DTYPES
def test_minus_infinity_is_a_class_that_cannot_be(dtype, tolerance):
    logits = torch.tensor([[0.0, -torch.inf, 0.0]]).to(dtype)
    torch.testing.assert_close(cross_entropy(logits, torch.tensor([0])), torch.tensor([0.693147]))
