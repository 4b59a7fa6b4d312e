"""How many edits a model stands, and by which editor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: An ability counts as kept while it has this share of what it had.
KEPT = 0.9
#: Edits count as written while this share of all of them is answered.
WRITTEN = 0.8

#: Above chance by more than this (share of right answers), an ability is there at all.
ABOVE = 0.1

_OWN = {"n", "delta_norms", "perplexity", "kl", "max_logit", "repeated", "retention", "max_delta_norm", "collapsed"}


def abilities(state: Mapping[str, Any]) -> dict[str, float]:
    """Returns the abilities of a state, ``name.metric`` to value; chance levels are left out."""
    found: dict[str, float] = {}
    for name, value in state.items():
        if name not in _OWN and isinstance(value, Mapping):
            found |= {f"{name}.{k}": float(v) for k, v in value.items() if k != "chance" and v is not None}
    return found


def present(state: Mapping[str, Any]) -> dict[str, float]:
    """Returns the abilities that a model has: those that are above guessing by more than :data:`ABOVE`."""
    found = {}
    for key, value in abilities(state).items():
        name, _, metric = key.rpartition(".")
        guessed = state[name].get("chance", 0.0) if metric == "likelihood" else 0.0
        if value > guessed + ABOVE:
            found[key] = value
    return found


def stands(states: Sequence[Mapping[str, Any]], kept: float = KEPT) -> int:
    """Returns the largest checkpoint up to which nothing collapsed and every ability kept its share.

    The first state is the base where it is that of 0 edits; without it, the first one counts as unharmed. What the
    model cannot do at the start, or does by guessing, cannot be lost and is not looked at.
    """
    base = present(states[0]) if states else {}
    last = 0
    for state in states:
        now = abilities(state)
        if state.get("collapsed") or any(now.get(name, 0.0) < kept * value for name, value in base.items()):
            return last
        last = int(state["n"])
    return last


def written(states: Sequence[Mapping[str, Any]], n: int) -> float | None:
    """Returns the share of all edits that is still answered at the largest checkpoint that is at most ``n``."""
    found = [s["retention"]["all"] for s in states if 0 < s["n"] <= n and s.get("retention")]
    return found[-1] if found else None


def advice(runs: Mapping[str, Sequence[Mapping[str, Any]]], kept: float = KEPT) -> str:
    """Returns which editor to use for this model and how many edits it stands, in a sentence or two.

    The editor that harms nothing for longest wins; of those that write fewer than 80% of their facts none does.

    Args:
        runs: Method to its states.
        kept: Share of an ability that counts as kept.
    """
    reached = {method: stands(states, kept) for method, states in runs.items()}
    first = {m: next((s["retention"]["all"] for s in states if s["n"] > 0), None) for m, states in runs.items()}
    able = [m for m in runs if (written(runs[m], max(reached[m], 1)) or first[m] or 0.0) >= WRITTEN]
    if not any(present(states[0]) for states in runs.values() if states):
        return "This model has none of the abilities that were tested, so nothing can be said about their loss."
    if not able:
        return "None of these editors writes its facts into this model as it is set: tune them before use."
    best = max(able, key=lambda m: (reached[m], written(runs[m], reached[m]) or 0.0))
    idle = [m for m in runs if m not in able]
    note = f" Too few facts are written by {', '.join(idle)}." if idle else ""
    if reached[best] == 0:
        n = min(s["n"] for s in runs[best] if s["n"] > 0)
        return (
            f"No editor can be recommended: with {', '.join(able)}, some ability falls below {kept:.0%} of what it was "
            f"by {_edits(n)}.{note}"
        )
    share = written(runs[best], reached[best]) or 0.0
    last = max(s["n"] for s in runs[best])
    bound = "at least " if reached[best] == last else ""
    said = (
        f"Use {best}: the model stands {bound}{_edits(reached[best])} with {share:.0%} of them kept and every ability "
        f"at {kept:.0%} or more of what it was."
    )
    others = [f"{m} {reached[m]}" for m in sorted(able, key=lambda m: -reached[m]) if m != best]
    return said + (f" The others stand: {', '.join(others)}." if others else "") + note


def _edits(n: int) -> str:
    return f"{n} edit" if n == 1 else f"{n:,} edits"
