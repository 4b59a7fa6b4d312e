"""Tiny encoders of pairs come back from a folder with their processor, and read what they should."""

import math

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from modelwright.errors import UserError
from modelwright.models.tiny_pairs import PAIR_FAMILIES, pair_tokenizer, tiny_pair


@pytest.mark.parametrize("family", PAIR_FAMILIES)
def test_round_trip(family, tmp_path):
    model, processor = tiny_pair(family)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    texts = ["a", "héllo, a longer one"]
    if family in ("clip", "siglip"):
        again = AutoProcessor.from_pretrained(tmp_path, backend="pil")
        image = Image.effect_noise((40, 24), 50).convert("RGB")
        for made in (processor, again):
            assert made.image_processor([image], return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)
        assert torch.equal(
            *(p.image_processor([image], return_tensors="pt")["pixel_values"] for p in (processor, again))
        )
        tokenizers = processor.tokenizer, again.tokenizer
    else:
        tokenizers = processor, AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizers[0](texts) == tokenizers[1](texts)
    loaded = AutoModel.from_pretrained(tmp_path)
    for name, weight in model.base_model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name


def test_same_seed_same_weights_and_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    weights = [tiny_pair("clip", seed=s).model.text_projection.weight for s in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_special_tokens():
    assert pair_tokenizer("clip")("a")["input_ids"] == [257, 65, 258]
    assert pair_tokenizer("siglip")("a") == {"input_ids": [65, 258]}
    assert pair_tokenizer("bert")("a").keys() == {"input_ids", "token_type_ids", "attention_mask"}
    cut = pair_tokenizer("clip", 6)("a long text", truncation=True)["input_ids"]
    assert (len(cut), cut[-1]) == (6, 258)
    assert pair_tokenizer().decode(pair_tokenizer()("é  x .")["input_ids"], skip_special_tokens=True) == "é  x ."


def test_siglip_begins_as_its_paper_says():
    model = tiny_pair("siglip").model
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    assert model.logit_bias.item() == -10


def test_sizes():
    model, processor = tiny_pair("clip", image_size=16, max_tokens=20, width=8)
    assert model.config.text_config.max_position_embeddings == processor.tokenizer.model_max_length == 20
    pixels = processor.image_processor([Image.new("RGB", (99, 50))], return_tensors="pt")
    assert model.get_image_features(**pixels).pooler_output.shape == (1, 8)
    assert tiny_pair("bert", num_hidden_layers=1).model.config.num_hidden_layers == 1


def test_faults():
    with pytest.raises(UserError, match="did you mean 'siglip'"):
        tiny_pair("siglip3")
    with pytest.raises(UserError, match="multiple of 8"):
        tiny_pair("clip", image_size=30)
