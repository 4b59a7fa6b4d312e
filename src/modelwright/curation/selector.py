"""What a data selector is: options, a fit on target examples, and one score per document."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np

from modelwright import catalog
from modelwright.errors import UserError, did_you_mean

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


def make_part(cls: Any, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Makes a part whose options are the fields of its dataclass.

    Args:
        cls: The dataclass.
        name: What the user calls it.
        options: Field to value; strings (from the command line) are converted to the field's type.

    Raises:
        UserError: No such option, or a value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    values: dict[str, Any] = {}
    for key, value in (options or {}).items():
        key = key.replace("-", "_")
        if key not in known:
            raise UserError(f"'{name}' has no option '{key}': {did_you_mean(key, known)}")
        values[key] = _convert(value, hints[key], f"option '{key}' of '{name}'")
    return cls(**values)


def _convert(value: Any, hint: Any, what: str) -> Any:
    """Converts a value to an option's type, or says which type is expected."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and (value is None or value in ("none", "null")):
            return None
        for argument in (a for a in arguments if a is not type(None)):
            try:
                return _convert(value, argument, what)
            except UserError as error:
                last = error
        raise last
    if origin is Literal:
        for argument in arguments:
            if value == argument or str(value) == str(argument):
                return argument
        raise UserError(f"The {what} cannot be {value!r}: {did_you_mean(str(value), map(str, arguments))}")
    if hint is bool:
        named = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() in named:
            return named[str(value).lower()]
        raise UserError(f"The {what} must be true or false, not {value!r}.")
    if hint in (int, float):
        try:
            number = float(value)
            if hint is float:
                return number
            if number.is_integer():
                # 1e6 means a million, but a large integer must not pass through a float.
                return int(number) if abs(number) < 2**53 else int(value)
        except (TypeError, ValueError):
            pass
        raise UserError(f"The {what} must be {'a whole number' if hint is int else 'a number'}, not {value!r}.")
    if origin in (list, tuple):
        items = value.split(",") if isinstance(value, str) else list(value)
        return origin(_convert(item, arguments[0], what) for item in items)
    if origin is dict and isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"The {what} must be a JSON object, not {value!r}.") from error
    return hint(value) if isinstance(hint, type) and not isinstance(value, hint) else value
