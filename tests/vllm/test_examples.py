"""The examples of vLLM run as a reader would run them."""

import re
import subprocess
import sys

import pytest
from said import EXAMPLES, said_by


def test_offline_prints_what_it_says():
    file = EXAMPLES / "vllm_offline.py"
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True)
    assert said_by(file) in done.stdout.splitlines(), done.stderr


@pytest.mark.long  # a server with metrics is tested elsewhere
def test_a_server_splits_and_counts():
    done = subprocess.run([sys.executable, str(EXAMPLES / "serve.py"), "vllm"], capture_output=True, text=True)
    found = re.search(r"^8 answers; dynaflow_steps_total: nanoflow (\d+), none \d+$", done.stdout, re.MULTILINE)
    assert found is not None and int(found[1]) > 0, done.stderr
