"""Benchmarks of an engine against itself: stock, and under DynaFlow.

Offline, the same requests to two engines, tokens compared; left to right: `settings` (what to run) -> `compare` (who
runs when) -> `process` (one child process per engine) -> `child` -> a `Driver` (the engine's own API) -> `result`
(figures, verdict) -> `report` (table). Servers under load, with the engine's own load generator: `serving`.
`engines.ENGINES` has an entry for each engine.
"""
