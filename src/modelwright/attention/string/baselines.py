"""The methods that the paper compares with, in one plain frame: what position each pair of tokens is given.

Every one of them scores a pair by one of a few *branches*. A branch rotates all queries by one map of places and all
keys by another, so its relative position is ``to_query(m) - to_key(n)``; a rule says which branch a pair belongs to.
Whole score matrices are made: this is for comparison, not for speed. NTK and YaRN change the frequencies instead.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from modelwright.attention.rotary import check_rotary
from modelwright.attention.string.hook import Call, hooked
from modelwright.attention.string.rotation import Rotation
from modelwright.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Of a place (rows,) its position, as float64.
Map = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Branch:
    """One way to give positions.

    Attributes:
        to_query: Positions of queries.
        to_key: Positions of keys.
        holds: ``holds(m, n)``: which pairs it is for, of places (rows, 1) and (1, keys). Later branches win.
    """

    to_query: Map
    to_key: Map
    holds: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _same(place: torch.Tensor) -> torch.Tensor:
    return place.to(torch.float64)


def _always(m: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(m - n, dtype=torch.bool)


_ROPE = Branch(_same, _same, _always)


def rope() -> list[Branch]:
    """Returns plain rotary positions, p = m - n."""
    return [_ROPE]


def string(shift: int, window: int) -> list[Branch]:
    """Returns STRING: p = m - n - shift + window from a distance of ``shift``."""
    return [_ROPE, Branch(lambda m: _same(m) - shift + window, _same, lambda m, n: m - n >= shift)]


def rerope(window: int) -> list[Branch]:
    """Returns ReRoPE: p = min(m - n, window)."""
    return [
        _ROPE,
        Branch(lambda m: torch.full_like(m, window, dtype=torch.float64), lambda n: 0 * _same(n), _from(window)),
    ]


def leaky_rerope(window: int, scale: float) -> list[Branch]:
    """Returns Leaky ReRoPE: p = window + (m - n - window) / scale from a distance of ``window``."""
    far = Branch(lambda m: window + (_same(m) - window) / scale, lambda n: _same(n) / scale, _from(window))
    return [_ROPE, far]


def self_extend(window: int, group: int) -> list[Branch]:
    """Returns Self-Extend: p = m // group - n // group + window - window // group from a distance of ``window``."""
    far = Branch(lambda m: _same(m // group) + window - window // group, lambda n: _same(n // group), _from(window))
    return [_ROPE, far]


def dual_chunk(chunk: int, length: int) -> list[Branch]:
    """Returns dual chunk attention.

    Inside a chunk p = m - n. Into the chunk before, distances are exact while they are below ``length``, and the
    query's position is held at ``length - 1`` beyond that. Into earlier chunks p = (length - 1) - (n mod chunk).

    Args:
        chunk: Tokens of a chunk, fewer than ``length``.
        length: Positions that the model may use.
    """
    if not 0 < chunk < length:
        raise UserError(f"A chunk of {chunk} tokens does not fit {length} positions: give fewer, and at least 1.")

    def key(n: torch.Tensor) -> torch.Tensor:
        return _same(n % chunk)

    return [
        Branch(lambda m: torch.full_like(m, length - 1, dtype=torch.float64), key, _always),
        Branch(
            lambda m: _same(chunk + m % chunk).clamp(max=length - 1), key, lambda m, n: m // chunk - n // chunk == 1
        ),
        Branch(lambda m: _same(m % chunk), key, lambda m, n: m // chunk == n // chunk),
    ]


def _from(distance: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda m, n: m - n >= distance


def position_matrix(branches: Sequence[Branch], length: int) -> torch.Tensor:
    """Returns p(m, n) as (length, length) float64; NaN above the diagonal."""
    place = torch.arange(length)
    found = torch.full((length, length), torch.nan, dtype=torch.float64)
    for branch in branches:
        position = branch.to_query(place)[:, None] - branch.to_key(place)
        found = torch.where(branch.holds(place[:, None], place[None]), position, found)
    return found.masked_fill(place[:, None] < place, torch.nan)


def attention_with_positions(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    branches: Sequence[Branch],
    rotation: Rotation | None,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attends causally with the positions of some branches.

    Args:
        query: (batch, heads, rows, size), *not* rotated; they belong to the last ``rows`` keys.
        key: (batch, key heads, keys, size), not rotated.
        value: (batch, key heads, keys, value size).
        branches: What positions pairs have.
        rotation: The layer's frequencies; None for a layer that does not rotate.
        scaling: Factor of the scores.
        mask: As in :func:`~modelwright.attention.string.reference.string_attention_reference`.
        softcap: As there.

    Returns:
        (batch, heads, rows, value size).
    """
    groups, rows, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    n = torch.arange(keys, device=query.device)
    m = n[keys - rows :]
    scores = None
    for branch in branches:
        turned_query, turned_key = query, key
        if rotation is not None:
            turned_query, turned_key = rotation.at(query, branch.to_query(m)), rotation.at(key, branch.to_key(n))
        found = turned_query @ turned_key.repeat_interleave(groups, 1).mT
        scores = found if scores is None else torch.where(branch.holds(m[:, None], n[None]), found, scores)
    assert scores is not None
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = n <= m[:, None]
    lowest = torch.finfo(scores.dtype).min
    if mask is not None and mask.ndim == 4 and mask.dtype != torch.bool:
        scores = scores + mask
    else:
        if mask is not None:
            seen = mask if mask.ndim == 4 else seen & mask[:, None, None, :]
        scores = scores.masked_fill(~seen, lowest)
    return scores.softmax(-1).to(query.dtype) @ value.repeat_interleave(groups, 1)


@contextlib.contextmanager
def apply_positions(model: PreTrainedModel, branches: Sequence[Branch]) -> Iterator[None]:
    """Gives a model the positions of some branches inside the block, with or without a cache.

    Queries and keys arrive rotated and are turned back first, by their places in the sequence. So a batch may not be
    padded, and layers with a sliding window are left alone.

    Raises:
        UserError: The model has no rotary positions; later: a padded batch, or a mask of four dimensions.
    """

    def serve(call: Call) -> tuple[torch.Tensor, None]:
        if call.mask is not None:
            raise UserError("The baselines of STRING take no padding and no mask: give prompts of one length.")
        query, key = call.query, call.key
        if call.rotation is not None:
            n = torch.arange(key.shape[2], device=key.device)
            key = call.rotation.at(key, -n)
            query = call.rotation.at(query, -n[key.shape[2] - query.shape[2] :])
        out = attention_with_positions(
            query, key, call.value, branches, call.rotation, scaling=call.scaling, softcap=call.softcap
        )
        return out, None

    length = getattr(model.get_decoder().config, "max_position_embeddings", None) or 64
    with hooked(model, serve, lambda keys, window: window is None, distance=max(1, length // 3)):
        yield


@contextlib.contextmanager
def rescaled(model: PreTrainedModel, kind: str, factor: float, *, trained: int | None = None) -> Iterator[None]:
    """Gives a model other frequencies inside the block: ``ntk`` or ``yarn``; a cache may not be carried across.

    Args:
        model: A decoder with one rotary embedding, without scaling of its own.
        kind: ``ntk``: the base is multiplied by factor ** (d / (d - 2)), d being the rotated size; ``yarn``: as
            transformers has it, its temperature included.
        factor: Above 1: by how much positions are compressed.
        trained: For YaRN, the length that was trained; ``max_position_embeddings`` by default.

    Raises:
        UserError: The kind is unknown, or the model has another kind of rotary embedding.
    """
    check_rotary(model)
    decoder: Any = model.get_decoder()
    config = decoder.config
    parameters: Any = getattr(config, "rope_parameters", None)
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None or not isinstance(parameters, dict) or parameters.get("rope_type") != "default":
        raise UserError(f"{type(model).__name__} has no single, unscaled rotary embedding: it cannot be rescaled.")
    own = copy.deepcopy(config)
    if kind == "ntk":
        size = 2 * len(rotary.inv_freq)
        theta = parameters["rope_theta"] * factor ** (size / (size - 2))
        own.rope_parameters = {**parameters, "rope_theta": theta}
    elif kind == "yarn":
        original = {"original_max_position_embeddings": trained or config.max_position_embeddings}
        own.rope_parameters = {**parameters, "rope_type": "yarn", "factor": factor, **original}
    else:
        raise UserError(f"There is no rescaling '{kind}': use ntk or yarn.")
    device = rotary.inv_freq.device
    decoder.rotary_emb = type(rotary)(config=own).to(device)
    try:
        yield
    finally:
        decoder.rotary_emb = rotary
