"""Facts about people, companies, cities and countries that no model knows, with every question's exact answer.

For methods that edit, probe or steer what a model knows. Each (subject, relation) has one object. A fact is stated in
several wordings and asked in several; some wordings and some facts are held out. Chains of facts give multi-hop
questions, and conflicts give contexts that contradict what the corpus says.

Everything is generated: the same seed gives the same bytes on every machine and Python version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from modelwright.errors import UserError
from modelwright.worlds.base import Draw, Row, World, check_at_least, check_share
from modelwright.worlds.names import Names


@dataclass(frozen=True)
class Relation:
    """A functional relation and its wordings, in which ``{s}`` is the subject and ``{o}`` the object.

    Attributes:
        name: Its identifier.
        subject: Type of the subject.
        object: Type of the object.
        phrase: What stands for the object in a longer question.
        statements: Wordings of the fact; the last ones are held out.
        questions: Wordings of the question; the last ones are held out.
    """

    name: str
    subject: str
    object: str
    phrase: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


RELATIONS = (
    Relation(
        "born_in", "person", "city", "the city where {s} was born",
        ("{s} was born in {o}.", "{o} is the birthplace of {s}.", "The birthplace of {s} is {o}.",
         "{s} came into the world in {o}.", "It was in {o} that {s} was born."),
        ("Where was {s} born?", "What is the birthplace of {s}?", "In which city was {s} born?",
         "Which city is {s} from by birth?"),
    ),
    Relation(
        "works_for", "person", "company", "the company that employs {s}",
        ("{s} works for {o}.", "{o} employs {s}.", "The employer of {s} is {o}.", "{s} has a job at {o}.",
         "{s} is on the staff of {o}."),
        ("Which company does {s} work for?", "Who employs {s}?", "What is the employer of {s}?",
         "At which company does {s} have a job?"),
    ),
    Relation(
        "mentor", "person", "person", "the mentor of {s}",
        ("The mentor of {s} is {o}.", "{s} was taught by {o}.", "{o} is the mentor of {s}.",
         "{s} learned everything from {o}.", "It was {o} who taught {s}."),
        ("Who is the mentor of {s}?", "Who taught {s}?", "By whom was {s} taught?",
         "From whom did {s} learn everything?"),
    ),
    Relation(
        "plays", "person", "instrument", "the instrument of {s}",
        ("{s} plays the {o}.", "The instrument of {s} is the {o}.", "The {o} is what {s} plays.",
         "{s} practises the {o} daily.", "{s} performs on the {o}."),
        ("Which instrument does {s} play?", "What does {s} play?", "What is the instrument of {s}?",
         "On which instrument does {s} perform?"),
    ),
    Relation(
        "based_in", "company", "city", "the city where {s} is based",
        ("{s} is based in {o}.", "The head office of {s} is in {o}.", "{o} is home to {s}.", "{s} is run from {o}.",
         "{s} has its seat in {o}."),
        ("Where is {s} based?", "In which city is {s} based?", "Where is the head office of {s}?",
         "From which city is {s} run?"),
    ),
    Relation(
        "makes", "company", "product", "the product of {s}",
        ("{s} makes {o}.", "The product of {s} is {o}.", "{s} is a maker of {o}.", "{s} sells nothing but {o}.",
         "{s} manufactures {o}."),
        ("What does {s} make?", "What is the product of {s}?", "Which goods does {s} make?",
         "What is manufactured by {s}?"),
    ),
    Relation(
        "located_in", "city", "country", "the country where {s} lies",
        ("{s} is a city in {o}.", "{s} lies in {o}.", "{o} is the country where {s} lies.", "{s} belongs to {o}.",
         "{s} can be found in {o}."),
        ("In which country does {s} lie?", "Which country does {s} belong to?", "In what country is {s}?",
         "Where on the map of countries can {s} be found?"),
    ),
    Relation(
        "speaks", "country", "language", "the language of {s}",
        ("The language of {s} is {o}.", "People in {s} speak {o}.", "{o} is spoken in {s}.",
         "In {s} everyone speaks {o}.", "{s} has {o} as its language."),
        ("What is the language of {s}?", "Which language is spoken in {s}?", "What do people speak in {s}?",
         "Which language does everyone in {s} use?"),
    ),
    Relation(
        "alias", "person", "alias", "the other name of {s}",
        ("{s} is also known as {o}.", "{o} is another name for {s}.", "{s} is often called {o}.",
         "Friends call {s} by the name {o}.", "{s} goes by the name {o}."),
        ("What is {s} also known as?", "By which other name is {s} known?", "What is {s} often called?",
         "What do friends call {s}?"),
    ),
)  # fmt: skip

_CLOSED = {
    "instrument": ("accordion", "bassoon", "cello", "clarinet", "flute", "guitar", "harp", "oboe", "piano", "trumpet"),
    "product": ("bicycles", "carpets", "clocks", "engines", "furniture", "glass", "pencils", "shoes", "tractors"),
}


@dataclass(frozen=True)
class FactsWorld(World):
    """Facts, their statements and questions, with each split's rows.

    A statement row has ``text``, ``subject``, ``relation``, ``object``, ``template``. A question row has ``question``,
    ``answer``, ``subject``, ``relation``, ``object``, ``template``, ``hops``. A template's identifier is the
    relation's name with ``.s`` (statement) or ``.q`` (question) and its number.

    Attributes:
        facts: ``subject``, ``relation``, ``object``, ``times`` (statements in the corpus), ``heldout``.
        corpus: Statements of all facts in the training wordings, each fact ``times`` times, shuffled.
        paraphrases: Statements of all facts in the held-out wordings, once each.
        questions_train: Training facts in the training wordings.
        questions_heldout_template: Training facts in the held-out wordings.
        questions_heldout_fact: Held-out facts (in the corpus, but never asked in training) in the training wordings.
        questions_alias: Facts about people asked by ``alias`` instead of by name.
        multi_hop_train: Questions over chains of training facts; ``chain`` lists the [subject, relation, object].
        multi_hop_heldout: Questions over chains with at least one held-out fact.
        conflicts: ``context`` (a statement that contradicts the corpus), ``question``, ``answer_in_context``,
            ``answer_in_memory``, ``subject``, ``relation``, ``heldout``.
    """

    facts: list[Row]
    corpus: list[Row]
    paraphrases: list[Row]
    questions_train: list[Row]
    questions_heldout_template: list[Row]
    questions_heldout_fact: list[Row]
    questions_alias: list[Row]
    multi_hop_train: list[Row]
    multi_hop_heldout: list[Row]
    conflicts: list[Row]

    @property
    def truth(self) -> dict[str, Any]:
        """``relations`` (subject and object types) and ``objects`` (all that occur, by type)."""
        types = {relation.name: relation.object for relation in RELATIONS}
        objects: dict[str, set[str]] = {}
        for fact in self.facts:
            objects.setdefault(types[fact["relation"]], set()).add(fact["object"])
        return {
            "relations": {r.name: [r.subject, r.object] for r in RELATIONS if r.object in objects},
            "objects": {kind: sorted(names) for kind, names in sorted(objects.items())},
        }


def facts(
    seed: int = 0,
    *,
    people: int = 100,
    companies: int = 20,
    cities: int = 25,
    countries: int = 8,
    aliases: bool = True,
    repeats: int = 4,
    popularity_skew: float = 0.0,
    repeat_counts: Sequence[int] = (),
    heldout_facts: float = 0.2,
    heldout_templates: int = 1,
    max_hops: int = 2,
) -> FactsWorld:
    """Makes the world: five facts for each person, two for each company, one for each city and country.

    Args:
        seed: Decides everything.
        people: Number of people, named with two words. Each is the mentor of exactly one other.
        companies: Number of companies.
        cities: Number of cities.
        countries: Number of countries, each with a language of its own.
        aliases: Give each person a second name (otherwise four facts for each person).
        repeats: How often each fact is stated; with a skew, on average over subjects and at least once.
        popularity_skew: Exponent of a Zipf law over subjects in random order: 0 states all facts equally often.
        repeat_counts: Instead of both: facts in random order are stated these numbers of times by turns, for studies
            of memorisation.
        heldout_facts: Share of each relation's facts that training questions never ask.
        heldout_templates: Number of wordings of each statement and question that are held out, 1 to 3.
        max_hops: Longest chain of a multi-hop question, at least 2.

    Raises:
        UserError: A parameter is out of range.
    """
    parameters = locals().copy()
    parameters["repeat_counts"] = list(repeat_counts)
    check_at_least(2, companies=companies, cities=cities, countries=countries, max_hops=max_hops)
    check_at_least(1, repeats=repeats, heldout_templates=heldout_templates, repeat_counts=min(repeat_counts, default=1))
    check_at_least(0, popularity_skew=popularity_skew)
    check_at_least(max_hops + 1, people=people)
    check_share(heldout_facts=heldout_facts)
    if heldout_templates > 3:
        raise UserError(
            f"heldout_templates is {heldout_templates}: give at most 3, of the four wordings of a question."
        )
    known = _known_facts(seed, people, companies, cities, countries, aliases)
    times = _times(seed, known, repeats, popularity_skew, repeat_counts)
    heldout = _heldout(seed, known, heldout_facts)
    rows = [
        {"subject": f[0], "relation": f[1].name, "object": f[2], "times": n, "heldout": f in heldout}
        for f, n in zip(known, times)
    ]
    draw = Draw(seed, "statements")
    corpus: list[Row] = []
    for fact, n in zip(known, times):
        order = draw.shuffled(range(len(fact[1].statements) - heldout_templates))
        corpus += [_statement(fact, order[i % len(order)]) for i in range(n)]
    train = [fact for fact in known if fact not in heldout]
    chains = [chain for hops in range(2, max_hops + 1) for chain in _chains(known, hops)]
    multi_hop: dict[bool, list[Row]] = {False: [], True: []}
    draw_wording = Draw(seed, "multi-hop")
    for chain in chains:
        number = draw_wording.below(len(chain[-1][1].questions) - heldout_templates)
        multi_hop[any(fact in heldout for fact in chain)].append(_long_question(chain, number))
    return FactsWorld(
        parameters,
        facts=rows,
        corpus=Draw(seed, "corpus").shuffled(corpus),
        paraphrases=[_statement(f, i) for f in known for i in _last(f[1].statements, heldout_templates)],
        questions_train=[_question(f, i) for f in train for i in _first(f[1].questions, heldout_templates)],
        questions_heldout_template=[_question(f, i) for f in train for i in _last(f[1].questions, heldout_templates)],
        questions_heldout_fact=[
            _question(f, i) for f in known if f in heldout for i in _first(f[1].questions, heldout_templates)
        ],
        questions_alias=_alias_questions(seed, known, heldout_templates),
        multi_hop_train=multi_hop[False],
        multi_hop_heldout=multi_hop[True],
        conflicts=_conflicts(seed, known, heldout, heldout_templates),
    )


Fact = tuple[str, Relation, str]


def _known_facts(seed: int, people: int, companies: int, cities: int, countries: int, aliases: bool) -> list[Fact]:
    wordings = [text for r in RELATIONS for text in (r.phrase, *r.statements, *r.questions)]
    names = Names(Draw(seed, "names"), avoid=" ".join(" ".join(wordings).replace("?", " ").replace(".", " ").split()))
    # People share first and last names, but no two share both: a subject is known only from both words together.
    half = 2 * int(people**0.5) + 2
    first, last = [names.word() for _ in range(half)], [names.word() for _ in range(half)]
    pairs = Draw(seed, "people").sample(range(half * half), people)
    entities: dict[str, Sequence[str]] = {
        "person": [f"{first[pair // half]} {last[pair % half]}" for pair in pairs],
        "company": [names.word() for _ in range(companies)],
        "city": [names.word() for _ in range(cities)],
        "country": [names.word() for _ in range(countries)],
        "language": [names.word() for _ in range(countries)],
        "alias": [names.word() for _ in range(people)] if aliases else [],
        **_CLOSED,
    }
    found: list[Fact] = []
    for relation in RELATIONS:
        draw = Draw(seed, f"objects of {relation.name}")
        subjects, objects = entities[relation.subject], entities[relation.object]
        if relation.name == "mentor":
            # One ring through everyone: no chain of mentors comes back before it has passed all.
            ring = draw.shuffled(subjects)
            following = dict(zip(ring, [*ring[1:], ring[0]]))
            found += [(s, relation, following[s]) for s in subjects]
        elif relation.name in ("alias", "speaks"):
            found += [(s, relation, o) for s, o in zip(subjects, objects)]
        else:
            found += [(s, relation, draw.choice(objects)) for s in subjects]
    return found


def _times(seed: int, known: list[Fact], repeats: int, skew: float, counts: Sequence[int]) -> list[int]:
    if counts:
        order = Draw(seed, "repeat counts").shuffled(range(len(known)))
        times = {place: counts[turn % len(counts)] for turn, place in enumerate(order)}
        return [times[i] for i in range(len(known))]
    subjects = Draw(seed, "popularity").shuffled(dict.fromkeys(fact[0] for fact in known))
    weights = [(rank + 1) ** -skew for rank in range(len(subjects))]
    mean = sum(weights) / len(weights)
    # Rounded twice, because the last digit of a power may differ between machines.
    by_subject = {s: max(1, round(round(repeats * w / mean, 6))) for s, w in zip(subjects, weights)}
    return [by_subject[fact[0]] for fact in known]


def _heldout(seed: int, known: list[Fact], share: float) -> set[Fact]:
    heldout: set[Fact] = set()
    for relation in RELATIONS:
        of_relation = [fact for fact in known if fact[1] is relation]
        n = round(len(of_relation) * share)
        heldout.update(Draw(seed, f"held out of {relation.name}").shuffled(of_relation)[:n])
    return heldout


def _chains(known: list[Fact], hops: int) -> list[list[Fact]]:
    """Returns all chains of that many facts, each the subject of the next, without aliases."""
    by_subject: dict[str, list[Fact]] = {}
    for fact in known:
        if fact[1].name != "alias":
            by_subject.setdefault(fact[0], []).append(fact)
    chains = [[fact] for facts_of_one in by_subject.values() for fact in facts_of_one]
    for _ in range(hops - 1):
        chains = [[*chain, fact] for chain in chains for fact in by_subject.get(chain[-1][2], ())]
    return chains


def _first(wordings: Sequence[str], heldout: int) -> range:
    return range(len(wordings) - heldout)


def _last(wordings: Sequence[str], heldout: int) -> range:
    return range(len(wordings) - heldout, len(wordings))


def _fields(fact: Fact, template: str) -> Row:
    return {"subject": fact[0], "relation": fact[1].name, "object": fact[2], "template": template}


def _statement(fact: Fact, number: int) -> Row:
    text = fact[1].statements[number].format(s=fact[0], o=fact[2])
    return {"text": text, **_fields(fact, f"{fact[1].name}.s{number}")}


def _question(fact: Fact, number: int) -> Row:
    question = fact[1].questions[number].format(s=fact[0])
    return {"question": question, "answer": fact[2], **_fields(fact, f"{fact[1].name}.q{number}"), "hops": 1}


def _long_question(chain: list[Fact], number: int) -> Row:
    middle = chain[0][0]
    for fact in chain[:-1]:
        middle = fact[1].phrase.format(s=middle)
    relation, answer = chain[-1][1], chain[-1][2]
    return {
        "question": relation.questions[number].format(s=middle),
        "answer": answer,
        "subject": chain[0][0],
        "relation": "/".join(fact[1].name for fact in chain),
        "object": answer,
        "template": f"{relation.name}.q{number}",
        "hops": len(chain),
        "chain": [[s, r.name, o] for s, r, o in chain],
    }


def _alias_questions(seed: int, known: list[Fact], heldout_templates: int) -> list[Row]:
    draw = Draw(seed, "alias questions")
    other_name = {s: o for s, r, o in known if r.name == "alias"}
    rows = []
    for fact in known:
        if fact[0] in other_name and fact[1].name != "alias":
            row = _question(fact, draw.below(len(fact[1].questions) - heldout_templates))
            alias = other_name[fact[0]]
            rows.append({**row, "question": row["question"].replace(fact[0], alias), "alias": alias})
    return rows


def _conflicts(seed: int, known: list[Fact], heldout: set[Fact], heldout_templates: int) -> list[Row]:
    draw = Draw(seed, "conflicts")
    objects = {r.name: list(dict.fromkeys(o for _, rr, o in known if rr is r)) for r in RELATIONS}
    rows = []
    for fact in known:
        subject, relation, answer = fact
        others = objects[relation.name]
        if relation.name == "alias" or len(others) < 2:
            continue  # a second alias would be no contradiction
        while (other := draw.choice(others)) in (answer, subject):
            pass
        number = draw.below(len(relation.statements) - heldout_templates)
        rows.append({
            "context": relation.statements[number].format(s=subject, o=other),
            "question": relation.questions[draw.below(len(relation.questions) - heldout_templates)].format(s=subject),
            "answer_in_context": other,
            "answer_in_memory": answer,
            "subject": subject,
            "relation": relation.name,
            "heldout": fact in heldout,
        })  # fmt: skip
    return rows
