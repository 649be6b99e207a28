"""The driver by which a process opens another's pool, and memory for a pool that can be opened."""

import torch
from torch import Tensor

from baton.kv_transfer.device_driver import DeviceDriver


class PoolMemory:
    """Memory for a pool, and the driver that exports it."""

    def __init__(self, device: torch.device, size: int) -> None:
        """Take `size` zeroed bytes: of the GPU, or elsewhere of what stands for one in tests."""
        self.driver: DeviceDriver
        self.bytes: Tensor
        self._owner: object = None
        if device.type == "cuda":
            from baton.kernels.run_copy import gpu_run_copier
            from baton.kv_transfer.cuda_ipc.libcuda import CudaDriver, load

            index = torch.cuda.current_device()
            self.driver = CudaDriver(index, load(), gpu_run_copier(index))
            self.bytes = torch.zeros(size, dtype=torch.uint8, device=device)
            return
        from baton.kv_transfer.cuda_ipc.late_driver import LateDriver

        late = LateDriver()
        self._owner = late.allocate(size)
        self.driver = late
        self.bytes = torch.frombuffer(self._owner.buffer, dtype=torch.uint8)

    def __repr__(self) -> str:
        return f"<PoolMemory of {self.bytes.nbytes} bytes, {self.driver}>"

    def export(self) -> bytes:
        """Return the handle by which another process can open the memory."""
        return self.driver.export(self.bytes.data_ptr(), self.bytes.nbytes)
