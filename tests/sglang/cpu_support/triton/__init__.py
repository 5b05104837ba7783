"""`import triton` without triton: SGLang's own mock, which it installs by itself on macOS only."""

import importlib.abc
import importlib.util
import sys
from pathlib import Path


def _stubs():
    """SGLang's module of stubs, loaded by its file: importing it by name would import all of SGLang, in a cycle."""
    folder = importlib.util.find_spec("sglang").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("_sglang_platform_stubs", Path(folder) / "_platform_stubs.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class constexpr:
    def __init__(self, value=None):
        self.value = value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Submodules of the mock: `import triton.language as tl`."""

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self, is_package=True) if name.startswith("triton.") else None

    def create_module(self, spec):
        module = sys.modules.get(spec.name) or stubs._MockModule(spec.name)
        if spec.name == "triton.language":
            module.constexpr, module.dtype = constexpr, type("dtype", (), {})
        return module

    def exec_module(self, module):
        pass


stubs = _stubs()
_mock = stubs._MockModule("triton")
_mock.__version__ = "3.0.0"
_mock.__spec__ = __spec__
_mock.cdiv, _mock.next_power_of_2, _mock.Config = stubs._cdiv, stubs._next_power_of_2, stubs._Config
sys.meta_path.insert(0, _Finder())
sys.modules["triton"] = _mock
_mock.language = importlib.import_module("triton.language")
