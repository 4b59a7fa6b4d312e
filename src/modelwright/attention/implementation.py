"""Attention functions of ours under names of transformers, with settings that live in a model's config.

``model.set_attn_implementation(name)`` is enough to use one. Its settings are the entry ``modelwright_attention`` of
the config, so they are saved with a checkpoint, and :func:`modelwright.models.loading.load_model` puts the attention
in place again. Without an entry a method's defaults hold.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils

from modelwright import catalog
from modelwright.attention.places import places_mask
from modelwright.errors import UserError
from modelwright.models.loading import ATTENTION_KEY, first_line
from modelwright.options import make_part
from modelwright.values import parse_value

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Beginning of the names of attention functions that stand in front of a model's own for a while.
TEMPORARY = "modelwright-"
#: Names that :func:`register` gave, to the settings' class.
_REGISTERED: dict[str, type[AttentionConfig]] = {}
_probed: list[tuple[Any, int]] | None = None

#: ``attention(settings, module, query, key, value, mask, scaling=, dropout=, **more)``: outputs (batch, heads, rows,
#: value size) and weights (batch, heads, rows, keys) or None; queries and keys are (batch, heads, tokens, size).
Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Settings of an attention function: what a method's dataclass of options derives from.

    Attributes:
        method: Name of the method's card.
        implementation: Name of the attention function.
    """

    method: ClassVar[str]
    implementation: ClassVar[str]

    def refuse(self, config: Any) -> str | None:
        """Returns why models of a config cannot have this attention, as a clause; None if they can."""
        return None

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises :class:`UserError` if the model cannot have this attention."""
        if reason := self.refuse(model.get_decoder().config):
            raise UserError(f"{type(model).__name__} cannot have the attention '{self.method}': {reason}.")

    def add_parameters(self, modules: list[tuple[nn.Module, int]]) -> None:
        """Adds what is learned to attention modules, each with its number of query heads."""

    def as_dict(self) -> dict[str, Any]:
        """Returns what stands in a model's config."""
        return {"name": self.method, "options": json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def of(cls, config: Any) -> Self:
        """Returns the settings in a model's config; the defaults if it has none of this method."""
        entry = getattr(config, ATTENTION_KEY, None)
        if not isinstance(entry, dict) or entry.get("name") != cls.method:
            return cls()
        kind: Any = cls
        found: Self = _made(kind, json.dumps(entry.get("options") or {}, sort_keys=True))
        return found

    def install(self, model: PreTrainedModel) -> None:
        """Gives a model this attention for good: for training, and for whoever loads what is saved of it.

        Raises:
            UserError: The model cannot have it, or has another of ours.
        """
        _check_free(model, self.implementation)
        self.check_model(model)
        decoder = model.get_decoder()
        with _named(model, self):
            modules = _probe(decoder)
        for config in {id(c): c for c in (model.config, decoder.config)}.values():
            setattr(config, ATTENTION_KEY, self.as_dict())
        decoder.config._attn_implementation_internal = self.implementation
        self.add_parameters(modules)

    @contextlib.contextmanager
    def apply(self, model: PreTrainedModel) -> Iterator[Self]:
        """Gives a model this attention inside the block; keys, values and weights are as ever, before and after.

        Raises:
            UserError: The model cannot have it, or another context changes its attention already.
        """
        _check_free(model, self.implementation)
        self.check_model(model)
        with _named(model, self):
            _probe(model.get_decoder())
            yield self


@functools.lru_cache(maxsize=64)
def _made(cls: Any, options: str) -> Any:
    return make_part(cls, cls.method, json.loads(options))


def register(settings: type[AttentionConfig], attention: Attention) -> None:
    """Makes an attention function, and its mask, known to transformers by ``settings.implementation``."""

    def function(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if _probed is not None:
            _probed.append((module, query.shape[1]))
            return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None
        if more.get("s_aux") is not None or more.get("position_bias") is not None:
            raise UserError("This model adds attention sinks or a position bias to its scores, which is not supported.")
        found, weights = attention(
            settings.of(module.config), module, query, key, value, attention_mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, dropout=dropout, **more,
        )  # fmt: skip
        return found.transpose(1, 2).contiguous(), weights

    def mask(*_: Any, **given: Any) -> torch.Tensor:
        config = given.get("config")
        if config is not None and (reason := settings.of(config).refuse(config)):
            raise UserError(f"A {config.model_type} model cannot have the attention '{settings.method}': {reason}.")
        return places_mask(**given)

    _REGISTERED[settings.implementation] = settings
    _spare_the_import_of_a_kernel()
    AttentionInterface.register(settings.implementation, function)
    AttentionMaskInterface.register(settings.implementation, mask)


def _spare_the_import_of_a_kernel() -> None:
    """Lets transformers take a name with ``flash`` in it for one of ours: it would import a kernel of that name.

    This replaces ``transformers.modeling_utils.lazy_import_flash_attention``, which is private.
    """
    real = getattr(modeling_utils, "lazy_import_flash_attention", None)
    if real is None or hasattr(real, "modelwright"):
        return

    @functools.wraps(real)
    def lazy_import(implementation: str | None, *args: Any, **keys: Any) -> Any:
        return None if implementation in _REGISTERED else real(implementation, *args, **keys)

    lazy_import.modelwright = True  # type: ignore[attr-defined]
    modeling_utils.lazy_import_flash_attention = lazy_import


def is_changed(model: PreTrainedModel) -> bool:
    """Whether an attention function of ours is in use on the model."""
    name = str(getattr(model.get_decoder().config, "_attn_implementation", ""))
    return name in _REGISTERED or name.startswith(TEMPORARY)


def _check_free(model: PreTrainedModel, wanted: str) -> None:
    name = str(getattr(model.get_decoder().config, "_attn_implementation", ""))
    if name != wanted and is_changed(model):
        other = _REGISTERED[name].method if name in _REGISTERED else "a context"
        raise UserError(f"This model's attention is changed by {other} already: use one of them at a time.")


@contextlib.contextmanager
def _named(model: PreTrainedModel, settings: AttentionConfig) -> Iterator[None]:
    """Names the attention function in a copy of the config, which only this model's modules see."""
    config = model.get_decoder().config
    own = copy.deepcopy(config)
    setattr(own, ATTENTION_KEY, settings.as_dict())
    own._attn_implementation_internal = settings.implementation
    holders = [module for module in model.modules() if module.__dict__.get("config") is config]
    for module in holders:
        module.config = own
    try:
        yield
    finally:
        for module in holders:
            if module.config is own:
                module.config = config


@torch.no_grad()
def _probe(decoder: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """Returns the modules that ask for our attention function, with their query heads, by reading one token.

    Raises:
        UserError: None does.
    """
    global _probed
    fixed = f"{type(decoder).__name__} does not ask transformers for its attention function, so it can have no other."
    if not getattr(decoder, "_can_set_attn_implementation", lambda: True)():
        raise UserError(fixed)
    _probed = []
    training = [module for module in decoder.modules() if module.training]
    try:
        decoder.eval()  # dropout would draw from the generators
        decoder(input_ids=torch.ones(1, 1, dtype=torch.long, device=decoder.device), use_cache=False)
        found = _probed
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{type(decoder).__name__} could not be examined: {first_line(error)}") from error
    finally:
        _probed = None
        for module in training:
            module.training = True
    if not found:
        raise UserError(fixed)
    return found


def read_attention(text: str) -> AttentionConfig:
    """Reads an attention with its options: ``rope-alibi``, or YAML in a line such as ``prflash: {law: uniform}``.

    Raises:
        UserError: There is no such attention or option, or a value does not fit.
    """
    import yaml

    try:
        value = parse_value(text)
    except yaml.YAMLError as error:
        raise UserError(f"The attention {text[:80]!r} is not valid YAML.") from error
    pairs = {value: None} if isinstance(value, str) else value
    if not isinstance(pairs, dict) or len(pairs) != 1:
        raise UserError(f"{text[:80]!r} must name one attention, such as 'rope-alibi' or 'prflash: {{law: uniform}}'.")
    ((name, options),) = pairs.items()
    if options is not None and not isinstance(options, dict):
        raise UserError(f"The options of '{name}' must be a mapping, such as '{name}: {{option: value}}'.")
    found: AttentionConfig = make_part(catalog.load("attentions", str(name)), str(name), options)
    return found
