"""CEHPO: the cross-entropy method on hyperparameters.

Li, arXiv 2410.18441 (2024), tunes word2vec in this way and gives no numbers; the method is the standard one of
Rubinstein: draw settings from a law, keep the best, fit the law to them, repeat.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modelwright.errors import UserError
from modelwright.training.cehpo.journal import Journal
from modelwright.training.cehpo.space import Space, check_space

Setting = dict[str, Any]
Objective = Callable[[Setting], float]
#: Score, what went wrong or nothing, and the exception where it is at hand.
_Outcome = tuple[float, str, Exception | None]


@dataclass(frozen=True)
class Round:
    """One round of a search.

    Attributes:
        threshold: γ, the score that the elite reaches.
        best: The best score of the round.
        mean: Mean score of the settings that did not fail.
        entropy: How undecided the law is after the round, from 1 to 0, mean over the hyperparameters.
        evaluations: Evaluations so far.
    """

    threshold: float
    best: float
    mean: float
    entropy: float
    evaluations: int


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: The best setting seen.
        score: Its score (mean of all its scores if it was scored again).
        mode: The most probable setting under the last law; it may never have been tried.
        law: Parameters of the last law, by hyperparameter.
        rounds: The rounds.
        evaluations: How often the objective was called.
        failures: Evaluations that raised or gave no number.
        stopped: Why it ended: ``rounds``, ``threshold`` (unchanged for ``patience`` rounds), ``entropy`` (the law has
            decided) or ``evaluations`` (the budget is spent).
        tried: Every evaluation in order, as (setting, score); a failure has the score -inf.
    """

    best: Setting
    score: float
    mode: Setting
    law: dict[str, dict[str, Any]]
    rounds: list[Round]
    evaluations: int
    failures: int
    stopped: Literal["rounds", "threshold", "entropy", "evaluations"]
    tried: list[tuple[Setting, float]] = field(repr=False)


def cross_entropy_search(
    space: Space,
    objective: Objective,
    *,
    population: int = 20,
    elite: float = 0.2,
    smoothing: float = 0.7,
    rounds: int = 10,
    patience: int = 3,
    least_entropy: float = 0.05,
    evaluations: int | None = None,
    rescore: int = 0,
    cache: bool = True,
    on_error: Literal["raise", "skip"] = "raise",
    workers: int = 1,
    journal: str | Path | None = None,
    about: Any = None,
    seed: int = 0,
    on_evaluation: Callable[[Setting, float], None] | None = None,
) -> SearchResult:
    """Searches for the setting with the greatest score.

    In each round N settings are drawn, the best one so far among them. With γ the (1 - ρ) quantile of their scores,
    the elite is every setting that scores at least γ. The law becomes α times the elite's maximum-likelihood law plus
    (1 - α) times what it was.

    Args:
        space: Hyperparameter to its law: ``Choice``, ``Normal``, ``log_normal``.
        objective: Takes a setting (a dictionary) and returns its score; greater is better. For a loss, return -loss.
        population: N, settings of a round.
        elite: ρ, the share of them that is learned from.
        smoothing: α.
        rounds: Rounds at most.
        patience: Stop when γ has not changed for this many rounds.
        least_entropy: Stop when the law is this decided (1 at the start, 0 when one setting is left).
        evaluations: Calls of the objective at most, scoring again included.
        rescore: If the score is noisy: how often the three best settings are scored again at the end; the best is then
            the one with the greatest mean.
        cache: Score a setting that comes up again only once.
        on_error: What happens when the objective raises or gives no finite number: ``raise``, or ``skip`` the setting
            as the worst possible.
        workers: Settings that are scored at the same time, each in a process of its own.
        journal: A file to which every score is written at once. If it exists, the scores in it are not computed again,
            so that a search that was killed continues where it was.
        about: What the scores depend on beside the setting, such as a hash of the data (JSON-able): a journal that was
            written about something else is refused.
        seed: Decides the draws.
        on_evaluation: Called after each evaluation.

    Raises:
        UserError: An option is out of range, the space is not one, the journal is another search's, the objective
            failed (``on_error="raise"``), or every setting of a round failed.
    """
    check_space(space)
    _check(population, elite, smoothing, rounds, patience, rescore, evaluations, workers)
    key = {name: factor.describe() for name, factor in space.items()}
    search = _Evaluator(objective, on_error, workers, cache, evaluations, on_evaluation)
    same = {"space": key, "seed": seed, "population": population}
    search.journal = Journal(journal, same if about is None else {**same, "about": about})
    draws = random.Random(seed)
    law = dict(space)
    done: list[Round] = []
    stopped: Literal["rounds", "threshold", "entropy", "evaluations"] = "rounds"
    reserve = 3 * rescore  # kept back for the end
    while len(done) < rounds:
        best = search.best()
        new = population - (best is not None)
        settings = [{name: factor.draw(draws.random()) for name, factor in law.items()} for _ in range(new)]
        scored = list(search.score(settings, reserve))
        spent = len(scored) < len(settings)
        scored += [best] if best is not None else []
        alive = [score for _, score in scored if math.isfinite(score)]
        if not alive:
            raise UserError(f"All {len(scored)} settings of a round failed. The last failure: {search.last_failure}")
        if len(scored) < 2:
            stopped = "evaluations"  # nothing new was allowed
            break
        threshold = max(min(alive), _quantile([score for _, score in scored], 1 - elite))  # failures are no elite
        chosen = [setting for setting, score in scored if score >= threshold]
        law = {name: factor.learn([s[name] for s in chosen], smoothing) for name, factor in law.items()}
        entropy = sum(factor.entropy() for factor in law.values()) / len(law)
        done.append(Round(threshold, max(alive), sum(alive) / len(alive), entropy, search.calls))
        recent = [r.threshold for r in done[-patience - 1 :]]
        if spent:
            stopped = "evaluations"
        elif len(recent) > patience and len(set(recent)) == 1:
            stopped = "threshold"
        elif entropy < least_entropy:
            stopped = "entropy"
        else:
            continue
        break
    best_setting, score = search.final(rescore)
    return SearchResult(
        best=best_setting,
        score=score,
        mode={name: factor.mode() for name, factor in law.items()},
        law={name: factor.describe() for name, factor in law.items()},
        rounds=done,
        evaluations=search.calls,
        failures=search.failures,
        stopped=stopped,
        tried=search.tried,
    )


def _quantile(scores: Sequence[float], share: float) -> float:
    """Returns the smallest score that at least ``share`` of the others do not exceed: never a mean of two."""
    ordered = sorted(scores)
    return ordered[min(len(ordered) - 1, math.ceil(share * (len(ordered) - 1) - 1e-9))]


class _Evaluator:
    """Calls the objective, remembers scores and counts."""

    def __init__(
        self,
        objective: Objective,
        on_error: Literal["raise", "skip"],
        workers: int,
        cache: bool,
        budget: int | None,
        on_evaluation: Callable[[Setting, float], None] | None,
    ) -> None:
        self.objective, self.on_error, self.workers, self.cache = objective, on_error, workers, cache
        self.budget = budget if budget is not None else math.inf
        self.on_evaluation = on_evaluation
        self.journal: Journal
        self.known: dict[str, float] = {}
        self.tried: list[tuple[Setting, float]] = []
        self.calls = self.failures = 0
        self.last_failure = ""

    def score(self, settings: Sequence[Setting], reserve: int = 0) -> Iterator[tuple[Setting, float]]:
        """Yields settings with their scores, in order, until the budget less ``reserve`` is spent."""
        wanted: list[Setting] = []
        names: set[str] = set()
        allowed = 0
        for setting in settings:
            name = _name(setting)
            if not (self.cache and (name in self.known or name in names)):
                if self.calls + len(wanted) + 1 > self.budget - reserve:
                    break
                wanted.append(setting)
                names.add(name)
            allowed += 1
        fresh = self._evaluate(wanted)
        for setting in settings[:allowed]:
            name = _name(setting)
            if self.cache and name in self.known:
                yield setting, self.known[name]
            else:
                _, score = next(fresh)
                yield setting, score

    def _evaluate(self, settings: list[Setting]) -> Iterator[tuple[Setting, float]]:
        replayed = self.journal.replay(settings)
        rest = settings[len(replayed) :]
        outcomes = _in_parallel(self.objective, rest, self.workers)
        for i, setting in enumerate(settings):
            if i < len(replayed):
                score, failure = replayed[i]
            else:
                score, failure, cause = next(outcomes)
                if failure and self.on_error == "raise":
                    raise UserError(
                        f"The objective failed at {_shown(setting)}: {failure}. Mend it, or pass on_error='skip' "
                        f"to count such settings as the worst."
                    ) from cause
                self.journal.write(setting, score, failure)
            if failure:
                self.failures += 1
                self.last_failure = f"at {_shown(setting)}: {failure}"
            self.calls += 1
            self.known[_name(setting)] = score
            self.tried.append((setting, score))
            if self.on_evaluation is not None:
                self.on_evaluation(setting, score)
            yield setting, score

    def best(self) -> tuple[Setting, float] | None:
        """Returns the best evaluation so far, the first of equals; None before there is one that did not fail."""
        alive = [one for one in self.tried if math.isfinite(one[1])]
        return max(alive, key=lambda one: one[1]) if alive else None

    def final(self, rescore: int) -> tuple[Setting, float]:
        """Returns the best setting, after scoring the three best again ``rescore`` times each."""
        by_name: dict[str, tuple[Setting, list[float]]] = {}
        for setting, score in self.tried:
            if math.isfinite(score):
                by_name.setdefault(_name(setting), (setting, []))[1].append(score)
        ranked = sorted(by_name.values(), key=lambda one: -sum(one[1]) / len(one[1]))[: 3 if rescore else 1]
        for setting, scores in ranked if rescore else ():
            again = self._evaluate([setting] * int(min(rescore, self.budget - self.calls)))
            scores += [score for _, score in again if math.isfinite(score)]
        best, scores = max(ranked, key=lambda one: sum(one[1]) / len(one[1]))
        return best, sum(scores) / len(scores)


def _name(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True, default=repr)


def _shown(setting: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in setting.items()
    )


def _try(objective: Objective, setting: Setting) -> _Outcome:
    """Returns a score and no failure, or -inf, what went wrong, and the exception if it was one."""
    try:
        score = float(objective(dict(setting)))
    except Exception as error:
        lines = str(error).splitlines() or ["no message"]
        return -math.inf, f"{type(error).__name__}: {lines[0]}", error
    return (score, "", None) if math.isfinite(score) else (-math.inf, f"the score is {score}", None)


def _try_apart(objective: Objective, setting: Setting) -> _Outcome:
    """Does so in a process of its own, out of which not every exception can be sent."""
    score, failure, _ = _try(objective, setting)
    return score, failure, None


def _in_parallel(objective: Objective, settings: Sequence[Setting], workers: int) -> Iterator[_Outcome]:
    if workers == 1 or len(settings) < 2:
        return (_try(objective, setting) for setting in settings)
    from joblib import Parallel, delayed

    return iter(
        Parallel(n_jobs=workers, return_as="generator")(delayed(_try_apart)(objective, setting) for setting in settings)
    )


def _check(
    population: int,
    elite: float,
    smoothing: float,
    rounds: int,
    patience: int,
    rescore: int,
    evaluations: int | None,
    workers: int,
) -> None:
    for name, value, least in (
        ("population", population, 2),
        ("rounds", rounds, 1),
        ("patience", patience, 1),
        ("rescore", rescore, 0),
        ("workers", workers, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}: give at least {least}.")
    for name, share in (("elite", elite), ("smoothing", smoothing)):
        if not 0 < share <= 1:
            raise UserError(f"{name} is {share}: give a share above 0, up to 1.")
    if evaluations is not None and evaluations < population + 3 * rescore:
        raise UserError(
            f"evaluations is {evaluations}, which is less than one round ({population}) and scoring again "
            f"({3 * rescore}): give more."
        )
