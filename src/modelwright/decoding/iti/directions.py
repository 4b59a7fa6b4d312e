"""Which heads tell true texts from false ones, and along which direction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelwright.errors import UserError, require
from modelwright.files import atomic_path
from modelwright.models.heads import Head, check_heads, fingerprint, head_layers
from modelwright.models.loading import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class HeadDirections:
    """Directions in the outputs of some heads.

    Attributes:
        heads: Pairs of layer and head, the best probe first.
        directions: Unit vectors, ``(heads, size)`` float32.
        deviations: Standard deviation of the outputs along each, ``(heads,)``.
        accuracies: Accuracy of each head's probe on held-out texts, ``(heads,)``.
        fingerprint: Of the model.
    """

    heads: list[Head]
    directions: Tensor
    deviations: Tensor
    accuracies: Tensor
    fingerprint: str

    def top(self, count: int) -> HeadDirections:
        """Returns the heads with the best probes.

        Raises:
            UserError: There are not so many.
        """
        if not 1 <= count <= len(self.heads):
            raise UserError(f"{count} heads are wanted: there are directions for 1 to {len(self.heads)}.")
        return HeadDirections(
            self.heads[:count], self.directions[:count], self.deviations[:count], self.accuracies[:count],
            self.fingerprint,
        )  # fmt: skip

    def check(self, model: PreTrainedModel) -> None:
        """Refuses directions of another model.

        Raises:
            UserError: They are.
        """
        if self.fingerprint != fingerprint(model):
            raise UserError("The directions were fitted on another model (or other weights): fit them anew.")
        check_heads(self.heads, head_layers(model))

    def save(self, path: str | Path, force: bool = False) -> None:
        """Writes a safetensors file.

        Raises:
            UserError: The file exists and ``force`` is off.
        """
        from safetensors.torch import save_file

        tensors = {n: getattr(self, n).contiguous() for n in ("directions", "deviations", "accuracies")}
        metadata = {"heads": json.dumps(self.heads), "fingerprint": self.fingerprint, "format": "pt"}
        with atomic_path(path, force) as partial:
            save_file(tensors, partial, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> HeadDirections:
        """Reads a file of :meth:`save`.

        Args:
            path: The file.
            model: If given, directions of another model are refused.

        Raises:
            UserError: The file is none, or another model's.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                heads = [(int(layer), int(head)) for layer, head in json.loads(said["heads"])]
                directions, deviations, accuracies = map(file.get_tensor, ("directions", "deviations", "accuracies"))
                found = cls(heads, directions, deviations, accuracies, said["fingerprint"])
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise UserError(f"{path} holds no directions of heads: {first_line(error)}") from error
        if model is not None:
            found.check(model)
        return found


@torch.no_grad()
def head_outputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int = 8
) -> Tensor:
    """Returns each head's output at the last token of each text, ``(texts, layers, heads, size)`` float32.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: Texts, of at least one token each.
        batch_size: Texts at once.
    """
    layers = head_layers(model)
    caught: dict[int, Tensor] = {}

    def watch(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            caught[index] = args[0][:, -1].float().cpu()

        return hook

    handles = [layer.output.register_forward_pre_hook(watch(index)) for index, layer in layers.items()]
    found = []
    try:
        for begin in range(0, len(texts), batch_size):
            rows = [tokenizer(text)["input_ids"] for text in texts[begin : begin + batch_size]]
            if not all(rows):
                raise UserError("A text has no tokens: leave empty texts out.")
            width = max(map(len, rows))
            ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            model(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                position_ids=positions.to(model.device), use_cache=False,
            )  # fmt: skip
            shape = next(iter(layers.values()))
            found.append(torch.stack([caught[index].view(-1, shape.heads, shape.size) for index in layers], 1))
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(found)


def fit_directions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    true: Sequence[str],
    false: Sequence[str],
    *,
    held_out: float = 0.2,
    seed: int = 0,
    batch_size: int = 8,
) -> HeadDirections:
    """Fits a linear probe on every head, and takes the shift from false to true texts (sections 3.1 and 4.1).

    Probes are logistic regressions on a head's output at the last token, trained on a part of the texts and rated on
    the rest. The direction is the "mass mean shift", the mean output of true texts minus that of false ones, which
    the paper found best; its deviation is over all texts.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        true: Questions with true answers, say.
        false: The same with false ones.
        held_out: Share of the texts on which probes are rated.
        seed: Seed of the division.
        batch_size: Texts at once.

    Returns:
        All heads, the best probe first.

    Raises:
        UserError: There are too few texts.
    """
    linear = require("sklearn.linear_model", "decoding", "Fitting directions")
    if min(len(true), len(false)) < 4 or not 0 < held_out < 1:
        raise UserError("Give at least 4 true and 4 false texts, and a held-out share between 0 and 1.")
    outputs = torch.cat([head_outputs(model, tokenizer, texts, batch_size=batch_size) for texts in (true, false)])
    labels = torch.cat((torch.ones(len(true)), torch.zeros(len(false)))).bool()
    generator = torch.Generator().manual_seed(seed)
    test = torch.zeros_like(labels)
    for begin, count in ((0, len(true)), (len(true), len(false))):  # of each kind the same share
        chosen = torch.randperm(count, generator=generator)[: max(1, round(held_out * count))]
        test[begin + chosen] = True
    means = outputs[labels].mean(0) - outputs[~labels].mean(0)
    directions = means / means.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    deviations = torch.einsum("nlhd,lhd->nlh", outputs, directions).std(0)
    layers = list(head_layers(model))
    rated = []
    for place, index in enumerate(layers):
        for head in range(outputs.shape[2]):
            x = outputs[:, place, head].double().numpy()
            probe = linear.LogisticRegression(max_iter=1000).fit(x[~test], labels[~test])
            rated.append((-probe.score(x[test], labels[test]), index, head, place))
    rated.sort()
    at = [(place, head) for _, _, head, place in rated]
    return HeadDirections(
        [(index, head) for _, index, head, _ in rated],
        torch.stack([directions[place, head] for place, head in at]),
        torch.stack([deviations[place, head] for place, head in at]),
        torch.tensor([-accuracy for accuracy, *_ in rated]),
        fingerprint(model),
    )
