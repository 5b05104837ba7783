"""Tiny random models of real architectures, made on this machine.

Contract
- Nothing is downloaded: the tokenizer is trained on the text of the Python standard library.
- The weights depend on kind, layers and seed only. A directory is made once per content key and is complete or absent,
  for it is renamed into place.
- The logits are far apart (`initializer_range` 0.2), so that greedy tokens do not depend on rounding.
- `find_model` also takes the models that a user brings: a directory, or a Hugging Face name.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynaflow_serving.errors import ConfigError, DynaflowError, unknown_name
from dynaflow_serving.files import cache_directory

VOCABULARY = 2048
SEED = 0
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+$")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@dataclass(frozen=True)
class Architecture:
    """The names of transformers' classes, and the fields that this architecture's config adds to `COMMON`."""

    config: str
    model: str
    extra: dict[str, Any] = field(default_factory=dict)
    layers: int = 2


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("LlamaConfig", "LlamaForCausalLM", {"intermediate_size": 512}),
    # Not tiny: its all-reduces and its compute take about as long over a link of some hundred Mbit/s.
    "llama_1024": Architecture(
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "initializer_range": 0.05,
        },
        layers=4,
    ),
    # Its operators compute almost nothing, so that a step's time is the cost of calling them.
    "llama_thin": Architecture(
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "head_dim": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    ),
    "qwen3": Architecture("Qwen3Config", "Qwen3ForCausalLM", {"intermediate_size": 512}),
    "mixtral": Architecture(
        "MixtralConfig",
        "MixtralForCausalLM",
        {"intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    # With experts that every token goes to, besides those it chooses.
    "qwen2_moe": Architecture(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 256,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
        },
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
        },
    ),
}


def find_model(name: str | None) -> tuple[str, bool]:
    """Return what to tell an engine, and whether that is on this machine.

    Args:
        name: A model directory, a kind of tiny model (None: llama), or a Hugging Face name such as Qwen/Qwen3-8B.

    Raises:
        ConfigError: The name is none of these.
    """
    name = name or "llama"
    if (Path(name) / "config.json").is_file():
        return str(Path(name).resolve()), True
    if name in ARCHITECTURES:
        return str(make_tiny_model(name)), True
    if Path(name).exists():
        raise ConfigError(f"model {name!r} is not a model directory: it has no config.json")
    if HUB_NAME.match(name) and not name.startswith("."):
        return name, False
    raise ConfigError(
        f"model {name!r} does not exist. " + unknown_name("tiny model", name, ARCHITECTURES) + " Or give the path of a "
        "model directory, or a Hugging Face name such as Qwen/Qwen3-8B."
    )


def make_tiny_model(kind: str, directory: str | Path | None = None, layers: int | None = None) -> Path:
    """Return the directory of a tiny model with config, weights and tokenizer; make it if it is not there yet.

    Args:
        kind: A name in `ARCHITECTURES`.
        directory: The parent folder; None for `cache_directory()/models`.
        layers: The number of layers; None for the architecture's own.

    Raises:
        ConfigError: The kind is unknown, or there is no layer.
        DynaflowError: transformers is not installed.
    """
    if kind not in ARCHITECTURES:
        raise ConfigError(unknown_name("tiny model", kind, ARCHITECTURES))
    layers = ARCHITECTURES[kind].layers if layers is None else layers
    if layers < 1:
        raise ConfigError(f"a tiny model needs at least one layer, not {layers}")
    parent = Path(directory) if directory is not None else cache_directory() / "models"
    target = parent / f"{kind}-{layers}-{_content_key(kind, layers)}"
    if (target / "config.json").is_file():
        return target
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{kind}-", dir=parent))
    try:
        _save_model(kind, layers, scratch)
        if not (scratch / "config.json").is_file():  # else an incomplete folder would be taken for the model
            raise DynaflowError(
                "transformers saved no model: once torch.distributed is initialised, only rank 0 saves; make it before"
            )
        _save_tokenizer(scratch)
        scratch.chmod(0o755)  # mkdtemp's 0700 would stay after the rename
        try:
            scratch.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _content_key(kind: str, layers: int) -> str:
    architecture = ARCHITECTURES[kind]
    content = [architecture.config, architecture.extra, COMMON, layers, SEED, CHAT_TEMPLATE, platform.python_version()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise DynaflowError(
            f"a tiny model is made with the package {name!r}, which cannot be imported here ({e}). Install the engine "
            "in this environment (it brings transformers), or give the directory of a model with --model."
        ) from None


def _save_model(kind: str, layers: int, folder: Path) -> None:
    import torch

    transformers = _module("transformers")
    architecture = ARCHITECTURES[kind]
    config = getattr(transformers, architecture.config)(**{**COMMON, **architecture.extra}, num_hidden_layers=layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = getattr(transformers, architecture.model)(config).to(torch.bfloat16)
    progress = transformers.utils.logging
    shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()  # a bar for one file of 6 MB would garble the caller's own
    try:
        model.save_pretrained(folder)
    finally:
        if shown:
            progress.enable_progress_bar()


def _save_tokenizer(folder: Path) -> None:
    tokenizers, transformers = _module("tokenizers"), _module("transformers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(standard_library(), trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=CHAT_TEMPLATE
    )
    fast.save_pretrained(folder)


def standard_library() -> list[str]:
    """Return modules of the standard library: about 3 MB of text that every Python installation has."""
    folder = Path(os.__file__).parent
    return [path.read_text(errors="ignore") for path in sorted(folder.glob("*.py"))[:80]]
