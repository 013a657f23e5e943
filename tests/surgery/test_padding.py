"""What layers do beside their weight: rows that are padding, convolutions that PEFT has no words for."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from rankwise.errors import RankwiseWarning
from rankwise.surgery.bank import Bank
from tests.grid import spec, trained

IDS = torch.tensor([[0, 1, 2], [0, 3, 0]])


def embedding() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 6, padding_idx=0))


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_a_row_that_is_padding_learns_nothing_as_in_peft(form):
    theirs = get_peft_model(embedding(), LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    theirs(IDS).square().sum().backward()
    (slope,) = [p.grad for name, p in theirs.named_parameters() if "embedding_A" in name]
    assert not slope[:, 0].any()
    assert slope[:, 1].any()
    model = embedding()
    with Bank(model) as bank:
        trained(bank, "a", spec(("0",), form=form))
        A = bank.adapter("a").sites["0"].A.requires_grad_(True)
        with bank.use("a"):
            model(IDS).square().sum().backward()
        assert not A.grad[:, 0].any()
        assert A.grad[:, 1].any()


CONVOLUTIONS = {
    "plain": ({"padding": 1}, False),
    "circular": ({"padding": 1, "padding_mode": "circular"}, True),
    "dilated": ({"padding": 2, "dilation": 2}, True),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_that_peft_would_apply_otherwise_is_told_of_when_it_is_saved(name, tmp_path, recwarn):
    settings, differs = CONVOLUTIONS[name]
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, **settings))
    with Bank(model) as bank:
        trained(bank, "a", spec(("0",)))
        bank.save("a", tmp_path)
        with bank.use("a"), torch.no_grad():
            ours = model(x)
    told = [str(one.message) for one in recwarn if one.category is RankwiseWarning]
    assert [("neither dilation nor a padding mode" in text) for text in told] == [True] * differs
    try:
        with torch.no_grad():
            same = torch.allclose(PeftModel.from_pretrained(model, tmp_path)(x), ours, atol=1e-5)
    except RuntimeError:  # of its sizes
        same = False
    assert same is not differs


def test_the_digest_of_what_is_loaded_is_that_of_what_was_saved(tmp_path):
    """Its scale, 6/√2, is no number of few digits, and a file has its alpha."""
    model = nn.Sequential(nn.Linear(6, 5))
    with Bank(model) as bank:
        trained(bank, "a", spec(("0",), scaling="alpha/sqrt(r)", rank=2))
        bank.save("a", tmp_path)
        bank.load("b", tmp_path)
        assert bank.adapter("b").digest() == bank.adapter("a").digest()
