import pytest
from torch import nn

from rankwise.errors import BankError, TargetError
from rankwise.surgery.bank import Bank
from tests.grid import spec


def model() -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))})


def headed() -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.ReLU())})


def test_a_module_trained_whole_cannot_hold_another():
    with pytest.raises(TargetError, match=r"'head\.0'.*inside 'head'"):
        Bank(headed()).add("a", spec(("body",), modules_to_save=("head", "head.0")))


@pytest.mark.parametrize("names", [("head", "head.0"), ("head.0", "head")])
def test_nor_one_of_another_adapter(names):
    with Bank(headed()) as bank:
        bank.add("a", spec(("body",), modules_to_save=names[:1]))
        with pytest.raises(BankError, match=r"'head'.*'head\.0'"):
            bank.add("b", spec(("body",), modules_to_save=names[1:]))


def test_a_module_with_running_statistics_cannot_be_trained_whole():
    with pytest.raises(TargetError, match=r"'head'.*1\.running_mean"):
        Bank(model()).add("a", spec(("body",), modules_to_save=("head",)))
    Bank(model()).add("a", spec(("body",), modules_to_save=("head.0",)))


def test_a_preset_leaves_out_what_is_trained_whole_and_a_name_does_not():
    with Bank(headed()) as bank:
        bank.add("a", spec("all-linear", modules_to_save=("head",)))
        assert list(bank.adapter("a").sites) == ["body"]
        assert list(bank.adapter("a").modules) == ["head"]
        with pytest.raises(TargetError, match="holds targeted"):
            bank.add("b", spec(("0",), modules_to_save=("head",)))
    with pytest.raises(TargetError, match="match no layer"):
        Bank(headed()).add("a", spec("all-linear", modules_to_save=("head", "body")))
