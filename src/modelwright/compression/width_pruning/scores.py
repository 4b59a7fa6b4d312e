"""How much a gate matters, without training: one (size,) float64 tensor for each block and kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from modelwright.compression.selections import Block, Layout
from modelwright.models.roles import roles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scores = list[dict[str, torch.Tensor]]


def random_scores(layout: Layout, seed: int = 0) -> list[torch.Tensor]:
    """Uniform draws, one (size,) tensor a selection."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(s.size, generator=generator, dtype=torch.float64) for s in layout.selections]


def _weights(layer: Any) -> dict[str, torch.Tensor]:
    """A block's maps, (out, in) float64 on the CPU; ``into`` is gate and up, one below the other."""

    def matrix(projection: Any) -> torch.Tensor:
        return projection.weight().detach().double().cpu()

    gate = [] if layer.gate is None else [matrix(layer.gate)]
    return {
        "query": matrix(layer.query), "key": matrix(layer.key), "value": matrix(layer.value),
        "output": matrix(layer.output), "into": torch.cat([*gate, matrix(layer.up)]), "down": matrix(layer.down),
    }  # fmt: skip


def magnitude_scores(model: PreTrainedModel, blocks: Sequence[Block]) -> Scores:
    """Euclidean norm of all weights that a gate would take out of its block."""
    found: Scores = []
    for layer, block in zip(roles(model).layers, blocks, strict=True):
        w = {name: matrix.square() for name, matrix in _weights(layer).items()}
        rows = {n: w[n].sum(1).view(block.groups, -1).sum(1) for n in ("query", "key", "value")}
        found.append(
            {
                "attn_in": (w["query"].sum(0) + w["key"].sum(0) + w["value"].sum(0)).sqrt(),
                "heads": (sum(rows.values()) + w["output"].sum(0).view(block.groups, -1).sum(1)).sqrt(),
                "attn_out": w["output"].sum(1).sqrt(),
                "mlp_in": w["into"].sum(0).sqrt(),
                "mlp_middle": (w["into"].sum(1).view(block.into, -1).sum(0) + w["down"].sum(0)).sqrt(),
                "mlp_out": w["down"].sum(1).sqrt(),
            }
        )
    return found


@torch.no_grad()
def input_norms(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> Scores:
    """Root mean square of each input feature of a block's maps over calibration text, float64.

    Keys: ``attn_in``, ``output`` (what ``W_o`` reads), ``mlp_in``, ``down`` (what the last map reads).
    """
    sums: list[dict[str, torch.Tensor]] = []
    handles, rows = [], 0
    parts: Any = roles(model)
    for layer in parts.layers:
        own: dict[str, torch.Tensor] = {}
        sums.append(own)

        def add(name: str, own: dict[str, torch.Tensor] = own) -> Any:
            def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
                x = args[0].flatten(0, -2).double()
                own[name] = own.get(name, 0) + x.square().sum(0).cpu()

            return hook

        parts = (("attn_in", layer.query), ("output", layer.output), ("mlp_in", layer.up), ("down", layer.down))
        handles += [p.module.register_forward_pre_hook(add(name)) for name, p in parts]
    try:
        for batch in batches:
            ids = batch["input_ids"].to(model.device)
            model(input_ids=ids, use_cache=False)
            rows += ids.numel()
    finally:
        for handle in handles:
            handle.remove()
    return [{name: (value / rows).sqrt() for name, value in own.items()} for own in sums]


def wanda_scores(model: PreTrainedModel, blocks: Sequence[Block], norms: Scores) -> Scores:
    """Wanda's ``|W_ij| ||X_j||`` (arXiv 2306.11695), summed over what a gate would take out of its block.

    Units of the MLP and heads are judged by the map that reads them, as in the structured form of FLAP (arXiv
    2312.11983, "Wanda-sp"); residual dimensions, which that leaves alone, by the maps that read or write them.
    """
    found: Scores = []
    for layer, block, x in zip(roles(model).layers, blocks, norms, strict=True):
        w = {name: matrix.abs() for name, matrix in _weights(layer).items()}
        output, down = w["output"] * x["output"], w["down"] * x["down"]
        found.append(
            {
                "attn_in": (w["query"].sum(0) + w["key"].sum(0) + w["value"].sum(0)) * x["attn_in"],
                "heads": output.sum(0).view(block.groups, -1).sum(1),
                "attn_out": output.sum(1),
                "mlp_in": w["into"].sum(0) * x["mlp_in"],
                "mlp_middle": down.sum(0),
                "mlp_out": down.sum(1),
            }
        )
    return found


def gather(layout: Layout, scores: Scores) -> list[torch.Tensor]:
    """Brings scores of blocks to the layout's selections; where several places share one, their sum over places.

    Before the sum, each place's scores are divided by their mean, so that none decides alone by its scale.
    """
    return [
        torch.stack([own / own.mean().clamp(min=1e-300) for own in (scores[i][kind] for i, kind in s.uses)]).sum(0)
        for s in layout.selections
    ]
