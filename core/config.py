"""One frozen config per component; a bad value is refused at start with field, value and range."""

import secrets
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_serializer

from baton.core.errors import InvalidConfig
from baton.core.topology import Role


class Config(BaseModel):
    """The base: frozen, no unknown fields, docstrings under the fields are their descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def checked(cls, /, **values: Any) -> Self:
        """Build it from `values`; a bad one raises InvalidConfig that names it."""
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or cls.__name__
            value, allowed = first["input"], first["msg"].removeprefix("Value error, ")
            if first["type"] == "missing":
                value, allowed = None, "a value: it is required"
            elif first["type"] == "extra_forbidden":
                allowed = "nothing: there is no such field"
            raise InvalidConfig(field, value, allowed) from None


KVDtype = Literal["float32", "bfloat16"]
"""What KV may be kept as."""
ToolParser = Literal["auto", "hermes", "llama3_json", "mistral"]
"""How a model writes tool calls."""


class EngineConfig(Config):
    """What one engine computes with, and its limits."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model and its KV are; auto is a GPU if there is one that can do what is asked."""
    executor: Literal["auto", "native", "torch"] = "auto"
    """Who computes on the CPU: native code compiled here, or torch; auto is native if it can."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What linear layers and attention multiply in; both sides of a handover must have the same.
    bfloat16 takes half the memory and on processors with AMX a fraction of the time, and its
    tokens may differ from those of float32; weights in bfloat16 are exact in either."""
    batch_invariant: bool = False
    """Refuse to start unless a request's logits are bitwise the same whatever it is batched with
    and however its prompt is cut. The native executor always computes so; torch never does."""
    block_size: Literal[8, 16, 32] = 16
    """Tokens per KV block."""
    kv_dtype: KVDtype | None = None
    """What KV is kept as, if not as the model computes; anything else takes the executor torch.
    bfloat16 takes half the memory. Prefill and decode may differ."""
    kv_memory_mib: int | None = Field(default=None, ge=1, le=1 << 20)
    """Memory of the KV pool per rank, in MiB; by default 256 on a CPU, and on a GPU all that
    `gpu_memory_utilization` leaves."""
    max_batch_tokens: int = Field(default=512, ge=16, le=1 << 17)
    """Token budget of one step: decodes first, the rest for prefill chunks."""
    max_sequences: int = Field(default=64, ge=1, le=4096)
    """Sequences in one step at most."""
    max_waiting: int = Field(default=256, ge=1, le=1 << 16)
    """Sequences that may wait for the engine; more are refused as overloaded."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Prompt and output together, in tokens; by default what the model was made for."""
    policy: Literal["fcfs", "priority", "sjf"] = "fcfs"
    """Who is served first: by arrival, by the request's priority, or by predicted length."""
    max_overtakes: int = Field(default=256, ge=1, le=1 << 20)
    """Later arrivals that may go before a request: in all with sjf, per level with priority."""
    host_memory_mib: int = Field(default=0, ge=0, le=1 << 22)
    """Host memory for the KV of preempted sequences, in MiB; with 0 it is computed again."""
    swap_block_cost: float = Field(default=2.0, gt=0)
    """Copying one block to or from the host takes as long as computing so many prompt tokens.
    A preempted sequence goes to the host if that, both ways, is cheaper than computing it again."""
    prefix_cache: bool = True
    """Keep the KV of ended sequences, and begin prompts where the longest known prefix ends."""
    run_ahead: bool | None = None
    """Plan each step while the last one runs, before its tokens are known; by default on a GPU.
    Tokens are the same, but a sequence that stops takes part in one more step for nothing."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory for the weights, the largest step and the KV pool together."""
    cuda_graph_sizes: tuple[Annotated[int, Field(ge=1, le=4096)], ...] | None = None
    """Batch sizes for which a step of decodes is captured at start, smaller batches being padded;
    by default 1, 2, 4, then multiples of 8 and from 256 on of 32, up to `max_sequences`. Without
    any, or beyond the largest, kernels are launched one by one."""
    cuda_graph_tokens: tuple[Annotated[int, Field(ge=1, le=1 << 17)], ...] | None = None
    """Numbers of tokens for which all but attention of a step with chunks of prompts is captured at
    start, smaller steps being padded; by default 64, 128, 192, 256, then multiples of 128 up to
    1024, as far as `max_batch_tokens` goes. Without any, or beyond the largest, kernels are
    launched one by one: from about there on a GPU computes longer than launching takes."""
    attention_skip_below: float = Field(default=0.0, ge=0, lt=1)
    """In prompts' attention by Triton's kernel, leave out keys whose share is less than this of the
    likeliest key's; 0 leaves out none. Of a token that sees n keys, at most e = n times this of the
    weight is left out, and its attention is off by at most 2 e times the largest value."""
    prefix_hash: Literal["xxh3_128", "sha256"] = "xxh3_128"
    """Names prefixes in the cache. sha256 is slower, and safe from users who look for collisions
    with the prompts of others."""

    @property
    def kv_mib_on_host(self) -> int:
        """Memory of the KV pool per rank in MiB, where that is in host memory."""
        return 256 if self.kv_memory_mib is None else self.kv_memory_mib


class ParallelConfig(Config):
    """Over how many ranks, each a process, one instance is spread; and when one of them is lost."""

    tp: int = Field(default=1, ge=1, le=256)
    """Ranks over which heads, columns and rows of matrices, and the vocabulary are split."""
    pp: int = Field(default=1, ge=1, le=256)
    """Stages of consecutive layers."""
    dp: int = Field(default=1, ge=1, le=256)
    """Copies of the model, experts and all, over which the sequences are spread."""
    ep: int = Field(default=1, ge=1, le=256)
    """Places over which each copy's experts are spread, and with them its sequences."""
    cp: int = Field(default=1, ge=1, le=256)
    """Ranks over which the tokens of a long prompt are spread."""
    join_timeout_s: float = Field(default=120.0, gt=0)
    """For all ranks to be there, and for any one to load its share."""
    silence_s: float = Field(default=6.0, ge=2)
    """A rank not heard of for so long is lost, and the instance with it."""
    step_timeout_s: float = Field(default=60.0, gt=0)
    """So is a rank that a step has to wait for for so long."""
    expert_balance_steps: int = Field(default=64, ge=0, le=1 << 20)
    """Every so many steps the experts of one more layer move to where its measured loads want them,
    if that is worth it; 0: never."""
    spare_experts: int = Field(default=0, ge=0, le=1 << 10)
    """Room for experts at each place along ep beyond an equal share: for copies of the busiest."""
    int8_reduce_kib: int | None = Field(default=None, ge=1, le=1 << 20)
    """Sums along tp of so many KiB or more travel as int8 with a scale per block: for links below
    about 1 GB/s. Tokens may then differ from those of one rank."""

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.pp * self.places * self.cp * self.tp

    @property
    def places(self) -> int:
        """Over how many places the sequences are spread: the KV of each is at one of them."""
        return self.dp * self.ep

    @property
    def stage_size(self) -> int:
        """How many ranks a stage has; they talk most, and belong on one node."""
        return self.size // self.pp


class LeaderRef(Config):
    """Where a rank finds the leader of its instance."""

    host: str
    """Of its control connections."""
    port: int = Field(ge=1, le=65535)
    """Of its control connections."""
    incarnation: int
    """Of the instance; another one is not joined."""


class HandoverConfig(Config):
    """How prompts are handed over; times are in seconds."""

    accept_timeout_s: float = Field(default=10.0, gt=0)
    """From Open to Accepted."""
    offer_timeout_s: float = Field(default=120.0, gt=0)
    """From Accepted, or from one offer, to the next: queueing and computing in prefill."""
    read_timeout_s: float = Field(default=10.0, gt=0)
    """For the reads of one offer, once posted."""
    room_timeout_s: float = Field(default=120.0, gt=0)
    """Waiting for room in decode's pool."""
    received_timeout_s: float = Field(default=300.0, gt=0)
    """How long prefill keeps offered KV for a stream that says nothing; over all waits above."""
    local_prefill: Literal["auto", "fallback"] = "auto"
    """When a decode instance computes a prompt itself: where that is cheaper by what was measured,
    or only if no prefill instance can."""
    disturbance_weight: float = Field(default=4.0, ge=0)
    """How much dearer a second is by which streams are held up than one that a prompt waits: for
    the choice of where a prompt is computed."""
    min_read_kib: int = Field(default=256, ge=0, le=1 << 20)
    """KV in one offer at least, in KiB, where a chunk is offered in groups of layers."""
    offer_cost_s: float = Field(default=0.0005, ge=0)
    """What one more offer costs both sides, whatever its size. Groups of layers are made so large
    that reading one takes at least as long, by the bandwidth that was measured."""
    fencing_budget: float = Field(default=0.1, gt=0, le=1)
    """Share of the pool that may wait for reads to end before health turns bad."""
    unread_budget_s: float = Field(default=60.0, gt=0)
    """How long offered KV may go unread before prefill's health turns bad."""
    stall_budget_s: float = Field(default=15.0, gt=0)
    """How long reads may be under way before decode's health turns bad."""
    staging_mib: int = Field(default=64, ge=0, le=1 << 20)
    """Host memory per rank, in MiB, through which KV passes that cannot be read in place: in decode
    what prefill has in another dtype (with 0 such peers are refused), and on both sides the KV of a
    pool on a device. There, prefill must have room for every prompt that is being handed over."""
    transport: Literal["auto", "ucx", "shm", "tcp"] = "auto"
    """What moves KV; auto takes, for each pair of instances, the first of shm (on one host), ucx
    (where it has RDMA) and tcp that both have and that works between them."""
    backup: Literal["off", "peer"] = "off"
    """Whether decode instances copy the KV of what they decode to one another's prefix caches, so
    that a request whose instance is lost goes on without computing its whole context anew."""
    backup_every_blocks: int = Field(default=8, ge=1, le=1 << 16)
    """A sequence is backed up again when it has so many full blocks more; as many are computed
    anew at most, besides those that waited for their turn."""
    backup_round_blocks: int = Field(default=32, ge=1, le=1 << 12)
    """Blocks that are copied at a time at most; one instance copies one such portion at a time."""
    backup_mib_per_s: float = Field(default=256.0, gt=0)
    """How fast one instance copies at most."""
    secret: SecretStr = SecretStr("")
    """Known to all instances of the cluster and to nobody else, at least 16 bytes; shm and tcp let
    only those read who prove that they know it, and are not there without."""
    ucx_options: dict[str, str] = Field(default_factory=dict)
    """UCX settings without their UCX_ prefix, such as {"TLS": "tcp,self"}."""

    @field_serializer("secret", when_used="json")
    def _reveal(self, secret: SecretStr) -> str:
        """A config is sent as JSON to the process that it is for, and shown nowhere as such."""
        return secret.get_secret_value()

    def with_secret(self) -> Self:
        """Return this config, with a random secret if it has none."""
        if self.secret.get_secret_value():
            return self
        return self.model_copy(update={"secret": SecretStr(secrets.token_hex(32))})


class TlsConfig(Config):
    """What a server shows, and whom it asks; PEM files, read again when they change."""

    cert: Path
    """Its certificate, and those between that and its authority's."""
    key: Path
    """The private key to it."""
    client_ca: Path | None = None
    """Clients must show a certificate of this authority; None: they need none."""


class ClusterTlsConfig(Config):
    """Mutual TLS between Baton's own processes; PEM files, on every node.

    The authority must sign for these processes alone: whoever has a certificate of it is one.
    """

    cert: Path
    """Shown by each process, as a server and as a client."""
    key: Path
    """The private key to it."""
    ca: Path
    """The authority of all of them."""
    name: str = Field(default="baton-cluster", min_length=1)
    """The DNS name in their certificates, whatever address they are reached at."""

    @property
    def server(self) -> TlsConfig:
        """What a process shows and asks as a server."""
        return TlsConfig(cert=self.cert, key=self.key, client_ca=self.ca)


class EdgeLimits(Config):
    """What one client may ask of the gateway's sockets."""

    max_body_bytes: int = Field(default=4 << 20, ge=1 << 10, le=1 << 30)
    """Of one HTTP request's body, or of one gRPC message."""
    max_header_bytes: int = Field(default=32 << 10, ge=1 << 10, le=1 << 20)
    """Of one request's headers, or of one call's metadata."""
    header_timeout_s: float = Field(default=10.0, gt=0)
    """For all headers to arrive, and before them for TLS's handshake; for gRPC, for a connection to
    be set up."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """For the whole body, or the one request of a gRPC call, to arrive."""
    reader_timeout_s: float = Field(default=30.0, gt=0)
    """A client that takes nothing of what waits for it for so long is cut off."""
    max_connections: int = Field(default=4096, ge=1, le=1 << 20)
    """At once, of each API. The next are closed; by the HTTP API they are told 503."""
    streams_per_connection: int = Field(default=1024, ge=1, le=1 << 20)
    """gRPC calls on one connection at once; the client keeps more to itself. HTTP/1.1 has one."""


class WorkerConfig(Config):
    """One instance."""

    instance_id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Unique in the cluster, such as `decode-0`."""
    role: Role
    """prefill, decode or mixed."""
    model_dir: Path
    """A Hugging Face checkpoint folder."""
    model_name: str = Field(min_length=1)
    """The name by which users ask for it."""
    host: str = "127.0.0.1"
    """Address to listen on and to be reached at."""
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free one."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads per rank for the model."""
    parallel: ParallelConfig = ParallelConfig()
    """The ranks of the instance."""
    rank: int = Field(default=0, ge=0)
    """Which of them this process is; 0 leads."""
    leader: LeaderRef | None = None
    """Where the leader is; for all ranks but the leader."""
    engine: EngineConfig = EngineConfig()
    """Limits of the engine."""
    handover: HandoverConfig = HandoverConfig()
    """Deadlines and transport of the handover."""
    tls: ClusterTlsConfig | None = None
    """For gRPC between Baton's processes; None: without TLS."""


class GatewayConfig(Config):
    """The front door."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    http_port: int = Field(default=8000, ge=0, le=65535)
    """OpenAI-compatible HTTP API; 0 takes a free one."""
    grpc_port: int = Field(default=8001, ge=0, le=65535)
    """gRPC API; 0 takes a free one."""
    max_open_requests: int = Field(default=256, ge=1, le=1 << 16)
    """Requests at instances at once, of each model; more wait here, as those do that instances have
    no room for."""
    max_queued_requests: int = Field(default=1024, ge=0, le=1 << 16)
    """Requests that may wait here, of each model; more are refused with 429."""
    queue_timeout_s: float = Field(default=60.0, gt=0)
    """For a request's turn to come, if its tenant's SLO or its own deadline is not earlier."""
    decode_fill: float = Field(default=1.25, gt=0, le=16)
    """Requests sent to a decode instance, as a multiple of the sequences that it runs at once."""
    prefill_ahead_s: float = Field(default=1.0, ge=0, le=600)
    """Seconds of work, as measured, that may wait at a prefill instance; the rest waits here."""
    request_timeout_s: float = Field(default=600.0, gt=0)
    """From arrival to the last token."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    """For the stream to a decode instance."""
    max_migrations: int = Field(default=3, ge=0, le=64)
    """Decode instances that a request may lose, each time going on at the next token on another."""
    migration_wait_s: float = Field(default=60.0, gt=0)
    """For a decode instance to take over a request whose own is gone, if there is none at once."""
    lease_s: float = Field(default=3.0, ge=1, le=60)
    """An instance that does not answer for so long is given up, and gives itself up if nobody else
    renews its lease."""
    index_blocks: int = Field(default=1 << 21, ge=1 << 10, le=1 << 28)
    """KV blocks, of all instances together, of which it is known who has them: 21 bytes each. With
    several models each has an equal share."""
    sse_keep_alive_s: float = Field(default=15.0, gt=0)
    """A stream that has been silent for so long sends a comment, so that no proxy cuts it off."""
    tool_parser: ToolParser = "auto"
    """How models write tool calls; auto goes by each one's chat template."""
    traces_kept: int = Field(default=1024, ge=1, le=1 << 20)
    """Traces of ended requests that can be asked for."""
    api_keys: Path | None = None
    """A file of tenants and hashed API keys (see api/key_file.py), read again when it changes;
    None: everybody may call, and is the anonymous tenant."""
    open_metrics: bool = False
    """Show /metrics without a key too; with keys it needs one that is `admin` otherwise."""
    tls: TlsConfig | None = None
    """For both APIs; None: without TLS."""
    limits: EdgeLimits = EdgeLimits()
    """What one client may ask of the sockets."""
    otlp_endpoint: str = Field(default="", pattern=r"^(https?://[^/\s]+)?$")
    """http://host:port of an OpenTelemetry collector, to which spans are sent; empty: none are."""


class ModelFolder(Config):
    """A model to serve, and its names."""

    dir: Path
    """A Hugging Face checkpoint folder."""
    name: str = Field(min_length=1)
    """The name by which users ask for it."""
    aliases: tuple[str, ...] = ()
    """Other names by which they may."""


class ClusterConfig(Config):
    """What `baton serve` starts."""

    model_dir: Path
    """A Hugging Face checkpoint folder."""
    model_name: str = Field(min_length=1)
    """The name by which users ask for it."""
    aliases: tuple[str, ...] = ()
    """Other names by which they may."""
    beside: tuple[ModelFolder, ...] = ()
    """Further models, each with as many instances of its own, and with the same settings."""
    prefill: int = Field(default=1, ge=0, le=1024)
    """Prefill instances of each model; with 0, decode instances compute prompts themselves."""
    decode: int = Field(default=1, ge=1, le=1024)
    """Decode instances of each model."""
    host: str = "127.0.0.1"
    """Address of Ray's head and of every instance."""
    prefill_parallel: ParallelConfig = ParallelConfig()
    """Over how many ranks each prefill instance is spread."""
    decode_parallel: ParallelConfig = ParallelConfig()
    """Over how many ranks each decode instance is spread."""
    prefill_kv_dtype: KVDtype | None = None
    """What prefill instances keep KV as, if not as `engine` says; see EngineConfig.kv_dtype."""
    decode_kv_dtype: KVDtype | None = None
    """What decode instances keep KV as, if not as `engine` says; it is converted on the way."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads per rank."""
    start_timeout_s: float = Field(default=180.0, gt=0)
    """For every instance to become ready."""
    engine: EngineConfig = EngineConfig()
    """Limits of each engine."""
    handover: HandoverConfig = HandoverConfig()
    """Deadlines and transport of the handover."""
    gateway: GatewayConfig = GatewayConfig()
    """The front door."""
    tls: ClusterTlsConfig | None = None
    """For gRPC between Baton's processes, the gateway included; None: without TLS."""

    @property
    def models(self) -> tuple[ModelFolder, ...]:
        """All models."""
        first = ModelFolder(dir=self.model_dir, name=self.model_name, aliases=self.aliases)
        return first, *self.beside

    def engine_of(self, role: Role) -> EngineConfig:
        """Return the engine's config on instances of a role."""
        own = self.prefill_kv_dtype if role is Role.PREFILL else self.decode_kv_dtype
        return self.engine if own is None else self.engine.model_copy(update={"kv_dtype": own})
