"""The proof that a graph treats tokens independently.

- `placement` has the nouns, and `prove` the proof.
- `record` runs a graph on fake tensors for two numbers of tokens, and notes its ATen operators.
- `case` is a call with the placements of its arguments. Rules are in `views`, `factories`, `indexing`, `models` and
  `collectives`; `torch_rules` asks torch for all others, and `declared` has what users vouch for.
"""

from dynaflow_serving.capture.independence.declared import row_wise
from dynaflow_serving.capture.independence.placement import Cut, Placement, Total, Whole
from dynaflow_serving.capture.independence.prove import Proof, prove
from dynaflow_serving.capture.independence.record import TOKENS

__all__ = ["TOKENS", "Cut", "Placement", "Proof", "Total", "Whole", "prove", "row_wise"]
