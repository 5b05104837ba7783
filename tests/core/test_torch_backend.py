"""`dynaflow_serving.compile`: equal results, gradients, refusals, several graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rounding import assert_same, integers, with_integer_weights
from torch import nn

import dynaflow_serving as dynaflow
from dynaflow_serving.errors import AnnotationError, ConfigError, InactiveError, PartitionError

SPLIT = {"strategy": "nanoflow", "options": {"min_tokens": 2}}


@dynaflow.mark("reduce", "network")
def reduce(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + reduce(self.b(torch.relu(self.a(x))))


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.mark.parametrize("level", ["dynamo", "aot"])
@pytest.mark.parametrize("executor", ["sequential", "cpu"])
def test_inference_equals_the_model_at_every_size(level: Any, executor: str) -> None:
    model = with_integer_weights(Net())
    compiled = dynaflow.compile(model, SPLIT, level=level, executor=executor)
    with torch.no_grad():
        for size in (8, 9, 4, 3, 2, 1, 30):
            x = integers(size, 4)
            assert torch.equal(compiled(x), model(x))
    counts = compiled.session.counts
    assert len(compiled.session.plan_caches) == 1
    assert counts.split == 4 and sum(counts.unsplit.values()) == 2  # size 1 never reaches it
    assert any("under 2 tokens" in reason for reason in counts.unsplit)


@pytest.mark.parametrize("level", ["dynamo", "aot"])
def test_a_training_step_has_the_same_gradients(level: Any) -> None:
    model, twin = Net(), Net()
    twin.load_state_dict(model.state_dict())
    compiled = dynaflow.compile(model, SPLIT, level=level, executor="cpu")
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    for _ in range(3):
        x = torch.randn(8, 4)
        for m, optimizer in zip((compiled, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert_same(p.grad, q.grad)
            assert_same(p, q)
    assert compiled.session.counts.split == (3 if level == "dynamo" else 6)  # at "aot" the backward graphs, too


def test_a_model_that_mixes_the_batch_is_refused_by_name() -> None:
    compiled = dynaflow.compile(lambda x: x.softmax(0), SPLIT)
    with pytest.raises(Exception, match=r"cannot be split: softmax \(aten::_softmax\) mixes tokens") as caught:
        compiled(torch.randn(8, 4))
    assert isinstance(caught.value, PartitionError) or isinstance(caught.value.__cause__, PartitionError)


def test_a_rule_without_a_match_is_an_error_on_the_first_call() -> None:
    class Wrong(dynaflow.OpScheduler):
        name = "wrong"
        annotations = (dynaflow.SplitModule("Attention"),)

        def split(self, batch: dynaflow.Batch) -> dynaflow.Split:
            raise NotImplementedError

        def schedule(self, s: dynaflow.Schedule) -> None:
            raise NotImplementedError

    compiled = dynaflow.compile(Net(), Wrong())
    with pytest.raises(Exception, match=r"SplitModule matches nothing.*Linear") as caught:
        compiled(torch.randn(8, 4))
    assert isinstance(caught.value, AnnotationError) or isinstance(caught.value.__cause__, AnnotationError)


@pytest.mark.filterwarnings("ignore")
def test_graph_breaks_give_several_graphs() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = reduce(x.sin())
        torch._dynamo.graph_break()
        return reduce(y.cos())

    compiled = dynaflow.compile(model, SPLIT)
    x = torch.randn(8, 4)
    with torch.no_grad():
        assert_same(compiled(x), model(x))
    assert compiled.session.counts.split == len(compiled.session.plan_caches) == 2


def test_another_batch_dimension_and_keyword_arguments() -> None:
    def model(x: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": reduce(x) * scale, "x": x}

    compiled = dynaflow.compile(model, SPLIT, batch_dim=1)
    x, scale = torch.randn(3, 8, 2), torch.randn(3, 8, 2)
    with torch.no_grad():
        out, want = compiled(x, scale=scale), model(x, scale)
    assert out.keys() == want.keys() and all(torch.equal(out[k], want[k]) for k in out)
    assert compiled.session.counts.split == 1


def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match=r"unknown level 'inducter'. Did you mean 'inductor'"):
        dynaflow.compile(Net(), SPLIT, level="inducter")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown option 'min_token'"):
        dynaflow.compile(Net(), "nanoflow", config={"min_token": 3})
    with pytest.raises(ConfigError, match="capture: eager is for engines that run models without a graph"):
        dynaflow.compile(torch.sin, {"strategy": "nanoflow", "capture": "eager"})
    with pytest.raises(ConfigError, match="unknown executor 'gpu'"):
        dynaflow.compile(Net(), SPLIT, executor="gpu")


def test_plain_backend_of_torch_compile() -> None:
    from dynaflow_serving.torch_backend import dynaflow as backend

    model = with_integer_weights(nn.Linear(4, 4))
    x = integers(6, 4)
    options = {"strategy": "nanoflow", "config": {"min_tokens": 1}}
    compiled = torch.compile(model, backend=backend, options=options, dynamic=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))


def test_plain_backend_names_a_static_batch_and_unknown_options() -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    from dynaflow_serving.torch_backend import dynaflow as backend

    x = torch.randn(6, 4)
    with pytest.raises(BackendCompilerFailed, match="is static, so nothing can be split"):
        torch.compile(lambda x: x + 1, backend=backend, dynamic=False)(x)
    with pytest.raises(BackendCompilerFailed, match=r"unknown option 'strateg'\. Did you mean 'strategy'"):
        torch.compile(lambda x: x + 2, backend=backend, options={"strateg": "nanoflow"}, dynamic=True)(x)


def test_requested_but_inactive_is_an_error() -> None:
    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    with pytest.raises(InactiveError, match="no graph of this model has a dynamic dimension 3"):
        dynaflow.compile(Constant(), "nanoflow", batch_dim=3)(torch.randn(4, 4))


def test_inputs_as_large_as_the_batch_that_are_only_indexed() -> None:
    """`compile` says that they are batched; the plain backend cannot know, and a split would hand them over whole."""

    def model(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return reduce(x) * table[torch.arange(x.shape[0]), 0][:, None]

    x, table = torch.randn(8, 4), torch.randn(8, 3)
    with torch.no_grad():
        compiled = dynaflow.compile(model, SPLIT)
        assert torch.equal(compiled(x, table), model(x, table))
        assert compiled.session.counts.split == 1
        torch._dynamo.reset()
        for tensor in (x, table):
            torch._dynamo.mark_dynamic(tensor, 0)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"inputs .*table.* as large as the batch"):
            torch.compile(model, backend="dynaflow", options={"strategy": SPLIT})(x, table)


def test_of_several_graphs_one_that_mixes_the_batch_runs_whole() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = reduce(x.sin())
        torch._dynamo.graph_break()
        return y.softmax(0)

    compiled = dynaflow.compile(model, SPLIT)
    x = torch.randn(8, 4)
    with torch.no_grad():
        assert_same(compiled(x), model(x))
    counts = compiled.session.counts
    assert counts.split == 1 and [c > 0 for c in counts.unsplit.values()] == [True]
    assert "mixes tokens" in next(iter(counts.unsplit))


class Counting(nn.Module):
    """A cache with a counter of its past: what it writes into buffers must be written once, wherever it is split."""

    def forward(self, x: torch.Tensor, cache: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        cache.index_copy_(1, past.view(1), x[:, None])
        past.add_(1)
        return reduce(x) + cache.sum(1)


def test_what_an_aot_graph_writes_into_its_inputs() -> None:
    model, x = Counting(), torch.randn(6, 4)
    caches = [torch.zeros(6, 5, 4) for _ in range(2)]
    pasts = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
    compiled = dynaflow.compile(model, SPLIT, level="aot")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x, caches[0], pasts[0]), model(x, caches[1], pasts[1]))
    assert torch.equal(*caches) and pasts[0] == pasts[1] == 3
    (plan_cache,) = compiled.session.plan_caches
    assert compiled.session.counts.split == 3
    graphs = [str(piece.graph) for piece in plan_cache.captured.pieces.values()]
    assert any("index_copy_.default" in g for g in graphs)  # in place, not a copy of the cache and a copy back
    assert not any("copy_.default](args = (%" in g.replace("index_copy_.default", "") for g in graphs)


def test_operators_compiled_by_inductor() -> None:
    from torch._inductor import metrics

    metrics.reset()
    model = with_integer_weights(Net())
    compiled = dynaflow.compile(model, SPLIT, level="inductor")
    for size in (8, 9, 5):
        x = integers(size, 4)
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))
    (plan_cache,) = compiled.session.plan_caches
    assert compiled.session.counts.split == 3
    computes = [o for o in plan_cache.captured.program.operators if o.resource == "compute"]
    assert len(computes) > 1 and metrics.generated_kernel_count >= len(computes)
