"""JEST's joint sampler with running sums: the same draws as from the B x B matrix of scores, which is never made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from modelwright.curation.jest.scores import Draw, accumulated, check_temperature, chunk_sizes, draw_chunk
from modelwright.errors import UserError, did_you_mean
from modelwright.training.contrastive.encoded import Encoded

Criterion = Literal["learnability", "hard", "easy_reference", "uniform"]
Form = Literal["sigmoid", "softmax"]

#: How far from 1 the length of an embedding may be: rounding to bfloat16 moves it by up to 0.4%.
_NORM_TOLERANCE = 0.01


@dataclass(kw_only=True)
class JointSampler:
    """Chooses the jointly most learnable batch of a super-batch (paper, Section 3 and Algorithm 1).

    Memory is O(B * d) for the embeddings plus tiles of ``block_size`` x ``block_size``; time O(B * b * d), all rounds
    together, since each pair of a candidate and a chosen row is looked at once.

    Attributes:
        n_chunks: Rounds; 1 is independent selection by the pairs' own scores.
        filter_ratio: Share of the super-batch that is left out, in [0, 1).
        criterion: ``learnability``: the learner's loss minus the reference's; ``hard``: the learner's;
            ``easy_reference``: minus the reference's; ``uniform``: at random.
        form: ``sigmoid``, where the loss is a sum over pairs, or ``softmax``
            (:func:`~modelwright.curation.jest.scores.softmax_scores`; a reconstruction, experimental).
        normalize: Divide each logit by its number of terms; the sigmoid form only.
        temperature: What divides the logits; 0 takes the largest.
        block_size: Side of the tiles.
        strict: Refuse a batch that does not divide into equal rounds.

    Raises:
        UserError: An option out of range.
    """

    n_chunks: int = 16
    filter_ratio: float = 0.8
    criterion: Criterion = "learnability"
    form: Form = "sigmoid"
    normalize: bool = False
    temperature: float = 1.0
    block_size: int = 2048
    strict: bool = False

    def __post_init__(self) -> None:
        for name, known in (("criterion", get_args(Criterion)), ("form", get_args(Form))):
            if getattr(self, name) not in known:
                raise UserError(
                    f"There is no {name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), known)}"
                )
        if not 0 <= self.filter_ratio < 1:
            raise UserError(f"filter_ratio must be at least 0 and below 1, not {self.filter_ratio}.")
        for name in ("n_chunks", "block_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")
        check_temperature(self.temperature)
        if self.normalize and self.form == "softmax":
            raise UserError("normalize is for the sigmoid form: the softmax form's scores are no sums.")

    @property
    def needs_learner(self) -> bool:
        """Whether the learner's embeddings are looked at."""
        return self.criterion in ("learnability", "hard")

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's embeddings are looked at."""
        return self.criterion in ("learnability", "easy_reference")

    def super_batch_size(self, batch_size: int) -> int:
        """Returns B for a batch of b: ``b / (1 - filter_ratio)``, rounded."""
        return max(batch_size, round(batch_size / (1 - self.filter_ratio)))

    def batch_size(self, super_batch_size: int) -> int:
        """Returns b for a super-batch of B: ``B * (1 - filter_ratio)``, rounded, at least 1."""
        return max(1, round(super_batch_size * (1 - self.filter_ratio)))

    def select(
        self,
        learner: Encoded | None,
        reference: Encoded | None,
        size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Chooses a batch. Each model is scored with its own scale and bias.

        Args:
            learner: Its embeddings of the super-batch, B rows of length 1; None if the criterion ignores it.
            reference: The reference's, B rows (their width may differ); None if the criterion ignores it.
            size: Size b of the batch; by default from ``filter_ratio``.
            generator: On the CPU; None takes torch's.

        Returns:
            (b,) int64, in the order of the draw.

        Raises:
            UserError: Embeddings that are missing, of unequal number, or not of length 1; a score that is not finite;
                a batch larger than the super-batch.
        """
        return self.draw(learner, reference, size, generator).indices

    @torch.no_grad()
    def draw(
        self,
        learner: Encoded | None,
        reference: Encoded | None,
        size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Draw:
        """As :meth:`select`, and returns rounds and scores too."""
        given = learner if learner is not None else reference
        if given is None:
            raise UserError("There is nothing to choose from: give the embeddings of the learner or of the reference.")
        count, device = len(given.queries), given.queries.device
        size = self.batch_size(count) if size is None else size
        if size > count:
            raise UserError(f"{size} pairs cannot be chosen from a super-batch of {count}: lower the batch size.")
        with torch.autocast(device.type, enabled=False):  # scores in half precision would be other scores
            sides = list(self._sides(learner, reference))
            return self._rounds(sides, size, count, device, generator)

    def _rounds(
        self,
        sides: list[_SigmoidSums | _SoftmaxSums],
        size: int,
        count: int,
        device: torch.device,
        generator: torch.Generator | None,
    ) -> Draw:
        taken = torch.zeros(count, dtype=torch.bool, device=device)
        chosen: list[Tensor] = []
        chunks: list[Tensor] = []
        scores: list[Tensor] = []
        done = 0
        sizes = chunk_sizes(size, self.n_chunks, self.strict)
        for number, wanted in enumerate(sizes):
            logits = sum((side.scores() for side in sides), torch.zeros((), device=device)).expand(count)
            if self.normalize:
                logits = logits / (1 + 2 * done)
            new = draw_chunk(logits, taken, wanted, generator, self.temperature)
            taken[new] = True
            done += wanted
            chosen.append(new)
            chunks.append(torch.full_like(new, number))
            scores.append(logits[new])
            if number + 1 < len(sizes):
                for side in sides:
                    side.add(new)
        return Draw(torch.cat(chosen), torch.cat(chunks), torch.cat(scores))

    def _sides(self, learner: Encoded | None, reference: Encoded | None) -> Iterator[_SigmoidSums | _SoftmaxSums]:
        """The two models' running sums, with their signs in the score."""
        wanted = (("learner", learner, self.needs_learner, 1.0), ("reference", reference, self.needs_reference, -1.0))
        given = [encoded for _, encoded, _, _ in wanted if encoded is not None]
        if len(given) == 2 and len(given[0].queries) != len(given[1].queries):
            raise UserError(
                f"The learner has embeddings of {len(given[0].queries)} pairs and the reference of "
                f"{len(given[1].queries)}: both must be of the same super-batch."
            )
        for name, encoded, needed, sign in wanted:
            if not needed:
                continue
            if encoded is None:
                raise UserError(f"The criterion '{self.criterion}' needs the {name}'s embeddings.")
            check_encoded(encoded, name, self.form)
            make = _SigmoidSums if self.form == "sigmoid" else _SoftmaxSums
            yield make(encoded, sign, self.block_size)


def check_encoded(encoded: Encoded, name: str, form: Form = "sigmoid") -> None:
    """Checks the embeddings of a super-batch.

    Args:
        encoded: Queries and keys (B, d).
        name: Whose they are, for the message.
        form: The sigmoid form needs a bias.

    Raises:
        UserError: Unequal shapes, a row that is not of length 1, a scale or bias that is not finite, or no bias.
    """
    if encoded.queries.shape != encoded.keys.shape or encoded.queries.ndim != 2 or len(encoded.queries) == 0:
        raise UserError(
            f"The {name} has query embeddings of shape {tuple(encoded.queries.shape)} and key embeddings of shape "
            f"{tuple(encoded.keys.shape)}: one row of each is needed for every pair."
        )
    if form == "sigmoid" and encoded.bias is None:
        raise UserError(
            f"The {name} has no bias, as if trained with the softmax loss: choose the form 'softmax', or give a bias."
        )
    for quantity, value in (("scale", encoded.scale), ("bias", encoded.bias)):
        if value is not None and not bool(value.isfinite().all()):
            raise UserError(f"The {name}'s {quantity} is {float(value)}: {_diverged(name)}.")
    for side, rows in (("query", encoded.queries), ("key", encoded.keys)):
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=accumulated(rows))
        wrong = ~((lengths - 1).abs() <= _NORM_TOLERANCE)  # so written that NaN is wrong
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            what = _diverged(name) if not bool(lengths[row].isfinite()) else "normalise the embeddings"
            raise UserError(
                f"The {name}'s {side} embedding of row {row} has length {float(lengths[row]):.4g}, not 1: {what}."
            )


def _diverged(name: str) -> str:
    if name == "learner":
        return "it has diverged; lower the learning rate"
    return "it diverged when it was trained, or its weights are damaged; take another"


class _Sums:
    """One model's part of every candidate's score, kept up to date as pairs are chosen."""

    def __init__(self, encoded: Encoded, sign: float, block_size: int) -> None:
        dtype = accumulated(encoded.queries)
        self.queries, self.keys = encoded.queries.to(dtype), encoded.keys.to(dtype)
        self.scale = encoded.scale.to(dtype).reshape(1)
        # The softmax form has no use for a bias, which moves all logits alike.
        self.bias = torch.zeros_like(self.scale) if encoded.bias is None else encoded.bias.to(dtype).reshape(1)
        self.sign, self.block = sign, block_size
        # Sums of thousands of small terms: in float64, although each tile is not.
        self.own = ((self.queries * self.keys).sum(1) * self.scale + self.bias).double()

    def _tiles(self, new: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """Yields logits of rows of the super-batch with new pairs: 0 for queries with keys, then 1 for the reverse."""
        for direction, (mine, theirs) in enumerate(((self.queries, self.keys), (self.keys, self.queries))):
            for part in new.split(self.block):
                others = self.scale * theirs[part]
                for start in range(0, len(mine), self.block):
                    rows = slice(start, start + self.block)
                    yield direction, rows, torch.addmm(self.bias, mine[rows], others.T)


class _SigmoidSums(_Sums):
    """S_ii plus the sum of S_ij + S_ji over the chosen j."""

    def __init__(self, encoded: Encoded, sign: float, block_size: int) -> None:
        super().__init__(encoded, sign, block_size)
        self.total = self.sign * softplus(-self.own)

    def scores(self) -> Tensor:
        """Returns (B,) float64; what it says of chosen pairs means nothing."""
        return self.total

    def add(self, new: Tensor) -> None:
        """Counts newly chosen pairs. Among themselves, diagonal included, all are taken for negatives."""
        for _, rows, logits in self._tiles(new):
            self.total[rows] += self.sign * softplus(logits).sum(1)


class _SoftmaxSums(_Sums):
    """The softmax loss of each pair in a batch of the chosen ones and itself, by running log-sums."""

    def __init__(self, encoded: Encoded, sign: float, block_size: int) -> None:
        super().__init__(encoded, sign, block_size)
        self.log_sums = torch.full((2, len(self.own)), -torch.inf, dtype=self.own.dtype, device=self.own.device)
        self.empty = True

    def scores(self) -> Tensor:
        """Returns (B,) float64; what it says of chosen pairs means nothing."""
        if self.empty:
            return -self.sign * self.own
        return self.sign * (torch.logaddexp(self.log_sums, self.own) - self.own).mean(0)

    def add(self, new: Tensor) -> None:
        """Counts newly chosen pairs."""
        self.empty = False
        for direction, rows, logits in self._tiles(new):
            line = self.log_sums[direction, rows]
            line.copy_(torch.logaddexp(line, logits.logsumexp(1).double()))
