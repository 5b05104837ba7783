"""`launch` runs a user's unchanged training script with every decoder under DynaFlow.

Contract
- A decoder is checked when the script builds it, before weights are loaded, and put under DynaFlow in its first step,
  when it is on its device.
- The script sees the arguments and the import path that it would have without DynaFlow. Its exceptions and its exit
  are its own.
- A run in which no step was split ends with `InactiveError`, unless the config lets it fall back.
"""

from __future__ import annotations

import functools
import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from dynaflow_serving.config import Config
from dynaflow_serving.errors import ConfigError, InactiveError
from dynaflow_serving.integrations import MEGATRON
from dynaflow_serving.integrations.installed import conclude, fall_back

REMEDY = "Give each micro-batch more sequences, lower min_tokens, or remove DynaFlow"


def launch(config: Config, script: Path, arguments: list[str]) -> str:
    """Run `script` in this process, a rank of its training; return how many steps were split, in words.

    Raises:
        ConfigError: There is no such script.
        InactiveError: The release or a decoder is not supported, or no step was split.
    """
    if not script.is_file():
        raise ConfigError(f"the script {script} does not exist; give it after --, with its arguments")
    decoders = _hook(config)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return conclude(config, [decoder.session for decoder in decoders], "steps of decoders", REMEDY)


def _hook(config: Config) -> list[Any]:
    """Have every `TransformerBlock` that is built run under DynaFlow; return the list of these, as they come."""
    decoders: list[Any] = []
    try:
        MEGATRON.check_release()
    except InactiveError as error:
        fall_back(config.fallback, error)
        return decoders
    from megatron.core.transformer.transformer_block import TransformerBlock

    from dynaflow_serving.integrations.megatron.decoder import Decoder
    from dynaflow_serving.integrations.megatron.limits import check_decoder

    stock = TransformerBlock.__init__
    device = "cuda" if torch.cuda.is_available() else "cpu"

    @functools.wraps(stock)
    def init(block: Any, *args: Any, **kwargs: Any) -> None:
        stock(block, *args, **kwargs)
        try:
            check_decoder(block, config, device)
        except InactiveError as error:
            fall_back(config.fallback, error)
            return

        def first(*given: Any, **named: Any) -> Any:
            del block.__dict__["forward"]
            decoders.append(Decoder.install(block, config))
            return block.forward(*given, **named)

        block.forward = first

    TransformerBlock.__init__ = init
    return decoders
