import hashlib
import json
from pathlib import Path

import pytest

from baton.api.key_file import hash_of, id_of, new_key, parse
from baton.core.errors import InvalidConfig

KEY, ENTRY = new_key("acme")
YAML = f"""\
tenants:
  acme: {{weight: 2, max_concurrent: 8}}
  idle:
keys:
  - {{id: {ENTRY.id}, tenant: acme, hash: "{ENTRY.hash}"}}
  - {{id: 0123456789ab, tenant: idle, hash: "sha256:{"0" * 64}", admin: true}}
"""


def test_a_key_and_what_is_written_of_it():
    assert KEY.startswith(f"bt_{ENTRY.id}_")
    assert len(KEY.split("_", 2)[2]) >= 43, "256 bits"
    assert ENTRY.hash == "sha256:" + hashlib.sha256(KEY.encode()).hexdigest() == hash_of(KEY)
    assert KEY.split("_", 2)[2] not in repr(ENTRY)
    assert id_of(KEY) == ENTRY.id
    assert new_key("acme")[0] != KEY


@pytest.mark.parametrize("tenant", ["", "A", "a b", "-a", "a\n", "x" * 64])
def test_a_key_for_a_tenant_that_cannot_be(tenant):
    with pytest.raises(InvalidConfig, match="tenant"):
        new_key(tenant)


def test_yaml_and_json_say_the_same():
    file = parse(Path("keys.yaml"), YAML.encode())
    assert file.tenants["acme"].weight == 2
    assert file.tenants["acme"].name == "acme"
    assert file.tenants["idle"].max_concurrent is None
    assert [(key.tenant, key.admin) for key in file.keys] == [("acme", False), ("idle", True)]
    text = json.dumps(
        {
            "tenants": {"acme": {"weight": 2, "max_concurrent": 8}, "idle": None},
            "keys": [key.model_dump() for key in file.keys],
        }
    )
    assert parse(Path("keys.json"), text.encode()) == file


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("tenants:", "tenant:", "keys.yaml:1: tenant: '(not shown)'"),
        ("weight: 2", "weight: 0", "keys.yaml:2: tenants.acme.weight: 0 is not allowed"),
        ("  acme:", "  Acme:", "tenants: 'Acme' is not allowed"),
        ("tenant: acme", "tenant: acne", "keys.yaml:5: keys.0.tenant: '(not shown)'"),
        ("tenant: acme", "tenant: acne", "one of the file's tenants: acme, idle"),
        ("id: 0123456789ab", f"id: {ENTRY.id}", "an id that no other key has"),
        ('"sha256:0', '"md5:0', "keys.yaml:6: keys.1.hash: '(not shown)'"),
        ("admin: true", "admin: 7", "keys.1.admin"),
        ("keys:", "keys: {", "valid YAML"),
        ("  idle:", "  acme:", "a text that is a key once"),
    ],
)
def test_a_mistake_is_told_with_its_line(old, new, words):
    assert old in YAML
    with pytest.raises(InvalidConfig) as refused:
        parse(Path("keys.yaml"), YAML.replace(old, new, 1).encode())
    assert words in str(refused.value)


@pytest.mark.parametrize("place", ["hash", "key", "id", "tenant"])
@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_a_key_that_was_written_down_by_mistake_is_not_repeated(place, name):
    entry = {"id": ENTRY.id, "tenant": "acme", "hash": ENTRY.hash} | {place: KEY}
    text = json.dumps({"tenants": {"acme": {}}, "keys": [entry]})  # which is YAML too
    with pytest.raises(InvalidConfig) as refused:
        parse(Path(name), text.encode())
    assert KEY not in str(refused.value)
    assert KEY.split("_", 2)[2][:16] not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("keys.json", b"[]"),
        ("keys.json", b"{"),
        ("keys.json", b"[" * 100_000),
        ("keys.yaml", b"\xff"),
        ("keys.yaml", b"- a"),
        ("keys.yaml", b""),
        ("keys.yaml", b"tenants: 3"),
        ("keys.yaml", b"tenants: {a: 3}"),
        ("keys.yaml", b"\x00"),
        ("keys.yaml", b"cls: 1"),
    ],
)
def test_what_is_no_file_of_keys(name, raw):
    with pytest.raises(InvalidConfig, match=name):
        parse(Path(name), raw)
