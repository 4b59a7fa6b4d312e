"""Random laws to test with."""

import numpy as np
import torch


def random_law(size, rng, sharpness=1.5, zeros=0.2):
    law = np.exp(rng.normal(size=size) * sharpness) * (rng.random(size) >= zeros)
    if not law.sum():
        law[rng.integers(size)] = 1
    return torch.from_numpy(law / law.sum())


def cases(count, largest=7, drafts=3):
    rng = np.random.default_rng(0)
    for number in range(count):
        size, k = int(rng.integers(2, largest + 1)), int(rng.integers(1, drafts + 1))
        if number % 2:
            laws = [random_law(size, rng)] * k
        else:
            laws = [random_law(size, rng) for _ in range(k)]
        yield laws, random_law(size, rng)
