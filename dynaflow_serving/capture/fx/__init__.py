"""The FX front-end: a Program of a captured FX graph.

- `partition` cuts a graph and makes the Program with its callables. `buffers` adds variants that write into buffers.
- `matching` writes annotations into a graph, and `regions` groups its nodes into operators.
- `effects` tells what nodes write in place, and `input_writes` rewrites what AOT autograd writes into inputs.
- `axes` tells where the tokens of every value are, with `rows` and `mixing`, and whether the graph mixes them.
- `symbols` reads fake values and their symbols, and `sizes` rewrites look-ups of whole shapes.
- `inductor` compiles the operators one by one.
"""

from dynaflow_serving.capture.fx.buffers import add_into_variants
from dynaflow_serving.capture.fx.partition import capture_pieces, partition

__all__ = ["add_into_variants", "capture_pieces", "partition"]
