import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelwright.errors import UserError
from modelwright.worlds.retrieval import retrieval

SENTENCE = re.compile(r"The code of ([A-Z][a-z]+) is (\d+)\.")


def test_fingerprints_never_change():
    assert retrieval(0).fingerprint() == "e1ccd08782d6accb9b9060277d08e7f3aba6b507290f83580dcdc897da195cd4"
    odd = retrieval(1, unit="words", values=3, keys=2, filler="essay", lengths=(150, 300))
    assert odd.fingerprint() == "dd1ce92952fd2a0c36385b4ba511e55895a1c525257e364073e42e777821a28e"


def measure(text, unit):
    return len(text) if unit == "characters" else len(text.split())


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(0, 1500),
    depth=st.floats(0, 1),
    unit=st.sampled_from(["characters", "words"]),
    keys=st.integers(1, 6),
    values=st.integers(1, 3),
    filler=st.sampled_from(["noise", "essay"]),
)
def test_length_depth_and_answer_are_exact(seed, length, depth, unit, keys, values, filler):
    length += 1000 if unit == "characters" else 150
    world = retrieval(
        seed, lengths=[length], depths=[depth], train_per_cell=2, heldout_per_cell=1, unit=unit, keys=keys,
        values=values, filler=filler,
    )  # fmt: skip
    for row in (*world.train, *world.heldout):
        prompt = row["prompt"]
        assert measure(prompt, unit) == row["length"] == length
        assert prompt[row["position"] :].startswith(row["needle"])
        found = SENTENCE.findall(prompt)
        assert len(found) == keys * values
        assert [value for key, value in found if key == row["key"]] == row["answers"]
        assert row["answer"] == ", ".join(row["answers"])
        assert sorted(map(list, found)) == sorted(
            row["distractors"] + [[row["key"], value] for value in row["answers"]]
        )
        assert len({value for _, value in found}) == keys * values
        assert prompt.count(row["key"]) == values + 1

        body = prompt[prompt.index("\n\n") + 2 : prompt.rindex("\n\nQuestion:")]
        at = row["position"] - prompt.index(body)
        before, after = (len(SENTENCE.sub("", part).split()) for part in (body[:at], body[at:]))
        # Up to eight characters of padding may count as words.
        slack = 0 if unit == "words" else 5
        assert abs(before - depth * (before + after)) <= 0.5 + slack


def test_each_cell_has_as_many_rows():
    world = retrieval(0, lengths=(500, 700), depths=(0, 1), train_per_cell=3, heldout_per_cell=2)
    for rows, n in ((world.train, 3), (world.heldout, 2)):
        cells = [(row["length"], row["depth"]) for row in rows]
        assert {cells.count(cell) for cell in cells} == {n}
        assert len(set(cells)) == 4


def test_ends_of_the_text():
    world = retrieval(0, keys=1, depths=(0, 1))
    for row in world.train:
        end = row["position"] + len(row["needle"])
        if row["depth"] == 0:
            assert row["prompt"][: row["position"]].endswith("Remember them.\n\n")
        else:
            assert row["prompt"][end:].startswith("\n\nQuestion:")


def test_splits_share_no_key():
    world = retrieval(0, train_per_cell=50, heldout_per_cell=50)

    def keys(rows):
        return [key for row in rows for key in (row["key"], *(key for key, _ in row["distractors"]))]

    everything = keys(world.train) + keys(world.heldout)
    assert len(set(everything)) == len(everything) == 2 * 250 * 4


def test_essays_repeat_and_noise_does_not():
    def sentences(filler):
        prompt = retrieval(0, filler=filler, lengths=[20_000], depths=[0.5], keys=1, train_per_cell=1).train[0][
            "prompt"
        ]
        return len(set(prompt.split(". ")))

    assert sentences("essay") < 60
    assert sentences("noise") > 400


class Pieces:
    """A tokenizer whose tokens are neither words nor characters: up to three letters, or one other character."""

    def __call__(self, text):
        return {"input_ids": [0, *re.findall(r" ?[A-Za-z]{1,3}|\s|[^A-Za-z]", text)]}


@pytest.mark.parametrize("length", [260, 333, 1000, 1001, 1002, 4321])
def test_exact_in_tokens(length):
    world = retrieval(
        0, unit="tokens", tokenizer=Pieces(), lengths=[length], train_per_cell=2, heldout_per_cell=0
    )  # fmt: skip
    assert {len(Pieces()(row["prompt"])["input_ids"]) for row in world.train} == {length}
    assert world.parameters["tokenizer"] == "Pieces"


@pytest.mark.parametrize("length", [400, 401, 402, 403])
def test_fewer_filler_words_when_padding_has_the_wrong_size(length):
    def uneven(text):  # padding costs two tokens or none, so an odd gap needs another number of words
        return {"input_ids": [0] * (2 * len(text.split()) + text.count("The "))}

    world = retrieval(0, unit="tokens", tokenizer=uneven, lengths=[length], train_per_cell=4, heldout_per_cell=0)
    assert {len(uneven(row["prompt"])["input_ids"]) for row in world.train} == {length}


def test_a_tokenizer_that_cannot_hit_the_length():
    def even(text):
        return {"input_ids": [0] * (2 * len(text))}

    with pytest.raises(UserError, match="exactly 1201 tokens"):
        retrieval(0, unit="tokens", tokenizer=even, lengths=[1201])


def test_wording_is_the_users():
    world = retrieval(0, intro="", needle="{key}={value};", question="\n{key}=", lengths=[300], value_digits=2)
    for row in world.train:
        assert row["prompt"].endswith(f"\n{row['key']}=")
        assert f"{row['key']}={row['answer']};" in row["prompt"]
        assert len(row["answer"]) == 2


def test_a_million_characters():
    (row,) = retrieval(0, lengths=[1_000_000], depths=[0.5], train_per_cell=1, heldout_per_cell=0).train
    assert len(row["prompt"]) == 1_000_000
    assert abs(row["position"] / 1_000_000 - 0.5) < 0.01
