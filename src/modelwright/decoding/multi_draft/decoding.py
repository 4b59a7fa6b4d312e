"""Generation with several drafts a step: ``model.generate(..., custom_generate=MultiDraftDecoding(...))``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modelwright.decoding.multi_draft.cache import Forward, Kept, check_cache, windows_of, without_windows
from modelwright.decoding.multi_draft.drafts import (
    AssistantDrafts,
    Drafter,
    EarlyExitDrafts,
    PromptLookupDrafts,
    Proposer,
)
from modelwright.decoding.multi_draft.draws import draw
from modelwright.decoding.multi_draft.sampling import Row, Shaper, Stops, as_probabilities
from modelwright.decoding.multi_draft.tree import Draft, Layout, RowScores, Scored, TreeScores, takes_trees
from modelwright.decoding.multi_draft.verifiers import Verifier, make_verifier
from modelwright.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer


@dataclass
class Stats:
    """What was counted over all calls since :meth:`clear`.

    Attributes:
        tokens: Tokens generated.
        blocks: Steps, summed over prompts: each is one target call's worth of one prompt.
        tests: Places at which drafted tokens stood for verification.
        accepted: How many of them gave a drafted token.
        target_calls: Forward calls of the target, without those that read prompts; a batch is one call.
        draft_calls: Forward calls of draft models.
        drafted: Drafted tokens.
    """

    tokens: int = 0
    blocks: int = 0
    tests: int = 0
    accepted: int = 0
    target_calls: int = 0
    draft_calls: int = 0
    drafted: int = 0
    #: Tests and acceptances by place in the block.
    by_depth: list[list[int]] = field(default_factory=list)

    @property
    def block_efficiency(self) -> float:
        """Tokens a step: between 1 and the draft length plus 1."""
        return self.tokens / max(1, self.blocks)

    @property
    def acceptance_rate(self) -> float:
        """Share of verifications that gave a drafted token."""
        return self.accepted / max(1, self.tests)

    def clear(self) -> None:
        """Sets everything to zero."""
        self.__init__()  # type: ignore[misc]

    def count(self, depth: int, accepted: bool) -> None:
        """Counts a verification."""
        while len(self.by_depth) <= depth:
            self.by_depth.append([0, 0])
        self.by_depth[depth][0] += 1
        self.by_depth[depth][1] += accepted
        self.tests += 1
        self.accepted += accepted

    def as_dict(self) -> dict[str, Any]:
        """Returns counts and rates, JSON-able."""
        rates = {"block_efficiency": self.block_efficiency, "acceptance_rate": self.acceptance_rate}
        return {**self.__dict__, **rates}


class MultiDraftDecoding:
    """Generates exactly as ``generate`` would, several tokens a call of the model.

    Each step, drafters propose K continuations of up to L tokens; the target scores all of them in one call; and at
    each place the verifier turns the drafted tokens that are still in the running into one token of the target's law,
    until none of them is what was drawn. With ``do_sample=True`` the law of the output is that of stock sampling with
    the same processors (temperature, top-k, top-p, penalties …); with ``do_sample=False`` the output is stock greedy
    search's. (In bfloat16 and float16, scores of a longer input differ from those of single tokens in the last bits,
    so that ties may fall otherwise, as in any speculative decoding.)

    Prompts may share a batch (left-padded); each keeps as many tokens as it gets and leaves the batch when it ends.

    Args:
        assistant_model: A draft model, or several: each gives ``num_drafts`` drafts.
        num_drafts: K of each assistant, of prompt lookup and of the early exit.
        draft_length: L, tokens a draft.
        verifier: Name of a verifier, or a :class:`Verifier`.
        draft_temperature: Flattens the draft law, on top of generate's own temperature; one for all assistants, or one
            each.
        prompt_lookup: Whether drafts are also copied from the prompt.
        early_exit: Layers of the target after which it drafts for itself.
        drafters: Further drafters, with settings of their own.
        layout: ``tree`` scores drafts in one sequence, common beginnings once; ``rows`` as rows of a batch; ``auto``
            takes the tree where the model's attention reads it right.
        pad_vocabulary: See :class:`~modelwright.decoding.multi_draft.drafts.AssistantDrafts`.
        streamer: Is given the prompt, then the tokens of each step; for one prompt at a time. (``generate`` keeps its
            own ``streamer=`` from custom loops.)
        **options: Further fields of :class:`Verifier`: ``lp_size``, ``alphabet_size``, ``order``.

    Raises:
        UserError: An option is out of range, or there is no drafter.
    """

    #: The output has the model's own law, so scores of given texts are the model's.
    exact = True

    def __init__(
        self,
        assistant_model: PreTrainedModel | Sequence[PreTrainedModel] | None = None,
        *,
        num_drafts: int = 2,
        draft_length: int = 4,
        verifier: str | Verifier = "balanced",
        draft_temperature: float | Sequence[float] = 1.0,
        prompt_lookup: bool = False,
        early_exit: int | None = None,
        drafters: Sequence[Drafter] = (),
        layout: Layout = "auto",
        pad_vocabulary: bool = False,
        streamer: BaseStreamer | None = None,
        **options: Any,
    ) -> None:
        if draft_length < 1:
            raise UserError(f"Drafts need at least 1 token, not {draft_length}.")
        if layout not in ("auto", "tree", "rows"):
            raise UserError(f"The layout must be auto, tree or rows, not '{layout}'.")
        self.draft_length, self.layout, self.streamer = draft_length, layout, streamer
        self.verifier = make_verifier(verifier, **options)
        assistants: Sequence[Any] = (
            [] if assistant_model is None else assistant_model if isinstance(assistant_model, (list, tuple))
            else [assistant_model]
        )  # fmt: skip
        temperatures = (
            [float(draft_temperature)] * len(assistants)
            if isinstance(draft_temperature, (int, float))
            else list(draft_temperature)
        )
        if len(temperatures) != len(assistants):
            raise UserError(f"There are {len(temperatures)} draft temperatures for {len(assistants)} draft models.")
        self.drafters: list[Drafter] = [
            AssistantDrafts(model=model, num_drafts=num_drafts, temperature=t, pad_vocabulary=pad_vocabulary)
            for model, t in zip(assistants, temperatures, strict=True)
        ]
        if early_exit is not None:
            flat = 1.0 if not isinstance(draft_temperature, (int, float)) else float(draft_temperature)
            self.drafters.append(EarlyExitDrafts(layers=early_exit, num_drafts=num_drafts, temperature=flat))
        if prompt_lookup:
            self.drafters.append(PromptLookupDrafts(num_drafts=num_drafts))
        self.drafters += drafters
        if not self.drafters:
            raise UserError("There is nothing to draft with: give assistant_model, early_exit or prompt_lookup.")
        self.stats = Stats()

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop, as ``generate`` calls it.

        Returns:
            Tokens ``(rows, length)``, or a ``GenerateDecoderOnlyOutput`` if asked for.

        Raises:
            UserError: A setting, a cache or a processor does not go with drafts, or vocabularies differ.
        """
        call = _Call(self, model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)
        return call.run()


class _Call:
    def __init__(
        self,
        decoding: MultiDraftDecoding,
        model: PreTrainedModel,
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        inputs: dict[str, Any],
    ) -> None:
        _check(model, config, inputs)
        if decoding.streamer is not None and len(input_ids) > 1:
            raise UserError(f"A streamer takes one prompt at a time, not {len(input_ids)}.")
        self.decoding, self.model, self.config = decoding, model, config
        self.stats, self.device = decoding.stats, input_ids.device
        self.stops = Stops(criteria)
        self.shaper = Shaper(processors, len(input_ids))
        self.sampling = bool(config.do_sample) or self.shaper.generators is not None
        self.proposers: list[Proposer] = [
            drafter.start(model, self.shaper, not self.sampling) for drafter in decoding.drafters
        ]
        mask = inputs.get("attention_mask")
        self.mask: Tensor = torch.ones_like(input_ids) if mask is None else mask
        if (self.mask[:, -1] == 0).any():
            raise UserError("Prompts of a batch must be padded on the left: set padding_side='left' in the tokenizer.")
        _check_positions(inputs.get("position_ids"), self.mask)
        self.padding_id = self._padding_id()
        self.rows = self._rows(input_ids)
        self.forward = Forward(model)
        cache = inputs.get("past_key_values")
        count = sum(getattr(drafter, "num_drafts", 1) for drafter in decoding.drafters)
        longest = max(config.max_length, input_ids.shape[1]) + 1 + count * decoding.draft_length
        # A tree's mask knows of no windows.
        self.trees = longest <= windows_of(cache)
        if decoding.layout == "tree" and not self.trees:
            raise UserError("The text may outgrow the model's sliding windows, which a tree's mask does not know: "
                            "leave out layout.")  # fmt: skip
        self.kept = Kept(without_windows(cache), [])
        self.layout: Any = RowScores
        #: By row, what was asked for of each token: its scores and its logits.
        self.scores: list[list[Tensor]] = [[] for _ in self.rows]
        self.logits: list[list[Tensor]] = [[] for _ in self.rows]

    def run(self) -> Any:
        from transformers.generation import GenerateDecoderOnlyOutput

        before = sum(p.calls for p in self.proposers)
        self._read_prompts()
        read = self.forward.calls
        active = list(self.rows)
        streamer = self.decoding.streamer
        try:
            if streamer is not None:
                streamer.put(self.rows[0].host[None, : self.rows[0].length])
            while active:
                done = active[0].length
                active, row = self._step(active), active[0]
                if streamer is not None:
                    streamer.put(row.host[done : row.length])
        finally:
            if streamer is not None:
                streamer.end()  # or whoever waits for text waits for ever
        self.stats.target_calls += self.forward.calls - read
        self.stats.draft_calls += sum(p.calls for p in self.proposers) - before
        longest = max(row.length for row in self.rows)
        sequences = torch.stack([row.buffer for row in self.rows])[:, :longest]
        if not self.config.return_dict_in_generate:
            return sequences
        # Rows that ended left the batch, and their keys with them.
        cache = self.kept.cache if len(self.rows) == 1 else None
        return GenerateDecoderOnlyOutput(
            sequences=sequences, scores=self._by_step(self.scores), logits=self._by_step(self.logits),
            past_key_values=cache,
        )  # fmt: skip

    def _by_step(self, found: list[list[Tensor]]) -> Any:
        """What was kept of each token, as ``(rows, V)`` for each step; rows that ended are certain of padding."""
        if not found[0]:
            return None
        ended = torch.full_like(found[0][0], -torch.inf)
        ended[self.padding_id] = 0
        steps = max(map(len, found))
        return tuple(torch.stack([own[i] if i < len(own) else ended for own in found]) for i in range(steps))

    def _padding_id(self) -> int:
        padding = getattr(self.config, "_pad_token_tensor", None)
        return int(padding) if padding is not None else 0

    def _rows(self, input_ids: Tensor) -> list[Row]:
        count, length = input_ids.shape
        generators: Sequence[torch.Generator | None] = self.shaper.generators or [None] * count
        padding = (self.mask == 0).sum(1).tolist()
        longest = max(self.config.max_length, length + 1)
        return [
            Row(i, input_ids[i], padding[i], longest=longest, generator=generators[i], fill=self.padding_id)
            for i in range(count)
        ]

    def _read_prompts(self) -> None:
        """Puts all tokens of the prompts but the last into the cache; the last is the root of the first tree."""
        ids = torch.stack([row.ids for row in self.rows])
        cache, length = self.kept.cache, ids.shape[1]
        # Whatever cannot be taken back must be refused before any token is made.
        if cache is None or getattr(cache, "layers", None):
            check_cache(cache, self.model)
        known = int(cache.get_seq_length())
        if known >= length:
            raise UserError(f"The cache given holds {known} tokens already, but the prompt has only {length}.")
        if known < length - 1:
            mask = self.mask[:, : length - 1]
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, known:]
            self.forward(ids[:, known : length - 1], mask, positions, cache, last=True)
        check_cache(cache, self.model)
        self.kept.held = [length - 1 - row.padding for row in self.rows]
        wanted = self.decoding.layout
        if wanted == "tree" or (wanted == "auto" and self.trees and takes_trees(self.model, ids[0])):
            self.layout = TreeScores

    def _step(self, active: list[Row]) -> list[Row]:
        """One call of the target; returns the sequences that go on."""
        limit = self.config.max_length
        lengths = [max(0, min(self.decoding.draft_length, limit - row.length - 1)) for row in active]
        drafts: list[list[Draft]] = [[] for _ in active]
        for proposer in self.proposers:
            for found, more in zip(drafts, proposer.propose(active, lengths), strict=True):
                found += more
        self.stats.drafted += sum(len(draft.tokens) for some in drafts for draft in some)
        roots = [int(row.host[row.length - 1]) for row in active]
        scored: Scored = self.layout(self.forward, self.kept, roots, drafts, self.device)
        scored.scores = scored.scores.to(self.device)
        target = _Target(scored, self.shaper, self.sampling)
        paths, going = [], []
        for b, row in enumerate(active):
            path, done = self._walk(row, b, drafts[b], target)
            paths.append(path)
            if not done:
                going.append(b)
        scored.commit(paths)
        if going and len(going) < len(active):
            self.kept.select(going)
        return [active[b] for b in going]

    def _walk(self, row: Row, b: int, drafts: list[Draft], target: _Target) -> tuple[tuple[int, int], bool]:
        """Emits tokens of one sequence; returns how far which draft was followed, and whether the sequence ended."""
        alive = list(range(len(drafts)))
        path = (0, 0)
        self.stats.blocks += 1
        for depth in range(self.decoding.draft_length + 1):
            alive = [k for k in alive if len(drafts[k].tokens) > depth]
            place = target.scored.place(b, *path)
            token = self._choose(target, place, row, [drafts[k] for k in alive], depth)
            if self.config.return_dict_in_generate:
                self._keep(target, place, row)
            tested = bool(alive)
            alive = [k for k in alive if drafts[k].tokens[depth] == token]
            if tested:
                self.stats.count(depth, bool(alive))
            row.append(token)
            self.stats.tokens += 1
            if self.stops(row):
                return path, True
            if not alive:
                break
            path = (alive[0], depth + 1)
        return path, False

    def _choose(self, target: _Target, place: tuple[int, int], row: Row, drafts: list[Draft], depth: int) -> int:
        if not self.sampling:
            return target.best(place, row)
        q = as_probabilities(target.at(place, row))
        if not drafts:
            return draw(q, row.uniform)
        laws = [draft.law(depth, q) for draft in drafts]
        return self.decoding.verifier.verify([draft.tokens[depth] for draft in drafts], laws, q, row.uniform)

    def _keep(self, target: _Target, place: tuple[int, int], row: Row) -> None:
        if getattr(self.config, "output_scores", None):
            self.scores[row.index].append(target.at(place, row).clone())
        if getattr(self.config, "output_logits", None):
            self.logits[row.index].append(target.scored.scores[place].float())


class _Target:
    """The target's scores on a step's drafts, shaped by the processors.

    Processors that look at scores only shape all places at once where that spares time: for an argmax, and on an
    accelerator, where many small calls cost more than a large one. Others, on each place that is reached.
    """

    def __init__(self, scored: Scored, shaper: Shaper, sampling: bool) -> None:
        self.scored, self.shaper = scored, shaper
        self.shaped: Tensor | None = None
        scores = scored.scores
        if shaper.scores_only and (not sampling or scores.device.type != "cpu"):
            flat = scores.flatten(0, 1).to(torch.float32, copy=True)
            self.shaped = shaper.shape(flat).view(scores.shape)
        self.argmax: list[list[int]] | None = None
        if self.shaped is not None and not sampling:
            self.argmax = self.shaped.argmax(-1).tolist()

    def at(self, place: tuple[int, int], row: Row) -> Tensor:
        """Scores ``(V,)`` at a place that the row has come to."""
        if self.shaped is not None:
            return self.shaped[place]
        return self.shaper(self.scored.scores[place][None], [row], lambda _: row.ids)[0]

    def best(self, place: tuple[int, int], row: Row) -> int:
        """The token of the highest score there."""
        if self.argmax is not None:
            return self.argmax[place[0]][place[1]]
        return int(self.at(place, row).argmax())


def _check(model: PreTrainedModel, config: GenerationConfig, inputs: dict[str, Any]) -> None:
    if model.config.is_encoder_decoder:
        raise UserError("Multi-draft decoding is for decoder-only models, not for encoder-decoders.")
    if (config.num_beams or 1) > 1:
        raise UserError("Multi-draft decoding samples or takes the best token: leave out num_beams.")
    wanted = [n for n in ("output_attentions", "output_hidden_states") if getattr(config, n, None)]
    if config.return_dict_in_generate and wanted:
        raise UserError(f"Multi-draft decoding does not keep what {wanted[0]} asks for: leave it out.")
    known = {"attention_mask", "position_ids", "past_key_values", "cache_params", "logits_to_keep", "use_cache"}
    if extra := [name for name, value in inputs.items() if name not in known and value is not None]:
        raise UserError(f"Multi-draft decoding is for text in input_ids: '{extra[0]}' cannot be used with it.")


def _check_positions(given: Tensor | None, mask: Tensor) -> None:
    """Refuses positions other than the mask's: those of drafts are counted on from it."""
    if given is None or given.ndim != 2:
        return
    own = (mask.long().cumsum(1) - 1)[:, -given.shape[1] :]
    if ((own != given) & (mask[:, -given.shape[1] :] != 0)).any():
        raise UserError("Multi-draft decoding counts positions by the attention mask: leave out position_ids.")
