"""Benchmarks of an engine against itself: stock, and under DynaFlow.

Offline, two engines get the same requests and their tokens are compared. The flow, left to right: `benchmark` (what
the user asked for) -> `compare` (who runs when) -> `process` (one child process per engine) -> `child` -> an
`EngineDriver` (the engine's own API) -> `result` (figures, verdict) -> `report` (table).

`serving` puts servers under load instead, with the engine's own load generator. `engines.ENGINES` has an entry for each
engine.
"""
