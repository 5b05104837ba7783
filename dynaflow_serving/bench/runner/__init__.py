"""What runs the sides of a comparison: each runner starts them once, and runs one pass of one side when asked.

`ranks`: rank processes that hold all sides (torch, transformers). `engines`: an engine per side, offline (vllm,
sglang). `nodes`: a server per side, on two emulated nodes (vllm, sglang).
"""
