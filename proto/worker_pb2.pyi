from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DrainRequest(_message.Message):
    __slots__ = ("deadline_s",)
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    deadline_s: float
    def __init__(self, deadline_s: _Optional[float] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("handed_over",)
    HANDED_OVER_FIELD_NUMBER: _ClassVar[int]
    handed_over: int
    def __init__(self, handed_over: _Optional[int] = ...) -> None: ...

class BackupRequest(_message.Message):
    __slots__ = ("open", "offer")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    open: Open
    offer: Offer
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ...) -> None: ...

class BackupReply(_message.Message):
    __slots__ = ("cached_blocks",)
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    cached_blocks: int
    def __init__(self, cached_blocks: _Optional[int] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("request_id", "prompt", "max_tokens", "temperature", "top_k", "top_p", "seed", "stop_token_ids", "tenant", "priority", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "bad_words", "min_tokens", "logprobs", "resumed", "grammar", "traceparent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    TYPICAL_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    tenant: str
    priority: int
    min_p: float
    typical_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.RepeatedCompositeFieldContainer[LogitBias]
    bad_words: _containers.RepeatedCompositeFieldContainer[TokenSequence]
    min_tokens: int
    logprobs: int
    resumed: int
    grammar: Grammar
    traceparent: str
    def __init__(self, request_id: _Optional[str] = ..., prompt: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., tenant: _Optional[str] = ..., priority: _Optional[int] = ..., min_p: _Optional[float] = ..., typical_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Iterable[_Union[LogitBias, _Mapping]]] = ..., bad_words: _Optional[_Iterable[_Union[TokenSequence, _Mapping]]] = ..., min_tokens: _Optional[int] = ..., logprobs: _Optional[int] = ..., resumed: _Optional[int] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("kind", "source")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    source: str
    def __init__(self, kind: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class LogitBias(_message.Message):
    __slots__ = ("token", "bias")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    token: int
    bias: float
    def __init__(self, token: _Optional[int] = ..., bias: _Optional[float] = ...) -> None: ...

class TokenSequence(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("logprob", "top_tokens", "top_logprobs")
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprob: float
    top_tokens: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprob: _Optional[float] = ..., top_tokens: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class InstanceRef(_message.Message):
    __slots__ = ("instance_id", "address", "incarnation")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    address: str
    incarnation: int
    def __init__(self, instance_id: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class GatewayFrame(_message.Message):
    __slots__ = ("submit", "cancel")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    cancel: Cancel
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("key", "request", "prefill", "timeout_s", "backup")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    BACKUP_FIELD_NUMBER: _ClassVar[int]
    key: int
    request: Request
    prefill: _containers.RepeatedCompositeFieldContainer[InstanceRef]
    timeout_s: float
    backup: InstanceRef
    def __init__(self, key: _Optional[int] = ..., request: _Optional[_Union[Request, _Mapping]] = ..., prefill: _Optional[_Iterable[_Union[InstanceRef, _Mapping]]] = ..., timeout_s: _Optional[float] = ..., backup: _Optional[_Union[InstanceRef, _Mapping]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: int
    def __init__(self, key: _Optional[int] = ...) -> None: ...

class DecodeFrame(_message.Message):
    __slots__ = ("hello", "updates")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    updates: _containers.RepeatedCompositeFieldContainer[Update]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., updates: _Optional[_Iterable[_Union[Update, _Mapping]]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("instance_id", "incarnation")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: int
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("key", "tokens", "finish", "cached_tokens", "backed_up_tokens", "first_token", "logprobs")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BACKED_UP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    key: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    finish: Finish
    cached_tokens: int
    backed_up_tokens: int
    first_token: DecodeSpans
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    def __init__(self, key: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ..., cached_tokens: _Optional[int] = ..., backed_up_tokens: _Optional[int] = ..., first_token: _Optional[_Union[DecodeSpans, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ...) -> None: ...

class DecodeSpans(_message.Message):
    __slots__ = ("decide_s", "failed_handovers_s", "handshake_s", "prefill_network_s", "prefill_queue_s", "prefill_compute_s", "prefill_offer_s", "room_s", "connect_s", "transfer_s", "local_queue_s", "local_compute_s", "admit_s", "outbox_s")
    DECIDE_S_FIELD_NUMBER: _ClassVar[int]
    FAILED_HANDOVERS_S_FIELD_NUMBER: _ClassVar[int]
    HANDSHAKE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_NETWORK_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_OFFER_S_FIELD_NUMBER: _ClassVar[int]
    ROOM_S_FIELD_NUMBER: _ClassVar[int]
    CONNECT_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    LOCAL_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    LOCAL_COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    ADMIT_S_FIELD_NUMBER: _ClassVar[int]
    OUTBOX_S_FIELD_NUMBER: _ClassVar[int]
    decide_s: float
    failed_handovers_s: float
    handshake_s: float
    prefill_network_s: float
    prefill_queue_s: float
    prefill_compute_s: float
    prefill_offer_s: float
    room_s: float
    connect_s: float
    transfer_s: float
    local_queue_s: float
    local_compute_s: float
    admit_s: float
    outbox_s: float
    def __init__(self, decide_s: _Optional[float] = ..., failed_handovers_s: _Optional[float] = ..., handshake_s: _Optional[float] = ..., prefill_network_s: _Optional[float] = ..., prefill_queue_s: _Optional[float] = ..., prefill_compute_s: _Optional[float] = ..., prefill_offer_s: _Optional[float] = ..., room_s: _Optional[float] = ..., connect_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., local_queue_s: _Optional[float] = ..., local_compute_s: _Optional[float] = ..., admit_s: _Optional[float] = ..., outbox_s: _Optional[float] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("reason", "error", "local_prefill", "handovers")
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_FIELD_NUMBER: _ClassVar[int]
    HANDOVERS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    error: Error
    local_prefill: bool
    handovers: _containers.RepeatedCompositeFieldContainer[HandoverTrace]
    def __init__(self, reason: _Optional[str] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., local_prefill: _Optional[bool] = ..., handovers: _Optional[_Iterable[_Union[HandoverTrace, _Mapping]]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "retry_after_s")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    retry_after_s: float
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class HandoverTrace(_message.Message):
    __slots__ = ("prefill_instance", "attempt", "outcome", "handshake_s", "queue_s", "compute_s", "allocation_wait_s", "transfer_s", "exposed_s", "admission_wait_s", "chunks", "blocks", "bytes", "transport", "cached_tokens", "blocks_saved", "offered_s", "chunk_s", "offers", "ranks")
    PREFILL_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    HANDSHAKE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    ALLOCATION_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_SAVED_FIELD_NUMBER: _ClassVar[int]
    OFFERED_S_FIELD_NUMBER: _ClassVar[int]
    CHUNK_S_FIELD_NUMBER: _ClassVar[int]
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    prefill_instance: str
    attempt: int
    outcome: str
    handshake_s: float
    queue_s: float
    compute_s: float
    allocation_wait_s: float
    transfer_s: float
    exposed_s: float
    admission_wait_s: float
    chunks: int
    blocks: int
    bytes: int
    transport: str
    cached_tokens: int
    blocks_saved: int
    offered_s: float
    chunk_s: _containers.RepeatedScalarFieldContainer[float]
    offers: _containers.RepeatedCompositeFieldContainer[OfferTrace]
    ranks: _containers.RepeatedCompositeFieldContainer[RankTrace]
    def __init__(self, prefill_instance: _Optional[str] = ..., attempt: _Optional[int] = ..., outcome: _Optional[str] = ..., handshake_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., allocation_wait_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., exposed_s: _Optional[float] = ..., admission_wait_s: _Optional[float] = ..., chunks: _Optional[int] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., transport: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., blocks_saved: _Optional[int] = ..., offered_s: _Optional[float] = ..., chunk_s: _Optional[_Iterable[float]] = ..., offers: _Optional[_Iterable[_Union[OfferTrace, _Mapping]]] = ..., ranks: _Optional[_Iterable[_Union[RankTrace, _Mapping]]] = ...) -> None: ...

class OfferTrace(_message.Message):
    __slots__ = ("layer_start", "layer_end", "first_block", "blocks", "offered_s", "read_s", "done_s", "bytes")
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    OFFERED_S_FIELD_NUMBER: _ClassVar[int]
    READ_S_FIELD_NUMBER: _ClassVar[int]
    DONE_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    layer_start: int
    layer_end: int
    first_block: int
    blocks: int
    offered_s: float
    read_s: float
    done_s: float
    bytes: int
    def __init__(self, layer_start: _Optional[int] = ..., layer_end: _Optional[int] = ..., first_block: _Optional[int] = ..., blocks: _Optional[int] = ..., offered_s: _Optional[float] = ..., read_s: _Optional[float] = ..., done_s: _Optional[float] = ..., bytes: _Optional[int] = ...) -> None: ...

class RankTrace(_message.Message):
    __slots__ = ("rank", "bytes", "begin_s", "end_s", "busy_s")
    RANK_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BEGIN_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    rank: int
    bytes: int
    begin_s: float
    end_s: float
    busy_s: float
    def __init__(self, rank: _Optional[int] = ..., bytes: _Optional[int] = ..., begin_s: _Optional[float] = ..., end_s: _Optional[float] = ..., busy_s: _Optional[float] = ...) -> None: ...

class ToPrefill(_message.Message):
    __slots__ = ("open", "received", "abort", "offer")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    open: Open
    received: Received
    abort: Abort
    offer: Offer
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., received: _Optional[_Union[Received, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ...) -> None: ...

class ToDecode(_message.Message):
    __slots__ = ("accepted", "offer", "refused", "want", "pulled")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    PULLED_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    offer: Offer
    refused: Refused
    want: Want
    pulled: Pulled
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ..., want: _Optional[_Union[Want, _Mapping]] = ..., pulled: _Optional[_Union[Pulled, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("version", "compatibility", "decode_instance", "decode_incarnation", "ticket", "attempt", "request", "bytes_per_s", "layout", "cached_blocks", "transports", "place_blocks", "device_ways")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    COMPATIBILITY_FIELD_NUMBER: _ClassVar[int]
    DECODE_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    DECODE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    PLACE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_WAYS_FIELD_NUMBER: _ClassVar[int]
    version: int
    compatibility: str
    decode_instance: str
    decode_incarnation: int
    ticket: bytes
    attempt: int
    request: Request
    bytes_per_s: float
    layout: ShardedLayout
    cached_blocks: int
    transports: _containers.RepeatedScalarFieldContainer[bytes]
    place_blocks: int
    device_ways: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[int] = ..., compatibility: _Optional[str] = ..., decode_instance: _Optional[str] = ..., decode_incarnation: _Optional[int] = ..., ticket: _Optional[bytes] = ..., attempt: _Optional[int] = ..., request: _Optional[_Union[Request, _Mapping]] = ..., bytes_per_s: _Optional[float] = ..., layout: _Optional[_Union[ShardedLayout, _Mapping]] = ..., cached_blocks: _Optional[int] = ..., transports: _Optional[_Iterable[bytes]] = ..., place_blocks: _Optional[int] = ..., device_ways: _Optional[_Iterable[str]] = ...) -> None: ...

class ShardedLayout(_message.Message):
    __slots__ = ("layers", "kv_heads", "block_size", "head_dim", "dtype", "parts", "tp", "stages")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    block_size: int
    head_dim: int
    dtype: str
    parts: int
    tp: int
    stages: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., block_size: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., parts: _Optional[int] = ..., tp: _Optional[int] = ..., stages: _Optional[_Iterable[int]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("incarnation", "transports", "layout", "place_blocks", "direct")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    PLACE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DIRECT_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    transports: _containers.RepeatedScalarFieldContainer[bytes]
    layout: ShardedLayout
    place_blocks: int
    direct: bool
    def __init__(self, incarnation: _Optional[int] = ..., transports: _Optional[_Iterable[bytes]] = ..., layout: _Optional[_Union[ShardedLayout, _Mapping]] = ..., place_blocks: _Optional[int] = ..., direct: _Optional[bool] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("attempt", "index", "layer_start", "layer_end", "first_block", "blocks", "first")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LAYER_START_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    index: int
    layer_start: int
    layer_end: int
    first_block: int
    blocks: _containers.RepeatedCompositeFieldContainer[OfferedBlock]
    first: FirstToken
    def __init__(self, attempt: _Optional[int] = ..., index: _Optional[int] = ..., layer_start: _Optional[int] = ..., layer_end: _Optional[int] = ..., first_block: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[OfferedBlock, _Mapping]]] = ..., first: _Optional[_Union[FirstToken, _Mapping]] = ...) -> None: ...

class OfferedBlock(_message.Message):
    __slots__ = ("block", "epoch", "digest")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    block: int
    epoch: int
    digest: bytes
    def __init__(self, block: _Optional[int] = ..., epoch: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class FirstToken(_message.Message):
    __slots__ = ("token", "queue_s", "compute_s", "chunks", "cached_tokens", "offer_s", "chunk_s", "logprobs")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OFFER_S_FIELD_NUMBER: _ClassVar[int]
    CHUNK_S_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token: int
    queue_s: float
    compute_s: float
    chunks: int
    cached_tokens: int
    offer_s: float
    chunk_s: _containers.RepeatedScalarFieldContainer[float]
    logprobs: TokenLogprobs
    def __init__(self, token: _Optional[int] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ..., chunks: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., offer_s: _Optional[float] = ..., chunk_s: _Optional[_Iterable[float]] = ..., logprobs: _Optional[_Union[TokenLogprobs, _Mapping]] = ...) -> None: ...

class Want(_message.Message):
    __slots__ = ("attempt", "first_block", "end_block")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    END_BLOCK_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    first_block: int
    end_block: int
    def __init__(self, attempt: _Optional[int] = ..., first_block: _Optional[int] = ..., end_block: _Optional[int] = ...) -> None: ...

class Pulled(_message.Message):
    __slots__ = ("attempt",)
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    def __init__(self, attempt: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Received(_message.Message):
    __slots__ = ("attempt",)
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    def __init__(self, attempt: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("attempt", "reason")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    reason: str
    def __init__(self, attempt: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...
