"""The launcher, with what NGRAM speculation needs of sgl_kernel, which has no CPU build on the index: in torch.

Run as a script; each spawned process imports it again before it imports SGLang. Signatures are sgl_kernel's. All else
is SGLang's own: worker, corpus, scheduler and memory. Its attention in torch has no mask for a tree of drafts, so that
is here too.
"""

from __future__ import annotations

import ctypes
import sys
import types
from typing import Any

import torch
from sglang_blocklora import cpu_only, launch_server
from torch.nn.functional import scaled_dot_product_attention


def assign_extend_cache_locs_cpu(requests, req_to_token, starts, ends, found, width) -> None:
    """Slots of each request's tokens from its start to its end, one request after another."""
    spans = zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True)
    slots = torch.cat([req_to_token[request, start:end] for request, start, end in spans])
    found[: len(slots)] = slots


def assign_req_to_token_pool_cpu(requests, req_to_token, starts, ends, slots, width) -> None:
    """The reverse: note new slots of each request's tokens."""
    done = 0
    for request, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        req_to_token[request, start:end] = slots[done : done + end - start]
        done += end - start


def fill_accept_out_cache_loc_cpu(accept_index, slots, accepted_slots) -> None:
    """Slots of the draft tokens that were accepted, in front."""
    accepted = accept_index.flatten()
    accepted = accepted[accepted >= 0].long()
    accepted_slots[: len(accepted)] = slots[accepted]


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, targets, sources) -> None:
    """Copy rows of every layer's K and V; a target may be another's source."""
    for pointer, size in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(pointer + source * size, size) for source in sources.tolist()]
        for target, row in zip(targets.tolist(), rows, strict=True):
            ctypes.memmove(pointer + target * size, row, size)


def reconstruct_indices_from_tree_mask(mask, lengths, positions, index, child, sibling, requests, drafts) -> None:
    """Positions, first children and next siblings of the nodes of each request's tree (mask[i, j]: j is above i)."""
    below = torch.ones(drafts, drafts, dtype=torch.bool).tril(-1)
    index.copy_(torch.arange(requests * drafts).view(requests, drafts))
    child.fill_(-1)
    sibling.fill_(-1)
    for request, tree in enumerate(mask.view(requests, drafts, drafts).bool() & below):
        positions[request * drafts : (request + 1) * drafts] = tree.sum(1) + lengths[request]
        last: dict[int, int] = {}  # node -> the youngest of its children so far
        for node in range(1, drafts):
            parent = int(tree[node].nonzero().max())
            if parent in last:
                sibling[request, last[parent]] = node
            else:
                child[request, parent] = node
            last[parent] = node


def verify_tree_greedy_cpu(
    *,
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
) -> None:
    """Walk down each tree as long as a child is what the model says."""
    said = target_predict.flatten()
    for request, drafts in enumerate(candidates.tolist()):
        node, accepted = 0, 0
        while True:
            row = int(retrive_index[request, node])
            accept_index[request, accepted] = row
            predicts[row] = said[row]
            node = int(retrive_next_token[request, node])
            while node >= 0 and drafts[node] != int(said[row]):
                node = int(retrive_next_sibling[request, node])
            if node < 0 or accepted + 1 == accept_index.shape[1]:
                break
            accepted += 1
        accept_token_num[request] = accepted


def verify_attention(self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any) -> torch.Tensor:
    """Attention of draft tokens to their request's tokens and to the drafts above them."""
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    pool, drafts = self.token_to_kv_pool, batch.spec_info.draft_token_num
    pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, None), k, v)
    keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
    queries = q.view(-1, drafts, layer.tp_q_head_num, layer.qk_head_dim).transpose(1, 2)
    out = []
    for request, tree in enumerate(batch.spec_info.custom_mask.view(-1, drafts, drafts).bool()):
        length = int(batch.seq_lens[request])
        slots = self.req_to_token_pool.req_to_token[batch.req_pool_indices[request], : length + drafts]
        mask = torch.cat([torch.ones(drafts, length, dtype=torch.bool), tree], 1)
        one = scaled_dot_product_attention(
            queries[request],
            keys[slots].transpose(0, 1),
            values[slots].transpose(0, 1),
            attn_mask=mask,
            scale=layer.scaling,
            enable_gqa=True,
        )
        out.append(one.transpose(0, 1))
    return torch.cat(out).reshape(q.shape[0], -1)


def put_in_place() -> None:
    """Before SGLang is imported, but for the attention."""
    kernels = sys.modules["sgl_kernel"]
    for kernel in (
        assign_extend_cache_locs_cpu,
        assign_req_to_token_pool_cpu,
        copy_all_layer_kv_cache_cpu,
        fill_accept_out_cache_loc_cpu,
        verify_tree_greedy_cpu,
    ):
        setattr(kernels, kernel.__name__, kernel)
    trees = types.ModuleType("sgl_kernel.speculative")
    trees.reconstruct_indices_from_tree_mask = reconstruct_indices_from_tree_mask  # type: ignore[attr-defined]
    sys.modules["sgl_kernel.speculative"] = trees

    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    plain = TorchNativeAttnBackend.forward_extend

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        if forward_batch.forward_mode.is_target_verify():
            return verify_attention(self, q, k, v, layer, forward_batch)
        return plain(self, q, k, v, layer, forward_batch, save_kv_cache)

    TorchNativeAttnBackend.forward_extend = forward_extend


if __name__ in ("__main__", "__mp_main__"):
    cpu_only.prepare(launch_server.rank_count(sys.argv[1:]))
    put_in_place()
if __name__ == "__main__":
    launch_server.main(sys.argv[1:])
