"""Two real servers under load: stock, and under DynaFlow; the engine's own load generator measures.

The flow, left to right: `loads` (the requests) -> `run` (who serves when) -> `server` (one HTTP server each) and a
`tool.ServingTool` (`vllm bench serve`, `sglang.bench_serving`) -> `server_metrics` (which side split which steps, from
both /metrics) -> `record` (figures with spread, verdict, JSON) -> `report` and `plots` (one HTML file), `table`
(terminal).
"""
