"""The environment variables of an engine's processes, and the facts of this machine.

Contract
- A variable that the user has set is left alone.
- The parent asks torch whether there is a GPU, which creates no CUDA context.
"""

from __future__ import annotations

import ctypes.util
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dynaflow_serving.errors import ConfigError

# glibc gives large freed buffers back to the system or keeps them, depending on their size and on what the process has
# freed before: with page faults a step of 4096 tokens takes 50 ms, without 31. Un-split steps have the larger buffers,
# so that splitting would seem to win. With these variables all memory is kept.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20)}
TCMALLOC = "tcmalloc_minimal"


def has_gpu() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def device_name() -> str:
    """Return the accelerator's name, or the processor's with the number of cores that may be used."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"CPU: {_processor()}, {len(usable_cores())} cores"


def machine() -> dict[str, Any]:
    """Return the facts of this machine that figures depend on: device, system and versions."""
    import torch

    return {
        "device": device_name(),
        "gpu": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "dynaflow-serving": metadata.version("dynaflow-serving"),
    }


def allocator(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that make a CPU process keep its memory: tcmalloc, as vLLM advises, or else glibc's own."""
    library = ctypes.util.find_library(TCMALLOC)
    wanted = {"LD_PRELOAD": library} if library else KEPT_MEMORY
    return {key: value for key, value in wanted.items() if key not in given}


def vllm_environment(
    tensor_parallel: int, *, gpu: bool, compiled: bool, local_model: bool, given: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the variables of vLLM's processes that `given` lacks.

    Args:
        tensor_parallel: The number of ranks.
        gpu: Whether the ranks run on GPUs.
        compiled: Whether the engine compiles its graph.
        local_model: Whether the model is on this machine, so that nothing is to be looked up elsewhere.
        given: The environment of this process.

    Raises:
        ConfigError: There are fewer cores than ranks.
    """
    wanted = {"VLLM_NO_USAGE_STATS": "1"}
    if not compiled:
        # With an uncompiled graph, vLLM 0.32 looks for an ahead-of-time artifact on disk in every step (4 ms), and
        # DynaFlow's engine never does: the baseline would seem half as fast as it is.
        wanted["VLLM_USE_AOT_COMPILE"] = "0"
    if local_model:
        wanted["HF_HUB_OFFLINE"] = "1"
    if not gpu:
        wanted["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; two engines are alive at once
        wanted |= allocator(given)
        wanted["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads take ten times as long when the machine is busy
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = cores_of_ranks(usable_cores(), tensor_parallel)
        if tensor_parallel == 1:
            wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: starts in seconds instead of a minute
    return {key: value for key, value in wanted.items() if key not in given}


def sglang_environment(
    tensor_parallel: int, *, gpu: bool, compiled: bool, local_model: bool, given: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return the variables of SGLang's processes that `given` lacks; they are the same, compiled or not.

    Raises:
        ConfigError: There are fewer cores than ranks.
    """
    wanted = {}
    if local_model:
        wanted["HF_HUB_OFFLINE"] = "1"
    if not gpu:
        wanted |= allocator(given)
        wanted["OMP_NUM_THREADS"] = "1"  # more threads than cores that are free: up to 50 times slower
        cores = usable_cores()
        wanted["SGLANG_CPU_OMP_THREADS_BIND"] = (
            cores_of_ranks(cores, tensor_parallel) if tensor_parallel > 1 else ",".join(map(str, cores))
        )
    return {key: value for key, value in wanted.items() if key not in given}


def no_environment(tensor_parallel: int, *, gpu: bool, compiled: bool, local_model: bool) -> dict[str, str]:
    """Return no variable, for an engine that needs none."""
    return {}


def cores_of_ranks(cores: list[int], ranks: int) -> str:
    """Return equal shares of the cores as vLLM and SGLang read them, such as `0,1|2,3`; `nobind` for one rank.

    Raises:
        ConfigError: There are fewer cores than ranks.
    """
    if ranks == 1:
        return "nobind"
    share = len(cores) // ranks
    if not share:
        raise ConfigError(f"tensor parallelism of {ranks} on a CPU needs {ranks} cores; this process has {len(cores)}")
    return "|".join(",".join(map(str, cores[r * share : (r + 1) * share])) for r in range(ranks))


def busy_seconds() -> float:
    """Return the seconds that this machine's cores have worked since it started, all processes together."""
    try:
        words = Path("/proc/stat").read_text().splitlines()[0].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, interrupt, soft = map(int, words[1:8])
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


def usable_cores() -> list[int]:
    """Return the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
