"""The eager front-end: a Program of a model that runs without a graph.

The model's own forward runs once per micro-batch, as a coroutine that stops at the annotated calls. A plan says which
micro-batch goes on next. Two un-split runs tell the Program.

Vocabulary
- border: an annotated callable; `placing` finds the borders of a model.
- frame: one micro-batch's forward, suspended at a call of a border (`frames`). The call is its pending call.
- recording: an un-split run that was watched (`recording`). Its events alternate between sections and border calls.
- section: the model's own code between two border calls.
- pair: two recordings with different numbers of tokens, compared tensor by tensor (`pairing`).
- cut: which events are operators, and how each is run (`operators`). `program` names them, `functions` runs them.
- plain: a border call that needs no frame, because its arguments are tensors and constants.
- to run ahead: a frame goes on with meta tensors for the results of a plain call that has not been made yet.

A worked example: two layers, and three border calls. `attention` reads the engine's context, `all_reduce` is plain.

    def forward(self, x):             event   kind           operator               context
        x = layers[0].norm(x)           0     section        layers.0.norm          yes
        x = layers[0].attention(x)      1     border call    layers.0.attention     yes
        x = layers[0].o_proj(x)         2     section        layers.0.o_proj        yes
        x = all_reduce(x)               3     border call    all_reduce             no
        x = layers[1].norm(x)           4     section        layers.1.norm          yes
        x = layers[1].attention(x)      5     border call    layers.1.attention     yes
        return layers[1].o_proj(x)      6     section        layers.1.o_proj        yes

Two runs, with 16 and 32 tokens, record these events. Every tensor has changed in dimension 0 in proportion, so that
is its token axis: `value layers.0.norm batch:0` and so on. Each operator reads the value of the one before it, and the
first reads `x`. NanoFlow's plan for two micro-batches moves the two frames like this, from top to bottom:

    stream    operator                  frame 0                  frame 1
    compute   layers.0.norm @0          starts, stops at 1       -
    compute   layers.0.norm @1          |                        starts, stops at 1
    compute   layers.0.attention @0     its call 1 is made       |
    compute   layers.0.attention @1     |                        its call 1 is made
    compute   layers.0.o_proj @0        goes on, stops at 3      |
    compute   layers.0.o_proj @1        |                        goes on, stops at 3
    network   all_reduce @0             |    the plan makes      |
    network   all_reduce @1             |    both calls 3        |
    compute   layers.1.norm @0          goes on, stops at 5      |
    compute   layers.1.norm @1          |                        goes on, stops at 5
    ...
    compute   layers.1.o_proj @0        goes on, ends            |
    compute   layers.1.o_proj @1        ended                    goes on, ends

The all-reduce of micro-batch 0 runs while the compute stream has `o_proj` of micro-batch 1. `advance` gives each frame
the result of its call. The plan merges the two results of the last operator along the token axis.

If the norm were a border too, no code would lie between `all_reduce` and `norm`. A frame would then run ahead from call
3 to `norm`, and a strategy could replace both calls by one kernel.
"""

from dynaflow_serving.capture.eager.expected import Diverged
from dynaflow_serving.capture.eager.front_end import Arguments, EagerCapture

__all__ = ["Arguments", "Diverged", "EagerCapture"]
