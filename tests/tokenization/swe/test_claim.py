from types import SimpleNamespace

import pytest

from modelwright.tokenization.swe import claim, fit
from modelwright.verify.worker import check_measurements

TEXTS = ["the cat sat on the mat\n" * 5, "a dog and the cat ran to the log\n" * 5]


@pytest.mark.slow
def test_the_claim_runs_in_miniature_and_is_deterministic(tmp_path):
    context = SimpleNamespace(scale="miniature", device="cpu", folder=tmp_path, report=lambda message: None)
    prepared = claim.prepare(context)
    assert set(prepared["rates"]) == set(claim.VARIANTS)
    first, again = (claim.run(context, 0, prepared) for _ in range(2))
    check_measurements(claim.CLAIM, first)
    assert first == again
    assert {values["vocabulary"] for values in first.values()} == {300.0}


@pytest.mark.parametrize("variant", claim.VARIANTS)
def test_every_vocabulary_loses_nothing(variant):
    tokenizer = claim.tokenizer_of(variant, TEXTS, 262)
    assert tokenizer.get_vocab_size() <= 262
    for text in [*TEXTS, "Ω new\r\n"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_wordpiece_takes_the_greatest_ratio():
    # "qu" always together, "th" often: frequency takes th, the ratio takes qu.
    texts = ["quqo tho the ta th hot to qu qu th th th qu"] * 3
    assert "qu" in claim.tokenizer_of("wordpiece", texts, 257).get_vocab()
    assert (
        fit(claim.tokenizer_of("bpe", texts, 257), texts).tokens
        < fit(claim.tokenizer_of("wordpiece", texts, 257), texts).tokens
    )


def test_the_model_learns():
    setting = claim.Setting(0, 260, 16, 1, 32, 2, (1e-2,))
    tokenizer = claim.tokenizer_of("bpe", TEXTS, 270)
    bits = claim.bits_of_a_model(tokenizer, TEXTS * 60, TEXTS, setting, 1e-2, 0, "cpu")
    assert bits < 1 < fit(tokenizer, TEXTS).bits_per_character


@pytest.mark.parametrize("bar", claim.CLAIM.bars, ids=lambda b: b.statement)
def test_bars_name_what_is_measured(bar):
    assert {bar.method, bar.baseline} <= set(claim.VARIANTS)
    assert bar.metric in claim.CLAIM.metrics
