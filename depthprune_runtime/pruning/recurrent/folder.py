"""A Hugging Face folder of a model that is no transformer: read, load, write."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from depthprune_runtime.checkpoint.assets import one_line, transformers_config, transformers_tokenizer
from depthprune_runtime.checkpoint.container import read_header
from depthprune_runtime.checkpoint.dense import check_block_count
from depthprune_runtime.checkpoint.gate import read_object, reading
from depthprune_runtime.checkpoint.huggingface import refuse_quantized, weight_files
from depthprune_runtime.errors import InputError, printable
from depthprune_runtime.pruning.recurrent.blocks import OTHER_FAMILIES, family_of

Encode = Callable[[str], list[int]]  # text -> token ids, without special tokens

PLAN_FILE = "depthprune_plan.json"
_COUNT_KEYS = ("num_hidden_layers", "n_layer")  # converted Mamba configs carry the second
_FLOATS = ("BF16", "F16", "F32", "F64", "bfloat16", "float16", "float32", "float64")
_TOKENIZER_SOURCES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Files beside the weights that stay true of the pruned model.
_CARRIED = (
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its bars and warnings: progress is ours to show, and what is wrong comes as an exception."""
    from transformers.utils import logging as library_logging

    logging: Any = library_logging  # it is not typed
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def is_recurrent(model: str | Path) -> bool:
    """Whether `model` is the folder of a Mamba or RWKV model, by its config.json."""
    try:
        found = read_object(Path(model) / "config.json").get("model_type")
    except InputError:
        return False  # whatever is wrong with it, opening it as a checkpoint says so
    return isinstance(found, str) and found in OTHER_FAMILIES


def read_config(folder: Path) -> Any:
    """Transformers' config of a dense model in `folder`; InputError for anything else."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json; expected the folder of a Hugging Face model")
    if (folder / PLAN_FILE).exists():
        raise InputError(f"{folder}: expected a dense model, got one already pruned; prune its dense parent")
    stored = read_object(path)
    with reading(path):
        family_of(stored.get("model_type"))
    refuse_quantized(folder, stored)
    names = _check_weights(folder)
    for key in _COUNT_KEYS:
        if key in stored:  # before a config of that size is built
            check_block_count(stored[key], names, f"{path}: {key}")
    try:
        config = transformers_config(folder)
    except Exception as error:  # the config classes raise many types on bad values
        raise InputError(f"{path}: refused by Transformers: {one_line(error)}") from error
    check_block_count(config.num_hidden_layers, names, f"{path}: num_hidden_layers")
    return config


def _stored_dtypes(folder: Path) -> dict[str, str]:
    """Tensor name -> dtype in the files, without reading the weights."""
    found: dict[str, str] = {}
    for path in sorted(set(weight_files(folder).values())):
        with reading(path):
            found |= {name: entry["dtype"] for name, entry in read_header(path).items() if name != "__metadata__"}
    if found:
        return found
    for path in sorted(folder.glob("pytorch_model*.bin")):
        try:
            tensors = torch.load(path, map_location="meta", weights_only=True)
            found |= {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
        except Exception as error:  # a pickle raises many types
            raise InputError(f"{path}: not a weight file: {one_line(error)}") from error
    return found


def _check_weights(folder: Path) -> list[str]:
    """Names of the tensors in `folder`, all of them weights rather than codes, which Transformers would cast."""
    found = _stored_dtypes(folder)
    if not found:
        raise InputError(f"{folder}: no weights; expected model.safetensors or model.safetensors.index.json")
    for name, dtype in found.items():
        if dtype not in _FLOATS:
            raise InputError(
                f"{folder}: {printable(name)}: expected weights in bf16, fp16 or fp32, got {printable(dtype)}"
            )
    return list(found)


def load_model(folder: Path, dtype: torch.dtype | None) -> Any:
    """The model on the CPU, every weight from the files."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM  # its types do not know output_loading_info
    try:
        model, info = loader.from_pretrained(
            folder,
            dtype=dtype or "auto",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # missing or damaged files, shapes that do not fit: many types
        raise InputError(f"{folder}: refused by Transformers: {one_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:  # Transformers would go on with random values
        raise InputError(f"{folder}: {len(missing)} weights are missing, such as {missing[0]}")
    if info["unexpected_keys"]:  # for example more blocks than the config says
        extra = sorted(info["unexpected_keys"])
        raise InputError(f"{folder}: {len(extra)} weights that its config does not know, such as {extra[0]}")
    for name, parameter in model.named_parameters():
        if not torch.stack(torch.aminmax(parameter.detach())).isfinite().all():
            kind = str(parameter.dtype).removeprefix("torch.")
            raise InputError(
                f"{folder}: {name}: expected finite weights, got infinite values or NaN in {kind}; if the files hold "
                "finite ones, use bfloat16 or float32"
            )
    return model


def load_encode(folder: Path) -> Encode:
    """The model's tokenizer as a function."""
    if not any((folder / name).is_file() for name in _TOKENIZER_SOURCES):
        # Transformers would make an empty tokenizer from the model type, without a word
        raise InputError(
            f"{folder}: it carries no tokenizer, so text cannot be used; put {_TOKENIZER_SOURCES[0]} beside the weights"
        )
    try:
        tokenizer = transformers_tokenizer(folder)
    except Exception as error:  # the tokenizer classes raise many types
        raise InputError(f"{folder}: its tokenizer cannot be read: {one_line(error)}") from error
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def check_output(path: Path) -> None:
    """Refuse early, before a long job, an output folder that cannot be written."""
    if path.exists() and not path.is_dir():
        raise InputError(f"output {path}: expected a new or empty folder, got a file of that name")
    parent = path.resolve().parent
    if not parent.is_dir():
        raise InputError(f"output {path}: its folder {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"output {path}: its folder {parent} is not writable")
    if path.is_dir() and any(path.iterdir()):
        raise InputError(f"output {path}: expected a new or empty folder, got one that holds files")


@contextlib.contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its name only when the body ends well; else nothing is left."""
    target = path.resolve()  # a rename would replace a symbolic link, not the folder it names
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with our number
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        temporary.rename(target)  # an empty folder of that name is replaced, one with files refuses
    except (OSError, SafetensorError) as error:
        raise InputError(f"output {path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_folder(model: Any, source: Path, path: Path, plan: Mapping[str, Any]) -> None:
    """`model` as a stock Hugging Face folder with the source's tokenizer files and the plan."""
    with _atomic_folder(path) as folder:
        model.save_pretrained(folder)
        for pattern in _CARRIED:
            for file in source.glob(pattern):
                if file.is_file() and file.suffix != ".py":  # code is not carried on
                    shutil.copyfile(file, folder / file.name)
        (folder / PLAN_FILE).write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
