"""`modelwright probe memorization`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress

if TYPE_CHECKING:
    from modelwright.probing.memorization.audit import Audit


@dataclass(kw_only=True)
class ProbeMemorization:
    """Find which sequences of a corpus a model recites, reconstructs or recollects, and what makes it do so.

    Writes a table of sequences with their features, a report as JSON, and an HTML page with examples of each class. The
    corpus may be larger than memory. Interrupted, the same command goes on where it was.
    """

    model: Annotated[list[str], Arg("Models: folders or hub ids, in the order of size or training.", kind="input")]
    corpus: Annotated[list[str], Arg("Training text: files, folders, patterns or hub ids.", kind="input")]
    output: Annotated[Path, Arg("Folder to write.", short="-o", kind="output", filename="memorization")]
    tokenizer: Annotated[str | None, Arg("Tokenizer, if the first model's folder has none.", kind="input")] = None
    text_field: Annotated[str, Arg("Field that holds the text.")] = "text"
    prompt_len: Annotated[int, Arg("Tokens of the prompt.")] = 32
    cont_len: Annotated[int, Arg("Tokens of the continuation that must come back.")] = 32
    every: Annotated[int | None, Arg("A sequence every so many tokens; by default one, where a document begins.")] = (
        None
    )
    limit: Annotated[int | None, Arg("Most sequences, drawn at random; by default all.")] = None
    sample: Annotated[
        float | None,
        Arg("Share of the sequences in the random sample (the paper: 0.03); by default all, up to 20,000."),
    ] = None
    duplicate_threshold: Annotated[int, Arg("Copies in the corpus from which on a sequence is recited.")] = 6
    embedder: Annotated[
        str, Arg("For semantic matches: ngrams, model (the first audited one), or a sentence-transformers model.")
    ] = "ngrams"
    search: Annotated[bool, Arg("Search the best partition in two thresholds as well: 810 candidates.")] = False
    bootstrap: Annotated[int, Arg("Resamples for the intervals of the comparison.")] = 500
    legacy: Annotated[bool, Arg("Templates and perplexities as the official code has them, errors included.")] = False
    examples: Annotated[int, Arg("Examples of each class on the page; 0 shows no text of the corpus.")] = 4
    masked_words: Annotated[
        Path | None, Arg("File of words, one a line, that the page shows as blocks.", kind="input")
    ] = None
    seed: Annotated[int, Arg("Seed of samples, splits and resamples.")] = 0
    workers: Annotated[int, Arg("Processes that count duplicates.", kind="run")] = 1
    batch_size: Annotated[int, Arg("Sequences at once.", kind="run")] = 64
    dtype: Annotated[str, Arg("float32 (ties are decided as they are), auto, bfloat16 or float16.")] = "float32"
    device: Annotated[str, Arg("auto, cpu, cuda …", kind="run")] = "auto"
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the model.")] = False
    force: Annotated[bool, Arg("Replace the output; discard an unfinished run with other options.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Audits; returns for each model what it memorised, by category, and where outputs are."""
        import shutil

        import pandas as pd

        from modelwright.data.records import Records
        from modelwright.errors import UserError
        from modelwright.files import atomic_path, check_output
        from modelwright.models.loading import load_tokenizer, resolve_device, resolve_dtype
        from modelwright.probing.memorization.audit import Audit, AuditOptions
        from modelwright.probing.memorization.corpus import tokenizer_hash
        from modelwright.probing.memorization.summary import MemorizationReport, summarise
        from modelwright.report.memorization import render_memorization

        check_output(self.output, self.force)
        if not self.model:
            raise UserError("Name at least one model: --model FOLDER.")
        if len(set(self.model)) < len(self.model):
            raise UserError("A model is named twice.")
        if min(self.workers, self.batch_size) < 1 or self.bootstrap < 2 or self.examples < 0:
            raise UserError("--workers and --batch-size must be at least 1, --bootstrap 2, --examples 0.")
        resolve_dtype(self.dtype), resolve_device(self.device)  # refuse what they refuse before the corpus is read
        masked = self._masked()
        options = AuditOptions(
            prompt_len=self.prompt_len, cont_len=self.cont_len, every=self.every, limit=self.limit, sample=self.sample,
            duplicate_threshold=self.duplicate_threshold, legacy=self.legacy, seed=self.seed,
        )  # fmt: skip
        tokenizer = load_tokenizer(self.tokenizer or self.model[0], trust_remote_code=self.trust_remote_code)
        records = Records(self.corpus, self.text_field)
        work = self.output.with_name(self.output.name + ".partial")
        self._check_tokenizers(tokenizer, records)
        audit = Audit(
            records.texts(),
            tokenizer,
            work,
            options,
            fingerprint=f"{records.fingerprint()}/{tokenizer_hash(tokenizer)}/{self.dtype}",
            progress=progress,
            force=self.force,
        )
        found, checks = self._extract(audit, progress)
        embedder = self._embedder(tokenizer)
        tables = audit.features(found, embedder=embedder, workers=self.workers)
        total = len(audit.places.start)
        report = MemorizationReport(settings=self._settings(audit))
        progress.start("predictive models", len(tables))
        for name, table in tables.items():
            summary = summarise(
                table,
                sequences=total,
                duplicate_threshold=self.duplicate_threshold,
                bootstrap=self.bootstrap,
                search=self.search,
                workers=self.workers,
                seed=self.seed,
            )
            report.models[name] = summary | {"cross_check": checks[name], "examples": self._examples(audit, table)}
            progress.advance()
        with atomic_path(self.output, self.force) as partial:
            partial.mkdir()
            every = pd.concat([t.assign(model=name) for name, t in tables.items()], ignore_index=True)
            every["category"] = every["category"].astype(str)
            every.to_parquet(partial / "sequences.parquet")
            report.save(partial / "report.json")
            page = partial / "report.html"
            render_memorization(report.as_json(), page, title="What is learnt by heart", masked=masked)
        shutil.rmtree(work)
        models = {
            name: {"memorized": m["memorized"], **{c: v["memorized"] for c, v in m["categories"].items()}}
            for name, m in report.models.items()
        }
        warnings = [
            f"{name}: {c['differ']} of {c['compared']} sequences came out otherwise by generate (near ties)."
            for name, c in checks.items()
            if c["differ"]
        ]
        warnings += [
            f"{name}: no predictive model. {m['prediction_refused']}"
            for name, m in report.models.items()
            if m["prediction_refused"]
        ]
        return {
            "output": str(self.output),
            "page": str(self.output / "report.html"),
            "sequences": total,
            "models": models,
            "warnings": warnings,
        }

    def _check_tokenizers(self, tokenizer: Any, records: Any) -> None:
        """Refuses models that cut the first documents into other tokens."""
        import itertools

        from modelwright.errors import UserError
        from modelwright.models.loading import TOKENIZER_FILES, find_folder, load_tokenizer
        from modelwright.models.tokenizers import encode

        texts = [text[:2000] for text in itertools.islice(records.texts(), 20)]
        mine = encode(tokenizer, texts)
        for name in self.model if self.tokenizer else self.model[1:]:
            folder = find_folder(name, code=self.trust_remote_code)
            if not any((folder / file).is_file() for file in TOKENIZER_FILES):
                continue
            if encode(load_tokenizer(name, trust_remote_code=self.trust_remote_code), texts) != mine:
                raise UserError(
                    f"{name} has another tokenizer than {self.tokenizer or self.model[0]}: audit models of different "
                    f"tokenizers one by one."
                )

    def _extract(self, audit: Audit, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
        import torch

        from modelwright.errors import UserError
        from modelwright.models.loading import load_model
        from modelwright.probing.memorization.audit import Subject

        found, checks = {}, {}
        for name in self.model:

            def load(name: str = name) -> Any:
                return load_model(name, dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code)

            subject = Subject(name, load, _version(name))
            try:
                found[name] = audit.extract(subject, batch_size=self.batch_size)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"Memory is full at {self.batch_size} sequences: use a smaller --batch-size."
                ) from error
            checks[name] = audit.cross_check(subject)
            memorized = int((found[name]["score"] == 1).sum())
            progress.message(f"{name}: {memorized:,} of {len(found[name]['score']):,} sequences come back.")
        return found, checks

    def _embedder(self, tokenizer: Any) -> Any:
        from modelwright.models.loading import load_model
        from modelwright.probing.memorization.neighbours import ModelEmbedder, sentence_embedder

        if self.embedder == "ngrams":
            return None
        if self.embedder == "model":
            model = load_model(
                self.model[0], dtype=self.dtype, device=self.device, trust_remote_code=self.trust_remote_code
            )
            return ModelEmbedder(model, tokenizer, self.prompt_len + self.cont_len, self.batch_size)
        return sentence_embedder(self.embedder)

    def _masked(self) -> list[str]:
        from modelwright.errors import UserError

        if self.masked_words is None:
            return []
        try:
            lines = self.masked_words.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.masked_words} cannot be read as a list of words.") from error
        return [line.strip() for line in lines if line.strip()]

    def _examples(self, audit: Audit, table: Any) -> list[dict[str, Any]]:
        from modelwright.probing.memorization.taxonomy import CATEGORIES

        shown = []
        for category in CATEGORIES:
            rows = table[table["memorized"] & (table["category"] == category)]
            # Of recitation what is copied most, of the others what is rarest and least expected; each text once.
            order = [category != "recitation", False]
            rows = rows.sort_values(["sequence_duplicates", "continuation_perplexity"], ascending=order)
            rows = rows.head(50 * self.examples)
            seen: set[tuple[str, str]] = set()
            for row, text in zip(rows.to_dict("records"), audit.texts(rows["sequence"]), strict=True):
                if len(seen) >= self.examples:
                    break
                if text in seen:
                    continue
                seen.add(text)
                shown.append(
                    {
                        "category": category,
                        "prompt": text[0],
                        "continuation": text[1],
                        "duplicates": row["sequence_duplicates"],
                        "perplexity": row["continuation_perplexity"],
                        "document": row["document"],
                        "offset": row["offset"],
                    }
                )
        return shown

    def _settings(self, audit: Audit) -> dict[str, Any]:
        import dataclasses

        from modelwright import provenance

        kept = (
            "corpus", "prompt_len", "cont_len", "every", "limit", "sample", "duplicate_threshold", "embedder", "legacy",
            "seed", "dtype",
        )  # fmt: skip
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in kept}
        counted: dict[str, Any] = {"documents": len(audit.corpus.boundaries) - 1, "tokens": len(audit.corpus.tokens)}
        if audit.leading:
            counted["leading_tokens"] = list(audit.leading)
        return values | counted | {"software": provenance.versions()}


def _version(model: str) -> str:
    """Returns what changes when a folder's weights do: names, sizes and times; nothing for a hub id."""
    folder = Path(model).expanduser()
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")]) if folder.is_dir() else []
    return "/".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)
