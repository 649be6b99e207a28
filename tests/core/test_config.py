from pathlib import Path

import pydantic
import pytest

from baton.core.config import (
    ClusterConfig,
    Config,
    EngineConfig,
    GatewayConfig,
    HandoverConfig,
    WorkerConfig,
)
from baton.core.errors import InvalidConfig
from baton.core.topology import Role

WORKER = {"instance_id": "decode-0", "role": "decode", "model_dir": "m", "model_name": "demo"}
CLASSES = [EngineConfig, HandoverConfig, WorkerConfig, GatewayConfig, ClusterConfig]


@pytest.mark.parametrize(
    ("cls", "change", "field", "says"),
    [
        (EngineConfig, {"block_size": 12}, "block_size", "8, 16 or 32"),
        (EngineConfig, {"kv_memory_mib": 0}, "kv_memory_mib", "greater than or equal to 1"),
        (EngineConfig, {"max_batch_tokens": 15}, "max_batch_tokens", "equal to 16"),
        (EngineConfig, {"max_sequences": "many"}, "max_sequences", "valid integer"),
        (EngineConfig, {"max_sequence": 4}, "max_sequence", "no such field"),
        (HandoverConfig, {"read_timeout_s": 0}, "read_timeout_s", "greater than 0"),
        (GatewayConfig, {"http_port": 65536}, "http_port", "less than or equal to 65535"),
        (WorkerConfig, WORKER | {"instance_id": "Decode 0"}, "instance_id", "match pattern"),
        (WorkerConfig, WORKER | {"role": "cook"}, "role", "'prefill', 'decode' or 'mixed'"),
        (WorkerConfig, WORKER | {"engine": {"max_waiting": 0}}, "engine.max_waiting", "equal to 1"),
        (WorkerConfig, {}, "instance_id", "required"),
    ],
)
def test_a_bad_value_is_refused_by_name(
    cls: type[Config], change: dict[str, object], field: str, says: str
):
    with pytest.raises(InvalidConfig) as caught:
        cls.checked(**change)
    assert caught.value.field == field
    assert says in caught.value.allowed
    value = change.get(field)
    assert value is None or repr(value) in str(caught.value)


@pytest.mark.parametrize("cls", [EngineConfig, HandoverConfig, GatewayConfig])
def test_defaults_are_good(cls: type[Config]):
    assert cls.checked() == cls()


def test_a_config_is_frozen_and_travels_as_json():
    config = WorkerConfig.checked(**WORKER)
    assert config.role is Role.DECODE
    assert config.model_dir == Path("m")
    with pytest.raises(pydantic.ValidationError):
        config.port = 1  # type: ignore[misc]
    assert WorkerConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_is_described(cls: type[Config]):
    assert cls.__doc__
    for name, field in cls.model_fields.items():
        assert field.description, f"{cls.__name__}.{name}"


def test_a_secret_travels_and_is_not_shown():
    config = HandoverConfig().with_secret()
    assert len(config.secret.get_secret_value()) >= 32
    assert config.with_secret() == config
    assert HandoverConfig().with_secret() != config
    assert HandoverConfig.model_validate_json(config.model_dump_json()) == config
    assert config.secret.get_secret_value() not in repr(config)
    assert config.secret.get_secret_value() not in str(config.model_dump())


def test_each_pool_may_keep_kv_in_its_own_dtype():
    config = ClusterConfig(model_dir=Path(), model_name="m", decode_kv_dtype="bfloat16")
    assert config.engine_of(Role.PREFILL) == config.engine
    assert config.engine_of(Role.DECODE) == EngineConfig(kv_dtype="bfloat16")
