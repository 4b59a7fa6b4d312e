"""Which facts of a file are fit to be asked: those with one answer, of a clear relation, about what is well known."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from modelwright.errors import UserError
from modelwright.evaluation.hallueditbench.questions import Fact, single_valued

#: Relations (Wikidata's labels) that the benchmark leaves out, as its published code lists them: several answers are
#: right, or none is clear.
VAGUE = frozenset({
    "CPU", "Wi-Fi access", "board member", "child", "connects with", "culture", "demographics of topic",
    "described by source", "diplomatic relation", "doctoral student", "economy of topic", "educated at",
    "executive body", "flag", "geography of topic", "given name", "has characteristic", "has part(s)",
    "history of topic", "input device", "located in or next to body of water",
    "located in statistical territorial entity", "located in the administrative territorial entity", "participant",
    "public holiday", "significant event", "sponsor", "student", "studied in", "twinned administrative body",
    "voice actor",
})  # fmt: skip
#: Least popularity of subjects and of objects: numbers of identifiers of other catalogues that Wikidata has for them.
SUBJECT_POPULARITY, OBJECT_POPULARITY = 8, 5


def choose_facts(
    facts: Sequence[Fact],
    *,
    without: Collection[str] = VAGUE,
    subject_popularity: int = SUBJECT_POPULARITY,
    object_popularity: int = OBJECT_POPULARITY,
) -> tuple[list[Fact], dict[str, int]]:
    """Returns the facts to ask, in order, and how many were left out for which reason (paper, 3.1).

    A fact without a relation, or without a count of popularity, is not left out for it.

    Args:
        facts: All facts; a second answer counts wherever it stands.
        without: Relations to leave out, whatever their case.
        subject_popularity: Least popularity of a subject.
        object_popularity: Least popularity of an object.

    Raises:
        UserError: None is left.
    """
    vague = {name.casefold() for name in without}
    single = single_valued(facts)
    clear = [f for f in single if f.relation.casefold() not in vague]
    known = [
        f
        for f in clear
        if (f.subject_popularity is None or f.subject_popularity >= subject_popularity)
        and (f.object_popularity is None or f.object_popularity >= object_popularity)
    ]
    gone = {
        "several answers, or asked twice": len(facts) - len(single),
        "vague relation": len(single) - len(clear),
        "little known": len(clear) - len(known),
    }
    if not known:
        why = ", ".join(f"{count} for '{reason}'" for reason, count in gone.items() if count)
        raise UserError(
            f"All {len(facts)} facts are left out ({why}): give others, or see --skip-relations, "
            f"--min-subject-popularity and --min-object-popularity."
        )
    return known, gone
