"""`modelwright tokenize train`, also called `modelwright tokenizer`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from modelwright.options import Arg, check_limit
from modelwright.progress import Progress


@dataclass(kw_only=True)
class TrainTokenizer:
    """Train a byte-level tokenizer on documents and write it as a folder that AutoTokenizer loads."""

    data: Annotated[list[str], Arg("Documents: files, folders, patterns or hub ids.", kind="input")]
    output: Annotated[Path, Arg("Folder to write.", short="-o", kind="output", filename="tokenizer")]
    vocab_size: Annotated[int, Arg("Tokens, with 256 bytes and 3 special ones among them.")] = 8192
    method: Annotated[
        Literal["bpe", "swe"], Arg("bpe merges the most frequent pair, swe the one that raises the likelihood most.")
    ] = "bpe"
    min_frequency: Annotated[int, Arg("Merge pairs that are seen at least this often.")] = 2
    refine: Annotated[
        Literal["em"] | None, Arg("Of swe: fit probabilities to the vocabulary and segment by them (a Unigram model).")
    ] = None
    prune_from: Annotated[
        int | None, Arg("Of swe: train this many tokens, then drop those that are worth least (a Unigram model).")
    ] = None
    text_field: Annotated[str, Arg("Field that holds the text.")] = "text"
    limit: Annotated[int | None, Arg("Read only this many documents.")] = None
    force: Annotated[bool, Arg("Replace an existing output.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Trains; returns vocab_size, documents, bytes and, over the first 200 documents, what it makes of them."""
        import itertools

        from modelwright.data.records import Records
        from modelwright.errors import UserError
        from modelwright.files import atomic_path, check_output
        from modelwright.tokenization.swe import fit

        if self.method != "swe" and (self.refine or self.prune_from is not None):
            raise UserError("refine and prune_from belong to the method swe: add --method swe, or leave them out.")

        check_limit(self.limit)
        check_output(self.output, self.force)
        documents = length = 0
        sample: list[str] = []

        def texts() -> Any:
            nonlocal documents, length
            for text in itertools.islice(Records(self.data, self.text_field).texts(), self.limit):
                documents += 1
                length += len(text.encode())
                if text and len(sample) < 200:
                    sample.append(text[:10_000])
                progress.advance()
                yield text

        progress.start("train tokenizer")
        tokenizer = self._train(texts(), progress)
        if len(tokenizer) < self.vocab_size:
            progress.message(
                f"The vocabulary has {len(tokenizer):,} tokens, not {self.vocab_size:,}: the text has no more pairs to "
                f"merge that are seen {self.min_frequency} times. Give more text, or a smaller vocab_size."
            )
        sampled = sum(len(text.encode()) for text in sample)
        measured = fit(tokenizer, sample)
        with atomic_path(self.output, self.force) as partial:
            tokenizer.save_pretrained(partial)
        return {
            "output": str(self.output),
            "method": self.method,
            "vocab_size": len(tokenizer),
            "documents": documents,
            "bytes": length,
            "bytes_per_token": round(sampled / measured.tokens, 3),
            "characters_per_token": round(measured.characters_per_token, 3),
            "bits_per_character": round(measured.bits_per_character, 4),
        }

    def _train(self, texts: Iterator[str], progress: Progress) -> Any:
        from modelwright.models.tokenizers import SPECIAL_TOKENS, train_bpe, wrap

        if self.method == "bpe":
            return train_bpe(texts, self.vocab_size, min_frequency=self.min_frequency)

        from modelwright.tokenization.swe import LikelihoodBpeTrainer

        trainer = LikelihoodBpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=self.min_frequency,
            refine=self.refine,
            prune_from=self.prune_from,
            special_tokens=SPECIAL_TOKENS,
        )
        done = 0

        def merged(merge: Any) -> None:
            nonlocal done
            if not done:
                progress.start("merge", (self.prune_from or self.vocab_size) - len(SPECIAL_TOKENS) - 256)
            done += 1
            progress.advance()

        return wrap(trainer.train_from_iterator(texts, on_merge=merged))
