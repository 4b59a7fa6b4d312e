"""Needles in haystacks: what a model finds again of a long prompt, by length and by depth.

The tasks are those of the needle tests and of RULER, on text that is generated or the user's own; the wording is ours,
so numbers are to be compared within this file, not with published ones.

- ``single``: one key has a number; the question is which.
- ``multikey``: the same among other keys with numbers.
- ``multi``: one key has several numbers; all are wanted.
- ``variables``: a chain of assignments beside another; which variables hold the first value?
- ``multiquery``: several keys have a number each; all are wanted.
- ``qa``: a paragraph on a person among paragraphs on others; a question that only it answers.
- ``words``: a list of words, of which a few are common; which? It has no depth.
- ``frequent``: a list of made-up words whose counts fall by Zipf's law (exponent 2); which lead? No depth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from modelwright.errors import UserError, did_you_mean
from modelwright.worlds.base import Draw

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = ("single", "multikey", "multi", "multiquery", "variables", "qa", "words", "frequent")
#: Tasks whose answer stands all over the text.
WITHOUT_DEPTH = ("words", "frequent")
#: A length is effective when at least this share is found at it; near what RULER takes (85.6%, Llama 2 at 4K).
THRESHOLD = 0.85

# fmt: off
_KEYS = (
    "harbour", "lantern", "meadow", "orchard", "glacier", "compass", "violin", "pepper", "walnut",
    "saddle", "anchor", "thimble", "kettle", "falcon", "copper", "velvet", "marble", "ribbon",
    "canyon", "cedar", "basket", "candle", "hammer", "island", "jacket", "ladder", "mirror",
    "needle", "oyster", "parcel", "quarry", "rocket", "saffron", "tunnel", "umbrella", "valley",
    "wagon", "yarrow", "zither", "barley", "cobalt", "dagger", "ember", "fiddle", "garnet",
    "hazel", "indigo",
)
# fmt: on
_WHO = "the baker|a tired clerk|my neighbour|the old captain|a young painter|our teacher|the night guard|a shy student"
_DID = "walked past|looked at|wrote about|talked of|forgot|remembered|drew a picture of|asked for|laughed about|sold"
_WHAT = "the river|a wooden chair|the market|a quiet street|the morning train|an empty bottle|a letter|the new bridge"
_WHEN = "before breakfast|on a rainy day|late in spring|after the concert|without a word|once again|for no reason|twice"
_FILLER = tuple(part.split("|") for part in (_WHO, _DID, _WHAT, _WHEN))
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Needle:
    """One test.

    Attributes:
        task: One of :data:`TASKS`.
        length: Tokens that were asked for, the answer's included.
        depth: Where the (first) needle stands, 0 at the start, 1 at the end; None for a task without depth.
        trial: Number of the trial; trials of all lengths and depths differ in everything drawn.
        prompt: The text.
        answers: What must be in the completion.
        tokens: Tokens of the prompt, special ones not counted.
    """

    task: str
    length: int
    depth: float | None
    trial: int
    prompt: str
    answers: tuple[str, ...]
    tokens: int


@dataclass(frozen=True)
class _Text:
    """A test without its haystack: what stands before, in, and after it."""

    before: str
    needles: tuple[tuple[float, str], ...]  # depth, sentence
    after: str
    answers: tuple[str, ...]
    filler: Callable[[int], list[str]]
    joint: str = " "


def make_needle(
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str = "single",
    length: int,
    depth: float | None = 0.5,
    trial: int = 0,
    seed: int = 0,
    needles: int = 4,
    haystack: Sequence[str] = (),
    new_tokens: int = 64,
    chat: bool = False,
) -> Needle:
    """Makes one test that fills a length as far as whole sentences do.

    Args:
        tokenizer: Counts tokens.
        task: One of :data:`TASKS`.
        length: Tokens of prompt and answer together.
        depth: Where the needle stands; further ones of ``multi``, ``multiquery`` and ``variables`` follow evenly up to
            the end. Ignored by ``words`` and ``frequent``.
        trial: Number of the trial.
        seed: Seed of all trials.
        needles: Numbers (``multi``), keys (``multikey``, ``multiquery``), links of the chain (``variables``), words
            that are asked for (``words``, ``frequent``).
        haystack: Texts to hide needles in; generated sentences by default. They are read from a random place on, and
            from the beginning again where they are too short.
        new_tokens: Room for the answer.
        chat: Leave out the beginning of the answer, which a model that is not tuned to answer needs.

    Raises:
        UserError: The task is unknown, or nothing fits the length.
    """
    if task not in TASKS:
        raise UserError(f"There is no needle task '{task}': {did_you_mean(task, TASKS)}")
    if needles < 1 or (depth is not None and not 0 <= depth <= 1):
        raise UserError(f"needles is {needles} and depth {depth}: give at least 1, and a depth from 0 to 1.")
    depth = None if task in WITHOUT_DEPTH else 0.5 if depth is None else depth
    draw = Draw(seed, f"needles/{task}/{length}/{depth}/{trial}")
    sentences = _haystack(haystack, draw)
    text = _TASKS[task](draw, depth if depth is not None else 0.0, needles, sentences)
    after = text.after.rpartition("\n")[0] if chat else text.after
    budget = length - new_tokens

    def counts(parts: list[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"]]

    fixed = sum(counts([text.before + after, *(text.joint + sentence for _, sentence in text.needles)]))
    room = budget - fixed
    if room >= 0:
        filler, sizes = _fill(text, room, counts)
        while True:
            prompt = text.before + text.joint.join(_placed(text.needles, filler, sizes)) + after
            (tokens,) = counts([prompt])
            if tokens <= budget:
                return Needle(task, length, depth, trial, prompt, text.answers, tokens)
            if not filler:
                break
            # Tokens at the joints cost more or less than in each sentence alone; drop what is too much.
            each = max(1, tokens // (len(filler) + 1))
            filler = filler[: -max(1, (tokens - budget) // each)]
    raise UserError(
        f"A '{task}' test does not fit {length} tokens, of which {new_tokens} are kept for the answer: use a greater "
        f"length or fewer needles."
    )


def _fill(text: _Text, room: int, counts: Callable[[list[str]], list[int]]) -> tuple[list[str], list[int]]:
    """Returns about as many sentences as fill the room, and the tokens of each, counted alone."""
    number = 64
    while True:
        filler = text.filler(number)
        sizes = counts([text.joint + sentence for sentence in filler])
        if sum(sizes) > room:
            fitting = sum(total <= room for total in accumulate(sizes))
            # The list of words is another one for each number of words.
            return (filler if text.needles else text.filler(fitting))[:fitting], sizes
        number *= 2


def _placed(needles: Sequence[tuple[float, str]], filler: list[str], sizes: list[int]) -> list[str]:
    """Puts each needle between the sentences where its share of the haystack's tokens is before it."""
    if not needles:
        return filler
    ends = [0, *accumulate(sizes[: len(filler)])]
    placed = list(filler)
    for depth, sentence in sorted(needles, key=lambda needle: -needle[0]):
        at = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
        placed.insert(at, sentence)
    return placed


def _haystack(texts: Sequence[str], draw: Draw) -> Callable[[int], list[str]]:
    sentences = [s.strip() for text in texts for s in _SENTENCE.split(text) if s.strip()]
    if texts and not sentences:
        raise UserError("The haystack has no text in it: give files with sentences.")
    made: list[str] = []
    start = draw.below(len(sentences)) if sentences else 0

    def more(size: int) -> list[str]:
        while len(made) < size:
            if sentences:
                made.append(sentences[(start + len(made)) % len(sentences)])
            else:
                words = " ".join(draw.choice(part) for part in _FILLER)
                made.append(words[0].upper() + words[1:] + ".")
        return made[:size]

    return more


def _number(draw: Draw) -> str:
    return str(draw.between(1_000_000, 9_999_999))


def _spread(depth: float, needles: int) -> list[float]:
    return [depth + (1 - depth) * i / needles for i in range(needles)]


def _single(draw: Draw, depth: float, needles: int, filler: Callable[[int], list[str]]) -> _Text:
    return _multikey(draw, depth, 1, filler)


def _multikey(draw: Draw, depth: float, needles: int, filler: Callable[[int], list[str]]) -> _Text:
    if needles > len(_KEYS):
        raise UserError(f"There are {len(_KEYS)} keys, fewer than {needles}: use fewer needles.")
    keys = draw.sample(_KEYS, needles)
    numbers = [_number(draw) for _ in keys]
    depths = [depth, *(draw.uniform() for _ in keys[1:])]
    said = tuple((at, f"The code of the {key} is {number}.") for at, key, number in zip(depths, keys, numbers))
    return _Text(
        "Read the text and keep every code in it in mind.\n\n",
        said,
        f"\n\nQuestion: What is the code of the {keys[0]}?\nAnswer: The code of the {keys[0]} is",
        (numbers[0],),
        filler,
    )


def _multi(draw: Draw, depth: float, needles: int, filler: Callable[[int], list[str]]) -> _Text:
    key = draw.choice(_KEYS)
    numbers = [_number(draw) for _ in range(needles)]
    said = tuple((at, f"One code of the {key} is {n}.") for at, n in zip(_spread(depth, needles), numbers))
    return _Text(
        "Read the text and keep every code in it in mind.\n\n",
        said,
        f"\n\nQuestion: What are all {needles} codes of the {key}?\nAnswer: The codes of the {key} are",
        tuple(numbers),
        filler,
    )


def _multiquery(draw: Draw, depth: float, needles: int, filler: Callable[[int], list[str]]) -> _Text:
    if needles > len(_KEYS):
        raise UserError(f"There are {len(_KEYS)} keys, fewer than {needles}: use fewer needles.")
    keys = draw.sample(_KEYS, needles)
    numbers = [_number(draw) for _ in keys]
    said = zip(_spread(depth, needles), keys, numbers)
    asked = ", ".join(f"the {key}" for key in keys)
    return _Text(
        "Read the text and keep every code in it in mind.\n\n",
        tuple((at, f"The code of the {key} is {number}.") for at, key, number in said),
        f"\n\nQuestion: What are the codes of {asked}?\nAnswer: The codes of {asked} are, in this order,",
        tuple(numbers),
        filler,
    )


def _name(draw: Draw) -> str:
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3)).capitalize()


def _qa(draw: Draw, depth: float, needles: int, filler: Callable[[int], list[str]]) -> _Text:
    who, town = f"{_name(draw)} {_name(draw)}", _name(draw)
    seed, made, taken = draw.below(2**31), list[str](), {who, town}

    def told(name: str, place: str, own: Draw) -> str:
        trade = own.choice(("baker", "surgeon", "pilot", "weaver", "judge", "sailor"))
        return f"{name} was born in {place}, became a {trade} and {own.choice(_FILLER[1])} {own.choice(_FILLER[2])}."

    def others(size: int) -> list[str]:
        while len(made) < size:
            own = Draw(seed, f"person/{len(made)}")
            name, place = f"{_name(own)} {_name(own)}", _name(own)
            while name in taken or place == town:
                name, place = f"{_name(own)} {_name(own)}", _name(own)
            taken.add(name)
            made.append(told(name, place, own))
        return made[:size]

    return _Text(
        "Read what is said of these people.\n\n",
        ((depth, told(who, town, draw)),),
        f"\n\nQuestion: In which town was {who} born?\nAnswer: {who} was born in",
        (town,),
        others,
    )


def _variables(draw: Draw, depth: float, needles: int, filler: Callable[[int], list[str]]) -> _Text:
    names: dict[str, None] = {}
    while len(names) < 2 * needles:
        names["".join(chr(ord("A") + draw.below(26)) for _ in range(5))] = None
    both = list(names)
    chains, values = (both[:needles], both[needles:]), (_number(draw), _number(draw))
    said = []
    for chain, value in zip(chains, values):
        sources = [value, *chain]
        said += [
            (at, f"Now {name} is set to {source}.")
            for at, name, source in zip(_spread(depth, needles), chain, sources, strict=False)
        ]
    return _Text(
        "Read the text and follow what each variable is set to.\n\n",
        tuple(said),
        f"\n\nQuestion: Which {needles} variables hold {values[0]}, directly or through others?\nAnswer: They are",
        tuple(chains[0]),
        filler,
    )


def _words(draw: Draw, depth: float, needles: int, filler: Callable[[int], list[str]]) -> _Text:
    if needles > len(_KEYS) // 2:
        raise UserError(f"There are words for {len(_KEYS) // 2} common ones, fewer than {needles}: use fewer needles.")
    words = draw.shuffled(_KEYS)
    common, rare = words[:needles], words[needles:]

    def listed(size: int) -> list[str]:
        # Two thirds of the list are the common words in turn, so each is far above every rare one.
        own = Draw(draw_seed, f"list/{size}")
        many = [common[i % needles] for i in range(2 * size // 3)]
        return own.shuffled([*many, *(rare[i % len(rare)] for i in range(size - len(many)))])

    draw_seed = draw.below(2**31)
    return _Text(
        "Here is a list of words; some are in it far more often than others.\n\n",
        (),
        f"\n\nQuestion: Which {needles} words are the most common in the list?\nAnswer: The most common words are",
        tuple(common),
        listed,
        joint=", ",
    )


def _frequent(draw: Draw, depth: float, needles: int, filler: Callable[[int], list[str]]) -> _Text:
    words: dict[str, None] = {}
    while len(words) < max(40, 4 * needles):
        words[_name(draw).lower()] = None
    ranked, seed = list(words), draw.below(2**31)

    def listed(size: int) -> list[str]:
        weights = [1 / rank**2 for rank in range(1, len(ranked) + 1)]
        counts = [int(size * weight / sum(weights)) for weight in weights]
        # Whoever is asked for must lead whoever is not, also in a short list; what rounding leaves goes to the rarest.
        many = [word for i, word in enumerate(ranked) for _ in range(counts[i] + 2 * (i < needles))]
        if size < 10 * needles:
            raise UserError(f"A list of {size} words is too short for {needles} frequent ones: use a greater length.")
        many += list(reversed(ranked[needles + 1 :]))[: max(0, size - len(many))]
        return Draw(seed, f"list/{size}").shuffled(many[:size])

    return _Text(
        "Here is a list of made-up words; few of them make up most of it.\n\n",
        (),
        f"\n\nQuestion: Which {needles} words are the most frequent in the list?\nAnswer: The most frequent words are",
        tuple(ranked[:needles]),
        listed,
        joint=", ",
    )


_TASKS: dict[str, Callable[[Draw, float, int, Callable[[int], list[str]]], _Text]] = {
    "single": _single,
    "multikey": _multikey,
    "multi": _multi,
    "multiquery": _multiquery,
    "variables": _variables,
    "qa": _qa,
    "words": _words,
    "frequent": _frequent,
}


def found(completion: str, answers: Sequence[str]) -> float:
    """Returns the share of answers that stand in a completion as words of their own, whatever their case."""
    hits = [bool(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", completion, re.IGNORECASE)) for answer in answers]
    return sum(hits) / len(hits)


def needle_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    tasks: Sequence[str] = ("single",),
    trials: int = 10,
    needles: int = 4,
    haystack: Sequence[str] = (),
    seed: int = 0,
    new_tokens: int = 64,
    chat: bool = False,
    batch_size: int = 1,
    generate_with: Callable[..., torch.Tensor] | None = None,
) -> Iterator[dict[str, Any]]:
    """Tests a model on a grid, greedily, and yields a row for each test.

    Args:
        model: A causal language model in evaluation mode, as it is: inside ``apply_string(model)``, STRING's.
        tokenizer: Its tokenizer.
        lengths: Tokens of prompt and answer, each at most the model's positions.
        depths: Places of the needle.
        tasks: Some of :data:`TASKS`.
        trials: Tests for each length and depth.
        needles: See :func:`make_needle`.
        haystack: See :func:`make_needle`.
        seed: See :func:`make_needle`; the same seed makes the same tests.
        new_tokens: Tokens of an answer at most.
        chat: Ask by the tokenizer's chat template.
        batch_size: Prompts at once.
        generate_with: In place of ``model.generate``, for a decoding method.

    Yields:
        The test's fields without prompt, with ``completion`` and ``found`` (share of the answers).

    Raises:
        UserError: A value makes no sense, or a length is beyond the model's positions.
    """
    from modelwright.decoding.generate import Sampling, chat_prompt, generate
    from modelwright.models.scoring import context_length

    longest = context_length(model)
    if not lengths or min(lengths) < 1 or trials < 1 or batch_size < 1 or new_tokens < 1 or not depths or not tasks:
        raise UserError("Give at least one length, depth and task; lengths, trials, batch size and answers from 1.")
    if longest is not None and max(lengths) > longest:
        raise UserError(f"A length of {max(lengths)} tokens is beyond the model's {longest} positions: use less.")
    special = tokenizer.num_special_tokens_to_add() if not chat else _chat_tokens(tokenizer)
    tests = []
    for task in tasks:
        for length in lengths:
            for depth in depths if task not in WITHOUT_DEPTH else (None,):
                for trial in range(trials):
                    made = make_needle(
                        tokenizer, task=task, length=length - special, depth=depth, trial=trial, seed=seed,
                        needles=needles, haystack=haystack, new_tokens=new_tokens, chat=chat,
                    )  # fmt: skip
                    tests.append((length, made))
    prompts = (chat_prompt(tokenizer, made.prompt) if chat else made.prompt for _, made in tests)
    completions = generate(
        model, tokenizer, prompts, Sampling(max_new_tokens=new_tokens),
        batch_size=batch_size, special_tokens=not chat, generate_with=generate_with,
    )  # fmt: skip
    for (length, made), (completion,) in zip(tests, completions, strict=True):
        row = {**asdict(made), "length": length, "answers": list(made.answers)}
        del row["prompt"]
        yield {**row, "completion": completion.text, "found": found(completion.text, made.answers)}


def _chat_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Counts what the chat template puts round a message."""
    from modelwright.decoding.generate import chat_prompt

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count(chat_prompt(tokenizer, "a")) - count("a") + 2  # two for tokens that join differently at the seams


def cells(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums rows up: for each task, length and depth the trials, mean share found, and its standard error (or None)."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["length"], row["depth"]), []).append(row["found"])
    made = []
    for (task, length, depth), values in groups.items():
        mean, error = sum(values) / len(values), None
        if len(values) > 1:
            error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
        made.append(
            {"task": task, "length": length, "depth": depth, "trials": len(values), "found": mean, "stderr": error}
        )
    return made


def effective_length(table: Sequence[dict[str, Any]], threshold: float = THRESHOLD) -> dict[str, int | None]:
    """Returns for each task the greatest tested length up to which the mean over depths never falls below a threshold.

    None where even the shortest falls below. The paper's effective length is measured so, with a threshold of its own.
    """
    result: dict[str, int | None] = {}
    for task in dict.fromkeys(cell["task"] for cell in table):
        result[task] = None
        for length in sorted({cell["length"] for cell in table if cell["task"] == task}):
            values = [cell["found"] for cell in table if cell["task"] == task and cell["length"] == length]
            if sum(values) / len(values) < threshold:
                break
            result[task] = length
    return result
