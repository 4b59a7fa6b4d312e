"""What a decoding method is to the commands that use it, and several of them on one model.

A method's card names parts of three kinds, each a dataclass of options (:mod:`modelwright.options`):

- ``[provides.contexts]``: ``apply(model)`` returns a context manager inside which the model computes otherwise, and
  which leaves it as it was, bit for bit. Contexts may stand inside one another.
- ``[provides.generators]``: ``custom_generate(model, tokenizer)`` returns a :class:`Decoder`, which takes the place of
  the generation loop. There is at most one.
- ``[provides.caches]``: ``for_generate(model)`` returns the arguments of ``generate`` that give it a fresh cache. It is
  named apart from the others, and there is at most one.

A dataclass may also have ``check(model, tokenizer)``, which raises :class:`~modelwright.errors.UserError` before
anything expensive is loaded; and, with ``changes_prompts`` true, ``prompt(text)``, which says what to give to the model
instead of a prompt (before a chat template lays it out).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from modelwright import catalog
from modelwright.errors import UserError, did_you_mean
from modelwright.files import content_hash
from modelwright.options import Arg, make_part

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        StoppingCriteriaList,
    )

_KINDS = ("contexts", "generators")
#: Log-probability of a token that a method rules out, in scoring: what DoLa's official code gives it.
RULED_OUT = -1000.0


class Decoder(Protocol):
    """What ``generate(custom_generate=…)`` takes, with what scoring needs to know.

    Attributes:
        exact: The output has the model's own law, so that log-probabilities are the model's. A decoder for which this
            is False also has :meth:`next_token_log_probs`.
        needs_context: Optional, False if missing: each prompt is also needed without its context. ``__call__`` then
            names the parameters ``without_context_ids`` (B, T') and ``without_context_mask`` (B, T'), both int64 and
            padded on the left, which ``generate`` hands through; and so does ``next_token_log_probs``, where row b of
            both inputs ends in the same tokens.
        looks_ahead: Optional, False if missing: the law of a place depends on tokens after it, so that padding must be
            masked.
        stats: Optional: an object with ``as_dict()`` and ``clear()`` that counts over calls.
    """

    exact: bool

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop; returns tokens (B, length) int64, or a ``GenerateDecoderOnlyOutput`` if asked for."""

    def next_token_log_probs(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the law that tokens are chosen by, before sampling parameters: of each place, for the token after it.

        Args:
            model: The model.
            input_ids: (B, T) int64, padded on either side.
            attention_mask: (B, T) int64, 0 at padding.

        Returns:
            (B, T, V) float32 log-probabilities; what stands at padding does not matter.
        """


@dataclass(frozen=True)
class Part:
    """A method and its options.

    Attributes:
        kind: ``contexts``, ``generators`` or ``caches``.
        name: Its name in the catalog.
        options: Its dataclass.
    """

    kind: str
    name: str
    options: Any

    def identity(self) -> list[Any]:
        """Returns name and options, JSON-able; files and folders that it reads stand by their content."""
        hints = typing.get_type_hints(type(self.options), include_extras=True)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self.options):
            kind = _arg(hints[field.name]).kind
            value = getattr(self.options, field.name)
            if kind == "input":
                value = [_content(v) for v in value] if isinstance(value, (list, tuple)) else _content(value)
            if kind != "run":
                values[field.name] = value
        return [self.name, json.loads(json.dumps(values, default=str))]


@dataclass(frozen=True)
class Applied:
    """A model with its methods on, inside :meth:`Parts.on`.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer.
        decoder: What takes the place of the generation loop, or None for the model's own.
        parts: The methods.
        memory: Filled by :meth:`generate` if the cache says what it weighs: the levels of the largest so far.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decoder: Decoder | None = None
    parts: Parts | None = None
    memory: list[Any] = dataclasses.field(default_factory=list)

    @property
    def needs_context(self) -> bool:
        """Whether each prompt is also needed without its context."""
        return bool(getattr(self.decoder, "needs_context", False))

    def prompt(self, text: str) -> str:
        """Returns what to give to the model instead of a prompt."""
        return text if self.parts is None else self.parts.prompt(text)

    def generate(self, **inputs: Any) -> Tensor:
        """Calls the model's ``generate`` with the decoder in it."""
        if self.decoder is not None:
            inputs["custom_generate"] = self.decoder
        if self.parts is not None and self.parts.cache is not None:
            inputs |= self.parts.cache.options.for_generate(self.model)
        out: Tensor = self.model.generate(**inputs)
        held: Any = inputs.get("past_key_values")
        if hasattr(held, "memory_by_level"):
            levels = held.memory_by_level()
            if sum(level.bytes for level in levels) >= sum(level.bytes for level in self.memory):
                self.memory[:] = levels
        return out

    def log_probs(self, input_ids: Tensor, attention_mask: Tensor, **without_context: Tensor) -> Tensor:
        """Returns the law that tokens are chosen by at each place, (B, T, V) float32; see :class:`Decoder`.

        A token that the law rules out has :data:`RULED_OUT` and not minus infinity, so that of two texts with such
        tokens the one with fewer still is the better.

        Raises:
            UserError: The method says no such law.
        """
        decoder = self.decoder
        if decoder is None or getattr(decoder, "exact", False):
            inputs = {}
            if bool((attention_mask[:, 0] == 0).any()):  # padded on the left: a forward pass counts places from there
                inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs).logits
            return logits.float().log_softmax(-1)
        if not hasattr(decoder, "next_token_log_probs"):
            raise UserError(
                f"{type(decoder).__name__} only generates and says no probabilities of given texts: use it for tasks "
                f"that are scored by what is generated."
            )
        law = decoder.next_token_log_probs(self.model, input_ids, attention_mask, **without_context)
        return law.clamp(min=RULED_OUT)


@dataclass(frozen=True)
class Parts:
    """Methods that are used together.

    Attributes:
        contexts: From the outermost to the innermost.
        generator: At most one.
        cache: Where keys and values are kept.
    """

    contexts: tuple[Part, ...] = ()
    generator: Part | None = None
    cache: Part | None = None

    @property
    def all(self) -> tuple[Part, ...]:
        """Contexts, then the generator, then the cache."""
        return self.contexts + tuple(part for part in (self.generator, self.cache) if part is not None)

    @property
    def name(self) -> str:
        """Such as ``decore under string``, or ``plain`` where there is no method."""
        names = [part.name for part in reversed(self.all)]
        return " under ".join(names) if names else "plain"

    def identity(self) -> list[Any]:
        """Returns what the output depends on, JSON-able."""
        return [part.identity() for part in self.all]

    def prompt(self, text: str) -> str:
        """Returns what to give to the model instead of a prompt."""
        for part in self.all:
            if getattr(part.options, "changes_prompts", False):
                text = part.options.prompt(text)
        return text

    @contextlib.contextmanager
    def on(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, prompts: bool = False
    ) -> Iterator[Applied]:
        """Applies the methods inside the block.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            prompts: Whether the caller puts every prompt through :meth:`Applied.prompt`.

        Raises:
            UserError: One of them does not go with the model, or with those before it, or changes prompts where they
                cannot be changed. Nothing was generated then.
        """
        for part in self.all:
            if hasattr(part.options, "check"):
                part.options.check(model, tokenizer)
            if not prompts and getattr(part.options, "changes_prompts", False):
                raise UserError(
                    f"'{part.name}' puts text before each prompt, and here prompts are laid out by the task: use it "
                    f"with modelwright generate."
                )
        with contextlib.ExitStack() as stack:
            for part in self.contexts:
                stack.enter_context(part.options.apply(model))
            decoder = None if self.generator is None else self.generator.options.custom_generate(model, tokenizer)
            if self.cache is not None:
                self.cache.options.for_generate(model)  # refuses what it refuses now
            yield Applied(model, tokenizer, decoder, self)


def read_parts(given: Sequence[str | Path | Mapping[str, Any]]) -> Parts:
    """Reads methods with their options.

    Args:
        given: Each a YAML or JSON file, a name, or YAML in a line: ``decore.yaml``, ``multi-draft`` or
            ``string: {window: 64}``; or the folder of a saved edit. A file or a mapping may hold several; later
            contexts stand inside earlier ones.

    Raises:
        UserError: A file cannot be read, a method or option does not exist, a value does not fit, a method is there
            twice, or there are two generators.
    """
    named: list[tuple[str, Mapping[str, Any], str]] = []
    edits: list[str] = []
    for one in given:
        if not _holds_edit(one):
            named += _named(one)
            continue
        if not edits:  # folders of edits are one method, where the first of them stands
            named.append(("edited", {"edit": edits}, ""))
        edits.append(str(Path(str(one)).expanduser()))
    parts = [_part(name, options, where) for name, options, where in named]
    names = [part.name for part in parts]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"'{twice}' is given twice: give it once, with all its options.")
    generators = [part for part in parts if part.kind == "generators"]
    if len(generators) > 1:
        raise UserError(
            f"'{generators[0].name}' and '{generators[1].name}' both choose the tokens, so only one of them can be "
            f"used at a time."
        )
    return Parts(tuple(p for p in parts if p.kind == "contexts"), generators[0] if generators else None)


def read_cache(given: str | Path | Mapping[str, Any]) -> Part:
    """Reads a cache with its options, given as a method is to :func:`read_parts`: ``saq`` or ``saq: {group_size: 64}``.

    Raises:
        UserError: As :func:`read_parts`; or there are several.
    """
    named = _named(given)
    if len(named) > 1:
        raise UserError(f"'{named[0][0]}' and '{named[1][0]}' are two caches: name one.")
    return _part(*named[0], kinds=("caches",), what="cache")


def _holds_edit(given: str | Path | Mapping[str, Any]) -> bool:
    """Whether it is the folder of a saved edit."""
    if isinstance(given, Mapping) or "\n" in str(given) or ": " in str(given):  # YAML may be longer than a name may be
        return False
    return (Path(given).expanduser() / "edit.json").is_file()


def _named(given: str | Path | Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
    """Returns names, options, and where they stand."""
    import yaml

    from modelwright.values import parse_value

    where, value = "", typing.cast(Any, given)
    if isinstance(given, (str, Path)):
        text = str(given)
        path = Path(text).expanduser()
        single = "\n" not in text and ":" not in text
        if single and (path.suffix in (".yaml", ".yml", ".json") or path.is_file()):
            where = f"{text}: "
            try:
                text = path.read_text(encoding="utf-8")
            except FileNotFoundError as error:
                raise UserError(f"{given} does not exist: give a file, or a method by its name.") from error
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{given} cannot be read as text: {error}.") from error
        try:
            value = parse_value(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = str(getattr(error, "problem", None) or error)
            if where:
                line = f", line {mark.line + 1}" if mark else ""
                raise UserError(f"{given}{line}: this is not valid YAML ({problem}).") from error
            raise UserError(f"The method {text.strip()[:80]!r} is not valid YAML ({problem}).") from error
    if isinstance(value, str):
        value = {value: None}
    if isinstance(value, list):
        return [(name, options, where) for item in value for name, options, _ in _named(item)]
    if not isinstance(value, Mapping) or not value:
        raise UserError(
            f"{where}{str(value)[:80]!r} must name a method and its options, such as 'string: {{window: 64}}'."
        )
    found = []
    for name, options in value.items():
        if options is not None and not isinstance(options, Mapping):
            raise UserError(
                f"{where}the options of '{name}' must be a mapping, such as '{name}: {{option: value}}', not "
                f"{str(options)[:80]!r}. (In one line, YAML wants a space after the colon.)"
            )
        found.append((str(name), options or {}, where))
    return found


def _part(
    name: str,
    options: Mapping[str, Any],
    where: str,
    kinds: tuple[str, ...] = _KINDS,
    what: str = "decoding method",
) -> Part:
    wanted = name.lower().replace("_", "-")
    known = [part for kind in kinds for part in catalog.provided(kind)]
    kinds = tuple(kind for kind in kinds if wanted in catalog.provided(kind))
    if not kinds:
        if (Path(name) / "config.json").is_file():
            raise UserError(f"{where}{name} is a model's folder, not a {what}: give it with --model.")
        raise UserError(f"{where}'{name}' is no {what}: {did_you_mean(wanted, known)}")
    cls = catalog.load(kinds[0], wanted)
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    plain = {str(key): value for key, value in options.items()}
    if missing := [n for n in _required(cls) if n not in {k.replace("-", "_") for k in plain}]:
        raise UserError(f"{where}'{name}' needs the option '{missing[0]}'; it knows: {', '.join(known)}.")
    try:
        return Part(kinds[0], wanted, make_part(cls, wanted, plain))
    except UserError as error:
        raise UserError(f"{where}{error}") from error


def _required(cls: type) -> list[str]:
    empty = inspect.Parameter.empty
    return [n for n, p in inspect.signature(cls).parameters.items() if p.default is empty]


def _arg(hint: Any) -> Arg:
    if typing.get_origin(hint) is Annotated:
        return next((m for m in typing.get_args(hint)[1:] if isinstance(m, Arg)), Arg(""))
    return Arg("")


def _content(value: Any) -> Any:
    if isinstance(value, (str, Path)) and (path := Path(value).expanduser()).exists():
        return content_hash(path)
    return value
