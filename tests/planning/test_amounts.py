import pytest

from rankwise.planning.amounts import read_amount, shown


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24GB", 24e9), ("1.5 gb", 1.5e9), ("800MiB", 800 * 2**20), ("2T", 2e12), ("1024", 1024)],
)
def test_amounts_are_read(text, size):
    assert read_amount(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "24 GIBs", "1e9", "GB"])
def test_what_is_no_amount_is_told(text):
    with pytest.raises(ValueError, match="expected one such as 24GiB"):
        read_amount(text)


def test_amounts_are_shown():
    assert [shown(size) for size in (0, 999, 1000, 31_500_000, 999_700_000, 112e9)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "31.5 MB",
        "1.00 GB",
        "112 GB",
    ]
