"""Generation: token for token stock greedy search; in law, stock sampling."""

import collections
import itertools

import numpy as np
import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteriaList,
    StopStringCriteria,
    TextIteratorStreamer,
    TopKLogitsWarper,
)

from modelwright.decoding.generate import Sampling, generate
from modelwright.decoding.multi_draft import (
    AssistantDrafts,
    EarlyExitDrafts,
    MultiDraftDecoding,
    PromptLookupDrafts,
    decoding,
    drafts,
    early_exit,
    verifiers,
)
from modelwright.decoding.multi_draft.sampling import Row, Shaper
from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer, seeded, tiny_model

TOKENIZER = byte_tokenizer()
FAMILIES = ("gpt2", "llama", "qwen2", "mistral", "gemma", "gpt_neox")
PROMPTS = ["a", "some longer prompt, some longer", "bcd e"]


def near(model, amount=0.02):
    """A draft model that often agrees: the target with noise in its weights."""
    twin = type(model)(model.config).eval().to(model.dtype)
    twin.load_state_dict(model.state_dict())
    with seeded(5), torch.no_grad():
        for weight in twin.parameters():
            weight += amount * torch.randn_like(weight)
    return twin


def encoded(prompts):
    return TOKENIZER(prompts, return_tensors="pt", padding=True)


def endless(family, **overrides):
    model = tiny_model(family, seed=3, **overrides)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_stock_greedy_output(family, layout):
    model = endless(family)
    decode = MultiDraftDecoding(
        [near(model), tiny_model("llama", seed=4)], num_drafts=2, prompt_lookup=True, layout=layout
    )
    for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:2]):
        inputs = encoded(prompts)
        wanted = model.generate(**inputs, max_new_tokens=17, do_sample=False)
        assert torch.equal(model.generate(**inputs, max_new_tokens=17, do_sample=False, custom_generate=decode), wanted)
    stats = decode.stats
    assert stats.tokens == 5 * 17
    assert 1.2 < stats.block_efficiency <= 5
    # The tiny Gemma says its last token again, whatever one does to its weights.
    assert 0 < stats.acceptance_rate < 1 or family == "gemma"
    assert stats.target_calls < stats.blocks
    assert sum(tests for tests, _ in stats.by_depth) == stats.tests


@pytest.mark.parametrize("drafter", [EarlyExitDrafts(layers=1), PromptLookupDrafts(num_drafts=3, longest=2)])
def test_greedy_output_with_every_drafter(drafter):
    model = endless("llama")
    inputs = encoded(PROMPTS)
    wanted = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    decode = MultiDraftDecoding(drafters=[drafter])
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=decode), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.1},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9, "eos_token_id": list(range(3, 90))},
        {"eos_token_id": list(range(3, 40))},
        {"suppress_tokens": list(range(60, 200)), "repetition_penalty": 1.2},
    ],
)
def test_greedy_output_with_processors_and_ends(options):
    model = endless("llama")
    inputs = encoded(PROMPTS)
    keys = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0, **options}
    wanted = model.generate(**inputs, **keys)
    for layout in ("tree", "rows"):
        decode = MultiDraftDecoding(near(model), num_drafts=3, layout=layout)
        assert torch.equal(model.generate(**inputs, **keys, custom_generate=decode), wanted)


def test_a_stop_string_ends_in_the_middle_of_a_block():
    model = endless("llama")
    inputs = encoded(PROMPTS[:1])
    letters = set(TOKENIZER("abcdefghijklmnop")["input_ids"])
    keys = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": sorted(set(range(259)) - letters)}
    free = model.generate(**inputs, **keys, repetition_penalty=3.0)
    text = TOKENIZER.decode(free[0, 6:9])
    # generate gives no callable its tokenizer, so stop_strings must come as a criterion.
    stop = StoppingCriteriaList([StopStringCriteria(TOKENIZER, [text])])
    keys |= {"repetition_penalty": 3.0, "stopping_criteria": stop}
    wanted = model.generate(**inputs, **keys)
    assert wanted.shape[1] < free.shape[1]
    decode = MultiDraftDecoding(model, draft_length=7)
    assert torch.equal(model.generate(**inputs, **keys, custom_generate=decode), wanted)


@pytest.mark.parametrize("new", [1, 2, 3, 5, 8])
def test_the_number_of_new_tokens_is_exact(new):
    model = endless("llama")
    decode = MultiDraftDecoding(model, num_drafts=2, draft_length=4)
    for prompts in (PROMPTS[:1], PROMPTS):
        inputs = encoded(prompts)
        for sample in (False, True):
            out = model.generate(**inputs, max_new_tokens=new, do_sample=sample, custom_generate=decode)
            assert out.shape[1] == inputs["input_ids"].shape[1] + new


def test_a_model_that_drafts_for_itself_is_always_accepted():
    model = endless("llama")
    decode = MultiDraftDecoding(model, num_drafts=2, draft_length=4)
    torch.manual_seed(0)
    model.generate(**encoded(PROMPTS), max_new_tokens=20, do_sample=True, top_k=20, custom_generate=decode)
    assert decode.stats.acceptance_rate == 1
    assert decode.stats.block_efficiency == 5
    assert decode.stats.target_calls == 4


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"suppress_tokens": list(range(50, 99))}])
def test_scores_and_logits_are_stock_ones(options):
    model = endless("llama").double()
    inputs = encoded(PROMPTS)
    keys = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "eos_token_id": list(range(3, 60)), **options}
    keys |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    wanted = model.generate(**inputs, **keys)
    found = model.generate(**inputs, **keys, custom_generate=MultiDraftDecoding(near(model), num_drafts=2))
    assert torch.equal(found.sequences, wanted.sequences)
    assert len(found.scores) == len(found.logits) == len(wanted.scores)
    going = torch.ones(len(PROMPTS), dtype=torch.bool)
    for step, token in enumerate(wanted.sequences[:, inputs["input_ids"].shape[1] :].T):
        for mine, theirs in ((found.scores, wanted.scores), (found.logits, wanted.logits)):
            torch.testing.assert_close(mine[step][going], theirs[step][going].float(), rtol=0, atol=1e-5)
            assert (mine[step][~going].argmax(-1) == 0).all()
        going &= ~((token >= 3) & (token < 60))
    assert not going.all()
    sums = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True).sum(1)
    assert torch.isfinite(sums).all()


def test_several_samples_of_a_prompt():
    model = endless("llama")
    keys = {"do_sample": True, "max_new_tokens": 9, "num_return_sequences": 3}
    decode = MultiDraftDecoding(near(model), num_drafts=2)
    out = model.generate(**encoded(PROMPTS), **keys, custom_generate=decode)
    assert out.shape == (9, encoded(PROMPTS)["input_ids"].shape[1] + 9)
    assert torch.equal(out[:, :-9], encoded(PROMPTS)["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in out}) > 6


def test_tokens_are_streamed_as_they_come():
    model = endless("llama")
    streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=5)
    decode = MultiDraftDecoding(near(model), num_drafts=2, streamer=streamer)
    put = []
    streamer.put = lambda value, put_one=streamer.put: (put.append(value.numel()), put_one(value))
    inputs = encoded(PROMPTS[1:2])
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=decode)
    length = inputs["input_ids"].shape[1]
    assert "".join(streamer) == TOKENIZER.decode(out[0, length:])
    assert put[0] == length
    assert sum(put[1:]) == 12 > len(put) - 1

    # Whoever reads must not wait for ever where the loop failed.
    def fail(ids, scores):
        raise UserError("no")

    streamer = decode.streamer = TextIteratorStreamer(TOKENIZER, timeout=5)
    with pytest.raises(UserError, match="no"):
        model.generate(
            **inputs, max_new_tokens=12, custom_generate=decode, logits_processor=LogitsProcessorList([fail])
        )
    assert "".join(streamer).startswith(PROMPTS[1][:5])


def test_the_cache_that_is_returned_goes_on():
    model = endless("llama").double()
    decode = MultiDraftDecoding(near(model), num_drafts=2)
    inputs = encoded(PROMPTS[1:2])
    keys = {"do_sample": False, "custom_generate": decode, "return_dict_in_generate": True}
    first = model.generate(**inputs, max_new_tokens=9, **keys)
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    more = {"input_ids": first.sequences, "past_key_values": first.past_key_values}
    second = model.generate(**more, max_new_tokens=9, **keys)
    assert torch.equal(second.sequences, model.generate(**inputs, max_new_tokens=18, do_sample=False))


def test_an_early_exit_shares_weights_and_leaves_the_model_as_it_was():
    for family in FAMILIES:
        model = tiny_model(family, seed=2)
        ids = torch.tensor([[5, 6, 7, 8]])
        before = model(ids).logits
        short = early_exit(model, 1)
        assert short.config.num_hidden_layers == 1
        assert model.config.num_hidden_layers == 2
        assert {id(p) for p in short.parameters()} < {id(p) for p in model.parameters()}
        found = short(ids, use_cache=True)
        assert len(found.past_key_values.layers) == 1
        assert torch.equal(model(ids).logits, before)
        assert not torch.equal(found.logits, before)
        whole = type(model)(short.config).eval()
        whole.load_state_dict(short.state_dict())
        torch.testing.assert_close(whole(ids).logits, found.logits)


@torch.no_grad()
def test_drafts_are_drawn_from_the_assistants_own_law():
    """With processors and draft temperature, each behind its own beginning, and the same again when asked again."""
    model = tiny_model("llama", seed=4, initializer_range=0.3)
    processors = LogitsProcessorList([TopKLogitsWarper(5), RepetitionPenaltyLogitsProcessor(1.6)])
    shaper = Shaper(processors, 2)
    proposer = AssistantDrafts(model=model, num_drafts=3, temperature=1.7).start(model, shaper, False)
    prompts = torch.tensor([[0, 0, 5, 6, 7], [4, 9, 8, 7, 6]])
    rows = [Row(b, prompts[b], 2 * (1 - b), longest=8, generator=torch.Generator().manual_seed(b)) for b in range(2)]
    seen = set()
    for step in range(2):
        for row, some in zip(rows, proposer.propose(rows, [3, 2]), strict=True):
            assert [len(draft.tokens) for draft in some] == [3 - row.index] * 3
            for draft in some:
                seen.add(tuple(draft.tokens))
                for depth, token in enumerate(draft.tokens):
                    real = [*row.ids[row.padding :].tolist(), *draft.tokens[:depth]]
                    padded = torch.tensor([[*row.ids.tolist(), *draft.tokens[:depth]]])
                    scores = processors(padded, model(torch.tensor([real])).logits[:, -1].float())
                    law = (scores[0].double() / 1.7).softmax(0)
                    torch.testing.assert_close(draft.law(depth, law), law, rtol=0, atol=1e-5)
                    assert law[token] > 0
        rows = rows[step:]
        for row in rows:
            row.append(3)
    assert len(seen) > 3


def test_drafts_of_one_beginning_are_drawn_from_one_law():
    """Rows of a batch may differ in the last bits; a draft's token must be from the law that is verified against."""
    proposer = AssistantDrafts(model=tiny_model("llama", vocab_size=4), num_drafts=3).start(
        tiny_model("llama", vocab_size=4), Shaper(LogitsProcessorList(), 2), False
    )
    rows = [Row(b, torch.tensor([1, 2]), longest=9) for b in range(2)]
    tokens = torch.tensor([[1, 2], [0, 2], [1, 2], [3, 3], [3, 0], [3, 0]])
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    found, laws = proposer._next(rows, logits, tokens, torch.full((6,), 0.4, dtype=torch.float64))
    torch.testing.assert_close(laws, logits[[0, 1, 0, 3, 4, 4]].double().softmax(-1))
    assert found.tolist() == [int((law.cumsum(0) > 0.4).nonzero()[0]) for law in laws]


def test_lookup_finds_the_latest_of_the_longest_matches():
    ids = torch.tensor([1, 2, 3, 7, 1, 2, 3, 8, 9, 3, 5, 2, 3])
    proposer = PromptLookupDrafts(num_drafts=4, longest=2).start(None, None, True)
    assert proposer._find(ids, 3) == [[8, 9, 3], [7, 1, 2], [5, 2, 3]]
    assert proposer._find(ids, 1) == [[8], [7], [5]]
    assert proposer._find(torch.tensor([4]), 3) == []


def joint_law(model, prompt, tokens, **options):
    """q(z1) q(z2 | z1) of stock sampling, for every pair of tokens."""
    law = np.zeros((tokens, tokens))
    seen = {}

    class Spy:
        def __call__(self, ids, scores):
            seen[tuple(ids[0, prompt.shape[1] :].tolist())] = scores[0].double().softmax(-1)
            return scores

    for first in range(tokens):
        # The processors are generate's own; the spy stands behind them.
        def force(ids, scores, first=first):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([first]), 0.0)

        def sample(m, ids, logits_processor, stopping_criteria, generation_config, force=force, **keys):
            processors = LogitsProcessorList([*logits_processor, Spy(), force])
            return m._sample(ids, processors, stopping_criteria, generation_config, **keys)

        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=2,
            do_sample=True,
            custom_generate=sample,
            **options,
        )
        law[first] = (seen[()][first] * seen[first,]).numpy()
    return law


class Branches:
    """Stands in for all draws: follows a script of outcomes, and notes their probability and what else could be."""

    def __init__(self, script):
        self.script, self.at, self.mass, self.open = script, 0, 1.0, []

    def choose(self, weights):
        law = (weights / weights.sum()).tolist()
        options = [token for token, chance in enumerate(law) if chance > 0]
        if self.at < len(self.script):
            token = self.script[self.at]
        else:
            token = options[0]
            self.open += [(len(self.script), other) for other in options[1:]]
            self.script = [*self.script, token]
        self.at += 1
        self.mass *= law[token]
        return token


def enumerated(monkeypatch, target, prompt, count, **keys):
    """The law of the first tokens that generate gives, room being for three, by going through every draw."""
    size, start = target.config.vocab_size, prompt.shape[1]
    branches = None
    monkeypatch.setattr(
        drafts, "draw_rows", lambda laws, _: torch.tensor([branches.choose(weights) for weights in laws])
    )
    monkeypatch.setattr(decoding, "draw", lambda weights, _: branches.choose(weights))
    monkeypatch.setattr(verifiers.Outcome, "draw", lambda self, *_: branches.choose(self.law(size)))
    law, todo = np.zeros((size,) * count), [[]]
    while todo:
        branches = Branches(todo.pop())
        known = len(branches.script)
        out = target.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=True,
            **{"top_k": 0, **keys},
        )  # fmt: skip
        law[tuple(out[0, start : start + count].tolist())] += branches.mass
        todo += [[*branches.script[:at], other] for at, other in branches.open if at >= known]
    return law


@pytest.mark.parametrize("layout", ["tree", pytest.param("rows", marks=pytest.mark.slow)])
def test_the_law_of_three_tokens_a_bonus_included(monkeypatch, layout):
    """Drafts that once disagreed must stay out: the third token follows whichever agreed with both before it."""
    sizes = {"vocab_size": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 1, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": None}
    target, draft = (
        tiny_model("llama", seed=seed, initializer_range=1.0, pad_token_id=0, **sizes).double() for seed in (1, 2)
    )
    prompt = torch.tensor([[0, 1, 1, 0]])
    wanted = np.zeros((2, 2, 2))
    for tokens in itertools.product(range(2), repeat=3):
        with torch.no_grad():
            law = target(torch.cat([prompt, torch.tensor([tokens])], 1)).logits[0, 3:6].softmax(-1)
        wanted[tokens] = float(law[range(3), tokens].prod())
    decode = MultiDraftDecoding(draft, num_drafts=2, draft_length=2, layout=layout)
    law = enumerated(monkeypatch, target, prompt, 3, custom_generate=decode)
    np.testing.assert_allclose(law, wanted, rtol=0, atol=1e-7)
    assert decode.stats.block_efficiency > 1


@pytest.mark.parametrize(
    ("verifier", "source", "options"),
    [
        ("is", "model", {"temperature": 0.7, "top_k": 2}),
        ("spectr", "model", {"repetition_penalty": 1.5, "top_k": 2}),
        ("specinfer", "prompt", {"temperature": 1.3, "repetition_penalty": 0.6}),
        ("is", "prompt", {}),
        pytest.param("specinfer", "model", {"top_k": 2}, marks=pytest.mark.slow),
        pytest.param("priority", "model", {"top_k": 2, "temperature": 2.0}, marks=pytest.mark.slow),
        pytest.param("optimal", "both", {"top_k": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_law_of_two_tokens_is_the_targets_by_enumeration(monkeypatch, verifier, source, options):
    """Oracle 7: drafts of L = 2 tokens on an alphabet of 3, every draw of drafts and verifier gone through."""
    sizes = {
        "vocab_size": 3,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    sizes |= {"num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    target = tiny_model("llama", seed=1, initializer_range=1.0, **sizes).double()
    draft = tiny_model("llama", seed=2, initializer_range=1.0, **sizes).double()
    prompt = torch.tensor([[0, 2, 1, 1, 0, 2, 0]])
    wanted = joint_law(target, prompt, 3, **options)
    decode = MultiDraftDecoding(
        draft if source != "prompt" else None,
        prompt_lookup=source != "model",
        num_drafts=2,
        draft_length=2,
        verifier=verifier,
        draft_temperature=1.4,
    )
    # Room for a third token, so that drafts of the first block have two; but two are looked at.
    end = prompt.shape[1] + 2
    enough = StoppingCriteriaList([lambda ids, _: torch.tensor([ids.shape[1] >= end])])
    law = enumerated(monkeypatch, target, prompt, 2, stopping_criteria=enough, custom_generate=decode, **options)
    assert 0 < decode.stats.acceptance_rate <= 1
    assert len(decode.stats.by_depth) == 2
    np.testing.assert_allclose(law, wanted, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_samples_of_a_batch_have_stock_samplings_law(layout):
    """Chi-square on the first two tokens, with drafts of three kinds and rows of different lengths."""
    from scipy.stats import chisquare

    target = endless("llama", vocab_size=8, initializer_range=0.3)
    draft = tiny_model("gpt2", seed=4, vocab_size=8, initializer_range=0.3)
    options = {"temperature": 1.3, "top_k": 6, "repetition_penalty": 1.4}
    prompt = torch.tensor([[3, 4, 5, 3, 4]])
    wanted = joint_law(target, prompt, 8, **options).ravel()
    decode = MultiDraftDecoding(
        draft, num_drafts=2, draft_temperature=1.5, prompt_lookup=True, draft_length=2, layout=layout
    )
    ids = torch.cat([torch.zeros(1, 2, dtype=torch.long), prompt], 1).repeat(150, 1)
    mask = torch.ones_like(ids)
    mask[1:, :2] = 0
    torch.manual_seed(3)
    counts: collections.Counter = collections.Counter()
    for _ in range(5):
        out = target.generate(
            ids, attention_mask=mask, max_new_tokens=5, do_sample=True, custom_generate=decode, **options
        )
        counts.update(map(tuple, out[1:, 7:9].tolist()))
    found = np.array([counts[pair] for pair in itertools.product(range(8), repeat=2)])
    assert not found[wanted == 0].any()
    few = wanted * found.sum() < 5
    found = np.append(found[~few], found[few].sum())
    share = np.append(wanted[~few], wanted[few].sum())
    assert chisquare(found, share / share.sum() * found.sum()).pvalue > 1e-3
    assert 0.1 < decode.stats.acceptance_rate < 0.95


def test_each_prompt_of_the_house_has_its_own_stream():
    """With the house's Gumbel noise as the sign of sampling: the same whoever shares the batch."""
    model = endless("llama").double()
    decode = MultiDraftDecoding(near(model), num_drafts=2)

    def texts(prompts, start=0):
        sampling = Sampling(max_new_tokens=9, temperature=1.0, top_k=30, seed=5)
        run = generate(
            model, TOKENIZER, prompts, sampling, start=start,
            generate_with=lambda **keys: model.generate(**keys, custom_generate=decode),
        )  # fmt: skip
        return [row[0].text for row in run]

    together = texts(PROMPTS)
    assert together == [texts([p], start=i)[0] for i, p in enumerate(PROMPTS)]
    assert len(set(together)) == 3
    assert 0 < decode.stats.acceptance_rate <= 1


def test_an_assistant_out_of_positions_leaves_the_target_alone():
    model = endless("gpt2")
    short = tiny_model("gpt2", seed=3, n_positions=24)
    inputs = encoded(["x" * 20])
    wanted = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    decode = MultiDraftDecoding(short)
    assert torch.equal(model.generate(**inputs, max_new_tokens=20, do_sample=False, custom_generate=decode), wanted)
    assert decode.stats.blocks > decode.stats.tests / 4


def test_vocabularies_padded_differently_are_taken_on_request():
    model, wide, narrow = endless("llama"), tiny_model("llama", vocab_size=300), tiny_model("llama", vocab_size=100)
    inputs = encoded(PROMPTS)
    wanted = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    for draft in (wide, narrow):
        with pytest.raises(UserError, match="must share a tokenizer"):
            model.generate(**inputs, max_new_tokens=8, custom_generate=MultiDraftDecoding(draft))
        decode = MultiDraftDecoding(draft, pad_vocabulary=True)
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, custom_generate=decode), wanted)
        model.generate(**inputs, max_new_tokens=8, do_sample=True, custom_generate=decode)


def test_windows_that_are_not_outgrown_do_not_matter():
    model = endless("gemma2", sliding_window=64)
    inputs = encoded(PROMPTS)
    wanted = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    for layout in ("tree", "rows"):
        decode = MultiDraftDecoding(tiny_model("gemma2", seed=9), layout=layout)
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, custom_generate=decode), wanted)


@pytest.mark.parametrize("layout", ["auto", "rows"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral"])
def test_windows_that_are_outgrown_are_kept_by_the_mask(family, layout):
    """Every key stays in the cache, so nothing has to be rolled back; the mask still hides what is out of sight."""
    model = endless(family, sliding_window=6, initializer_range=0.2)
    wide = endless(family, sliding_window=64, initializer_range=0.2)
    wide.load_state_dict(model.state_dict())
    decode = MultiDraftDecoding([near(model, 0.2), endless(family, sliding_window=5)], num_drafts=2, layout=layout)
    for prompts in (PROMPTS, PROMPTS[1:2]):
        inputs = encoded(prompts)
        wanted = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        assert not torch.equal(wanted, wide.generate(**inputs, max_new_tokens=24, do_sample=False))
        assert torch.equal(model.generate(**inputs, max_new_tokens=24, do_sample=False, custom_generate=decode), wanted)
    assert 0 < decode.stats.acceptance_rate < 1


@pytest.mark.parametrize("layout", ["auto", "rows"])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[1:2]], ids=["batch", "single"])
def test_greedy_output_under_shifted_positions(layout, prompts):
    """STRING counts distances by place in the sequence, so drafts must not share one."""
    from modelwright.attention.string import StringConfig, apply_string

    model = endless("llama", initializer_range=0.2)
    inputs = encoded(prompts)
    plain, draft = model.generate(**inputs, max_new_tokens=24, do_sample=False), near(model, 0.005)
    with apply_string(model, StringConfig(shift=12, window=2)):
        wanted = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        assert not torch.equal(wanted, plain)
        decode = MultiDraftDecoding(draft, num_drafts=2, prompt_lookup=True, layout=layout)
        out = model.generate(**inputs, max_new_tokens=24, do_sample=False, custom_generate=decode)
        assert torch.equal(out, wanted)
        assert 0 < decode.stats.acceptance_rate < 1
        short = MultiDraftDecoding(early_exit=1, layout=layout)
        assert torch.equal(model.generate(**inputs, max_new_tokens=24, do_sample=False, custom_generate=short), wanted)
    assert torch.equal(model.generate(**inputs, max_new_tokens=24, do_sample=False, custom_generate=decode), plain)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    model = endless("llama").to(dtype)
    decode = MultiDraftDecoding(near(model), num_drafts=2)
    for sample in (False, True):
        out = model.generate(**encoded(PROMPTS), max_new_tokens=10, do_sample=sample, custom_generate=decode)
        assert out.shape[1] == encoded(PROMPTS)["input_ids"].shape[1] + 10


def read(model, count):
    """A cache of a model's own kind with some tokens in it."""
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[5] * count]), past_key_values=cache)
    return cache


def refused(model=None, decode=None, **keys):
    model = model or endless("llama")
    decode = decode or MultiDraftDecoding(tiny_model("llama", seed=4))
    inputs = {**encoded(PROMPTS[:1]), **keys}
    model.generate(**{"max_new_tokens": 4, **inputs}, custom_generate=decode)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MultiDraftDecoding(), "nothing to draft with"),
        (lambda: MultiDraftDecoding(prompt_lookup=True, draft_length=0), "at least 1 token, not 0"),
        (lambda: MultiDraftDecoding(prompt_lookup=True, num_drafts=0), "at least 1 draft, not 0"),
        (lambda: MultiDraftDecoding(prompt_lookup=True, layout="heap"), "layout must be auto, tree or rows"),
        (lambda: MultiDraftDecoding(prompt_lookup=True, verifier="spectre"), "did you mean 'spectr'"),
        (lambda: MultiDraftDecoding(prompt_lookup=True, lp_size=50), "lp_size is 50, above alphabet_size"),
        (lambda: MultiDraftDecoding([], draft_temperature=[1.0]), "1 draft temperatures for 0 draft models"),
        (lambda: AssistantDrafts(model=None, temperature=0.0), "above 0, not 0.0"),
        (lambda: PromptLookupDrafts(longest=1, shortest=2), "1 <= shortest <= longest"),
        (
            lambda: refused(
                tiny_model("gemma2"), MultiDraftDecoding(prompt_lookup=True, layout="tree"), max_new_tokens=20
            ),
            "outgrow the model's sliding windows",
        ),
        (
            lambda: refused(tiny_model("gemma2"), past_key_values=read(tiny_model("gemma2"), 4)),
            "sliding windows, which",
        ),
        (lambda: refused(tiny_model("mamba2")), "state is recurrent"),
        (lambda: refused(cache_implementation="static"), "StaticLayer"),
        (lambda: refused(past_key_values=StaticCache(tiny_model("llama").config, 64)), "StaticLayer"),
        (lambda: refused(use_cache=False), "use_cache is off"),
        (lambda: refused(num_beams=2), "leave out num_beams"),
        (lambda: refused(output_attentions=True, return_dict_in_generate=True), "output_attentions"),
        (lambda: refused(position_ids=torch.tensor([[3]])), "leave out position_ids"),
        (
            lambda: refused(**encoded(PROMPTS), decode=MultiDraftDecoding(prompt_lookup=True, streamer=object())),
            "one prompt at a time, not 3",
        ),
        (lambda: refused(decode=MultiDraftDecoding(early_exit=2)), "fewer than the model's 2 layers"),
        (lambda: refused(decode=MultiDraftDecoding(tiny_model("mamba2"))), "state is recurrent"),
        (lambda: refused(guidance_scale=2.0), "leave its option out"),
        (
            lambda: refused(
                input_ids=torch.tensor([[5, 6, 0], [5, 6, 7]]), attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]])
            ),
            "padded on the left",
        ),
        (
            lambda: refused(**encoded(PROMPTS), prefix_allowed_tokens_fn=lambda batch, ids: [5, 6]),
            "one prompt at a time",
        ),
        (lambda: refused(token_type_ids=torch.tensor([[0]])), "token_type_ids"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_token(call, message):
    with pytest.raises((UserError, ValueError), match=message):
        call()


def test_a_cache_longer_than_the_prompt_is_refused():
    model = endless("llama")
    cache = DynamicCache()
    model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    with pytest.raises((UserError, ValueError)):
        refused(model, past_key_values=cache)
