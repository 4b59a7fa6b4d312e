import random
from types import SimpleNamespace

import pytest
import torch

from decoding.decore.decore_cases import make
from modelwright.decoding.decore import claim
from modelwright.verify.runner import check_claim
from modelwright.verify.worker import check_measurements


@pytest.mark.slow
def test_the_claim_runs_in_miniature_and_is_deterministic(tmp_path):
    pytest.importorskip("sklearn")
    context = SimpleNamespace(scale="miniature", device="cpu", folder=tmp_path, report=lambda message: None)
    prepared = claim.prepare(context)
    first, again = (claim.run(context, 0, prepared) for _ in range(2))
    check_claim(claim.CLAIM)
    check_measurements(claim.CLAIM, first)
    assert first == again
    assert prepared == claim.prepare(context)


def test_every_method_has_twelve_settings_to_choose_from():
    for setting in claim.SETTINGS.values():
        found = claim.grid(setting)
        assert set(found) == set(claim.MAKERS)
        assert {len(options) for options in found.values()} == {12}


def test_prompts_say_what_their_answers_follow_from():
    book = claim.Book(0, 6)
    truth = {(subject, name): obj for subject, name, obj in book.facts}
    questions = {book.ask(subject, name): (subject, name) for subject, name in truth}
    draw = random.Random(0)
    for kind in claim.KINDS:
        for _ in range(200):
            case = book.case(draw, kind, 2)
            subject, name = questions[case.bare]
            known = truth[subject, name]
            about = [book.say(subject, name, obj) for obj in book.objects[name]]
            told = [text for text in about if text in case.prompt]
            assert case.prompt.endswith(case.bare)
            if kind in ("closed", "other"):
                assert not told
                assert case.answer == known
            else:
                assert len(told) == 1
                assert case.answer in told[0]
                assert case.answer != known == case.wrong
                assert case.prompt.startswith(claim.CUES[kind])


def test_half_of_the_uncertain_prompts_are_answered_by_memory_in_training():
    book = claim.Book(0, 6)
    truth = {book.ask(subject, name): obj for subject, name, obj in book.facts}
    draw = random.Random(0)
    cases = [book.case(draw, "note", 1, test=False) for _ in range(600)]
    share = sum(case.answer == truth[case.bare] for case in cases) / 600
    assert 0.43 < share < 0.57


def test_the_tokenizer_knows_every_word_and_gives_answers_back():
    book = claim.Book(0, 6)
    tokenizer = claim.word_tokenizer(book)
    draw = random.Random(0)
    for kind in claim.KINDS:
        case = book.case(draw, kind, 2)
        assert tokenizer.unk_token_id not in tokenizer(case.prompt)["input_ids"]
        assert tokenizer.decode(tokenizer(case.answer)["input_ids"]) == case.answer
    ids, mask = claim.padded(tokenizer, ["Surely :", "Surely : Surely :"], "cpu")
    assert ids[:, -1].tolist() == [ids[1, -1]] * 2
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert int(ids[1, 0]) == tokenizer.bos_token_id


def test_a_right_answer_is_counted_as_a_whole():
    book = claim.Book(0, 6)
    tokenizer = claim.word_tokenizer(book)
    cases = [claim.Case("Surely :", "", "Surely"), claim.Case("Surely :", "", ":")]
    model = make(vocab_size=len(tokenizer))

    class Says(claim_decoding()):
        def scores(self, model, prompt):
            while True:
                law = torch.zeros(2, len(tokenizer))
                law[:, tokenizer("Surely")["input_ids"][0]] = 1
                yield law
                law[:, 2] = 2
                yield law

        def next_token_log_probs(self, model, input_ids, attention_mask=None):
            raise NotImplementedError

    model.generation_config.eos_token_id = 2
    bench = claim.Bench(model, None, tokenizer, {"note": cases}, [], [], None, "cpu")
    assert bench.accuracy(Says()) == {"note": 0.5}


def claim_decoding():
    from modelwright.decoding.loop import Decoding

    return Decoding
