"""`MegatronWorkload` trains a GPT of megatron-core in `dynaflow bench megatron`.

Contract
- A pass is forward and backward over one batch of random tokens [requests, length], without the optimizer. Outputs are
  the loss and the gradients.
- `--model` names one of `MODELS`, or a YAML file with settings of `TransformerConfig`: its key `model` names the one
  of `MODELS` that the other settings change. All ranks are tensor-parallel, or expert-parallel for `ep`.
- On a machine without CUDA, `cuda_stand_in` answers what megatron-core asks of CUDA.
- "Compute alone" is a stock pass whose collectives return at once. "Network alone" is what the same pass sends, one
  collective after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from dynaflow_serving.config import Config
from dynaflow_serving.errors import ConfigError, unknown_name
from dynaflow_serving.integrations import MEGATRON
from dynaflow_serving.integrations.base import Pass, WorkloadSettings, WorkloadSide
from dynaflow_serving.integrations.torch.workload import gradients

VOCABULARY = 512
COMMON: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 1024, "num_attention_heads": 8, "add_bias_linear": False,
    "normalization": "RMSNorm", "attention_dropout": 0.0, "hidden_dropout": 0.0, "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False, "bias_dropout_fusion": False, "bias_activation_fusion": False,
    "masked_softmax_fusion": False, "persist_layer_norm": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "tp": {},
    "tp_sp": {"sequence_parallel": True},
    "ep": {
        "num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall", "moe_grouped_gemm": False,
        "moe_ffn_hidden_size": 2048, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01,
    },
}  # fmt: skip
# torch.distributed's functions, by the names under which Megatron's modules have them.
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")


class MegatronWorkload:
    """A GPT on one rank."""

    def __init__(self, settings: WorkloadSettings) -> None:
        MEGATRON.check_release()
        self.release = MEGATRON.installed_version() or ""
        if not torch.cuda.is_available():
            from dynaflow_serving.integrations.megatron import cuda_stand_in

            cuda_stand_in.install()
        if not dist.is_initialized():
            raise ConfigError("megatron needs two ranks or more: add --tensor-parallel 2, or --link MBIT")
        self.model = _make_model(_settings(settings.model or "tp"), settings)
        device = next(self.model.parameters()).device
        self.ids = torch.randint(0, VOCABULARY, (settings.requests, settings.length), device=device)
        self.positions = torch.arange(settings.length, device=device).expand_as(self.ids)
        square = torch.ones(1, 1, settings.length, settings.length, device=device)
        self.mask = torch.tril(square) < 0.5

    @property
    def stock(self) -> Pass:
        return self._pass

    def under(self, config: Config) -> WorkloadSide:
        from dynaflow_serving.integrations.megatron.decoder import Decoder
        from dynaflow_serving.integrations.megatron.limits import check_decoder

        block = self.model.decoder
        check_decoder(block, config)
        decoder = Decoder(block, config)

        def run() -> list[torch.Tensor]:
            block.forward = decoder
            try:
                return self._pass()
            finally:
                block.__dict__.pop("forward", None)

        def tune() -> None:
            decoder.tuned = False
            run()

        return WorkloadSide(run=run, session=decoder.session, tune=tune, alone=self._alone)

    @cached_property
    def _alone(self) -> dict[str, Callable[[], Any]]:
        return {"compute": partial(_muted, self._pass), "network": partial(_send, _sent(self._pass))}

    def _pass(self) -> list[torch.Tensor]:
        def loss() -> torch.Tensor:
            losses: torch.Tensor = self.model(self.ids, self.positions, self.mask, labels=self.ids)
            return losses

        return gradients(loss, [p for p in self.model.parameters() if p.requires_grad])


def _settings(name: str) -> dict[str, Any]:
    """Return the settings of the model that `--model` names.

    Raises:
        ConfigError: There is none.
    """
    if not name.endswith((".yaml", ".yml")):
        if name not in MODELS:
            raise ConfigError(unknown_name("model of megatron", name, MODELS) + " Or give a YAML file of settings.")
        return {**COMMON, **MODELS[name]}
    if not Path(name).is_file():
        raise ConfigError(f"--model: the file {name} does not exist")
    changes = yaml.safe_load(Path(name).read_text()) or {}
    if not isinstance(changes, dict):
        raise ConfigError(f"--model: {name} holds no mapping of settings")
    return {**_settings(changes.pop("model", "tp")), **changes}


def _make_model(settings: dict[str, Any], asked: WorkloadSettings) -> Any:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts = settings.get("num_moe_experts")
    kind = "expert_model_parallel_size" if experts else "tensor_model_parallel_size"
    sizes = {kind: dist.get_world_size()}
    parallel_state.initialize_model_parallel(**sizes)
    model_parallel_cuda_manual_seed(asked.seed + 1)
    torch.manual_seed(asked.seed)
    dtype = torch.float32 if asked.dtype == "auto" else getattr(torch, asked.dtype)
    try:
        config = TransformerConfig(pipeline_dtype=dtype, params_dtype=dtype, **{**sizes, **settings})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--model: Megatron's TransformerConfig refuses the settings: {error}") from error
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False),
        vocab_size=VOCABULARY,
        max_sequence_length=asked.length,
        position_embedding_type="rope",
    )
    return model.to(dtype) if config.use_cpu_initialization else model


# -- a pass without its network, and its network alone --------------------------------------------------------------
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class _Done:
    """A collective that has ended."""

    def wait(self) -> bool:
        return True


@contextmanager
def _collectives(replace: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace the collectives of floating-point tensors in this block; Megatron sends its sizes with others."""
    from megatron.core.tensor_parallel import layers, mappings

    def chosen(stock: Callable[..., Any]) -> Callable[..., Any]:
        replaced = replace(stock)

        def call(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return (replaced if output.is_floating_point() else stock)(output, *args, **kwargs)

        return call

    places = [(dist, name) for name in COLLECTIVES]
    places += [(m, f"dist_{name}_func") for m in (layers, mappings) for name in ("all_gather", "reduce_scatter")]
    stock = [getattr(module, name) for module, name in places]
    for (module, name), function in zip(places, stock):
        setattr(module, name, chosen(function))
    try:
        yield
    finally:
        for (module, name), function in zip(places, stock):
            setattr(module, name, function)


def _muted(run: Pass) -> None:
    """Run a pass whose collectives do nothing; what they should have written is whatever was there, or zero."""

    def mute(stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(output: torch.Tensor, *args: Any, **kwargs: Any) -> _Done:
            if args:  # not an all-reduce, whose output is its input
                output.zero_()
            return _Done()

        return call

    with _collectives(mute):
        run()


def _sent(run: Pass) -> list[Call]:
    """Return the collectives of a pass, with tensors of the same shapes."""
    found: list[Call] = []

    def note(stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = tuple(torch.zeros_like(a) if isinstance(a, torch.Tensor) else a for a in args)
            found.append((stock, given, {**kwargs, "async_op": False}))
            return stock(*args, **kwargs)

        return call

    with _collectives(note):
        run()
    return found


def _send(calls: list[Call]) -> None:
    for function, args, kwargs in calls:
        function(*args, **kwargs)
