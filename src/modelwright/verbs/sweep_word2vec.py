"""`modelwright sweep word2vec`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class SweepWord2Vec:
    """Tune word2vec by the cross-entropy method (CEHPO) and write the best word vectors.

    Interrupted or killed, the same command continues where it was.
    """

    data: Annotated[list[str], Arg("Text, a sentence a line: files, folders, patterns or hub ids.", kind="input")]
    output: Annotated[Path, Arg("Folder to write.", short="-o", kind="output", filename="word2vec")]
    analogies: Annotated[
        Path | None, Arg("Score by these questions (format of questions-words.txt).", kind="input")
    ] = None
    similarity: Annotated[Path | None, Arg("Or by these: word, word, judgement, separated by tabs.", kind="input")] = (
        None
    )
    text_field: Annotated[str, Arg("Field that holds the text.")] = "text"
    keep_case: Annotated[bool, Arg("Do not make the words lower case; the questions' case counts then.")] = False
    population: Annotated[int, Arg("Settings of a round.")] = 20
    elite: Annotated[float, Arg("Share of them that is learned from.")] = 0.2
    smoothing: Annotated[float, Arg("Weight of what the elite says against what was believed before.")] = 0.7
    rounds: Annotated[int, Arg("Rounds at most.")] = 10
    evaluations: Annotated[int | None, Arg("Trainings at most.")] = None
    seed: Annotated[int, Arg("Seed of the draws and of word2vec.")] = 0
    workers: Annotated[int, Arg("Trainings at the same time.", kind="run")] = 1
    force: Annotated[bool, Arg("Replace an existing output.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Searches; returns the best setting, its score, the last law and how the search went."""
        from modelwright.data.records import Records
        from modelwright.errors import require
        from modelwright.files import atomic_path, check_output, content_hash, write_json

        check_output(self.output, self.force)
        require("gensim", "word2vec", "training word2vec")
        from modelwright.training.cehpo import cross_entropy_search
        from modelwright.training.cehpo.word2vec import SPACE, Word2VecObjective, read_sentences

        records = Records(self.data, self.text_field)
        sentences = read_sentences(records.texts(), lower=not self.keep_case)
        objective = Word2VecObjective(
            sentences, self.analogies, self.similarity, self.seed, ignore_case=not self.keep_case
        )
        questions = content_hash(self.analogies or self.similarity)  # type: ignore[arg-type]
        journal = self.output.with_name(self.output.name + ".search.jsonl")
        progress.start("search", self.evaluations or self.population + (self.rounds - 1) * (self.population - 1))
        result = cross_entropy_search(
            SPACE,
            objective,
            population=self.population,
            elite=self.elite,
            smoothing=self.smoothing,
            rounds=self.rounds,
            evaluations=self.evaluations,
            workers=self.workers,
            journal=journal,
            about={"data": records.fingerprint(), "questions": questions, "keep_case": self.keep_case},
            seed=self.seed,
            on_error="skip",
            on_evaluation=lambda setting, score: progress.advance(1, f"score {score:.3f}"),
        )
        summary = {
            "best": result.best,
            "score": result.score,
            "mode": result.mode,
            "law": result.law,
            "stopped": result.stopped,
            "evaluations": result.evaluations,
            "failures": result.failures,
            "rounds": [asdict(one) for one in result.rounds],
        }
        with atomic_path(self.output, self.force) as partial:
            partial.mkdir()
            objective.train(result.best).wv.save_word2vec_format(str(partial / "vectors.txt"))
            write_json(partial / "search.json", summary)
        journal.unlink(missing_ok=True)
        return {"output": str(self.output), **summary}
