import pytest
import torch
from torch import nn

from rankwise.surgery.bank import Bank
from tests.grid import relative, spec, state_of, trained


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_torchs_encoder_layer_sees_the_adapter(padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 5, 8)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    asked = {"src_key_padding_mask": mask} if padded else {}
    shown = ~mask
    clean, before, fast = model(x, **asked), state_of(model), model.use_nested_tensor
    bank = Bank(model)
    trained(bank, "a", spec(("linear1", "linear2")))
    with bank.use("a"):
        adapted = model(x, **asked)
    bank.merge("a")
    merged = model(x, **asked)
    assert relative(adapted[shown], clean[shown]) > 0.05
    assert relative(merged[shown], adapted[shown]) < 1e-5
    bank.close()
    assert torch.equal(model(x, **asked), clean)
    assert state_of(model) == before
    assert model.use_nested_tensor == fast
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
