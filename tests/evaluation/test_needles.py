"""Needle tests: they fit, needles stand where they should, and a reader that reads gets them right."""

import collections
import json
import re
import warnings

import pytest
import torch

from modelwright.errors import UserError
from modelwright.evaluation.needles import TASKS, cells, effective_length, found, make_needle, needle_rows
from modelwright.evaluation.needles_map import colour, write_map
from modelwright.models.loading import save_model
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.models.tokenizers import train_bpe
from modelwright.progress import Silent
from modelwright.verbs.needles import Needles, Ruler

LENGTH = 1200
TOKENIZER = byte_tokenizer()
ESSAYS = ["First sentence here. A second one follows! Is there a third?", "Another text. It ends."]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def size(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def place(prompt, sentence):
    """Where a sentence stands in the haystack, as a share of the rest of it."""
    haystack = prompt.split("\n\n")[1]
    before, _, after = haystack.partition(sentence)
    return len(before) / max(1, len(before) + len(after))


@pytest.mark.parametrize("bpe", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_a_test_fills_its_length_and_never_exceeds_it(task, bpe, tokenizer):
    if bpe:
        tokenizer = train_bpe(["the old captain walked past the market once again. " * 20, *ESSAYS], 400)
    for length in (700, LENGTH, 2500):
        made = make_needle(tokenizer, task=task, length=length, depth=0.3)
        assert made.tokens == size(tokenizer, made.prompt) <= length - 64
        assert made.tokens > length - 64 - 130
        assert made.length == length
        assert all(answer in made.prompt for answer in made.answers)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("task", ["single", "multikey", "multi"])
def test_the_needle_stands_at_its_depth(task, depth, tokenizer):
    made = make_needle(tokenizer, task=task, length=4000, depth=depth, trial=3)
    sentence = next(s for s in re.split(r"(?<=\.) ", made.prompt.split("\n\n")[1]) if made.answers[0] in s)
    assert abs(place(made.prompt, sentence) - depth) < 0.05
    assert made.prompt.count(made.answers[0]) == 1


def test_trials_differ_and_repeat(tokenizer):
    def make(**options):
        return make_needle(tokenizer, length=LENGTH, **options)

    assert make() == make()
    drawn = {make(trial=t, seed=s, depth=d).prompt for t in range(4) for s in range(2) for d in (0.1, 0.9)}
    assert len(drawn) == 16
    # Numbers too are drawn for each test, so that none can be learned from another.
    assert len({make(trial=t).answers for t in range(20)}) == 20


def test_tasks_ask_for_what_is_there(tokenizer):
    made = make_needle(tokenizer, task="multikey", length=LENGTH, needles=5)
    codes = dict(re.findall(r"The code of the (\w+) is (\d+)\.", made.prompt))
    asked = re.search(r"What is the code of the (\w+)\?", made.prompt).group(1)
    assert len(codes) == 5
    assert made.answers == (codes[asked],)
    made = make_needle(tokenizer, task="variables", length=LENGTH, needles=3)
    sets = dict(re.findall(r"Now (\w+) is set to (\w+)\.", made.prompt))
    assert len(sets) == 6
    value = re.search(r"variables hold (\d+)", made.prompt).group(1)

    def end(name):
        return end(sets[name]) if name in sets else name

    assert {name for name in sets if end(name) == value} == set(made.answers)
    # Each link stands before the next one.
    order = [made.prompt.index(f"Now {name} ") for name in made.answers]
    assert order == sorted(order)
    made = make_needle(tokenizer, task="words", length=LENGTH, needles=4)
    listed = made.prompt.split("\n\n")[1].split(", ")
    counts = sorted(set(listed), key=listed.count, reverse=True)
    assert set(counts[:4]) == set(made.answers)
    assert listed.count(counts[3]) > 2 * listed.count(counts[4])
    assert made.depth is None


def test_a_haystack_of_ones_own(tokenizer):
    made = make_needle(tokenizer, length=600, haystack=ESSAYS)
    rest = re.sub(r"The code of the \w+ is \d+\. ?", "", made.prompt.split("\n\n")[1])
    sentences = {"First sentence here.", "A second one follows!", "Is there a third?", "Another text.", "It ends."}
    assert set(re.split(r"(?<=[.!?])\s+", rest.strip())) == sentences
    with pytest.raises(UserError, match="no text in it"):
        make_needle(tokenizer, length=600, haystack=["  "])


def test_chat_prompts_do_not_begin_the_answer(tokenizer):
    base, chat = (make_needle(tokenizer, length=LENGTH, chat=flag) for flag in (False, True))
    assert "Answer:" in base.prompt
    assert chat.prompt.endswith("?")


def test_scoring():
    assert found("It is 1234567.", ["1234567"]) == 1
    assert found("It is 12345678", ["1234567"]) == 0
    assert found("abcde, FGHIJ", ["ABCDE", "FGHIJ", "XXXXX", "YYYYY"]) == 0.5


def test_cells_and_effective_length():
    rows = [
        {"task": "single", "length": n, "depth": d, "found": float(n < 300 or d > 0.5)}
        for n in (100, 200, 300, 400) for d in (0.0, 1.0) for _ in range(2)
    ]  # fmt: skip
    table = cells(rows)
    assert len(table) == 8
    assert table[0] == {"task": "single", "length": 100, "depth": 0.0, "trials": 2, "found": 1.0, "stderr": 0.0}
    assert effective_length(table) == {"single": 200}
    assert effective_length(table, 0.5) == {"single": 400}
    assert effective_length([{**c, "found": 0.0} for c in table]) == {"single": None}
    mixed = [{"task": "t", "length": 1, "depth": 0.0, "found": v} for v in (0.0, 1.0)]
    assert cells(mixed)[0]["stderr"] == pytest.approx(0.5)


def reader(tokenizer, blind_to=0):
    """Stands in for a model that reads, but not its first tokens."""

    def generate(input_ids, max_new_tokens, **_):
        rows = []
        for ids in input_ids:
            text = tokenizer.decode(ids[blind_to:], skip_special_tokens=True)
            key = re.search(r"What is the code of the (\w+)\?", text).group(1)
            hit = re.search(rf"The code of the {key} is (\d+)\.", text)
            answer = tokenizer(f" {hit.group(1) if hit else 'unknown'}.", add_special_tokens=False)["input_ids"]
            rows.append(torch.tensor([*ids.tolist(), *answer, *[2] * (max_new_tokens - len(answer))]))
        return torch.stack(rows)

    return generate


def test_a_grid_finds_what_a_reader_reads(tokenizer):
    model = tiny_model("llama", max_position_embeddings=2000)
    options = {"lengths": [800, 2000], "depths": [0.0, 1.0], "tasks": ["single", "multikey"], "trials": 3}
    rows = list(needle_rows(model, tokenizer, generate_with=reader(tokenizer), batch_size=2, **options))
    assert len(rows) == 2 * 2 * 2 * 3
    assert all(row["found"] == 1 for row in rows)
    assert {row["length"] for row in rows} == {800, 2000}
    assert "prompt" not in rows[0]
    blind = needle_rows(model, tokenizer, generate_with=reader(tokenizer, 600), batch_size=1, **options)
    table = cells([row for row in blind if row["task"] == "single"])
    assert [(c["length"], c["depth"], c["found"]) for c in table] == [
        (800, 0.0, 0.0), (800, 1.0, 1.0), (2000, 0.0, 0.0), (2000, 1.0, 1.0)
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_maps(tmp_path, suffix):
    grid = [
        {"task": task, "length": n, "depth": d, "found": 0.5, "trials": 1, "stderr": None}
        for task, depths in (("single", (0.0, 0.5)), ("words", (None,))) for n in (100, 2000) for d in depths
    ]  # fmt: skip
    path = tmp_path / f"map{suffix}"
    write_map(path, {"plain": grid, "<STRING>": grid}, title="a & b")
    data = path.read_bytes()
    if suffix == ".png":
        assert data.startswith(b"\x89PNG")
    elif suffix == ".html":
        text = data.decode()
        assert text.count("<table>") == 4
        assert "&lt;STRING&gt;: words" in text
        assert "2,000" in text
        assert text.count(">50%</td>") == 2 * (4 + 2)
    first = path.read_bytes()
    write_map(path, {"plain": grid, "<STRING>": grid}, title="a & b")
    assert path.read_bytes() == first or suffix == ".svg"


def test_colours_run_from_dark_to_bright():
    light = [0.3 * r + 0.6 * g + 0.1 * b for r, g, b in map(colour, (0, 0.25, 0.5, 0.75, 1))]
    assert light == sorted(light)
    with pytest.raises(UserError, match="written as .png"):
        write_map.__globals__["check_map"](write_map.__globals__["Path"]("map.jpg"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("needles")
    save_model(tiny_model("llama", max_position_embeddings=640, initializer_range=0.5), tokenizer, folder / "model")
    (folder / "essay.txt").write_text(" ".join(ESSAYS))
    return folder


def run(folder, out, **options):
    return Needles(
        model=str(folder / "model"), output=out / "n.json", trials=1, depths=[0.0, 1.0], new_tokens=4, device="cpu",
        **options,
    ).run(Silent())  # fmt: skip


def test_the_verb_compares_string_with_the_plain_model(folder, tmp_path):
    done = run(
        folder, tmp_path, lengths=[400, 640], shift=200.0, window=16, compare=True, tasks=["single", "words"],
        haystack=[str(folder / "essay.txt")], heatmap=tmp_path / "n.html", samples=tmp_path / "s.jsonl",
    )  # fmt: skip
    written = json.loads((tmp_path / "n.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert done["tests"] == len(rows) == 2 * (2 * 2 + 2)
    assert set(written["grids"]) == set(done["found"]) == {"plain", "string"}
    ((name, options),) = written["settings"]["methods"]
    assert (name, options["shift"], options["window"], options["attention_factor"]) == ("string", 200, 16, 1.0)
    assert (tmp_path / "n.html").read_text().count("<table>") == 4
    # Both grids see the same prompts, and beyond the shift the models differ.
    plain, string = ([r for r in rows if r["grid"] == name] for name in ("plain", "string"))
    assert [r["answers"] for r in plain] == [r["answers"] for r in string]
    assert [r["completion"] for r in plain] != [r["completion"] for r in string]


def test_lengths_are_those_of_the_model_by_default(folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="does not fit 160 tokens"):
            run(folder, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [641]}, "beyond the model's 640 positions"),
        ({"lengths": [400], "compare": True}, "or STRING's --shift"),
        ({"lengths": [400], "tasks": ["singel"]}, "did you mean 'single'"),
        ({"lengths": [400], "shift": 640.0}, "less than the training length of 640"),
        ({"lengths": [400], "heatmap": "map.pdf"}, "choose one of these suffixes"),
        ({"lengths": [400], "needles": 0}, "give at least 1"),
        ({"lengths": [400], "batch_size": 0}, "from 1"),
    ],
)
def test_bad_options(folder, tmp_path, options, message):
    if "heatmap" in options:
        options = {**options, "heatmap": tmp_path / options["heatmap"]}
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 3, 4])
@pytest.mark.parametrize("length", [700, 3000])
def test_frequent_words_lead_the_list(count, length):
    for trial in range(5):
        made = make_needle(TOKENIZER, task="frequent", length=length, needles=count, trial=trial)
        counts = collections.Counter(made.prompt.split("\n\n")[1].split(", "))
        ranked = [number for _, number in counts.most_common()]
        assert {word for word, _ in counts.most_common(count)} == set(made.answers)
        assert ranked[count - 1] > [*ranked, 0][count]


def test_a_question_has_one_paragraph_that_answers_it():
    for depth in (0.0, 1.0):
        made = make_needle(TOKENIZER, task="qa", length=1500, depth=depth)
        who = made.prompt.rpartition("town was ")[2].partition(" born")[0]
        said = [s for s in made.prompt.split("\n\n")[1].split(". ") if s.startswith(who)]
        assert len(said) == 1
        assert made.answers[0] in said[0]
        assert made.prompt.count(made.answers[0]) == 1


def test_several_keys_are_asked_for_in_their_order():
    made = make_needle(TOKENIZER, task="multiquery", length=900, needles=3)
    asked = re.findall(
        r"the (\w+)", made.prompt.rpartition("codes of ")[0].rpartition("codes of ")[2].partition("?")[0]
    )
    told = dict(re.findall(r"The code of the (\w+) is (\d+)\.", made.prompt))
    assert [told[key] for key in asked] == list(made.answers)


def test_ruler_and_methods(tmp_path):
    save_model(tiny_model("llama", max_position_embeddings=1024), TOKENIZER, tmp_path / "model")
    keys = {"model": str(tmp_path / "model"), "lengths": [700], "new_tokens": 4, "device": "cpu", "needles": 2}
    found = Ruler(**keys, output=tmp_path / "a.json", trials=1, depths=[0.5],
                  with_=["multi-draft: {prompt_lookup: true}"], compare=True).run(Silent())  # fmt: skip
    grids = json.loads((tmp_path / "a.json").read_text())["grids"]
    assert found["tests"] == 16
    assert grids["plain"] == grids["multi-draft"]
    assert len({cell["task"] for cell in grids["plain"]}) == 8
    with pytest.raises(UserError, match="give one of them"):
        Needles(**keys, output=tmp_path / "b.json", shift=0.3, with_=["string"]).run(Silent())
