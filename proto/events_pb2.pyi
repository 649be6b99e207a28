from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FollowRequest(_message.Message):
    __slots__ = ("incarnation",)
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    def __init__(self, incarnation: _Optional[int] = ...) -> None: ...

class InstanceEvents(_message.Message):
    __slots__ = ("terms", "load", "changes")
    TERMS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    terms: CacheTerms
    load: Load
    changes: _containers.RepeatedCompositeFieldContainer[BlockChanges]
    def __init__(self, terms: _Optional[_Union[CacheTerms, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., changes: _Optional[_Iterable[_Union[BlockChanges, _Mapping]]] = ...) -> None: ...

class CacheTerms(_message.Message):
    __slots__ = ("block_size", "hash_name", "local_prefill")
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    HASH_NAME_FIELD_NUMBER: _ClassVar[int]
    LOCAL_PREFILL_FIELD_NUMBER: _ClassVar[int]
    block_size: int
    hash_name: str
    local_prefill: bool
    def __init__(self, block_size: _Optional[int] = ..., hash_name: _Optional[str] = ..., local_prefill: _Optional[bool] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("queued_tokens", "running", "context_tokens", "free_tokens")
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    queued_tokens: int
    running: int
    context_tokens: int
    free_tokens: int
    def __init__(self, queued_tokens: _Optional[int] = ..., running: _Optional[int] = ..., context_tokens: _Optional[int] = ..., free_tokens: _Optional[int] = ...) -> None: ...

class BlockChanges(_message.Message):
    __slots__ = ("partition", "first", "events", "complete", "stored", "removed")
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    partition: int
    first: int
    events: int
    complete: bool
    stored: bytes
    removed: bytes
    def __init__(self, partition: _Optional[int] = ..., first: _Optional[int] = ..., events: _Optional[int] = ..., complete: _Optional[bool] = ..., stored: _Optional[bytes] = ..., removed: _Optional[bytes] = ...) -> None: ...
