"""Tables of features with a known truth, for tests."""

import numpy as np
import pandas as pd

from modelwright.probing.memorization.features import COLUMNS, CONTINUOUS


def simulated(rows=3000, seed=0, *, effect=1.2):
    """Rows of three categories in which continuation perplexity and rarity act with opposite signs."""
    generator = np.random.default_rng(seed)
    table = pd.DataFrame({name: generator.normal(size=rows) for name in CONTINUOUS})
    category = generator.integers(0, 3, rows)
    table["sequence_duplicates"] = np.where(
        category == 0, generator.integers(6, 40, rows), generator.integers(1, 6, rows)
    )
    table["is_repeating"] = category == 1
    table["is_incrementing"] = False
    table["is_templating"] = category == 1
    sign = np.array([1.0, -1.0, 0.5])[category]
    logits = sign * effect * table["continuation_perplexity"] - 0.4 * table["frequency_mean"] - 0.3
    for name in ("prompt_perplexity", "continuation_perplexity", "sequence_perplexity"):
        table[name] = np.exp(table[name] / 4)
    table["memorized"] = generator.random(rows) < 1 / (1 + np.exp(-logits))
    return table[[*COLUMNS, "memorized"]]
