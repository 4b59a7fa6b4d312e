"""`modelwright tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class TrainTokenizer:
    """Train a byte-level BPE tokenizer on documents and write it as a folder that AutoTokenizer loads."""

    data: Annotated[list[str], Arg("Documents: files, folders, patterns or hub ids.", kind="input")]
    output: Annotated[Path, Arg("Folder to write.", short="-o", kind="output", filename="tokenizer")]
    vocab_size: Annotated[int, Arg("Tokens, with 256 bytes and 3 special ones among them.")] = 8192
    min_frequency: Annotated[int, Arg("Merge pairs that are seen at least this often.")] = 2
    text_field: Annotated[str, Arg("Field that holds the text.")] = "text"
    limit: Annotated[int | None, Arg("Read only this many documents.")] = None
    force: Annotated[bool, Arg("Replace an existing output.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Trains; returns vocab_size, documents, bytes and, over the training text, bytes_per_token."""
        import itertools

        from modelwright.data.records import Records
        from modelwright.files import atomic_path, check_output
        from modelwright.models.tokenizers import encode, train_bpe

        check_output(self.output, self.force)
        documents = length = 0
        sample: list[str] = []

        def texts() -> Any:
            nonlocal documents, length
            for text in itertools.islice(Records(self.data, self.text_field).texts(), self.limit):
                documents += 1
                length += len(text.encode())
                if documents <= 200:
                    sample.append(text[:10_000])
                progress.advance()
                yield text

        progress.start("train tokenizer")
        tokenizer = train_bpe(texts(), self.vocab_size, min_frequency=self.min_frequency)
        with atomic_path(self.output, self.force) as partial:
            tokenizer.save_pretrained(partial)
        sampled = sum(len(text.encode()) for text in sample)
        return {
            "output": str(self.output),
            "vocab_size": len(tokenizer),
            "documents": documents,
            "bytes": length,
            "bytes_per_token": round(sampled / max(1, sum(map(len, encode(tokenizer, sample)))), 3),
        }
