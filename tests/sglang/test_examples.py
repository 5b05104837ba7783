"""The example of SGLang runs as a reader would run it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.long  # a server with metrics is tested elsewhere
def test_a_server_splits_and_counts():
    done = subprocess.run([sys.executable, str(EXAMPLES / "serve.py"), "sglang"], capture_output=True, text=True)
    found = re.search(r"^8 answers; dynaflow_steps_total: nanoflow (\d+), none \d+$", done.stdout, re.MULTILINE)
    assert found is not None and int(found[1]) > 0, done.stderr
