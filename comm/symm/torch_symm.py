"""Blocks in torch.distributed's symmetric memory, which picks fabric or file handles by itself.

Never run on a device so far. Several ranks on one GPU need TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from moeserve.comm.symm.heap import Blocks, Control, agree


def allocate(nbytes: int, control: Control, device: torch.device) -> Blocks:
    """One zeroed block of nbytes of each rank of control, on the ranks' GPUs.

    Raises HeapUnavailable, on all ranks, where a rank has no GPU or memory, or where torch cannot join them.
    """
    agree(control, _missing())
    from torch._C._distributed_c10d import _SymmetricMemory
    from torch.distributed import _symmetric_memory as symmetric

    problem, handle, own = "", None, torch.empty(0)
    # Members alone call it: the other ranks of the job have no part in this heap.
    group = dist.new_group(list(control.ranks), use_local_synchronization=True)
    try:
        # The allocator itself, not symmetric.empty: that may cut from a pool, and older torch forgets the offset.
        own = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
        own.zero_()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        problem = f"no symmetric memory: {error}"
    agree(control, problem)
    try:
        handle = symmetric.rendezvous(own, group)
    except RuntimeError as error:
        problem = f"torch cannot join the ranks' memory: {error}"
    agree(control, problem)
    assert handle is not None
    kept = [handle, own, group]
    blocks = [handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(control.size)]
    return Blocks(blocks, close=kept.clear)


def _missing() -> str:
    if not torch.cuda.is_available():
        return "torch's symmetric memory needs a GPU, and torch finds none"
    if not dist.is_initialized():
        return "torch's symmetric memory needs the job's process group: call comm.mesh.start first"
    return ""
