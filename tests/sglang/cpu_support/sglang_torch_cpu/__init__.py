"""Entry points: the platform (`sglang.srt.platforms`), and what `import torch` runs (`torch.backends`)."""

from importlib.metadata import version


def activate():
    return "sglang_torch_cpu.platform.TorchCpuPlatform"


def define_torchvision_schemas():
    """The torchvision wheel on PyPI is built for CUDA, so its C library does not load beside a CPU build of torch;
    importing its Python part, as SGLang and transformers do, then needs the schemas of two of its operators."""
    import torch

    if not version("torchvision").endswith("+cpu"):
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
