"""RoPE × ALiBi as an attention function of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import nn

from modelwright.attention.flex import compiled, usable
from modelwright.attention.implementation import AttentionConfig, register
from modelwright.attention.places import Places
from modelwright.attention.rope_alibi.bias import Distance, Slopes, harmonic_numbers, head_slopes, penalty
from modelwright.attention.rotary import check_rotary
from modelwright.attention.softmax import attend
from modelwright.errors import UserError
from modelwright.options import Arg

#: Numbers of the bias (heads times rows times keys) that are held at a time, where no gradient is wanted.
SCORES = 2**24
#: Names of the parameters on attention modules, (heads,) each.
LEARNED = ("rope_alibi_rotary_factor", "rope_alibi_bias_factor")


@dataclass(frozen=True, kw_only=True)
class RopeAlibiConfig(AttentionConfig):
    """RoPE and ALiBi in one score: lambda_r (R_i q)·(R_j k) / √d - lambda_a m_h b(i - j), arXiv 2410.18441.

    A reconstruction: the paper's abstract names "RoPE and ALiBi with a harmonic series" and we know no formula of the
    author's for it. Two readings satisfy those words, and the first is the default: the slopes of the heads are a
    harmonic series (A: ``distance="linear"``), or the penalty grows as one (B: ``distance="harmonic"``, about a
    logarithm).

    Attributes:
        distance: b(n): ``linear`` is n; ``harmonic`` is 1 + 1/2 + … + 1/n.
        slopes: m of query head h = 1, 2, …: ``harmonic`` is first_slope / h; ``geometric`` is ALiBi's 2^(-8h/heads).
        first_slope: The harmonic series' first slope.
        lambda_r: Factor of the rotary score, 0 to 1.
        lambda_a: Factor of the penalty, 0 to 1; at 0 the model is what it was.
        learnable: Both factors become parameters, one for each head, that start at the values given and are held
            between 0 and 1; for training.
    """

    method: ClassVar[str] = "rope-alibi"
    implementation: ClassVar[str] = "rope_alibi_harmonic"

    distance: Annotated[Distance, Arg("Penalty of a distance: linear (A), or harmonic numbers (B).")] = "linear"
    slopes: Annotated[Slopes, Arg("Slopes of the heads: harmonic, or ALiBi's geometric.")] = "harmonic"
    first_slope: Annotated[float, Arg("First slope of the harmonic series.")] = 0.25
    lambda_r: Annotated[float, Arg("Factor of the rotary score, 0 to 1.")] = 1.0
    lambda_a: Annotated[float, Arg("Factor of the penalty, 0 to 1.")] = 1.0
    learnable: Annotated[bool, Arg("Learn both factors for each head; for training.")] = False

    def __post_init__(self) -> None:
        """Raises :class:`UserError` for values out of range."""
        for name in ("lambda_r", "lambda_a"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a number from 0 to 1.")
        if not 0 < self.first_slope < float("inf"):
            raise UserError(f"first_slope is {self.first_slope}: give a number above 0.")

    def refuse(self, config: Any) -> str | None:
        """A model without rotary positions has no rotary score to be factored."""
        needs = self.lambda_r != 0 or self.learnable
        if needs and getattr(config, "alibi", False):
            return "it tells positions by ALiBi already, not by rotary ones"
        if needs and getattr(config, "rope_parameters", None) is None:
            return "its positions are not rotary"
        return None

    def check_model(self, model: Any) -> None:
        """See :meth:`refuse`."""
        super().check_model(model)
        if self.lambda_r != 0 or self.learnable:
            check_rotary(model)

    def apply(self, model: Any) -> Any:
        """See :meth:`AttentionConfig.apply`; factors are not learned inside a block that leaves no trace."""
        if self.learnable:
            raise UserError("Learnable factors are for training: use modelwright train --attention, or install().")
        return super().apply(model)

    def add_parameters(self, modules: list[tuple[nn.Module, int]]) -> None:
        """Adds the factors, (heads,) float32 each, or takes old ones away."""
        for module, heads in modules:
            device = next(module.parameters()).device
            for name, start in zip(LEARNED, (self.lambda_r, self.lambda_a)):
                factor = nn.Parameter(torch.full((heads,), float(start), device=device)) if self.learnable else None
                module.register_parameter(name, factor)

    def factors(self, module: Any, heads: int, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Returns lambda_r (heads,), or None where it is 1, and lambda_a m (heads,), both float32.

        Raises:
            UserError: The factors are learned, but the module has none.
        """
        slopes = head_slopes(self.slopes, heads, self.first_slope).to(device)
        if not self.learnable:
            rotary = None if self.lambda_r == 1 else torch.full((heads,), float(self.lambda_r), device=device)
            return rotary, self.lambda_a * slopes
        found = [getattr(module, name, None) for name in LEARNED]
        if any(factor is None for factor in found):
            raise UserError(
                "The factors of this model's attention were learned and are not there: load it with "
                "modelwright.models.loading.load_model."
            )
        rotary_factor, bias_factor = (_Unit.apply(factor.float()) for factor in found if factor is not None)
        return rotary_factor, bias_factor * slopes


class _Unit(torch.autograd.Function):
    """Holds numbers between 0 and 1; a gradient that would push one out further is stopped, one back in passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad.masked_fill(((x >= 1) & (grad < 0)) | ((x <= 0) & (grad > 0)), 0)


def rope_alibi_attention(
    settings: RopeAlibiConfig,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attends; see :data:`modelwright.attention.implementation.Attention` for the shapes.

    Distances are counted by place in the sequence, so padding, packing, chunks and caches are right. A caller who
    passes a mask of four dimensions decides on the order of tokens: then they are counted by ``position_ids``.
    """
    heads, rows, keys = query.shape[1], query.shape[2], key.shape[2]
    rotary, slopes = settings.factors(module, heads, query.device)
    if rotary is not None:
        query = query * rotary.to(query.dtype)[:, None, None]
    weights = bool(more.get("output_attentions"))
    if mask is None or Places.are(mask):
        places = Places.last(rows, keys, query.device) if mask is None else Places.read(mask, rows)
        if usable(query, value, dropout) and not weights:
            block_mask = causal_blocks(places, query.shape[0], mask)
            score = score_mod(places, query.shape[0], slopes, settings.distance, softcap)
            return compiled(query, key, value, score, block_mask, scaling), None

        def bias_of(start: int, stop: int) -> torch.Tensor:
            return _bias(places.distance(start, stop)[:, None], slopes, settings.distance)
    elif mask.dtype == torch.int32:
        distances = mask

        def bias_of(start: int, stop: int) -> torch.Tensor:
            return _bias(distances[:, :, start:stop], slopes, settings.distance)
    else:
        own = mask[..., :keys]
        by_position = _by_position(more.get("position_ids"), rows, keys, query.device)

        def bias_of(start: int, stop: int) -> torch.Tensor:
            part = own[:, :, start:stop]
            found = _bias(by_position[:, None, start:stop].clamp(min=0), slopes, settings.distance)
            lowest = torch.finfo(torch.float32).min
            return found.masked_fill(~part, lowest) if part.dtype == torch.bool else (found + part).clamp(min=lowest)

    differentiated = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    chunk = rows if weights or differentiated else max(1, SCORES // max(1, query.shape[0] * heads * keys))
    outs, kept = [], None
    for start in range(0, rows, chunk):
        stop = min(rows, start + chunk)
        out, kept = attend(
            query[:, :, start:stop], key, value, bias_of(start, stop),
            scaling=scaling, dropout=dropout, softcap=softcap, weights=weights,
        )  # fmt: skip
        outs.append(out)
    return (torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]), kept


def _bias(distance: torch.Tensor, slopes: torch.Tensor, kind: Distance) -> torch.Tensor:
    """Returns (batch or 1, heads, rows, keys) float32 of distances (batch or 1, 1, rows, keys), -1 where hidden."""
    found = -slopes[:, None, None] * penalty(distance, kind)
    return found.masked_fill(distance < 0, torch.finfo(torch.float32).min)


def _by_position(position_ids: Any, rows: int, keys: int, device: torch.device) -> torch.Tensor:
    """Returns (batch or 1, rows, keys) distances by position; keys in the cache run up to the first query's."""
    if not isinstance(position_ids, torch.Tensor) or position_ids.ndim != 2 or position_ids.shape[1] != rows:
        place = torch.arange(keys, device=device)[None]
        return place[:, keys - rows :, None] - place[:, None]
    cached = position_ids[:, :1] - torch.arange(keys - rows, 0, -1, device=device)
    return position_ids[:, :, None] - torch.cat((cached, position_ids), dim=1)[:, None]


def causal_blocks(places: Places, batch: int, mask: torch.Tensor | None) -> Any:
    """Returns flex_attention's block mask of causal places; made once for a forward pass."""
    from torch.nn.attention.flex_attention import create_block_mask

    known = getattr(mask, "_modelwright_blocks", None)
    if known is not None:
        return known
    several = places.query.shape[0] > 1
    query, key = places.query, places.key

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        row = b if several else b * 0
        return (key[row, k] >= 0) & (key[row, k] <= query[row, q])

    made = create_block_mask(
        mask_mod, batch if several else None, None, query.shape[1], key.shape[1], device=str(query.device)
    )
    if mask is not None:
        mask._modelwright_blocks = made  # type: ignore[attr-defined]
    return made


def score_mod(
    places: Places, batch: int, slopes: torch.Tensor, kind: Distance, softcap: float | None
) -> Callable[..., torch.Tensor]:
    """Returns flex_attention's change of a score: capped, less the penalty."""
    # Distances are differences, in which padding on the left cancels: the first row's places serve all.
    query, key = places.query, places.key
    several = query.shape[0] > 1
    table = None if kind == "linear" else harmonic_numbers(key.shape[1] + 1, key.device)

    def change(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        row = b if several else b * 0
        distance = (query[row, q] - key[row, k]).clamp(min=0)
        far = distance.to(torch.float32) if table is None else table[distance]
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score - slopes[h] * far

    return change


register(RopeAlibiConfig, rope_alibi_attention)
