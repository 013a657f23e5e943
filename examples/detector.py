"""LoRA on a detector, with its class head trained whole: a finder of squares and discs learns crosses.

    python examples/detector.py

Pictures are drawn here, nothing is downloaded.  A small YOLOS first learns to find red squares and green discs: that is
the base.  Blue crosses it has never seen; an adapter on all its linear layers and a class head of the adapter's own
learn to find them.  Held-out pictures say, one by one, what that is worth.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import YolosConfig, YolosForObjectDetection

import rankwise as rw
from rankwise.engine.paired import Difference, paired_difference

SIZE, BATCH = 32, 16
SQUARE, DISC, CROSS = range(3)
Scene = tuple[Tensor, list[dict[str, Tensor]]]


def scenes(kinds: Sequence[int], count: int, seed: int) -> Scene:
    """Noisy pictures `[count, 3, SIZE, SIZE]` with one shape in each, and labels: its class and its box."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.tensor(kinds)[torch.randint(len(kinds), (count,), generator=generator)]
    draw = torch.rand(3, count, generator=generator)
    radius = 3 + 3 * draw[0]
    x, y = radius + (SIZE - 2 * radius) * draw[1:]
    boxes = torch.stack([x, y, 2 * radius, 2 * radius], dim=-1) / SIZE

    across, down = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="xy")
    u = (across - x.view(-1, 1, 1)).abs() / radius.view(-1, 1, 1)
    v = (down - y.view(-1, 1, 1)).abs() / radius.view(-1, 1, 1)
    square, disc = torch.maximum(u, v) < 1, u**2 + v**2 < 1
    shapes = torch.stack([square, disc, square & (torch.minimum(u, v) < 0.35)])

    pictures = 0.1 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    which = torch.arange(count)
    pictures[which, kind] += shapes[kind, which].float()  # the channel is the kind: red, green or blue
    return pictures, [{"class_labels": k[None], "boxes": b[None]} for k, b in zip(kind, boxes, strict=True)]


def yolos() -> YolosForObjectDetection:
    """A vision transformer that reads patches and three detection tokens, a class head and a box head; very small."""
    config = YolosConfig(
        image_size=[SIZE, SIZE],
        patch_size=4,
        num_labels=3,
        num_detection_tokens=3,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_mid_position_embeddings=False,
        initializer_range=0.1,
    )
    return YolosForObjectDetection(config)


def learn(model: Any, parameters: Iterable[nn.Parameter], kinds: Sequence[int], steps: int, lr: float) -> None:
    kept = list(parameters)
    optimiser = torch.optim.AdamW(kept, lr=lr)
    for step in range(steps):
        pictures, labels = scenes(kinds, BATCH, seed=step)
        model(pixel_values=pictures, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(kept, 1.0)
        optimiser.step()
        optimiser.zero_grad()


@torch.no_grad()
def measure(model: Any, scene: Scene) -> Tensor:
    """The detector's own loss (class, box, overlap) on each picture: `[N]`."""
    rows = zip(scene[0].unsqueeze(1), scene[1], strict=True)
    return torch.stack([model(pixel_values=picture, labels=[label]).loss for picture, label in rows])


@torch.no_grad()
def share_found(model: Any, scene: Scene) -> float:
    """How often the query that is surest names the right class and points into the shape."""
    out = model(pixel_values=scene[0])
    sure, named = out.logits.softmax(-1)[..., :-1].max(-1)
    best, rows = sure.argmax(1), torch.arange(len(sure))
    box = torch.cat([label["boxes"] for label in scene[1]])
    inside = ((out.pred_boxes[rows, best, :2] - box[:, :2]).abs() < box[:, 2:] / 2).all(-1)
    right = named[rows, best] == torch.cat([label["class_labels"] for label in scene[1]])
    return float((right & inside).float().mean())


def main(folder: Path, base_steps: int = 800, steps: int = 400) -> Difference:
    torch.manual_seed(0)
    model = yolos()
    learn(model, model.parameters(), (SQUARE, DISC), base_steps, lr=2e-3)
    model.eval()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    known, unseen = scenes((SQUARE, DISC), 200, seed=10**6), scenes((CROSS,), 200, seed=10**6)
    first, second = share_found(model, known), share_found(model, unseen)
    print(f"the base finds {first:.0%} of squares and discs, {second:.0%} of crosses")

    with rw.Bank(model) as bank:
        spec = rw.LoraSpec(rank=8, alpha=16, targets="all-linear", modules_to_save=("class_labels_classifier",))
        bank.add("crosses", spec)
        with bank.use("crosses"):
            learn(model, [p for _, p in bank.named_parameters("crosses")], (CROSS,), steps, lr=3e-3)
        bank.save("crosses", folder)

    with rw.Bank(model) as bank:
        bank.load("again", folder)
        before = measure(model, unseen)  # outside any route the base answers
        with bank.use("again"):
            after, share = measure(model, unseen), share_found(model, unseen)
        found = paired_difference(after.double().numpy(), before.double().numpy(), torch.ones(len(after)).numpy())
        print(f"the adapter finds {share:.0%} of crosses; loss of the base {before.mean():.3f}, adapter minus base")
        print(f"{found.mean:+.3f}, 95 % between {found.low:+.3f} and {found.high:+.3f}")

    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    print("the base is what it was, to the bit")
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
