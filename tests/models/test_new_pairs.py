import math

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from modelwright.errors import UserError
from modelwright.models.new_pairs import PAIR_ARCHITECTURES, new_pair_model
from modelwright.models.tokenizers import byte_tokenizer, train_bpe

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": "2", "image_size": 32,
    "patch_size": 8, "max_position_embeddings": 24,
}  # fmt: skip


def embed(model, processor, texts, images):
    batch = processor(text=texts, images=images, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        text = {k: v for k, v in batch.items() if k != "pixel_values"}
        return model.get_image_features(batch["pixel_values"]).pooler_output, model.get_text_features(
            **text
        ).pooler_output


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["a small red circle", "a large blue square on black"] * 3, 300)


@pytest.mark.parametrize("name", PAIR_ARCHITECTURES)
def test_a_new_model_embeds_saves_and_loads(name, tokenizer, tmp_path):
    before = torch.random.get_rng_state()
    model, processor = new_pair_model(name, SMALL, tokenizer, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    for tower in (model.config.text_config, model.config.vision_config):
        assert (tower.hidden_size, tower.num_attention_heads, tower.num_hidden_layers) == (32, 2, 2)
    texts, images = ["a small red circle", "black"], [Image.new("RGB", (32, 32), c) for c in ("red", "black")]
    image, text = embed(model, processor, texts, images)
    assert image.shape == text.shape == (2, 512 if name == "clip" else 32)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = embed(AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path), texts, images)
    assert torch.equal(again[0], image)
    assert torch.equal(again[1], text)


def test_the_seed_decides_the_weights(tokenizer):
    a, b, c = (new_pair_model("siglip", SMALL, tokenizer, seed=s)[0].state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_sigmoid_loss_begins_as_in_the_paper(tokenizer):
    model, _ = new_pair_model("siglip", SMALL, tokenizer)
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    assert model.logit_bias.item() == -10


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_bpe(["one two three"], 300)])
def test_clip_reads_a_text_at_its_end(make):
    """The id 2 of the end token is a trap: transformers then looks for the largest id in the text."""
    tokenizer = make()
    assert tokenizer.eos_token_id == 2
    size = len(tokenizer)
    model, processor = new_pair_model("clip", SMALL, tokenizer)
    assert len(tokenizer) == size
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id != 2
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    ids = processor.tokenizer("two zebras", return_tensors="pt")
    end = ids["input_ids"][0].tolist().index(processor.tokenizer.eos_token_id)
    assert end == ids["input_ids"].shape[1] - 1
    with torch.no_grad():
        hidden = model.text_model(**ids).last_hidden_state[0, end]
        expected = model.text_projection(hidden)
        assert torch.allclose(model.get_text_features(**ids).pooler_output[0], expected, atol=1e-6)


def test_texts_end_with_the_end_token_and_are_cut_to_the_longest(tokenizer):
    _, processor = new_pair_model("siglip", SMALL, tokenizer)
    found = processor.tokenizer(["black", "a small red circle " * 9], padding="max_length", truncation=True)
    assert list(found) == ["input_ids"]
    assert [len(ids) for ids in found["input_ids"]] == [24, 24]
    end, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    assert found["input_ids"][1][-1] == end
    short = found["input_ids"][0]
    assert set(short[short.index(end) + 1 :]) == {pad}


def test_one_tower_may_differ(tokenizer):
    settings = {"vision_config.num_hidden_layers": 1, **SMALL, "vision_config.hidden_size": 64}
    model, processor = new_pair_model("siglip", settings, tokenizer)
    assert (model.config.vision_config.num_hidden_layers, model.config.text_config.num_hidden_layers) == (1, 2)
    image, text = embed(model, processor, ["a"], [Image.new("RGB", (32, 32))])
    assert image.shape == text.shape == (1, 64)
    model, _ = new_pair_model("clip", {**SMALL, "projection_dim": 24}, tokenizer)
    assert model.text_projection.out_features == 24


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("siglipp", {}, "no new image-text model of the architecture 'siglipp': did you mean 'siglip'"),
        ("siglip", {"hiden_size": 3}, "no setting 'hiden_size': did you mean 'hidden_size'"),
        ("clip", {"text_config.patch_size": 8}, "no setting 'text_config.patch_size'"),
        ("clip", {"vision_config": {}}, "no setting 'vision_config'"),
        ("siglip", {"hidden_size": "many"}, "settings for siglip are not valid"),
        ("siglip", {"num_attention_heads": 5}, "No siglip model can be made"),
        ("siglip", {"patch_size": 5}, "image_size is 32, which is no multiple of patch_size, which is 5"),
    ],
)
def test_mistakes_get_one_sentence(name, settings, message, tokenizer):
    with pytest.raises(UserError) as error:
        new_pair_model(name, {**SMALL, **settings}, tokenizer)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_an_end(tokenizer):
    import copy

    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        new_pair_model("siglip", SMALL, without)
