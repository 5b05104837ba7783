"""`DiffusionWorkload` is a denoising step in `dynaflow bench xdit` and `dynaflow bench fastvideo`.

Contract
- A pass is the two calls of a guidance pair, with new latents each time. `--requests` counts the rows of both calls:
  2 is one video. `--input-len` is the number of tokens of a video, a multiple of `FRAME`.
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
from dynaflow_serving.integrations.base import MERGED_CALLS, Integration, Pass, WorkloadSettings, WorkloadSide
from dynaflow_serving.integrations.diffusion.denoiser import Denoiser

FRAME = 256  # tokens of a frame: 32 x 32 latents in patches of 2 x 2
CHANNELS, SIDE, TEXT_TOKENS, TEXT_WIDTH = 16, 32, 64, 64
WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 8, "attention_head_dim": 64, "in_channels": CHANNELS,
    "out_channels": CHANNELS, "text_dim": TEXT_WIDTH, "freq_dim": 32, "ffn_dim": 2048, "num_layers": 2,
}  # fmt: skip


class DiffusionWorkload(abc.ABC):
    """A video transformer on one rank."""

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
        if settings.requests % 2 or settings.length % FRAME:
            raise ConfigError(
                f"--requests {settings.requests} --input-len {settings.length}: a guidance pair has an even number of "
                f"rows, and a video a multiple of {FRAME} tokens"
            )
        if settings.dtype not in ("auto", "float32"):
            raise ConfigError(f"--dtype {settings.dtype}: the models made here are float32. Leave it out.")
        torch.manual_seed(settings.seed)
        self.model = self.make_model(name).eval()
        generator = torch.Generator().manual_seed(settings.seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        rows = settings.requests // 2
        random = partial(torch.randn, generator=generator)
        self.latents = random(rows, CHANNELS, settings.length // FRAME, SIDE, SIDE)
        self.timestep = torch.full((rows,), 500.0)
        self.prompts = [random(rows, TEXT_TOKENS, TEXT_WIDTH) for _ in ("conditional", "unconditional")]

    @abc.abstractmethod
    def make_model(self, name: str) -> torch.nn.Module:
        """Prepare the ranks, and make a model of `models`."""

    def context(self) -> AbstractContextManager[Any]:
        """Return what the system enters around each call."""
        return nullcontext()

    @property
    def stock(self) -> Pass:
        return partial(self._pass, self.model.forward)

    @property
    def peers(self) -> Mapping[str, Pass]:
        """What a user would do without DynaFlow, by name."""
        return {MERGED_CALLS: self._merged}

    def under(self, config: Config) -> WorkloadSide:
        denoiser = Denoiser(self.model.forward, self.model, config, "aot", self.integration)
        run = partial(self._pass, denoiser)
        run()  # the pair is seen for the first time
        return WorkloadSide(run=run, session=denoiser.session, tune=partial(self._tune, denoiser))

    def _tune(self, denoiser: Denoiser) -> None:
        denoiser.forget_decisions()
        self._pass(denoiser)

    def _call(
        self, model: Callable[..., Any], latents: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> Any:
        with torch.no_grad(), self.context():
            result = model(hidden_states=latents, encoder_hidden_states=text, timestep=timestep)
        return result if isinstance(result, torch.Tensor) else result[0]

    def _pass(self, model: Callable[..., Any]) -> list[torch.Tensor]:
        latents = self.latents.clone()
        return [self._call(model, latents, self.timestep, text) for text in self.prompts]

    def _merged(self) -> list[torch.Tensor]:
        latents, timestep = (torch.cat([value, value]) for value in (self.latents, self.timestep))
        result = self._call(self.model.forward, latents, timestep, torch.cat(self.prompts))
        return list(result.chunk(2))
