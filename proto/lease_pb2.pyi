from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Leave(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STAY: _ClassVar[Leave]
    GOODBYE: _ClassVar[Leave]
    WITHDRAW: _ClassVar[Leave]
    REVOKE: _ClassVar[Leave]
STAY: Leave
GOODBYE: Leave
WITHDRAW: Leave
REVOKE: Leave

class Beat(_message.Message):
    __slots__ = ("granter", "epoch", "lease_s", "incarnation", "controls", "leave")
    GRANTER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CONTROLS_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    granter: str
    epoch: int
    lease_s: float
    incarnation: int
    controls: bool
    leave: Leave
    def __init__(self, granter: _Optional[str] = ..., epoch: _Optional[int] = ..., lease_s: _Optional[float] = ..., incarnation: _Optional[int] = ..., controls: _Optional[bool] = ..., leave: _Optional[_Union[Leave, str]] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("epoch", "standing", "draining", "problems", "steps", "waiting", "running", "open_requests", "blocks_used", "blocks_total", "waited_s", "stats")
    class StatsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STANDING_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    OPEN_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    standing: str
    draining: bool
    problems: _containers.RepeatedScalarFieldContainer[str]
    steps: int
    waiting: int
    running: int
    open_requests: int
    blocks_used: int
    blocks_total: int
    waited_s: float
    stats: _containers.ScalarMap[str, float]
    def __init__(self, epoch: _Optional[int] = ..., standing: _Optional[str] = ..., draining: _Optional[bool] = ..., problems: _Optional[_Iterable[str]] = ..., steps: _Optional[int] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., open_requests: _Optional[int] = ..., blocks_used: _Optional[int] = ..., blocks_total: _Optional[int] = ..., waited_s: _Optional[float] = ..., stats: _Optional[_Mapping[str, float]] = ...) -> None: ...
