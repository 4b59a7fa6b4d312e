"""The files by which a folder is also a sentence-transformers model: read before training, written after it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from modelwright.errors import UserError
from modelwright.files import read_json

Pooling = Literal["mean", "cls", "last"]
_MODES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class SentenceFolder:
    """How a sentence-transformers folder makes an embedding.

    Attributes:
        transformer: Folder of the model and the tokenizer: the folder itself, or one in it.
        pooling: Over the hidden states.
        max_tokens: Longest text; None leaves it to the tokenizer.
        lower: Whether texts are lower-cased first.
        prompt: Text that its ``encode`` puts before every text by default.
        settings: ``config_sentence_transformers.json``, kept as it is.
    """

    transformer: Path
    pooling: Pooling
    max_tokens: int | None = None
    lower: bool = False
    prompt: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def read_sentence_folder(folder: Path) -> SentenceFolder:
    """Reads ``modules.json`` and what it names.

    Raises:
        UserError: It is not a Transformer, a Pooling by ``mean``, ``cls`` or ``lasttoken``, and at most a Normalize.
    """
    path = folder / "modules.json"
    modules = read_json(path)
    try:
        parts = [(str(m["type"]).rsplit(".", 1)[-1], folder / str(m["path"])) for m in modules]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{path} does not list modules by type and path: it is not of sentence-transformers."
        ) from error
    kinds = [kind for kind, _ in parts]
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise UserError(
                f"{path} has a module '{kind}', which cannot be trained here: only Transformer, Pooling and Normalize "
                f"can. Train it with SentenceTransformerTrainer and InfCLSentenceLoss instead."
            )
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UserError(f"{path} lists {', '.join(kinds) or 'no module'}: expected Transformer, Pooling and Normalize.")
    transformer, pooling = parts[0][1], parts[1][1]
    for part in (transformer, pooling):
        if folder.resolve() not in (part.resolve(), *part.resolve().parents):
            raise UserError(f"{path} names a module outside its folder ({part}).")
    options = _read(transformer / "sentence_bert_config.json")
    if options.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise UserError(
            f"{transformer / 'sentence_bert_config.json'} asks for the task '{options['transformer_task']}': only "
            f"feature-extraction can be trained here."
        )
    settings = _read(folder / "config_sentence_transformers.json")
    name = settings.get("default_prompt_name")
    prompt = (settings.get("prompts") or {}).get(name, "") if name else ""
    return SentenceFolder(
        transformer,
        _pooling(pooling / "config.json"),
        max_tokens=options.get("max_seq_length"),
        lower=bool(options.get("do_lower_case")),
        prompt=prompt or "",
        settings=settings,
    )


def _pooling(path: Path) -> Pooling:
    options = read_json(path)
    modes = options.get("pooling_mode") or [new for old, new in _OLD_MODES.items() if options.get(old)] or "mean"
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _MODES:
        raise UserError(
            f"{path} pools by {' and '.join(map(str, modes))}: only mean, cls and lasttoken can be trained."
        )
    if not options.get("include_prompt", True):
        raise UserError(f"{path} leaves the prompt out of the pooling (include_prompt is false): not supported here.")
    return _MODES[modes[0]]  # type: ignore[return-value]


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object.")
    return found


def write_sentence_folder(
    folder: Path, pooling: Pooling, width: int, max_tokens: int, lower: bool, settings: dict[str, Any]
) -> None:
    """Writes what makes a folder with a model and a tokenizer loadable as ``SentenceTransformer(folder)``.

    The classes are named as they were before version 5.4 of sentence-transformers, which newer versions understand too.

    Args:
        folder: Holds the model already.
        pooling: Over the hidden states.
        width: Of the embeddings.
        max_tokens: Longest text.
        lower: Whether texts are lower-cased first.
        settings: Earlier content of ``config_sentence_transformers.json`` (prompts).
    """
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    names = {new: old for old, new in _OLD_MODES.items()}
    chosen = names[{"last": "lasttoken"}.get(pooling, pooling)]
    modes = {old: old == chosen for old in _OLD_MODES}
    _write(folder / "modules.json", modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": lower})
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes, "include_prompt": True})
    (folder / "2_Normalize").mkdir(exist_ok=True)
    _write(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine", **settings})


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
