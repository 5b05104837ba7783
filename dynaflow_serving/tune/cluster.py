"""Tuning on a Ray cluster: one task per share of the candidates.

Contract
- A task starts an engine, or an example, of its own with the devices that Ray gives it. These are a CPU per rank, and a
  GPU per rank where the cluster has GPUs.
- All shares succeed, or none counts. The first that fails ends the others, and the error names its host and its log.
- Ray is imported inside functions.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaflow_serving.errors import DynaflowError
from dynaflow_serving.policy.table import Table
from dynaflow_serving.tune.offline import TuningError, TuningJob, make_shares, tune_in_child

LOCAL = "local"  # the address of a cluster that is started for this, on this machine
END_SECONDS = 20.0
THREADS = "OMP_NUM_THREADS"

Tell = Callable[[str, str], None]  # (share, what becomes of it)


@dataclass(frozen=True)
class MeasuredShare:
    """A share of the candidates as one worker has measured it.

    Attributes:
        job: The share.
        table: Its table.
        host: The worker's host.
        node: The id of the worker's node in the cluster.
        pid: The worker's process.
        seconds: The time that it took, with the start of the engine.
    """

    job: TuningJob
    table: Table
    host: str
    node: str
    pid: int
    seconds: float


def tune_on_cluster(job: TuningJob, address: str, tell: Tell = lambda share, what: None) -> list[MeasuredShare]:
    """Measure a job in shares, on all workers of a cluster.

    Args:
        job: What to tune.
        address: The address of the cluster, `auto`, or `LOCAL`.
        tell: Told of each share what becomes of it.

    Raises:
        TuningError: Ray or the cluster is missing, the cluster has no room, or a share failed.
    """
    with _cluster(address) as ray:
        needs = {"CPU": job.tensor_parallel}
        if job.engine and ray.cluster_resources().get("GPU"):
            needs["GPU"] = job.tensor_parallel
        jobs = make_shares(job, _room(ray, needs))
        options = {"num_cpus": needs["CPU"], "num_gpus": needs.get("GPU", 0)}
        task = ray.remote(_measure).options(**options, max_retries=0, scheduling_strategy="SPREAD")
        running = {}
        for number, part in enumerate(jobs, 1):
            name = f"share {number} of {len(jobs)}"
            running[task.remote(part, name, os.environ.get(THREADS))] = (name, part)
            tell(name, f"{', '.join(part.selector.measured)}: sent to the cluster")
        try:
            return _collect(ray, running, tell)
        finally:
            for reference in running:
                ray.cancel(reference)
            if running:  # let them end their engines before the workers go
                ray.wait(list(running), num_returns=len(running), timeout=END_SECONDS)


def _collect(ray: Any, running: dict[Any, tuple[str, TuningJob]], tell: Tell) -> list[MeasuredShare]:
    """Return the shares in their order; take those that are done out of `running`.

    Raises:
        TuningError: A share failed.
    """
    found: dict[str, MeasuredShare] = {}
    names = [name for name, _ in running.values()]
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        name, job = running.pop(done)
        failed = f"{name} ({', '.join(job.selector.measured)}) has failed"
        try:
            answer = ray.get(done)
        except ray.exceptions.RayError as error:
            raise TuningError(f"{failed}: {error}") from None
        if "error" in answer:
            raise TuningError(f"{failed} on {answer['host']}: {answer['error']}")
        share = found[name] = MeasuredShare(job, Table.model_validate(answer.pop("table")), **answer)
        tell(name, f"measured on {share.host} (process {share.pid}) in {share.seconds:.1f} s")
    return [found[name] for name in names]


def _measure(job: TuningJob, name: str, threads: str | None) -> dict[str, Any]:
    """Measure one share; this is the task that runs in the cluster.

    Args:
        job: The share.
        name: Its name in messages.
        threads: `OMP_NUM_THREADS` where engines will serve; with Ray's own the figures would be of another machine.
    """
    import ray

    os.environ.pop(THREADS, None)
    if threads is not None:
        os.environ[THREADS] = threads
    answer: dict[str, Any] = {"host": platform.node(), "pid": os.getpid()}
    logs = Path(tempfile.mkdtemp(prefix="dynaflow-tune-"))
    started = time.perf_counter()
    try:
        table = tune_in_child(job, name, logs / "engine.log")
    except DynaflowError as error:
        return {**answer, "error": str(error)}
    shutil.rmtree(logs)
    node = ray.get_runtime_context().get_node_id()
    return {**answer, "node": node, "table": table.model_dump(mode="json"), "seconds": time.perf_counter() - started}


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Yield Ray, connected to the cluster.

    Raises:
        TuningError: Ray or the cluster is missing.
    """
    try:
        import ray
    except ImportError:
        raise TuningError(
            "--ray needs Ray, on this machine and on every node: pip install 'dynaflow-serving[ray]'"
        ) from None
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # do not report a cluster that lives for one command
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level="ERROR",
            **({"include_dashboard": False} if address == LOCAL else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TuningError(
            f"no Ray cluster at {address!r} ({error}). Give HOST:PORT of its head node, 'auto' for the cluster of this "
            f"machine, or '{LOCAL}' to start one here"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _room(ray: Any, needs: Mapping[str, int]) -> int:
    """Return how many tasks that need so much of each resource the cluster's nodes can run at a time.

    Raises:
        TuningError: No node can run one.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(name, 0) // count) for name, count in needs.items()) for node in nodes)
    if not room:
        wanted = " and ".join(f"{count} {name}s" for name, count in needs.items())
        there = ["{" + ", ".join(f"{name}: {node.get(name, 0):g}" for name in needs) + "}" for node in nodes]
        raise TuningError(f"no node of the Ray cluster has {wanted}, one per rank. Its nodes: {', '.join(there)}")
    return room
