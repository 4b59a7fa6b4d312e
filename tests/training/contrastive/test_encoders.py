"""Encoders of pairs embed as transformers and sentence-transformers do, and refuse what cannot be trained."""

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from modelwright.errors import UserError
from modelwright.models.tiny import byte_tokenizer, tiny_model
from modelwright.models.tiny_pairs import pair_tokenizer, tiny_pair
from modelwright.training.contrastive.encoders import load_pair_encoder, pair_encoder
from modelwright.training.contrastive.grad_cache import cached
from modelwright.training.contrastive.towers import tower_parameters
from modelwright.training.inf_cl import tiled_contrastive_loss

TEXTS = ["a red square", "a much longer text about a blue circle", "é", "two"]
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def pictures(count=4, size=(24, 40, 3)):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)) for _ in range(count)]


def image_rows():
    return [{"query": image, "key": text, "negatives": []} for image, text in zip(pictures(), TEXTS, strict=True)]


def text_rows(**more):
    return [{"query": text.upper(), "key": text, "negatives": [], **more} for text in TEXTS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of models as transformers writes them."""
    folder = tmp_path_factory.mktemp("encoders")
    for family in ("clip", "siglip", "bert", "mpnet", "roberta", "qwen2"):
        model, processor = tiny_pair(family)
        model.save_pretrained(folder / family)
        processor.save_pretrained(folder / family)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return lambda family: shutil.copytree(saved / family, tmp_path / family)


def edit(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# Image and text


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_frozen_tower_is_spared_its_second_pass_and_the_gradient_is_the_same(tower):
    found, calls = [], []
    for spared in (False, True):
        encoder = pair_encoder(*tiny_pair("clip", attention_dropout=0.5)).train()
        for parameter in tower_parameters(encoder.model, tower):
            parameter.requires_grad_(False)
        original = getattr(encoder.model, f"get_{tower}_features")
        count = []

        def counted(original=original, count=count, **inputs):
            count.append(1)
            return original(**inputs)

        setattr(encoder.model, f"get_{tower}_features", counted)
        rows = image_rows()
        parts = [encoder.collator(rows[:3]), encoder.collator(rows[3:])]
        torch.manual_seed(1)
        encoded = cached(encoder, parts, remember=encoder.remembering if spared else None)
        tiled_contrastive_loss(encoded.queries, encoded.keys, encoded.scale).backward()
        found.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
        calls.append(len(count))
    assert calls == [4, 2]
    assert found[0].keys() == found[1].keys()
    assert any(float(gradient.abs().max()) > 0 for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_embeddings_are_those_of_the_models_own_forward(saved, family):
    encoder = load_pair_encoder(saved / family, device="cpu")
    assert (encoder.kind, encoder.objective) == ("image-text", {"clip": "softmax", "siglip": "sigmoid"}[family])
    model, processor = tiny_pair(family)
    inputs = processor(
        images=pictures(),
        text=TEXTS,
        padding="max_length" if family == "siglip" else True,
        truncation=True,
        return_tensors="pt",
    )
    batch = encoder.collator(image_rows())
    assert batch.keys() == inputs.keys()
    assert all(torch.equal(batch[name], inputs[name]) for name in batch)
    found = encoder(batch)
    with torch.no_grad():
        expected = model(**inputs)
    assert torch.allclose(found.queries, expected.image_embeds, atol=1e-6)
    assert torch.allclose(found.keys, expected.text_embeds, atol=1e-6)
    logits = found.scale * found.queries @ found.keys.T + (0 if found.bias is None else found.bias)
    assert torch.allclose(logits, expected.logits_per_image, atol=1e-4)
    assert found.scale.shape == ()
    assert found.negatives is None
    assert (found.bias is None) == (family == "clip")


@pytest.mark.parametrize("family", ["clip", "siglip", "bert", "qwen2"])
def test_a_row_has_the_same_embedding_alone_and_beside_longer_ones(saved, family):
    encoder = load_pair_encoder(saved / family, device="cpu")
    rows = image_rows() if encoder.kind == "image-text" else text_rows()
    together = encoder(encoder.collator(rows))
    alone = [encoder(encoder.collator([row])) for row in rows]
    assert torch.allclose(together.keys, torch.cat([e.keys for e in alone]), atol=1e-6)
    assert torch.allclose(together.queries, torch.cat([e.queries for e in alone]), atol=1e-6)


def test_siglip_pads_every_text_to_the_length_it_was_trained_with_and_clip_none(saved):
    rows = [{"query": pictures(1)[0], "key": "ab", "negatives": []}]
    assert load_pair_encoder(saved / "siglip", device="cpu").collator(rows)["input_ids"].shape == (1, 64)
    assert load_pair_encoder(saved / "clip", device="cpu").collator(rows)["input_ids"].shape == (1, 4)


def test_siglip2_in_memory():
    """Images of differing number of patches, with their own mask."""
    from transformers import Siglip2Config, Siglip2ImageProcessorPil, Siglip2Model, Siglip2Processor

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 259, "pad_token_id": 0, "bos_token_id": 257, "eos_token_id": 258}
    config = Siglip2Config(
        text_config={**text, "max_position_embeddings": 16}, vision_config={**sizes, "patch_size": 8, "num_patches": 16}
    )
    processor = Siglip2Processor(
        Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16), pair_tokenizer("siglip", 16)
    )
    encoder = pair_encoder(Siglip2Model(config).eval(), processor)
    batch = encoder.collator(image_rows())
    assert {"pixel_values", "pixel_attention_mask", "spatial_shapes", "input_ids"} <= batch.keys()
    assert encoder.objective == "sigmoid"
    with torch.no_grad():
        expected = encoder.model(**batch)
    assert torch.allclose(encoder(batch).queries, expected.image_embeds, atol=1e-6)


def test_align_divides_by_a_temperature():
    from transformers import AlignConfig, AlignModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AlignConfig(text_config={**sizes, "vocab_size": 259}, vision_config={"width_coefficient": 0.1})
    model, processor = AlignModel(config).eval(), tiny_pair("clip").processor
    model.temperature.data.fill_(0.5)
    encoder = pair_encoder(model, processor)
    assert encoder.scale().item() == pytest.approx(2)
    model.temperature.data.fill_(0.001)
    assert encoder.scale().item() == pytest.approx(100)
    encoder.clamp_scale()
    assert model.temperature.item() == pytest.approx(0.01)
    assert pair_encoder(model, processor, scale=20.0).model.temperature.item() == pytest.approx(0.05)


def test_hard_negatives_are_texts_row_by_row(saved):
    encoder = load_pair_encoder(saved / "clip", device="cpu")
    rows = [{**row, "negatives": [row["key"] + "!", "none"]} for row in image_rows()]
    found = encoder(encoder.collator(rows))
    others = [{"query": pictures(1)[0], "key": text, "negatives": []} for row in rows for text in row["negatives"]]
    assert found.negatives.shape == (8, 16)
    assert torch.allclose(found.negatives, encoder(encoder.collator(others)).keys, atol=1e-6)
    with pytest.raises(UserError, match="1 to 2 hard negatives"):
        encoder.collator([rows[0], {**rows[1], "negatives": ["one"]}])


def test_images_of_any_mode_and_of_ambiguous_shape(saved):
    """An image three pixels high must not be read as one with its channels first."""
    encoder = load_pair_encoder(saved / "clip", device="cpu")
    images = [Image.new(mode, size) for mode in ("L", "RGBA", "P", "1", "CMYK") for size in ((3, 3), (40, 3), (3, 1))]
    batch = encoder.collator([{"query": image, "key": "a", "negatives": []} for image in images])
    assert batch["pixel_values"].shape == (15, 3, 32, 32)
    # Columns of one colour each: read with its channels first, it would be rows of one colour.
    striped = Image.fromarray(np.tile(np.array([[0, 255, 0]], dtype=np.uint8).T.reshape(1, 3, 1), (3, 1, 3)))
    pixels = encoder.collator([{"query": striped, "key": "a"}])["pixel_values"]
    assert pixels.std(2).max() < 1e-5
    assert pixels.std(3).min() > 0.1


def test_the_clip_scale_is_cut_at_100_and_can_come_down_again():
    encoder = pair_encoder(*tiny_pair("clip"))
    encoder.model.logit_scale.data.fill_(math.log(120))
    scale = encoder.scale()
    assert scale.item() == pytest.approx(100)
    scale.backward()
    assert encoder.model.logit_scale.grad.item() == pytest.approx(100)
    encoder.clamp_scale()
    assert encoder.model.logit_scale.item() == pytest.approx(math.log(100))
    siglip = pair_encoder(*tiny_pair("siglip"))
    siglip.model.logit_scale.data.fill_(math.log(120))
    siglip.clamp_scale()
    assert siglip.scale().item() == pytest.approx(120)


def test_what_is_not_in_the_loss_asks_for_no_gradient():
    """DDP would wait for it."""
    for encoder in (
        pair_encoder(*tiny_pair("siglip"), objective="softmax"),
        pair_encoder(*tiny_pair("siglip")),
        pair_encoder(*tiny_pair("clip"), scale=10.0),
        pair_encoder(*tiny_pair("bert")),
        pair_encoder(*tiny_pair("qwen2")),
        pair_encoder(*tiny_pair("bert"), objective="sigmoid"),
    ):
        rows = image_rows() if encoder.kind == "image-text" else text_rows()
        found = encoder(encoder.collator(rows))
        total = (found.queries * found.keys.roll(1, 0)).sum() * found.scale
        (total if found.bias is None else total + found.bias).backward()
        for name, parameter in encoder.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_sigmoid_loss_for_clip_brings_a_bias_that_is_saved(tmp_path):
    encoder = pair_encoder(*tiny_pair("clip"), objective="sigmoid")
    assert encoder.bias().item() == -10
    encoder.logit_bias.data.fill_(-7.3)
    encoder.save(tmp_path)
    again = load_pair_encoder(tmp_path, device="cpu")
    assert again.objective == "sigmoid"
    assert again.bias().item() == encoder.bias().item()
    assert load_pair_encoder(tmp_path, objective="softmax", device="cpu").bias() is None


# Texts


def test_text_embeddings_are_the_mean_the_first_or_the_last_hidden_state(saved):
    for family, pooling in (("bert", "mean"), ("roberta", "mean"), ("mpnet", "mean"), ("qwen2", "last")):
        assert load_pair_encoder(saved / family, device="cpu").pooling == pooling
    for pooling in ("mean", "cls", "last"):
        encoder = load_pair_encoder(saved / "bert", pooling=pooling, device="cpu")
        for text, vector in zip(TEXTS, encoder(encoder.collator(text_rows())).keys):
            with torch.no_grad():
                hidden = (
                    tiny_pair("bert").model(**pair_tokenizer("bert")([text], return_tensors="pt")).last_hidden_state[0]
                )
            pooled = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
            assert torch.allclose(vector, functional.normalize(pooled, dim=0), atol=1e-6)


def test_a_tokenizer_that_pads_on_the_left_is_padded_on_the_right_here():
    model = tiny_model("qwen2")
    tokenizer = byte_tokenizer()
    assert tokenizer.padding_side == "left"
    encoder = pair_encoder(model, tokenizer)
    batch = encoder.collator(text_rows())
    assert (batch["key_attention_mask"][:, 0] == 1).all()
    assert tokenizer.padding_side == "left"
    with torch.no_grad():
        for text, vector in zip(TEXTS, encoder(batch).keys):
            hidden = model.model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0, -1]
            assert torch.allclose(vector, functional.normalize(hidden, dim=0), atol=1e-6)


def test_token_types_reach_the_model(saved):
    encoder = load_pair_encoder(saved / "bert", device="cpu")
    batch = encoder.collator(text_rows())
    other = {n: torch.ones_like(t) if n.endswith("token_type_ids") else t for n, t in batch.items()}
    assert not torch.allclose(encoder(batch).keys, encoder(other).keys, atol=1e-3)
    roberta = load_pair_encoder(saved / "roberta", device="cpu")
    more = roberta.collator(text_rows()) | {"unknown": torch.ones(1), "key_unknown": torch.ones(1)}
    roberta(more)  # what a model does not know is left out


@pytest.mark.parametrize("family", ["bert", "mpnet", "qwen2", "gpt2"])
def test_a_saved_text_encoder_is_a_sentence_transformer(family, tmp_path):
    """GPT-2 counts positions from the left, and its tokenizer pads there: the saved one must not."""
    library = pytest.importorskip("sentence_transformers")
    model, processor = (tiny_model("gpt2"), byte_tokenizer()) if family == "gpt2" else tiny_pair(family)
    encoder = pair_encoder(model, processor, max_tokens=20)
    encoder.logit_scale.data.fill_(math.log(33))
    encoder.save(tmp_path / "m")
    loaded = library.SentenceTransformer(str(tmp_path / "m"), device="cpu")
    texts = [*TEXTS, "a text that is far too long for twenty tokens " * 3]
    expected = loaded.encode(texts, convert_to_tensor=True)
    rows = [{"query": t, "key": t, "negatives": []} for t in texts]
    with torch.no_grad():
        assert torch.allclose(encoder(encoder.collator(rows)).keys, expected, atol=1e-6)
    assert loaded.max_seq_length == 20
    # And the other way: what sentence-transformers saves is read here.
    loaded.save(str(tmp_path / "st"))
    again = load_pair_encoder(tmp_path / "st", device="cpu")
    assert torch.allclose(again(again.collator(rows)).keys, expected, atol=1e-6)
    assert (again.pooling, again.collator.max_tokens) == (encoder.pooling, 20)
    assert load_pair_encoder(tmp_path / "m", device="cpu").scale().item() == pytest.approx(33)


def test_prompt_and_lower_case_of_a_sentence_transformer(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    pair_encoder(*tiny_pair("bert")).save(tmp_path)
    edit(tmp_path / "config_sentence_transformers.json", prompts={"q": "search: "}, default_prompt_name="q")
    edit(tmp_path / "sentence_bert_config.json", do_lower_case=True)
    encoder = load_pair_encoder(tmp_path, device="cpu")
    expected = library.SentenceTransformer(str(tmp_path), device="cpu").encode(["ABC", "d"], convert_to_tensor=True)
    rows = [{"query": t, "key": t, "negatives": []} for t in ("ABC", "d")]
    assert torch.allclose(encoder(encoder.collator(rows)).keys, expected, atol=1e-6)
    encoder.save(tmp_path / "again")
    assert load_pair_encoder(tmp_path / "again", device="cpu").collator.prompt == "search: "


def test_scale_is_learned_or_fixed_and_found_again(saved, tmp_path):
    encoder = load_pair_encoder(saved / "bert", device="cpu")
    assert encoder.scale().item() == pytest.approx(20)
    assert encoder.logit_scale.requires_grad
    encoder.logit_scale.data.fill_(3.21)
    encoder.save(tmp_path / "learned")
    assert torch.equal(load_pair_encoder(tmp_path / "learned", device="cpu").logit_scale, encoder.logit_scale)
    fixed = load_pair_encoder(tmp_path / "learned", scale=50, device="cpu")
    assert not fixed.logit_scale.requires_grad
    fixed.save(tmp_path / "fixed")
    again = load_pair_encoder(tmp_path / "fixed", device="cpu")
    assert again.scale().item() == pytest.approx(50)
    assert not again.logit_scale.requires_grad
    for bad in (0, -1, math.nan, math.inf, 101):
        with pytest.raises(UserError, match="scale"):
            load_pair_encoder(saved / "bert", scale=bad, device="cpu")


# Both


@pytest.mark.parametrize("family", ["clip", "siglip", "bert", "qwen2"])
def test_round_trip(family, tmp_path):
    encoder = pair_encoder(*tiny_pair(family))
    rows = image_rows() if encoder.kind == "image-text" else text_rows(negatives=["x", "yy"])
    encoder.save(tmp_path)
    again = load_pair_encoder(tmp_path, device="cpu")
    assert not again.training
    batch, same = encoder.collator(rows), pickle.loads(pickle.dumps(again.collator))(rows)
    assert batch.keys() == same.keys()
    assert all(torch.equal(batch[name], same[name]) for name in batch)
    for ours, theirs in zip(encoder(batch), again(batch)):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["clip", "bert"])
def test_half_precision_weights_are_trained_in_float32(family, tmp_path):
    model, processor = tiny_pair(family)
    model.bfloat16().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = load_pair_encoder(tmp_path, device="cpu")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    half = load_pair_encoder(tmp_path, dtype="bfloat16", device="cpu")
    rows = image_rows() if family == "clip" else text_rows()
    batch = half.collator(rows)
    if family == "clip":
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    found = half(batch)
    assert {t.dtype for t in found if t is not None} == {torch.float32}
    assert torch.allclose(found.keys.norm(dim=1), torch.ones(4), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(encoder.collator(rows))
    assert {t.dtype for t in found if t is not None} == {torch.float32}
    double = pair_encoder(tiny_pair(family).model.double(), processor)
    batch = double.collator(rows)
    if family == "clip":
        batch["pixel_values"] = batch["pixel_values"].double()
    assert double(batch).keys.dtype == torch.float64


def test_max_tokens(saved, tmp_path):
    assert load_pair_encoder(saved / "clip", device="cpu").collator.max_tokens == 64
    assert load_pair_encoder(saved / "roberta", device="cpu").collator.max_tokens == 64  # of 65 positions
    assert load_pair_encoder(saved / "qwen2", device="cpu").collator.max_tokens == 512
    encoder = load_pair_encoder(saved / "clip", max_tokens=5, device="cpu")
    batch = encoder.collator(image_rows())
    assert batch["input_ids"].shape == (4, 5)
    assert (batch["input_ids"] == 258).sum() == 4  # the end token stays when a text is cut
    encoder.save(tmp_path)
    assert load_pair_encoder(tmp_path, device="cpu").collator.max_tokens == 5
    for asked in (65, 1):
        with pytest.raises(UserError, match="2 to 64 tokens for RobertaModel"):
            load_pair_encoder(saved / "roberta", max_tokens=asked, device="cpu")
    longest = [{"query": "x" * 200, "key": "y" * 200, "negatives": []}]
    for family in ("roberta", "mpnet", "bert"):  # positions are not exceeded
        model = load_pair_encoder(saved / family, device="cpu")
        assert torch.isfinite(model(model.collator(longest)).keys).all()


# Faults


def test_missing_and_differing_weights(copy):
    folder = copy("clip")
    edit(folder / "config.json", projection_dim=8)
    with pytest.raises(UserError, match=r"has shape \(16, 32\), but config.json asks for \(8, 32\)"):
        load_pair_encoder(folder)
    folder = copy("bert")
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(UserError, match="weights of BertModel are missing, such as 'encoder.layer.2"):
        load_pair_encoder(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load_pair_encoder(folder)


def test_a_missing_pooler_is_fine(copy):
    from transformers import BertConfig, BertForMaskedLM

    folder = copy("bert")
    before = load_pair_encoder(folder, device="cpu")
    model = BertForMaskedLM(BertConfig.from_pretrained(folder))
    model.bert.load_state_dict({k: v for k, v in before.model.state_dict().items() if not k.startswith("pooler.")})
    model.save_pretrained(folder)
    batch = before.collator(text_rows())
    assert torch.equal(load_pair_encoder(folder, device="cpu")(batch).keys, before(batch).keys)


def test_a_folder_without_its_processor_or_tokenizer(copy):
    folder = copy("clip")
    (folder / "processor_config.json").unlink()
    with pytest.raises(UserError, match="has no image processor"):
        load_pair_encoder(folder)
    folder = copy("siglip")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        load_pair_encoder(folder)
    folder = copy("bert")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load_pair_encoder(folder)


def test_a_tokenizer_that_puts_no_end_token_does_not_suit_clip():
    model, processor = tiny_pair("clip")
    processor.tokenizer = byte_tokenizer()
    with pytest.raises(UserError, match="end token behind a text"):
        pair_encoder(model, processor)


def test_models_that_are_no_encoders_of_pairs(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="encoder-decoder"):
        load_pair_encoder(tmp_path)
    with pytest.raises(UserError, match="needs a processor of images and texts"):
        pair_encoder(tiny_pair("clip").model, byte_tokenizer())
    model, processor = tiny_pair("clip")
    del model.logit_scale
    with pytest.raises(UserError, match="has no logit_scale"):
        pair_encoder(model, processor)


def test_options_out_of_range(saved):
    with pytest.raises(UserError, match="objective"):
        load_pair_encoder(saved / "clip", objective="hinge", device="cpu")
    with pytest.raises(UserError, match="pooling of its own"):
        load_pair_encoder(saved / "clip", pooling="mean", device="cpu")
    with pytest.raises(UserError, match="pooling is auto"):
        load_pair_encoder(saved / "bert", pooling="max", device="cpu")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "modules.json",
            [
                {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
                {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
                {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
            ],
            "module 'Dense', which cannot be trained here.*InfCLSentenceLoss",
        ),
        ("modules.json", [], "lists no module"),
        ("modules.json", {"a": 1}, "does not list modules"),
        (
            "modules.json",
            [
                {"path": "../other", "type": "x.Transformer"},
                {"path": "1_Pooling", "type": "x.Pooling"},
            ],
            "outside its folder",
        ),
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pools by max"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "pools by cls and mean",
        ),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}, "include_prompt"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "task 'fill-mask'"),
    ],
)
def test_sentence_transformers_that_cannot_be_trained(tmp_path, file, content, message):
    pair_encoder(*tiny_pair("bert")).save(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_pair_encoder(tmp_path)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"objective": "hinge"}', '{"max_tokens": "many"}', '{"logit_scale": null, "fixed_scale": -1}']
)
def test_a_broken_state_file(tmp_path, text):
    pair_encoder(*tiny_pair("bert")).save(tmp_path)
    (tmp_path / "contrastive.json").write_text(text)
    with pytest.raises(UserError, match="contrastive.json"):
        load_pair_encoder(tmp_path, device="cpu")


def test_rows_of_the_wrong_kind():
    encoder = pair_encoder(*tiny_pair("clip"))
    with pytest.raises(UserError, match="of type str: expected a Pillow image"):
        encoder.collator([{"query": "no image", "key": "a"}])
    with pytest.raises(UserError, match="of type NoneType: expected a string"):
        encoder.collator([{"query": pictures(1)[0], "key": None}])
    with pytest.raises(UserError, match="no pairs"):
        encoder.collator([])
