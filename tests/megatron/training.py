"""A training loop on megatron-core, with its schedule, DDP and optimizer, for one rank of the tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from dynaflow_serving.integrations.megatron import cuda_stand_in

SEQUENCE, VOCABULARY = 32, 128


@dataclass(frozen=True)
class Setup:
    """What is trained.

    Attributes:
        tensor: Tensor-parallel size.
        experts: Expert-parallel size; above 1 the layers are mixtures of 4 experts.
        sequence_parallel: Whether the norms are cut along the sequence.
        config: More settings of `TransformerConfig`.
        ddp: Settings of `DistributedDataParallelConfig`.
        batch: Sequences of a micro-batch of Megatron's.
        accumulate: Micro-batches of Megatron's per iteration.
        pipeline: The number of pipeline stages.
        own_masks: Whether each sequence has an attention mask of its own.
    """

    tensor: int = 1
    experts: int = 1
    sequence_parallel: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    batch: int = 4
    accumulate: int = 1
    pipeline: int = 1
    own_masks: bool = False


def begin(setup: Setup) -> None:
    """Prepare this rank: the stand-in, and Megatron's groups."""
    cuda_stand_in.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=setup.tensor,
        pipeline_model_parallel_size=setup.pipeline,
        expert_model_parallel_size=setup.experts,
        expert_tensor_parallel_size=setup.config.get("expert_tensor_parallel_size"),
    )
    model_parallel_cuda_manual_seed(1)


def make_model(setup: Setup) -> Any:
    """Make the model, with the same weights every time."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "use_cpu_initialization": True,
        "pipeline_dtype": torch.float32, "tensor_model_parallel_size": setup.tensor,
        "pipeline_model_parallel_size": setup.pipeline,
        "sequence_parallel": setup.sequence_parallel, "expert_model_parallel_size": setup.experts,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "add_bias_linear": False, "normalization": "RMSNorm",
        "gradient_accumulation_fusion": False, "bias_dropout_fusion": False, "bias_activation_fusion": False,
        "masked_softmax_fusion": False, "persist_layer_norm": False,
    }  # fmt: skip
    if setup.experts > 1:
        settings |= {
            "num_moe_experts": 4, "moe_router_topk": 2, "moe_token_dispatcher_type": "alltoall",
            "moe_grouped_gemm": False, "moe_ffn_hidden_size": 96, "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.05,
        }  # fmt: skip
    torch.manual_seed(0)
    return GPTModel(
        config=TransformerConfig(**settings | setup.config),
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=4 if setup.experts > 1 else None, moe_grouped_gemm=False
        ),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def batches(setup: Setup) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield token ids, positions and mask, without end; data-parallel ranks get their own."""
    generator = torch.Generator().manual_seed(3 + (dist.get_rank() if setup.tensor == 1 else 0))
    mask = torch.tril(torch.ones(1, 1, SEQUENCE, SEQUENCE)) < 0.5
    while True:
        ids = torch.randint(0, VOCABULARY, (setup.batch, SEQUENCE), generator=generator)
        if setup.own_masks:
            hidden = torch.rand(setup.batch, 1, SEQUENCE, SEQUENCE, generator=generator) < 0.2
            masks = (mask | hidden) & ~torch.eye(SEQUENCE, dtype=torch.bool)
        yield ids, torch.arange(SEQUENCE).expand(setup.batch, SEQUENCE), masks if setup.own_masks else mask


@dataclass
class Trained:
    """The losses of all iterations, and the gradients of the first."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]
    auxiliary: list[float]


def train(model: Any, setup: Setup, iterations: int) -> Trained:
    """Train `model` from where it is."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker, get_moe_layer_wise_logging_tracker

    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **setup.ddp)
    wrapped = DistributedDataParallel(model.config, ddp_config, model)
    distributed = bool(setup.ddp.get("use_distributed_optimizer"))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=distributed), [wrapped]
    )
    wrapped.config.finalize_model_grads_func = finalize_model_grads
    if setup.ddp.get("overlap_grad_reduce"):
        wrapped.config.no_sync_func = wrapped.no_sync
    data, run = batches(setup), get_forward_backward_func()
    trained = Trained([], {}, [])
    for iteration in range(iterations):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        done = run(
            forward_step_func=_forward_step,
            data_iterator=data,
            model=[wrapped],
            num_microbatches=setup.accumulate,
            seq_length=SEQUENCE,
            micro_batch_size=setup.batch,
            forward_only=False,
        )
        trained.losses.append(sum(float(d["loss"]) for d in done) / setup.accumulate)  # 0 but on the last stage
        tracker = get_moe_layer_wise_logging_tracker()
        trained.auxiliary.append(float(sum(entry["values"].sum() for entry in tracker.values())))
        clear_aux_losses_tracker()
        if iteration == 0:
            trained.gradients = {n: p.main_grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    return trained


def _forward_step(data: Iterator[tuple[torch.Tensor, ...]], model: Any) -> Any:
    ids, positions, mask = next(data)

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = output.mean()
        return mean, {"loss": mean.detach()}

    return model(ids, positions, mask, labels=ids), loss
