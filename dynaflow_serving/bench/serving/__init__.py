"""Two real servers under load: stock, and under DynaFlow; the engine's own load generator measures.

The flow, left to right: `loads` (what is sent) -> `run` (who serves when) -> `server` (one HTTP server each) and a
`tool.ServingTool` (`vllm bench serve`, `sglang.bench_serving`) -> `proof` (from both /metrics: which side split what)
-> `record` (figures with spread, verdict, JSON) -> `report` and `plots` (one HTML file), `table` (terminal).
"""
