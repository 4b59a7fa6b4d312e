"""The search for gates: the model is frozen, only the hypernetwork learns."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelwright.compression.budget import choose
from modelwright.compression.disp_llm.config import DispPruningConfig
from modelwright.compression.disp_llm.estimators import draw, on_probability
from modelwright.compression.disp_llm.hypernetwork import Hypernetwork
from modelwright.compression.gating import Gates, gated
from modelwright.compression.selections import Layout, Masks, blocks_of
from modelwright.compression.shrink import shrink
from modelwright.errors import UserError
from modelwright.files import atomic_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What is kept of each step: cross-entropy (nats a token), share of parameters of the drawn gates, loss of the ratio.
HISTORY = ("loss", "share", "penalty")


def ratio_loss(share: torch.Tensor, target: float) -> torch.Tensor:
    """R = log(max(T, pT_total) / min(T, pT_total)): 0 on target, the same for twice and for half of it.

    Args:
        share: T / T_total, scalar.
        target: p.
    """
    return (share.clamp(min=1e-6) / target).log().abs()


class SelectionSearch(nn.Module):
    """Frozen model and hypernetwork as one module whose ``forward`` returns the loss: for any training loop.

    Only the hypernetwork's parameters ask for gradients, and only they stand in ``state_dict``. Within
    :meth:`attached`, ``forward`` draws gates once, runs the model with them (hard, each applied once), and returns
    cross-entropy plus ``penalty`` times the loss of the ratio. (The released code runs the model with soft gates, those
    of the MLP's units applied twice, and takes the ratio from a second draw. At the same draw its logits, hard gates,
    ratio and the ratio's gradient are ours.)

    Args:
        model: The model to prune.
        config: Settings.

    Raises:
        UserError: The model cannot be pruned.
    """

    def __init__(self, model: PreTrainedModel, config: DispPruningConfig) -> None:
        super().__init__()
        self.settings = config
        self.layout = Layout.of(blocks_of(model), config.mode)
        self.hypernetwork = Hypernetwork(
            [s.size for s in self.layout.selections], config.network, config.inputs, config.hidden, config.offset,
            config.seed,
        ).to(model.get_input_embeddings().weight.device)  # fmt: skip
        self.generator = torch.Generator().manual_seed(config.seed)
        self._model = [model]  # in a list: no submodule, so it is neither trained nor saved
        self._gates = Gates()

    @property
    def model(self) -> PreTrainedModel:
        """The frozen model."""
        return self._model[0]

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Freezes the model and puts the gates on it while the block lasts; afterwards it is as it was."""
        model = self.model
        asked = [(p, p.requires_grad) for p in model.parameters()]
        modes = [(m, m.training) for m in model.modules()]
        model.eval()
        for parameter, _ in asked:
            parameter.requires_grad_(False)
        recompute = self.settings.gradient_checkpointing
        before = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        if recompute:
            from modelwright.models.roles import roles

            _recomputing(model, True)
            for layer in roles(model).layers:
                layer.block.training = True  # what recomputing asks for; its dropouts stay off
        try:
            with gated(model, self._gates):
                yield
        finally:
            self._gates.values = ()
            for parameter, wanted in asked:
                parameter.requires_grad_(wanted)
            for module, mode in modes:
                module.training = mode
            if recompute and not before:
                _recomputing(model, False)

    def draw(self) -> list[torch.Tensor]:
        """Draws gates, with gradients: one (size,) tensor of zeros and ones a selection."""
        c = self.settings
        found = []
        for logits in self.hypernetwork():
            # Drawn on the CPU, so that a seed gives the same gates on every device.
            uniform = torch.rand(len(logits), generator=self.generator).to(logits.device)
            found.append(draw(logits, uniform, c.estimator, c.noise, c.temperature))
        return found

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **inputs: Any) -> dict[str, Any]:
        """Returns ``loss`` (what is minimised), ``cross_entropy``, ``share`` and ``penalty``, scalars.

        Args:
            input_ids: (batch, length).
            labels: The same, with -100 where nothing is to be predicted; by default ``input_ids``, without padding.
            **inputs: Such as ``attention_mask``.
        """
        gates = self.draw()
        share = self.layout.share(gates)
        penalty = ratio_loss(share, self.settings.keep_ratio)
        if labels is None:
            mask = inputs.get("attention_mask")
            labels = input_ids if mask is None else _labels(input_ids, mask)
        if self.model.dtype == torch.float16 and torch.is_grad_enabled():
            # The gradient of a mean over many tokens vanishes in float16, and that of their sum may overflow: within
            # the model, a larger one flows, which grows with their number.
            factor = max(1.0, int((labels[:, 1:] != -100).sum()) / 16)
            applied = [gate.view_as(gate) for gate in gates]
            for gate in applied:
                gate.register_hook(lambda gradient: gradient / factor)
        else:
            factor, applied = 1.0, gates
        self._gates.values = self.layout.spread(applied)
        found = self.model(input_ids=input_ids, labels=labels, use_cache=False, **inputs)
        loss = found.loss.float()
        if factor > 1:
            loss.register_hook(lambda gradient: gradient * factor)
        return {
            "loss": loss + self.settings.penalty * penalty.to(loss.device),
            "cross_entropy": loss.detach(),
            "share": share.detach(),
            "penalty": penalty.detach(),
        }


class DispPruner:
    """Searches for what to take out of a model, and takes it out.

    ::

        pruner = DispPruner(model, DispPruningConfig(keep_ratio=0.5, steps=2000))
        pruner.fit(loader)
        print(pruner.summary())
        small = pruner.apply()

    Args:
        model: A causal language model of a known family, on any device, in any floating dtype; it is not changed.
        config: Settings.

    Attributes:
        search: Hypernetwork, gates and draws.
        step: Steps done.
        history: For each step, the values of :data:`HISTORY`.

    Raises:
        UserError: The model is of another family, quantised, or has adapters.
    """

    def __init__(self, model: PreTrainedModel, config: DispPruningConfig | None = None) -> None:
        self.model, self.config = model, config or DispPruningConfig()
        self.search = SelectionSearch(model, self.config)
        self.optimizer = torch.optim.AdamW(
            self.search.hypernetwork.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay
        )
        self.step = 0
        self.history: list[tuple[float, float, float]] = []

    def fit(
        self,
        batches: Iterable[dict[str, torch.Tensor]],
        *,
        on_step: Callable[[DispPruner], None] | None = None,
        checkpoint: Path | None = None,
        save_every: int = 100,
        plan: dict[str, Any] | None = None,
    ) -> DispPruner:
        """Trains the hypernetwork up to ``config.steps``.

        Args:
            batches: ``input_ids`` and perhaps ``attention_mask`` and ``labels``, (batch, length) each; read again from
                the start when they end. Batches of the steps already done are passed over.
            on_step: Called after every step.
            checkpoint: File for the state; if it is there, the search goes on from it.
            save_every: Steps between states.
            plan: What identifies the search; a checkpoint of another plan is refused.

        Raises:
            UserError: There is no batch, the loss is not finite, or the checkpoint is of another search.
        """
        if checkpoint is not None and checkpoint.exists() and self.step == 0:
            self.load(checkpoint, plan)
        device = self.model.get_input_embeddings().weight.device
        with self.search.attached():
            for batch in itertools.islice(_endless(batches), self.step, self.config.steps):
                moved = {name: value.to(device) for name, value in batch.items()}
                found = self.search(**moved)
                loss = float(found["cross_entropy"])
                if not math.isfinite(loss):
                    raise UserError(
                        f"The loss is {loss} at step {self.step + 1}: the model's weights hold values that are not "
                        "finite, or they overflow in this dtype (try float32 or bfloat16)."
                    )
                self.optimizer.zero_grad(set_to_none=True)
                found["loss"].backward()
                if not all(p.grad is None or p.grad.isfinite().all() for p in self.search.hypernetwork.parameters()):
                    raise UserError(
                        f"The gradient is not finite at step {self.step + 1}: it overflows in this dtype (try bfloat16 "
                        "or float32)."
                    )
                self.optimizer.step()
                self.step += 1
                self.history.append((loss, float(found["share"]), float(found["penalty"])))
                if checkpoint is not None and (self.step % save_every == 0 or self.step == self.config.steps):
                    self.save(checkpoint, plan)
                if on_step is not None:
                    on_step(self)
        return self

    @torch.no_grad()
    def scores(self) -> list[torch.Tensor]:
        """Returns the logits of all gates, one (size,) float32 CPU tensor a selection."""
        return [logits.float().cpu() for logits in self.search.hypernetwork()]

    def masks(self, *, deterministic: bool = True, seed: int = 0, exact: bool = True) -> Masks:
        """Returns what is to stay.

        Deterministic: a gate stays if P(on) > 1/2, and then the threshold is moved until the parameters are exactly as
        many as asked for (the least probable of those that stay go, or the most probable of the others come back).

        Args:
            deterministic: Whether to choose by probability, or draw each gate with its own (as the release does).
            seed: Of a draw.
            exact: Whether to bring the parameters to the target, and widths to multiples of ``round_to``.
        """
        logits = self.scores()
        on = [on_probability(own, self.config.estimator, self.config.noise) for own in logits]
        if deterministic:
            kept = [p > 0.5 for p in on]
        else:
            generator = torch.Generator().manual_seed(seed)
            kept = [torch.rand(len(p), generator=generator) < p for p in on]
        if not exact:
            return self.search.layout.masks(kept)
        # Gates that are on come first, each kind in the order of probability; for a threshold that is the order itself.
        order = [k * 1.0 + p.double() / 2 for k, p in zip(kept, _ranked(logits), strict=True)]
        return choose(self.search.layout, order, self.config.keep_ratio, self.config.round_to)

    def apply(self, *, deterministic: bool = True, seed: int = 0, exact: bool = True) -> PreTrainedModel:
        """Returns the smaller model; see :meth:`masks` for the arguments."""
        masks = self.masks(deterministic=deterministic, seed=seed, exact=exact)
        return shrink(self.model, masks, self.describe(masks))

    def describe(self, masks: Masks) -> dict[str, Any]:
        """Returns what the smaller model's config keeps of how it came about."""
        return {
            "method": "disp-llm",
            "ratio": masks.ratio,
            "block_parameters": masks.parameters,
            "block_parameters_before": self.search.layout.total,
            "settings": asdict(self.config),
        }

    def summary(self) -> dict[str, Any]:
        """Returns kept width a block, parameters, and the share that is expected of a draw."""
        masks = self.masks()
        with torch.no_grad():
            on = [on_probability(own, self.config.estimator, self.config.noise) for own in self.scores()]
        return {
            "widths": masks.widths(),
            "block_parameters": masks.parameters,
            "block_parameters_before": self.search.layout.total,
            "ratio": masks.ratio,
            "expected_ratio": float(self.search.layout.share(on)),
            "steps": self.step,
        }

    def save(self, path: Path, plan: dict[str, Any] | None = None) -> None:
        """Writes the state of the search (safetensors), whole or not at all."""
        from safetensors.torch import save_file

        tensors = {f"network.{name}": value for name, value in self.search.hypernetwork.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": torch.as_tensor(value) for name, value in state.items()}
        tensors["generator"] = self.search.generator.get_state()
        tensors["history"] = torch.tensor(self.history, dtype=torch.float64).reshape(-1, len(HISTORY))
        header = {"plan": json.dumps(plan, sort_keys=True, default=str), "step": str(self.step)}
        with atomic_path(path, force=True) as partial:
            save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, partial, header)

    def load(self, path: Path, plan: dict[str, Any] | None = None) -> None:
        """Goes back to a saved state.

        Raises:
            UserError: The file is damaged, or of another search.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged: remove it to begin the search anew.") from error
        if header.get("plan") != json.dumps(plan, sort_keys=True, default=str):
            raise UserError(
                f"{path} holds an unfinished search with other options: repeat that command to finish it, or give "
                "--force."
            )
        network = {n.removeprefix("network."): v for n, v in tensors.items() if n.startswith("network.")}
        self.search.hypernetwork.load_state_dict(network)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.search.generator.set_state(tensors["generator"])
        self.step = int(header["step"])
        self.history = [(a, b, c) for a, b, c in tensors["history"].tolist()]


def _ranked(logits: list[torch.Tensor]) -> list[torch.Tensor]:
    """Ranks over all selections together, in [0, 1): probabilities near 1 cannot be told apart in float32."""
    flat = torch.cat(logits).double()
    ranks = torch.empty_like(flat)
    ranks[flat.sort(stable=True).indices] = torch.arange(len(flat), dtype=torch.float64)
    # Equal logits get equal ranks, so that ties fall in network order.
    _, place = flat.unique(return_inverse=True)
    lowest = torch.full((int(place.max()) + 1,), float(len(flat)), dtype=torch.float64)
    ranks = lowest.scatter_reduce(0, place, ranks, "amin")[place]
    return list((ranks / len(flat)).split([len(own) for own in logits]))


def _labels(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Tokens that have a token before them; neither padding nor what would be predicted from it."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
    return labels


def _recomputing(model: Any, on: bool) -> None:
    # Renamed in transformers 5.23, where the old name warns.
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    if on:
        # Without reentrance: gates are no inputs of the blocks, and need their gradients.
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{name}_disable")()


def _endless(batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise UserError("There are no more batches of calibration text: give a loader that can be read again.")
