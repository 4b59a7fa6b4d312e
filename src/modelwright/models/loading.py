"""Loading and saving models: from a folder or a hub id, weights as safetensors only.

``from_pretrained`` forgives what a toolkit must not: a layer that is missing from the checkpoint is filled with random
numbers and only a table is printed. Here every such fault is a :class:`~modelwright.errors.UserError`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelwright import catalog
from modelwright.errors import UserError
from modelwright.files import atomic_path
from modelwright.options import make_part

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: Entry of a config that says which attention of ours a checkpoint was trained with: ``name`` and ``options``.
ATTENTION_KEY = "modelwright_attention"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*")
#: A folder with none of these holds no tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "tokenizer_config.json",
)


def load_model(
    path_or_id: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a causal language model, in evaluation mode.

    Args:
        path_or_id: A folder, or a hub id such as ``org/name`` or ``org/name@revision``.
        dtype: Such as ``"float32"`` or ``"bfloat16"``; None or ``"auto"`` keeps the checkpoint's own.
        device: Such as ``"cpu"`` or ``"cuda:1"``; None or ``"auto"`` takes the accelerator if there is one.
        attn_implementation: Name of the attention function; None leaves the choice to the model.
        trust_remote_code: Whether Python code that lies beside the weights may be executed.

    Raises:
        UserError: There is no such model, or it is incomplete, corrupt, in pickle format, of an unknown architecture,
            or not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    folder = find_folder(path_or_id, code=trust_remote_code)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    check_weights(folder)
    _check_causal(config, folder)
    model = load_checked(
        AutoModelForCausalLM,
        folder,
        config,
        what="a causal language model",
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
    )
    return model.eval()


def load_checked(
    auto_class: Any,
    folder: Path,
    config: PreTrainedConfig,
    *,
    what: str,
    optional: tuple[str, ...] = (),
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Loads a model through an Auto class and refuses what ``from_pretrained`` forgives.

    Args:
        auto_class: Such as ``AutoModel``.
        folder: The model's folder.
        config: As :func:`load_config` gives it.
        what: The model in words, for messages: "could not be loaded as ...".
        optional: Beginnings of the names of weights that may be missing, because the caller does not use them.
        dtype: See :func:`load_model`.
        device: See :func:`load_model`.
        attn_implementation: See :func:`load_model`.
        trust_remote_code: See :func:`load_model`.

    Raises:
        UserError: Weights are missing, of another shape, corrupt, or only there as pickle files.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    check_weights(folder)
    target = resolve_device(device)
    try:
        with quiet():
            model, info = auto_class.from_pretrained(
                folder,
                config=config,
                dtype=resolve_dtype(dtype) or "auto",
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, with names and shapes
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{folder} could not be loaded as {what}: {first_line(error)}") from error
    if info["mismatched_keys"]:
        name, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise UserError(
            f"{folder}: weight '{name}' has shape {tuple(stored)}, but config.json asks for {tuple(wanted)} "
            f"({len(info['mismatched_keys'])} weights differ): config and weights are not of the same model."
        )
    if names := sorted(name for name in info["missing_keys"] if not name.startswith(optional)):
        raise UserError(
            f"{folder}: {len(names)} weights of {type(model).__name__} are missing, such as '{names[0]}': "
            f"the checkpoint is incomplete, or is not {what}."
        )
    if attn_implementation is None and getattr(config, ATTENTION_KEY, None) is not None:
        _restore_attention(model, folder)
    return model.to(target)


def _restore_attention(model: Any, folder: Path) -> None:
    """Puts the attention in place that a checkpoint was trained with, with what was learned of it.

    Raises:
        UserError: There is no such attention here, or its weights are missing.
    """
    import torch
    from safetensors import safe_open

    entry = getattr(model.config, ATTENTION_KEY)
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"{folder}/config.json: '{ATTENTION_KEY}' must hold the name of an attention and its options.")
    before = set(model.state_dict())
    make_part(catalog.load("attentions", entry["name"]), entry["name"], entry.get("options")).install(model)
    learned = {name: value for name, value in model.state_dict().items() if name not in before}
    found = set()
    for file in sorted(folder.glob("*.safetensors")) if learned else ():
        with safe_open(file, framework="pt") as weights, torch.no_grad():
            for name in set(weights.keys()) & set(learned):
                learned[name].copy_(weights.get_tensor(name))
                found.add(name)
    if missing := sorted(set(learned) - found):
        raise UserError(
            f"{folder}: {len(missing)} weights of the attention '{entry['name']}' are missing, such as '{missing[0]}'."
        )


def load_config(path_or_id: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Reads a model's config, and makes its architecture known first if it is one of ours.

    Raises:
        UserError: There is no config, it is not valid, or its architecture is unknown.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder = find_folder(path_or_id, code=trust_remote_code)
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder} holds a PEFT adapter, not a model: merge it into its base model and save that.")
        raise UserError(f"{folder} has no config.json, so it is not a Hugging Face model folder.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(model_type, str):
        raise UserError(f"{path} names no model_type, so its architecture is unknown.")
    register(model_type)
    if not trust_remote_code and not knows(model_type):
        advice = (
            "the folder brings code of its own: read it, and allow it with --trust-remote-code if you trust it."
            if "auto_map" in raw
            else "a newer transformers may know it."
        )
        raise UserError(f"{path} names the model_type '{model_type}', which is not known here: {advice}")
    try:
        with quiet():  # it warns of a class's default token ids before it reads those of the file
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{path} is not a valid {model_type} config: {first_line(error)}") from error


def load_tokenizer(path_or_id: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a tokenizer; if it has no padding token, the end token serves.

    Raises:
        UserError: There is none, or its files are corrupt.
    """
    from transformers import AutoTokenizer

    folder = find_folder(path_or_id, code=trust_remote_code)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{folder} has no tokenizer (no tokenizer.json): name the folder of its tokenizer with --tokenizer."
        )
    if (folder / "config.json").is_file():
        with contextlib.suppress(OSError, ValueError):
            register(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust side raises bare Exception for a corrupt file
        raise UserError(f"The tokenizer in {folder} could not be loaded: {first_line(error)}") from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, path: str | Path, force: bool = False
) -> None:
    """Writes a model folder (config, safetensors, tokenizer) that appears whole or not at all.

    Raises:
        UserError: ``path`` exists and ``force`` is off, or the disk is full.
    """
    with atomic_path(path, force) as partial:
        write_model(model, tokenizer, partial)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Writes config, safetensors and tokenizer into a folder that the caller keeps or throws away as a whole."""
    import errno

    from safetensors import SafetensorError

    try:
        with quiet():
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        # safetensors wraps the operating system's error in text, which hides a full disk.
        if "os error 28" in str(error) or "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise


def find_folder(path_or_id: str | Path, *, code: bool = False) -> Path:
    """Returns the folder of a model: as given, or fetched from the hub into its cache.

    Args:
        path_or_id: A folder or a hub id.
        code: Whether to fetch Python files too.

    Raises:
        UserError: It is neither a folder nor a hub id that can be fetched.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file: give the folder that holds config.json and the weights.")
    name = str(path_or_id)
    if not _HUB_ID.fullmatch(name) or name.startswith((".", "~")):
        raise UserError(f"{name} does not exist: give a model folder, or a hub id such as org/name.")
    return _fetch(name, code)


def _fetch(name: str, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    repository, _, revision = name.partition("@")
    patterns = [*_FETCHED, *(["*.py"] if code else [])]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(
            f"The hub asks for permission for '{repository}': accept its terms and log in first."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"'{repository}' is neither a folder here nor a model on the hub.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"'{repository}' on the hub has no revision '{revision}'.") from error
    except (OSError, HfHubHTTPError, ValueError, RuntimeError) as error:
        raise UserError(
            f"'{repository}' is not a folder here, is not in the hub's cache, and the hub cannot be reached: "
            f"check the path, or the connection."
        ) from error
    except Exception as error:
        if type(error).__module__.split(".")[0] in ("httpx", "requests", "urllib3"):
            raise UserError(f"'{repository}' is not a folder here, and the hub cannot be reached.") from error
        raise


def register(model_type: str) -> None:
    """Imports the module of a model type of ours, which makes it known to the Auto classes; others are left alone."""
    module = catalog.provided("model_types").get(model_type)
    if module:
        importlib.import_module(module.split(":")[0])


def knows(model_type: str) -> bool:
    """Whether the Auto classes know a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """Returns a device; None or ``"auto"`` is the accelerator if there is one, else the CPU.

    Raises:
        UserError: No such device.
    """
    import torch

    if device is None or str(device) == "auto":
        if torch.accelerator.is_available():
            return torch.accelerator.current_accelerator() or torch.device("cpu")
        return torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"The device '{device}' is not available: {first_line(error)}") from error


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Returns a floating-point dtype; None or ``"auto"`` is None, which means the checkpoint's own.

    Raises:
        UserError: Not a floating-point dtype.
    """
    import torch

    if dtype is None or dtype == "auto":
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"'{dtype}' is not a dtype for weights: use auto, float32, bfloat16 or float16.")
    return found


def check_weights(folder: Path) -> None:
    """Refuses a folder whose weights are absent, incomplete, truncated, or there only as pickle files.

    Raises:
        UserError: One of these.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is not a valid index of weights: {first_line(error)}") from error
        files = [folder / name for name in names]
        if absent := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"{folder} is incomplete: {len(absent)} of {len(files)} weight files are missing, such as {absent[0]}."
            )
    if not files:
        if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
            raise UserError(
                f"{folder} has its weights only as pickle files, which can run code when they are opened: where you "
                f"trust their origin, convert them once, away from here, with torch.load(..., weights_only=True) and "
                f"safetensors.torch.save_file(..., 'model.safetensors', metadata={{'format': 'pt'}})."
            )
        raise UserError(f"{folder} has no weights (no *.safetensors file).")
    for file in files:
        try:
            with safe_open(file, framework="pt"):  # reads the header and compares it with the file's length
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file} is truncated or corrupt ({first_line(error)}): download or copy it again."
            ) from error


def _check_causal(config: PreTrainedConfig, folder: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in getattr(
        config, "auto_map", {}
    ):
        raise UserError(f"{folder} holds a model of type '{config.model_type}', which is not a causal language model.")


def first_line(error: BaseException) -> str:
    """Returns an exception's text as the end of one sentence."""
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:2]) or type(error).__name__
    return text[:300].rstrip(".") + "."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the library's warnings and bars inside the block: our own sentences and bars say it."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def describe(model: Any) -> dict[str, Any]:
    """Returns what a result keeps of a model: architecture, type, parameters (tied ones once) and dtype."""
    return {
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
