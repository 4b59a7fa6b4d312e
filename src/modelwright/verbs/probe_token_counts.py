"""`modelwright probe token-counts`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class TokenCountsVerb:
    """Count how often each token stands in a training corpus, for `probe token-loss`; writes Parquet.

    Says too which share of the types is rare, and with --sizes how that grows with the vocabulary.
    """

    data: Annotated[list[str], Arg("Training documents: files, folders, patterns or hub ids.", kind="input")]
    tokenizer: Annotated[str, Arg("Tokenizer: a folder (such as the model's) or a hub id.", kind="input")]
    output: Annotated[Path, Arg("Parquet file to write.", short="-o", kind="output", filename="counts.parquet")]
    text_field: Annotated[str, Arg("Field that holds the text.")] = "text"
    coverage: Annotated[float, Arg("Types are rare that are not needed for this share of occurrences.")] = 0.95
    sizes: Annotated[list[int], Arg("Also train a byte-level BPE of this size on the data and say its share.")] = field(
        default_factory=list
    )
    trust_remote_code: Annotated[bool, Arg("Run Python code that comes with the tokenizer.")] = False
    force: Annotated[bool, Arg("Replace an existing output.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Counts; returns tokens, documents, types seen, and the shares of rare types."""
        from dataclasses import asdict

        from modelwright.data.records import Records
        from modelwright.errors import UserError
        from modelwright.files import check_output
        from modelwright.models.loading import load_tokenizer
        from modelwright.probing.fair_lm.counts import count_tokens
        from modelwright.probing.fair_lm.vocabulary import by_vocabulary_size, rare_types

        check_output(self.output, self.force)
        if self.output.suffix != ".parquet":
            raise UserError(f"{self.output} must end in .parquet: counts are written with their tokenizer's mark.")
        if not 0 < self.coverage <= 1:
            raise UserError(f"--coverage must lie between 0 and 1, not {self.coverage}.")
        tokenizer = load_tokenizer(self.tokenizer, trust_remote_code=self.trust_remote_code)
        texts = Records(self.data, self.text_field).texts()
        counts = count_tokens(texts, tokenizer, progress=progress)
        sizes = by_vocabulary_size(texts, self.sizes, self.coverage, progress) if self.sizes else []
        counts.save(self.output, tokenizer, self.force)
        found: dict[str, Any] = {"output": str(self.output), "tokens": counts.tokens, "documents": counts.documents}
        found |= asdict(rare_types(counts, self.coverage))
        if sizes:
            found["sizes"] = {str(size): asdict(one) for size, one in zip(self.sizes, sizes)}
        return found
