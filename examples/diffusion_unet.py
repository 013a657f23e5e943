"""LoRA on a diffusion UNet, its attention and its convolutions: a denoiser of squares learns discs.

    python examples/diffusion_unet.py

Pictures are drawn here, nothing is downloaded.  A small UNet of diffusers first learns to find the noise in pictures of
squares: that is the base.  An adapter on it then learns discs, which the base has never seen.  Held-out discs say, one
by one and with the same noise for both, what the adapter is worth; it is saved, loaded, merged and taken out of the
weights again, and the base is what it was, to the bit.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

import rankwise as rw
from rankwise.engine.paired import Difference, paired_difference

SIZE, BATCH = 16, 16
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut")
NOISE = DDPMScheduler(num_train_timesteps=100, beta_end=0.1)


def pictures(shape: str, count: int, seed: int) -> Tensor:
    """`[count, 1, SIZE, SIZE]`: bright on dark, anywhere, of any size."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(3, count, 1, 1, generator=generator)
    radius, x, y = 2 + 3 * draw[0], 2 + 12 * draw[1], 2 + 12 * draw[2]
    across, down = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="xy")
    u, v = (across - x).abs(), (down - y).abs()
    distance = torch.maximum(u, v) if shape == "square" else (u**2 + v**2).sqrt()
    return ((radius - distance).clamp(-0.5, 0.5) * 2).unsqueeze(1)


def unet() -> UNet2DModel:
    """What Stable Diffusion's UNet is made of, very small."""
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def losses(model: UNet2DModel, clean: Tensor, generator: torch.Generator) -> Tensor:
    """How badly the noise is found, for each picture: `[N]`."""
    noise = torch.randn(clean.shape, generator=generator)
    times = torch.randint(NOISE.config.num_train_timesteps, (len(clean),), generator=generator)
    found = model(NOISE.add_noise(clean, noise, times), times).sample
    return (found - noise).square().mean(dim=(1, 2, 3))


def learn(model: UNet2DModel, parameters: Iterable[nn.Parameter], shape: str, steps: int, lr: float) -> None:
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(parameters, lr=lr)
    for step in range(steps):
        losses(model, pictures(shape, BATCH, seed=step), generator).mean().backward()
        optimiser.step()
        optimiser.zero_grad()


@torch.no_grad()
def measure(model: UNet2DModel, shape: str) -> Tensor:
    """The loss of each of 100 held-out pictures, the mean over four noises that are always the same: `[100]`."""
    clean, generator = pictures(shape, 100, seed=10**6), torch.Generator().manual_seed(1)
    return torch.stack([losses(model, clean, generator) for _ in range(4)]).mean(0)


def compare(first: Tensor, second: Tensor) -> Difference:
    """The mean difference over pictures, with the interval that resampling them gives."""
    return paired_difference(first.double().numpy(), second.double().numpy(), torch.ones(len(first)).numpy())


def main(folder: Path, base_steps: int = 250, steps: int = 200) -> dict[str, Difference]:
    torch.manual_seed(0)
    model = unet()
    learn(model, model.parameters(), "square", base_steps, lr=2e-3)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with rw.Bank(model) as bank:
        bank.add("discs", rw.LoraSpec(rank=8, alpha=16, targets=ADAPTED))
        with bank.use("discs"):
            learn(model, [p for _, p in bank.named_parameters("discs")], "disc", steps, lr=2e-3)
        bank.save("discs", folder)

        found = {}
        for shape in ("disc", "square"):
            before = measure(model, shape)  # outside any route the base answers
            with bank.use("discs"):
                found[shape] = compare(measure(model, shape), before)
            print(f"held-out {shape}s: base {before.mean():.4f}, adapter minus base {told(found[shape])}")

        bank.load("again", folder)
        with bank.use("discs"):
            kept = measure(model, "disc")
        with bank.use("again"):
            assert torch.equal(measure(model, "disc"), kept)
        report = bank.merge("again")
        torch.testing.assert_close(measure(model, "disc"), kept, rtol=1e-4, atol=1e-5)
        bank.unmerge()
        print(f"saved, loaded, merged into {report.layers} layers, and out again")

    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    print("the base is what it was, to the bit")
    return found


def told(difference: Difference) -> str:
    return f"{difference.mean:+.4f}, 95 % between {difference.low:+.4f} and {difference.high:+.4f}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
