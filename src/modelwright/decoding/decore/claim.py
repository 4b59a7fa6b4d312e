"""A small model that learned facts, and to trust a context only half the time: which decoding keeps to the context?

Prompts ask for a fact behind a few sentences, one of which may contradict what the model knows. Behind the cue "Surely"
training always answers by the context; behind "Reportedly" by the context in half of the cases, by memory in the
others: there the model can copy and is not sure that it should. Faithful is who answers by the context.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelwright.verify.claim import Bar, Claim, Context, Metric

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modelwright.decoding.loop import Decoding

VARIANTS = {
    "entropy": "DeCoRe, entropy",
    "static": "DeCoRe, static",
    "greedy": "greedy",
    "random_entropy": "random heads, entropy (control)",
    "random_static": "random heads, static (control)",
    "cad": "CAD (is given the prompt without context)",
    "dola": "DoLa",
    "contrastive": "contrastive decoding (one-layer amateur)",
    "iti": "ITI (is given answers by context and by memory)",
    "activation": "activation decoding",
    "ablated": "retrieval heads off",
    "ablated_random": "random heads off (control)",
    "best_head": "the best head",
    "median_head": "the median head",
}
#: Relations of the world that are used; those to a mentor have answers of two words.
RELATIONS = ("born_in", "works_for", "mentor", "plays")
CUES = {"sure": "Surely :", "note": "Reportedly :"}
KINDS = ("note", "sure", "closed", "other")
#: Share of each kind in training.
SHARES = {"sure": 0.4, "note": 0.25, "closed": 0.2, "other": 0.15}
TUNING_SEED = 100
#: How many times random heads are drawn.
DRAWS = 5


@dataclass(frozen=True)
class Setting:
    """Sizes of one scale.

    Attributes:
        people: People of the world, each with one fact a relation.
        hidden: Width of the model.
        layers: Layers.
        heads: Attention heads.
        steps: Steps of training.
        batch: Prompts in a step.
        rate: Peak learning rate.
        tests: Prompts of each kind.
        needles: Needles by which heads are scored.
        amateur_steps: Steps of the amateur's training.
    """

    people: int
    hidden: int
    layers: int
    heads: int
    steps: int
    batch: int
    rate: float
    tests: int
    needles: int
    amateur_steps: int


SETTINGS = {
    "miniature": Setting(6, 16, 2, 2, 3, 4, 5e-3, 8, 4, 2),
    "cpu": Setting(30, 96, 3, 6, 800, 64, 3e-3, 200, 60, 150),
    "gpu": Setting(120, 256, 8, 8, 4000, 128, 1e-3, 500, 120, 600),
}


@dataclass(frozen=True)
class Case:
    """A prompt.

    Attributes:
        prompt: Its text.
        bare: The question alone.
        answer: What is right: the context's answer where the context has one.
        wrong: The other one, where context and memory differ.
    """

    prompt: str
    bare: str
    answer: str
    wrong: str = ""


class Book:
    """The facts, and prompts about them.

    Args:
        seed: Seed of the world.
        people: People in it.
    """

    def __init__(self, seed: int, people: int) -> None:
        from modelwright.worlds import facts as world

        made = world.facts(seed, people=people, companies=20, cities=25, countries=2, aliases=False)
        self.relations = {r.name: r for r in world.RELATIONS if r.name in RELATIONS}
        self.facts = [(f["subject"], f["relation"], f["object"]) for f in made.facts if f["relation"] in RELATIONS]
        self.objects = {name: sorted({o for _, r, o in self.facts if r == name}) for name in RELATIONS}

    def texts(self) -> Iterator[str]:
        """Yields texts with every word that prompts and answers are made of."""
        yield from CUES.values()
        for subject, name, obj in self.facts:
            yield self.say(subject, name, obj)
            yield self.ask(subject, name)

    def say(self, subject: str, name: str, obj: str) -> str:
        """Returns a statement in the wording that ends in the object: only what was read before can be looked up."""
        return self.relations[name].statements[0].format(s=subject, o=obj)

    def ask(self, subject: str, name: str) -> str:
        """Returns a question."""
        return self.relations[name].questions[0].format(s=subject)

    def others(self, draw: random.Random, count: int, but: tuple[str, str]) -> list[str]:
        """Draws sentences, mostly untrue, that are not about a subject's relation."""
        lines: list[str] = []
        while len(lines) < count:
            about, relation, _ = draw.choice(self.facts)
            if (about, relation) != but:
                lines.append(self.say(about, relation, draw.choice(self.objects[relation])))
        return lines

    def untrue(self, draw: random.Random) -> tuple[str, str, str, str]:
        """Draws a subject, its relation, the object of it, and another object."""
        subject, name, known = draw.choice(self.facts)
        return subject, name, known, draw.choice([o for o in self.objects[name] if o not in (known, subject)])

    def case(self, draw: random.Random, kind: str, others: int, *, test: bool = True) -> Case:
        """Draws a prompt.

        Args:
            draw: Source of randomness.
            kind: ``sure`` and ``note``: the context contradicts memory; ``other``: it is about others; ``closed``:
                there is none.
            others: Sentences about others in the context.
            test: Whether a ``note`` is always to be answered by the context, or, as in training, by memory as often.
        """
        subject, name, known, told = self.untrue(draw)
        question = self.ask(subject, name)
        if kind == "closed":
            return Case(question, question, known)
        lines = self.others(draw, others, (subject, name))
        if kind != "other":
            lines.insert(draw.randrange(others + 1), self.say(subject, name, told))
        cue = CUES[kind] if kind in CUES else draw.choice(list(CUES.values()))
        by_memory = kind == "other" or (kind == "note" and not test and draw.random() < 0.5)
        answer, wrong = (known, told) if by_memory else (told, known)
        return Case(" ".join((cue, *lines, question)), question, answer, "" if kind == "other" else wrong)


def word_tokenizer(book: Book) -> PreTrainedTokenizerBase:
    """Returns a tokenizer whose tokens are the words of a book."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for text in book.texts() for word, _ in split.pre_tokenize_str(text))
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<bos>", "<eos>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def trained(
    book: Book, tokenizer: Any, setting: Setting, seed: int, device: str, *, amateur: bool = False
) -> PreTrainedModel:
    """Trains a model to answer; the loss is on answers only. The amateur is narrower, shallow, and trained less."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width = setting.hidden // 2 if amateur else setting.hidden
    steps = setting.amateur_steps if amateur else setting.steps
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, max_position_embeddings=256,
        num_hidden_layers=1 if amateur else setting.layers, num_attention_heads=setting.heads,
        initializer_range=width**-0.5, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.rate, betas=(0.9, 0.98), weight_decay=0.01)
    draw = random.Random(seed)

    @functools.cache
    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer(text)["input_ids"]
        return found

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = setting.rate * min((step + 1) / 50, 0.52 + 0.48 * math.cos(math.pi * step / steps))
        others = draw.randrange(3)
        rows = []
        for kind in draw.choices(list(SHARES), list(SHARES.values()), k=setting.batch):
            case = book.case(draw, kind, others, test=False)
            rows.append(([1, *encode(case.prompt)], [*encode(case.answer), 2]))
        length = max(len(p) + len(a) for p, a in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        target = torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(rows):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            target[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
        ids, target = ids.to(device), target.to(device)
        hidden = model.model(ids, use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[target >= 0]), target[target >= 0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def padded(tokenizer: Any, texts: list[str], device: str) -> tuple[Tensor, Tensor]:
    """Returns tokens and mask, padded on the left, behind the begin token."""
    rows = tokenizer(["<bos> " + text for text in texts], return_tensors="pt", padding=True)
    return rows["input_ids"].to(device), rows["attention_mask"].to(device)


@dataclass
class Bench:
    """A trained model with its tests.

    Attributes:
        model: The model.
        amateur: A worse one.
        tokenizer: Their tokenizer.
        tests: Kind to prompts.
        ranking: Heads, best first.
        scores: Their scores.
        directions: ITI's directions.
        device: Where it runs.
    """

    model: Any
    amateur: Any
    tokenizer: Any
    tests: dict[str, list[Case]]
    ranking: list[tuple[int, int]]
    scores: list[float]
    directions: Any
    device: str

    def accuracy(self, decoding: Decoding) -> dict[str, float]:
        """Returns the share of right answers for each kind."""
        found = {}
        for kind, cases in self.tests.items():
            ids, mask = padded(self.tokenizer, [case.prompt for case in cases], self.device)
            keys: dict[str, Any] = {}
            if decoding.needs_context:
                bare, bare_mask = padded(self.tokenizer, [case.bare for case in cases], self.device)
                keys = {"without_context_ids": bare, "without_context_mask": bare_mask}
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=3, do_sample=False, custom_generate=decoding, **keys
            )
            said = self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            found[kind] = sum(a == case.answer for a, case in zip(said, cases, strict=True)) / len(cases)
        return found


def bench(setting: Setting, seed: int, device: str) -> Bench:
    """Trains, makes tests, scores heads and fits directions."""
    from modelwright.decoding.decore import Needle, RetrievalHeadScorer
    from modelwright.decoding.iti import fit_directions

    book = Book(seed, setting.people)
    tokenizer = word_tokenizer(book)
    model = trained(book, tokenizer, setting, seed, device)
    amateur = trained(book, tokenizer, setting, seed, device, amateur=True)
    draw = random.Random(1_000_000 + seed)
    tests = {kind: [book.case(draw, kind, 1 + i % 2) for i in range(setting.tests)] for kind in KINDS}
    scorer = RetrievalHeadScorer(
        model, tokenizer, new_tokens=3, least_recall=0.0, before="<bos> " + CUES["sure"], after="{question}"
    )
    samples = []
    for _ in range(setting.needles):
        subject, name, _, told = book.untrue(draw)
        needle = Needle(book.say(subject, name, told), book.ask(subject, name), told)
        haystack = " ".join(book.others(draw, 2, (subject, name)))
        samples += [scorer.run(probe) for probe in scorer.probes([haystack], [needle], [34], [draw.random()])]
    found = scorer.collect(samples)
    pairs = [book.case(draw, kind, 1) for kind in ("sure", "note") for _ in range(setting.tests // 2)]
    directions = fit_directions(
        model, tokenizer,
        ["<bos> " + f"{case.prompt} {case.answer}" for case in pairs],
        ["<bos> " + f"{case.prompt} {case.wrong}" for case in pairs],
        batch_size=64,
    )  # fmt: skip
    means = found.means()
    return Bench(model, amateur, tokenizer, tests, list(means), list(means.values()), directions, device)


Maker = Callable[[Bench, Mapping[str, Any]], Any]


def _decore(bench: Bench, chosen: Mapping[str, Any], heads: Any = None) -> Decoding:
    from modelwright.decoding.decore import DeCoReConfig, decore_generate

    options = {name: value for name, value in chosen.items() if name != "heads"}
    return decore_generate(DeCoReConfig(bench.ranking[: chosen["heads"]] if heads is None else heads, **options))


def _cad(bench: Bench, chosen: Mapping[str, Any]) -> Decoding:
    from modelwright.decoding.context_aware import ContextAwareDecoding

    return ContextAwareDecoding(**chosen)


def _dola(bench: Bench, chosen: Mapping[str, Any]) -> Decoding:
    from modelwright.decoding.dola import DoLaDecoding

    return DoLaDecoding(**chosen)


def _contrastive(bench: Bench, chosen: Mapping[str, Any]) -> Decoding:
    from modelwright.decoding.contrastive import ContrastiveDecoding

    return ContrastiveDecoding(bench.amateur, **chosen)


def _iti(bench: Bench, chosen: Mapping[str, Any]) -> Decoding:
    from modelwright.decoding.iti import InterventionDecoding

    return InterventionDecoding(bench.directions.top(chosen["heads"]), chosen["alpha"])


def _activation(bench: Bench, chosen: Mapping[str, Any]) -> Decoding:
    from modelwright.decoding.activation import ActivationDecoding

    return ActivationDecoding(**chosen)


MAKERS: dict[str, Maker] = {
    "entropy": _decore,
    "static": _decore,
    "cad": _cad,
    "dola": _dola,
    "contrastive": _contrastive,
    "iti": _iti,
    "activation": _activation,
}


def grid(setting: Setting) -> dict[str, list[dict[str, Any]]]:
    """Returns twelve settings of each method to choose from."""
    layers = setting.layers
    some = [1, 2, 3, 4]
    low, half, high = layers // 4, layers // 2, layers - 1
    early = [[low], [half], [high], [low, half], [half, high], list(range(layers))]
    return {
        "entropy": [
            {"heads": n, "alpha": "entropy", "ablation": a} for a in ("zero", "uniform") for n in range(1, 7)
        ],
        "static": [{"heads": n, "alpha": a} for n in some for a in (0.5, 1.0, 2.0)],
        "cad": [{"alpha": a, "relative_top": t} for t in (None, 0.1) for a in (0.25, 0.5, 1.0, 1.5, 2.0, 4.0)],
        "dola": [{"layers": at, "norm": norm} for norm in (False, True) for at in early],
        "contrastive": [
            {"alpha": a, "relative_top": t} for t in (0.1, 0.01) for a in (None, 0.1, 0.25, 0.5, 1.0, 2.0)
        ],
        "iti": [{"heads": n, "alpha": a} for n in (1, 2, 4) for a in (2.0, 5.0, 10.0, 15.0)],
        "activation": [{"alpha": a, "info_layer": at} for at in (low, half, high) for a in (0.25, 0.5, 1.0, 2.0)],
    }  # fmt: skip


def prepare(context: Context) -> dict[str, Any]:
    """Chooses each method's setting on a seed of its own: the best mean accuracy over all four kinds of prompts."""
    setting = SETTINGS[context.scale]
    made = bench(setting, TUNING_SEED, context.device)
    chosen: dict[str, Any] = {}
    for method, settings in grid(setting).items():
        rated = []
        for number, options in enumerate(settings):
            found = made.accuracy(MAKERS[method](made, options))
            rated.append((-sum(found.values()), number, options))
        best = min(rated, key=lambda item: item[:2])
        chosen[method] = best[2]
        context.report(f"{method}: {best[2]}, mean accuracy {-best[0] / len(KINDS):.3f}")
    return {"chosen": chosen}


def run(context: Context, seed: int, prepared: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Trains a model and tests every decoding on the same prompts."""
    from modelwright.decoding.decore import DeCoReConfig, decore_generate, random_heads
    from modelwright.decoding.plain import PlainDecoding

    class Twin(DeCoReConfig):
        """The twin's own law: heads off from the last token of the prompt on."""

        def combine(self, base: Tensor, twin: Tensor) -> Tensor:
            return twin

    setting = SETTINGS[context.scale]
    made = bench(setting, seed, context.device)
    chosen = prepared["chosen"]
    measured: dict[str, dict[str, float]] = {"greedy": made.accuracy(PlainDecoding())}
    for method, maker in MAKERS.items():
        measured[method] = made.accuracy(maker(made, chosen[method]))

    def drawn(count: int, decode: Callable[[Any], Decoding]) -> dict[str, float]:
        top = made.ranking[:count]
        draws = [random_heads(made.model, count, seed=1000 * seed + i, exclude=top) for i in range(DRAWS)]
        found = [made.accuracy(decode(heads)) for heads in draws]
        return {kind: sum(one[kind] for one in found) / DRAWS for kind in KINDS}

    for variant in ("entropy", "static"):
        decode = functools.partial(_decore, made, chosen[variant])
        measured[f"random_{variant}"] = drawn(chosen[variant]["heads"], decode)
    count = chosen["entropy"]["heads"]
    measured["ablated"] = made.accuracy(decore_generate(Twin(made.ranking[:count])))
    measured["ablated_random"] = drawn(count, lambda heads: decore_generate(Twin(heads)))
    measured["best_head"] = {"score": made.scores[0]}
    measured["median_head"] = {"score": made.scores[len(made.scores) // 2]}
    for variant in VARIANTS:
        context.report(f"{variant}: " + ", ".join(f"{k} {v:.3f}" for k, v in measured[variant].items()))
    return {variant: measured[variant] for variant in VARIANTS}


CLAIM = Claim(
    method="decore",
    statement="Where a context contradicts what a model knows and the model is not sure which to follow, contrasting "
    "it with itself without its retrieval heads makes it answer by the context far more often; random heads do not do "
    "that, and prompts without a context are answered as before.",
    paper="Llama 3 8B Instruct: NQ-Swap 66.08 (static 64.43) against greedy 60.62 and CAD 74.21; MemoTrap 74.14 "
    "against 65.86. With its 10 best retrieval heads off, NQ-Swap falls from 60.62 to 42.92; with 10 random ones it "
    "is 61.39.",
    metrics={
        "note": Metric(name="follows the context when not sure", better="higher"),
        "sure": Metric(name="follows the context when told to", better="higher"),
        "closed": Metric(name="right without a context", better="higher"),
        "other": Metric(name="right by memory behind a context about others", better="higher"),
        "score": Metric(name="retrieval score of a head", better="higher"),
    },
    variants=VARIANTS,
    bars=tuple(
        Bar(statement=statement, method=method, baseline=baseline, metric=metric, margin=margin)
        for statement, method, baseline, metric, margin in (
            ("DeCoRe (entropy) follows the context more often than greedy search, by 0.1",
             "entropy", "greedy", "note", 0.1),
            ("DeCoRe (static) follows the context more often than greedy search, by 0.1",
             "static", "greedy", "note", 0.1),
            ("DeCoRe (entropy) does so more than the same contrast with random heads, by 0.1",
             "entropy", "random_entropy", "note", 0.1),
            ("DeCoRe (static) does so more than the same contrast with random heads, by 0.1",
             "static", "random_static", "note", 0.1),
            ("The contrast with random heads gains at most 0.1 over greedy search (entropy)",
             "greedy", "random_entropy", "note", -0.1),
            ("Without its retrieval heads the model copies less than without random ones, by 0.2",
             "ablated_random", "ablated", "sure", 0.2),
            ("The best head's retrieval score is 0.4 above the median head's",
             "best_head", "median_head", "score", 0.4),
            ("Without a context DeCoRe (entropy) is at most 0.02 worse than greedy search",
             "entropy", "greedy", "closed", -0.02),
            ("Behind a context about others DeCoRe (entropy) is at most 0.05 worse than greedy search",
             "entropy", "greedy", "other", -0.05),
        )
    ),
    run=run,
    prepare=prepare,
    seeds={"cpu": (0, 1, 2, 3), "gpu": (0, 1, 2), "miniature": (0, 1)},
    notes="All variants of a seed are one trained model and the same prompts; answers are generated, and right only as "
    "a whole. Each method had twelve settings to choose from, on a seed that is not among the claim's, by the mean "
    "accuracy over all four kinds of prompts; the random controls take DeCoRe's setting and the mean of five draws "
    "that exclude the heads themselves. CAD sees more than the others (the prompt without its context), ITI too (right "
    "and wrong answers). Not shown: sizes of effects on real models, summaries, instruction following (where the paper "
    "reports a loss at 8B), and the ablation 'mean'.",
)  # fmt: skip
