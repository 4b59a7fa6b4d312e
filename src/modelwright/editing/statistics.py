"""What the keys of an MLP look like on ordinary text: their uncentred covariance, by which edits spare what is known.

ROME (arXiv 2202.05262, section 3.1) and MEMIT (arXiv 2210.07229, equation 14) weigh a change of the down projection W
by C = E[k kᵀ], the second moment of its inputs k.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from modelwright import files
from modelwright.data.records import Records
from modelwright.editing.edit import base_fingerprint, unedited
from modelwright.editing.editor import check_layer
from modelwright.editing.hooks import Stop, seen_input
from modelwright.editing.subject import check_tokens
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.models.scoring import resolve_window
from modelwright.models.tokenizers import encode, leading_ids
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FORMAT = "modelwright key statistics 1"
_STRIP = 1024  # rows of a Gram matrix at once
_DOCUMENTS = 64  # read, sorted by length and run together; a file that is resumed goes on after such a group


class KeyStatistics:
    """The uncentred covariance of the inputs of some layers' down projections.

    Attributes:
        grams: Layer to the sum of k kᵀ over all tokens, (d_ff, d_ff), float32.
        count: Tokens seen.
        fingerprint: Of the model, without edits.
        documents: Documents read.
        source: Fingerprint of the files that were read, or None.
        complete: Whether all tokens that were asked for have been seen.
    """

    def __init__(
        self,
        grams: dict[int, torch.Tensor],
        count: int,
        fingerprint: str,
        *,
        documents: int = 0,
        source: str | None = None,
        complete: bool = True,
    ) -> None:
        self.grams = grams
        self.count = count
        self.fingerprint = fingerprint
        self.documents = documents
        self.source = source
        self.complete = complete
        self._factors: dict[tuple[int, float, torch.device], torch.Tensor] = {}

    @classmethod
    @torch.no_grad()
    def collect(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Records | Iterable[str] | str | Path,
        layers: Sequence[int],
        *,
        n_tokens: int = 1_000_000,
        window: int | None = None,
        batch_tokens: int = 4096,
        path: str | Path | None = None,
        save_seconds: float = 300,
        progress: Progress | None = None,
    ) -> Self:
        """Runs text through the model and adds up k kᵀ, in float32 without TF32.

        Only the layers up to the last one asked for are computed. A document longer than the window is read in pieces.

        Args:
            model: A causal language model in evaluation mode. Edits that are on it are looked past: the statistics are
                those of the model below them.
            tokenizer: Its tokenizer.
            texts: Records, texts, or a path of a file or folder (a string is a path).
            layers: Which layers.
            n_tokens: Tokens to see; fewer if the text ends before.
            window: Longest input in tokens; None takes the model's own, at most 2,048.
            batch_tokens: Tokens at once, padding included.
            path: File to keep the statistics in. If it is there, it is read; if it is unfinished, it is continued.
            save_seconds: How often an unfinished file is written.
            progress: Where to tell how far it is.

        Raises:
            UserError: A layer is out of range; the texts hold no tokens; the file is of another model or other text.
        """
        layers = sorted(set(layers))
        parts = roles(model)
        for layer in layers:
            check_layer(layer, len(parts.layers))
        if not layers or n_tokens < 1:
            raise UserError("Key statistics need at least one layer and one token.")
        if batch_tokens < 1:
            raise UserError(f"batch_tokens is {batch_tokens}: give at least 1.")
        if isinstance(texts, str | Path):
            texts = Records(texts)
        source = texts.fingerprint() if isinstance(texts, Records) else None
        downs = {layer: _down(parts, layer) for layer in layers}
        found = cls(
            {layer: torch.zeros(down.weight().shape[1], down.weight().shape[1]) for layer, down in downs.items()},
            0,
            base_fingerprint(model),
            source=source,
            complete=False,
        )
        if path is not None and Path(path).exists():
            found = cls.load(path)
            found._check_continues(path, base_fingerprint(model), layers, source)
            if found.complete and found.count >= n_tokens:
                return found
        progress = progress or Silent()
        progress.start("Key statistics", total=n_tokens)
        progress.advance(min(found.count, n_tokens))
        device = model.device
        grams = {layer: gram.to(device) for layer, gram in found.grams.items()}
        length, _ = resolve_window(model, window, None)
        stream = iter(texts.texts() if isinstance(texts, Records) else texts)
        for _ in itertools.islice(stream, found.documents):
            pass
        saved = time.monotonic()
        with unedited(model), _exact():
            while found.count < n_tokens and (group := list(itertools.islice(stream, _DOCUMENTS))):
                rows = list(_rows(tokenizer, group, length, n_tokens - found.count))
                check_tokens(model, rows)
                for batch in _batches(rows, batch_tokens):
                    _add(model, {layer: downs[layer].module for layer in layers}, grams, batch)
                    seen = sum(map(len, batch))
                    found.count += seen
                    progress.advance(seen)
                found.documents += len(group)
                if path is not None and time.monotonic() - saved > save_seconds:
                    found.grams = {layer: _whole(gram) for layer, gram in grams.items()}
                    found.save(path, force=True)
                    saved = time.monotonic()
        found.grams = {layer: _whole(gram) for layer, gram in grams.items()}
        found.complete = True
        if not found.count:
            raise UserError("The texts hold no tokens, so there are no statistics: give some text.")
        if not all(bool(gram.isfinite().all()) for gram in found.grams.values()):
            raise UserError("The model's activations are not finite on this text: load it in float32 or bfloat16.")
        if found.count < n_tokens:
            progress.message(f"The text ended after {found.count:,} of {n_tokens:,} tokens.")
        if path is not None:
            found.save(path, force=True)
        return found

    def covariance(self, layer: int) -> torch.Tensor:
        """Returns C = E[k kᵀ] of a layer: (d_ff, d_ff), float32, on the CPU.

        Raises:
            UserError: The layer has no statistics.
        """
        if layer not in self.grams:
            raise UserError(
                f"There are no key statistics of layer {layer} (layers: {', '.join(map(str, self.grams))}): "
                f"collect them with modelwright edit statistics."
            )
        return self.grams[layer] / self.count

    def solve(
        self, layer: int, rhs: torch.Tensor, *, ridge: float = 0.0, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """Returns (C + ridge · mean(diag C) · I)⁻¹ rhs, in float64 by a Cholesky factor, which is kept.

        Args:
            layer: Which layer.
            rhs: (d_ff, n).
            ridge: What is added to the diagonal, as a share of its mean.
            device: Where to solve; that of ``rhs`` by default.

        Returns:
            (d_ff, n), float64, on the device.

        Raises:
            UserError: The matrix is singular: more text or a ridge is needed.
        """
        device = torch.device(device or rhs.device)
        return torch.cholesky_solve(rhs.to(device, torch.float64), self._factor(layer, ridge, device))

    def _factor(self, layer: int, ridge: float, device: torch.device) -> torch.Tensor:
        if ridge < 0:
            raise UserError(f"The ridge is {ridge}: give 0 or more.")
        key = (layer, ridge, device)
        if key not in self._factors:
            matrix = self.covariance(layer).to(device, torch.float64)
            matrix.diagonal().add_(ridge * matrix.diagonal().mean())
            diagonal = matrix.diagonal().clone()
            factor, info = torch.linalg.cholesky_ex(matrix)
            # What a dimension has beyond the others, as a share of its own: at the rounding of the float32 sums it is
            # noise, even where the factorisation goes through.
            if int(info) or float((factor.diagonal() ** 2 / diagonal).min()) < 1e-7:
                raise UserError(
                    f"The key statistics of layer {layer} are singular ({self.count:,} tokens for {len(matrix):,} "
                    f"dimensions): collect more text, or give a ridge such as 0.01."
                )
            self._factors[key] = factor
        return self._factors[key]

    def check(self, model: PreTrainedModel, layers: Iterable[int]) -> None:
        """Refuses another model, or layers that have no statistics.

        Raises:
            UserError: One of these.
        """
        if (found := base_fingerprint(model)) != self.fingerprint:
            raise UserError(
                f"The key statistics are of another model (fingerprint {self.fingerprint}; this model, without edits, "
                f"has {found}): collect them with this model."
            )
        for layer in layers:
            if layer not in self.grams:
                self.covariance(layer)

    def save(self, path: str | Path, force: bool = False) -> None:
        """Writes a safetensors file that appears whole or not at all.

        Raises:
            UserError: It exists and ``force`` is off, or the disk is full.
        """
        from safetensors.torch import save_file

        metadata = {
            "format": _FORMAT,
            "about": json.dumps({
                "count": self.count,
                "fingerprint": self.fingerprint,
                "documents": self.documents,
                "source": self.source,
                "complete": self.complete,
            }),
        }  # fmt: skip
        with files.atomic_path(path, force) as partial:
            save_file({f"layer.{n}": gram.contiguous() for n, gram in self.grams.items()}, partial, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what :meth:`save` wrote.

        Raises:
            UserError: There is no such file, or it holds something else.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise UserError(f"{path} does not exist: collect key statistics with modelwright edit statistics.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise UserError(f"{path} holds no key statistics (format {metadata.get('format')!r}).")
                grams = {int(name.rsplit(".", 1)[1]): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads(metadata["about"])
            return cls(
                dict(sorted(grams.items())), about["count"], about["fingerprint"], documents=about["documents"],
                source=about["source"], complete=about["complete"],
            )  # fmt: skip
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise UserError(f"{path} is damaged or holds no key statistics ({error}): collect them again.") from error

    def _check_continues(self, path: str | Path, fingerprint: str, layers: Sequence[int], source: str | None) -> None:
        what = None
        if self.fingerprint != fingerprint:
            what = "another model"
        elif list(self.grams) != list(layers):
            what = f"the layers {', '.join(map(str, self.grams))}"
        elif self.source != source:
            what = "other text"
        if what:
            raise UserError(f"{path} holds key statistics of {what}: choose another file, or delete this one.")


def _down(parts: Any, layer: int) -> Any:
    down = parts.layers[layer].down
    if down is None:
        raise UserError(f"Layer {layer} of this '{parts.family}' model has no MLP, so there are no keys to edit.")
    return down


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Float32 products in float32: without TF32, whose 10 bits would make the covariance indefinite."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _rows(tokenizer: PreTrainedTokenizerBase, texts: list[str], window: int, budget: int) -> Iterator[list[int]]:
    leading = leading_ids(tokenizer)
    step = max(1, window - len(leading))
    for ids in encode(tokenizer, texts):
        for start in range(0, len(ids), step):
            row = [*leading, *ids[start : start + step]][:budget]
            if not row:
                return
            budget -= len(row)
            yield row


def _batches(rows: list[list[int]], batch_tokens: int) -> Iterator[list[list[int]]]:
    """Rows of like length together, so that little is padding."""
    batch: list[list[int]] = []
    for row in sorted(rows, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _strips(width: int) -> list[slice]:
    """Rows that are added to together. Left of its strip's first column a Gram matrix is left out: it is symmetric."""
    count = max(1, width // _STRIP)
    edges = [width * i // count for i in range(count + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


def _whole(gram: torch.Tensor) -> torch.Tensor:
    """Returns a Gram matrix on the CPU, with what was left out filled in."""
    gram = gram.cpu()
    for strip in _strips(len(gram)):
        gram[strip.stop :, strip] = gram[strip, strip.stop :].T
    return gram


def _add(model: PreTrainedModel, downs: dict[int, Any], grams: dict[int, torch.Tensor], rows: list[list[int]]) -> None:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    real = mask.bool().to(model.device)
    padded = not bool(mask.all())

    def add_to(gram: torch.Tensor) -> Any:
        def look(keys: torch.Tensor) -> None:
            keys = (keys[real] if padded else keys.flatten(0, 1)).float()
            for strip in _strips(len(gram)):
                gram[strip, strip.start :].addmm_(keys[:, strip].T, keys[:, strip.start :])

        return look

    last = max(downs)
    with contextlib.ExitStack() as stack:
        for layer, down in downs.items():
            stack.enter_context(seen_input(down, add_to(grams[layer]), stop=layer == last))
        stack.enter_context(contextlib.suppress(Stop))
        # Padding stands on the right, where no token of a causal model sees it.
        kwargs = {"attention_mask": mask.to(model.device)} if padded else {}
        model(input_ids=ids.to(model.device), use_cache=False, **kwargs)
