"""PrFlashAttention as an attention function of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from modelwright.attention.flex import usable
from modelwright.attention.implementation import AttentionConfig, register
from modelwright.attention.places import Places
from modelwright.attention.prflash.blocks import block_attention
from modelwright.attention.prflash.law import Law, Mode, Participation, draw_blocks, fixed_blocks
from modelwright.attention.softmax import attend
from modelwright.errors import UserError
from modelwright.options import Arg

#: The compiled kernel's blocks; a size that is a multiple of it is served by flex_attention on a GPU.
KERNEL_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class ProbFlashConfig(AttentionConfig):
    """Attention in blocks, which take part with a probability that falls with their distance; arXiv 2410.18441.

    A reconstruction: the paper describes in words that blocks are picked by a probability of their distance and that
    the triangle is kept by re-shaping; the laws, the modes and the correction are ours. Queries and keys have one block
    size.

    In training mode each layer draws anew in each forward pass, from a generator that is seeded by torch's own (as
    dropout is), so a seed repeats a run, a resumed run goes on as it would have, and a gradient checkpoint's second
    forward pass has the draw of the first. In evaluation mode nothing is drawn.

    Attributes:
        law: See :class:`~modelwright.attention.prflash.law.Participation`, also for the four that follow.
        rate: For the law ``exponential``.
        reach: For the law ``linear``.
        share: For the law ``uniform``.
        table: For the law ``table``.
        mode: ``shared``: one draw for each distance of blocks. ``independent``: one for each block.
        per_head: Whether each query head draws for itself.
        block_size: Tokens of a block; a multiple of 128 for the compiled kernel on a GPU.
        correction: Adds -ln pi to the scores of kept blocks (Horvitz-Thompson): numerator and denominator of the
            softmax are then unbiased, and their ratio consistent, at a higher variance.
        keep: Distances of blocks that evaluation mode keeps, 0 among them; all if None.
    """

    method: ClassVar[str] = "prflash"
    implementation: ClassVar[str] = "prob_flash"

    law: Annotated[Law, Arg("Probability by distance: harmonic, exponential, linear, uniform or table.")] = "harmonic"
    rate: Annotated[float, Arg("For exponential: the decay per block.")] = 0.5
    reach: Annotated[float, Arg("For linear: the first distance that never takes part.")] = 8.0
    share: Annotated[float, Arg("For uniform: the probability off the diagonal.")] = 0.5
    table: Annotated[tuple[float, ...], Arg("For table: probabilities by distance, the first 1.")] = ()
    mode: Annotated[Mode, Arg("shared: a draw for each distance; independent: for each block.")] = "shared"
    per_head: Annotated[bool, Arg("Draw for each query head by itself.")] = False
    block_size: Annotated[int, Arg("Tokens of a block.")] = 128
    correction: Annotated[bool, Arg("Horvitz-Thompson correction of the scores in training.")] = False
    keep: Annotated[tuple[int, ...] | None, Arg("Distances kept in evaluation, such as 0,1,4; all by default.")] = None

    def __post_init__(self) -> None:
        """Raises :class:`UserError` for values that make no sense."""
        self.participation.check()
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise UserError(f"block_size is {self.block_size!r}: give a number of tokens, at least 1.")
        if self.keep is not None and (0 not in self.keep or min(self.keep) < 0):
            raise UserError(
                f"keep is {list(self.keep)}: give distances of at least 0, and 0, the diagonal, among them."
            )

    @property
    def participation(self) -> Participation:
        """The law."""
        return Participation(law=self.law, rate=self.rate, reach=self.reach, share=self.share, table=self.table)

    def refuse(self, config: Any) -> str | None:
        """A sliding window has its own choice of keys."""
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        slides = (
            any(kind != "full_attention" for kind in kinds)
            if kinds
            else isinstance(window, int) and getattr(config, "use_sliding_window", True)
        )
        return "some of its layers have a sliding window, or no full attention" if slides else None

    def kept(self, rows: torch.Tensor, columns: int, heads: int, training: bool, seed: int = 0) -> torch.Tensor | None:
        """Returns which blocks a call keeps, (heads or 1, rows, columns) bool; None for all.

        Args:
            rows: (rows,) numbers of the block rows.
            columns: Block columns.
            heads: Query heads.
            training: Whether to draw.
            seed: Of the draw.
        """
        if not training:
            return None if self.keep is None else fixed_blocks(self.keep, rows, columns)
        generator = torch.Generator().manual_seed(seed)
        pi = self.participation.probabilities(columns)
        return draw_blocks(pi, rows, columns, self.mode, generator, heads if self.per_head else 1)

    def bias(self, columns: int) -> torch.Tensor:
        """Returns (columns,) float32: -ln pi by distance, 0 where no block is ever kept."""
        return -self.participation.probabilities(columns).log().nan_to_num(neginf=0.0).float()


def prob_flash_attention(
    settings: ProbFlashConfig,
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
) -> tuple[torch.Tensor, None]:
    """Attends; see :data:`modelwright.attention.implementation.Attention` for the shapes.

    Blocks are counted from a sequence's first real token, so padding on the left changes nothing.

    Raises:
        UserError: A mask of four dimensions, packed sequences, or weights are asked for.
    """
    if mask is not None and not Places.are(mask):
        raise UserError(
            "PrFlash counts blocks along one sequence: it takes no mask of four dimensions, no packed sequences, and "
            "no model that torch.compile compiles as a whole (where the two cannot be told apart: leave --compile out)."
        )
    if more.get("output_attentions"):
        raise UserError("PrFlash never has all attention weights: leave output_attentions out.")
    rows, keys = query.shape[2], key.shape[2]
    places = Places.last(rows, keys, query.device) if mask is None else Places.read(mask, rows)
    training = bool(module.training)
    seed = int(torch.randint(2**62, ())) if training else 0
    dense = not training and settings.keep is None
    if places.plain:
        first = int(places.query[0, 0])
        if dense and first == 0 and rows == keys and softcap is None:
            found = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=True, scale=scaling,
                enable_gqa=key.shape[1] < query.shape[1],
            )  # fmt: skip
            return found, None
    elif dense:
        first = 0
    else:
        return _by_sequence(settings, query, key, value, places, training, seed, scaling, dropout, softcap), None
    if dense:
        distance = places.distance(0, rows)[:, None]
        bias = torch.zeros(distance.shape, device=query.device).masked_fill_(
            distance < 0, torch.finfo(torch.float32).min
        )
        return attend(query, key, value, bias, scaling=scaling, dropout=dropout, softcap=softcap)[0], None
    return _attend(settings, query, key, value, first, None, training, seed, scaling, dropout, softcap), None


def _by_sequence(
    settings: ProbFlashConfig,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: Places,
    training: bool,
    seed: int,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attends for a padded batch: sequence by sequence without the padding on its left, all with one draw."""
    outs = []
    for b in range(query.shape[0]):
        at, there = (t[b if t.shape[0] > 1 else 0] for t in (places.query, places.key))
        skipped = int((at < 0).sum())
        real = there >= 0
        left = int(real.to(torch.int8).argmax())
        found = query.new_zeros((1, query.shape[1], query.shape[2], value.shape[-1]))
        if skipped < query.shape[2]:
            used = real[left:][None]
            part = _attend(
                settings, query[b : b + 1, :, skipped:], key[b : b + 1, :, left:], value[b : b + 1, :, left:],
                int(at[skipped]), None if bool(used.all()) else used, training, seed, scaling, dropout, softcap,
            )  # fmt: skip
            found = torch.cat((found[:, :, :skipped], part), dim=2)
        outs.append(found)
    return torch.cat(outs)


def _attend(
    settings: ProbFlashConfig,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    first: int,
    real: torch.Tensor | None,
    training: bool,
    seed: int,
    scaling: float,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attends with queries from the place ``first``; ``real`` (batch, keys) is None where no key is padding."""
    size, rows = settings.block_size, query.shape[2]
    last = first + rows - 1
    key, value = key[:, :, : last + 1], value[:, :, : last + 1]  # a static cache holds places that are not yet written
    columns = last // size + 1
    numbers = torch.arange(first // size, columns)
    kept = settings.kept(numbers, columns, query.shape[1], training, seed)
    assert kept is not None
    correction = settings.bias(columns) if settings.correction and training else None
    if usable(query, value, dropout) and first == 0 and real is None and size % KERNEL_BLOCK == 0:
        from modelwright.attention.prflash.kernel import flex_blocks

        return flex_blocks(query, key, value, kept, size, scaling=scaling, correction=correction, softcap=softcap)
    return block_attention(
        query, key, value, kept, size, scaling=scaling, first=first, correction=correction,
        real=None if real is None else real[:, : last + 1], dropout=dropout, softcap=softcap,
    )  # fmt: skip


register(ProbFlashConfig, prob_flash_attention)
