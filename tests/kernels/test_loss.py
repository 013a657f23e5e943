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


@DTYPES
def test_no_rows_give_no_losses(dtype, tolerance):
    empty = torch.empty(0, 7, dtype=dtype)
    assert cross_entropy(empty, torch.empty(0, dtype=torch.long), torch.empty(0)).shape == (0,)


@DTYPES
@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17])
def test_few_classes_are_served(classes, dtype, tolerance):
    logits, targets = torch.randn(4, classes).to(dtype), torch.arange(4) % classes
    want = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, targets).double(), want, rtol=1e-5, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("floats", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_targets_and_weights_of_any_type_and_layout_mean_the_same(integers, floats, dtype, tolerance):
    """The compiled kernel reads eight bytes a target and four a weight, whatever lies there."""
    logits, targets = torch.randn(9, 50).to(dtype), torch.randint(50, (9,))
    weights = torch.tensor([0.5, 0.25, 1.0] * 3)
    spent = logits.clone()
    want = cross_entropy(spent, targets, weights)
    other = logits.clone()
    gaps_t, gaps_w = torch.zeros(18, dtype=integers), torch.zeros(18, dtype=floats)
    gaps_t[::2], gaps_w[::2] = targets.to(integers), weights.to(floats)
    assert torch.equal(cross_entropy(other, gaps_t[::2], gaps_w[::2]), want)
    assert torch.equal(other, spent)


@DTYPES
def test_logits_that_lie_otherwise_in_memory_are_spent_in_place_too(dtype, tolerance):
    logits, targets, weights = torch.randn(9, 50).to(dtype), torch.randint(50, (9,)), torch.rand(9)
    dense, turned = logits.clone(), logits.t().contiguous().t()
    want = cross_entropy(dense, targets, weights)
    torch.testing.assert_close(cross_entropy(turned, targets, weights), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned, dense, rtol=2 * tolerance, atol=1e-6)


@DTYPES
def test_a_gradient_of_what_is_not_a_number_is_none_and_stays_in_its_row(dtype, tolerance):
    logits = torch.randn(3, 40).to(dtype)
    logits[1, 7] = torch.nan
    cross_entropy(logits, torch.zeros(3, dtype=torch.long), torch.ones(3))
    assert logits.isnan().any(1).tolist() == [False, True, False]
    assert logits[1].isnan().all()


@DTYPES
@pytest.mark.parametrize("target", [0, 1])
def test_an_infinite_logit_gives_no_finite_loss(target, dtype, tolerance):
    logits = torch.tensor([[0.0, torch.inf, 0.0]]).to(dtype)
    assert not cross_entropy(logits, torch.tensor([target])).isfinite().any()


@DTYPES
def test_large_logits_neither_overflow_nor_vanish(dtype, tolerance):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-100.0, -100.0, -100.0]]).to(dtype)
    want = F.cross_entropy(logits.double(), torch.tensor([1, 2]), reduction="none")
    found = cross_entropy(logits.clone(), torch.tensor([1, 2]), torch.ones(2))
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


@DTYPES
@pytest.mark.parametrize("target", [-1, 5, 10**9])
def test_a_target_that_is_no_class_is_an_error_and_no_walk_through_memory(target, dtype, tolerance):
    with pytest.raises((IndexError, RuntimeError), match="5"):
        cross_entropy(torch.randn(2, 5).to(dtype), torch.tensor([0, target]))
