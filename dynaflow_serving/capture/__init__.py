"""From a model to a Program: `fx` for models with a graph, `eager` for models without one, `mark` for both."""
