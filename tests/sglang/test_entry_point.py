"""An SGLang process that does not ask for DynaFlow imports next to nothing of it."""

from stock_process import check_imports_the_entry_point_only

SCRIPT = """
import argparse
import sglang.srt.runtime_context
from sglang.srt.server_args import ServerArgs
from sglang.srt.plugins import load_plugins

before = ours()
load_plugins()
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
arguments = parser.parse_args(["--model-path", sys.argv[1], "--device", "cpu"])
ServerArgs.from_cli_args(arguments).resolve_once()
report(hasattr(arguments, "dynaflow"), before)
"""


def test_a_stock_process_imports_the_entry_point_only(model_path, tmp_path):
    check_imports_the_entry_point_only("sglang", SCRIPT, model_path("llama"), tmp_path)
