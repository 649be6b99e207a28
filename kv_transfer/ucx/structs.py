"""The structs and constants of ucp.h that Baton uses, in its order of fields.

Every struct but the request parameters may end early: UCX reads no field whose bit is not in
`field_mask`. Published in ucp/api/ucp.h and ucp_def.h, which the libucx wheel brings along.
"""

import ctypes as c

API_MAJOR, API_MINOR = 1, 14
"""The oldest API that has all that is used here (ucp_request_query came last)."""

ENTITY_NAME_MAX = 32

FEATURE_RMA = 1 << 1
FEATURE_WAKEUP = 1 << 4

PARAM_FIELD_FEATURES = 1 << 0
WORKER_PARAM_FIELD_THREAD_MODE = 1 << 0
WORKER_ATTR_FIELD_ADDRESS = 1 << 1
EP_PARAM_FIELD_REMOTE_ADDRESS = 1 << 0
EP_PARAM_FIELD_ERR_HANDLING_MODE = 1 << 1
EP_PARAM_FIELD_ERR_HANDLER = 1 << 2
MEM_MAP_PARAM_FIELD_ADDRESS = 1 << 0
MEM_MAP_PARAM_FIELD_LENGTH = 1 << 1
MEM_MAP_PARAM_FIELD_MEMORY_TYPE = 1 << 4
CONTEXT_ATTR_FIELD_MEMORY_TYPES = 1 << 2
OP_ATTR_FIELD_FLAGS = 1 << 4
OP_ATTR_FIELD_MEMORY_TYPE = 1 << 6
OP_ATTR_FIELD_MEMH = 1 << 8
OP_ATTR_FLAG_NO_IMM_CMPL = 1 << 16
REQUEST_ATTR_FIELD_INFO_STRING = 1 << 0
REQUEST_ATTR_FIELD_INFO_STRING_SIZE = 1 << 1
EP_CLOSE_FLAG_FORCE = 1 << 0

THREAD_MODE_SINGLE = 0
ERR_HANDLING_MODE_PEER = 1

MEMORY_TYPE_HOST = 0
MEMORY_TYPE_CUDA = 1

OK = 0
INPROGRESS = 1
ERR_BUSY = -15
ERR_CANCELED = -16
ERR_LAST = -100

Status = c.c_int8
"""ucs_status_t: an enum that its header packs into one byte."""

ErrorCallback = c.CFUNCTYPE(None, c.c_void_p, c.c_void_p, Status)
"""(arg, endpoint, status)."""


class ContextParams(c.Structure):
    """ucp_params_t, up to `features`."""

    _fields_ = (("field_mask", c.c_uint64), ("features", c.c_uint64))


class WorkerParams(c.Structure):
    """ucp_worker_params_t, up to `thread_mode`."""

    _fields_ = (("field_mask", c.c_uint64), ("thread_mode", c.c_int))


class WorkerAttr(c.Structure):
    """ucp_worker_attr_t."""

    _fields_ = (
        ("field_mask", c.c_uint64),
        ("thread_mode", c.c_int),
        ("address_flags", c.c_uint32),
        ("address", c.c_void_p),
        ("address_length", c.c_size_t),
        ("max_am_header", c.c_size_t),
        ("name", c.c_char * ENTITY_NAME_MAX),
        ("max_debug_string", c.c_size_t),
    )


class EndpointParams(c.Structure):
    """ucp_ep_params_t, up to `err_handler` (its callback and argument)."""

    _fields_ = (
        ("field_mask", c.c_uint64),
        ("address", c.c_void_p),
        ("err_mode", c.c_int),
        ("err_cb", ErrorCallback),
        ("err_arg", c.c_void_p),
    )


class ContextAttr(c.Structure):
    """ucp_context_attr_t."""

    _fields_ = (
        ("field_mask", c.c_uint64),
        ("request_size", c.c_size_t),
        ("thread_mode", c.c_int),
        ("memory_types", c.c_uint64),
        ("name", c.c_char * ENTITY_NAME_MAX),
        ("device_counter_size", c.c_size_t),
    )


class MemMapParams(c.Structure):
    """ucp_mem_map_params_t, up to `memory_type`."""

    _fields_ = (
        ("field_mask", c.c_uint64),
        ("address", c.c_void_p),
        ("length", c.c_size_t),
        ("flags", c.c_uint),
        ("prot", c.c_uint),
        ("memory_type", c.c_int),
    )


class RequestParam(c.Structure):
    """ucp_request_param_t, up to `memh`."""

    _fields_ = (
        ("op_attr_mask", c.c_uint32),
        ("flags", c.c_uint32),
        ("request", c.c_void_p),
        ("cb", c.c_void_p),
        ("datatype", c.c_uint64),
        ("user_data", c.c_void_p),
        ("reply_buffer", c.c_void_p),
        ("memory_type", c.c_int),
        ("recv_info", c.c_void_p),
        ("memh", c.c_void_p),
    )


class RequestAttr(c.Structure):
    """ucp_request_attr_t."""

    _fields_ = (
        ("field_mask", c.c_uint64),
        ("debug_string", c.c_char_p),
        ("debug_string_size", c.c_size_t),
        ("status", Status),
        ("mem_type", c.c_int),
    )
