"""PEFT's folders, made by PEFT, with the ΔW that PEFT has for them; and a small UNet of diffusers."""

from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from rankwise.jobs.convert import Conversion, run_conversion
from rankwise.jobs.watch import Quiet

PATTERNS: dict[str, Any] = {  # another rank and another alpha here and there, and the root of the rank
    "r": 4,
    "lora_alpha": 6,
    "use_rslora": True,
    "rank_pattern": {r"^.*1.*q(_proj)?": 2, r"^.*v_proj": 5},
    "alpha_pattern": {r"^.*0.*k_proj": 7, r"^.*o_proj": 1},
}


@torch.no_grad()
def peft_folder(folder: Path, model: nn.Module, **config: Any) -> dict[str, Tensor]:
    """Saves an adapter with every tensor drawn anew; gives PEFT's ΔW of every layer, in the layout of its weight."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    generator = torch.Generator().manual_seed(5)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator).abs() + 0.1)
    wrapped.save_pretrained(folder)
    return deltas(wrapped)


@torch.no_grad()
def deltas(wrapped: nn.Module) -> dict[str, Tensor]:
    """PEFT's ΔW by the path of the layer."""
    found = {}
    for path, module in wrapped.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) and hasattr(module, "get_delta_weight"):
            name = module.active_adapters[0]
            if name in module.scaling:
                found[path.removeprefix("base_model.model.")] = module.get_delta_weight(name)
    return found


def convert(source: Path, to: str | None, out: Path, **asked: Any) -> dict[str, Any]:
    return run_conversion(source, to, out, Quiet(), Conversion(**asked))


def unet() -> nn.Module:
    """A UNet of diffusers with convolutions and attention to a text, small."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()
