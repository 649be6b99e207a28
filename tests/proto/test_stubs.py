from pathlib import Path

from baton.proto import generate as generator

FOLDER = Path(generator.__file__).resolve().parent


def test_stubs_are_what_the_protos_generate(tmp_path: Path):
    generator.generate(tmp_path)
    fresh = {path.name: path.read_text() for path in (tmp_path / "baton" / "proto").iterdir()}
    kept = {path.name: path.read_text() for path in FOLDER.iterdir() if "_pb2" in path.name}
    assert len(fresh) == 3 * len(generator.PROTOS)
    assert kept == fresh, "run `python -m baton.proto.generate`"


def test_every_proto_is_generated():
    assert {path.stem for path in FOLDER.glob("*.proto")} == set(generator.PROTOS)
