"""A dual encoder of images and texts from scratch: CLIP or SigLIP, sized by overriding fields of its config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modelwright.errors import UserError, did_you_mean
from modelwright.models.new import _put, _sentence, _typed
from modelwright.models.tiny import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

#: Config, model, processor and image processor of each architecture, by their names in transformers. The image
#: processors are those that need Pillow only.
PAIR_ARCHITECTURES = {
    "clip": ("CLIPConfig", "CLIPModel", "CLIPProcessor", "CLIPImageProcessorPil"),
    "siglip": ("SiglipConfig", "SiglipModel", "SiglipProcessor", "SiglipImageProcessorPil"),
}
_TOWERS = ("text_config", "vision_config")


def new_pair_model(
    architecture: str,
    settings: Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Makes a dual encoder with random weights, and what turns images and texts into its inputs.

    SigLIP begins with the scale 10 and the bias -10, as the paper has it (arXiv 2303.15343, section 3.2), CLIP with
    the scale of its config (2.6592, that is 1/0.07).

    Args:
        architecture: ``clip`` or ``siglip``.
        settings: Fields of the config by name. ``vision_config.hidden_size`` is that of the image tower,
            ``text_config.hidden_size`` of the text tower; a plain ``hidden_size`` is that of both, as is every name
            that both have. Text is read as YAML. The longest text is ``max_position_embeddings``.
        tokenizer: A fast tokenizer; it gives the vocabulary. It is not changed: the processor has a copy that puts the
            end token behind every text, and for CLIP the beginning token before it.
        seed: Seed of the weights; the global random state is left as it was.

    Returns:
        The model (float32, on the CPU, in evaluation mode) and its processor.

    Raises:
        UserError: Unknown architecture or field, a value that makes no model, or a tokenizer without an end or padding
            token.
    """
    import torch
    import transformers

    from modelwright.models.loading import quiet

    name = architecture.lower().replace("-", "_")
    if name not in PAIR_ARCHITECTURES:
        raise UserError(
            f"There is no new image-text model of the architecture '{architecture}': "
            f"{did_you_mean(name, PAIR_ARCHITECTURES)}"
        )
    config_class, model_class, processor_class, images_class = (
        getattr(transformers, part) for part in PAIR_ARCHITECTURES[name]
    )
    with quiet():  # it warns of default token ids, which the tokenizer's replace
        default = config_class()
        options = _options(default, name, settings or {})
        texts = options.setdefault("text_config", {})
        framed = _framed(
            tokenizer, name, texts.get("max_position_embeddings", default.text_config.max_position_embeddings)
        )
        texts.update(_vocabulary(framed))
        if name == "siglip":  # its towers must end at one width
            width = options.get("vision_config", {}).get("hidden_size", default.vision_config.hidden_size)
            texts.setdefault("projection_size", width)
        try:
            config = config_class(**options)
        except Exception as error:  # each config class has its own errors for bad values
            raise UserError(f"The settings for {name} are not valid: {_sentence(error)}") from error
        _check_patches(config.vision_config)
        try:
            with seeded(seed):
                model = model_class(config).eval()
        except (ValueError, TypeError, RuntimeError, AssertionError, ZeroDivisionError) as error:
            raise UserError(f"No {name} model can be made with these settings: {_sentence(error)}") from error
    if name == "siglip":  # the class begins at 0 and 0
        with torch.no_grad():
            model.logit_scale.fill_(math.log(10))
            model.logit_bias.fill_(-10)
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    images = (
        images_class(size=square) if name == "siglip" else images_class(size={"shortest_edge": side}, crop_size=square)
    )
    return model, processor_class(images, framed)


def _options(default: Any, architecture: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    towers = {tower: set(getattr(default, tower).to_dict()) for tower in _TOWERS}
    own = set(default.to_dict()) - set(towers) - {"model_type", "architectures"}
    shared = own | set().union(*towers.values())
    for key, value in settings.items():
        first, _, rest = key.partition(".")
        if first in towers and rest:
            places, known = [key] if rest in towers[first] else [], towers[first]
        else:
            # CLIP's projection_dim, say, stands in all three configs.
            places, known = [key] if key in own else [], shared
            places += [f"{tower}.{key}" for tower in _TOWERS if key in towers[tower]]
        if not places:
            raise UserError(f"{architecture} has no setting '{key}': {did_you_mean(rest or key, sorted(known))}")
        for place in places:
            # What is said of one tower counts more than what is said of both, in whatever order.
            if place == key or place not in settings:
                _put(options, default, place, _typed(value))
    return options


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def _framed(tokenizer: PreTrainedTokenizerBase, architecture: str, longest: int) -> PreTrainedTokenizerFast:
    """Returns a copy of a tokenizer that ends every text where the architecture looks for its end."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    if not getattr(tokenizer, "is_fast", False):
        raise UserError("A new image-text model needs a fast tokenizer, such as `modelwright tokenizer` writes.")
    kinds = ("pad", "eos", "bos") if architecture == "clip" else ("pad", "eos")
    for kind in kinds:
        if getattr(tokenizer, f"{kind}_token_id") is None:
            raise UserError(f"The tokenizer has no {kind} token, which {architecture} needs: take another tokenizer.")
    names = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("pad", "bos", "eos")}
    inside = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if architecture == "clip" and tokenizer.eos_token_id == 2:
        # transformers takes the id 2 for the mark of an old config, and would read texts at their largest id instead.
        names["eos_token"] = "<end>"
        inside.add_special_tokens([names["eos_token"]])
    frame = "{bos} $A {eos}" if architecture == "clip" else "$A {eos}"
    inside.post_processor = processors.TemplateProcessing(
        single=frame.format(bos=names["bos_token"], eos=names["eos_token"]),
        special_tokens=[(names[f"{kind}_token"], inside.token_to_id(names[f"{kind}_token"])) for kind in kinds[1:]],
    )
    # As arguments, because only these are saved with it.
    return PreTrainedTokenizerFast(
        tokenizer_object=inside,
        **names,
        padding_side="right",
        model_max_length=longest,
        # SigLIP was made to see texts of one length, without a mask.
        model_input_names=["input_ids", "attention_mask"] if architecture == "clip" else ["input_ids"],
        clean_up_tokenization_spaces=False,
    )


def _check_patches(vision: Any) -> None:
    size, patch = vision.image_size, vision.patch_size
    if not isinstance(size, int) or not isinstance(patch, int) or patch < 1 or size < patch or size % patch:
        raise UserError(f"image_size is {size}, which is no multiple of patch_size, which is {patch}: change one.")
