"""Sums by type: against plain definitions, and the same whatever way the data come."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import forked
from modelwright.errors import UserError
from modelwright.models.tiny import tiny_model
from modelwright.probing.fair_lm import TokenLossReport, TokenLossTracker, frequency_bins, measure_rows
from modelwright.probing.fair_lm.tracker import scored_positions


def batch(seed=0, rows=4, length=12, width=30, ignored=True):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, width, generator=generator) * 3
    labels = torch.randint(0, width, (rows, length), generator=generator)
    if ignored:
        labels[torch.rand(rows, length, generator=generator) < 0.2] = -100
    return logits, labels


def same(a, b, tolerance=1e-12):
    np.testing.assert_array_equal(a.counts, b.counts)
    np.testing.assert_allclose(a.loss, b.loss, rtol=tolerance, atol=0)
    if a.correct is not None or b.correct is not None:
        np.testing.assert_array_equal(a.correct, b.correct)


def test_every_number_is_its_definition():
    logits, labels = batch()
    tracker = TokenLossTracker(30)
    tracker.update(logits, labels)
    report = tracker.compute()
    losses, hits = {}, {}
    for row in range(4):
        for t in range(11):
            target = int(labels[row, t + 1])
            if target == -100:
                continue
            log_p = logits[row, t].double().log_softmax(-1)[target]
            losses.setdefault(target, []).append(-float(log_p))
            hits.setdefault(target, []).append(float(logits[row, t].argmax() == target))
    everything = [value for of in losses.values() for value in of]
    assert report.average == pytest.approx(np.mean(everything), rel=1e-6)
    assert report.balanced == pytest.approx(np.mean([np.mean(of) for of in losses.values()]), rel=1e-6)
    assert report.balanced_perplexity == pytest.approx(math.exp(report.balanced))
    assert report.perplexity == pytest.approx(math.exp(report.average))
    assert report.accuracy == pytest.approx(np.mean([h for of in hits.values() for h in of]))
    assert report.balanced_accuracy == pytest.approx(np.mean([np.mean(of) for of in hits.values()]))
    for target, of in losses.items():
        assert report.per_token[target] == pytest.approx(np.mean(of), rel=1e-5)
        assert report.counts[target] == len(of)
    assert (report.types, report.unseen) == (len(losses), 30 - len(losses))
    assert np.isnan(report.per_token[~report.seen]).all()


@given(st.integers(0, 10_000), st.integers(1, 40))
def test_the_average_is_the_weighted_mean_of_the_types(seed, width):
    generator = np.random.default_rng(seed)
    nll = torch.from_numpy(generator.exponential(2, 200))
    tracker = TokenLossTracker(width)
    tracker.update_from_nll(nll, torch.from_numpy(generator.integers(0, width, 200)))
    report = tracker.compute()
    seen = report.seen
    assert report.average == pytest.approx(
        float((report.counts[seen] * report.per_token[seen]).sum() / report.counts.sum()), rel=1e-10
    )
    assert report.average == pytest.approx(float(nll.mean()), rel=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_it_is_transformers_own_loss(side):
    model = tiny_model("llama")
    ids = torch.randint(3, 259, (3, 15), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    pad = slice(0, 4) if side == "left" else slice(11, 15)
    mask[1, pad] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 5:8] = -100
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
    tracker = TokenLossTracker(259)
    tracker.update(out.logits, labels)
    assert tracker.compute().average == pytest.approx(out.loss.item(), rel=1e-6)


def test_padding_on_either_side_measures_what_the_sequences_measure_alone():
    model = tiny_model("gpt2")
    rows = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 14)]
    alone = measure_rows(model, [{"input_ids": row} for row in rows], batch_size=1).compute()
    right = measure_rows(model, [{"input_ids": row} for row in rows], batch_size=3).compute()
    left = TokenLossTracker(259)
    ids = torch.full((3, 14), 2)  # the end token pads, with a label of its own
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, 14 - len(row) :], mask[i, 14 - len(row) :] = row, 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    left.update(logits, ids, attention_mask=mask)
    assert alone.tokens == 4 + 8 + 13
    for other in (right, left.compute()):
        np.testing.assert_array_equal(other.counts, alone.counts)
        np.testing.assert_allclose(other.loss, alone.loss, rtol=1e-4)
    unmasked = TokenLossTracker(259)
    unmasked.update(logits, ids)
    assert unmasked.compute().counts[2] > alone.counts[2]  # what the mask is for


def test_the_first_token_of_a_packed_document_does_not_count():
    labels = torch.tensor([[5, 6, 7, 8, 9, 10]])
    rows, at, targets = scored_positions(labels, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert targets.tolist() == [6, 7, 9, 10]
    assert at.tolist() == [0, 1, 3, 4]
    assert rows.tolist() == [0] * 4
    # A mask of packed data says who sees whom, not what is padding.
    assert scored_positions(labels, attention_mask=torch.ones(1, 1, 6, 6))[2].tolist() == [6, 7, 8, 9, 10]


def test_packed_documents_are_measured_as_they_are_alone():
    model = tiny_model("llama", attn_implementation="eager")
    a, b = [torch.randint(3, 259, (n,), generator=torch.Generator().manual_seed(n)) for n in (6, 8)]
    alone = measure_rows(model, [{"input_ids": a}, {"input_ids": b}], batch_size=1).compute()
    place = torch.cat([torch.arange(6), torch.arange(8)])
    number = torch.cat([torch.zeros(6), torch.ones(8)])
    block = (number[:, None] == number) & (torch.arange(14)[:, None] >= torch.arange(14))
    mask = torch.where(block, 0.0, torch.finfo(torch.float32).min)[None, None]

    def collate(rows):
        return {"input_ids": torch.cat([a, b])[None], "position_ids": place[None], "attention_mask": mask}

    packed = measure_rows(model, [{"input_ids": a}], collate=collate).compute()
    np.testing.assert_array_equal(packed.counts, alone.counts)
    np.testing.assert_allclose(packed.loss, alone.loss, rtol=1e-4)


def test_uniform_and_certain_predictions():
    labels = torch.tensor([[1, 1, 2, 3, 1, 4]])
    tracker = TokenLossTracker(10)
    tracker.update(torch.zeros(1, 6, 10), labels)
    report = tracker.compute()
    np.testing.assert_allclose(report.per_token[report.seen], math.log(10), rtol=1e-6)
    assert report.average == pytest.approx(report.balanced) == pytest.approx(math.log(10))
    certain = TokenLossTracker(10)
    logits = torch.zeros(1, 6, 10)
    logits[0, torch.arange(5), labels[0, 1:]] = 100.0
    certain.update(logits, labels)
    assert certain.compute().average == certain.compute().balanced == 0
    assert certain.compute().accuracy == certain.compute().balanced_accuracy == 1


def test_equally_frequent_types_make_balanced_the_average():
    types = torch.arange(7).repeat(5)
    tracker = TokenLossTracker(7)
    tracker.update_from_nll(torch.rand(35, generator=torch.Generator().manual_seed(0)).double(), types)
    report = tracker.compute()
    assert report.balanced == pytest.approx(report.average, rel=1e-15)
    assert report.accuracy is report.balanced_accuracy is None


@given(st.permutations(range(6)), st.integers(1, 5))
def test_batches_in_any_order_and_split_give_the_same(order, cut):
    batches = [batch(seed, rows=2) for seed in range(6)]
    whole = TokenLossTracker(30)
    for logits, labels in batches:
        whole.update(logits, labels)
    first, second = TokenLossTracker(30), TokenLossTracker(30)
    for place, number in enumerate(order):
        for row in range(2):
            logits, labels = (part[row : row + 1] for part in batches[number])
            (first if place < cut else second).update(logits, labels)
    same(first.merge(second).compute(), whole.compute())


def test_bfloat16_is_brought_to_float32_before_the_logarithm():
    logits, labels = batch()
    narrow = TokenLossTracker(30)
    narrow.update(logits.bfloat16(), labels)
    wide = TokenLossTracker(30)
    wide.update(logits.bfloat16().float(), labels)
    same(narrow.compute(), wide.compute())


def test_a_merge_with_losses_alone_has_no_accuracy():
    tracker, other = TokenLossTracker(30), TokenLossTracker(30)
    tracker.update(*batch())
    other.update_from_nll(torch.ones(3), torch.tensor([1, 2, -100]))
    assert tracker.compute().accuracy is not None
    assert tracker.merge(other).compute().accuracy is None
    assert other.compute().tokens == 2


def _member(rank, folder):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    tracker, bare = TokenLossTracker(30), TokenLossTracker(30)
    for seed in range(1) if rank == 0 else range(1, 5):  # unequal shares
        tracker.update(*batch(seed))
    bare.update(*batch(rank))
    if rank:
        bare.update_from_nll(torch.ones(1), torch.ones(1, dtype=torch.long))
    tracker.all_reduce().compute().to_parquet(folder / f"{rank}.parquet")
    assert bare.all_reduce().compute().accuracy is None  # one rank alone knows no hits
    dist.barrier()
    os._exit(0)


def test_two_processes_are_one(tmp_path):
    assert forked.run(_member, 2, tmp_path) == [0, 0]
    whole = TokenLossTracker(30)
    for seed in range(5):
        whole.update(*batch(seed))
    for rank in range(2):
        same(TokenLossReport.from_parquet(tmp_path / f"{rank}.parquet"), whole.compute())
    assert whole.all_reduce() is whole  # alone it does nothing


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda t: t.update(torch.zeros(1, 3, 5), torch.tensor([[0, 5, 1]])), "Label 5 is outside the vocabulary of 5"),
        (lambda t: t.update(torch.zeros(1, 3, 5), torch.tensor([[0, -1, 1]])), "Label -1 is outside"),
        (lambda t: t.update(torch.zeros(1, 3, 6), torch.zeros(1, 3).long()), "logits are for 6 token types"),
        (lambda t: t.update(torch.zeros(1, 4, 5), torch.zeros(1, 3).long()), "do not fit labels"),
        (lambda t: t.update_from_nll(torch.tensor([-0.5]), torch.tensor([1])), "cannot be below 0"),
        (lambda t: t.update_from_nll(torch.tensor([math.nan]), torch.tensor([1])), "type 1 is nan"),
        (lambda t: t.update_from_nll(torch.tensor([math.inf]), torch.tensor([1])), "type 1 is inf"),
        (lambda t: t.update(torch.full((1, 3, 5), math.nan), torch.zeros(1, 3).long()), "not finite"),
        (lambda t: t.update_from_nll(torch.zeros(2), torch.zeros(3).long()), "do not fit"),
        (lambda t: t.compute(), "no target to measure"),
        (lambda t: t.merge(TokenLossTracker(6)), "vocabularies of 5 and 6"),
        (lambda t: TokenLossTracker(0), "at least one token"),
    ],
)
def test_mistakes_are_sentences(act, message):
    with pytest.raises(UserError, match=message):
        act(TokenLossTracker(5))


def test_ignored_targets_may_have_any_loss_and_alone_are_none():
    tracker = TokenLossTracker(5)
    tracker.update_from_nll(torch.tensor([math.nan, 1.0]), torch.tensor([-100, 2]))
    assert tracker.compute().average == 1
    empty = TokenLossTracker(5)
    empty.update(torch.zeros(1, 3, 5), torch.full((1, 3), -100))
    with pytest.raises(UserError, match="every label is ignored"):
        empty.compute()


def test_different_tokenizers_are_not_merged():
    with pytest.raises(UserError, match="different tokenizers"):
        TokenLossTracker(5, tokenizer="a").merge(TokenLossTracker(5, tokenizer="b"))


def test_millions_of_addends_stay_exact():
    tracker = TokenLossTracker(2)
    for _ in range(30):
        tracker.update_from_nll(torch.full((100_000,), 0.1), torch.zeros(100_000).long())
    tenth = float(torch.tensor(0.1))
    assert tracker.compute().average == pytest.approx(tenth, rel=1e-12)
    assert frequency_bins(tracker.compute().counts).label(int(frequency_bins([3_000_000]).index[0])).startswith("[")
