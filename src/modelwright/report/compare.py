"""From a run's numbers to a table, and from the table to sentences that say what was seen and what was not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from modelwright.errors import UserError
from modelwright.report.runs import Run
from modelwright.report.spec import Compare
from modelwright.verify.statistics import Sample, mean_and_spread, number

Key = tuple[str, str]
#: Stands for the only column of a table with one dimension.
NO_COLUMN = ""


@dataclass(frozen=True)
class Difference:
    """A paired difference: a - b for every repetition that both have.

    Attributes:
        sample: Mean and spread of the differences.
        interval: Two-sided 95% interval (Student's t), or None with one repetition.
        better: How many repetitions have a better than b.
        relative: Mean difference over the mean of b, or None when that is 0.
    """

    sample: Sample
    interval: tuple[float, float] | None
    better: int
    relative: float | None

    @property
    def direction(self) -> int:
        """1 or -1 when the interval leaves out zero, by the sign of the difference; else 0."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return 0
        return 1 if self.sample.mean > 0 else -1


@dataclass
class Table:
    """One metric over rows and columns.

    Attributes:
        spec: What was asked for.
        rows: Row values in the order of the run.
        columns: Column values in the order of the run; ``[""]`` with one dimension.
        values: (row, column) to repetition to value.
        missing: Runs whose value is absent or not finite.
    """

    spec: Compare
    rows: list[str]
    columns: list[str]
    values: dict[Key, dict[str, float]]
    missing: int = 0
    labels: dict[str, str] = field(default_factory=dict)

    def label(self, value: str) -> str:
        """Returns how a row's or column's value reads."""
        return self.labels.get(value, value)

    def sample(self, key: Key) -> Sample | None:
        """Returns mean and spread of a cell, or None when it is empty."""
        values = list(self.values.get(key, {}).values())
        return Sample.of(values) if values else None

    def difference(self, a: Key, b: Key) -> Difference | None:
        """Returns the paired difference of two cells, or None when they share no repetition."""
        first, second = self.values.get(a, {}), self.values.get(b, {})
        shared = [r for r in first if r in second]
        if not shared:
            return None
        deltas = [first[r] - second[r] for r in shared]
        sample, base = Sample.of(deltas), Sample.of([second[r] for r in shared]).mean
        sign = -1 if self.spec.better == "lower" else 1
        return Difference(
            sample, sample.interval(), sum(d * sign > 0 for d in deltas), sample.mean / abs(base) if base else None
        )

    def baseline_row(self) -> str | None:
        """Returns the row that others are compared with."""
        return self._baseline(self.spec.rows, self.rows)

    def baseline_column(self) -> str | None:
        """Returns the column that others are compared with."""
        return self._baseline(self.spec.columns, self.columns)

    def _baseline(self, dimension: str | None, known: Sequence[str]) -> str | None:
        value = str(self.spec.baseline[dimension]) if dimension in self.spec.baseline else None
        return value if value in known else None

    def competes(self, value: str) -> bool:
        """Tells whether a row or column may be called the best."""
        return value not in {str(r) for r in self.spec.references}

    def best(self, keys: Sequence[Key]) -> Key | None:
        """Returns the competing cell with the best mean."""
        means = {k: s.mean for k in keys if all(map(self.competes, k)) and (s := self.sample(k)) is not None}
        if not means:
            return None
        return (min if self.spec.better == "lower" else max)(means, key=means.__getitem__)


def build_table(run: Run, spec: Compare, labels: dict[str, str]) -> Table:
    """Gathers the numbers of one comparison.

    Raises:
        UserError: The step or a dimension does not exist, or a dimension that varies is not named.
    """
    step, _, path = spec.metric.split(".", 2)
    steps = run.named(step)
    if not steps:
        raise UserError(f"No step '{step}' has finished, so there is nothing to compare yet.")
    named = [d for d in (spec.rows, spec.columns, spec.over) if d]
    for dimension in named:
        if not any(dimension in s.at for s in steps):
            raise UserError(f"The step '{step}' has no dimension '{dimension}': the report's '{spec.title}' names it.")
    seen: dict[str, set[str]] = {}
    for s in steps:
        for dimension, value in s.at.items():
            seen.setdefault(dimension, set()).add(str(value))
    if loose := [d for d, values in seen.items() if len(values) > 1 and d not in named]:
        raise UserError(f"'{spec.title}' would mix the values of '{loose[0]}': name it under rows, columns or over.")
    table = Table(spec, [], [], {}, labels=labels)
    for s in steps:
        row = str(s.at.get(spec.rows, ""))
        column = str(s.at.get(spec.columns, "")) if spec.columns else NO_COLUMN
        table.rows += [row] if row not in table.rows else []
        table.columns += [column] if column not in table.columns else []
        value = s.number(path)
        if value is None:
            table.missing += 1
        else:
            table.values.setdefault((row, column), {})[str(s.at.get(spec.over, "")) if spec.over else ""] = value
    return table


def _value(table: Table, key: Key) -> str:
    sample = table.sample(key)
    return mean_and_spread(sample, table.spec.digits) if sample else "–"


def signed(difference: Difference, digits: int) -> str:
    """Writes ``−0.205 (95% interval −0.231 to −0.179)``."""
    text = number(difference.sample.mean, digits, sign=True)
    if difference.interval is None:
        return text
    low, high = (number(x, digits, sign=True) for x in difference.interval)
    return f"{text} (95% interval {low} to {high})"


def plural(noun: str) -> str:
    """Returns seeds for seed; good enough for names of dimensions."""
    return noun if noun.endswith("s") else noun + "s"


def _joined(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def answer(table: Table) -> list[str]:
    """Returns sentences that answer the comparison; the first is the headline.

    Differences are paired over the repetitions. One is called a difference only when its 95% interval (Student's t)
    leaves out zero; otherwise the sentence says that none can be seen.
    """
    sentences = [*_row_sentences(table), *_column_sentences(table)]
    if (also := _best_column(table)) and len(table.rows) > 1:
        sentences[0] = f"{sentences[0].removesuffix('.')}; {also}."
    if len(table.columns) > 1 and len(table.rows) > 1:
        top = table.best([(r, c) for r in table.rows for c in table.columns])
        if top is not None:
            unit = f" {table.spec.unit}" if table.spec.unit else ""
            sentences.append(
                f"The best of all combinations is {table.label(top[0])} with {table.label(top[1])}: "
                f"{_value(table, top)}{unit}."
            )
    if table.missing:
        sentences.append(f"{table.missing} runs gave no finite number and are left out.")
    return sentences


def _row_sentences(table: Table) -> list[str]:
    spec, unit = table.spec, f" {table.spec.unit}" if table.spec.unit else ""
    column = table.baseline_column() or table.columns[0]
    base = (table.baseline_row() or "", column)
    others = [(row, column) for row in table.rows if row != base[0]]
    best = table.best(others)
    if best is None:
        return [f"{spec.title}: there is no number yet."]
    opening = f"{spec.given}, " if spec.given else ""
    where = f" with {table.label(column)}" if len(table.columns) > 1 else ""
    difference = table.difference(best, base)
    if difference is None:
        sentences = [f"{opening}{table.label(best[0])} is best{where}: {_value(table, best)}{unit}."]
    else:
        numbers = f"{_value(table, best)}{unit} against {_value(table, base)}"
        sentences = [
            _headline(table, difference, opening, best[0], base[0], where, numbers),
            _detail(table, difference),
        ]
        sentences += _other_rows(table, others, best, base)
    second = table.best([k for k in others if k != best])
    lead = table.difference(best, second) if second else None
    if second is not None and lead is not None and lead.interval is not None:
        name = table.label(second[0])
        seen = "the difference is" if lead.direction else "no difference can be seen:"
        sentences.append(
            f"Between {table.label(best[0])} and the next, {name} ({_value(table, second)}), "
            f"{seen} {signed(lead, spec.digits)}."
        )
    return sentences


def _headline(
    table: Table, difference: Difference, opening: str, best: str, base: str, where: str, numbers: str
) -> str:
    name, base = table.label(best), table.label(base)
    wanted = -1 if table.spec.better == "lower" else 1
    if difference.interval is None:
        side = "better" if difference.sample.mean * wanted > 0 else "no better"
        return f"{opening}{name} came out {side} than {base}{where}, in a single run: {numbers}."
    if difference.direction == wanted:
        return f"{opening}{name} is better than {base}{where}: {numbers}."
    if difference.direction == -wanted:
        return f"{opening}nothing is better than {base}{where}; the nearest, {name}, is worse: {numbers}."
    return f"{opening}no difference from {base} can be seen{where}; the best of the others is {name}: {numbers}."


def _detail(table: Table, difference: Difference) -> str:
    relative = "" if difference.relative is None else f", {number(100 * difference.relative, 1, sign=True)}%"
    text = f"The difference is {signed(difference, table.spec.digits)}{relative}"
    if difference.interval is None:
        return f"{text}; one run has no spread, so it cannot be told from chance."
    n = difference.sample.n
    if difference.better in (0, n):
        return f"{text}; all {n} {plural(table.spec.over or 'run')} agree in its direction."
    return f"{text}; better in {difference.better} of {n} {plural(table.spec.over or 'run')}."


def _other_rows(table: Table, others: Sequence[Key], best: Key, base: Key) -> list[str]:
    wanted = -1 if table.spec.better == "lower" else 1
    found: dict[int, list[str]] = {1: [], 0: [], -1: []}
    for key in others:
        difference = table.difference(key, base)
        if key != best and table.competes(key[0]) and difference is not None and difference.interval is not None:
            found[difference.direction * wanted].append(
                f"{table.label(key[0])} ({number(difference.sample.mean, table.spec.digits, sign=True)})"
            )
    base_name, parts = table.label(base[0]), []
    if found[1]:
        parts.append(f"also better than {base_name}: {_joined(found[1])}")
    if found[-1]:
        parts.append(f"worse than {base_name}: {_joined(found[-1])}")
    if found[0]:
        parts.append(f"not distinguishable from {base_name}: {_joined(found[0])}")
    text = "; ".join(parts)
    return [text[0].upper() + text[1:] + "."] if text else []


def _best_column(table: Table) -> str:
    """Returns the headline's clause on the columns: the best of those that beat the baseline in every row, if any."""
    base = table.baseline_column()
    wanted = -1 if table.spec.better == "lower" else 1
    gains: dict[str, tuple[float, float]] = {}
    for column in table.columns:
        rows = [r for r in table.rows if table.competes(r)]
        found = [table.difference((r, column), (r, base)) for r in rows] if base and column != base else []
        if table.competes(column) and found and all(d is not None and d.direction == wanted for d in found):
            sizes = [abs(d.sample.mean) for d in found if d is not None]
            gains[column] = (min(sizes), max(sizes))
    if not gains:
        return ""
    best = max(gains, key=lambda c: sum(gains[c]))
    low, high = (number(x, table.spec.digits) for x in gains[best])
    span = low if low == high else f"{low} to {high}"
    return f"{table.label(best)} improves on {table.label(str(base))} by {span} with every {table.spec.rows}"


def _column_sentences(table: Table) -> list[str]:
    base = table.baseline_column()
    others = [c for c in table.columns if c != base] if base is not None else []
    return [text for c in others if (text := _column_sentence(table, c, str(base)))]


def _column_sentence(table: Table, column: str, base: str) -> str:
    """Returns what a column makes of the baseline column, row by row."""
    wanted, digits = -1 if table.spec.better == "lower" else 1, table.spec.digits
    differences = [table.difference((row, column), (row, base)) for row in table.rows if table.competes(row)]
    found = [d for d in differences if d is not None]
    if not found:
        return ""
    low, high = (number(f(d.sample.mean for d in found), digits, sign=True) for f in (min, max))
    unit = f" {table.spec.unit}" if table.spec.unit else ""
    name = table.label(column) + ("" if table.competes(column) else " (a control)")
    start = f"{name} against {table.label(base)}: {low if low == high else f'{low} to {high}'}{unit}, "
    if all(d.interval is None for d in found):
        return start + "from single runs, which cannot be told from chance."
    counts = {sign: sum(d.direction * wanted == sign for d in found) for sign in (1, -1, 0)}
    words = {1: "better", -1: "worse", 0: "no difference can be seen"}
    seen = [sign for sign in counts if counts[sign]]
    if len(found) == 1:
        return f"{start}{words[seen[0]]}."
    rows = plural(table.spec.rows)
    if len(seen) == 1:
        return f"{start}{words[seen[0]]} in {'any' if seen[0] == 0 else 'all'} of the {len(found)} {rows}."
    return f"{start}of {len(found)} {rows}: {', '.join(f'{words[sign]} in {counts[sign]}' for sign in seen)}."
