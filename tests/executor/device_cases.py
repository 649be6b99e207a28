"""What staging must do on any device; the fake runs it everywhere, CUDA where there is one."""

import torch

from baton.core.handover import BlockRef
from baton.core.ids import BlockId, Epoch
from baton.core.kv_layout import KVLayout, LayerRange
from baton.core.sharded_layout import Rank, ShardedLayout
from baton.executor.device import Device
from baton.executor.kv_cache import KVCache
from baton.executor.staging import Staging
from baton.kv_transfer.plan import TokenRange, plan_between

LAYOUT = KVLayout(layers=4, kv_heads=2, block_size=8, head_dim=16, dtype="bfloat16")


def refs(*blocks: int) -> list[BlockRef]:
    return [BlockRef(BlockId(block), Epoch(0)) for block in blocks]


def pool_on(device: Device, layout: KVLayout, blocks: int) -> KVCache:
    memory = device.allocate(blocks * layout.block_bytes)
    return KVCache(layout, blocks, memory=memory)


def check_copy_out(device: Device) -> None:
    """Whatever layers of whatever blocks: they lie in their pages as in the blocks."""
    kv = pool_on(device, LAYOUT, 9)
    kv.tensor.copy_(torch.randn(kv.tensor.shape))
    host = torch.zeros(6 * LAYOUT.block_bytes, dtype=torch.uint8)
    staging = Staging(kv, host, LAYOUT.block_bytes, offset=0, device=device)
    wanted = torch.zeros(LAYOUT.shape(6), dtype=torch.bfloat16)
    blocks, pages = refs(8, 0, 5, 2), refs(4, 5, 1, 2)
    for layers in (LayerRange(0, 1), LayerRange(1, 3), LayerRange(3, 4), LAYOUT.all_layers):
        staging.copy_out(blocks, layers, pages)
        span = slice(layers.start, layers.end)
        for block, page in zip(blocks, pages, strict=True):
            wanted[page.block, span] = kv.tensor[block.block, span].cpu()
        assert host.equal(wanted.view(-1).view(torch.uint8))
    staging.close()


def check_deposit(device: Device) -> None:
    """Units in a page become KV of the pool's dtype in its blocks, and nothing else changes."""
    target = LAYOUT
    source = KVLayout(4, 2, 16, 16, "float32")
    plan = plan_between(ShardedLayout(source), ShardedLayout(target))
    kv = pool_on(device, target, 9)
    page_bytes = 4 * plan.landing(Rank(), LAYOUT.all_layers).layout.block_bytes
    host = torch.zeros(2 * page_bytes, dtype=torch.uint8)
    staging = Staging(kv, host, page_bytes, offset=4096, device=device)
    assert staging.offset(BlockId(1)) == 4096 + page_bytes
    layers, tokens = LayerRange(1, 3), TokenRange(16, 36)
    conversion = plan.conversion(Rank(), layers, tokens, [BlockId(n) for n in (7, 3, 1)])
    values = torch.randn(conversion.staging.shape(3))
    host[page_bytes:][: values.nbytes] = values.view(-1).view(torch.uint8)
    assert staging.page(BlockId(1))[: values.nbytes] == values.numpy().tobytes()
    staging.deposit(BlockId(1), conversion)
    wanted = torch.zeros(target.shape(9), dtype=torch.bfloat16)
    wanted[[7, 3], 1:3] = values[:2].to(torch.bfloat16)
    wanted[1, 1:3, ..., :4, :] = values[2, ..., :4, :].to(torch.bfloat16)
    assert kv.tensor.cpu().equal(wanted)
    staging.close()
