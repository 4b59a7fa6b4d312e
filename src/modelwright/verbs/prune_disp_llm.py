"""`modelwright prune disp-llm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from modelwright.options import Arg
from modelwright.progress import Progress
from modelwright.verbs.prune import Prune, first_batches

if TYPE_CHECKING:
    from pathlib import Path

    from modelwright.compression.calibration import CalibrationBatches
    from modelwright.compression.disp_llm import DispPruningConfig
    from modelwright.compression.measure import Comparison


@dataclass(kw_only=True)
class PruneDispLlm(Prune):
    """Search which dimensions each block reads and writes, and make a smaller, faster model of them (DISP-LLM).

    The model's weights stay as they are; a small network learns what to keep. Interrupted or killed, the same command
    goes on. The output is a model folder with a report (pruning.html, pruning.json) in it.
    """

    method: ClassVar[str] = "disp-llm"

    steps: Annotated[int, Arg("Steps of the search.")] = 10_000
    lr: Annotated[float, Arg("Learning rate of the search; short searches need more, such as 3e-3.")] = 1e-3
    penalty: Annotated[float, Arg("Weight of the loss that keeps the ratio (lambda).")] = 6.0
    mode: Annotated[
        Literal["independent", "same", "same_mlp", "structural"],
        Arg("Each block its own dimensions (the method), or an ablation."),
    ] = "independent"
    network: Annotated[Literal["gru", "linear", "none"], Arg("Where the gates' logits come from.")] = "gru"
    estimator: Annotated[
        Literal["reinmax", "gumbel_sigmoid", "straight_through"], Arg("How gradients pass the drawn gates.")
    ] = "reinmax"
    noisy: Annotated[bool, Arg("Draw the final gates with noise, as the released code does.")] = False
    gradient_checkpointing: Annotated[bool, Arg("Recompute activations to save memory.", kind="run")] = False
    compare: Annotated[bool, Arg("Also prune by magnitude, Wanda, SliceGPT and at random, and report them.")] = False
    save_every: Annotated[int, Arg("Steps between the states that a killed search goes on from.", kind="run")] = 100

    def _config(self) -> DispPruningConfig:
        from modelwright.compression.disp_llm import DispPruningConfig

        return DispPruningConfig(
            keep_ratio=self.ratio, mode=self.mode, network=self.network, estimator=self.estimator, penalty=self.penalty,
            steps=self.steps, lr=self.lr, round_to=self.round_to or 1, seed=self.seed,
            gradient_checkpointing=self.gradient_checkpointing,
        )  # fmt: skip

    def _state(self) -> Path:
        return self.output.with_name(self.output.name + ".search")

    def _check(self) -> None:
        from modelwright.errors import UserError

        self._config()
        if self.save_every < 1:
            raise UserError("--save-every must be at least 1.")

    def _prune(self, model: Any, batches: CalibrationBatches, progress: Progress) -> tuple[Any, Any]:
        import hashlib
        from dataclasses import asdict

        from modelwright.compression.disp_llm import DispPruner
        from modelwright.models.heads import fingerprint

        config = self._config()
        pruner = DispPruner(model, config)
        settings = {k: v for k, v in asdict(config).items() if k != "gradient_checkpointing"}
        text = hashlib.sha256(batches.blocks.tokens.tobytes()).hexdigest()
        plan = {
            "settings": settings, "model": fingerprint(model), "text": text, "batch_size": self.batch_size,
            "block_size": batches.block_size,
        }  # fmt: skip
        state = self._state()
        state.parent.mkdir(parents=True, exist_ok=True)
        if self.force:
            state.unlink(missing_ok=True)
        if state.exists():
            pruner.load(state, plan)
            progress.message(f"{pruner.step:,} of {self.steps:,} steps were done before.")
        progress.start("search", self.steps)
        progress.advance(pruner.step)
        often = max(1, self.steps // 10)

        def on_step(now: DispPruner) -> None:
            loss, share, _ = now.history[-1]
            progress.advance(1, f"loss {loss:.3f}, keeps {share:.1%}")
            if now.step % often == 0 or now.step == self.steps:
                progress.message(f"step {now.step:,}: loss {loss:.3f}, keeps {share:.1%}; {_kept(now)}")

        pruner.fit(batches, on_step=on_step, checkpoint=state, save_every=self.save_every, plan=plan)
        for line in _lines(pruner):
            progress.message(line)
        return pruner.apply(deterministic=not self.noisy, seed=self.seed), pruner.history

    def _compare(self, model: Any, batches: CalibrationBatches, comparison: Comparison, progress: Progress) -> None:
        if not self.compare:
            return
        from modelwright.compression.width_pruning import METHODS, prune_width
        from modelwright.errors import UserError

        some = first_batches(batches)
        for method in METHODS:
            try:
                small = prune_width(model, method, self.ratio, batches=some, round_to=self.round_to or 1)
            except UserError as error:  # not every method is made for every family
                progress.message(f"{method} is left out: {error}")
                continue
            comparison.add(method, small)
            progress.advance(1, method)

    def run(self, progress: Progress) -> dict[str, Any]:
        """See :meth:`modelwright.verbs.prune.Prune.run`."""
        found = super().run(progress)
        self._state().unlink(missing_ok=True)
        return found


def _lines(pruner: Any) -> list[str]:
    """What each block reads and writes in the end, in words."""
    return [
        f"block {i}: attention reads {own['attn_in']:,} and writes {own['attn_out']:,}, MLP reads {own['mlp_in']:,}, "
        f"has {own['mlp_middle']:,} units, writes {own['mlp_out']:,}"
        for i, own in enumerate(pruner.masks().widths())
    ]


def _kept(pruner: Any) -> str:
    """What each block keeps of its parameters now, in words."""
    masks = pruner.masks()
    shares = [
        f"{block.parameters(own) / block.total:.0%}" for block, own in zip(masks.blocks, masks.widths(), strict=True)
    ]
    return f"kept in each block: {' '.join(shares)}"
