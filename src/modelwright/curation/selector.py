"""What a data selector is: options, a fit on target examples, and one score per document."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np

from modelwright import catalog
from modelwright.errors import UserError
from modelwright.options import make_part

if TYPE_CHECKING:
    import datasets

    from modelwright.curation.select import SelectionReport


@runtime_checkable
class Selector(Protocol):
    """A method that ranks documents of a pool. Implementations are dataclasses that inherit :class:`SelectorMixin`.

    The fields are the method's options, ``Annotated[T, Arg("help.")]`` with defaults: the command line, recipes and
    documentation are made from them. Wrong options raise :class:`~modelwright.errors.UserError` in ``__post_init__``,
    so that they are refused before any work.

    Attributes:
        needs_target: ``fit`` needs target examples. Without them, such a selector is refused.
        needs_pool: ``fit`` needs the pool too (its statistics), and is given it as a re-iterable of texts.
        whole_pool: A document's score depends on the others in the pool (duplicates, clusters), so that
            :meth:`score_pool` is called once instead of :meth:`score` per batch.
        decides: The method itself says what is dropped (by NaN), so that no limit such as ``top`` is needed.
        score_name: Column for the score in a ``datasets.Dataset``; files always call it ``score``.
    """

    needs_target: ClassVar[bool]
    needs_pool: ClassVar[bool]
    whole_pool: ClassVar[bool]
    decides: ClassVar[bool]
    score_name: ClassVar[str]

    def fit(self, target: Sequence[str], pool: Iterable[str] | None = None) -> Self:
        """Learns what to look for, and returns itself.

        Args:
            target: Texts of the kind that is wanted.
            pool: Texts of the pool, re-iterable and possibly larger than memory; only if ``needs_pool``. Without it,
                such a method keeps the target in ``waiting_target``, and :meth:`SelectorMixin.select` fits it again
                with the texts of its dataset.

        Raises:
            UserError: The target is empty or unusable.
        """

    def score(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
        """Scores documents; needs :meth:`fit`.

        The score of a text must not depend on the other texts of the call, nor on earlier calls, nor on ``workers``:
        pools are scored in batches, in several tasks, and resumed. Randomness comes from the seed and the text.

        Args:
            texts: Documents.
            workers: Processes (or threads) that may be used.

        Returns:
            float64, shape ``(len(texts),)``, higher = better; NaN = never to be selected.
        """

    def score_pool(self, pool: Iterable[str], workers: int = 1) -> np.ndarray:
        """Scores all documents of the pool at once; used only if ``whole_pool``.

        Args:
            pool: Texts, re-iterable.
            workers: Processes (or threads) that may be used.

        Returns:
            float64, one per document, higher = better; NaN = never to be selected.
        """

    def details(self) -> dict[str, Any]:
        """Returns what a reader needs beside the options to get the same scores, such as a compressor's version."""


class SelectorMixin:
    """What every selector shares: defaults of the protocol, and selecting from a ``datasets.Dataset``.

    Example:
        ``picked = ZipFitSelector(level=1).fit(target["text"]).select(source, k=1000)``
    """

    needs_target: ClassVar[bool] = True
    needs_pool: ClassVar[bool] = False
    whole_pool: ClassVar[bool] = False
    decides: ClassVar[bool] = False
    score_name: ClassVar[str] = "score"

    # Any, because the hints of the options are evaluated, and the report's class is imported for typing only.
    _report: Any = None
    #: Targets of a fit that still waits for its pool.
    waiting_target: Sequence[str] | None = None

    def fit(self, target: Sequence[str], pool: Iterable[str] | None = None) -> Self:
        """Nothing to learn, unless a method says otherwise."""
        return self

    def score(self, texts: Sequence[str], workers: int = 1) -> np.ndarray:
        """See :meth:`Selector.score`."""
        raise NotImplementedError(f"{type(self).__name__} scores a whole pool only: call score_pool")

    def score_pool(self, pool: Iterable[str], workers: int = 1) -> np.ndarray:
        """See :meth:`Selector.score_pool`. By default the scores of all texts, in memory."""
        return self.score(list(pool), workers)

    def details(self) -> dict[str, Any]:
        """See :meth:`Selector.details`."""
        return {}

    @property
    def report(self) -> SelectionReport:
        """What the last :meth:`select` found: score quantiles, length correlation, counts.

        Raises:
            UserError: Nothing was selected yet.
        """
        if self._report is None:
            raise UserError("There is no report yet: call select first.")
        return self._report

    def select(
        self,
        dataset: datasets.Dataset,
        *,
        k: int | None = None,
        threshold: float | None = None,
        token_budget: int | None = None,
        byte_budget: int | None = None,
        tokenizer: Any = None,
        dedup: bool = False,
        length_buckets: int = 1,
        text_column: str = "text",
        workers: int = 1,
    ) -> datasets.Dataset:
        """Scores a dataset and keeps the best rows; call :meth:`fit` before, except that a pool is fitted if needed.

        See :func:`modelwright.curation.select.select` for the arguments.

        Returns:
            The chosen rows in rank order, with the columns :attr:`score_name` (float64) and ``rank`` (int64, 1 = best).

        Raises:
            UserError: A bad argument, or a column that is missing or does not hold text.
        """
        from modelwright.curation.select import select_with

        chosen, self._report = select_with(
            typing.cast(Selector, self),
            dataset,
            k=k,
            threshold=threshold,
            token_budget=token_budget,
            byte_budget=byte_budget,
            tokenizer=tokenizer,
            dedup=dedup,
            length_buckets=length_buckets,
            text_column=text_column,
            workers=workers,
        )
        return chosen


def make_selector(name: str, options: Mapping[str, Any] | None = None) -> Selector:
    """Makes a selector of the catalog from its options.

    Args:
        name: Such as ``zip-fit``.
        options: Field to value; strings (from the command line) are converted to the field's type.

    Raises:
        UserError: No such selector or option, or a value of the wrong type.
    """
    return make_part(catalog.load("selectors", name), name, options)
