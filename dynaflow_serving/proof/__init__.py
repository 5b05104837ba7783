"""Whether it is really on, really overlaps, and is really right: counters, traces, and comparison with un-split steps.

Contract
- `metrics` counts every step (Prometheus), `trace` writes timelines of real steps, `shadow` compares outputs.
- `steps.Steps` asks each of them at the begin and end of a step; none is in the way of a step that it does not sample.
"""
