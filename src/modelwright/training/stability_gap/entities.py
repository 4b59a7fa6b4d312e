"""A small world in which knowledge and the format of a question are two things, for the claim.

A hidden map gives every entity a value. ``S e v`` states it; ``Q e a`` asks for it, and is answered with another set of
tokens: answering needs the fact and the learned format. A model is pre-trained on general entities, statements and
questions mixed. The domain's pool states facts of other entities, half of them with a random wrong value, and has
almost no questions; its reference states each fact rightly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STATEMENT, QUESTION = 0, 1
#: Tokens of a document.
LENGTH = 3


@dataclass(frozen=True)
class EntityWorld:
    """Documents as rows of tokens: int64, shape ``(documents, 3)``.

    Attributes:
        facts: int64, (entities,): the value of every entity, general ones first.
        general: Number of general entities.
        values: Number of values.
        pretraining: General documents.
        pool: The domain's documents, good and bad.
        good: bool, (pool,): which state a true value, or ask.
        reference: The domain's facts, each equally often.
    """

    facts: np.ndarray
    general: int
    values: int
    pretraining: np.ndarray
    pool: np.ndarray
    good: np.ndarray
    reference: np.ndarray

    @property
    def vocabulary(self) -> int:
        """Number of tokens: marks, entities, values, answers."""
        return 2 + len(self.facts) + 2 * self.values

    def documents(self, mark: int | np.ndarray, entities: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        """Returns documents of a kind about entities, with their true values or others."""
        values = self.facts[entities] if values is None else values
        offset = 2 + len(self.facts) + np.where(np.asarray(mark) == QUESTION, self.values, 0)
        columns = np.broadcast_arrays(mark, 2 + entities, offset + values)
        return np.stack(columns, axis=1).astype(np.int64)

    def questions(self, domain: bool) -> np.ndarray:
        """Returns the questions about every entity of the domain, or every general one."""
        entities = np.arange(self.general, len(self.facts)) if domain else np.arange(self.general)
        return self.documents(QUESTION, entities)

    def statements(self) -> np.ndarray:
        """Returns the true statement of every entity of the domain."""
        return self.documents(STATEMENT, np.arange(self.general, len(self.facts)))


def texts(documents: np.ndarray) -> list[str]:
    """Returns documents as words, one a token."""
    return [" ".join(f"t{token}" for token in row) for row in documents.tolist()]


def entity_world(
    seed: int,
    *,
    general: int = 160,
    domain: int = 64,
    values: int = 8,
    pretraining: int = 50_000,
    pool: int = 16_000,
    wrong: float = 0.5,
    questions: float = 0.3,
    traces: float = 0.005,
) -> EntityWorld:
    """Makes the world.

    Args:
        seed: Seed of facts and documents.
        general: General entities.
        domain: Entities of the domain.
        values: Values, and answer tokens.
        pretraining: General documents.
        pool: Documents of the domain.
        wrong: Share of the domain's statements with a random wrong value.
        questions: Share of questions among the general documents.
        traces: Share of general questions in the domain's pool, the natural trace of the old format.
    """
    draw = np.random.default_rng(seed)
    empty = np.empty((0, LENGTH), dtype=np.int64)
    # Every value is equally common in the domain, so that an n-gram model prefers no entity for its value.
    facts = np.concatenate([draw.integers(0, values, general), draw.permutation(np.arange(domain) % values)])
    world = EntityWorld(facts, general, values, empty, empty, np.empty(0, dtype=bool), empty)
    marks = np.where(draw.random(pretraining) < questions, QUESTION, STATEMENT)
    before = world.documents(marks, draw.integers(0, general, pretraining))
    about = general + draw.integers(0, domain, pool)
    bad = draw.random(pool) < wrong
    stated = np.where(bad, (facts[about] + draw.integers(1, values, pool)) % values, facts[about])
    rows = world.documents(STATEMENT, about, stated)
    asked = draw.random(pool) < traces
    rows[asked] = world.documents(QUESTION, draw.integers(0, general, pool))[asked]
    return EntityWorld(facts, general, values, before, rows, ~bad | asked, np.repeat(world.statements(), 4, axis=0))
