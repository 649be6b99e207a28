"""A process whose memory the transport tests read: prints its metadata, lives until stdin closes.

Its argument is JSON: {"owner", "size" in bytes, "seed", "options" of UCX}.
"""

import asyncio
import json
import sys

import numpy as np

from baton.core.ids import new_incarnation
from baton.kv_transfer.transport import Region
from baton.kv_transfer.ucx.config import UcxConfig
from baton.kv_transfer.ucx.transport import UcxTransport


def pattern(seed: int, size: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """Return `size` bytes that follow from `seed` and are never 0."""
    return np.random.default_rng(seed).integers(1, 256, size, dtype=np.uint8)


async def main() -> None:
    """Serve until stdin closes."""
    wish = json.loads(sys.argv[1])
    memory = pattern(wish["seed"], wish["size"])
    transport = await UcxTransport.open(
        Region(memory.ctypes.data, memory.nbytes, memory),
        owner=wish["owner"],
        incarnation=new_incarnation(),
        config=UcxConfig(options=wish["options"]),
    )
    print(transport.metadata().hex(), flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.read)
    await transport.close()
    transport.check()


if __name__ == "__main__":
    asyncio.run(main())
