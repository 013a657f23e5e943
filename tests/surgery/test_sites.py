import pytest
import torch
from torch import nn

from rankwise.errors import BankError, TargetError
from rankwise.surgery.bank import Bank
from tests.grid import relative, spec, trained
from tests.models import TASK_MODELS, output, pictures, tiny

TASK_MODELS_WITH_CLASSES = [(name, task) for task, name in TASK_MODELS if "classification" in task]


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


@pytest.mark.parametrize("preset", ["minimal", "all-linear"])
def test_a_preset_leaves_out_what_the_same_spec_trains_whole(preset):
    """A fresh pooler is a linear layer like any other, and is trained whole."""
    bert = tiny("bert", task="sequence-classification")
    with Bank(bert) as bank:
        bank.add("whole", spec(preset, modules_to_save=("pooler", "classifier")))
        sites = bank.adapter("whole").sites
        assert sites
        assert not any("pooler" in path for path in sites)
        assert set(bank.adapter("whole").modules) == {"bert.pooler", "classifier"}
    with Bank(bert) as bank:
        bank.add("usual", spec("all-linear"))
        assert any("pooler" in path for path in bank.adapter("usual").sites)
    with pytest.raises(TargetError, match="trained whole but holds targeted"):
        Bank(bert).add("named", spec(("pooler.dense",), modules_to_save=("pooler",)))


@pytest.mark.parametrize(("name", "task"), TASK_MODELS_WITH_CLASSES)
def test_no_preset_means_a_part_of_the_head(name, task):
    """RoBERTa's head has two layers, named as any other."""
    sites = Bank(tiny(name, task=task)).sites
    heads = {path for path, site in sites.items() if site.role == "head"}
    assert heads == {path for path in sites if path.split(".")[0] in ("classifier", "score")}
    assert heads


@torch.no_grad()
def test_a_model_that_says_nothing_of_ties_is_baked_all_the_same():
    model = tiny("vit", task="image-classification")
    assert not hasattr(model.config, "tie_word_embeddings")
    bank = Bank(model)
    trained(bank, "a", spec("all-linear", modules_to_save=("classifier",)))
    x = pictures(2)
    with bank.use("a"):
        want = output(model, x)
    bank.bake("a")
    assert relative(output(model, x), want) < 1e-5


def test_a_preset_leaves_out_what_is_trained_whole_and_a_name_does_not():
    with Bank(headed()) as bank:
        bank.add("a", spec("all-linear", modules_to_save=("head",)))
        assert list(bank.adapter("a").sites) == ["body"]
        assert list(bank.adapter("a").modules) == ["head"]
        with pytest.raises(TargetError, match="holds targeted"):
            bank.add("b", spec(("0",), modules_to_save=("head",)))
    with pytest.raises(TargetError, match="match no layer"):
        Bank(headed()).add("a", spec("all-linear", modules_to_save=("head", "body")))
