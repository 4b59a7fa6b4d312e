"""SERAC as an editor: trained once, then each edit is a line in a memory (arXiv 2206.06520, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import nn

from modelwright.editing.edit import edits_on
from modelwright.editing.examples import make_examples, target_loss, token_divergence, trainable_only
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.learning import Lesson, Lessons, TrainedEditor, learn, mean_loss, plain_inputs
from modelwright.editing.requests import EditRequest
from modelwright.editing.sentences import load_encoder
from modelwright.editing.serac.edit import SeracEdit
from modelwright.editing.serac.parts import Classifier, Pooling, SeracParts, check_vocabulary
from modelwright.editing.serac.scope import log_mixture
from modelwright.errors import UserError
from modelwright.files import atomic_path
from modelwright.models.loading import load_model
from modelwright.options import Arg
from modelwright.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(kw_only=True)
class SERAC(TrainedEditor):
    """SERAC: keep the edits as text; inputs that a classifier finds in their scope are answered by a small model.

    Train it once for a model (:meth:`train`, or `modelwright edit train serac`). Scope is told by the distance of
    embeddings, or, with ``classifier=cross``, by reading each edit with the input: that takes a pass of the encoder for
    each edit in memory, and starts at a score of ½ for every pair.
    """

    name: ClassVar[str] = "serac"
    changes_weights: ClassVar[bool] = False
    stronger: ClassVar[str] = (
        "lower threshold, or train it longer, with facts like these (modelwright edit train serac)"
    )

    trained: Annotated[Path | None, Arg("Folder of the trained parts.", kind="input")] = None
    threshold: Annotated[float, Arg("Score above which an input is in scope.")] = 0.5
    small: Annotated[
        str | None, Arg("Training: small model with the same tokenizer, a folder or hub id.", kind="input")
    ] = None
    encoder: Annotated[
        str | None,
        Arg("Training: encoder of texts, a folder or hub id; the model's own states by default.", kind="input"),
    ] = None
    classifier: Annotated[
        Classifier, Arg("Training: embedding: compare edit and input; cross: read them together, slower.")
    ] = "embedding"
    pooling: Annotated[Pooling, Arg("Training: of hidden states; auto: cls of an encoder, mean of own states.")] = (
        "auto"
    )
    separator: Annotated[str, Arg("Training: what stands between edit and input for the small model.")] = " "
    others: Annotated[int, Arg("Training: further edits in memory beside the one that is asked for.")] = 3

    shapes_training: ClassVar[tuple[str, ...]] = ("encoder", "classifier", "pooling", "separator", "others")
    #: The parts, once trained or loaded.
    parts: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold < 1 or self.others < 0:
            raise UserError("threshold must be 0 or more and below 1, and others not below 0.")
        if self.trained is not None:
            self.parts = SeracParts.read(Path(self.trained))

    def train(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        locality: Sequence[str] = (),
        small: PreTrainedModel | None = None,
        checkpoint: Path | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Trains classifier and small model together, on the mixture weighed by the score; the model is left as it was.

        Each step has one request and some others in memory, asks for a paraphrase, and for a text out of scope. A
        tenth of the requests is held out; the weights with the best loss on it are kept. Before the first step the
        embeddings are scaled so that two different edits of the training set are on average √2 apart (ours: the score's
        exponential gives no gradient from afar).

        Args:
            model: The model to be edited later, which is frozen.
            tokenizer: Its tokenizer.
            requests: Facts such as the later ones, with paraphrases.
            locality: Texts out of scope; the other requests' prompts by default.
            small: The counterfactual model, instead of the option of that name; it is trained in place.
            checkpoint: Folder for the state of the training: it is continued from there.
            progress: Where to tell.

        Returns:
            See :func:`~modelwright.editing.learning.learn`.

        Raises:
            UserError: No small model, one with another tokenizer, too few requests, or a loss that is not finite.
        """
        lessons = Lessons(requests, locality, self.seed, self.others)
        if small is None and not self.small:
            raise UserError(
                "SERAC needs a small model with the same tokenizer as the model: name its folder with "
                "--set small=FOLDER (small= in Python)."
            )
        small = (small if small is not None else load_model(str(self.small), device="cpu")).to(model.device)
        check_vocabulary(small, tokenizer)
        if self.classifier == "cross" and not self.encoder:
            raise UserError(
                "The cross-encoder needs an encoder that is trained (encoder=): a linear map of the model's own "
                "states, which are frozen, cannot compare two texts."
            )
        encoder, encoder_tokenizer = load_encoder(self.encoder) if self.encoder else (None, None)
        size = (encoder if encoder is not None else model).get_input_embeddings().weight.shape[1]
        hidden = (encoder if encoder is not None else model).config.hidden_size
        parts = SeracParts(
            small, encoder, encoder_tokenizer, size=hidden or size, pooling=self.pooling, separator=self.separator,
            classifier=self.classifier,
        ).to(model.device)  # fmt: skip
        parts.eval().requires_grad_(True)
        self._spread(parts, model, tokenizer, lessons.training)
        parameters = [p for p in parts.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=self.learning_rate)

        def loss(step: int) -> torch.Tensor:
            return self._loss(model, tokenizer, parts, lessons.at(step))

        def validate() -> float:
            with torch.no_grad():
                return mean_loss([self._loss(model, tokenizer, parts, lesson) for lesson in lessons.held_out()])

        settings = {**self.settings(model, requests, locality), "small": model_fingerprint(small)}
        with trainable_only(model), torch.enable_grad():
            report = learn(
                _Trained(parts), optimizer, loss, self.schedule(), validate=validate if lessons.validation else None,
                checkpoint=checkpoint, settings=settings, progress=progress,
            )  # fmt: skip
        self.parts = parts.eval().requires_grad_(False)
        return report

    def check(self, requests: Sequence[EditRequest]) -> None:
        """See :meth:`Editor.check`; the parts must be trained."""
        super().check(requests)
        if self.parts is None:
            raise UserError(
                "SERAC is not trained: train it for this model (`modelwright edit train serac`, or .train in Python) "
                "and name the folder with --set trained=FOLDER (trained= in Python)."
            )

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        progress: Progress | None = None,
    ) -> SeracEdit:
        """See :meth:`Editor.fit`. On a model that has a memory of the same parts on it, that one's edits are kept too.

        Raises:
            UserError: The parts are not trained, or are of another tokenizer.
        """
        self.check(requests)
        check_vocabulary(self.parts.small, tokenizer)
        before = [e for e in edits_on(model) if isinstance(e, SeracEdit) and e.parts.identity == self.parts.identity]
        with torch.no_grad():
            memory = self.parts.embed_requests(model, tokenizer, requests).cpu()
        before = before[-1:]
        memory = torch.cat([*(e.memory.cpu() for e in before), memory])
        known = [r for e in before for r in e.requests]
        if progress is not None:
            progress.advance(len(requests))
        return SeracEdit(
            self.name, model_fingerprint(model), self.parts, tokenizer, memory, self.threshold, [*known, *requests]
        )

    def save(self, folder: str | Path, force: bool = False) -> None:
        """Writes the trained parts as a folder that appears whole or not at all.

        Raises:
            UserError: They are not trained, or the folder exists.
        """
        if self.parts is None:
            raise UserError("SERAC is not trained: there is nothing to save yet.")
        with atomic_path(folder, force) as partial:
            partial.mkdir()
            self.parts.write(partial)
        self.parts.folder = Path(folder)

    @torch.no_grad()
    def _spread(
        self,
        parts: SeracParts,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
    ) -> None:
        if parts.classifier == "cross":
            return
        some = parts.embed_requests(model, tokenizer, requests[:64])
        squares = torch.cdist(some, some).square()
        mean = float(squares.sum()) / max(len(some) * (len(some) - 1), 1)
        if mean > 0:
            parts.projection.weight *= (2 / mean) ** 0.5

    def _loss(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parts: SeracParts, lesson: Lesson
    ) -> torch.Tensor:
        """Returns c_edit NLL(answer | mixture in scope) + c_loc KL(base ‖ mixture out of scope)."""
        memory = [lesson.request, *lesson.others]
        embedded = parts.embed_requests(model, tokenizer, memory)
        scores, best = parts.scores(model, tokenizer, [lesson.prompt, lesson.elsewhere], memory, embedded).max(1)

        def mixture(inputs: dict[str, Any], row: int) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                base = model(**inputs).logits.float()
            ids = inputs["input_ids"][0].tolist()
            other = parts.logits(tokenizer, [memory[int(best[row])]], [ids], base.shape[-1], base.device)[0][None]
            return base, log_mixture(base.log_softmax(-1), other.float().log_softmax(-1), scores[row : row + 1])

        asked = make_examples(model, tokenizer, [(lesson.prompt, lesson.request.target)])
        elsewhere = plain_inputs(model, tokenizer, [lesson.elsewhere])
        answer = target_loss(mixture(asked.inputs, 0)[1], asked)
        base, mixed = mixture({**elsewhere, "use_cache": False}, 1)
        divergence = token_divergence(base, mixed, elsewhere["attention_mask"])
        return self.edit_weight * answer + self.locality_weight * divergence


class _Trained(nn.Module):
    """The parts without names that are tied: a state that can be saved and compared."""

    def __init__(self, parts: SeracParts) -> None:
        super().__init__()
        self.values = nn.ParameterList(list(parts.parameters()))
