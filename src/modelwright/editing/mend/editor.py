"""MEND as an editor: trained once on many edits, then one backward pass an edit (arXiv 2110.11309, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from modelwright.editing.deltas import LowRank
from modelwright.editing.edit import WeightEdit, check_editable
from modelwright.editing.editor import check_layer
from modelwright.editing.examples import make_examples, target_loss, token_divergence, trainable_only
from modelwright.editing.fingerprint import model_fingerprint
from modelwright.editing.learning import Lesson, Lessons, TrainedEditor, learn, mean_loss, plain_inputs
from modelwright.editing.mend.factors import gradient_factors
from modelwright.editing.mend.network import MendNetworks
from modelwright.editing.requests import EditRequest
from modelwright.errors import UserError
from modelwright.files import atomic_path, read_json, write_json
from modelwright.models.roles import Projection, roles, unwrap
from modelwright.options import Arg
from modelwright.progress import Progress, Silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FORMAT = 1
Factors = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(kw_only=True)
class MEND(TrainedEditor):
    """MEND: learned networks turn the gradient of the edit's loss into a change that generalises and stays local.

    Train it once for a model (:meth:`train`, or `modelwright edit train mend`); each edit is then one backward pass.

    The networks know gradients of the model they were trained on. In a row of edits one by one the losses grow, the
    moments stay, and so each change may be larger than the one before, until the model is gone; the published code,
    which keeps the moments of the training too, does the same. Edits that are made at once do not build on each other.

    In training, a step's factors enter the moments before any of them is normalised; the published code adds them
    weight by weight. The rates have an optimiser of their own, as in the paper; in the published code it steps after
    the gradients were cleared, so that its rates move by ``learning_rate`` a step alone.
    """

    name: ClassVar[str] = "mend"
    stronger: ClassVar[str] = "train it longer, or with a larger edit_weight or rate (modelwright edit train mend)"

    trained: Annotated[Path | None, Arg("Folder of the trained networks.", kind="input")] = None
    layers: Annotated[tuple[int, ...], Arg("Layers whose MLPs are edited; the last three by default.")] = ()
    rank: Annotated[int, Arg("Rank of the networks' blocks.")] = 1920
    hidden: Annotated[int, Arg("Blocks of a network before its last.")] = 1
    normalise: Annotated[bool, Arg("Normalise inputs and gradients by their running moments.")] = True
    rate: Annotated[float, Arg("Where each weight's learned rate starts.")] = 1e-4
    init_sign: Annotated[
        Literal[1, -1], Arg("1: start up the gradient, as the original; -1 (ours): start as descent.")
    ] = 1
    learning_rate: Annotated[float, Arg("Training: Adam's learning rate for the networks.")] = 1e-6
    rate_learning_rate: Annotated[float, Arg("Training: Adam's learning rate for the rates.")] = 1e-4

    shapes_training: ClassVar[tuple[str, ...]] = (
        "layers", "rank", "hidden", "normalise", "rate", "init_sign", "rate_learning_rate",
    )  # fmt: skip
    #: The networks, once trained or loaded.
    networks: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.rank, self.hidden + 1) < 1:
            raise UserError("rank must be at least 1, and hidden not below 0.")
        if not 0 <= self.rate_learning_rate < math.inf:
            raise UserError("rate_learning_rate must not be below 0.")
        if self.trained is not None:
            self.networks = load_networks(self.trained)

    def train(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        locality: Sequence[str] = (),
        checkpoint: Path | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Trains the networks; the model is left as it was.

        Each step edits a copy of the weights for one request, and asks for a paraphrase and for another text. A tenth
        of the requests is held out; the networks with the best loss on it are kept.

        Args:
            model: The model to be edited later.
            tokenizer: Its tokenizer.
            requests: Facts such as the later ones, with paraphrases if it is to generalise.
            locality: Texts that an edit must not touch; the other requests' prompts by default.
            checkpoint: Folder for the state of the training: it is continued from there.
            progress: Where to tell.

        Returns:
            See :func:`~modelwright.editing.learning.learn`.

        Raises:
            UserError: Too few requests, a model that cannot be edited so, or a loss that is not finite.
        """
        maps = self._maps(model)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            networks = MendNetworks(
                [(m.name, m.weight().shape[1], m.weight().shape[0]) for m in maps], rank=self.rank, hidden=self.hidden,
                normalise=self.normalise, rate=self.rate * self.init_sign,
            ).to(model.device)  # fmt: skip
        lessons = Lessons(requests, locality, self.seed)
        rates = [networks.rates]
        others = [p for p in networks.parameters() if p is not networks.rates]
        optimizer = torch.optim.Adam(
            [{"params": others, "lr": self.learning_rate}, {"params": rates, "lr": self.rate_learning_rate}]
        )

        def loss(step: int) -> torch.Tensor:
            return self._loss(model, tokenizer, maps, networks, lessons.at(step), observe=True)

        def validate() -> float:
            with torch.no_grad():
                return mean_loss(
                    [self._loss(model, tokenizer, maps, networks, lesson) for lesson in lessons.held_out()]
                )

        with trainable_only(model, [m.base.weight for m in maps]), torch.enable_grad():
            report = learn(
                networks, optimizer, loss, self.schedule(), validate=validate if lessons.validation else None,
                checkpoint=checkpoint, settings=self.settings(model, requests, locality), progress=progress,
            )  # fmt: skip
        self.networks = networks.eval().requires_grad_(False)
        return {**report, "rates": [float(rate) for rate in networks.rates]}

    def check(self, requests: Sequence[EditRequest]) -> None:
        """See :meth:`Editor.check`; the networks must be trained."""
        super().check(requests)
        if self.networks is None or not self.networks.trained():
            raise UserError(
                "MEND is not trained: train it for this model (`modelwright edit train mend`, or .train in Python) and "
                "name the folder with --set trained=FOLDER (trained= in Python)."
            )

    def fit(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        *,
        progress: Progress | None = None,
    ) -> WeightEdit:
        """See :meth:`Editor.fit`. Several requests are edited at once: their factors are summed.

        ``details`` has each request's ``losses`` before the edit.

        Raises:
            UserError: The networks are not trained, or are another model's.
        """
        self.check(requests)
        progress = progress or Silent()
        maps = self._maps(model, self.networks)
        networks = self.networks.to(model.device)
        found: list[Factors] = []
        losses = []
        with trainable_only(model, [m.base.weight for m in maps]):
            for request in requests:
                factors, loss = edit_factors(model, tokenizer, maps, request)
                found.append(factors)
                losses.append(loss)
                progress.advance(1)
        joined = [(torch.cat([f[i][0] for f in found]), torch.cat([f[i][1] for f in found])) for i in range(len(maps))]
        with torch.no_grad():
            changes = networks(joined)
        deltas = {
            f"{m.name}.weight": LowRank(left.T.contiguous().cpu(), right.contiguous().cpu(), m.transposed)
            for m, (left, right) in zip(maps, changes, strict=True)
        }
        return WeightEdit(self.name, model_fingerprint(model, whole=deltas), deltas, requests, {"losses": losses})

    def save(self, folder: str | Path, force: bool = False) -> None:
        """Writes the trained networks (safetensors and JSON) as a folder that appears whole or not at all.

        Raises:
            UserError: They are not trained, or the folder exists.
        """
        if self.networks is None:
            raise UserError("MEND is not trained: there is nothing to save yet.")
        with atomic_path(folder, force) as partial:
            partial.mkdir()
            state = {n: t.detach().cpu().contiguous() for n, t in self.networks.state_dict().items()}
            save_file(state, partial / "mend.safetensors")
            described = {"format": _FORMAT, "maps": self.networks.maps, "options": self.networks.options}
            write_json(partial / "mend.json", described)

    def _maps(self, model: PreTrainedModel, networks: MendNetworks | None = None) -> list[Projection]:
        """Returns the gate, up and down projections that are edited, checked against the networks."""
        parts = roles(model)
        depth = len(parts.layers)
        chosen = [check_layer(layer, depth) for layer in self.layers] or range(max(0, depth - 3), depth)
        if networks is not None:
            known = {p.name: p for layer in parts.layers for p in (layer.gate, layer.up, layer.down) if p is not None}
            for name, inputs, outputs in networks.maps:
                if name not in known or tuple(known[name].weight().shape) != (outputs, inputs):
                    raise UserError(
                        f"The MEND networks edit '{name}' ({outputs} x {inputs}), which this model does not have: they "
                        f"were trained for another one."
                    )
            maps = [known[name] for name, _, _ in networks.maps]
        else:
            maps = [p for i in chosen for p in (parts.layers[i].gate, parts.layers[i].up, parts.layers[i].down) if p]
        if not maps:
            raise UserError(f"The layers of a '{parts.family}' model have no MLP that could be edited.")
        for m in maps:
            check_editable(model, f"{m.name}.weight")
        return maps

    def _loss(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        maps: Sequence[Projection],
        networks: MendNetworks,
        lesson: Lesson,
        observe: bool = False,
    ) -> torch.Tensor:
        """Returns c_edit NLL(answer | edited) + c_loc KL(base ‖ edited) elsewhere (equation 4)."""
        factors, _ = edit_factors(model, tokenizer, maps, lesson.request)
        if observe:
            networks.observe(factors)
        edited = edited_weights(maps, networks(factors))
        inner: Any = unwrap(model)
        asked = make_examples(model, tokenizer, [(lesson.prompt, lesson.request.target)])
        elsewhere = plain_inputs(model, tokenizer, [lesson.elsewhere])
        with torch.no_grad():
            base = inner(**elsewhere, use_cache=False).logits
        new = functional_call(inner, edited, kwargs={**elsewhere, "use_cache": False}).logits
        divergence = token_divergence(base, new, elsewhere["attention_mask"])
        answer = target_loss(functional_call(inner, edited, kwargs=asked.inputs).logits, asked)
        return self.edit_weight * answer + self.locality_weight * divergence


def edit_factors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, maps: Sequence[Projection], request: EditRequest
) -> tuple[Factors, float]:
    """Returns the factors of the gradient of a request's loss, map by map, and that loss."""
    examples = make_examples(model, tokenizer, [(request.text, request.target)])
    seen: list[float] = []

    def loss() -> torch.Tensor:
        value = target_loss(model(**examples.inputs).logits, examples)
        seen.append(float(value.detach()))
        return value

    return gradient_factors(loss, maps), seen[0]


def edited_weights(
    maps: Sequence[Projection], changes: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Returns each map's weight with its change added, by parameter name and differentiable in the change.

    Args:
        maps: The maps.
        changes: For each, left (n, out_features) and right (n, in_features).
    """
    edited: dict[str, torch.Tensor] = {}
    for m, (left, right) in zip(maps, changes, strict=True):
        change = right.T @ left if m.transposed else left.T @ right
        weight = m.base.weight.detach()
        edited[f"{m.name}.weight"] = (weight.float() + change).to(weight.dtype)
    return edited


def load_networks(folder: str | Path) -> MendNetworks:
    """Reads networks that :meth:`MEND.save` wrote.

    Raises:
        UserError: The folder holds none, or damaged ones.
    """
    folder = Path(folder)
    if not (folder / "mend.json").is_file():
        raise UserError(f"{folder} holds no trained MEND networks (no mend.json): train them first.")
    raw = read_json(folder / "mend.json")
    try:
        networks = MendNetworks([tuple(row) for row in raw["maps"]], **raw["options"])
        networks.load_state_dict(load_file(folder / "mend.safetensors"))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"The MEND networks in {folder} are damaged ({reason}): train them again.") from error
    return networks.eval().requires_grad_(False)
