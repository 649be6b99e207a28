"""Cluster specs from YAML and from flags, and how mistakes are told."""

from pathlib import Path

import pytest

from baton.cluster.gateway_keeper import gateway_plans
from baton.cluster.spec import load_spec, revision_of, spec_of, worker_config
from baton.core.cluster_spec import ClusterSpec
from baton.core.config import ClusterConfig, GatewayConfig, ModelFolder, ParallelConfig
from baton.core.errors import InvalidConfig
from baton.core.ids import InstanceId
from baton.core.topology import Role

TEXT = """\
share_gpus: false
models:
  - name: demo
    dir: ../model
    engine:
      kv_memory_mib: 16
      max_sequences: 4
    pools:
      prefill:
      decode:
        instances: 2
        engine: {max_sequences: 8}
        resources: {gpus: 0, custom: {gpu-h200: 1}}
    gateways: {count: 2, http_port: 0, grpc_port: 9000}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def mistake(folder: Path, text: str) -> str:
    with pytest.raises(InvalidConfig) as caught:
        load_spec(written(folder, text))
    return str(caught.value).removeprefix(f"{folder}/")


def test_a_spec_is_read_and_completed(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, TEXT))
    (model,) = spec.models
    assert model.dir == tmp_path.parent / "model"
    assert {name: p.role for name, p in model.pools.items()} == {
        "prefill": Role.PREFILL,
        "decode": Role.DECODE,
    }
    prefill, decode = model.pools["prefill"], model.pools["decode"]
    assert (prefill.instances, prefill.engine.max_sequences) == (1, 4)
    assert (decode.engine.max_sequences, decode.engine.kv_memory_mib) == (8, 16)
    assert [model.gateways.of(i).grpc_port for i in (0, 1)] == [9000, 9002]
    assert [model.gateways.of(i).http_port for i in (0, 1)] == [0, 0]


def test_a_spec_survives_being_written_down(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, TEXT)).with_secrets()
    assert ClusterSpec.checked(**spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("kv_memory_mib: 16", "kv_memory_mib: 0", "6: models.0.engine.kv_memory_mib: 0 is not"),
        ("instances: 2", "instances: x", "11: models.0.pools.decode.instances: 'x' is not"),
        ("instances: 2", "instance: 2", "11: models.0.pools.decode.instance: 2 is not"),
        ("instances: 2", "instances: 0", "8: models.0.pools: ['prefill', 'decode'] is not"),
        ("instances: 2", "autoscale: {min: 3, max: 2}", "11: models.0.pools.decode.autoscale.max"),
        (
            "instances: 2",
            "instances: 2\n        autoscale: {min: 3, max: 4}",
            "11: models.0.pools.decode.instances: 2 is not allowed; allowed: 3 to 4",
        ),
        ("max_sequences: 8", "block_size: 7", "12: models.0.pools.decode.engine.block_size: 7"),
        ("prefill:", "pre_fill:", "9: models.0.pools.pre_fill.role: None is not"),
        ("prefill:", "Prefill: {role: prefill}", "9: models.0.pools.Prefill: 'Prefill' is not"),
        ("prefill:", "prefill: 3", "9: models.0.pools.prefill: 3 is not"),
        ("prefill:", "decode:", "10: 'decode' is not allowed; allowed: a text that is a key once"),
        ("prefill:", "7:", "9: '7' is not allowed; allowed: a text that is a key once"),
        ("gpus: 0", "gpus: 0.5", "13: models.0.pools.decode.resources.gpus: 0.5 is not"),
        ("gpu-h200: 1", "GPU: 1", "13: models.0.pools.decode.resources.custom.GPU: 1.0 is not"),
        ("count: 2", "count: -1", "14: models.0.gateways.count: -1 is not"),
        ("count: 2", "node_resource: GPU", "14: models.0.gateways.node_resource: 'GPU' is not"),
        ("share_gpus: false", "share_gpus: [", "3: "),
        ("share_gpus: false", "shared: 1", "1: shared: 1 is not allowed; allowed: nothing: there"),
        ("dir: ../model", "", "3: models.0.dir: "),
        ("models:", "things:", "1: models: None is not"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert mistake(tmp_path, TEXT.replace(old, new, 1)).startswith(f"cluster.yaml:{words}")


def test_what_is_no_spec_at_all_is_refused(tmp_path: Path) -> None:
    assert "a mapping" in mistake(tmp_path, "- 1")
    assert "a mapping" in mistake(tmp_path, "")
    assert "models" in mistake(tmp_path, "models: 3")
    assert "models.0" in mistake(tmp_path, "models: [3]")
    assert "models.0.pools" in mistake(tmp_path, "models: [{name: x, dir: y, pools: 3}]")
    with pytest.raises(InvalidConfig, match="can be read"):
        load_spec(tmp_path / "none.yaml")


def test_a_pool_of_two_models_is_refused(tmp_path: Path) -> None:
    more = TEXT + "  - {name: two, dir: x, pools: {decode: }}\n"
    assert "15: models.1.pools.decode: 'decode' is not allowed" in mistake(tmp_path, more)
    own = "gateways: {http_port: 0, grpc_port: 0}"
    other = TEXT + f"  - {{name: two, dir: x, pools: {{two-mixed: {{role: mixed}}}}, {own}}}\n"
    assert list(load_spec(written(tmp_path, other)).pools()) == ["prefill", "decode", "two-mixed"]


SHARED = (
    TEXT.replace("    gateways: {count: 2, http_port: 0, grpc_port: 9000}\n", "")
    + """\
  - name: two
    aliases: [deux, zwei]
    dir: x
    limits: {max_open_requests: 3}
    pools: {two-mixed: {role: mixed, autoscale: {min: 0, max: 2}}}
gateways: {count: 2, http_port: 0, grpc_port: 9000}
"""
)


def test_gateways_of_the_cluster_serve_all_models(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, SHARED))
    plans = gateway_plans(spec)
    assert [plan.config.grpc_port for plan in plans.values()] == [9000, 9002]
    one, two = plans["gateway-1"].models
    assert (one.name, one.expects_prefill, one.may_be_empty) == ("demo", True, False)
    assert (two.names, two.expects_prefill, two.may_be_empty) == (
        ("two", "deux", "zwei"),
        False,
        True,
    )
    assert two.limits.max_open_requests == 3
    assert plans["gateway-0"].models[two] == tmp_path / "x"


def test_a_model_may_have_gateways_of_its_own_besides(tmp_path: Path) -> None:
    own = "zwei]\n    gateways: {count: 1, http_port: 7000}"
    plans = gateway_plans(load_spec(written(tmp_path, SHARED.replace("zwei]", own))))
    served = [[model.name for model in plan.models] for plan in plans.values()]
    assert served == [["demo", "two"], ["demo", "two"], ["two"]]
    text = SHARED.replace("zwei]", own).replace("\ngateways:", "\n# gateways:")
    assert "3: models.0.gateways: None is not allowed" in mistake(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: two", "name: demo", "14: models.1.name: 'demo' is not allowed"),
        ("deux, zwei", "deux, demo", "15: models.1.aliases.1: 'demo' is not allowed"),
        ("deux, zwei", "deux, deux", "15: models.1.aliases.1: 'deux' is not allowed"),
        ("deux, zwei", "''", "15: models.1.aliases.0: '' is not allowed"),
        ("max_open_requests: 3", "max_open_requests: 0", "17: models.1.limits.max_open_requests"),
        ("count: 2,", "node_resource: CPU,", "19: gateways.node_resource: 'CPU' is not"),
    ],
)
def test_mistakes_about_several_models_are_told(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    assert mistake(tmp_path, SHARED.replace(old, new, 1)).startswith(f"cluster.yaml:{words}")


def test_flags_make_pools_of_each_model() -> None:
    beside = tuple(ModelFolder(dir=Path(n), name=n) for n in ("Org/Two", "org-two", "日本"))
    spec = spec_of(ClusterConfig(model_dir=Path("m"), model_name="m", prefill=0, beside=beside))
    assert list(spec.pools()) == ["m-mixed", "org-two-mixed", "2-org-two-mixed", "model-mixed"]
    assert [model.name for model in spec.models] == ["m", "Org/Two", "org-two", "日本"]
    (plan,) = gateway_plans(spec).values()
    assert len(plan.models) == 4


def test_parts_of_a_gpu_are_for_who_asks_to_share(tmp_path: Path) -> None:
    text = TEXT.replace("gpus: 0", "gpus: 0.5").replace("share_gpus: false", "share_gpus: true")
    assert load_spec(written(tmp_path, text)).pools()["decode"][1].resources.gpus == 0.5


def test_flags_make_the_same_kind_of_spec() -> None:
    config = ClusterConfig(
        model_dir=Path("m"),
        model_name="m",
        prefill=2,
        threads=3,
        prefill_parallel=ParallelConfig(tp=2),
        gateway=GatewayConfig(http_port=7),
    )
    spec = spec_of(config)
    pools = {name: (p.role, p.instances) for name, (_, p) in spec.pools().items()}
    assert pools == {"prefill": (Role.PREFILL, 2), "decode": (Role.DECODE, 1)}
    worker = worker_config(spec, "prefill", InstanceId("prefill-1"))
    assert (worker.parallel.tp, worker.threads, worker.host) == (2, 3, "127.0.0.1")
    assert spec.gateways is not None
    assert spec.gateways.of(0) == config.gateway


def test_without_prefill_instances_decode_is_mixed() -> None:
    spec = spec_of(ClusterConfig(model_dir=Path("m"), model_name="m", prefill=0, decode=2))
    ((name, (_, pool)),) = spec.pools().items()
    assert (name, pool.role, pool.instances) == ("mixed", Role.MIXED, 2)


def test_a_revision_changes_with_all_that_an_instance_is_started_with(tmp_path: Path) -> None:
    def revisions(old: str = "", new: str = "") -> list[str]:
        spec = load_spec(written(tmp_path, TEXT.replace(old, new, 1) if old else TEXT))
        return [revision_of(spec, pool) for pool in ("prefill", "decode")]

    before = revisions()
    assert revisions("instances: 2", "instances: 3") == before
    assert revisions("count: 2", "count: 1") == before
    changed = revisions("max_sequences: 8", "max_sequences: 9")
    assert changed[0] == before[0]
    assert changed[1] != before[1]
    assert revisions("gpu-h200: 1", "gpu-h200: 2")[1] != before[1]


TLS = "tls: {cert: tls/cluster.pem, key: /abs/cluster.key, ca: tls/cluster-ca.pem}\n"


def test_certificates_and_keys_are_found_from_the_specs_folder(tmp_path: Path) -> None:
    edge = "api_keys: keys.yaml, tls: {cert: a.pem, key: a.key, client_ca: ca.pem}"
    limits = "limits: {reader_timeout_s: 5}"
    text = TEXT.replace("gateways: {", f"gateways: {{{edge}, {limits}, ", 1)
    spec = load_spec(written(tmp_path, TLS + text))
    assert spec.tls is not None
    assert spec.tls.cert == tmp_path / "tls" / "cluster.pem"
    assert spec.tls.key == Path("/abs/cluster.key")
    gateway = spec.models[0].gateways.of(1)
    assert gateway.api_keys == tmp_path / "keys.yaml"
    assert gateway.tls is not None
    assert gateway.tls.client_ca == tmp_path / "ca.pem"
    assert gateway.limits.reader_timeout_s == 5
    for pool in ("prefill", "decode"):
        assert worker_config(spec, pool, InstanceId("x")).tls == spec.tls
    assert {plan.tls for plan in gateway_plans(spec).values()} == {spec.tls}
    assert ClusterSpec.checked(**spec.model_dump(mode="json")) == spec


def test_half_of_what_tls_needs_is_refused(tmp_path: Path) -> None:
    assert "1: tls.ca: None is not" in mistake(tmp_path, "tls: {cert: a, key: b}\n" + TEXT)
