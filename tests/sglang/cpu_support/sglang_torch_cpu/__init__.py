"""Entry point of `sglang.srt.platforms`: plain PyTorch on CPU."""

import contextlib

import torch


def activate():
    # The torchvision wheel on PyPI is built for CUDA and its C library does not load here; importing its Python
    # part needs the schemas of two of its operators.
    for operator in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # defined by a torchvision that does load
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
    return "sglang_torch_cpu.platform.TorchCpuPlatform"
