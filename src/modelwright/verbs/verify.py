"""``modelwright verify``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from modelwright.errors import UserError
from modelwright.options import Arg
from modelwright.progress import Progress


@dataclass(kw_only=True)
class Verify:
    """Run a method's claim: measure it against its baselines and say whether the claim holds here.

    Prints every variant with its spread over seeds, the paper's number, and the verdict: holds, holds in part, or does
    not hold at this scale. Any verdict is a finding, so the exit code is 0; it is not 0 only when the experiment could
    not be run. With the claim's full number of seeds the result is kept as results/claims/METHOD.SCALE.json in the
    current folder. A run that was stopped continues when it is started again.
    """

    method: Annotated[str, Arg("A method's name, or all.", positional=True)]
    scale: Annotated[
        Literal["cpu", "gpu", "miniature"],
        Arg("How large: cpu (minutes on 2 cores), gpu (minutes on one card), miniature (only shows that it runs)."),
    ] = "cpu"
    seeds: Annotated[
        str | None, Arg("How many seeds (3), or which (0,1,7; a single one as 7,). Default: the claim's own.")
    ] = None
    workers: Annotated[int | None, Arg("Processes at once. Default: one per core, or one on a GPU.", kind="run")] = None
    output: Annotated[
        Path | None,
        Arg(
            "Where to keep the result instead; also when the seeds are too few to count.",
            kind="output",
            filename="claim.json",
        ),
    ] = None
    force: Annotated[bool, Arg("Replace a result that was kept before.", kind="run")] = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Runs the experiments.

        Returns:
            The result document of the claim; for ``all``, ``{"results": [documents]}``.

        Raises:
            UserError: See :func:`modelwright.verify.runner.run_claim`.
        """
        from modelwright.catalog import cards, find

        if self.method != "all":
            return self._verify(find(self.method), progress)
        if self.output is not None:
            raise UserError("--output names one file, so it does not go with 'all': leave it out.")
        return {"results": [self._verify(card, progress) for card in cards().values() if card.has_claim]}

    def show(self, result: dict[str, Any]) -> None:
        """Prints the result as tables."""
        from modelwright.verify.console import print_result

        for document in result.get("results", [result]):
            print_result(document)

    def _verify(self, card: Any, progress: Progress) -> dict[str, Any]:
        from modelwright.files import check_output, write_json
        from modelwright.verify.results import file_name
        from modelwright.verify.runner import load_claim, run_claim

        claim = load_claim(card)
        own = list(claim.seeds.get(self.scale, ()))
        seeds = own if self.seeds is None else parse_seeds(self.seeds, own)
        path, keep = self.output, True
        if path is not None:
            check_output(path, self.force)
        else:
            path = Path("results") / "claims" / file_name(claim.method, self.scale)
            if keep := self.scale != "miniature" and set(own) <= set(seeds):
                if path.exists() and not self.force:
                    keep = False
                    progress.message(f"{path} exists already and will be left as it is (--force replaces it).")
            else:
                progress.message(
                    "With a miniature or with fewer seeds than the claim's own, the result is only printed."
                )
        document = run_claim(claim, self.scale, seeds, self.workers, progress)
        if keep:
            write_json(path, document, force=self.force)
            document["stored"] = str(path)
        return document


def parse_seeds(text: str, own: list[int]) -> list[int]:
    """Reads ``3`` as the first three of the claim's seeds (and further whole numbers), ``0,1,7`` as a list.

    Raises:
        UserError: It is neither.
    """
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or ("," not in text and numbers[0] < 1):
        raise UserError(f"--seeds {text!r} is neither a number of seeds such as 5 nor a list such as 0,1,2.")
    if "," in text:
        return numbers
    spare = (n for n in range(numbers[0] + len(own)) if n not in own)
    return [*own, *spare][: numbers[0]]
