"""The policy decides which strategy runs which kind of batch (`strategy: auto`).

Contract
- `bucket` groups batches by kind and size, and a decision is about one such bucket.
- `tuner` measures the candidates, with the help of `side_effects` and the simulator.
- `table` keeps the decisions in a file, and `key` says what they hold for.
- `selector` looks up the decision of each step, and `guard` switches off candidates that are slower while serving.
- `start` does all of this for an engine that is about to serve, and `show` prints the table.
"""
