"""Any dual encoder of transformers, and any text encoder, as one module that embeds pairs."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from modelwright.errors import UserError
from modelwright.files import read_json
from modelwright.training.contrastive.collate import PairCollator
from modelwright.training.contrastive.encoded import Encoded
from modelwright.training.contrastive.sentence_folder import (
    Pooling,
    SentenceFolder,
    read_sentence_folder,
    write_sentence_folder,
)
from modelwright.training.contrastive.towers import default_pooling, frozen_tower, pool, upcast

Kind = Literal["image-text", "text-text"]
Objective = Literal["softmax", "sigmoid"]

#: What a folder keeps that neither transformers nor sentence-transformers has a place for.
STATE_FILE = "contrastive.json"
#: Largest multiplier of the cosines in the softmax loss (CLIP, arXiv 2103.00020, section 2.5).
MAX_SCALE = 100.0
#: Multiplier that encoders of texts begin with: that of sentence-transformers' MultipleNegativesRankingLoss.
TEXT_SCALE = 20.0
#: Bias that the sigmoid loss begins with (SigLIP, arXiv 2303.15343, section 3.2).
SIGMOID_BIAS = -10.0
#: Longest text, in tokens, where the model would take more and nobody asked for it.
DEFAULT_TOKENS = 512
_TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
# Their text towers read the text at its end token, so there must be one.
_END_POOLED = ("clip", "metaclip_2", "clipseg", "groupvit", "owlvit", "owlv2")
# Trained on texts that were all padded to one length, and without an attention mask.
_ONE_LENGTH = ("siglip", "siglip2")


class PairEncoder(nn.Module):
    """Embeds queries and keys: images and texts by two towers, or texts and texts by one encoder.

    Made by :func:`load_pair_encoder` or :func:`pair_encoder`. This is what is trained: wrap it in
    ``DistributedDataParallel``, give it batches of :attr:`collator`, and call :meth:`clamp_scale` after each step of
    the optimizer, as CLIP does.

    Attributes:
        model: The transformers model that is saved.
        processor: Its image-text processor, or its tokenizer.
        kind: ``image-text`` or ``text-text``.
        objective: The loss it is trained with: ``softmax`` (InfoNCE, CLIP) or ``sigmoid`` (SigLIP).
        collator: Turns rows into a batch; picklable.
        pooling: Of an encoder of texts; None for image-text models, which pool in their own way.
        logit_scale: Logarithm of the multiplier, () float32, where the model has none of its own; else None.
        logit_bias: Bias of the sigmoid loss, () float32, where the model has none of its own; else None.
    """

    logit_scale: nn.Parameter | None
    logit_bias: nn.Parameter | None

    def __init__(
        self,
        model: Any,
        processor: Any,
        collator: PairCollator,
        *,
        kind: Kind,
        objective: Objective,
        pooling: Pooling | None,
        state: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.model = model
        self.processor = processor
        self.collator = collator
        self.kind: Kind = kind
        self.objective: Objective = objective
        self.pooling = pooling
        self._settings = dict(settings)
        own, name = _own_scale(model) if kind == "image-text" else (None, None)
        self._scale_name = name
        fixed, learned = state.get("fixed_scale"), state.get("logit_scale")
        self.register_parameter("logit_scale", None)
        self.register_parameter("logit_bias", None)
        if own is None:
            start = math.log(fixed) if fixed else (math.log(TEXT_SCALE) if learned is None else learned)
            self.logit_scale = nn.Parameter(torch.tensor(float(start), device=model.device))
        elif fixed:
            with torch.no_grad():
                own.fill_(1 / fixed if name == "temperature" else math.log(fixed))
        self.fixed_scale: float | None = fixed
        if fixed:
            self._log_scale_parameter().requires_grad_(False)
        bias = getattr(model, "logit_bias", None) if kind == "image-text" else None
        if objective == "sigmoid" and bias is None:
            start = state.get("logit_bias", SIGMOID_BIAS)
            self.logit_bias = nn.Parameter(torch.tensor(float(start), device=model.device))
        elif objective == "softmax" and bias is not None:
            bias.requires_grad_(False)  # it has no part in the loss, and DDP would wait for its gradient
        if kind == "text-text":
            for parameter_name, parameter in model.named_parameters():
                if parameter_name.startswith("pooler."):
                    parameter.requires_grad_(False)  # we pool the hidden states, as sentence-transformers does
        towers = (model.get_image_features, model.get_text_features) if kind == "image-text" else (model.forward,) * 2
        self._image_inputs, self._text_inputs = (
            tuple(n for n in inspect.signature(inspect.unwrap(tower)).parameters if n not in ("self", "kwargs"))
            for tower in towers
        )

    def forward(self, batch: Mapping[str, Tensor]) -> Encoded:
        """Embeds a batch of :attr:`collator`; inputs that the model does not know are left out.

        Returns:
            Rows of length 1, in float32 even under autocast (or in the model's own dtype if that is float64). The scale
            of the softmax loss is at most 100: its value is cut, its gradient is not, so that it can come down again.

        Raises:
            UserError: The model's features are not one vector a row.
        """
        if self.kind == "image-text":
            queries, keys = self._image_text(batch)
        else:
            queries = self._texts(self._pick(batch, self._text_inputs, "query_"))
            keys = self._texts(self._pick(batch, self._text_inputs, "key_"))
        negatives = None
        if "negative_input_ids" in batch:
            negatives = self._texts(self._pick(batch, self._text_inputs, "negative_"))
        return Encoded(queries, keys, negatives, self.scale(), self.bias())

    def _image_text(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        def images() -> Tensor:
            return self._vectors(self.model.get_image_features, self._pick(batch, self._image_inputs, text=False))

        def texts() -> Tensor:
            return self._texts(self._pick(batch, self._text_inputs))

        frozen = frozen_tower(self.model)
        if frozen == "image":
            # Last: what it draws at random, or does not when it is known, must not change what the other tower draws.
            keys = texts()
            return batch["known"] if "known" in batch else images(), keys
        return images(), batch["known"] if "known" in batch else texts()

    def remembering(self, batch: Mapping[str, Tensor], encoded: Encoded) -> Mapping[str, Tensor]:
        """Returns a batch with a frozen tower's embeddings in place of its inputs, to spare the tower a second pass."""
        frozen = frozen_tower(self.model) if self.kind == "image-text" else ""
        if not frozen or encoded.negatives is not None:
            return batch
        known = encoded.queries if frozen == "image" else encoded.keys
        names = self._image_inputs if frozen == "image" else self._text_inputs
        spent = self._pick(batch, names, text=frozen == "text")
        return {"known": known.detach(), **{name: values for name, values in batch.items() if name not in spent}}

    def scale(self) -> Tensor:
        """Returns the multiplier of the cosines, () float32 or float64."""
        log_scale = upcast(self._log_scale_parameter()).reshape(())
        if self._scale_name == "temperature":
            log_scale = -log_scale.log()
        if self.objective == "softmax":
            log_scale = log_scale + (log_scale.clamp(max=math.log(MAX_SCALE)) - log_scale).detach()
        return log_scale.exp()

    def bias(self) -> Tensor | None:
        """Returns the bias of the sigmoid loss, (); None for the softmax loss."""
        if self.objective == "softmax":
            return None
        own = self.logit_bias if self.logit_bias is not None else self.model.logit_bias
        return upcast(own).reshape(())

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Brings a scale that has grown beyond 100 back to it, in place; SigLIP's is left alone, as its authors do."""
        if self.objective == "softmax":
            if self._scale_name == "temperature":
                self._log_scale_parameter().clamp_(min=1 / MAX_SCALE)
            else:
                self._log_scale_parameter().clamp_(max=math.log(MAX_SCALE))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def save(self, folder: str | Path) -> None:
        """Writes the model, its processor and the scale into a folder, which is made if there is none.

        An encoder of texts also loads as ``SentenceTransformer(folder)`` and gives the same embeddings. The folder is
        the caller's to make whole or throw away (see :func:`~modelwright.files.atomic_path`).
        """
        from modelwright.models.loading import write_model

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.clamp_scale()
        processor = self.processor
        if self.kind == "text-text":
            # sentence-transformers pads on the tokenizer's side; positions that count from the left want the right.
            processor = copy.deepcopy(processor)
            processor.padding_side = "right"
        write_model(self.model, processor, folder)
        if self.kind == "text-text":
            assert self.pooling is not None
            width, collator = self.model.config.hidden_size, self.collator
            write_sentence_folder(folder, self.pooling, width, collator.max_tokens, collator.lower, self._settings)
        state: dict[str, Any] = {"objective": self.objective, "max_tokens": self.collator.max_tokens}
        if self.fixed_scale:
            state["fixed_scale"] = self.fixed_scale
        if self.logit_scale is not None:
            state["logit_scale"] = self.logit_scale.item()
        if self.logit_bias is not None:
            state["logit_bias"] = self.logit_bias.item()
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def _log_scale_parameter(self) -> nn.Parameter:
        return self.logit_scale if self.logit_scale is not None else getattr(self.model, self._scale_name or "")

    def _pick(
        self, batch: Mapping[str, Tensor], names: tuple[str, ...], prefix: str = "", text: bool = True
    ) -> dict[str, Tensor]:
        return {n: batch[prefix + n] for n in names if prefix + n in batch and (n in _TEXT_INPUTS) == text}

    def _texts(self, inputs: dict[str, Tensor]) -> Tensor:
        if self.kind == "image-text":
            return self._vectors(self.model.get_text_features, inputs)
        if "use_cache" in self._text_inputs:
            hidden = self.model(**inputs, use_cache=False).last_hidden_state
        else:
            hidden = self.model(**inputs).last_hidden_state
        return functional.normalize(pool(upcast(hidden), inputs["attention_mask"], self.pooling or "mean"), dim=-1)

    def _vectors(self, tower: Any, inputs: dict[str, Tensor]) -> Tensor:
        found = tower(**inputs)
        # transformers 5 returns an output object, 4 returned the tensor.
        vectors = found if isinstance(found, Tensor) else getattr(found, "pooler_output", None)
        if not isinstance(vectors, Tensor) or vectors.ndim != 2:
            raise UserError(
                f"{type(self.model).__name__}.{tower.__name__} gives no single vector for each row: only dual encoders "
                f"such as CLIP and SigLIP can be trained here."
            )
        return functional.normalize(upcast(vectors), dim=-1)


def load_pair_encoder(
    path_or_id: str | Path,
    *,
    objective: Literal["auto", "softmax", "sigmoid"] = "auto",
    pooling: Literal["auto", "mean", "cls", "last"] = "auto",
    max_tokens: int | None = None,
    scale: float | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    trust_remote_code: bool = False,
) -> PairEncoder:
    """Loads an encoder of pairs from a folder or a hub id, in evaluation mode.

    A model with ``get_image_features`` and ``get_text_features`` is image-text; any other is an encoder of texts: a
    sentence-transformers folder, an encoder such as BERT, or a causal language model without its head.

    Args:
        path_or_id: A folder, or a hub id such as ``org/name`` or ``org/name@revision``.
        objective: ``auto`` is what the folder was trained with here, else sigmoid for models with a ``logit_bias``
            (SigLIP), else softmax.
        pooling: Of the hidden states of an encoder of texts; ``auto`` is what ``modules.json`` says, else the last
            token for causal language models, else the mean.
        max_tokens: Longest text; None takes what the folder says, else the model's limit, for encoders of texts at
            most 512.
        scale: Fixes the multiplier of the cosines. None leaves it to be learned, from the model's own value, or from 20
            for encoders of texts (where the paper of InfoNCE losses has no say).
        device: None or ``"auto"`` takes the accelerator if there is one.
        dtype: Of the weights; checkpoints in half precision are trained in float32 (mixed precision is the trainer's).
        trust_remote_code: Whether Python code that lies beside the weights may be executed.

    Raises:
        UserError: There is no such model; it is incomplete, corrupt or in pickle format; it has no tokenizer or
            processor; it cannot embed texts; or an option is out of range.
    """
    from transformers import AutoModel

    from modelwright.models.loading import find_folder, load_checked, load_config, load_tokenizer

    folder = find_folder(path_or_id, code=trust_remote_code)
    sentence = read_sentence_folder(folder) if (folder / "modules.json").is_file() else None
    source = sentence.transformer if sentence else folder
    config = load_config(source, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{folder} holds an encoder-decoder ({config.model_type}): only its encoder would be of use here."
        )
    model = load_checked(
        AutoModel,
        source,
        config,
        what="an encoder of pairs",
        optional=("pooler.",),  # not used: we pool the hidden states ourselves
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    processor = (
        _load_processor(source, trust_remote_code)
        if _is_image_text(model)
        else load_tokenizer(source, trust_remote_code=trust_remote_code)
    )
    state = _read_state(folder / STATE_FILE)
    return _build(
        model, processor, state, sentence, objective=objective, pooling=pooling, max_tokens=max_tokens, scale=scale
    ).eval()


def pair_encoder(
    model: Any,
    processor: Any,
    *,
    objective: Literal["auto", "softmax", "sigmoid"] = "auto",
    pooling: Literal["auto", "mean", "cls", "last"] = "auto",
    max_tokens: int | None = None,
    scale: float | None = None,
) -> PairEncoder:
    """Wraps a model that is in memory; the weights are shared, and stay in the mode, dtype and place they are in.

    Args:
        model: Such as a ``CLIPModel`` or ``SiglipModel``, or an encoder of texts (of a model with a head, the head is
            left out).
        processor: The image-text processor, or the tokenizer.
        objective: See :func:`load_pair_encoder`.
        pooling: See :func:`load_pair_encoder`.
        max_tokens: See :func:`load_pair_encoder`.
        scale: See :func:`load_pair_encoder`.

    Raises:
        UserError: See :func:`load_pair_encoder`.
    """
    if not _is_image_text(model):
        model = getattr(model, "base_model", model)
    return _build(model, processor, {}, None, objective=objective, pooling=pooling, max_tokens=max_tokens, scale=scale)


def _build(
    model: Any,
    processor: Any,
    state: dict[str, Any],
    sentence: SentenceFolder | None,
    *,
    objective: str,
    pooling: str,
    max_tokens: int | None,
    scale: float | None,
) -> PairEncoder:
    if objective not in ("auto", "softmax", "sigmoid"):
        raise UserError(f"The objective is auto, softmax or sigmoid, not '{objective}'.")
    if pooling not in ("auto", "mean", "cls", "last"):
        raise UserError(f"The pooling is auto, mean, cls or last, not '{pooling}'.")
    if scale is not None:
        if not (math.isfinite(scale) and scale > 0):
            raise UserError(f"The scale must be a positive number, not {scale}.")
        state = {**state, "fixed_scale": float(scale)}
    if objective == "auto":
        objective = state.get("objective") or ("sigmoid" if hasattr(model, "logit_bias") else "softmax")
    if objective == "softmax" and (state.get("fixed_scale") or 0) > MAX_SCALE:
        raise UserError(f"The scale of the softmax loss is at most {MAX_SCALE:g}, not {state['fixed_scale']:g}.")
    image_text = _is_image_text(model)
    name = type(model).__name__
    if image_text and pooling != "auto":
        raise UserError(f"{name} has a pooling of its own: leave the pooling at auto.")
    tokenizer = getattr(processor, "tokenizer", None) if image_text else processor
    image_processor = getattr(processor, "image_processor", None) if image_text else None
    if tokenizer is None or (image_text and image_processor is None):
        raise UserError(f"{name} needs a processor of images and texts, not a {type(processor).__name__}.")
    if tokenizer.pad_token is None:
        raise UserError("The tokenizer has neither a padding nor an end token, so texts cannot be padded: add one.")
    if image_text:
        _own_scale(model)
        _check_end(tokenizer, model.config)
    collator = PairCollator(
        tokenizer,
        _max_tokens(model, tokenizer, image_text, max_tokens, state.get("max_tokens"), sentence),
        image_processor,
        pad_to_max=image_text and model.config.model_type in _ONE_LENGTH,
        prompt=sentence.prompt if sentence else "",
        lower=sentence.lower if sentence else False,
    )
    return PairEncoder(
        model,
        processor,
        collator,
        kind="image-text" if image_text else "text-text",
        objective=objective,  # type: ignore[arg-type]
        pooling=None if image_text else default_pooling(pooling, model.config, sentence),
        state=state,
        settings=sentence.settings if sentence else {},
    )


def _read_state(path: Path) -> dict[str, Any]:
    state = read_json(path) if path.is_file() else {}
    valid = isinstance(state, dict) and state.get("objective", "softmax") in ("softmax", "sigmoid")
    for name in ("max_tokens", "fixed_scale", "logit_scale", "logit_bias"):
        value = state.get(name, 1) if valid else None
        valid = valid and isinstance(value, int | float) and math.isfinite(value)
    if not valid or state.get("fixed_scale", 1) <= 0 or state.get("max_tokens", 2) < 2:
        raise UserError(f"{path} is not what was written beside a model here: remove it to begin anew.")
    return state


def _is_image_text(model: Any) -> bool:
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def _own_scale(model: Any) -> tuple[nn.Parameter, str]:
    """The parameter of an image-text model that scales the cosines: a logarithm, or (ALIGN) a divisor."""
    for name in ("logit_scale", "temperature"):
        found = getattr(model, name, None)
        if isinstance(found, nn.Parameter) and found.numel() == 1:
            return found, name
    raise UserError(
        f"{type(model).__name__} has no logit_scale, so it is no dual encoder such as CLIP or SigLIP: it cannot be "
        f"trained here."
    )


def _check_end(tokenizer: Any, config: Any) -> None:
    if config.model_type not in _END_POOLED:
        return
    ids = tokenizer("a")["input_ids"]
    end = getattr(config.text_config, "eos_token_id", None)
    # Configs of OpenAI's checkpoints name 2 by mistake; their models then look for the highest id.
    if not ids or ids[-1] != (max(ids) if end in (None, 2) else end):
        raise UserError(
            f"The tokenizer does not put the end token behind a text (config.json names the id {end}), where "
            f"{config.model_type} models read it: use the tokenizer that belongs to the model."
        )


def _max_tokens(
    model: Any, tokenizer: Any, image_text: bool, asked: int | None, saved: int | None, sentence: SentenceFolder | None
) -> int:
    config = getattr(model.config, "text_config", model.config) if image_text else model.config
    positions = getattr(config, "max_position_embeddings", None)
    # RoBERTa and its kin count positions from the padding id on, so that many are lost.
    padding = getattr(getattr(model, "embeddings", None), "padding_idx", None)
    if positions and padding is not None and not image_text:
        positions -= padding + 1
    limits = [n for n in (positions, tokenizer.model_max_length) if n and n < 10**9]
    limit = min(limits, default=None)
    if asked is not None:
        if asked < 2 or (positions and asked > positions):
            raise UserError(
                f"The longest text must have from 2 to {positions or 'many'} tokens for {type(model).__name__}, not "
                f"{asked}."
            )
        return asked
    said = saved or (sentence.max_tokens if sentence else None)
    if said:
        return min(said, positions or said)
    if image_text:
        return limit or DEFAULT_TOKENS
    return min(limit or DEFAULT_TOKENS, DEFAULT_TOKENS)


def _load_processor(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoProcessor

    from modelwright.models.loading import TOKENIZER_FILES, first_line, quiet

    for what, names in (
        ("image processor", ("preprocessor_config.json", "processor_config.json")),
        ("tokenizer", TOKENIZER_FILES),
    ):
        if not any((folder / name).is_file() for name in names):
            raise UserError(f"{folder} has no {what} (no {names[0]}): copy it from the model this one was made from.")
    try:
        with quiet():
            # Pillow's backend everywhere, so that results do not depend on whether torchvision is installed.
            found = AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust side of tokenizers raises bare Exception for a corrupt file
        raise UserError(f"The processor in {folder} could not be loaded: {first_line(error)}") from error
    if getattr(found, "image_processor", None) is None or getattr(found, "tokenizer", None) is None:
        raise UserError(
            f"{folder} has no processor of images and texts (preprocessor_config.json or processor_config.json, and "
            f"tokenizer.json): copy it from the model that this one was made of."
        )
    if found.tokenizer.pad_token is None and found.tokenizer.eos_token is not None:
        found.tokenizer.pad_token = found.tokenizer.eos_token
    return found
