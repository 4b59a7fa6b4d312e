"""The sampler's law, and that running sums draw what the matrix of scores draws."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import normalize

from modelwright.curation.jest import sampler as sampler_module
from modelwright.curation.jest.sampler import JointSampler
from modelwright.curation.jest.scores import (
    batch_loss,
    chunk_sizes,
    draw_from_scores,
    pairwise_sigmoid_nll,
    select_from_scores,
    softmax_scores,
)
from modelwright.errors import UserError
from modelwright.kernels.largest_tensor import LargestTensor
from modelwright.training.contrastive.encoded import Encoded


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def encoded(count, seed=0, width=8, scale=5.0, bias=-2.0, dtype=torch.float64):
    rows = torch.randn(2, count, width, dtype=torch.float64, generator=generator(seed))
    queries, keys = normalize(rows, dim=-1).to(dtype)
    return Encoded(
        queries, keys, None, torch.tensor(scale, dtype=dtype), None if bias is None else torch.tensor(bias, dtype=dtype)
    )


def matrix(encoded):
    return pairwise_sigmoid_nll(encoded.queries, encoded.keys, encoded.scale, encoded.bias)


def dense(criterion, learner, reference):
    signs = {"learnability": (1, -1), "hard": (1, 0), "easy_reference": (0, -1), "uniform": (0, 0)}[criterion]
    return signs[0] * matrix(learner) + signs[1] * matrix(reference)


def batch_score(scores, indices):
    return float(scores[indices][:, indices].sum() / len(indices))


# Scores


def test_the_pairs_sum_to_the_siglip_loss_and_swapping_modalities_transposes():
    from transformers import SiglipConfig, SiglipModel

    text = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1}
    image = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    image |= {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config={**text, "eos_token_id": 2}, vision_config=image)).eval()
    with torch.no_grad():
        model.logit_scale.fill_(1.3)
        model.logit_bias.fill_(-2.1)
        out = model(input_ids=torch.randint(3, 20, (6, 8)), pixel_values=torch.randn(6, 3, 8, 8), return_loss=True)
        found = pairwise_sigmoid_nll(out.image_embeds, out.text_embeds, model.logit_scale.exp(), model.logit_bias)
        swapped = pairwise_sigmoid_nll(out.text_embeds, out.image_embeds, model.logit_scale.exp(), model.logit_bias)
    torch.testing.assert_close(found.sum() / 6, out.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(swapped, found.T)


def test_softmax_scores_are_the_losses_in_a_batch_of_the_chosen_and_the_candidate():
    logits = 4 * torch.randn(7, 7, dtype=torch.float64, generator=generator())
    chosen = torch.tensor([2, 5])
    found = softmax_scores(logits, chosen)
    for candidate in (0, 1, 3, 4, 6):
        rows = torch.tensor([candidate, 2, 5])
        part = logits[rows][:, rows]
        expected = (-part.log_softmax(1)[0, 0] - part.log_softmax(0)[0, 0]) / 2
        torch.testing.assert_close(found[candidate], expected)
    torch.testing.assert_close(softmax_scores(logits, chosen[:0]), -logits.diagonal())


def test_chunk_sizes():
    assert chunk_sizes(128, 16) == [8] * 16
    assert chunk_sizes(100, 16) == [6] * 15 + [10]
    assert chunk_sizes(3, 16) == [1, 1, 1]
    assert chunk_sizes(5, 1) == [5]
    with pytest.raises(UserError, match="equal chunks"):
        chunk_sizes(100, 16, strict=True)
    with pytest.raises(UserError, match="at least 1"):
        chunk_sizes(4, 0)


# Law


def chi_square(counts, probabilities, draws):
    expected = torch.tensor(probabilities, dtype=torch.float64) * draws
    return float(((torch.tensor(counts, dtype=torch.float64) - expected) ** 2 / expected).sum())


def quantile(dof):
    # Wilson and Hilferty, at 1e-4: a right sampler fails once in ten thousand seeds, and the seed is fixed.
    return dof * (1 - 2 / (9 * dof) + 3.719 * math.sqrt(2 / (9 * dof))) ** 3


@pytest.mark.parametrize(("normalized", "temperature"), [(False, 1.0), (True, 2.0)])
def test_ordered_draws_have_the_laws_exact_probabilities(normalized, temperature):
    scores = 0.7 * torch.randn(5, 5, dtype=torch.float64, generator=generator(1))
    exact = {}
    for order in itertools.permutations(range(5), 3):
        probability, chosen = 1.0, []
        for row in order:
            logits = torch.stack(
                [scores[i, i] + sum((scores[i, j] + scores[j, i] for j in chosen), torch.tensor(0.0)) for i in range(5)]
            )
            if normalized:
                logits = logits / (1 + 2 * len(chosen))
            logits = logits / temperature
            logits[chosen] = -math.inf
            probability *= float(logits.softmax(0)[row])
            chosen.append(row)
        exact[order] = probability
    assert sum(exact.values()) == pytest.approx(1)
    noise, draws = generator(2), 20_000
    counts = dict.fromkeys(exact, 0)
    for _ in range(draws):
        found = select_from_scores(scores, 3, 3, noise, normalize=normalized, temperature=temperature)
        counts[tuple(found.tolist())] += 1
    assert chi_square(list(counts.values()), list(exact.values()), draws) < quantile(len(exact) - 1)


def test_one_round_is_plackett_luce_on_the_diagonal():
    scores = torch.randn(4, 4, dtype=torch.float64, generator=generator(3))
    weights = scores.diagonal().exp()
    exact = {
        (i, j): float(weights[i] / weights.sum() * weights[j] / (weights.sum() - weights[i]))
        for i, j in itertools.permutations(range(4), 2)
    }
    noise, draws = generator(4), 10_000
    counts = dict.fromkeys(exact, 0)
    for _ in range(draws):
        counts[tuple(select_from_scores(scores, 2, 1, noise).tolist())] += 1
    assert chi_square(list(counts.values()), list(exact.values()), draws) < quantile(len(exact) - 1)


def test_equal_scores_give_uniform_subsets():
    noise, draws = generator(5), 10_000
    counts = dict.fromkeys(itertools.combinations(range(5), 2), 0)
    for _ in range(draws):
        counts[tuple(sorted(select_from_scores(torch.zeros(5, 5), 2, 2, noise).tolist()))] += 1
    assert chi_square(list(counts.values()), [0.1] * 10, draws) < quantile(9)


@pytest.mark.parametrize("chunks", [1, 4, 16])
def test_a_constant_on_the_diagonal_changes_nothing(chunks):
    scores = torch.randn(40, 40, dtype=torch.float64, generator=generator(6))
    moved = scores + 7.5 * torch.eye(40, dtype=torch.float64)
    for seed in range(20):
        assert torch.equal(
            select_from_scores(scores, 16, chunks, generator(seed)),
            select_from_scores(moved, 16, chunks, generator(seed)),
        )


# Running sums against the matrix


@pytest.mark.parametrize("criterion", ["learnability", "hard", "easy_reference", "uniform"])
@pytest.mark.parametrize(("chunks", "block"), [(1, 4), (3, 5), (8, 64), (24, 7), (7, 2048)])
@pytest.mark.parametrize("normalized", [False, True])
def test_running_sums_draw_what_the_matrix_draws(criterion, chunks, block, normalized):
    learner, reference = encoded(60, 0), encoded(60, 1, width=5, scale=11.0, bias=-4.0)
    sampler = JointSampler(
        n_chunks=chunks, filter_ratio=0.6, criterion=criterion, block_size=block, normalize=normalized
    )
    found = sampler.draw(learner, reference, generator=generator(3))
    expected = draw_from_scores(dense(criterion, learner, reference), 24, chunks, generator(3), normalize=normalized)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.chunks, expected.chunks)
    torch.testing.assert_close(found.scores.double(), expected.scores, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("criterion", ["learnability", "hard", "easy_reference"])
@pytest.mark.parametrize(("chunks", "block"), [(1, 4), (3, 5), (24, 7)])
def test_the_softmax_form_draws_what_its_definition_draws(criterion, chunks, block):
    learner, reference = encoded(50, 0, bias=None), encoded(50, 1, scale=9.0, bias=None)
    found = JointSampler(n_chunks=chunks, criterion=criterion, form="softmax", block_size=block).select(
        learner, reference, 24, generator(3)
    )
    noise, chosen = generator(3), torch.empty(0, dtype=torch.int64)
    taken = torch.zeros(50, dtype=torch.bool)
    for size in chunk_sizes(24, chunks):
        scores = torch.zeros(50, dtype=torch.float64)
        if criterion != "easy_reference":
            scores += softmax_scores(learner.scale * learner.queries @ learner.keys.T, chosen)
        if criterion != "hard":
            scores -= softmax_scores(reference.scale * reference.queries @ reference.keys.T, chosen)
        new = sampler_module.draw_chunk(scores, taken, size, noise, 1.0)
        taken[new] = True
        chosen = torch.cat([chosen, new])
    assert torch.equal(found, chosen)


def test_no_row_twice_and_exactly_as_many_as_asked():
    learner, reference = encoded(50), encoded(50, 1)
    for size in (1, 7, 49, 50):
        found = JointSampler(n_chunks=4).select(learner, reference, size, generator())
        assert len(found) == len(set(found.tolist())) == size
    assert sorted(JointSampler(filter_ratio=0).select(learner, reference).tolist()) == list(range(50))
    assert len(JointSampler(filter_ratio=0.8).select(learner, reference)) == 10


def test_super_batch_sizes():
    assert JointSampler(filter_ratio=0.8).super_batch_size(128) == 640
    assert JointSampler(filter_ratio=0.8).batch_size(640) == 128
    assert JointSampler(filter_ratio=0.9).super_batch_size(256) == 2560
    assert JointSampler(filter_ratio=0.0).super_batch_size(7) == 7
    assert JointSampler(filter_ratio=0.8).super_batch_size(32_768) == 163_840


def test_a_learner_equal_to_its_reference_draws_uniformly():
    same = encoded(30)
    sampler, uniform = JointSampler(n_chunks=4), JointSampler(n_chunks=4, criterion="uniform")
    draw = sampler.draw(same, same, 12, generator(1))
    assert float(draw.scores.abs().max()) == 0
    assert torch.equal(draw.indices, uniform.select(same, None, 12, generator(1)))


def test_criteria_ignore_what_they_do_not_need():
    reference = encoded(30, 1)
    sampler = JointSampler(n_chunks=4, criterion="easy_reference")
    alone = sampler.select(None, reference, 12, generator(1))
    assert torch.equal(alone, sampler.select(encoded(30, 2), reference, 12, generator(1)))
    nan = encoded(30)._replace(scale=torch.tensor(math.nan))
    assert torch.equal(alone, sampler.select(nan, reference, 12, generator(1)))
    hard = JointSampler(n_chunks=4, criterion="hard")
    assert torch.equal(
        hard.select(encoded(30), None, 12, generator(1)), hard.select(encoded(30), reference, 12, generator(1))
    )


def test_colder_is_greedier_and_joint_is_more_learnable_than_independent():
    means = {}
    for chunks, temperature in ((1, 1.0), (8, 100.0), (8, 3.0), (8, 1.0), (8, 0.3), (8, 0.0)):
        found = []
        for seed in range(100):
            scores = 0.5 * torch.randn(40, 40, dtype=torch.float64, generator=generator(seed))
            chosen = select_from_scores(scores, 16, chunks, generator(seed + 1000), temperature=temperature)
            found.append(batch_score(scores, chosen))
        means[chunks, temperature] = sum(found) / len(found)
    cooling = [means[8, t] for t in (100.0, 3.0, 1.0, 0.3, 0.0)]
    assert cooling == sorted(cooling)
    assert means[8, 1.0] > means[1, 1.0]


def test_the_coldest_draw_takes_the_largest():
    scores = torch.diag(torch.arange(10.0))
    assert select_from_scores(scores, 3, 1, temperature=0).tolist() == [9, 8, 7]


def test_a_seed_means_one_draw_and_large_scores_do_not_overflow():
    learner, reference = encoded(50, scale=1e4, bias=1e4), encoded(50, 1, scale=1e4, bias=-1e4)
    sampler = JointSampler(n_chunks=4)
    assert torch.equal(
        sampler.select(learner, reference, 20, generator(1)), sampler.select(learner, reference, 20, generator(1))
    )
    others = {tuple(JointSampler(n_chunks=4).select(encoded(50), encoded(50, 1), 20).tolist()) for _ in range(4)}
    assert len(others) > 1


def test_half_precision_embeddings_are_scored_in_single():
    learner, reference = encoded(50), encoded(50, 1)
    half = [Encoded(*(None if x is None else x.bfloat16() for x in e)) for e in (learner, reference)]
    draw = JointSampler(n_chunks=4).draw(half[0], half[1], 20, generator(1))
    exact = [Encoded(*(None if x is None else x.bfloat16().double() for x in e)) for e in (learner, reference)]
    expected = JointSampler(n_chunks=4).draw(exact[0], exact[1], 20, generator(1))
    assert torch.equal(draw.indices, expected.indices)
    torch.testing.assert_close(draw.scores, expected.scores, rtol=1e-5, atol=1e-5)


def test_autocast_does_not_coarsen_scores():
    learner, reference = encoded(50, dtype=torch.float32), encoded(50, 1, dtype=torch.float32)
    expected = JointSampler(n_chunks=4).draw(learner, reference, 20, generator(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        draw = JointSampler(n_chunks=4).draw(learner, reference, 20, generator(1))
        loss = batch_loss(learner, draw.indices, 20)
    assert torch.equal(draw.scores, expected.scores)
    assert loss == batch_loss(learner, draw.indices, 20)


def test_nothing_of_the_super_batchs_square_is_made():
    count, block = 1000, 32
    for form in ("sigmoid", "softmax"):
        learner, reference = encoded(count), encoded(count, 1)
        with LargestTensor() as seen:
            JointSampler(n_chunks=4, block_size=block, form=form).select(learner, reference)
        assert seen.elements <= 2 * count * 8, seen.name  # the embeddings themselves


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter_ratio": 1.0}, "filter_ratio"),
        ({"filter_ratio": -0.1}, "filter_ratio"),
        ({"n_chunks": 0}, "n_chunks"),
        ({"criterion": "easy_ref"}, "did you mean 'easy_reference'"),
        ({"form": "sigmoidal"}, "did you mean 'sigmoid'"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"normalize": True, "form": "softmax"}, "sigmoid form"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        JointSampler(**options)


def with_row(encoded, row, value):
    queries = encoded.queries.clone()
    queries[row] = value
    return encoded._replace(queries=queries)


@pytest.mark.parametrize(
    ("learner", "reference", "size", "message"),
    [
        (encoded(10), encoded(10, 1), 11, "11 pairs cannot be chosen from a super-batch of 10"),
        (encoded(10), encoded(9, 1), 4, "10 pairs and the reference of 9"),
        (encoded(10), None, 4, "needs the reference"),
        (None, encoded(10), 4, "needs the learner"),
        (None, None, 4, "nothing to choose from"),
        (encoded(10, bias=None), encoded(10), 4, "no bias"),
        (with_row(encoded(10), 3, 2.0), encoded(10), 4, "row 3 has length"),
        (encoded(10), with_row(encoded(10), 3, 0.0), 4, "reference's query embedding of row 3 has length 0"),
        (with_row(encoded(10), 3, math.nan), encoded(10), 4, "diverged"),
        (encoded(10)._replace(scale=torch.tensor(math.nan)), encoded(10), 4, "diverged"),
        (encoded(10)._replace(keys=encoded(9).keys), encoded(10), 4, "one row of each"),
        (encoded(10, scale=math.inf), encoded(10), 4, "learner's scale is inf: it has diverged"),
        (encoded(10), encoded(10)._replace(scale=torch.tensor(math.nan)), 4, "reference's scale is nan.*take another"),
        (encoded(10), encoded(10)._replace(bias=torch.tensor(math.inf)), 4, "reference's bias is inf.*take another"),
        (encoded(10), with_row(encoded(10), 3, math.nan), 4, "reference's query embedding of row 3.*take another"),
    ],
)
def test_bad_embeddings(learner, reference, size, message):
    with pytest.raises(UserError, match=message):
        JointSampler().select(learner, reference, size)


def test_bad_matrices():
    scores = torch.zeros(6, 6)
    scores[4, 4] = math.nan
    with pytest.raises(UserError, match="row 4"):
        select_from_scores(scores, 2, 1)
    with pytest.raises(UserError, match="super-batch of 6"):
        select_from_scores(scores, 7, 1)
    with pytest.raises(UserError, match="square"):
        select_from_scores(scores[:3], 2, 1)
    with pytest.raises(UserError, match="equal chunks"):
        select_from_scores(torch.zeros(6, 6), 5, 2, strict=True)
