"""Knowledge neurons as an editor (arXiv 2104.08696, sections 3 and 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from modelwright.editing.deltas import Columns, Delta, join
from modelwright.editing.edit import WeightEdit, check_editable
from modelwright.editing.editor import Editor, check_layer
from modelwright.editing.examples import Examples, make_examples, target_log_probabilities, trainable_only
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.hooks import seen_input
from modelwright.editing.kn.attribution import Neuron, integrated_gradients, refine, strongest
from modelwright.editing.mlp import down_projection
from modelwright.editing.requests import EditRequest
from modelwright.editing.subject import encode_pair
from modelwright.errors import UserError
from modelwright.models.roles import roles
from modelwright.options import Arg
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(kw_only=True)
class KN(Editor):
    """KN: find the MLP units on which today's answer depends, and let them write the new answer instead.

    A unit is an input of a down projection. Units are attributed by integrated gradients at the prompt's last token,
    for the request and each of its paraphrases; those that the prompts share are kept. Each request needs its
    ``old_answer``, what the model says today.

    The paper writes embeddings of a model whose input and output embeddings are one matrix. Where they are two (Llama,
    Mistral, GPT-NeoX), a row of the input's says nothing to the head, so that the new answer is hardly ever written;
    ``embeddings=output`` (ours) takes the head's rows. The benchmarks' code differs: it attributes what enters the
    activation function (of a gated MLP, the gate alone), unlearns the tokens that the model itself goes on with, as
    many as the target has, and never doubles the target's.
    """

    name: ClassVar[str] = "kn"
    stronger: ClassVar[str] = (
        "raise scale, lower threshold or set embeddings=output (--set scale=4); KN seldom writes what it should, so "
        "try rome or memit"
    )

    steps: Annotated[int, Arg("Points of the integral (the paper's m).")] = 20
    points: Annotated[
        Literal["paper", "official"],
        Arg("paper: at j/m. official: evenly from 0, as the benchmark's code has it (with steps=1 only at 0)."),
    ] = "paper"
    threshold: Annotated[float, Arg("Keep units with more than this share of the largest attribution.")] = 0.2
    share: Annotated[float, Arg("Keep units that more than this share of the prompts have in common.")] = 0.4
    refine: Annotated[bool, Arg("Use the paraphrases as well; without them, the prompt alone.")] = True
    scale: Annotated[float, Arg("Times that an answer of one token is taken out and put in; longer ones: once.")] = 2.0
    embeddings: Annotated[
        Literal["input", "output"],
        Arg("Whose rows are written: the input embeddings', as published, or the head's (ours)."),
    ] = "input"
    layers: Annotated[tuple[int, ...], Arg("Layers whose units are looked at; all by default.")] = ()
    batch_size: Annotated[int, Arg("Points at once.", kind="run")] = 20

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UserError("steps and batch_size must be at least 1.")
        if self.embeddings not in ("input", "output"):
            raise UserError(f"embeddings is {self.embeddings!r}: give input or output.")
        if not 0 <= self.threshold < 1 or not 0 <= self.share < 1:
            raise UserError("threshold and share must be 0 or more and below 1.")

    def check(self, requests: Sequence[EditRequest]) -> None:
        """See :meth:`Editor.check`; each request needs its ``old_answer``."""
        super().check(requests)
        for request in requests:
            if not request.old_answer:
                raise UserError(
                    f"The request {request.text!r} has no old_answer: knowledge neurons are found by what the model "
                    f"answers today, so give that."
                )

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        progress: Progress | None = None,
    ) -> WeightEdit:
        """See :meth:`Editor.fit`. All requests are attributed on the model as it stands, and their changes are added.

        ``details`` has, for each request, its ``neurons`` as [layer, unit].

        Raises:
            UserError: A request has no ``old_answer``, or the model cannot be edited in this way.
        """
        self.check(requests)
        depth = len(roles(model).layers)
        layers = [check_layer(layer, depth) for layer in self.layers] or list(range(depth))
        names = {layer: f"{down_projection(model, layer).name}.weight" for layer in layers}
        for name in names.values():
            check_editable(model, name)
        whose = model.get_input_embeddings() if self.embeddings == "input" else model.get_output_embeddings()
        table = whose.weight.detach()
        if table.shape[1] != down_projection(model, layers[0]).weight().shape[0]:
            raise UserError("The model's embeddings are of another size than its hidden states: KN cannot write them.")
        progress = progress or Silent()
        deltas: dict[str, Delta] = {}
        found: list[list[Neuron]] = []
        for request in requests:
            neurons = self.find_neurons(model, tokenizer, request, layers)
            found.append(neurons)
            change = self._change(tokenizer, request, table).float().cpu()
            for layer in sorted({layer for layer, _ in neurons}):
                index = torch.tensor([unit for at, unit in neurons if at == layer])
                projection = down_projection(model, layer)
                inputs = projection.weight().shape[1]
                values = change[:, None].repeat(1, len(index))
                delta = Columns(index, values, inputs, projection.transposed)
                name = names[layer]
                deltas[name] = join(deltas[name], delta) if name in deltas else delta
            progress.advance(1, f"{len(neurons)} neurons")
        details: dict[str, Any] = {"neurons": [[list(neuron) for neuron in neurons] for neurons in found]}
        return WeightEdit(self.name, model_fingerprint(model, whole=deltas), deltas, requests, details)

    def find_neurons(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        request: EditRequest,
        layers: Sequence[int] | None = None,
    ) -> list[Neuron]:
        """Returns the units that hold a fact, as (layer, unit): none if no attribution is positive."""
        layers = list(range(len(roles(model).layers))) if layers is None else list(layers)
        texts = [request.text, *(request.paraphrase_texts() if self.refine else [])]
        sets = []
        for text in texts:
            attributions = self.attribute(model, tokenizer, text, request.old_answer or "", layers)
            sets.append({(layers[row], unit) for row, unit in strongest(attributions, self.threshold)})
        return refine(sets, self.share)

    def attribute(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        answer: str,
        layers: Sequence[int],
    ) -> torch.Tensor:
        """Returns each unit's attribution to an answer.

        The probability of an answer of several tokens is that of all of them, teacher forced; the units are scaled at
        the prompt's last token.

        Args:
            model: A causal language model.
            tokenizer: Its tokenizer.
            text: The prompt.
            answer: The answer.
            layers: Which layers.

        Returns:
            (layers, units) float32.
        """
        examples = make_examples(model, tokenizer, [(text, answer)])
        rows = []
        with trainable_only(model), torch.enable_grad():
            for layer in layers:
                module = down_projection(model, layer).module
                probability = _Probability(model, module, examples)
                rows.append(
                    integrated_gradients(probability, probability.own(), self.steps, self.points, self.batch_size)
                )
        return torch.stack(rows)

    def _change(self, tokenizer: PreTrainedTokenizerBase, request: EditRequest, table: torch.Tensor) -> torch.Tensor:
        """Returns (hidden,): what is added to each neuron's column."""
        total = torch.zeros(table.shape[1], device=table.device)
        for sign, answer in ((-1, request.old_answer or ""), (1, request.target)):
            _, ids = encode_pair(tokenizer, request.text, answer)
            scale = self.scale if len(ids) == 1 else 1.0
            total += sign * scale * table[torch.tensor(ids, device=table.device)].float().sum(0)
        return total


class _Probability:
    """An answer's probability as a function of one layer's units at the prompt's last token."""

    def __init__(self, model: PreTrainedModel, module: nn.Module, examples: Examples) -> None:
        self.model, self.module, self.examples = model, module, examples
        self.last = int(examples.last[0])

    def own(self) -> torch.Tensor:
        """Returns (units,): the activations as they are."""
        kept: list[torch.Tensor] = []
        with torch.no_grad(), seen_input(self.module, lambda inputs: kept.append(inputs[0, self.last].detach())):
            self.model(**self.examples.inputs)
        return kept[0]

    def __call__(self, activations: torch.Tensor) -> torch.Tensor:
        """Returns (rows,) for activations (rows, units)."""
        n, one = len(activations), self.examples
        many = Examples(
            one.input_ids.expand(n, -1), one.attention_mask.expand(n, -1), one.is_target.expand(n, -1),
            one.last.expand(n), one.targets * n,
        )  # fmt: skip

        def replace(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            inputs = arguments[0].clone()
            inputs[:, self.last] = activations.to(inputs.dtype)
            return (inputs, *arguments[1:])

        handle = self.module.register_forward_pre_hook(replace)
        try:
            return target_log_probabilities(self.model(**many.inputs).logits, many).exp()
        finally:
            handle.remove()
