"""transformers' own caches by name, for `modelwright generate --cache`: the peers of every other cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from modelwright.errors import UserError
from modelwright.options import Arg

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class DynamicOptions:
    """The cache that grows: what is used without a name too."""

    def for_generate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Returns what ``generate`` is given."""
        return {"cache_implementation": "dynamic"}


@dataclass(frozen=True, kw_only=True)
class OffloadedOptions:
    """The cache that waits in main memory while other layers work; for GPUs."""

    def for_generate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Returns what ``generate`` is given."""
        return {"cache_implementation": "offloaded"}


@dataclass(frozen=True, kw_only=True)
class QuantizedOptions:
    """transformers' ``QuantizedCache``, which requantises all it holds whenever its residual is full.

    Attributes:
        backend: ``quanto`` (package optimum-quanto), ``hqq`` (package hqq) or ``fp8`` (newer versions of transformers).
        bits: Of a code; not for fp8.
        group_size: Numbers that share a scale; not for fp8.
        residual_length: Tokens that are not quantised, at most; not for fp8.
    """

    backend: Annotated[Literal["quanto", "hqq", "fp8"], Arg("quanto, hqq or fp8.")] = "quanto"
    bits: Annotated[int, Arg("Bits of a code.")] = 4
    group_size: Annotated[int, Arg("Numbers that share a scale.")] = 64
    residual_length: Annotated[int, Arg("Tokens that are not quantised, at most.")] = 128

    def for_generate(self, model: PreTrainedModel) -> dict[str, Any]:
        """Returns what ``generate`` is given for one batch.

        Raises:
            UserError: The backend is not there, or does not go with the options or the model.
        """
        from transformers import QuantizedCache

        options: dict[str, Any] = {}
        if self.backend != "fp8":
            options = {"nbits": self.bits, "q_group_size": self.group_size, "residual_length": self.residual_length}
            if self.backend == "hqq":
                options |= {"axis_key": 1, "axis_value": 1}
        try:
            return {"past_key_values": QuantizedCache(self.backend, model.config, **options)}
        except (ImportError, ValueError) as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"transformers' quantized cache cannot be used with backend '{self.backend}': {said}"
            ) from error
