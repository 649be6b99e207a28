"""Ray's environment: it reads it when it is imported, so `prepare` comes before that."""

import os
import secrets

ENVIRONMENT = {
    # Only we may use our Ray: without a token, whoever reaches its ports runs code as us.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    # On Linux, Ray replaces 127.0.0.1 by the address of a network card unless this is off.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_START_HOOK": "baton.cluster.head_process.without_client_server",
    # Ray would kill instances when the machine's memory is scarce, also if others took it.
    "RAY_memory_monitor_refresh_ms": "0",
    # Ray would run instances at nice 15: what else is busy on the machine would come first.
    "RAY_worker_niceness": "0",
    # We close instances ourselves, before Ray ends; it need not wait for them.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # It would print a paragraph of its own when an instance dies, which we report already.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    # A call after we have left Ray is an error; it would start another Ray, and wait for it.
    "RAY_ENABLE_AUTO_CONNECT": "0",
}
"""For the driver, the head and every worker alike: they must agree."""
_AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_DROPPED = ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_NAMESPACE", "RAY_JOB_CONFIG_JSON_ENV_VAR")
_USERS = {name: os.environ.get(name) for name in _AUTHENTICATION}
"""What the user has for a Ray of their own."""
_IN_RAY = "RAY_RAYLET_PID" in os.environ
"""A process that Ray started has its environment from its head, and is connected already."""


def prepare() -> None:
    """Set the environment of this process, unless Ray has started it."""
    if _IN_RAY:
        return
    for name in _DROPPED:
        os.environ.pop(name, None)
    os.environ.update(ENVIRONMENT)


def head_environment(threads: int) -> dict[str, str]:
    """Return the environment of the head, which Ray's workers inherit."""
    numbers = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **ENVIRONMENT, **numbers}


def use_token(token: str | None) -> None:
    """Know a cluster's password before connecting; None: as the user's environment has it."""
    if token is not None:
        ENVIRONMENT["RAY_AUTH_TOKEN"] = os.environ["RAY_AUTH_TOKEN"] = token
        return
    for name, value in _USERS.items():
        ENVIRONMENT.pop(name, None)
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
