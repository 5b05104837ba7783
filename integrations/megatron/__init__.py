"""`enable` puts the decoder of a Megatron-LM model under DynaFlow, for training with any loop on megatron-core.

Contract
- There is no plugin mechanism to hook. A loop calls `enable(model, FILE)` once the model is built; `dynaflow megatron`
  does so for an unchanged script.
- A model that cannot run under DynaFlow raises `InactiveError`, before the first step. With `fallback: true` it stays
  the stock model, and there is a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from dynaflow_serving.config import Config, load
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations import MEGATRON
from dynaflow_serving.integrations.installed import fall_back
from dynaflow_serving.session.report import WorkerReport

Model = TypeVar("Model")


def enable(model: Model, source: str | Mapping[str, Any] | Config = "round_robin") -> Model:
    """Run the decoder layers of `model` under DynaFlow.

    Args:
        model: A model of megatron-core, wrapped (DDP, Float16Module) or not, or a list of such chunks.
        source: A YAML file, a strategy name, a mapping or a `Config`.

    Returns:
        The `model` itself.

    Raises:
        ConfigError: The config is wrong.
        InactiveError: The model or the release is not supported, and the config does not let it fall back.
    """
    config = load(source)
    try:
        MEGATRON.check_release()
        from dynaflow_serving.integrations.megatron.decoder import Decoder
        from dynaflow_serving.integrations.megatron.limits import check_decoder

        decoders = decoders_of(model)
        for decoder in decoders:
            check_decoder(decoder, config)
        for decoder in decoders:
            Decoder.install(decoder, config)
    except InactiveError as error:
        fall_back(config.fallback, error)
    return model


def report(model: Any) -> WorkerReport:
    """Return the report of the steps of the (first chunk's) decoder so far.

    Raises:
        InactiveError: The model is not enabled.
    """
    from dynaflow_serving.integrations.megatron.decoder import Decoder

    return Decoder.installed_in(decoders_of(model)[0]).session.report()


def decoders_of(model: Any) -> list[Any]:
    """Return the decoders (`TransformerBlock`) of a model or of a list of chunks.

    Raises:
        InactiveError: There is none.
    """
    from megatron.core.transformer.transformer_block import TransformerBlock

    chunks: Iterable[Any] = model if isinstance(model, list | tuple) else [model]
    found = [m for chunk in chunks for m in chunk.modules() if isinstance(m, TransformerBlock)]
    if not found:
        raise InactiveError("this model has no TransformerBlock of megatron-core: DynaFlow schedules nothing else")
    return found
