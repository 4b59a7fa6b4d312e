"""What a layer should give at a fact's token, so that the model says the new answer: ROME's v*, MEMIT's z.

A vector δ is added to the output of one or several modules at the fact's token, and learnt by gradient descent: ROME
(arXiv 2202.05262, equation 4), MEMIT (arXiv 2210.07229, equation 16), PMET (arXiv 2308.08742). The requests do not see
each other, so all of them are optimised in one batch: the result is that of one by one, up to rounding.

Nothing before the fact's token depends on δ, and no layer below the module does. So prompts are laid side by side with
their facts in one column; keys and values of the columns before it are computed once, and so is what enters the block;
a step computes only the columns from the fact on, from that block upwards, and logits only where they are asked for.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelwright.editing.hooks import changed_output, first, seen_output, with_first
from modelwright.editing.requests import EditRequest
from modelwright.editing.subject import FactToken, check_tokens, encode_pair, locate
from modelwright.errors import DivergedError, UserError
from modelwright.models.roles import Roles, roles
from modelwright.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Families whose upper layers need nothing of the lower ones but the hidden states: tested to be the same either way.
_RESUMABLE = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox"})


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """Constants of the optimisation; the defaults are those of ROME on Llama-2-7B in HalluEditBench.

    Attributes:
        steps: Steps of Adam at most. (The published code takes one less than it is told: its last pass only looks.)
        lr: Its learning rate.
        stop_loss: A request is done, without a further step, when its loss is below this.
        nll_factor: Weight of the targets' negative log-likelihood (PMET names it; 1 everywhere).
        kl_factor: Weight of KL(p₀ ‖ p_δ) at the fact's token of the prompt ``{subject} is a``. (The published code
            computes the other direction; this is the equation that we follow.)
        decay: Weight of Σ ‖δ‖ / ‖m₀‖², m₀ being the output without δ.
        clamp: After each step ‖δ‖ is at most this times ‖m₀‖.
        settled_nll_factor: By what the likelihood's weight is multiplied at a step after which all target tokens were
            the most probable ones (PMET); 1 leaves it.
        settled_kl: A request is done when its target tokens are the most probable ones and the KL term is at most this
            (PMET).
    """

    steps: int = 25
    lr: float = 0.5
    stop_loss: float = 0.05
    nll_factor: float = 1.0
    kl_factor: float = 0.0625
    decay: float = 1e-3
    clamp: float = 4.0
    settled_nll_factor: float = 1.0
    settled_kl: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "clamp", "nll_factor"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: give a number above 0.")
        for name in ("stop_loss", "kl_factor", "decay"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}: give 0 or more.")


@dataclass(frozen=True)
class Targets:
    """Result of :func:`optimise_targets`.

    Attributes:
        initial: For each module (requests, width): its output m₀ at the fact's token of the prompt alone, float32.
        deltas: For each module (requests, width): δ, float32 (float64 for a model in float64).
        losses: For each request its loss at every step, and at last the one that it was left with.
    """

    initial: tuple[torch.Tensor, ...]
    deltas: tuple[torch.Tensor, ...]
    losses: list[list[float]]

    def values(self, module: int = 0) -> torch.Tensor:
        """Returns m₀ + δ of a module: (requests, width)."""
        return self.initial[module] + self.deltas[module]


@dataclass(frozen=True)
class _Row:
    """One prompt in tokens: the fact's place, and what is asked of the logits there."""

    request: int
    ids: list[int]
    fact: int
    asked: list[int]  # positions whose logits are needed
    labels: list[int] = field(default_factory=list)  # the target's tokens; none for the KL prompt


def _rows_of(
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    request: EditRequest,
    contexts: Sequence[str],
    fact_token: FactToken,
    kl_prompt: str | None,
) -> list[_Row]:
    rows = []
    for context in contexts:
        text = context + request.text
        head, tail = encode_pair(tokenizer, text, request.target)
        fact = locate(tokenizer, text, request.subject, fact_token).position
        rows.append(_Row(number, head + tail[:-1], fact, [len(head) - 1 + i for i in range(len(tail))], tail))
    if kl_prompt is not None:
        found = locate(tokenizer, kl_prompt.replace("{}", request.subject), request.subject, fact_token)
        rows.append(_Row(number, found.ids[: found.position + 1], found.position, [found.position]))
    return rows


def optimise_targets(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    modules: Sequence[nn.Module],
    layer: int,
    options: Optimisation,
    *,
    contexts: Sequence[str] = ("",),
    fact_token: FactToken = "subject_last",
    kl_prompt: str = "{} is a",
    batch_size: int = 16,
    resume: bool | None = None,
    progress: Progress | None = None,
) -> Targets:
    """Learns δ for every request.

    Args:
        model: A causal language model in evaluation mode; its weights and their gradients are left alone.
        tokenizer: Its tokenizer.
        requests: What the model should say.
        modules: Modules of the layer to whose output δ is added, each with a δ of its own.
        layer: Number of the layer that they are in.
        options: Constants.
        contexts: Texts to put before each prompt; the first one must be empty.
        fact_token: Where δ is added.
        kl_prompt: What the KL term looks at.
        batch_size: Requests at once.
        resume: Whether to start steps in the middle of the model; by default, where the family is known to allow it.
        progress: Told of each request that is done.

    Raises:
        UserError: A subject is not found, the layer is the last and the fact's token is not the prompt's last, or a
            loss is not finite.
    """
    parts = roles(model)
    if resume is None:
        resume = parts.family in _RESUMABLE
    wanted = kl_prompt if options.kl_factor > 0 else None
    rows = [_rows_of(tokenizer, i, r, contexts, fact_token, wanted) for i, r in enumerate(requests)]
    check_tokens(model, [row.ids + row.labels[-1:] for own in rows for row in own])
    if layer == len(parts.layers) - 1:
        for request, own in zip(requests, rows):
            if any(row.labels and row.asked[0] > row.fact for row in own):
                raise UserError(
                    f"No layer above {layer} reads what it gives at the subject of {request.text!r}, so the answer "
                    f"cannot change: choose a lower layer, or fact_token=last."
                )
    # Requests of like length share a batch, which spares padding.
    order = sorted(range(len(requests)), key=lambda i: max(len(r.ids) - r.fact for r in rows[i]))
    initial: list[Any] = [None] * len(requests)
    deltas: list[Any] = [None] * len(requests)
    losses: list[list[float]] = [[] for _ in requests]
    with _frozen(model):
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            group = [replace(row, request=n) for n, i in enumerate(picked) for row in rows[i]]
            result = _Batch(model, parts, group, modules, layer, resume).optimise(options)
            for n, i in enumerate(picked):
                initial[i] = [m[n] for m in result.initial]
                deltas[i] = [d[n] for d in result.deltas]
                losses[i] = result.losses[n]
                if not torch.isfinite(torch.tensor(losses[i])).all():
                    raise DivergedError(
                        f"The loss of the request {requests[i].text!r} is not finite: the model overflows in this "
                        f"dtype (load it in float32), or the learning rate is too large."
                    )
            if progress is not None:
                progress.advance(len(picked))
    return Targets(
        tuple(torch.stack([m[s] for m in initial]) for s in range(len(modules))),
        tuple(torch.stack([d[s] for d in deltas]) for s in range(len(modules))),
        losses,
    )


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of weights, and no dropout, inside the block."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    for p in wanted:
        p.requires_grad_(False)
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)
        for m in training:
            m.training = True


@dataclass
class _Tensors:
    """Rows as tensors, the facts in one column; every tensor's first dimension is the row."""

    ids: torch.Tensor  # (rows, length)
    mask: torch.Tensor  # (rows, length)
    positions: torch.Tensor  # (rows, length)
    request: torch.Tensor  # (rows,)
    asked: torch.Tensor  # (rows, asked): columns
    labels: torch.Tensor  # (rows, asked): tokens; -1 where none
    entering: torch.Tensor | None = None  # (rows, columns, width): what enters the block
    reference: torch.Tensor | None = None  # (KL rows, vocabulary): log-probabilities without δ

    def select(self, rows: torch.Tensor) -> _Tensors:
        names = ("ids", "mask", "positions", "request", "asked", "labels", "entering")
        chosen = {n: None if (t := getattr(self, n)) is None else t[rows] for n in names}
        reference = None if self.reference is None else self.reference[rows[self.kl]]
        return _Tensors(**chosen, reference=reference)  # type: ignore[arg-type]

    @property
    def kl(self) -> torch.Tensor:
        """Which rows are KL prompts."""
        return (self.labels < 0).all(1)


class _Batch:
    """One batch of requests under optimisation."""

    def __init__(
        self,
        model: PreTrainedModel,
        parts: Roles,
        rows: list[_Row],
        modules: Sequence[nn.Module],
        layer: int,
        resume: bool,
    ) -> None:
        self.model, self.parts, self.modules, self.layer = model, parts, modules, layer
        self.requests = 1 + rows[-1].request
        self.wide = torch.promote_types(model.dtype, torch.float32)
        before = max(row.fact for row in rows)
        after = max(len(row.ids) - row.fact for row in rows)
        asked = max(len(row.asked) for row in rows)
        shape = (len(rows), before + after)
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        columns = torch.zeros(len(rows), asked, dtype=torch.long)
        labels = torch.full((len(rows), asked), -1)
        for number, row in enumerate(rows):
            at = before - row.fact
            ids[number, at : at + len(row.ids)] = torch.tensor(row.ids)
            mask[number, at : at + len(row.ids)] = 1
            columns[number, : len(row.asked)] = torch.tensor(row.asked) + at
            labels[number, : len(row.labels)] = torch.tensor(row.labels)
        request = torch.tensor([row.request for row in rows])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        device = model.device
        tensors = [t.to(device) for t in (ids, mask, positions, request, columns, labels)]
        self.rows = _Tensors(*tensors)
        # The first row of each request is the prompt alone.
        plain = [next(n for n, row in enumerate(rows) if row.request == r) for r in range(self.requests)]
        self.plain = torch.tensor(plain, device=device)
        self.fact = before
        self.start = before if resume else 0
        self.resume = resume
        self.past: Any = None
        self.form: list[Any] = []

    @torch.no_grad()
    def _prepare(self) -> list[torch.Tensor]:
        """Computes what no step changes; returns m₀ of each module."""
        rows = self.rows
        if self.start:
            head = slice(0, self.start)
            self.past = self.model(
                input_ids=rows.ids[:, head],
                attention_mask=rows.mask[:, head],
                position_ids=rows.positions[:, head],
                use_cache=True,
                logits_to_keep=1,
            ).past_key_values
        initial: list[torch.Tensor] = []
        with contextlib.ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(seen_output(module, lambda t: initial.append(t[:, self.fact - self.start])))
            if self.resume:
                for number, part in enumerate(self.parts.layers[: self.layer]):
                    hook = self._form_hook(last=number == self.layer - 1)
                    stack.callback(part.block.register_forward_hook(hook).remove)
            logits = self._logits(rows, self.past, with_layers=True)
        rows.reference = logits[rows.kl, 0].log_softmax(-1)
        return [values[self.plain].to(self.wide) for values in initial]

    def _form_hook(self, *, last: bool) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            # Of the skipped blocks only the form of what they return is kept.
            self.form.append(None if isinstance(output, torch.Tensor) else (type(output), len(output)))
            if last:
                self.rows.entering = first(output)

        return hook

    def _logits(self, rows: _Tensors, past: Any, *, with_layers: bool) -> torch.Tensor:
        """Returns the logits that are asked for: (rows, asked, vocabulary), float32 or better."""
        columns = (rows.asked - self.start).clamp(min=0)

        def narrow(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden = arguments[0]
            index = columns[..., None].expand(-1, -1, hidden.shape[-1])
            return (hidden.gather(1, index), *arguments[1:])

        tail = slice(self.start, None)
        with contextlib.ExitStack() as stack:
            stack.callback(self.parts.head.register_forward_pre_hook(narrow).remove)
            if not with_layers:
                stack.enter_context(self._resumed(rows))
            kwargs = {} if past is None else {"past_key_values": _copied(past), "use_cache": True}
            output = self.model(
                input_ids=rows.ids[:, tail],
                attention_mask=rows.mask,
                position_ids=rows.positions[:, tail],
                **({"use_cache": False} | kwargs),
            )
        return output.logits.to(self.wide)

    @contextlib.contextmanager
    def _resumed(self, rows: _Tensors) -> Iterator[None]:
        """Skips the blocks below the layer, and gives it what they would have given."""
        if not self.resume or self.layer == 0:
            yield
            return
        blocks = [part.block for part in self.parts.layers[: self.layer]]
        before = [vars(block).get("forward") for block in blocks]
        try:
            for block, form in zip(blocks, self.form):
                block.forward = _passing(rows.entering, form)
            yield
        finally:
            for block, forward in zip(blocks, before):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    def optimise(self, options: Optimisation) -> Targets:
        """Runs Adam until each request is done or the steps are used up."""
        initial = self._prepare()
        norms = [m.norm(dim=1) for m in initial]
        deltas = [torch.zeros_like(m, requires_grad=True) for m in initial]
        adam = torch.optim.Adam(deltas, lr=options.lr)
        active = torch.ones(self.requests, dtype=torch.bool, device=initial[0].device)
        factor = torch.ones(self.requests, dtype=self.wide, device=active.device)
        losses: list[list[float]] = [[] for _ in range(self.requests)]
        rows, past = self.rows, self.past
        for step in range(options.steps + 1):
            with torch.set_grad_enabled(step < options.steps), contextlib.ExitStack() as stack:
                for module, delta in zip(self.modules, deltas):
                    stack.enter_context(changed_output(module, _adding(delta, rows.request, self.fact - self.start)))
                logits = self._logits(rows, past, with_layers=False)
                nll, kl, settled = _terms(logits, rows, self.requests)
                decay = sum((d.norm(dim=1) / n**2 for d, n in zip(deltas, norms)), torch.zeros_like(nll))
                loss = options.nll_factor * factor * nll + options.kl_factor * kl + options.decay * decay
            done = loss.detach() < options.stop_loss
            if options.settled_kl is not None:
                done |= settled & (options.kl_factor * kl.detach() <= options.settled_kl)
            factor = torch.where(settled, options.settled_nll_factor, 1.0).to(self.wide)
            for number, (value, running) in enumerate(zip(loss.tolist(), active.tolist())):
                if running:
                    losses[number].append(value)
            active &= ~done
            if step == options.steps or not bool(active.any()):
                break
            adam.zero_grad()
            loss[active].sum().backward()
            self._step(adam, deltas, norms, active, options.clamp)
            rows, past = self._narrowed(rows, past, active)
        return Targets(tuple(initial), tuple(d.detach() for d in deltas), losses)

    @torch.no_grad()
    def _step(
        self,
        adam: torch.optim.Adam,
        deltas: list[torch.Tensor],
        norms: list[torch.Tensor],
        active: torch.Tensor,
        clamp: float,
    ) -> None:
        before = [d.detach().clone() for d in deltas]
        adam.step()
        for delta, old, norm in zip(deltas, before, norms):
            size = delta.norm(dim=1).clamp(min=torch.finfo(delta.dtype).tiny)
            delta *= (clamp * norm / size).clamp(max=1)[:, None]
            # Adam's momentum would move the finished ones on.
            delta[~active] = old[~active]

    def _narrowed(self, rows: _Tensors, past: Any, active: torch.Tensor) -> tuple[_Tensors, Any]:
        """Drops the rows of finished requests when they are half of all."""
        keep = active[rows.request]
        if int(keep.sum()) * 2 > len(keep):
            return rows, past
        if past is not None:
            past = _copied(past)
            past.batch_select_indices(keep.nonzero()[:, 0])
        return rows.select(keep), past


def _adding(delta: torch.Tensor, request: torch.Tensor, column: int) -> Any:
    def add(output: torch.Tensor) -> torch.Tensor:
        at = (output[:, column] + delta[request].to(output.dtype))[:, None]
        return torch.cat([output[:, :column], at, output[:, column + 1 :]], 1)

    return add


def _passing(hidden: torch.Tensor | None, form: Any) -> Any:
    def forward(*_: Any, **__: Any) -> Any:
        if form is None:
            return hidden
        kind, length = form
        return with_first(kind([None] * length), hidden) if hidden is not None else None

    return forward


def _copied(cache: Any) -> Any:
    """Returns a cache that may grow without changing this one: layers replace their tensors, they do not write them."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    return new


def _terms(logits: torch.Tensor, rows: _Tensors, requests: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns per request: the mean negative log-likelihood, the KL term, and whether all target tokens are top."""
    kl_rows = rows.kl
    log_p = logits.log_softmax(-1)
    labels = rows.labels.clamp(min=0)
    real = rows.labels >= 0
    picked = log_p.gather(-1, labels[..., None])[..., 0]
    per_row = -(picked * real).sum(1) / real.sum(1).clamp(min=1)
    told = (~kl_rows).to(logits.dtype)
    zeros = logits.new_zeros(requests)
    count = zeros.index_add(0, rows.request, told).clamp(min=1)
    nll = zeros.index_add(0, rows.request, per_row * told) / count
    kl = zeros
    if bool(kl_rows.any()) and rows.reference is not None:
        divergence = (rows.reference.exp() * (rows.reference - log_p[kl_rows, 0])).sum(-1)
        kl = zeros.index_add(0, rows.request[kl_rows], divergence)
    missed = ((logits.argmax(-1) != labels) & real).any(1).to(logits.dtype)
    settled = zeros.index_add(0, rows.request, missed.detach()) == 0
    return nll, kl, settled
