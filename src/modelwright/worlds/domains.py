"""Generated kinds of text with a hard distractor, for methods that choose data.

The target domain is templated Python functions. ``javascript`` uses the same identifiers, ``english`` and ``logs`` are
far away, and ``markov`` is hard: text sampled from a bigram chain of the target domain, which has the target's bigram
statistics but none of its structure. A method that counts n-grams up to two can hardly tell it from the target.

Everything is generated: the same seed gives the same bytes on every machine and Python version.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from string import Template
from typing import Any

from modelwright.errors import UserError
from modelwright.worlds.base import Draw, Row, World, check_at_least, check_share

# fmt: off
_VERBS = (
    "add", "apply", "build", "check", "clean", "close", "collect", "count", "find", "format", "get", "group", "join",
    "load", "make", "merge", "open", "parse", "read", "remove", "save", "scale", "select", "send", "sort", "split",
    "store", "update", "write",
)
_ADJECTIVES = (
    "active", "big", "cold", "early", "final", "first", "free", "full", "hidden", "idle", "last", "local", "lower",
    "new", "next", "old", "past", "raw", "remote", "short", "slow", "small", "stale", "total", "upper", "valid",
)
_NOUNS = (
    "account", "address", "batch", "buffer", "column", "config", "cursor", "device", "event", "field", "frame", "image",
    "index", "job", "label", "layer", "limit", "line", "message", "model", "node", "number", "offset", "order",
    "packet", "page", "path", "point", "price", "query", "record", "report", "result", "row", "score", "segment",
    "session", "signal", "state", "step", "table", "task", "token", "user", "vector", "weight", "window",
)
_SERVICES = (
    "auth", "billing", "cache", "catalog", "gateway", "mailer", "metrics", "scheduler", "search", "storage", "worker",
)
_PEOPLE = (
    "Alice", "Boris", "Carla", "Dmitri", "Elena", "Farid", "Greta", "Henry", "Ines", "Jonas", "Keiko", "Lars", "Maria",
)
_PLACES = ("bridge", "forest", "garden", "harbour", "island", "library", "market", "museum", "station", "village")
_THINGS = ("basket", "bicycle", "clock", "kettle", "ladder", "lantern", "letter", "map", "painting", "violin")
_ACTS = ("borrowed", "bought", "carried", "cleaned", "described", "forgot", "found", "hid", "lost", "repaired")
_MOODS = ("carefully", "eagerly", "gladly", "nearly", "often", "proudly", "quietly", "rarely", "slowly", "suddenly")
# fmt: on

# f is a function's name; a, b, c are different identifiers; k < m are numbers.
_PYTHON = '''
def $f($a, $b):
    """Return the items of $a whose value is larger than $b."""
    $c = {}
    for key, value in sorted($a.items()):
        if value is not None and value > $b:
            $c[key] = value * $k
    return $c

def $f($a, $b=$k):
    """Compute the mean of $a, but at least $b."""
    if not isinstance($a, (list, tuple)) or len($a) == 0:
        raise TypeError("expected a list that is not empty")
    $c = sum(float(x) for x in $a) / len($a)
    return max($b, $c)

def $f($a, $b="utf-8"):
    with open($a, "r", encoding=$b) as stream:
        $c = [line.strip() for line in stream if not line.startswith("#")]
    logging.info("read %d lines from %s", len($c), $a)
    return $c[$k:$m]

def $f(self, $a, $b=None):
    if self._closed:
        raise RuntimeError("this object was closed already")
    with self._lock:
        self._$c[$a] = $b if $b is not None else $k
        self._changed.notify_all()

def $f($a, $b, $c=$k):
    try:
        return int($a[$b]) + $m
    except (KeyError, IndexError):
        return $c
    except ValueError as error:
        raise ValueError(f"not a whole number: {$a!r}") from error

@functools.lru_cache(maxsize=$m)
def $f($a):
    """Count how many times $a can be halved before it reaches $k."""
    $b = 0
    while $a > $k:
        $a, $b = $a // 2, $b + 1
    return $b

@pytest.mark.parametrize("$a", [$k, $m])
def test_$f($a, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    $b = $c(tmp_path / "$b.json", $a)
    assert $b.exists() and $b.read_text().count("\\n") == $k

def $f($a, $b):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--$a", type=int, default=$k, help="number of $c")
    parser.add_argument("--$b", action="store_true")
    return parser.parse_args()
'''

_JAVASCRIPT = """
function $f($a, $b) {
  const $c = {};
  Object.keys($a).forEach((key) => {
    if ($a[key] > $b) {
      $c[key] = $a[key] * $k;
    }
  });
  return $c;
}

const $f = ($a, $b = $k) => {
  if (!$a.length) return null;
  const $c = $a.reduce((x, y) => x + y, 0) / $a.length;
  return Math.max($b, $c);
};

export function $f($a) {
  return $a.filter(($b, i) => i % $k === 0).map(($b) => $b.$c);
}

async function $f($a) {
  const $b = await fetch("/$a/$k");
  const $c = await $b.json();
  return $c.slice($k, $m);
}

class $f {
  constructor($a) {
    this.$b = $a;
    this.$c = $a.length + $k;
  }
}

var $f = function ($a, $b) {
  var $c = 0;
  while ($a > $k) {
    $a = Math.floor($a / $b);
    $c++;
  }
  return $c;
};

function $f($a, $b) {
  if ($a === undefined || $b < $k) {
    throw new Error("$a is missing");
  }
  return $a + $b;
}
"""

_ENGLISH = """
$p $mood $act the $thing near the $place.

When $p reached the $place at $k past $i, the $thing was $mood gone.

Nobody at the $place knew why $p had $act $k of them.

In the $place, $p and $q have $act a $thing and $m stones.

$p told $q that the old $thing had stood in the $place for $m years.

After $k days of rain, $p $mood $act the last $thing.

It was $q who $act the $thing, although $p denied it at the $place.

"Where is the $thing?" asked $p, who had $mood walked $m steps from the $place.
"""

_LOGS = """
$date INFO  [$s] request id=$h method=GET path=/$a/$k status=200 took=${m}ms

$date WARN  [$s] retry $i of 9 for $a: connection to 10.$i.$k.7 timed out

$date ERROR [$s] failed to load $a: code=$k trace=$h

$date DEBUG [$s] cache hit key=$a:$h size=${m}B

$date INFO  [$s] job $h finished in ${m}ms ($k rows)

$date INFO  [$s] user=$k session=$h action=$v
"""

#: The chain's unit: a token as n-gram methods count them, with the blank space before it.
TOKEN = re.compile(r"\s*(?:\w+|[^\w\s]+)")

#: The token that a function begins with.
FUNCTION = "\n\ndef"

#: The kinds that a pool is filled up with in equal parts.
ORDINARY = ("javascript", "english", "logs")


def _templates(text: str) -> list[Template]:
    return [Template(part) for part in text.strip("\n").split("\n\n")]


_TEMPLATES = {
    "target": _templates(_PYTHON),
    "javascript": _templates(_JAVASCRIPT),
    "english": _templates(_ENGLISH),
    "logs": _templates(_LOGS),
}
_JOINTS = {"target": "\n\n", "javascript": "\n\n", "english": " ", "logs": "\n"}


def _code_words(draw: Draw) -> dict[str, Any]:
    a, b, c, d = draw.sample(_NOUNS, 4)
    k = draw.between(2, 99)
    name = f"{draw.choice(_VERBS)}_{draw.choice(_ADJECTIVES)}_{d}"
    return {"f": name, "a": a, "b": f"{draw.choice(_ADJECTIVES)}_{b}", "c": c, "k": k, "m": k + draw.between(1, 900)}


def _english_words(draw: Draw) -> dict[str, Any]:
    p, q = draw.sample(_PEOPLE, 2)
    return {
        "p": p, "q": q, "mood": draw.choice(_MOODS), "act": draw.choice(_ACTS), "thing": draw.choice(_THINGS),
        "place": draw.choice(_PLACES), "i": draw.between(1, 12), "k": draw.between(2, 59), "m": draw.between(60, 9999),
    }  # fmt: skip


def _log_words(draw: Draw) -> dict[str, Any]:
    day, hour, minute = draw.between(1, 28), draw.below(24), draw.below(60)
    return {
        "date": f"2024-05-{day:02} {hour:02}:{minute:02}:{draw.below(60):02}.{draw.below(1000):03}",
        "s": draw.choice(_SERVICES), "a": draw.choice(_NOUNS), "v": draw.choice(_VERBS), "i": draw.between(1, 9),
        "h": f"{draw.below(1 << 32):08x}", "k": draw.between(1, 255), "m": draw.between(1, 9999),
    }  # fmt: skip


_WORDS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "target": _code_words, "javascript": _code_words, "english": _english_words, "logs": _log_words,
}  # fmt: skip


class _Writer:
    """Writes documents of each kind, and no function, sentence or log line twice."""

    def __init__(self, seed: int, min_chars: int, max_chars: int) -> None:
        check_at_least(1, min_chars=min_chars, max_chars=max_chars)
        if max_chars < min_chars:
            raise UserError(f"max_chars is {max_chars}, below min_chars, which is {min_chars}: exchange them.")
        self.seed = seed
        self.limits = (min_chars, max_chars)
        self.units: set[str] = set()
        self.chain: dict[str, list[str]] | None = None

    def documents(self, kind: str, n: int, stream: str) -> list[Row]:
        """Returns ``n`` rows, each cut to a length that is uniform between the limits."""
        draw = Draw(self.seed, f"{stream}/{kind}")
        if kind == "markov":
            make = self.babble
        else:
            make = lambda draw, length: self.prose(kind, draw, length)  # noqa: E731
        return [{"text": make(draw, draw.between(*self.limits)), "kind": kind} for _ in range(n)]

    def prose(self, kind: str, draw: Draw, length: int) -> str:
        """Returns ``length`` characters of an ordinary kind."""
        text, joint = "", _JOINTS[kind]
        while len(text) < length:
            unit = draw.choice(_TEMPLATES[kind]).substitute(_WORDS[kind](draw))
            if unit not in self.units:
                self.units.add(unit)
                text += joint + unit if text else unit
        return text[:length]

    def babble(self, draw: Draw, length: int) -> str:
        """Returns ``length`` characters walked on the target's bigram chain, from the beginning of a function."""
        if self.chain is None:
            # Its own sample of the domain, so that no text of any split went into it.
            self.chain = bigram_chain(self.prose("target", Draw(self.seed, "chain"), 200_000))
        token = FUNCTION
        parts, size = ["def"], 3
        while size < length:
            token = draw.choice(self.chain[token])
            parts.append(token)
            size += len(token)
        return "".join(parts)[:length]


def bigram_chain(text: str) -> dict[str, list[str]]:
    """Returns, for each token of a text, the tokens that follow it, once for each time they do.

    The last token is followed by the first, so a walk never ends.
    """
    tokens = TOKEN.findall("\n\n" + text)
    followers: dict[str, list[str]] = {}
    for token, following in zip(tokens, [*tokens[1:], tokens[0]]):
        followers.setdefault(token, []).append(following)
    return followers


@dataclass(frozen=True)
class DomainWorld(World):
    """Documents of several kinds. Rows: ``text``, ``kind`` (target, javascript, english, logs, markov).

    Attributes:
        pool: Documents of all kinds, shuffled.
        target: Documents of the target kind, to be shown to a method.
        heldout: Documents of the target kind, to evaluate on.
    """

    pool: list[Row]
    target: list[Row]
    heldout: list[Row]

    @property
    def truth(self) -> dict[str, Any]:
        """``target_kind``."""
        return {"target_kind": "target"}


def domains(
    seed: int = 0,
    *,
    pool_size: int = 800,
    target_size: int = 20,
    heldout_size: int = 100,
    target_share: float = 0.15,
    markov_share: float = 0.5,
    min_chars: int = 150,
    max_chars: int = 450,
) -> DomainWorld:
    """Makes a pool in which a few documents are of the target's domain, and many look like it to a bigram count.

    No function, sentence or log line is made twice, so the splits share none.

    Args:
        seed: Decides everything.
        pool_size: Documents in the pool.
        target_size: Documents in the target.
        heldout_size: Documents in the held-out set.
        target_share: Share of the pool that is of the target's domain (rounded to whole documents).
        markov_share: Share of the pool that is the hard distractor. JavaScript, English and logs share the rest.
        min_chars: Least characters of a document.
        max_chars: Greatest characters of a document; lengths are uniform between the two for every kind.

    Raises:
        UserError: A parameter is out of range.
    """
    parameters = locals().copy()
    check_at_least(1, pool_size=pool_size, target_size=target_size)
    check_at_least(0, heldout_size=heldout_size)
    check_share(target_share=target_share, markov_share=markov_share)
    check_share(target_share_plus_markov_share=target_share + markov_share)
    write = _Writer(seed, min_chars, max_chars)
    kinds = {"target": round(pool_size * target_share), "markov": round(pool_size * markov_share)}
    kinds["markov"] = min(kinds["markov"], pool_size - kinds["target"])
    kinds |= _equal_parts(pool_size - sum(kinds.values()))
    pool = [row for kind, n in kinds.items() for row in write.documents(kind, n, "pool")]
    return DomainWorld(
        parameters,
        pool=Draw(seed, "order").shuffled(pool),
        target=write.documents("target", target_size, "target"),
        heldout=write.documents("target", heldout_size, "heldout"),
    )


@dataclass(frozen=True)
class GradedWorld(World):
    """Data sets of graded similarity to a target. Rows: ``text``, ``kind``; those of a level also ``level``.

    Attributes:
        levels: The documents of all levels, level by level.
        target: Documents of the target kind, to be shown to a method.
        heldout: Documents of the target kind, to evaluate on.
    """

    levels: list[Row]
    target: list[Row]
    heldout: list[Row]

    def level(self, index: int) -> list[Row]:
        """Returns the documents of one level."""
        return [row for row in self.levels if row["level"] == index]

    @property
    def truth(self) -> dict[str, Any]:
        """``fractions``: the exact share of target documents in each level."""
        n, size = self.parameters["levels"], self.parameters["level_size"]
        return {"target_kind": "target", "fractions": [_of_target(i, n, size) / size for i in range(n)]}


def graded(
    seed: int = 0,
    *,
    levels: int = 8,
    level_size: int = 200,
    target_size: int = 20,
    heldout_size: int = 100,
    min_chars: int = 150,
    max_chars: int = 450,
) -> GradedWorld:
    """Makes data sets whose share of target documents rises evenly from 0 to 1, for correlation studies.

    The other documents of a level are JavaScript, English and logs in equal parts.

    Args:
        seed: Decides everything.
        levels: Number of data sets, at least 2.
        level_size: Documents in each.
        target_size: Documents in the target.
        heldout_size: Documents in the held-out set.
        min_chars: Least characters of a document.
        max_chars: Greatest characters of a document.

    Raises:
        UserError: A parameter is out of range.
    """
    parameters = locals().copy()
    check_at_least(2, levels=levels)
    check_at_least(1, level_size=level_size, target_size=target_size)
    check_at_least(0, heldout_size=heldout_size)
    write = _Writer(seed, min_chars, max_chars)
    rows: list[Row] = []
    for level in range(levels):
        of_target = _of_target(level, levels, level_size)
        kinds = {"target": of_target, **_equal_parts(level_size - of_target)}
        made = [row for kind, n in kinds.items() for row in write.documents(kind, n, f"level {level}")]
        rows += [{**row, "level": level} for row in Draw(seed, f"order {level}").shuffled(made)]
    return GradedWorld(
        parameters,
        levels=rows,
        target=write.documents("target", target_size, "target"),
        heldout=write.documents("target", heldout_size, "heldout"),
    )


def _of_target(level: int, levels: int, size: int) -> int:
    return round(size * level / (levels - 1))


def _equal_parts(n: int) -> dict[str, int]:
    return {kind: n // len(ORDINARY) + (i < n % len(ORDINARY)) for i, kind in enumerate(ORDINARY)}
