"""A vLLM process that does not ask for DynaFlow imports next to nothing of it."""

from stock_process import check_imports_the_entry_point_only

SCRIPT = """
from vllm import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

before = ours()
load_general_plugins()
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
arguments = parser.parse_args(["--model", sys.argv[1], "--max-model-len", "512"])
attached = hasattr(arguments, "dynaflow")
EngineArgs.from_cli_args(arguments).create_engine_config()
report(attached, before)
"""


def test_a_stock_process_imports_the_entry_point_only(model_path, tmp_path):
    check_imports_the_entry_point_only("vllm", SCRIPT, model_path("llama"), tmp_path)
