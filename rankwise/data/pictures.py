"""Pictures with a class each, as a model is given them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from rankwise.data.examples import Examples


@dataclass(frozen=True)
class Look:
    """How a model wants its pictures.

    Attributes:
        processor: transformers' image processor, which brings a picture to its size.
        channels: 1 for grey, 3 for red, green and blue.
        tokens: how many a picture becomes.
    """

    processor: Any
    channels: int
    tokens: int

    def resized(self, picture: Any) -> np.ndarray:
        """A Pillow picture as uint8 `[channels, height, width]`, resized and cropped, its values as they were."""
        mode = {1: "L", 3: "RGB"}[self.channels]
        found = self.processor(
            images=[picture.convert(mode)], do_rescale=False, do_normalize=False, return_tensors="np"
        )["pixel_values"][0]
        return found.reshape(self.channels, *found.shape[-2:])

    def scaled(self, pixels: np.ndarray) -> np.ndarray:
        """Float32, as the processor scales and normalises."""
        own = self.processor
        values = pixels.astype(np.float32)
        if own.do_rescale:
            values *= np.float32(own.rescale_factor)
        if own.do_normalize:
            mean, std = (
                np.asarray(part, dtype=np.float32).reshape(-1, 1, 1) for part in (own.image_mean, own.image_std)
            )
            values = (values - mean) / std
        return values

    @cached_property
    def digest(self) -> str:
        """SHA-256 of every setting."""
        settings = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(f"{settings} {self.channels}".encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Pictures(Examples):
    """One class a picture.

    Attributes:
        pixels: uint8 `[D, channels, height, width]`, perhaps memory-mapped; see `Look`.
        labels: int64 `[D]`.
        classes: their names, by number.
        look: how they are scaled.
    """

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    look: Look
    origins: np.ndarray
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def lengths(self) -> np.ndarray:
        return np.full(len(self), self.look.tokens, dtype=np.int64)

    def supervised_counts(self) -> np.ndarray:
        return np.ones(len(self), dtype=np.int64)

    def content(self, i: int) -> bytes:
        return np.ascontiguousarray(self.pixels[i]).tobytes()

    def subset(self, indices: Sequence[int] | np.ndarray) -> Pictures:
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        return replace(self, pixels=self.pixels[chosen], labels=self.labels[chosen], origins=self.origins[chosen])

    def floats(self, documents: Sequence[int] | np.ndarray) -> np.ndarray:
        """What a model takes of the named pictures, float32 `[n, channels, height, width]`."""
        return self.look.scaled(self.pixels[np.asarray(documents, dtype=np.int64)])

    @cached_property
    def digest(self) -> str:
        sha = hashlib.sha256(f"{self.pixels.shape} {self.classes!r} {self.look.digest}".encode())
        for i in range(len(self)):
            sha.update(self.content(i))
        sha.update(np.ascontiguousarray(self.labels).data)
        return sha.hexdigest()
