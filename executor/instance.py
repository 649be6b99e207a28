"""One copy of the model in one role: weights, KV pool, scheduler, engine loop and transport."""

import asyncio
import os
import time
from collections.abc import Callable

from baton.core.compatibility import compatibility_hash
from baton.core.config import EngineConfig, WorkerConfig
from baton.core.errors import InternalError, InvalidConfig
from baton.core.ids import Incarnation, InstanceId, new_incarnation
from baton.core.kv_layout import KVLayout
from baton.core.topology import InstanceInfo, Role
from baton.engine.scheduler import Scheduler
from baton.executor.device import Device
from baton.executor.engine_loop import EngineLoop, Listener
from baton.executor.handover_memory import HandoverMemory
from baton.executor.kv_cache import KVCache, blocks_that_fit, make_layout
from baton.executor.runner import ModelRunner
from baton.kernels.kv_digest import is_native
from baton.kv_transfer.choose import OpenTransport, open_transport
from baton.kv_transfer.transport import Transport
from baton.models.loader import Model, load_model
from baton.models.revision import revision
from baton.models.spec import ModelSpec

Progress = Callable[[str], None]


class Instance:
    """What both roles are made of; made by `load`, ended by `close`. One event loop only."""

    def __init__(
        self,
        config: WorkerConfig,
        model: Model,
        kv: KVCache,
        host: KVCache | None,
        listener: Listener,
        transport: Transport | None,
        memory: HandoverMemory | None,
        facts: "_Facts",
    ) -> None:
        self.config = config
        self.incarnation = facts.incarnation
        self.compatibility = facts.compatibility
        self.layout: KVLayout = kv.layout
        self.kv = kv
        self._facts = facts
        self._executor = model.executor
        self._transport = transport
        self._memory = memory
        host_blocks = host.num_blocks if host is not None else 0
        self._scheduler = Scheduler(config.engine, kv.num_blocks, host_blocks=host_blocks)
        self.engine = EngineLoop(self._scheduler, ModelRunner(model, kv, host), listener)
        self._running = asyncio.create_task(self.engine.run())
        self._running.add_done_callback(self._engine_ended)
        self._closing = False

    @classmethod
    async def load(
        cls,
        config: WorkerConfig,
        listener: Listener,
        on_progress: Progress,
        open_transport: OpenTransport = open_transport,
        device: Device | None = None,
    ) -> "Instance":
        """Load the model and start the engine; raises InvalidConfig for what is not right.

        `device` is where the pool is to lie, if not in host memory.
        """
        started = time.monotonic()
        on_progress(f"loading {config.model_name} from {config.model_dir}")
        model = await asyncio.to_thread(
            load_model,
            config.model_dir,
            dtype=config.engine.dtype,
            threads=config.threads,
            max_length=config.engine.max_model_len,
            executor=_executor(config.engine),
        )
        on_progress(f"executor: {model.executor}")
        layout = make_layout(model.spec, config.engine.block_size, config.engine.kv_stored)
        num_blocks = blocks_that_fit(layout, config.engine.kv_memory_mib)
        memory = None
        if config.role is not Role.MIXED:
            memory = HandoverMemory(config, layout, num_blocks, device)
        kv = KVCache(layout, num_blocks) if memory is None else memory.kv
        host = _host_pool(config, kv)
        on_progress(f"KV pool: {num_blocks} blocks of {config.engine.block_size} tokens")
        facts = await asyncio.to_thread(_Facts, config, model.spec, layout)
        transport = None
        if memory is not None:
            native = await asyncio.to_thread(is_native)  # now, lest the first handover compiles it
            on_progress(f"KV digests: {'native code' if native else 'numpy, slowly'}")
            transport = await open_transport(
                memory.region,
                config.handover,
                host=config.host,
                owner=config.instance_id,
                incarnation=facts.incarnation,
            )
            on_progress(f"transport: {transport!r}")
        facts.load_s = time.monotonic() - started
        try:
            return cls(config, model, kv, host, listener, transport, memory, facts)
        except BaseException:  # the scheduler may refuse its config
            if transport is not None:
                await transport.close()
            if memory is not None:
                memory.close()
            raise

    @property
    def transport(self) -> Transport:
        """The transport; a mixed instance has none, and is never asked for a handover."""
        if self._transport is None:
            raise InvalidConfig("role", str(self.config.role), "prefill or decode, for a handover")
        return self._transport

    @property
    def memory(self) -> HandoverMemory:
        """What handovers read and write; a mixed instance has none."""
        assert self._memory is not None, "a handover in a mixed instance"
        return self._memory

    def info(self, address: str) -> InstanceInfo:
        """Return what the instance says of itself, reached at `address`."""
        config, facts = self.config, self._facts
        return InstanceInfo(
            instance_id=InstanceId(config.instance_id),
            role=config.role,
            address=address,
            incarnation=self.incarnation,
            pid=os.getpid(),
            model=config.model_name,
            compatibility=self.compatibility,
            max_model_len=facts.max_model_len(self.kv),
            kv_tokens=self.kv.num_blocks * self.layout.block_size,
            max_sequences=config.engine.max_sequences,
            load_s=facts.load_s,
        )

    def stats(self) -> dict[str, float | int | str]:
        """Return counters of engine, pool and transport by name."""
        loop = self.engine.stats()
        roster = loop.scheduler.roster
        pool = roster.memory.pool
        counters: dict[str, float | int | str] = {
            "executor": self._executor,
            "steps": loop.steps,
            "busy_s": loop.busy_s,
            "waiting": roster.waiting,
            "running": roster.running,
            "preemptions": roster.preemptions,
            "blocks_swapped_out": roster.memory.swap.copied_out,
            "blocks_swapped_in": roster.memory.swap.copied_in,
            "blocks_free": pool.free,
            "blocks_used": pool.used,
            "blocks_cached": pool.cached,
            "blocks_fencing": pool.fencing,
            "prompt_tokens": roster.memory.prompt_tokens,
            "prompt_tokens_cached": roster.memory.cached_tokens,
        }
        if self._transport is not None:
            transport = self._transport.stats()
            counters["transfers_open"] = transport.transfers_open
            counters["transfers_failed"] = transport.transfers_failed
            counters["transport_fallbacks"] = transport.fallbacks
            for name, count in transport.bytes_read.items():
                counters[f"bytes_read_{name}"] = count
        return counters

    def problems(self) -> list[str]:
        """Return what is beyond its budget, in words; none: healthy."""
        pool = self._scheduler.stats().roster.memory.pool
        budget = self.config.handover.fencing_budget
        if pool.fencing <= budget * pool.total:
            return []
        return [f"{pool.fencing} of {pool.total} blocks wait for a fence (budget {budget:.0%})"]

    def check(self, *, idle: bool) -> None:
        """Assert that the books balance and, if `idle`, that nobody holds a block.

        A step under way keeps the blocks that it writes, whoever has gone away meanwhile.
        """
        self._scheduler.check()
        if idle and not self.engine.in_step:
            pool = self._scheduler.stats().roster.memory.pool
            assert pool.used == pool.fencing == 0, f"blocks leaked: {pool}"
            if self._memory is not None and self._memory.staging is not None:
                self._memory.staging.pool.check(idle=True)

    def _engine_ended(self, task: "asyncio.Task[None]") -> None:
        """Die loudly if the engine loop dies: an instance without it would hang every request."""
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._closing:
            loop = asyncio.get_running_loop()
            loop.call_exception_handler(
                {"message": "the engine loop crashed", "exception": InternalError(repr(error))}
            )
            os._exit(70)

    async def close(self) -> None:
        """End the engine after its step, then the transport. Safe to repeat."""
        if self._closing:
            return
        self._closing = True
        await self.engine.close()
        await self._running
        if self._transport is not None:
            await self._transport.close()
            self._transport.check()
        if self._memory is not None:
            self._memory.close()


class _Facts:
    """What is drawn or computed once, at start."""

    def __init__(self, config: WorkerConfig, spec: ModelSpec, layout: KVLayout) -> None:
        self.incarnation: Incarnation = new_incarnation()
        self.load_s = 0.0
        self.compatibility = compatibility_hash(
            model=config.model_name,
            revision=revision(config.model_dir),
            compute_dtype=config.engine.dtype,
            rope=spec.rope_digest(),
            layout=layout,
        )
        wanted = config.engine.max_model_len
        if wanted is not None and wanted > spec.max_position:
            raise InvalidConfig(
                "max_model_len", wanted, f"up to {spec.max_position}, what the model was made for"
            )
        self._model_len = wanted or spec.max_position

    def max_model_len(self, kv: KVCache) -> int:
        """Return the tokens that one sequence may have: model and pool must both have room."""
        return min(self._model_len, kv.num_blocks * kv.layout.block_size)


def _executor(config: EngineConfig) -> str:
    """Return who is to compute.

    Raises InvalidConfig if that cannot keep KV so, or cannot be batch invariant and must be.
    """
    executor = config.executor
    if config.kv_stored != config.dtype:
        if executor == "native":
            allowed = f"{config.dtype}, in which the native executor computes"
            raise InvalidConfig("kv_dtype", config.kv_dtype, allowed)
        executor = "torch"
    if not config.batch_invariant:
        return executor
    if executor == "torch":
        raise InvalidConfig("batch_invariant", "true", "false with the executor torch")
    return "native"


def _host_pool(config: WorkerConfig, kv: KVCache) -> KVCache | None:
    """Return the pool for preempted sequences, if the config wants one."""
    memory_mib = config.engine.host_memory_mib
    if memory_mib == 0:
        return None
    blocks = blocks_that_fit(kv.layout, memory_mib, "host_memory_mib")
    return KVCache(kv.layout, blocks, pinned=kv.tensor.is_cuda)
