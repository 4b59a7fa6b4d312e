"""What SERAC keeps beside a model: the scope classifier's embedding, and the counterfactual model."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modelwright.editing.fingerprint import checksum, model_fingerprint
from modelwright.editing.learning import plain_inputs
from modelwright.editing.requests import EditRequest
from modelwright.editing.sentences import load_encoder, text_limit
from modelwright.editing.serac.scope import scope_scores
from modelwright.editing.subject import encode_pair
from modelwright.errors import UserError
from modelwright.files import read_json, write_json
from modelwright.models.loading import load_model, write_model
from modelwright.models.roles import unwrap
from modelwright.models.scoring import context_length
from modelwright.models.tokenizers import leading_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Pooling = Literal["auto", "cls", "mean"]
#: How scope is told: by the distance of two embeddings, or by reading edit and input together.
Classifier = Literal["embedding", "cross"]
_PAIRS = 64  # edits and inputs read together at once


class SeracParts(nn.Module):
    """The trained parts: they belong to a base model and its tokenizer, and neither is changed.

    Embeddings φ are a linear map of either an encoder's first token (``cls``) or mean, or, without an encoder, of the
    mean of the base model's own last hidden states. The cross-encoder reads "edit answer" and the input together, and
    its score is the logistic function of a linear map of the same states.

    Args:
        small: The counterfactual model, which has the base model's tokenizer.
        encoder: Any encoder of texts (``AutoModel``) and its tokenizer; None to use the base model's hidden states.
        encoder_tokenizer: See above.
        size: Size of the hidden states that are pooled.
        pooling: ``auto`` is ``cls`` with an encoder and ``mean`` without.
        separator: Text between an edit and the input in what the small model reads.
        classifier: How scope is told.
    """

    def __init__(
        self,
        small: PreTrainedModel,
        encoder: PreTrainedModel | None = None,
        encoder_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        size: int,
        pooling: Pooling = "auto",
        separator: str = " ",
        classifier: Classifier = "embedding",
    ) -> None:
        super().__init__()
        self.small = small
        self.encoder = encoder
        self.encoder_tokenizer = encoder_tokenizer
        self.pooling = pooling
        self.separator = separator
        self.folder: Path | None = None  # where they are kept
        self.classifier = classifier
        if classifier == "cross":
            self.projection = nn.Linear(size, 1)
            nn.init.zeros_(self.projection.weight)  # ½ for every pair, and the same start whatever the seed
            nn.init.zeros_(self.projection.bias)
        else:
            self.projection = nn.Linear(size, size, bias=False)
            nn.init.eye_(self.projection.weight)

    @cached_property
    def identity(self) -> str:
        """A hash (hex) of all parts as they are when it is first asked for: after the training."""
        models = [self.small, *([self.encoder] if self.encoder is not None else [])]
        known = [*map(model_fingerprint, models), *map(checksum, self.projection.parameters())]
        known += [self.pooling, self.separator, self.classifier]
        return hashlib.sha256("\n".join(known).encode()).hexdigest()[:32]

    def embed(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        answers: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Returns φ(x), or φ(x; y), as (n, size) float32.

        Args:
            model: The base model.
            tokenizer: Its tokenizer.
            texts: The inputs x.
            answers: The answers y, of edits.
        """
        behind = None if answers is None else [answer.strip() for answer in answers]
        return self._projected(model, tokenizer, texts, behind)

    def _projected(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        behind: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """The linear map of the pooled states of texts, each with another behind it if there is one."""
        self.projection.to(model.device)
        if self.encoder is None or self.encoder_tokenizer is None:
            joined = [t if behind is None else f"{t} {behind[i]}" for i, t in enumerate(texts)]
            inputs = plain_inputs(model, tokenizer, [text or " " for text in joined])
            inner: Any = unwrap(model)
            with torch.no_grad():
                # The body only: the model's own head, and hooks on it, have no part in this.
                hidden = inner.base_model(**inputs, use_cache=False).last_hidden_state.float()
        else:
            self.encoder.to(model.device)
            longest = text_limit(self.encoder, self.encoder_tokenizer)
            encoded = self.encoder_tokenizer(
                list(texts), *([list(behind)] if behind is not None else []), padding=True,
                truncation=True, max_length=longest, return_tensors="pt", padding_side="right",
            ).to(model.device)  # fmt: skip
            inputs = {"attention_mask": encoded["attention_mask"]}
            hidden = self.encoder(**encoded).last_hidden_state.float()
        if self.pooling == "cls" or (self.pooling == "auto" and self.encoder is not None):
            pooled = hidden[:, 0]
        else:
            mask = inputs["attention_mask"][..., None].to(hidden)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        return self.projection(pooled)

    def embed_requests(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
    ) -> torch.Tensor:
        """Returns φ(x_e; y_e) of edits, (n, size): what the memory keeps. Of the cross-encoder that is (n, 0)."""
        if self.classifier == "cross":
            return torch.zeros(len(requests), 0)
        return self.embed(model, tokenizer, [r.text for r in requests], [r.target for r in requests])

    def scores(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        requests: Sequence[EditRequest],
        memory: torch.Tensor,
    ) -> torch.Tensor:
        """Returns how much each input is in the scope of each edit: (texts, edits) in [0, 1].

        Args:
            model: The base model.
            tokenizer: Its tokenizer.
            texts: The inputs.
            requests: The edits.
            memory: What :meth:`embed_requests` returned for them.
        """
        if self.classifier == "embedding":
            queries = self.embed(model, tokenizer, texts)
            return scope_scores(queries, memory.to(queries))
        edits = [f"{r.text} {r.target.strip()}" for r in requests]
        pairs = [(edit, text) for text in texts for edit in edits]
        found = [
            self._projected(model, tokenizer, *zip(*pairs[at : at + _PAIRS])) for at in range(0, len(pairs), _PAIRS)
        ]
        return torch.cat(found)[:, 0].sigmoid().view(len(texts), len(edits))

    def logits(
        self,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[EditRequest],
        rows: Sequence[Sequence[int]],
        vocabulary: int,
        device: torch.device,
    ) -> list[torch.Tensor]:
        """Returns what the small model predicts after each token of an input that stands behind an edit.

        Args:
            tokenizer: The tokenizer of both models.
            requests: Each row's edit (x_e, y_e).
            rows: Each row's tokens x.
            vocabulary: Width of the base model's logits; the small model's are padded or cut to it.
            device: Where to compute.

        Returns:
            For each row (tokens, vocabulary).

        Raises:
            UserError: Edit and input together are too long for the small model.
        """
        self.small.to(device)
        lead = leading_ids(tokenizer)
        between = list(tokenizer(self.separator, add_special_tokens=False)["input_ids"]) if self.separator else []
        inputs: list[list[int]] = []
        offsets: list[int] = []
        for request, row in zip(requests, rows, strict=True):
            head, answer = encode_pair(tokenizer, request.text, request.target)
            prefix = (
                [*head[len(lead) :], *answer, *between] if head[: len(lead)] == lead else [*head, *answer, *between]
            )
            own = len(lead) if list(row[: len(lead)]) == lead else 0
            inputs.append([*row[:own], *prefix, *row[own:]])
            offsets.append(len(prefix))
        width, longest = max(map(len, inputs)), context_length(self.small)
        if longest is not None and width > longest:
            raise UserError(
                f"An edit and its prompt have {width} tokens, but SERAC's small model reads {longest}: shorten them, "
                f"or train it with a small model of a longer context."
            )
        ids, mask = torch.zeros(len(inputs), width, dtype=torch.long), torch.zeros(len(inputs), width, dtype=torch.long)
        for number, row in enumerate(inputs):
            ids[number, : len(row)] = torch.tensor(row)
            mask[number, : len(row)] = 1
        out = self.small(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        if out.shape[-1] < vocabulary:
            out = nn.functional.pad(out, (0, vocabulary - out.shape[-1]), value=torch.finfo(out.dtype).min)
        out = out[..., :vocabulary]
        return [out[i, offsets[i] : offsets[i] + len(row)] for i, row in enumerate(rows)]

    def write(self, folder: Path) -> None:
        """Writes everything into an existing folder, as Hugging Face folders and safetensors.

        Parts that are kept somewhere already share their files by hard links where the disk can: a thousand edits in a
        sequence have one small model.
        """
        if self.folder is not None and _identity(self.folder) == self.identity:
            shutil.copytree(self.folder, folder, copy_function=_link, dirs_exist_ok=True)
            return
        write_model(self.small, None, folder / "small")
        if self.encoder is not None and self.encoder_tokenizer is not None:
            write_model(self.encoder, self.encoder_tokenizer, folder / "encoder")
        tensors = {"projection": self.projection.weight.detach().cpu().contiguous()}
        if self.classifier == "cross":
            tensors["bias"] = self.projection.bias.detach().cpu()
        save_file(tensors, folder / "projection.safetensors")
        about = {"format": 1, "pooling": self.pooling, "separator": self.separator, "classifier": self.classifier}
        about["identity"] = self.identity
        write_json(folder / "serac.json", about)

    @classmethod
    def read(cls, folder: Path) -> SeracParts:
        """Reads what :meth:`write` wrote; parts that are in memory already are not read twice.

        Raises:
            UserError: It is missing or damaged.
        """
        if not (folder / "serac.json").is_file():
            raise UserError(f"{folder} holds no trained SERAC parts (no serac.json): train them first.")
        described = read_json(folder / "serac.json")
        if (known := _in_memory.get(described.get("identity"))) is not None:
            return known
        encoder, tokenizer = load_encoder(folder / "encoder") if (folder / "encoder").is_dir() else (None, None)
        small = load_model(folder / "small", device="cpu")
        try:
            tensors = load_file(folder / "projection.safetensors")
            parts = cls(
                small, encoder, tokenizer, size=tensors["projection"].shape[1], pooling=described["pooling"],
                separator=described["separator"], classifier=described.get("classifier", "embedding"),
            )  # fmt: skip
            with torch.no_grad():
                parts.projection.weight.copy_(tensors["projection"])
                if parts.classifier == "cross":
                    parts.projection.bias.copy_(tensors["bias"])
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(f"The SERAC parts in {folder} are damaged ({error}): train them again.") from error
        parts.eval().requires_grad_(False)
        parts.folder = folder
        _in_memory[parts.identity] = parts
        return parts


#: Parts that were read, by their identity.
_in_memory: WeakValueDictionary[str, SeracParts] = WeakValueDictionary()


def _identity(folder: Path) -> str | None:
    """Returns the identity of parts in a folder; None if there are none."""
    try:
        return str(read_json(folder / "serac.json")["identity"])
    except (UserError, KeyError, TypeError):
        return None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def check_vocabulary(small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a small model that does not have the tokenizer's tokens.

    Raises:
        UserError: It has fewer.
    """
    known = small.get_input_embeddings().weight.shape[0]
    if known < len(tokenizer):
        raise UserError(
            f"SERAC's small model knows {known} tokens and the model's tokenizer has {len(tokenizer)}: both models "
            f"need the same tokenizer."
        )
