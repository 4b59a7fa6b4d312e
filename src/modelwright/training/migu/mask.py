"""Hooks that sum up magnitudes, and the masking of gradients by them."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.pytorch_utils import Conv1D

from modelwright.errors import UserError
from modelwright.models.roles import unwrap
from modelwright.training.migu.config import BLOCK_LINEAR, MIGUConfig
from modelwright.training.migu.definition import kept_rows, magnitude


@dataclass(frozen=True)
class LayerStats:
    """What the last masked step did to a layer.

    Attributes:
        kept: Share of its output rows that were updated.
        rows: (d_out,) bool: which.
        magnitude: (d_out,) float: what they were chosen by; magnitudes of outputs are normalised to sum 1.
    """

    kept: float
    rows: torch.Tensor
    magnitude: torch.Tensor


class _Layer:
    """One weight whose output rows are masked.

    Attributes:
        name: Dotted name of the weight's module.
        holder: The module with the ``weight``.
        transposed: Whether the weight is (in, out), so that its columns are the outputs.
        total: (d_out,) sum of magnitudes since the last reset; None before any.
        rows: Mask of the last step.
        scores: What it was made from.
        still: Numbers of the rows that are put back after the step.
        frozen: Those rows.
    """

    def __init__(self, name: str, holder: nn.Module) -> None:
        self.name, self.holder = name, holder
        self.transposed = isinstance(holder, Conv1D)
        self.total: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None
        self.still: torch.Tensor | None = None
        self.frozen: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        weight: torch.Tensor = self.holder.weight  # type: ignore[assignment]
        return weight

    def add(self, sums: torch.Tensor) -> None:
        self.total = sums if self.total is None else self.total + sums

    def by_output(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns (d_out, d_in) or its transpose as a view with outputs first."""
        return tensor.T if self.transposed else tensor

    @property
    def width(self) -> int:
        return int(self.weight.shape[1 if self.transposed else 0])


class MIGUMask:
    """MIGU on a model (arXiv 2406.17245): ``apply()`` after the backward pass and before clipping, once a step.

    Magnitudes are summed up by forward hooks while the model is in training mode and gradients are on, over all
    micro-batches since the last ``apply()``; evaluation between steps is not seen. With several processes
    (``torch.distributed``) they are summed over all of them, so that all mask alike. Gradient checkpointing runs
    forward passes twice, which doubles a layer's sums and leaves the mask as it is.

    Of a peft LoRA layer, A's rows are chosen by A's outputs and B's rows by the *combined* output of the layer, base
    and adapter: of B's own output nothing could be said while B is zero (paper section 3.3). DoRA's magnitude vector,
    biases, norms and embeddings are never masked. Experts kept as one three-dimensional parameter are no linear
    layers, and are left out.

    Works on any ``torch.nn.Module``; as a context manager it removes its hooks at the end.

    Example:
        >>> with MIGUMask(model, MIGUConfig(threshold=0.7)) as migu:
        ...     model(**batch).loss.backward()
        ...     migu.apply()
        ...     torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        ...     optimizer.step()
        ...     migu.after_step()  # only mode="param" needs it

    Args:
        model: The model, wrapped by peft or not.
        config: Options; the defaults if None.

    Attributes:
        active: Whether to mask; may be changed between steps.
        step: Number of the step, which decides the rows of ``select="random"``; counted by :meth:`apply`.
        in_evaluation: Whether to look at forward passes in evaluation mode too, while gradients are on.

    Raises:
        UserError: No layer is a target, or the model's weights are sharded.
    """

    def __init__(self, model: nn.Module, config: MIGUConfig | None = None) -> None:
        self.config = config or MIGUConfig()
        self.active, self.step, self.in_evaluation = self.config.active, 0, False
        self._tokens: torch.Tensor | None = None
        self._pending = False
        self._handles: list[Any] = []
        self._layers: list[_Layer] = []
        self._attach(model)
        if not self._layers:
            wanted = self.config.target_modules
            what = "no linear layer in numbered blocks" if wanted == BLOCK_LINEAR else f"no linear layer {wanted!r}"
            raise UserError(
                f"{type(unwrap(model)).__name__} has {what}, so there is nothing to mask: name the layers with "
                f"target_modules."
            )
        try:
            self._check_sharding()
        except UserError:
            self.remove()
            raise
        if not self.config.include_padding:
            self._watch_padding(unwrap(model))

    # Which layers.

    def _attach(self, model: nn.Module) -> None:
        lora = sys.modules.get("peft.tuners.lora")  # not loaded: then nothing here is an adapter
        shared = {
            id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
        }  # a tied head's weight is the embedding's
        inside: list[str] = []
        for name, module in model.named_modules():
            if lora is not None and isinstance(module, lora.LoraLayer):
                inside += [f"{name}.{part}." for part in ("lora_A", "lora_B", "lora_magnitude_vector", "lora_dropout")]
                if self.config.matches(name):
                    self._attach_lora(name, module)
                continue
            if not isinstance(module, nn.Linear | Conv1D) or name.startswith(tuple(inside)):
                continue
            plain = name.removesuffix(".base_layer")
            tied = id(module.weight) in shared and not self.config.named
            if self.config.matches(plain) and not tied:
                layer = _Layer(name, module)
                self._layers.append(layer)
                self._hook(module, self._see(layer))

    def _attach_lora(self, name: str, module: Any) -> None:
        """Hooks A for A, and the whole layer for B."""
        ups: list[_Layer] = []
        for adapter in module.lora_A:
            down = _Layer(f"{name}.lora_A.{adapter}", module.lora_A[adapter])
            up = _Layer(f"{name}.lora_B.{adapter}", module.lora_B[adapter])
            if down.weight.ndim != 2:
                continue  # LoRA of a convolution
            self._layers += [down, up]
            ups.append(up)
            self._hook(module.lora_A[adapter], self._see(down))

        def combined(module: nn.Module, inputs: Any, output: Any) -> None:
            trained = [up for up in ups if up.weight.requires_grad]
            if trained and self._counts(module):
                sums = self._sums(output)
                for up in trained:
                    up.add(sums)

        if ups:
            self._hook(module, combined)

    def _hook(self, module: nn.Module, function: Callable[..., None]) -> None:
        self._handles.append(module.register_forward_hook(function))

    def _see(self, layer: _Layer) -> Callable[..., None]:
        lora = ".lora_A." in layer.name

        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            if not layer.weight.requires_grad or not self._counts(module):
                return
            if lora and _is_identity(inputs[0]):
                return  # DoRA sends it through A and B to learn their product
            layer.add(self._sums(output))

        return hook

    def _counts(self, module: nn.Module) -> bool:
        return self.active and torch.is_grad_enabled() and (module.training or self.in_evaluation)

    def _sums(self, output: Any) -> torch.Tensor:
        tensor = output[0] if isinstance(output, tuple) else output
        if self.config.include_padding or self._tokens is None:
            return magnitude(tensor)
        if self._tokens.numel() != tensor[..., 0].numel():
            raise UserError(
                f"A layer gives outputs of shape {tuple(tensor.shape)} for an attention_mask of shape "
                f"{tuple(self._tokens.shape)}, so padding cannot be told from text: use include_padding=True."
            )
        return magnitude(tensor, self._tokens)

    def _watch_padding(self, model: nn.Module) -> None:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise UserError(
                "include_padding=False is for models with one sequence, and this one has an encoder and a decoder: "
                "use include_padding=True."
            )
        names = inspect.signature(model.forward)

        def before(_: nn.Module, args: Any, keys: Any) -> None:
            mask = names.bind_partial(*args, **keys).arguments.get("attention_mask", keys.get("attention_mask"))
            if mask is not None and mask.ndim != 2:
                raise UserError(
                    f"include_padding=False needs an attention_mask of shape (batch, tokens), not {tuple(mask.shape)}."
                )
            self._tokens = mask

        self._handles.append(model.register_forward_pre_hook(before, with_kwargs=True))

    # Masking.

    @torch.no_grad()
    def apply(self) -> None:
        """Masks the gradients by what was seen since the last call, and forgets it. Does nothing while not active.

        Raises:
            UserError: No forward pass in training mode was seen, a trained layer has no gradient, gradients are
                sharded, or with ``mode="param"`` :meth:`after_step` was not called.
        """
        if not self.active:
            self.reset()
            return
        if self._pending:
            raise UserError(
                "mode='param' puts frozen rows back after the optimizer's step, and after_step() was not called since "
                "the last apply(): call it after optimizer.step()."
            )
        layers = [layer for layer in self._layers if layer.weight.requires_grad]
        if not layers:
            raise UserError("All target layers are frozen, so there is no gradient to mask: set requires_grad.")
        self._check_sharding()
        totals = self._over_processes(layers)
        if all(total is None for total in totals):
            raise UserError(
                "apply() was called, but no forward pass with gradients was seen since the last one: call it once "
                "after the backward pass of each step, with the model in training mode."
            )
        for layer, total in zip(layers, totals, strict=True):
            if total is not None:
                self._mask(layer, total)
            elif layer.weight.grad is not None and bool(layer.weight.grad.any()):
                raise UserError(
                    f"{layer.name} has a gradient, but its output was never seen: its weight is used outside the "
                    f"module, so leave it out of target_modules."
                )
        self._pending = self.config.mode == "param"
        self.reset()
        self.step += 1

    def _mask(self, layer: _Layer, total: torch.Tensor) -> None:
        grad = layer.weight.grad
        if grad is None:
            raise UserError(
                f"{layer.name} is trained and was used, but has no gradient: call apply() after backward() and before "
                f"zero_grad(); gradients that a wrapper shards or takes away cannot be masked."
            )
        layer.scores = self._scores(layer, total, grad)
        layer.rows = kept_rows(layer.scores, self.config.threshold)
        still = ~layer.rows.to(grad.device)
        if grad.device.type == "cpu":
            layer.by_output(grad).index_fill_(0, still.nonzero().squeeze(1), 0)
        else:  # which rows these are need not be known here, and asking would wait for the device
            layer.by_output(grad).masked_fill_(still[:, None], 0)
        if self.config.mode == "param":
            layer.still = still.nonzero().squeeze(1)
            layer.frozen = layer.by_output(layer.weight).index_select(0, layer.still)

    def _scores(self, layer: _Layer, total: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        if self.config.select == "magnitude":
            return total
        if self.config.select == "low-magnitude":
            return -total
        if self.config.select == "random":
            generator = torch.Generator().manual_seed(_seed(self.config.seed, self.step, layer.name))
            return torch.rand(layer.width, generator=generator).to(grad.device)
        of = grad if self.config.select == "gradient" else layer.weight
        return torch.linalg.vector_norm(layer.by_output(of), ord=1, dim=1, dtype=total.dtype)

    @torch.no_grad()
    def after_step(self) -> None:
        """Puts frozen rows back, bit for bit, where ``mode`` is ``param``; call it after the optimizer's step."""
        for layer in self._layers:
            if layer.frozen is not None and layer.still is not None:
                layer.by_output(layer.weight).index_copy_(0, layer.still, layer.frozen)
                layer.frozen = layer.still = None
        self._pending = False

    def _over_processes(self, layers: list[_Layer]) -> list[torch.Tensor | None]:
        """Sums magnitudes over the processes in one message; a layer that none of them used has None."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return [layer.total for layer in layers]
        device = layers[0].weight.device
        dtype = next((layer.total.dtype for layer in layers if layer.total is not None), torch.float32)
        parts = [
            torch.zeros(layer.width, dtype=dtype, device=device) if layer.total is None else layer.total.to(device)
            for layer in layers
        ]
        used = torch.tensor([layer.total is not None for layer in layers], dtype=dtype, device=device)
        flat = torch.cat([*parts, used])
        dist.all_reduce(flat)
        *sums, counts = flat.split([layer.width for layer in layers] + [len(layers)])
        return [total if count else None for total, count in zip(sums, counts.tolist(), strict=True)]

    def _check_sharding(self) -> None:
        from torch.distributed.tensor import DTensor

        for layer in self._layers:
            weight = layer.weight
            sharded = (
                isinstance(weight, DTensor)
                or isinstance(weight.grad, DTensor)
                or hasattr(weight, "ds_id")  # ZeRO-3
                or getattr(weight, "_is_flat_param", False)
                or (weight.requires_grad and weight.numel() == 0)
            )
            if sharded or weight.ndim != 2:
                if not weight.requires_grad and not sharded:
                    continue  # a quantised weight is packed, and frozen
                raise UserError(
                    f"The weight of {layer.name} is sharded over processes or flattened (FSDP, ZeRO or tensor "
                    f"parallelism), so its output rows cannot be masked: train with DDP."
                )

    # What was seen.

    def reset(self) -> None:
        """Forgets the magnitudes seen since the last step."""
        for layer in self._layers:
            layer.total = None

    def magnitudes(self) -> dict[str, torch.Tensor]:
        """Returns layer to (d_out,) sums since the last step or :meth:`reset`, of this process alone."""
        return {layer.name: layer.total for layer in self._layers if layer.total is not None}

    def stats(self) -> dict[str, LayerStats]:
        """Returns what the last masked step did, by layer."""
        found = {}
        for layer in self._layers:
            if layer.rows is None or layer.scores is None:
                continue
            scores = layer.scores.abs() if self.config.select == "low-magnitude" else layer.scores
            total = scores.sum()
            found[layer.name] = LayerStats(
                kept=float(layer.rows.float().mean()), rows=layer.rows, magnitude=scores / total if total else scores
            )
        return found

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose rows are masked while they are trained."""
        return tuple(layer.name for layer in self._layers)

    def remove(self) -> None:
        """Takes all hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> MIGUMask:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _is_identity(x: torch.Tensor) -> bool:
    square = x.ndim == 2 and len(x) == x.shape[1] and not x.requires_grad
    return square and torch.equal(x, torch.eye(len(x), dtype=x.dtype, device=x.device))


def _seed(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")
