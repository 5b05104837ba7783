"""`DiffusionWorkload` is a denoising step in `dynaflow bench xdit` and `dynaflow bench fastvideo`.

Contract
- A pass is the two calls of a guidance pair, with new latents each time. `--requests` counts the rows of both calls:
  2 is one video. `--input-len` is the number of tokens of a video, a multiple of `FRAME`.
- Models of `WITHOUT_GUIDANCE` make one call per pass. There, `--requests` counts the rows of that call.
- The peer "merged calls" is the stock model called once, with the rows of both calls.
- A subclass makes the model of its system, with random weights, on ranks that share the sequence.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dynaflow_serving.config import Config
from dynaflow_serving.errors import ConfigError, unknown_name
from dynaflow_serving.integrations.base import (
    MERGED_CALLS,
    WITHOUT_GUIDANCE,
    Integration,
    Pass,
    WorkloadSettings,
    WorkloadSide,
)
from dynaflow_serving.integrations.diffusion.denoiser import Denoiser

FRAME = 256  # tokens of a frame: 32 x 32 latents in patches of 2 x 2
CHANNELS, SIDE, TEXT_TOKENS, TEXT_WIDTH = 16, 32, 64, 64
WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 8, "attention_head_dim": 64, "in_channels": CHANNELS,
    "out_channels": CHANNELS, "text_dim": TEXT_WIDTH, "freq_dim": 32, "ffn_dim": 2048, "num_layers": 2,
}  # fmt: skip


Random = Callable[..., torch.Tensor]  # random numbers of a shape
Calls = list[dict[str, Any]]  # the arguments of each call of a pass


class DiffusionWorkload(abc.ABC):
    """A video or image transformer on one rank."""

    integration: Integration
    models: Mapping[str, Any]  # what `--model` may name

    def __init__(self, settings: WorkloadSettings) -> None:
        self.integration.check_release()
        self.release = self.integration.installed_version() or ""
        name = settings.model or next(iter(self.models))
        if name not in self.models:
            raise ConfigError(unknown_name(f"model of {self.integration.name}", name, self.models))
        if not dist.is_initialized():
            raise ConfigError(f"{self.integration.name} needs two ranks: add --tensor-parallel 2, or --link MBIT")
        if settings.training:
            raise ConfigError(f"--training: {self.integration.name} serves models. Leave it out.")
        calls = 1 if name in WITHOUT_GUIDANCE else 2
        if settings.requests % calls or settings.length % FRAME:
            raise ConfigError(
                f"--requests {settings.requests} --input-len {settings.length}: a guidance pair has an even number of "
                f"rows, and a video or image a multiple of {FRAME} tokens"
            )
        if settings.dtype not in ("auto", "float32"):
            raise ConfigError(f"--dtype {settings.dtype}: the models made here are float32. Leave it out.")
        torch.manual_seed(settings.seed)
        self.model = self.make_model(name).eval()
        generator = torch.Generator().manual_seed(settings.seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        random = partial(torch.randn, generator=generator)
        self.calls = self.make_calls(name, settings.requests // calls, settings.length, random)

    @abc.abstractmethod
    def make_model(self, name: str) -> torch.nn.Module:
        """Prepare the ranks, and make a model of `models`."""

    def make_calls(self, name: str, rows: int, tokens: int, random: Random) -> Calls:
        """Return the arguments of the calls of a pass of a model, each with so many rows of so many tokens."""
        latents, timestep = random(rows, CHANNELS, tokens // FRAME, SIDE, SIDE), torch.full((rows,), 500.0)
        prompts = [random(rows, TEXT_TOKENS, TEXT_WIDTH) for _ in ("conditional", "unconditional")]
        return [{"hidden_states": latents, "encoder_hidden_states": text, "timestep": timestep} for text in prompts]

    def context(self) -> AbstractContextManager[Any]:
        """Return what the system enters around each call."""
        return nullcontext()

    @property
    def stock(self) -> Pass:
        return partial(self._pass, self.model.forward)

    @property
    def peers(self) -> Mapping[str, Pass]:
        """What a user would do without DynaFlow, by name."""
        return {MERGED_CALLS: self._merged} if len(self.calls) > 1 else {}

    def under(self, config: Config) -> WorkloadSide:
        denoiser = Denoiser(self.model.forward, self.model, config, "aot", self.integration)
        run = partial(self._pass, denoiser)
        run()  # the pair is seen for the first time
        return WorkloadSide(run=run, session=denoiser.session, tune=partial(self._tune, denoiser))

    def _tune(self, denoiser: Denoiser) -> None:
        denoiser.forget_decisions()
        self._pass(denoiser)

    def _call(self, model: Callable[..., Any], arguments: Mapping[str, torch.Tensor]) -> Any:
        with torch.no_grad(), self.context():
            result = model(**arguments)
        return result if isinstance(result, torch.Tensor) else result[0]

    def _pass(self, model: Callable[..., Any]) -> list[torch.Tensor]:
        latents = self.calls[0]["hidden_states"].clone()
        return [self._call(model, {**arguments, "hidden_states": latents}) for arguments in self.calls]

    def _merged(self) -> list[torch.Tensor]:
        both = {name: torch.cat([arguments[name] for arguments in self.calls]) for name in self.calls[0]}
        return list(self._call(self.model.forward, both).chunk(2))
