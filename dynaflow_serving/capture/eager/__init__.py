"""The second front-end: models and modes without a graph. The model's own forward runs once per micro-batch as a
suspended computation, and stops at the annotated calls (`borders`, `frames`); two un-split runs tell the Program
(`recording`, `program`); a plan then says which micro-batch goes on next (`operators`, `front_end`)."""

from dynaflow_serving.capture.eager.front_end import Arguments, Diverged, EagerCapture

__all__ = ["Arguments", "Diverged", "EagerCapture"]
