"""Every row through its own adapter: the compiled product, and torch's beside it, against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rankwise.kernels.grouped as grouped_module
from rankwise.kernels.grouped import Adapters, Grouped, laid_out, serves_grouped
from rankwise.kernels.library import native

SIZES = [(48, 32), (50, 39), (200, 136), (34, 17), (40, 421)]  # inputs, outputs
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3}
ROWS = (1, 2, 3, 4, 5, 7, 16, 70)


def factors(inputs: int, outputs: int, dtype: torch.dtype) -> dict[int, tuple[Tensor, Tensor, float, Tensor | None]]:
    """Of adapters 0, 1, 2 and 4: ranks that are no multiple of anything, one with a gain."""
    torch.manual_seed(0)
    found = {}
    for number, rank in ((0, 3), (1, 16), (2, 21), (4, 1)):
        A, B = torch.randn(rank, inputs, dtype=torch.float64), torch.randn(outputs, rank, dtype=torch.float64)
        gain = torch.rand(outputs, dtype=torch.float64) + 0.5 if number == 2 else None
        found[number] = (A.to(dtype) / inputs**0.5, B.to(dtype), 0.75, gain)
    return found


def case(inputs: int, outputs: int, rows: int, dtype: torch.dtype) -> tuple[Grouped, Tensor, Tensor, Adapters, Tensor]:
    """The product, its rows, what the base gives for them, their adapters, and what should come of it, in float64."""
    owned = factors(inputs, outputs, dtype)
    weight = (torch.randn(outputs, inputs, dtype=torch.float64) / inputs**0.5).to(dtype)
    bias, x = torch.randn(outputs).to(dtype), torch.randn(rows, inputs, dtype=torch.float64).to(dtype)
    numbers = [(0, -1, 1, 1, 2, 4, 3, 9)[i % 8] for i in range(rows)]  # 3 and 9 have nothing here
    base, expected = x.double() @ weight.double().t(), []
    for row, plain, number in zip(x.double(), base, numbers, strict=True):
        if number in owned:
            A, B, scale, gain = owned[number]
            plain = plain + scale * (B.double() @ (A.double() @ row))
            plain = plain if gain is None else plain * gain
        expected.append(plain + bias.double())
    lows = dict(zip(owned, laid_out(list(owned.values()), dtype), strict=True))
    adapters = Adapters.of([(number, 1) for number in numbers])
    grouped = Grouped(weight, bias, (outputs, inputs), lows)
    return grouped, x, (base + bias.double()).to(dtype), adapters, torch.stack(expected)


def apart(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_each_row_goes_through_its_own_adapter(size, dtype):
    for rows in ROWS:
        grouped, x, base, adapters, expected = case(*size, rows, dtype)
        assert apart(grouped.product(x, adapters), expected) < TOLERANCE[dtype], rows
        assert apart(grouped.added(x, base, adapters), expected) < 2 * TOLERANCE[dtype], rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it_up_to_four_or_more_than_four(dtype):
    grouped, x, _, adapters, _ = case(200, 136, 12, dtype)
    whole = grouped.product(x, adapters)
    turned = torch.arange(11, -1, -1)
    other = grouped.product(x[turned].contiguous(), Adapters.of([(adapters.of_rows[i], 1) for i in turned.tolist()]))
    assert torch.equal(other[turned], whole)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_neighbours_through_one_adapter_are_what_each_is_alone(size, dtype):
    """Runs of one to nine rows, with a gain and without: four of them are added at once."""
    numbers = [number for number, count in ((2, 9), (1, 5), (-1, 2), (2, 4), (0, 3), (1, 1)) for _ in range(count)]
    grouped, x, base, _, _ = case(*size, len(numbers), dtype)
    whole = grouped.added(x, base.clone(), Adapters.of([(number, 1) for number in numbers]))
    for i, number in enumerate(numbers):
        alone = grouped.added(x[i : i + 1], base[i : i + 1].clone(), Adapters.of([(number, 1)]))[0]
        if serves_grouped(x):
            assert torch.equal(alone, whole[i])
        else:  # torch's own products are not the same by the bit
            torch.testing.assert_close(alone, whole[i])


def test_with_no_adapter_it_is_the_layer():
    grouped, x, base, _, _ = case(48, 32, 6, torch.float64)
    none = Adapters.of([(-1, 6)])
    assert torch.equal(grouped.added(x, base.clone(), none), base)
    torch.testing.assert_close(grouped.product(x, none), base)


def test_neighbours_of_one_adapter_are_one_run():
    assert Adapters.of([(2, 3), (2, 1), (-1, 2)]).runs() == [(2, 0, 4), (-1, 4, 6)]


def test_what_is_served():
    assert not serves_grouped(torch.ones(1, dtype=torch.float64))
    assert not serves_grouped(torch.ones(1), torch.ones(1, dtype=torch.bfloat16))
    assert serves_grouped(torch.ones(1)) == (native() is not None)


@pytest.mark.skipif(native() is None, reason="only the compiled path has an order of its own")
def test_laid_out_it_is_what_torch_rounds_in_the_order_that_is_read():
    """A by sixteen rows, or eight at the end, and a vector of columns, B by sixteen outputs and a word of ranks."""
    A, B, scale = 1e-3 * torch.randn(19, 71), torch.randn(37, 19), 0.7
    B[3, 4], A[0, 0] = 1e-40, -2e-41  # denormals are numbers too

    def in_order(rows, wide):
        blocks = (rows[:16], rows[16:])
        return torch.cat([block.view(len(block), -1, wide).transpose(0, 1).reshape(-1) for block in blocks])

    (low,) = laid_out([(A, B, scale, None)], torch.bfloat16)
    assert low.rank == 19
    rows, columns = F.pad(A.bfloat16(), (0, 25, 0, 5)), F.pad((B * scale).bfloat16(), (0, 5, 0, 11))
    assert torch.equal(low.A, in_order(rows, 32))
    assert torch.equal(low.B, columns.view(3, 16, 12, 2).transpose(1, 2).reshape(-1))
    (low,) = laid_out([(A, B, scale, None)], torch.float32)
    rows, columns = F.pad(A, (0, 9, 0, 5)), F.pad(B * scale, (0, 5, 0, 11))
    assert torch.equal(low.A, in_order(rows, 16))
    assert torch.equal(low.B, columns.view(3, 16, 24).transpose(1, 2).reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_written_to_factors_later_is_not_in_what_was_laid_out(dtype, monkeypatch):
    monkeypatch.setattr(grouped_module, "native", lambda: None)
    A, B = torch.ones(4, 8, dtype=dtype), torch.ones(6, 4, dtype=dtype)
    (low,) = laid_out([(A, B, 1.0, None)], dtype)
    A.zero_(), B.zero_()
    assert low.A.min() == low.B.min() == 1


def test_bytes_that_are_held():
    (low,) = laid_out([(torch.ones(5, 64), torch.ones(32, 5), 1.0, torch.ones(32))], torch.float64)
    assert low.nbytes == 8 * (5 * 64 + 32 * 5 + 32)
