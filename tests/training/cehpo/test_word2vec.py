import json
from types import SimpleNamespace

import pytest

from modelwright.errors import UserError
from modelwright.progress import Silent
from modelwright.training.cehpo import claim
from modelwright.training.cehpo.word2vec import Word2VecObjective, read_sentences
from modelwright.verbs import load_verb
from modelwright.verify.worker import check_measurements
from modelwright.worlds.analogies import analogies

GOOD = {"window": 8, "vector_size": 50, "negative": 5, "min_count": 1, "sample": 0.0, "epochs": 8, "alpha": 0.06}


@pytest.fixture(scope="module")
def world():
    return analogies(0, rows=12, sentences=700, fillers=60, questions=60)


@pytest.fixture
def files(world, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(row["text"] for row in world.sentences))
    (tmp_path / "questions.txt").write_text(world.as_file(world.questions))
    return tmp_path


@pytest.mark.slow
def test_the_world_has_analogies_that_word2vec_finds(world, files):
    sentences = [row["text"].split() for row in world.sentences]
    objective = Word2VecObjective(sentences, analogies=files / "questions.txt")
    assert objective(GOOD) > 0.3
    assert objective(GOOD) == objective(GOOD)
    assert objective({**GOOD, "epochs": 1, "alpha": 1e-4}) < 0.2
    assert objective({**GOOD, "min_count": 60}) < 0.2  # what has no vector is wrong
    words = {word for row in world.questions for word in row.values()}
    assert not words & {word for row in world.tests for word in row.values()}


def test_similarities(world, files):
    grid = [(row["a"], row["b"]) for row in world.questions]
    pairs = [f"{a}\t{b}\t9" for a, b in grid[:20]] + [
        f"{a}\t{d}\t1" for (a, _), (_, d) in zip(grid[:20], grid[20:40], strict=True)
    ]
    (files / "pairs.tsv").write_text("\n".join(pairs))
    objective = Word2VecObjective([row["text"].split() for row in world.sentences], similarity=files / "pairs.tsv")
    assert objective(GOOD) > 0.3


def test_the_case_of_questions(world, files):
    """``questions-words.txt`` asks for Athens; the words of a text are made lower case."""
    sentences = [row["text"].lower().split() for row in world.sentences]
    scores = {}
    for name, spell in (("lower", str.lower), ("upper", str.title)):
        (files / name).write_text(": grid\n" + spell(world.as_file(world.questions)).split("\n", 1)[1])
        for ignore in (False, True):
            objective = Word2VecObjective(sentences, analogies=files / name, ignore_case=ignore)
            scores[name, ignore] = objective(GOOD)
    assert scores["upper", False] == 0
    assert scores["upper", True] == scores["lower", True] == scores["lower", False] > 0.3


def test_reads_lines():
    assert read_sentences(["The cat, the DOG.\n\nA b_c"]) == [["the", "cat", "the", "dog"], ["a", "b_c"]]
    assert read_sentences(["The"], lower=False) == [["The"]]


@pytest.mark.slow
def test_the_verb_writes_vectors_and_resumes(files, monkeypatch):
    monkeypatch.chdir(files)
    verb = load_verb("sweep word2vec")(
        data=["text.txt"], output=files / "out", analogies=files / "questions.txt", population=4, rounds=2
    )
    result = verb.run(Silent())
    assert json.loads((files / "out" / "search.json").read_text())["best"] == result["best"]
    vectors = (files / "out" / "vectors.txt").read_text().splitlines()
    assert len(vectors[1].split()) == 1 + result["best"]["vector_size"]
    assert not (files / "out.search.jsonl").exists()
    with pytest.raises(UserError, match="exists already"):
        verb.run(Silent())


def test_bad_input(files):
    text = [["a", "b"]]
    for make, message in (
        (lambda: Word2VecObjective(text), "either"),
        (lambda: Word2VecObjective(text, files / "questions.txt", files / "questions.txt"), "either"),
        (lambda: Word2VecObjective(text, files / "no.txt"), "does not exist"),
        (lambda: Word2VecObjective([], files / "questions.txt"), "no text"),
        (lambda: Word2VecObjective(text, similarity=files / "questions.txt"), r"questions.txt:2: .*tabs"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    (files / "bad.txt").write_text(": s\na b c d\na b c\n")
    with pytest.raises(UserError, match=r"bad.txt:3: a line has four words"):
        Word2VecObjective(text, files / "bad.txt")
    (files / "bad.txt").write_text("a b c d\n")
    with pytest.raises(UserError, match=r"bad.txt:1: a section"):
        Word2VecObjective(text, files / "bad.txt")
    (files / "bad.txt").write_bytes(b": s\na b c \xff\n")
    with pytest.raises(UserError, match="not UTF-8"):
        Word2VecObjective(text, files / "bad.txt")
    (files / "bad.txt").write_text(": s\n")
    with pytest.raises(UserError, match="no question"):
        Word2VecObjective(text, files / "bad.txt")


def test_a_search_that_was_killed_goes_on_with_the_same_text_and_questions_only(files, monkeypatch):
    calls = []
    monkeypatch.setattr(Word2VecObjective, "__call__", lambda self, setting: calls.append(setting) or float(len(calls)))

    def killed(self, setting):
        raise KeyboardInterrupt

    options = {"output": files / "out", "data": [str(files / "text.txt")], "population": 4, "rounds": 2}
    run = load_verb("sweep word2vec")(analogies=files / "questions.txt", **options).run
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Word2VecObjective, "train", killed)  # of the best setting, when the search is over
        run(Silent())
    assert len(calls) == 7
    (files / "others.txt").write_text(": grid\na b c d\n")
    with pytest.raises(UserError, match="about something else"):
        load_verb("sweep word2vec")(analogies=files / "others.txt", **options).run(Silent())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Word2VecObjective, "train", killed)
        run(Silent())
    assert len(calls) == 7


@pytest.mark.slow
def test_the_claim_runs_in_miniature_and_is_deterministic(tmp_path):
    context = SimpleNamespace(scale="miniature", device="cpu", folder=tmp_path, report=lambda message: None)
    first, again = (claim.run(context, 0, {}) for _ in range(2))
    check_measurements(claim.CLAIM, first)
    assert first == again
    assert all(values["made_up"] <= values["optimum"] for values in first.values())


@pytest.mark.parametrize("variant", claim.SEARCHES)
def test_every_search_spends_the_same(variant):
    calls = []

    def score(setting):
        calls.append(setting)
        return claim.MadeUpScore(3)(setting)

    best = claim.SEARCHES[variant](claim.MadeUpScore.space, score, 60, 0)
    assert set(best) == set(claim.MadeUpScore.space)
    assert len(calls) <= 60
    assert variant == "cehpo" or len(calls) == 60
