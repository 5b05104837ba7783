"""What goes wrong when micro-batches share KV blocks, and that it does not."""

import random

import numpy as np
import pytest

from dynaflow_serving.integrations.vllm.hazards import dependences
from dynaflow_serving.strategy.base import OpScheduler, SplitOptions
from dynaflow_serving.strategy.registry import STRATEGIES, register_strategy
from dynaflow_serving.strategy.splitting import cut_at_requests


@pytest.fixture
def one_after_another():
    """A strategy that runs one whole micro-batch before the other wherever it may: `(order) -> config`.

    The reader is the last request of the batch in Model Runner V1, the first in V2, which sorts by tokens.
    """

    class Order(SplitOptions):
        order: int = 1

    @register_strategy("one_after_another")
    class OneAfterAnother(OpScheduler[Order]):
        def split(self, batch):
            return cut_at_requests(batch, 2)

        def schedule(self, s):
            while ready := s.get_ready_ops():
                s.execute(min(ready, key=lambda t: t.micro_batch * self.options.order))

    yield lambda order: {"strategy": "one_after_another", "options": {"order": order}}
    STRATEGIES.pop("one_after_another")


FIRST_TO_LAST, LAST_TO_FIRST = 1, -1


def shared_prefix_prompts():
    rng = random.Random(0)
    shared = [rng.randrange(10, 2000) for _ in range(300)]
    return [shared + [rng.randrange(10, 2000) for _ in range(20)] for _ in range(2)]


OPTIONS = dict(prompts=shared_prefix_prompts(), max_tokens=8, max_model_len=1024, max_num_batched_tokens=4096)


@pytest.mark.parametrize("order", [FIRST_TO_LAST, LAST_TO_FIRST])
@pytest.mark.parametrize("mode", ["mode2-uncompiled", "mode3"])
def test_reader_of_a_prefix_written_in_the_same_step_follows_its_writer(
    generate, check_tokens, one_after_another, mode, order
):
    ours = generate("llama", mode, dynaflow=one_after_another(order), **OPTIONS)
    check_tokens(ours, "llama", mode, **OPTIONS)
    plans = [p for program in ours.reports[0]["programs"] for p in program["plans"]]
    assert any("depends=0>1" in p or "depends=1>0" in p for p in plans)


def test_it_is_the_edge_that_makes_it_right(generate, stock_tokens, one_after_another, monkeypatch):
    from dynaflow_serving.integrations.vllm import runner

    monkeypatch.setattr(runner, "dependences", lambda *_: ())
    orders = (FIRST_TO_LAST, LAST_TO_FIRST)
    configs = [{**one_after_another(order), "check": "never"} for order in orders]
    tokens = [generate("llama", dynaflow=config, **OPTIONS).tokens for config in configs]
    stock = stock_tokens("llama", **OPTIONS)
    assert sorted(t == stock for t in tokens) == [False, True]  # one of the orders has the reader first


def test_metadata_is_built_per_micro_batch_by_builders_that_update_block_tables(generate, check_tokens, monkeypatch):
    """vLLM caches metadata by (spec, builder type); FlashAttention's builder would hand micro-batch 1 the
    sequence lengths of micro-batch 0. The CPU builder is given the same ability here."""
    import copy

    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder as Builder

    def update_block_table(self, metadata, block_table, slot_mapping):
        updated = copy.copy(metadata)
        updated.block_table, updated.slot_mapping = block_table, slot_mapping
        return updated

    monkeypatch.setattr(Builder, "supports_update_block_table", True)
    monkeypatch.setattr(Builder, "update_block_table", update_block_table, raising=False)
    ours = generate("llama", dynaflow={"strategy": "nanoflow", "options": {"min_tokens": 1}})
    monkeypatch.undo()
    check_tokens(ours, "llama")
    assert ours.split > 0


def test_each_micro_batch_has_a_builder_of_its_own(generate, check_tokens, monkeypatch):
    """Some builders keep what they prepared on themselves (MLA's); the CPU builder takes it back here when it
    builds again."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder as Builder

    build = Builder.build

    def build_and_take_back(self, *args, **kwargs):
        if hasattr(self, "last"):
            self.last.block_table = None
        self.last = build(self, *args, **kwargs)
        return self.last

    monkeypatch.setattr(Builder, "build", build_and_take_back)
    ours = generate("llama", dynaflow={"strategy": "nanoflow", "options": {"min_tokens": 1}})
    monkeypatch.undo()
    check_tokens(ours, "llama")
    assert ours.split > 0


def test_dependences_of_block_tables():
    table = np.array([[1, 2, 3], [1, 2, 4], [5, 6, 0]])
    tokens, computed = np.array([40, 8, 16]), np.array([0, 32, 16])
    # request 0 writes blocks 1, 2, 3 in this step; request 1 was admitted on a hit for 1 and 2
    assert dependences(tokens, computed, [0, 1, 2], [(16, table)]) == ((0, 1),)
    assert dependences(tokens, np.array([0, 0, 0]), [0, 1, 2], [(16, table)]) == ()
    # a hit that leaves one token looks like a decode, but joins in this step
    assert dependences(np.array([32, 1, 1]), np.array([0, 32, 20]), [0, 1], [(16, table)]) == ((0, 1),)
    # decodes read what earlier steps wrote
    assert dependences(np.array([1, 1, 1]), np.array([47, 40, 20]), [], [(16, table)]) == ()
