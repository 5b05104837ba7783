"""When which strategy: `strategy: auto`.

The flow, left to right: `bucket` (what a decision is about) -> `tuner` (measure, with `effects` and the simulator) ->
`table` (decisions, kept in a file) -> `selector` (the look-up per step) -> `guard` (switch off what is slower
while serving). `show` is the start-up table; `start` does all of it for an engine that is about to serve.
"""
