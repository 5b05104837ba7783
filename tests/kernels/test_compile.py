"""Every Triton kernel compiles to a binary for an H100 (sm_90): the interpreter accepts more than the compiler does.

No GPU is needed: triton brings its own assembler. What the binary computes is not shown here.
"""

from __future__ import annotations

import json

import pytest
from kernel_support import run_python

pytest.importorskip("triton", reason="needs triton, which is not installed")

CODE = """
import json
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dynaflow_serving.kernels import moe_permute, reduce_rms_norm, rms_norm, silu_mul
from dynaflow_serving.kernels.launch import warps

KINDS = {"add_rms_norm": rms_norm.add_rms_norm_kernel, "silu_mul": silu_mul.silu_mul_kernel,
         "permute": moe_permute.permute_kernel, "unpermute": moe_permute.unpermute_kernel,
         "reduce": reduce_rms_norm.reduce_rms_norm_kernel}
TABLES = {"partials", "totals", "normeds"}
sizes = {}
for name, kernel in KINDS.items():
    blocks = (1024,) if name in ("silu_mul", "permute", "unpermute") else (128, 8192, 16384)
    for dtype in ("bf16", "fp16", "fp32"):
        for block in blocks:
            constants, signature = {}, {}
            for p in kernel.params:
                if p.is_constexpr:
                    constants[p.name] = block if p.name == "BLOCK" else 8
                    signature[p.name] = "constexpr"
                elif p.name == "eps":
                    signature[p.name] = "fp32"
                elif p.name in TABLES and name == "reduce":
                    signature[p.name] = "*i64"
                elif p.name == "positions":
                    signature[p.name] = "*i32"
                elif p.name in ("hidden", "width", "first", "rows") or p.name.endswith("stride"):
                    pointer = name in ("permute", "unpermute") and p.name in ("hidden", "rows")
                    signature[p.name] = "*" + dtype if pointer else "i32"
                else:
                    signature[p.name] = "*" + dtype
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
            options = {"num_warps": warps(block)}
            binary = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
            sizes[f"{name}.{dtype}.{block}"] = len(binary["cubin"])
print(json.dumps(sizes))
"""


def test_kernels_compile_for_sm_90(tmp_path: object) -> None:
    sizes = json.loads(run_python(CODE, TRITON_CACHE_DIR=str(tmp_path)))
    assert len(sizes) == 3 * (3 + 1 + 1 + 1 + 3)
    assert all(sizes.values())
