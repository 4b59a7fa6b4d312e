"""From a model and masks to the smaller model, and back to a format that needs nothing of ours."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from modelwright.compression.pruned import CLASSES, PREFIX, output_place
from modelwright.compression.selections import Block, Masks, check_prunable
from modelwright.errors import UserError
from modelwright.models.loading import quiet
from modelwright.models.roles import Projection, roles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OWN = ("widths", "pruning", "model_type", "architectures", "transformers_version")


@torch.no_grad()
def shrink(model: PreTrainedModel, masks: Masks, pruning: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Takes out what the masks leave out: a smaller dense model, which computes what the masked one does.

    Args:
        model: The model; it is left as it is.
        masks: What stays.
        pruning: What the config is to keep of how it came about.

    Returns:
        A model of the pruned form of the family (see :mod:`modelwright.compression.pruned`), on the same device and in
        the same dtype, in evaluation mode. Every number in it is one of the given model's.

    Raises:
        UserError: The model cannot be pruned.
    """
    check_prunable(model)
    parts = roles(model)
    pruned_config, pruned_class, _, _ = CLASSES[parts.family]
    weights = dict(model.state_dict())
    for layer, block in zip(parts.layers, masks.blocks, strict=True):
        for projection, rows, columns in _cuts(layer, block, masks):
            _cut(weights, projection, rows, columns)
        for module, read, written in (
            (layer.attention, "attn_in", "attn_out"),
            (layer.mlp, "mlp_in", "mlp_out"),
        ):
            name = next(n for n, m in model.named_modules() if m is module)
            inputs, outputs = masks.index(layer.index, read), masks.index(layer.index, written)
            if len(inputs) < block.hidden:
                weights[f"{name}.input_index"] = inputs
            if len(outputs) < block.hidden:
                weights[f"{name}.output_place"] = output_place(outputs, block.hidden)
    settings = {k: v for k, v in model.config.to_dict().items() if k not in _OWN}
    config = pruned_config(**settings, widths=masks.widths(), pruning=dict(pruning or {}))
    return _build(pruned_class, config, weights, model)


def _build(cls: Any, config: Any, weights: dict[str, torch.Tensor], like: PreTrainedModel) -> PreTrainedModel:
    # What was not cut is copied: training the new model must not train the given one.
    given = {tensor.untyped_storage().data_ptr() for tensor in like.state_dict().values()}
    weights = {n: v.clone() if v.untyped_storage().data_ptr() in given else v for n, v in weights.items()}
    with quiet():
        # The way a checkpoint is loaded, without the files: the model is never made at its full size.
        made, info = cls.from_pretrained(
            None,
            config=config,
            state_dict={name: value.contiguous() for name, value in weights.items()},
            dtype=like.dtype,
            attn_implementation=like.config._attn_implementation,
            output_loading_info=True,
        )
    tied = {name for name, _ in made.named_parameters(remove_duplicate=False)} - {n for n, _ in made.named_parameters()}
    missing = sorted(set(info["missing_keys"]) - tied)
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        wrong = [*missing, *sorted(info["unexpected_keys"]), *map(str, info["mismatched_keys"])]
        raise UserError(f"The model's weights do not fit its family: {', '.join(wrong[:3])}.")
    made.generation_config = copy.deepcopy(like.generation_config)
    return made.to(like.device).eval()


def _heads(block: Block, index: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of the kept groups, of ``width`` rows each."""
    return (index[:, None] * width + torch.arange(width)).flatten()


def _cuts(layer: Any, block: Block, masks: Masks) -> list[tuple[Projection, torch.Tensor, torch.Tensor]]:
    """Each map of a block with the outputs and inputs that stay."""
    i = layer.index
    groups = masks.index(i, "heads")
    query, key_value = _heads(block, groups, block.query), _heads(block, groups, block.key_value // 2)
    attn_in, mlp_in, middle = (masks.index(i, kind) for kind in ("attn_in", "mlp_in", "mlp_middle"))
    found: list[tuple[Projection, torch.Tensor, torch.Tensor]] = []
    parts = [(layer.query, query), (layer.key, key_value), (layer.value, key_value)]
    if layer.query.rows is not None:  # fused: one map, whose layout is kept
        rows = torch.cat([p.rows[own] for p, own in parts if p.rows is not None]).sort().values
        found.append((layer.query, rows, attn_in))
    else:
        found += [(projection, rows, attn_in) for projection, rows in parts]
    found.append((layer.output, masks.index(i, "attn_out"), query))
    found += [(p, middle, mlp_in) for p in (layer.gate, layer.up) if p is not None]
    found.append((layer.down, masks.index(i, "mlp_out"), middle))
    return found


def _cut(weights: dict[str, torch.Tensor], projection: Projection, rows: torch.Tensor, columns: torch.Tensor) -> None:
    name = f"{projection.name}.weight"
    matrix = weights[name]
    first, second = (columns, rows) if projection.transposed else (rows, columns)
    weights[name] = matrix[first.to(matrix.device)][:, second.to(matrix.device)]
    bias = f"{projection.name}.bias"
    if bias in weights:
        weights[bias] = weights[bias][rows.to(matrix.device)]


@torch.no_grad()
def to_plain(model: PreTrainedModel) -> PreTrainedModel:
    """Turns a pruned model into one of its plain family that computes the same, for programs that know no other.

    What the plain format cannot leave out is filled with zeros: residual dimensions and heads. The MLP becomes as
    narrow as its widest block. So the result is smaller only as far as MLP units were taken out, and no faster
    otherwise.

    Args:
        model: A model that :func:`shrink` returned, or a loaded one.

    Raises:
        UserError: It is none.
    """
    family = model.config.model_type.removeprefix(PREFIX)
    if not model.config.model_type.startswith(PREFIX) or family not in CLASSES:
        raise UserError(f"A '{model.config.model_type}' model is not a pruned one, so there is nothing to fill.")
    _, _, plain_config, plain_class = CLASSES[family]
    widths = model.config.widths
    settings = {k: v for k, v in model.config.to_dict().items() if k not in _OWN}
    middle = max(1, max(own["mlp_middle"] for own in widths))
    settings["n_inner" if family == "gpt2" else "intermediate_size"] = middle
    config = plain_config(**settings)
    with torch.device("meta"):
        skeleton = plain_class(config)
    shapes = skeleton.state_dict()
    indices = ("input_index", "output_place")
    weights = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[2] not in indices}
    for layer, like in zip(roles(model, like=family).layers, roles(skeleton).layers, strict=True):
        fills = _fills(layer, like, widths[layer.index], config)
        for projection, rows, columns in fills:
            _fill(weights, shapes, projection, rows, columns)
    return _build(plain_class, config, weights, model)


def _written(module: Any, hidden: int) -> torch.Tensor:
    place = module.output_place
    if place is None:
        return torch.arange(hidden)
    return (place < place.max()).nonzero().flatten().cpu() if len(place.unique()) > 1 else torch.arange(0)


def _fills(
    layer: Any, like: Any, widths: Mapping[str, int], config: Any
) -> list[tuple[Projection, torch.Tensor, torch.Tensor]]:
    """Each map with the places of its outputs and inputs in the plain one."""
    attention: Any = layer.attention
    mlp: Any = layer.mlp
    hidden = config.hidden_size

    def read(module: Any) -> torch.Tensor:
        return torch.arange(hidden) if module.input_index is None else module.input_index.cpu()

    middle = torch.arange(widths["mlp_middle"])
    query = torch.arange(layer.output.weight().shape[1])
    found: list[tuple[Projection, torch.Tensor, torch.Tensor]] = []
    if layer.query is not None and layer.query.rows is not None:
        # Of each third, or of each head, the first stay; which is which does not matter to attention.
        rows = [p.rows for p in (like.query, like.key, like.value) if p.rows is not None]
        kept = torch.cat([r[: len(query)] for r in rows]).sort().values
        found.append((layer.query, kept, read(attention)))
    else:
        for projection in (layer.query, layer.key, layer.value):
            found.append((projection, torch.arange(projection.weight().shape[0]), read(attention)))
    found.append((layer.output, _written(attention, hidden), query))
    found += [(p, middle, read(mlp)) for p in (layer.gate, layer.up) if p is not None]
    found.append((layer.down, _written(mlp, hidden), middle))
    return found


def _fill(
    weights: dict[str, torch.Tensor],
    shapes: Mapping[str, torch.Tensor],
    projection: Projection,
    rows: torch.Tensor,
    columns: torch.Tensor,
) -> None:
    name = f"{projection.name}.weight"
    matrix = weights[name]
    full = matrix.new_zeros(shapes[name].shape)
    first, second = (columns, rows) if projection.transposed else (rows, columns)
    full[first[:, None].to(matrix.device), second.to(matrix.device)] = matrix
    weights[name] = full
    bias = f"{projection.name}.bias"
    if bias in weights:
        filled = matrix.new_zeros(shapes[bias].shape)
        filled[rows.to(matrix.device)] = weights[bias]
        weights[bias] = filled
