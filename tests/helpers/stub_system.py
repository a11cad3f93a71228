"""A system that draws coloured noise from each seed at once, for tests of generation and scoring."""

import os
import time

import numpy as np
from PIL import Image


class Stub:
    """8 px images. STUB_SECONDS: time that an image takes."""

    def __init__(self) -> None:
        self.identity = {"version": 1}

    def generate(self, texts: list[str], seeds: list[int]) -> list[Image.Image]:
        time.sleep(float(os.environ.get("STUB_SECONDS", "0")) * len(texts))
        return [
            Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))
            for seed in seeds
        ]


class Failing(Stub):
    def generate(self, texts: list[str], seeds: list[int]) -> list[Image.Image]:
        return []


class Inverted(Stub):
    def __init__(self) -> None:
        self.identity = {"version": 3}

    def generate(self, texts: list[str], seeds: list[int]) -> list[Image.Image]:
        return [Image.fromarray(255 - np.asarray(image)) for image in super().generate(texts, seeds)]
