"""Tiny random encoders of pairs, image with text or text with text: for tests, examples and dry runs on a laptop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from modelwright.errors import UserError, did_you_mean
from modelwright.models.tiny import seeded, tiny_model
from modelwright.models.tokenizers import byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

__all__ = ["PAIR_FAMILIES", "TinyPair", "pair_tokenizer", "tiny_pair"]

#: Families of :func:`tiny_pair`: two dual encoders of images and texts, three encoders of texts, a causal one.
PAIR_FAMILIES: tuple[str, ...] = ("clip", "siglip", "bert", "mpnet", "roberta", "qwen2")

_LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_IDS = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 257, "eos_token_id": 258}


class TinyPair(NamedTuple):
    """A tiny model and what turns images and texts into its inputs.

    Attributes:
        model: float32, on the CPU, in evaluation mode.
        processor: An image-text processor, or the tokenizer of an encoder of texts.
    """

    model: PreTrainedModel
    processor: ProcessorMixin | PreTrainedTokenizerFast


def pair_tokenizer(kind: str = "clip", max_tokens: int = 64) -> PreTrainedTokenizerFast:
    """Returns a tokenizer of the 256 bytes and three special tokens that frames texts as a family of models does.

    Args:
        kind: ``clip`` puts ``<bos>`` (257) before and ``<eos>`` (258, the highest id, as CLIP's) behind a text;
            ``siglip`` puts ``<eos>`` behind it and returns no attention mask; ``bert`` puts ``<bos>`` and ``<eos>`` in
            the places of its CLS and SEP, and returns token types.
        max_tokens: Longest text with its special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", *alphabet, "<bos>", "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>" if kind == "siglip" else "<bos> $A <eos>",
        special_tokens=[("<bos>", 257), ("<eos>", 258)],
    )
    names = {"siglip": ["input_ids"], "bert": ["input_ids", "token_type_ids", "attention_mask"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="right",
        model_max_length=max_tokens,
        model_input_names=names.get(kind, ["input_ids", "attention_mask"]),
        clean_up_tokenization_spaces=False,
    )


def tiny_pair(
    family: str, *, seed: int = 0, image_size: int = 32, max_tokens: int = 64, width: int = 16, **text: Any
) -> TinyPair:
    """Returns a tiny encoder of pairs with random weights (about 35 to 60 thousand parameters).

    Args:
        family: One of :data:`PAIR_FAMILIES`.
        seed: Seed of the weights; the global random state is left as it was.
        image_size: Height and width of images, a multiple of 8 (the patch).
        max_tokens: Longest text.
        width: Width of the embeddings of images and texts (CLIP); SigLIP's and those of texts have the hidden width 32.
        **text: Fields of the config of the text encoder.

    Raises:
        UserError: Unknown family, or the image size is no multiple of the patch.
    """
    if family not in PAIR_FAMILIES:
        raise UserError(f"There is no tiny encoder of the family '{family}': {did_you_mean(family, PAIR_FAMILIES)}")
    if image_size < 8 or image_size % 8:
        raise UserError(f"The image size of a tiny encoder must be a multiple of 8, not {image_size}.")
    if family == "qwen2":
        return TinyPair(tiny_model("qwen2", seed=seed, **text), byte_tokenizer())
    if family in ("clip", "siglip"):
        return _image_text(family, seed, image_size, max_tokens, width, text)
    from transformers import AutoConfig, AutoModel

    # RoBERTa counts positions from the padding id on, MPNet from 1 on: they need more of them than tokens.
    positions = max_tokens + {"bert": 0, "roberta": 1, "mpnet": 2}[family]
    config = AutoConfig.for_model(family, **{**_LAYERS, **_IDS, "max_position_embeddings": positions, **text})
    with seeded(seed):
        model = AutoModel.from_config(config).eval()
    return TinyPair(model, pair_tokenizer("bert" if family == "bert" else "clip", max_tokens))


def _image_text(family: str, seed: int, image_size: int, max_tokens: int, width: int, text: dict[str, Any]) -> TinyPair:
    import torch
    import transformers

    from modelwright.models.loading import quiet

    texts = {**_LAYERS, **_IDS, "max_position_embeddings": max_tokens, **text}
    images = {**_LAYERS, "image_size": image_size, "patch_size": 8}
    names = {
        "clip": ("CLIPConfig", "CLIPModel", "CLIPProcessor", "CLIPImageProcessorPil"),
        "siglip": ("SiglipConfig", "SiglipModel", "SiglipProcessor", "SiglipImageProcessorPil"),
    }
    config_class, model_class, processor_class, image_class = (getattr(transformers, name) for name in names[family])
    more = {"projection_dim": width} if family == "clip" else {}
    with quiet():  # it warns of default token ids, which the tiny vocabulary replaces
        config = config_class(text_config=texts, vision_config=images, **more)
    square = {"height": image_size, "width": image_size}
    if family == "clip":
        image_processor = image_class(size={"shortest_edge": image_size}, crop_size=square)
    else:
        image_processor = image_class(size=square)
    with seeded(seed):
        model = model_class(config).eval()
    if family == "siglip":  # as SigLIP (arXiv 2303.15343, section 3.2) begins; the class itself begins at 0 and 0
        with torch.no_grad():
            model.logit_scale.fill_(math.log(10))
            model.logit_bias.fill_(-10)
    tokenizer = pair_tokenizer("clip" if family == "clip" else "siglip", max_tokens)
    return TinyPair(model, processor_class(image_processor, tokenizer))
