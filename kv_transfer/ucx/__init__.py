"""UCX: RDMA, CUDA IPC, shared memory or TCP, whichever is the fastest that both sides have."""
