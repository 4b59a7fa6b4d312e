"""Which methods are tested together, which are refused and why; ``docs/combinations.md`` is made from this list.

``python tests/combinations/cases.py`` redraws the page. What is not listed here, the page calls unknown.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from modelwright import catalog

PAGE = Path(catalog.__file__).parents[2] / "docs" / "combinations.md"
#: Methods that choose tokens, with the options they are tested with; {folder} holds what they read.
GENERATORS = {
    "plain": {},
    "decore": {"head": ["0-1", "1-2"], "mask_from": "all", "alpha": 1.0},
    "cad": {"alpha": 1.0},
    "contrastive-decoding": {"amateur": "{folder}/amateur"},
    "dola": {"layers": "0,1"},
    "iti": {"directions": "{folder}/directions.safetensors", "top": 2, "alpha": 0.1},
    "activation-decoding": {"info_layer": 1},
    "multi-draft": {"prompt_lookup": True, "num_drafts": 2},
}
#: Those whose law of a whole text is what they generate by.
WITH_LAW = ("plain", "decore", "cad", "contrastive-decoding", "dola", "multi-draft")
CONTEXTS = {
    "string": {"shift": 12, "window": 3},
    "rope-alibi": {},
    "prflash": {"keep": [0], "block_size": 4},
    "edited": {"edit": ["{folder}/edit"]},
}
#: Contexts that stand in place of the model's attention, so that there is one at most.
ATTENTIONS = ("string", "rope-alibi", "prflash")
#: Contexts that need rotary positions; and those that take no sliding window.
ROTARY, NO_WINDOW = ("string", "rope-alibi"), ("prflash",)
#: Families of models without rotary positions, without attention, and with sliding windows.
NO_ROTARY, NO_ATTENTION, WINDOW = ("gpt2",), ("mamba2",), ("gemma2",)
FAMILIES = ("llama", "qwen2", "mistral", "gemma", "gemma2", "gpt2", "gpt_neox", "mamba2")


@dataclass(frozen=True)
class Together:
    """A context around a generator that works."""

    context: str
    generator: str


@dataclass(frozen=True)
class Refused:
    """What is refused before any token is made: two methods, or a method and a family of models."""

    first: str
    second: str
    sentence: str


#: Directions belong to the weights that they were fitted on, and an edit makes others.
UNDER = [Refused("edited", "iti", "fitted on another model")]
TOGETHER = [
    Together(context, generator)
    for context in CONTEXTS
    for generator in GENERATORS
    if (context, generator) not in {(r.first, r.second) for r in UNDER}
]
TWO = [
    Refused(a, b, "both choose the tokens, so only one of them can be used at a time")
    for a, b in itertools.combinations(GENERATORS, 2)
]
TWO_ATTENTIONS = [
    Refused(a, b, "attention is changed|another context") for a, b in itertools.permutations(ATTENTIONS, 2)
]
ON_MODELS = [
    *(Refused(context, family, "rotary") for context in ROTARY for family in (*NO_ROTARY, *NO_ATTENTION)),
    *(
        Refused(context, family, "sliding|no full attention")
        for context in NO_WINDOW
        for family in (*WINDOW, *NO_ATTENTION)
    ),
    *(Refused(generator, family, "attention|cache") for generator in GENERATORS for family in NO_ATTENTION),
]
WORKS_ON = [
    (method, family)
    for method in (*CONTEXTS, *GENERATORS)
    for family in FAMILIES
    if (method, family) not in {(r.first, r.second) for r in ON_MODELS}
]


def page() -> str:
    """Returns the page."""
    generators, contexts = list(catalog.provided("generators")), list(catalog.provided("contexts"))
    together = {(t.context, t.generator) for t in TOGETHER}
    lines = [
        "# Combinations\n",
        "<!-- Made by `python tests/combinations/cases.py`. Do not edit. -->\n",
        "Which methods of `modelwright generate --with` are tested together. Each ✓ is a test on real, tiny models: a "
        "method\nwrites the same alone and in a left-padded batch; inside the other, what it writes differs from what "
        "it writes outside, is\nwhat its own law says there (where it has one for whole texts), and leaving the block "
        "restores the model bit for bit.\n*Unknown* has no test.\n",
        "## Methods that change the model, around methods that choose the tokens\n",
        "| | " + " | ".join(generators) + " |",
        "| :-- |" + " :-: |" * len(generators),
    ]
    under = {(r.first, r.second) for r in UNDER}
    for context in contexts:
        cells = [
            "✓" if (context, g) in together else "refused" if (context, g) in under else "unknown" for g in generators
        ]
        lines.append(f"| {context} | " + " | ".join(cells) + " |")
    lines += [
        "\nITI's directions belong to the weights that they were fitted on, so under an edit of weights they are "
        "refused: fit them on\nthe edited model (`modelwright edit apply`).",
        "\n## Two methods that choose the tokens\n",
        "Refused, all pairs: *'a' and 'b' both choose the tokens, so only one of them can be used at a time.* The same "
        "method twice\nis refused too.\n",
        "## Two methods that change the attention\n",
        f"Refused, all pairs of {', '.join(ATTENTIONS)}: a model has one attention at a time.\n",
        "## Families of models\n",
        "| | " + " | ".join(FAMILIES) + " |",
        "| :-- |" + " :-: |" * len(FAMILIES),
    ]
    refused = {(r.first, r.second) for r in ON_MODELS}
    for method in (*contexts, *generators):
        cells = [
            "✓" if (method, f) in WORKS_ON else "refused" if (method, f) in refused else "unknown" for f in FAMILIES
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines.append(
        "\nRefusals come before any token, in one sentence that says why: a model without rotary positions cannot be "
        "shifted, and\na recurrent state has neither heads nor a cache of tokens; a sliding window has a choice of "
        "keys of its own."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
