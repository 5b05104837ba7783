"""Plain PyTorch, where a user compiles a model with `dynaflow_serving.compile`."""
