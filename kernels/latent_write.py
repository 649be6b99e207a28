"""Norms and turns latents, writes them to the paged pool, and turns the queries to them."""

from torch import Tensor

from baton.kernels.backend import triton_serves
from baton.kernels.kv_pool import PagedLayer
from baton.kernels.rms_norm import rms_norm
from baton.kernels.rope import RopeTables, rope_by_tables_
from baton.kernels.rope_kv_write import write_paged


def latent_write_(
    latent: Tensor,
    q: Tensor,
    layer: PagedLayer,
    slots: Tensor,
    angles: RopeTables,
    weight: Tensor,
    eps: float,
) -> None:
    """Write [latent, normed | turned] to a layer of the pool; turn the queries in place.

    `latent` is [tokens, rank + turned] with `weight` [rank] of its norm, q [tokens, heads, nope +
    turned]; `slots` [tokens] int64 as in rope_kv_write.py. What `latent` holds afterwards is not
    said.
    """
    rank = weight.shape[0]
    if triton_serves(latent):
        from baton.kernels.triton import latent_write

        latent_write.latent_write_(
            latent, q, layer.values, slots, angles.cos, angles.sin, weight, eps, layer.scales
        )
        return
    latent[:, :rank] = rms_norm(latent[:, :rank], weight, eps)
    rope_by_tables_(latent[:, None, rank:], angles)
    rope_by_tables_(q[..., q.shape[2] - (latent.shape[1] - rank) :], angles)
    write_paged(layer, slots, latent[:, None, None])
