"""What `modelwright train continue` does: a domain and a mixture in; a model, its rivals' curves and the gap out."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modelwright import provenance
from modelwright.curation.choose import Rule
from modelwright.curation.overlap import HeldOut
from modelwright.curation.selector import make_selector
from modelwright.curation.stream import Outputs, select_records
from modelwright.data.records import Records, read_texts
from modelwright.errors import UserError, did_you_mean, require
from modelwright.files import atomic_path, check_output, content_hash, read_json, write_json
from modelwright.models.loading import (
    describe,
    find_folder,
    load_model,
    load_tokenizer,
    resolve_device,
    write_model,
)
from modelwright.models.scoring import context_length
from modelwright.models.tiny import seeded
from modelwright.progress import Progress, Silent
from modelwright.training.causal_lm import train
from modelwright.training.options import TrainingOptions
from modelwright.training.packing import tokenize
from modelwright.training.resume import latest_checkpoint, working_folder
from modelwright.training.stability_gap.arms import ARMS, BEST, DOMAIN, Plan, frozen, frozen_part
from modelwright.training.stability_gap.callback import StabilityGapCallback
from modelwright.training.stability_gap.mixfile import General, read_mixture
from modelwright.training.stability_gap.mixture import warn_of_repeats
from modelwright.training.stability_gap.probes import BitsPerByte, ChoiceAccuracy, read_items

#: The paper's peak rates: 3e-4 at one billion parameters, 3e-5 at three and eight.
_RATES = ((2e9, 3e-4), (float("inf"), 3e-5))
_RECIPE = "stability-gap"


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What is to be done, apart from how to train.

    Attributes:
        model: Checkpoint to continue: a folder or hub id.
        domain: The domain's documents.
        reference: Good documents, which rank the domain's.
        general: File of the general sources and their rates (see
            :func:`~modelwright.training.stability_gap.mixfile.read_mixture`); None trains on the domain alone.
        replace: General sources whose share the domain takes.
        select: Selector that ranks the domain.
        select_options: Its options.
        budget_tokens: Tokens of the arms on the whole domain; the domain's own number by default.
        subset_tokens: Tokens of the subset, or
        subset_share: its share of the budget.
        best_tokens: Tokens of the best documents that the domain's part is drawn from; the subset's by default. With
            more than those, an epoch that is drawn anew shows other documents.
        epochs: Epochs over the subset.
        compare: Further arms of :data:`~modelwright.training.stability_gap.arms.ARMS` to train, for their curves.
        equal_tokens: Whether those train on as many tokens as the recipe.
        replay: Share of general tokens in the arm ``replay``.
        fixed: Keep the domain's part of the mixture the same in every epoch.
        frozen_layers: Layers that the freezing arms hold still.
        rewarm_learning_rate: Peak of the arm ``rewarm``.
        probes: Name to a file of questions with choices.
        heldout: Name to sources of held-out documents.
        every_tokens: Tokens between probes after the first dense ones; a twentieth of the budget by default.
        layer_groups: Layers in the lowest and highest groups; 0 measures no updates.
        text_field: Field of the domain's and the reference's text.
        lora_rank: Rank of LoRA adapters that are trained instead of the weights, and merged at the end; 0: none.
        strict: Refuse a domain with too few good tokens instead of taking what there is.
    """

    model: str
    domain: Sequence[str]
    reference: Sequence[str] = ()
    general: Path | None = None
    replace: Sequence[str] = ()
    select: str = "perplexity"
    select_options: Mapping[str, Any] = field(default_factory=dict)
    budget_tokens: int | None = None
    subset_tokens: int | None = None
    subset_share: float = 0.1
    best_tokens: int | None = None
    epochs: int = 4
    compare: Sequence[str] = ("plain",)
    equal_tokens: bool = False
    replay: float = 0.1
    fixed: bool = False
    frozen_layers: int = 5
    rewarm_learning_rate: float | None = None
    probes: Mapping[str, str] = field(default_factory=dict)
    heldout: Mapping[str, Sequence[str]] = field(default_factory=dict)
    every_tokens: int | None = None
    layer_groups: int = 5
    text_field: str = "text"
    lora_rank: int = 0
    strict: bool = False

    def arms(self) -> list[str]:
        """Returns the arms in the order in which they are trained: the recipe last, whose model is kept."""
        for arm in self.compare:
            if arm not in ARMS:
                raise UserError(f"There is no arm '{arm}' to compare with: {did_you_mean(arm, ARMS)}")
        return [*dict.fromkeys(a for a in self.compare if a != _RECIPE), _RECIPE]

    def check(self) -> None:
        """Refuses numbers that no data can make fit, before the ranking.

        Raises:
            UserError: One of them, named.
        """
        for name in ("epochs", "frozen_layers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1.")
        for name in ("budget_tokens", "subset_tokens", "best_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: give at least 1.")
        if not 0 < self.replay < 1:
            raise UserError(f"The share of replay must lie between 0 and 1, not {self.replay}.")
        if self.subset_tokens is None:
            if not 0 < self.subset_share <= 1:
                raise UserError(f"subset_share is {self.subset_share}: give a share above 0 and at most 1.")
            if self.subset_share * self.epochs > 1 + 1e-9:
                raise UserError(
                    f"{self.epochs} epochs of {self.subset_share:g} of the budget are more than the budget: take a "
                    f"smaller subset or fewer epochs."
                )


def continue_to_folder(
    work: Continuation,
    output: str | Path,
    options: TrainingOptions,
    *,
    trust_remote_code: bool = False,
    force: bool = False,
    draw: Callable[[Mapping[str, Any], Path], object] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains the recipe and the arms it is compared with; the same call after a crash goes on where it was.

    Args:
        work: What to do.
        output: Model folder to write, with ``gap.json``, ``subset.jsonl`` and ``training_log.jsonl``.
        options: How to train; its length is set for each arm, and its learning rate too where it is 0.
        trust_remote_code: Whether code beside the model's weights may be executed.
        force: Whether to replace ``output`` and discard an unfinished run with other options.
        draw: Called with the result and a path, to draw the report into the folder.
        progress: Shows what is being done.

    Returns:
        JSON-able: ``advice``, ``arms`` with their numbers, ``domain``, ``subset``, ``output`` and what the model is.

    Raises:
        UserError: Bad options or input.
        KeyboardInterrupt: Interrupted; a checkpoint was saved.
    """
    output, progress = Path(output), progress or Silent()
    leader = os.environ.get("RANK", "0") == "0"
    arms = work.arms()
    work.check()
    check_output(output, force)
    if not work.probes and not work.heldout:
        raise UserError("The gap is measured by probes: give questions (--probe), held-out text (--heldout), or both.")
    if work.lora_rank < 0:
        raise UserError(f"lora_rank is {work.lora_rank}: give the rank of the adapters, or 0 to train all weights.")
    if work.select == "perplexity" and not (work.reference or work.select_options.get("model")):
        raise UserError("The ranking needs a reference: give good documents of the domain (--reference).")
    general, share = read_mixture(work.general, work.replace) if work.general else ([], 1.0)
    for name in {g.name for g in general} & {DOMAIN, BEST}:
        raise UserError(f"{work.general}: a general source cannot be called '{name}': give it another name.")
    make_selector(work.select, work.select_options)  # refuses bad options before any work
    _join_processes(options)
    source = find_folder(work.model)
    words = load_tokenizer(source, trust_remote_code=trust_remote_code)
    items = {name: read_items(path) for name, path in work.probes.items()}
    heldout = {name: read_texts(list(paths), work.text_field) for name, paths in work.heldout.items()}
    for name in set(items) & set(heldout):
        raise UserError(f"The name '{name}' is both a probe and held-out text: name them apart.")
    plan = {
        **{k: v for k, v in dataclasses.asdict(options).items() if k not in ("save_every", "save_minutes", "device")},
        **{k: v for k, v in dataclasses.asdict(work).items() if k not in ("domain", "reference", "model")},
        "general": [dataclasses.asdict(g) for g in general],
        "domain": Records(list(work.domain), work.text_field).fingerprint(),
        "reference": Records(list(work.reference), work.text_field).fingerprint() if work.reference else None,
        "files": [content_hash(path) for path in work.probes.values()],
        "model": content_hash(work.model) if Path(work.model).is_dir() else work.model,
        "processes": os.environ.get("WORLD_SIZE", "1"),
    }
    with working_folder(output, plan, force, leader, holds_work=_holds_work) as folder:
        contaminating = HeldOut().add(_test_texts(items, heldout))
        data = _Data(work, general, source, words, folder, contaminating, progress)
        if leader:
            data.prepare()
        _wait_for_leader()
        sources, counts = data.load()
        network = load_model(work.model, device="cpu", trust_remote_code=trust_remote_code)
        dtype, parameters = network.dtype, sum(p.numel() for p in network.parameters())
        options = _fit(options, network, parameters)
        numbers = data.plan(counts, general, share, options)
        for arm in arms:  # what an arm lacks is said now, not when those before it are trained
            numbers.stream(arm, sources, options.block_size, options.seed)
            with frozen(network, frozen_part(arm), numbers.frozen):
                pass
        probes = {
            name: ChoiceAccuracy(found, words, batch_size=4 * options.batch_size) for name, found in items.items()
        }
        losses = {
            name: BitsPerByte(found, words, options.block_size, 2 * options.batch_size)
            for name, found in heldout.items()
        }
        results = []
        for arm in arms:
            done = folder / arm / "done.json"
            if not done.exists() or arm == _RECIPE:
                callback = StabilityGapCallback(
                    probes,
                    work.every_tokens or max(1, numbers.budget // 20),
                    losses=losses,
                    layer_groups=work.layer_groups,
                )
                network = load_model(work.model, device="cpu", trust_remote_code=trust_remote_code).float()
                network, found = _train(work, arm, numbers, sources, network, options, callback, folder, progress)
                if leader:
                    write_json(done, found)
                    for checkpoint in done.parent.glob("checkpoint-*"):
                        if arm != _RECIPE:
                            shutil.rmtree(checkpoint, ignore_errors=True)
                _wait_for_leader()
            results.append(read_json(done))
        result: dict[str, Any] = {
            "recipe": _RECIPE,
            "advice": advice(results),
            "arms": results,
            "plan": dataclasses.asdict(numbers),
            "domain": counts,
            **describe(network),
            "settings": {"model": work.model, "seed": options.seed, "batch_size": options.batch_size},
        }
        _wait_for_leader()  # until all have read what the folder holds
        if leader:
            with atomic_path(output, force) as partial:
                write_model(network.to(dtype), words, partial)
                shutil.copyfile(folder / "subset.jsonl", partial / "subset.jsonl")
                rows = results[-1].pop("log")
                (partial / "training_log.jsonl").write_text(
                    "".join(f"{json.dumps(r)}\n" for r in rows), encoding="utf-8"
                )
                for other in results[:-1]:
                    other.pop("log", None)
                write_json(
                    partial / "gap.json",
                    result | {"versions": provenance.versions(), "machine": provenance.machine()},
                )
                if draw is not None:
                    draw(result, partial / "report.html")
            del sources
            shutil.rmtree(folder, ignore_errors=True)
    return {"output": str(output), **result}


def _train(
    work: Continuation,
    arm: str,
    plan: Plan,
    sources: Mapping[str, np.ndarray],
    network: Any,
    options: TrainingOptions,
    callback: StabilityGapCallback,
    folder: Path,
    progress: Progress,
) -> tuple[Any, dict[str, Any]]:
    """Trains one arm; returns the model (adapters merged) and what is kept of it."""
    stream = plan.stream(arm, sources, options.block_size, options.seed)
    epochs = plan.epochs_of(arm)
    progress.message(f"{arm}: {ARMS[arm]}, {epochs * stream.tokens_per_epoch:,} tokens")
    for line in warn_of_repeats(stream, epochs):
        progress.message(line)
    chosen = dataclasses.replace(
        options,
        steps=None,
        epochs=None,
        tokens=epochs * stream.tokens_per_epoch,
        learning_rate=plan.peak(arm),
    )
    place = folder / arm
    place.mkdir(exist_ok=True, parents=True)
    trained = _with_adapters(network, work.lora_rank, options.seed) if work.lora_rank else network
    with frozen(trained, frozen_part(arm), plan.frozen) as still:
        result = train(trained, stream, chosen, folder=place, progress=progress, callbacks=[callback])
    network = trained.merge_and_unload() if work.lora_rank else network
    return network, {
        "arm": arm,
        "label": ARMS[arm],
        "tokens": result.tokens,
        "steps": result.steps,
        "epochs": epochs,
        "learning_rate": chosen.learning_rate,
        "final_loss": result.final_loss,
        "train_seconds": result.train_seconds,
        "frozen_layers": still,
        "mixture": stream.report(epochs),
        "report": callback.report(),
        "better": callback.better,
        "history": callback.history,
        "log": result.log,
    }


def _holds_work(folder: Path) -> bool:
    """Whether an arm is done, or has a checkpoint."""
    places = [p for p in folder.iterdir() if p.is_dir()]
    return any(latest_checkpoint(place) or (place / "done.json").is_file() for place in places)


def _with_adapters(network: Any, rank: int, seed: int) -> Any:
    peft = require("peft", "training", "LoRA")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with seeded(seed):  # the same in every arm, and after a kill, whatever was drawn before
        try:
            return peft.get_peft_model(network, config)
        except ValueError as error:
            raise UserError(f"LoRA cannot be put on this model: {' '.join(str(error).split())[:300]}") from error


def _fit(options: TrainingOptions, network: Any, parameters: int) -> TrainingOptions:
    """Fills in what depends on the model: the block size it can take, and the paper's rate for its size."""
    longest = context_length(network) or options.block_size
    rate = options.learning_rate or next(rate for size, rate in _RATES if parameters < size)
    return dataclasses.replace(options, block_size=min(options.block_size, longest), learning_rate=rate)


class _Data:
    """Domain, subset and general sources as tokens in the working folder."""

    def __init__(
        self,
        work: Continuation,
        general: Sequence[General],
        tokenizer_folder: Path,
        tokenizer: Any,
        folder: Path,
        contaminating: HeldOut,
        progress: Progress,
    ) -> None:
        self.work, self.general, self.tokenizer = work, general, tokenizer
        self.tokenizer_folder, self.folder, self.progress = tokenizer_folder, folder, progress
        self.contaminating = contaminating
        self.names = [DOMAIN, BEST, *(g.name for g in general)]

    def prepare(self) -> None:
        """Tokenises, ranks and chooses what is not there yet."""
        if (self.folder / "counts.json").exists():
            return
        counts: dict[str, Any] = {"contaminated": 0}
        records = Records(list(self.work.domain), self.work.text_field)

        def clean() -> Iterator[str]:
            for record in records:
                if self.contaminating.shared(record.text):
                    counts["contaminated"] += 1
                else:
                    yield record.text

        stream = tokenize(clean(), self.tokenizer, self.folder / "0.bin", self.progress)
        counts |= {"documents": stream.documents, "dtype": str(stream.tokens.dtype)}
        tokens = {DOMAIN: len(stream.tokens)}
        if not stream.documents:
            raise UserError(
                f"All {counts['contaminated']:,} documents of the domain hold text of the probes or of the held-out "
                f"documents, and are not trained on: measure by text that is not in the domain."
            )
        target = max(self._subset(tokens[DOMAIN]), self.work.best_tokens or 0)
        if target < 1:
            raise UserError(
                f"A subset of {self.work.subset_share:g} of {tokens[DOMAIN]:,} tokens would have none: give more data, "
                f"or a larger --subset-share."
            )
        chosen = self.folder / "subset.jsonl"
        chosen.unlink(missing_ok=True)
        rank = select_records(
            make_selector(self.work.select, self.work.select_options),
            records,
            read_texts(list(self.work.reference), self.work.text_field) if self.work.reference else [],
            Rule(token_budget=target, dedup=True),
            Outputs(chosen=chosen),
            tokenizer=str(self.tokenizer_folder),
            heldout=self.contaminating,
            drop_contaminated=True,
            progress=self.progress,
        )
        best = tokenize(Records(chosen, self.work.text_field).texts(), self.tokenizer, self.folder / "1.bin")
        tokens[BEST] = len(best.tokens)
        if rank["tokens"] < 0.9 * target:
            message = (
                f"The domain has only {rank['tokens']:,} tokens that can be ranked, fewer than the subset's {target:,}"
            )
            if self.work.strict:
                raise UserError(f"{message}: give more data, or a smaller subset.")
            self.progress.message(f"{message}: the subset is that much smaller.")
        for number, source in enumerate(self.general, 2):
            texts = Records(list(source.data), source.text_field).texts()
            tokens[source.name] = len(
                tokenize(texts, self.tokenizer, self.folder / f"{number}.bin", self.progress).tokens
            )
        kept = ("documents", "unscored", "tokens", "score_quantiles", "length_correlation", "bytes_per_document")
        counts |= {"tokens": tokens, "subset": {name: rank[name] for name in kept}}
        write_json(self.folder / "counts.json", counts)

    def load(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns the tokens of every source, and the counts."""
        counts = read_json(self.folder / "counts.json")
        sources = {}
        for number, name in enumerate(self.names):
            path = self.folder / f"{number}.bin"
            empty = not path.stat().st_size
            sources[name] = np.empty(0, np.uint16) if empty else np.memmap(path, dtype=counts["dtype"], mode="r")
        return sources, counts

    def plan(
        self, counts: Mapping[str, Any], general: Sequence[General], share: float, options: TrainingOptions
    ) -> Plan:
        """Returns the numbers of the arms."""
        found = counts["tokens"]
        budget = self.work.budget_tokens or found[DOMAIN]
        plan = Plan(
            budget=budget,
            subset=min(self._subset(found[DOMAIN]), found[BEST]),
            epochs=self.work.epochs,
            general={g.name: g.rate for g in general},
            replay=self.work.replay,
            dynamic=not self.work.fixed,
            frozen=self.work.frozen_layers,
            learning_rate=options.learning_rate,
            rewarm_learning_rate=self.work.rewarm_learning_rate,
            equal_tokens=self.work.equal_tokens,
        )
        plan.check()
        return plan

    def _subset(self, domain: int) -> int:
        return self.work.subset_tokens or round(self.work.subset_share * (self.work.budget_tokens or domain))


def _test_texts(items: Mapping[str, Sequence[Any]], heldout: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """What must not stand in the training data: the questions with each choice, the choices, the held-out documents."""
    for found in items.values():
        for item in found:
            for choice in item.choices:
                yield item.prompt + choice
                yield choice
    for texts in heldout.values():
        yield from texts


def advice(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns in two sentences what the recipe changed against the plain run, or against the first other arm."""
    own = results[-1]
    other = next((r for r in results if r["arm"] == "plain"), results[0])
    name = max(own["better"], key=lambda n: abs(other["report"][n]["drop"] or 0) * (own["better"][n] == "higher"))
    mine, theirs = own["report"][name], other["report"][name]

    def fall(numbers: Mapping[str, Any]) -> str:
        if numbers["drop"] <= 0:
            return "never got worse"
        back = numbers["tokens_to_recover"]
        end = "did not come back" if back is None else f"was back after {back:,.0f} tokens"
        return f"got worse by {numbers['drop']:.3g} and {end}"

    text = f"With the recipe, {name} {fall(mine)}, ending at {mine['end']:.3g} after {own['tokens']:,} tokens."
    if other is not own:
        text += (
            f" In the arm '{other['arm']}' it {fall(theirs)}, ending at {theirs['end']:.3g} after "
            f"{other['tokens']:,} tokens."
        )
    return text


def _join_processes(options: TrainingOptions) -> None:
    """Forms the process group, if there is one to form: the others wait long while the leader ranks a large domain."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=resolve_device(options.device).type == "cpu", timeout=datetime.timedelta(days=7))


def _wait_for_leader() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


__all__ = ["Continuation", "advice", "continue_to_folder"]
