"""The page of an audit of memorisation: what each model recites, reconstructs and recollects, why, and examples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelwright.report import figures
from modelwright.report.render import _environment, _write

_CATEGORIES = ("recitation", "reconstruction", "recollection")
_RULES = {
    "recitation": "copied many times",
    "reconstruction": "a template",
    "recollection": "rare, and no template",
}
_METRICS = {
    "pr_auc": "PR area", "roc_auc": "ROC area", "f1": "F1", "precision": "precision", "recall": "recall",
    "ece": "calibration error", "log_loss": "log-loss",
}  # fmt: skip
#: Characters of prompt and continuation that an example shows.
_SHOWN = 280


def render_memorization(
    report: Mapping[str, Any], output: Path, *, title: str, masked: Sequence[str] = (), force: bool = True
) -> Path:
    """Writes the page.

    Args:
        report: ``settings`` and ``models``, as ``report.json`` of `modelwright probe memorization` has them.
        output: The HTML file.
        title: Heading.
        masked: Words that examples show as blocks, whatever their case.
        force: Replace an existing file.
    """
    models: Mapping[str, Any] = report["models"]
    names = _short(list(models))
    page = {
        "title": title,
        "settings": _settings(report["settings"]),
        "headlines": [_headline(names[n], m) for n, m in models.items()],
        "shares": _shares_figure(models, names),
        "legend": [{"label": f"{c}: {_RULES[c]}", "series": i} for i, c in enumerate(_CATEGORIES)],
        "counts": _counts(models, names),
        "models": [_model(f"model-{i}", names[n], m, _mask_pattern(masked)) for i, (n, m) in enumerate(models.items())],
        "tokens": f"{report['settings'].get('tokens', 0):,}",
        "documents": f"{report['settings'].get('documents', 0):,}",
        "prompt_len": report["settings"].get("prompt_len"),
        "cont_len": report["settings"].get("cont_len"),
        "threshold": report["settings"].get("duplicate_threshold"),
    }
    return _write(_environment().get_template("memorization.html").render(page=page), Path(output), force)


def _short(names: Sequence[str]) -> dict[str, str]:
    """The last parts of paths that tell them apart."""
    for parts in range(1, 6):
        short = ["/".join(Path(name).parts[-parts:]) or name for name in names]
        if len(set(short)) == len(names):
            return dict(zip(names, short, strict=True))
    return {name: name for name in names}


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 1e-3 else f"{value:.3f}"


def _headline(name: str, model: Mapping[str, Any]) -> str:
    read, memorized = model["sequences"], model["memorized"]
    share = _percent(memorized / max(read, 1))
    start = f"{name} gives back {memorized:,} of {read:,} sequences word for word ({share})"
    if not memorized:
        return f"{start}."
    parts = [f"{_percent(model['categories'][c]['share_of_memorized'], 0)} {c}" for c in _CATEGORIES]
    return f"{start}: {', '.join(parts)}."


def _shares_figure(models: Mapping[str, Any], names: Mapping[str, str]) -> str:
    shown = [n for n, m in models.items() if m["memorized"]]
    if not shown:
        return ""
    parts = [
        (i, [100 * models[n]["categories"][c]["share_of_memorized"] for n in shown]) for i, c in enumerate(_CATEGORIES)
    ]
    alt = "Shares of recitation, reconstruction and recollection among the memorised sequences of each model."
    return figures.stacked("shares", alt, [names[n] for n in shown], parts, "percent of the memorised sequences")


def _counts(models: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    rows = []
    for name, model in models.items():
        rows.append({"label": names[name], "cells": [f"{model['memorized']:,}", "100%", "–"]})
        for category in _CATEGORIES:
            found = model["categories"][category]
            rate = model["sample_categories"][category]["rate"]
            cells = [f"{found['memorized']:,}", _percent(found["share_of_memorized"]), _percent(rate)]
            rows.append({"label": f"{names[name]}: {category}", "cells": cells})
    return {"columns": ["memorised", "of memorised", "its rate"], "rows": rows}


def _model(key: str, name: str, model: Mapping[str, Any], mask: re.Pattern[str] | None) -> dict[str, Any]:
    prediction = model["prediction"]
    found: dict[str, Any] = {
        "key": key,
        "name": name,
        "check": model.get("cross_check"),
        "examples": [
            {
                "category": c,
                "rule": _RULES[c],
                "documents": [_example(e, mask) for e in model.get("examples", []) if e["category"] == c],
            }
            for c in _CATEGORIES
        ],
        "factors": _factors(model["factors"]),
        "flips": [
            f"{f['feature'].replace('_', ' ')}: {f['in_group']:+.2f} in {f['group']}, {f['in_all']:+.2f} in all"
            for f in model["sign_flips"]
        ],
        "divergence": _divergence(key, model["divergence"]),
        "refused": model["prediction_refused"],
        "prediction": None,
    }
    if prediction is not None:
        found["prediction"] = _prediction(key, prediction)
    return found


def _factors(factors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    features = list(dict.fromkeys(f["feature"] for f in factors))
    categories = [c for c in _CATEGORIES if any(f["category"] == c for f in factors)]
    known = {(f["category"], f["feature"]): f for f in factors}
    rows = [
        {
            "label": feature.replace("_", " "),
            "cells": [_number(known[c, feature][side]) for c in categories for side in ("memorized", "others")],
        }
        for feature in features
    ]
    return {"columns": [f"{c}: {side}" for c in categories for side in ("memorised", "others")], "rows": rows}


def _divergence(key: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if len(rows) < 2:
        return ""
    x = [r["duplicates"] for r in rows]
    y = [r["divergence"] for r in rows]
    spread = [r["sd"] for r in rows]
    line = figures.Line(
        label="divergence", x=x, y=y, low=[a - b for a, b in zip(y, spread)],
        high=[a + b for a, b in zip(y, spread)], series=0,
    )  # fmt: skip
    alt = "How unlike the continuation perplexities of memorised and other sequences are, by number of duplicates."
    return figures.curves(f"{key}-divergence", alt, [line], "duplicates in the corpus", "divergence, nats", None)


def _prediction(key: str, prediction: Mapping[str, Any]) -> dict[str, Any]:
    compared = [c for c in prediction["comparison"] if c["metric"] in _METRICS]
    groups = list(dict.fromkeys(c["group"] for c in compared))
    lower = ("ece", "log_loss")
    tables = []
    for group in groups:
        rows = []
        for row in (c for c in compared if c["group"] == group):
            difference, low, high = row["difference"], row["low"], row["high"]
            clear = low is not None and high is not None and (low > 0 or high < 0)
            better = None if not clear else (difference > 0) != (row["metric"] in lower)
            interval = "–" if low is None or difference is None else f"{difference:+.3f} ({low:+.3f} to {high:+.3f})"
            rows.append(
                {
                    "label": _METRICS[row["metric"]],
                    "cells": [_number(row["base"]), _number(row["model"])],
                    "difference": interval,
                    "better": better,
                }
            )
        tables.append({"group": group, "rows": rows})
    coefficients = prediction["coefficients"]
    models = list(dict.fromkeys(c["category"] for c in coefficients))
    features = list(dict.fromkeys(c["feature"] for c in coefficients))
    known = {(c["category"], c["feature"]): c for c in coefficients}

    def weight(category: str, feature: str) -> dict[str, Any]:
        found = known.get((category, feature))
        if found is None or found["coefficient"] is None:
            return {"text": "–", "p": ""}
        return {"text": f"{found['coefficient']:+.2f}", "p": f"p {_p(found['p_value'])}"}

    ratio = [
        {"label": r["category"], "cells": [_number(r["statistic"]), str(r["df"]), _p(r["p_value"])]}
        for r in prediction["likelihood_ratio"]
    ]
    return {
        "rows": prediction["rows"],
        "tables": tables,
        "weights": {
            "columns": ["all (generic)" if m == "all" else m for m in models],
            "rows": [{"label": f.replace("_", " "), "cells": [weight(m, f) for m in models]} for f in features],
        },
        "ratio": ratio,
        "fallbacks": [f"{category}: {reason}." for category, reason in prediction["fallbacks"].items()],
        "calibration": _calibration(key, prediction["calibration"]),
        "calibration_legend": [{"label": n, "series": i} for i, n in enumerate(prediction["calibration"])],
        "search": prediction["search"],
    }


def _calibration(key: str, found: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    lines = [figures.Line(label="calibrated", x=[0, 1], y=[0, 1], low=[0, 1], high=[0, 1], series=7)]
    for i, (name, bins) in enumerate(found.items()):
        x, y = [b["predicted"] for b in bins], [b["seen"] for b in bins]
        lines.append(figures.Line(label=name, x=x, y=y, low=y, high=y, series=i))
    alt = "Share of memorised sequences against the predicted probability; the diagonal is a calibrated model."
    return figures.curves(f"{key}-calibration", alt, lines, "predicted probability", "memorised, share", (-0.03, 1.03))


def _mask_pattern(words: Sequence[str]) -> re.Pattern[str] | None:
    if not words:
        return None
    return re.compile("|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)), re.IGNORECASE)


def _example(example: Mapping[str, Any], mask: re.Pattern[str] | None) -> dict[str, Any]:
    def shown(text: str, keep_end: bool) -> str:
        # Masked before it is cut: a word that the cut halves would escape.
        text = mask.sub(lambda m: "█" * len(m[0]), text) if mask else text
        if len(text) > _SHOWN:
            text = f"… {text[-_SHOWN:]}" if keep_end else f"{text[:_SHOWN]} …"
        return figures.printable(text)

    return {
        "prompt": shown(example["prompt"], True),
        "continuation": shown(example["continuation"], False),
        "duplicates": f"{example['duplicates']:,}",
        "perplexity": _number(example["perplexity"]),
        "document": f"{example['document']:,}",
        "offset": f"{example['offset']:,}",
    }


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += [(key, str(inner)) for key, inner in value.items()]
        elif isinstance(value, list):
            found.append((name.replace("_", " "), ", ".join(map(str, value))))
        elif value is not None:
            found.append((name.replace("_", " "), str(value)))
    return found
