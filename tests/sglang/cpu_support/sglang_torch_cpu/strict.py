"""An attention backend that makes a wrong context visible: `--attention-backend strict`.

Like FlashInfer it uses only what `init_forward_metadata` has saved; SGLang's torch_native reads everything from the
batch at hand and would forgive a micro-batch that runs under another one's context.
"""

import copy

import torch

FIELDS = ("req_pool_indices", "seq_lens", "extend_prefix_lens", "extend_seq_lens", "out_cache_loc")


def register():
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    if "strict" in ATTENTION_BACKENDS:
        return

    class StrictBackend(TorchNativeAttnBackend):
        writers = {}  # KV slots that the step in flight writes -> the request that does

        def init_forward_metadata(self, batch):
            super().init_forward_metadata(batch)
            values = {field: getattr(batch, field) for field in FIELDS}
            self.planned = {f: v.clone() if isinstance(v, torch.Tensor) else v for f, v in values.items()}
            if batch.tbo_parent_token_range is None:
                counts = batch.extend_seq_lens if batch.extend_seq_lens is not None else torch.ones_like(batch.seq_lens)
                requests = batch.req_pool_indices.repeat_interleave(counts.to(torch.int64))
                StrictBackend.writers = dict(zip(batch.out_cache_loc.tolist(), requests.tolist()))
            else:
                self.assert_reads_no_slot_of_another_request(batch)

        def assert_reads_no_slot_of_another_request(self, batch):
            own = batch.extend_seq_lens if batch.extend_seq_lens is not None else 1
            for request, length in zip(batch.req_pool_indices.tolist(), (batch.seq_lens - own).tolist()):
                slots = self.req_to_token_pool.req_to_token[request, :length].tolist()
                others = {self.writers.get(slot, request) for slot in slots} - {request}
                assert not others, f"request {request} reads KV that requests {others} write in the same step"

        def planned_for(self, q, batch):
            if q.shape[0] != self.planned["out_cache_loc"].shape[0]:
                planned = self.planned["out_cache_loc"].shape[0]
                raise RuntimeError(f"attention of {q.shape[0]} tokens under the plan of {planned}")
            view = copy.copy(batch)
            for field, value in self.planned.items():
                setattr(view, field, value)
            return view

        def forward_extend(self, q, k, v, layer, batch, save_kv_cache=True, **kwargs):
            return super().forward_extend(q, k, v, layer, self.planned_for(q, batch), save_kv_cache, **kwargs)

        def forward_decode(self, q, k, v, layer, batch, save_kv_cache=True, **kwargs):
            return super().forward_decode(q, k, v, layer, self.planned_for(q, batch), save_kv_cache, **kwargs)

    register_attention_backend("strict")(StrictBackend)
