"""Every Triton kernel compiles to a binary for an H100 (sm_90): the interpreter accepts more than the compiler does.

No GPU is needed: triton brings its own assembler. What the binary computes is not shown here.
"""

from __future__ import annotations

import json

import pytest
from kernel_support import run_python

pytest.importorskip("triton", reason="needs triton, which is not installed")

CODE = """
import itertools
import json
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dynaflow_serving.kernels import rms_norm, silu_mul
from dynaflow_serving.kernels.launch import warps

KINDS = {"add_rms_norm": rms_norm.add_rms_norm_kernel, "silu_mul": silu_mul.silu_mul_kernel}
NUMBERS = {"eps": "fp32", "hidden": "i32", "width": "i32"}
sizes = {}
for name, kernel in KINDS.items():
    flags = (False, True) if name == "add_rms_norm" else (None,)
    blocks = (128, 8192, 16384) if name == "add_rms_norm" else (1024,)
    for dtype, block, flag in itertools.product(("bf16", "fp16", "fp32"), blocks, flags):
        constants = {"BLOCK": block, "ROUND_FIRST": flag}
        signature = {
            p.name: "constexpr" if p.is_constexpr else "i32" if p.name.endswith("stride")
            else NUMBERS.get(p.name, "*" + dtype)
            for p in kernel.params
        }
        used = {p.name: constants[p.name] for p in kernel.params if p.is_constexpr}
        source = ASTSource(fn=kernel, signature=signature, constexprs=used)
        binary = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps(block)}).asm
        sizes[f"{name}.{dtype}.{block}.{flag}"] = len(binary["cubin"])
print(json.dumps(sizes))
"""


def test_kernels_compile_for_sm_90(tmp_path: object) -> None:
    sizes = json.loads(run_python(CODE, TRITON_CACHE_DIR=str(tmp_path)))
    assert len(sizes) == 3 * (3 * 2 + 1)
    assert all(sizes.values())
