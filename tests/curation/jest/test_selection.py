"""JEST as the trainer's choice of batches."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize

import forked
from modelwright import catalog
from modelwright.curation.jest.flexi import patch_size
from modelwright.curation.jest.sampler import JointSampler
from modelwright.curation.jest.scores import batch_loss, pairwise_sigmoid_nll
from modelwright.curation.jest.selection import JestSelection, cached_reference, flop_ratio
from modelwright.errors import UserError
from modelwright.models.tiny_pairs import tiny_pair
from modelwright.training.contrastive.encoded import Encoded
from modelwright.training.contrastive.encoders import pair_encoder


def encoded(count, seed=0, width=8, scale=5.0, bias=-2.0):
    rows = torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))
    queries, keys = normalize(rows, dim=-1)
    return Encoded(queries, keys, None, torch.tensor(scale), None if bias is None else torch.tensor(bias))


def columns(encoded, **more):
    count = len(encoded.queries)
    bias = torch.tensor(math.nan) if encoded.bias is None else encoded.bias
    return {
        "ref_query_embeds": encoded.queries,
        "ref_key_embeds": encoded.keys,
        "ref_scale": encoded.scale.expand(count),
        "ref_bias": bias.expand(count),
        **more,
    }


def batches(count, sizes=2):
    return [{"query_input_ids": part[:, None]} for part in torch.arange(count).chunk(sizes)]


def never(super_batch):
    raise AssertionError("the learner is not needed")


def choose(selection, learner, reference, size=16, step=3, **more):
    extras = {} if reference is None else columns(reference)
    return selection.choose(lambda _: learner, batches(80), size, step, extras | more)


def test_it_is_in_the_catalog():
    assert catalog.load("batch_selectors", "jest") is JestSelection


@pytest.mark.parametrize(("criterion", "bias"), [("learnability", -2.0), ("learnability", None), ("hard", -2.0)])
def test_it_chooses_what_the_sampler_chooses(criterion, bias):
    learner, reference = encoded(80, bias=bias), encoded(80, 1, bias=bias)
    selection = JestSelection(criterion=criterion, n_chunks=4, seed=5)
    chosen = choose(selection, learner, reference)
    sampler = JointSampler(criterion=criterion, n_chunks=4, form="softmax" if bias is None else "sigmoid")
    expected = sampler.select(learner, reference, 16, selection._generator(3))
    assert torch.equal(chosen.indices, expected)
    assert torch.equal(choose(selection, learner, reference).indices, expected)  # the same again


def test_the_draw_depends_on_seed_and_step():
    learner, reference = encoded(80), encoded(80, 1)
    first = choose(JestSelection(), learner, reference).indices
    assert not torch.equal(first, choose(JestSelection(), learner, reference, step=4).indices)
    assert not torch.equal(first, choose(JestSelection(seed=1), learner, reference).indices)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    choose(JestSelection(), encoded(80), encoded(80, 1))
    choose(JestSelection(criterion="uniform"), None, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_need_the_learner_does_not_score():
    reference = encoded(80, 1)
    selection = JestSelection(criterion="easy_reference")
    chosen = selection.choose(never, batches(80), 16, 0, columns(reference))
    assert chosen.logs["jest_flop_ratio"] == 1
    uniform = JestSelection(criterion="uniform").choose(never, batches(80), 16, 0, {})
    assert sorted(set(uniform.indices.tolist())) == sorted(uniform.indices.tolist())
    assert len(uniform.indices) == 16
    assert uniform.logs["jest_flop_ratio"] == 1


def test_logs():
    learner, reference = encoded(80), encoded(80, 1)
    clean = (torch.arange(80) % 2).to(torch.int64)
    logs = choose(JestSelection(n_chunks=4, temperature=0), learner, reference, clean=clean).logs
    chosen = choose(JestSelection(n_chunks=4, temperature=0), learner, reference).indices
    scores = pairwise_sigmoid_nll(learner.queries, learner.keys, learner.scale, learner.bias)
    scores = scores - pairwise_sigmoid_nll(reference.queries, reference.keys, reference.scale, reference.bias)
    exact = float(scores[chosen][:, chosen].sum() / 16)
    assert logs["jest_learnability_chosen"] == pytest.approx(exact, rel=1e-4)
    assert logs["jest_learnability_chosen"] > logs["jest_learnability"]
    assert logs["jest_learner_loss"] - logs["jest_reference_loss"] == pytest.approx(logs["jest_learnability"])
    assert logs["jest_clean"] == 0.5
    assert logs["jest_clean_chosen"] == pytest.approx(float(clean[chosen].float().mean()))
    assert logs["jest_flop_ratio"] == pytest.approx(8 / 3)
    assert logs["jest_flop_ratio_paper"] == pytest.approx(7 / 3)
    assert logs["jest_seconds"] > 0
    assert all(isinstance(value, float) for value in logs.values())


def test_flop_ratios_are_the_papers():
    assert flop_ratio(5, reused=True) == pytest.approx(7 / 3)
    assert flop_ratio(5, scoring=0.28, training=0.64, reused=True) == pytest.approx(3.04 / 3)
    assert flop_ratio(5) == pytest.approx(8 / 3)
    assert flop_ratio(5, reference=1) == pytest.approx(13 / 3)
    assert flop_ratio(1, scoring=0) == 1


def test_the_mean_over_all_samples_is_the_loss_of_the_batch():
    few = encoded(6)
    exact = float(pairwise_sigmoid_nll(few.queries, few.keys, few.scale, few.bias).sum() / 6)
    found = [batch_loss(few, torch.tensor(rows), 6) for rows in itertools.combinations(range(6), 3)]
    assert sum(found) / len(found) == pytest.approx(exact, rel=1e-5)


def test_losses_of_a_sample_estimate_those_of_the_batch():
    learner = encoded(400)
    everything = torch.arange(400)
    exact = float(pairwise_sigmoid_nll(learner.queries, learner.keys, learner.scale, learner.bias).sum() / 400)
    assert batch_loss(learner, everything, 400) == pytest.approx(exact, rel=1e-5)
    logits = learner.scale * learner.queries @ learner.keys.T
    both = sum(nn.functional.cross_entropy(x, everything) for x in (logits, logits.T)) / 2
    assert batch_loss(learner, everything, 400, "softmax") == pytest.approx(float(both), rel=1e-5)
    estimates = {"sigmoid": [], "softmax": []}
    for seed in range(50):
        some = torch.randperm(400, generator=torch.Generator().manual_seed(seed))[:100]
        for form, found in estimates.items():
            found.append(batch_loss(learner, some, 400, form))
    assert sum(estimates["sigmoid"]) / 50 == pytest.approx(exact, rel=0.02)
    assert sum(estimates["softmax"]) / 50 == pytest.approx(float(both), rel=0.02)


# Models


def rows(count, texts="abcdefgh"):
    return [
        {"query": "".join(texts[(i + j) % 8] for j in range(5)), "key": texts[i % 8] * (1 + i % 5)}
        for i in range(count)
    ]


def text_encoder(seed=0, **text):
    model, tokenizer = tiny_pair("bert", seed=seed, **text)
    return pair_encoder(model, tokenizer, max_tokens=16).eval()


def joined(encoder, super_batch):
    parts = [encoder(part) for part in super_batch]
    return Encoded(
        torch.cat([p.queries for p in parts]), torch.cat([p.keys for p in parts]), None, parts[0].scale, parts[0].bias
    )


def test_a_reference_model_equals_its_cached_embeddings_and_is_left_as_it_was(tmp_path):
    learner, reference = text_encoder(0), text_encoder(1).train()
    before = copy.deepcopy(reference.state_dict())
    super_batch = [learner.collator(rows(20)), learner.collator(rows(20)[::-1])]
    selection = JestSelection(n_chunks=4)
    selection.attach(learner, reference)
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())
    chosen = selection.choose(lambda b: joined(learner, b), super_batch, 8, 0, {})
    with torch.no_grad():
        cached = columns(joined(reference, super_batch))
    again = JestSelection(n_chunks=4).choose(lambda b: joined(learner, b), super_batch, 8, 0, cached)
    assert torch.equal(chosen.indices, again.indices)
    after = reference.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in reference.parameters())
    assert chosen.logs["jest_flop_ratio"] == pytest.approx(13 / 3)
    larger = JestSelection(n_chunks=4)
    larger.attach(learner, text_encoder(1, num_hidden_layers=4))
    cost = larger.choose(lambda b: joined(learner, b), super_batch, 8, 0, {}).logs["jest_flop_ratio"]
    assert (3 + 5 + 1.5 * 5) / 3 < cost < (3 + 5 + 2 * 5) / 3  # twice the layers, and one pooling
    reference.save(tmp_path / "reference")
    loaded = JestSelection(n_chunks=4, reference=str(tmp_path / "reference"))
    loaded.attach(learner)
    third = loaded.choose(lambda b: joined(learner, b), super_batch, 8, 0, {})
    assert torch.equal(third.indices, chosen.indices)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pair_encoder(*tiny_pair("clip")), "kind of queries"),
        (lambda: pair_encoder(*tiny_pair("qwen2"), max_tokens=16), "tokenizer"),
        (lambda: pair_encoder(*tiny_pair("bert"), max_tokens=8), "length of texts"),
    ],
)
def test_a_reference_that_reads_other_inputs_is_refused(make, message):
    with pytest.raises(UserError, match=f"{message}.*cache its embeddings"):
        JestSelection().attach(text_encoder(), make())


def test_scoring_in_larger_patches_only_scores_in_them():
    from PIL import Image

    model, processor = tiny_pair("siglip")
    learner = pair_encoder(model, processor).eval()
    pictures = [Image.new("RGB", (32, 32), (8 * i, 255 - 8 * i, i)) for i in range(20)]
    super_batch = [learner.collator([{"query": p, "key": f"picture {i}"} for i, p in enumerate(pictures)])]
    seen = []

    def encode(batches):
        seen.append(joined(learner, batches))
        return seen[-1]

    selection = JestSelection(n_chunks=2, criterion="hard", scoring_patch_size=16)
    selection.attach(learner)
    plain = joined(learner, super_batch)
    logs = selection.choose(encode, super_batch, 4, 0, {}).logs
    with patch_size(model, 16):
        coarse = joined(learner, super_batch)
    assert torch.equal(seen[0].queries, coarse.queries)
    assert not torch.allclose(coarse.queries, plain.queries)
    assert torch.equal(joined(learner, super_batch).queries, plain.queries)
    assert logs["jest_flop_ratio"] < 8 / 3


def test_training_at_two_resolutions_mixes_them_and_evaluation_does_not():
    model, processor = tiny_pair("clip")
    learner = pair_encoder(model, processor).eval()
    pixels = torch.randn(9, 3, 32, 32)
    plain = model.get_image_features(pixel_values=pixels).pooler_output
    with patch_size(model, 16):
        coarse = model.get_image_features(pixel_values=pixels).pooler_output
    JestSelection(scoring_patch_size=16, multi_resolution=True).attach(learner)
    assert torch.equal(model.get_image_features(pixel_values=pixels).pooler_output, plain)
    copied = copy.deepcopy(model)
    model.train()
    counts = set()
    for seed in range(8):
        torch.manual_seed(seed)
        mixed = model.get_image_features(pixel_values=pixels).pooler_output
        is_coarse = (mixed - coarse).abs().amax(1) < 1e-5
        is_fine = (mixed - plain).abs().amax(1) < 1e-5
        assert bool((is_coarse ^ is_fine).all())
        counts.add(int(is_coarse.sum()))
        torch.manual_seed(seed)
        assert torch.equal(mixed, model.get_image_features(pixel_values=pixels).pooler_output)
    assert counts == {4, 5}
    mixed.square().sum().backward()
    assert model.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    with torch.no_grad():
        copied.visual_projection.weight.zero_()
    assert not copied.train().get_image_features(pixel_values=pixels).pooler_output.any()


def test_gradcache_repeats_the_mixture():
    from modelwright.training.contrastive.grad_cache import cached

    model, processor = tiny_pair("clip")
    learner = pair_encoder(model, processor)
    JestSelection(scoring_patch_size=16, multi_resolution=True).attach(learner)
    learner.train()
    parts = [
        {"pixel_values": torch.randn(3, 3, 32, 32), "input_ids": torch.tensor([[257, 5 + i, 258]] * 3)}
        for i in range(2)
    ]

    def gradient(encode):
        learner.zero_grad()
        torch.manual_seed(4)
        out = encode()
        (out.scale * out.queries @ out.keys.T).square().sum().backward()
        return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}

    whole = gradient(lambda: joined(learner, parts))
    found = gradient(lambda: cached(learner, parts))
    assert set(whole) == set(found)
    for name, expected in whole.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filter_ratio": 1.0}, "filter_ratio"),
        ({"criterion": "learnable"}, "did you mean 'learnability'"),
        ({"form": "sigmod"}, "sigmoid"),
        ({"multi_resolution": True}, "needs a scoring_patch_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        JestSelection(**options)


def test_missing_and_mixed_references():
    learner, reference = encoded(80), encoded(80, 1)
    with pytest.raises(UserError, match="no column ref_query_embeds: name a reference"):
        choose(JestSelection(), learner, None)
    mixed = columns(reference)
    mixed["ref_scale"] = torch.arange(80.0)
    with pytest.raises(UserError, match="different reference models"):
        cached_reference(mixed)
    del mixed["ref_scale"]
    with pytest.raises(UserError, match="no column ref_scale"):
        cached_reference(mixed)
    assert cached_reference(columns(encoded(4, bias=None))).bias is None
    with pytest.raises(UserError, match="has length 2"):
        choose(JestSelection(), learner, reference._replace(queries=2 * reference.queries))
    with pytest.raises(UserError, match="80 pairs and the reference of 70"):
        choose(JestSelection(), learner, encoded(70))
    with pytest.raises(UserError, match="call attach"):
        choose(JestSelection(scoring_patch_size=16), learner, reference)
    with pytest.raises(UserError, match="call attach"):
        choose(JestSelection(reference="folder"), learner, reference)
    with pytest.raises(UserError, match="cannot be cut"):
        JestSelection(scoring_patch_size=5).attach(pair_encoder(*tiny_pair("clip")))


# Several processes


def choose_in_a_process(rank, folder, everything):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    learner = text_encoder(0)
    selection = JestSelection(n_chunks=4)
    selection.attach(learner, text_encoder(1))
    mine = everything[rank * 10 : rank * 10 + 10]
    parts = [learner.collator(mine[:6]), learner.collator(mine[6:])]
    joint = joined(learner, [learner.collator(everything)])
    torch.save(selection.choose(lambda batches: joint, parts, 6, 2, {}).indices, folder / f"chosen{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_choose_what_one_does(tmp_path):
    everything = rows(20)
    assert forked.run(choose_in_a_process, 2, tmp_path, everything) == [0, 0]
    found = [torch.load(tmp_path / f"chosen{rank}") for rank in range(2)]
    learner = text_encoder(0)
    selection = JestSelection(n_chunks=4)
    selection.attach(learner, text_encoder(1))
    batch = [learner.collator(everything)]
    expected = selection.choose(lambda b: joined(learner, b), batch, 6, 2, {}).indices
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)
