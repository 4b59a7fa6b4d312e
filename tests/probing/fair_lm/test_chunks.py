"""Losses a part at a time are those of whole logits, whatever a family does around its head."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from modelwright.architectures.resformer import ResFormerConfig, ResFormerForCausalLM
from modelwright.errors import UserError
from modelwright.kernels.largest_tensor import LargestTensor
from modelwright.models.tiny import FAMILIES, seeded, tiny_model
from modelwright.probing.fair_lm import ChunkedModel, chunks
from modelwright.probing.fair_lm.chunks import cross_entropy, token_losses
from modelwright.probing.fair_lm.tracker import scored_positions

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 259,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
#: Families that scale or cap their logits, or wrap their outputs in more than hidden states.
OTHERS = {
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 7.0},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "mixtral": {"num_local_experts": 2},
    "phi": {},
}


def model_of(name):
    if name == "resformer":
        with seeded(0):
            sizes = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
            return ResFormerForCausalLM(ResFormerConfig(**sizes)).eval()
    if name.endswith("*"):
        with seeded(0):
            config = AutoConfig.for_model(name[:-1], **{**SHAPE, **OTHERS[name[:-1]]})
            return AutoModelForCausalLM.from_config(config).eval()
    return tiny_model(name)


def reference(model, ids, at):
    with torch.no_grad():
        logits = model(**ids).logits
    log_p = logits.double().log_softmax(-1)[at[0], at[1]]
    return -log_p.gather(-1, at[2][:, None])[:, 0], logits[at[0], at[1]].argmax(-1) == at[2]


@pytest.mark.parametrize("name", [*FAMILIES, "resformer", *(f"{name}*" for name in OTHERS)])
def test_every_family_through_its_own_head(name, monkeypatch):
    model = model_of(name)
    ids = {"input_ids": torch.randint(3, 259, (3, 12), generator=torch.Generator().manual_seed(0))}
    at = scored_positions(ids["input_ids"])
    nll, hits = reference(model, ids, at)
    monkeypatch.setattr(chunks, "CHUNK", 259 * 5)  # five rows a part
    chunked = ChunkedModel(model)
    assert chunked.body is not None
    found, found_hits = chunked.losses(ids, *at)
    torch.testing.assert_close(found.double(), nll, rtol=1e-6, atol=1e-6)
    assert torch.equal(found_hits, hits)
    assert chunked.vocab_size == 259
    assert "forward" not in chunked.body.__dict__  # as it was
    torch.testing.assert_close(reference(model, ids, at)[0], nll)


def test_capping_changes_the_loss_so_that_the_test_above_means_something():
    plain, capped = (
        tiny_model("gemma2", final_logit_softcapping=None),
        tiny_model("gemma2", final_logit_softcapping=0.1),
    )
    ids = {"input_ids": torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))}
    at = scored_positions(ids["input_ids"])
    a, b = (ChunkedModel(m).losses(ids, *at)[0] for m in (plain, capped))
    assert (a - b).abs().max() > 1e-3


def test_no_tensor_is_as_large_as_the_logits():
    model = tiny_model("llama", vocab_size=128_000)
    ids = torch.randint(3, 128_000, (2, 300), generator=torch.Generator().manual_seed(0))
    at = scored_positions(ids)
    with LargestTensor() as seen:
        ChunkedModel(model).losses({"input_ids": ids}, *at)
    assert seen.elements <= chunks.CHUNK
    assert seen.elements < 2 * 300 * 128_000 / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cross_entropy_is_log_softmax(dtype):
    logits = (torch.randn(50, 70, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    targets = torch.randint(0, 70, (50,), generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    nll, hits = cross_entropy(logits, targets)
    expected = nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(hits, logits.argmax(-1) == targets)
    assert (nll >= 0).all()
    assert torch.equal(logits, before)  # not worked on in place


def test_of_equal_logits_the_first_is_the_prediction():
    nll, hits = cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
    assert hits.tolist() == [True, False]
    assert nll.tolist() == pytest.approx([1.3862944] * 2)


def test_masked_logits_do_not_disturb_others():
    logits = torch.zeros(1, 4)
    logits[0, 2] = -torch.inf
    nll, _ = cross_entropy(logits.expand(2, 4), torch.tensor([0, 2]))
    assert nll.tolist() == pytest.approx([1.0986123, float("inf")])


def test_nothing_to_score_is_nothing():
    nll, hits = token_losses(torch.zeros(1, 3, 5), *(torch.zeros(0, dtype=torch.long) for _ in range(3)))
    assert nll.shape == hits.shape == (0,)


class Bare(nn.Module):
    """A model without a body of its own."""

    base_model_prefix = ""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **keys):
        return self.inner(**keys)


class Foreign(Bare):
    """A model of someone else's code, whose forward does more than its body and head do."""

    base_model_prefix = "inner_body"

    def __init__(self, inner):
        super().__init__(inner)
        self.inner_body = inner.base_model

    def forward(self, **keys):
        found = self.inner(**keys)
        found.logits = found.logits * 2
        return found


class Nameless(Bare):
    """A body that returns a bare tuple, as some models with code of their own have."""

    base_model_prefix = "body"
    __module__ = "transformers.nameless"

    def __init__(self, inner):
        super().__init__(inner)
        self.body = Tuples(inner.base_model)


class Tuples(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, **keys):
        return (self.body(**keys).last_hidden_state,)


def test_models_without_a_usable_body_run_whole():
    model = tiny_model("gpt2")
    ids = {"input_ids": torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))}
    at = scored_positions(ids["input_ids"])
    expected = ChunkedModel(model).losses(ids, *at)
    bare = ChunkedModel(Bare(model))
    assert bare.body is None
    torch.testing.assert_close(bare.losses(ids, *at), expected)
    foreign = Foreign(model)
    assert ChunkedModel(foreign).body is None
    torch.testing.assert_close(ChunkedModel(foreign).losses(ids, *at)[0].double(), reference(foreign, ids, at)[0])
    nameless = ChunkedModel(Nameless(model))
    assert nameless.body is not None
    torch.testing.assert_close(nameless.losses(ids, *at), expected)


def test_a_forward_that_was_wrapped_comes_back():
    model = tiny_model("llama")
    original = model.model.forward
    model.model.forward = wrapped = lambda *args, **keys: original(*args, **keys)
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    ChunkedModel(model).losses(ids, *scored_positions(ids["input_ids"]))
    assert model.model.forward is wrapped


def test_adapters_and_wrappers_are_seen_through():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    ids = {"input_ids": torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))}
    at = scored_positions(ids["input_ids"])
    plain = ChunkedModel(model).losses(ids, *at)[0]
    with seeded(0):
        adapted = peft.get_peft_model(model, config).eval()
    found = ChunkedModel(adapted).losses(ids, *at)[0]
    torch.testing.assert_close(found.double(), reference(adapted, ids, at)[0], rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3
    torch.testing.assert_close(ChunkedModel(torch.compile(adapted)).losses(ids, *at)[0], found)
    prompted = peft.get_peft_model(
        tiny_model("llama"), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(UserError, match="learned prompts"):
        ChunkedModel(prompted)


def test_sharded_models_are_refused():
    model = tiny_model("llama")
    next(model.parameters()).ds_id = 0
    with pytest.raises(UserError, match="sharded over processes"):
        ChunkedModel(model)
