import argparse
import random
import shutil
import sys

import pytest


def test_decode_counts_only_the_time_in_which_all_sequences_decode(bench):
    figures, work = bench("engine_figures"), bench("engine_work")
    early, late = [1.0, 2.0, 3.0, 4.0], [2.5, 3.5, 4.5, 5.5]
    assert figures.decode_window([early, late]) == (1.5, 3)
    case = work.Case("decode 2", "decode", [[1], [2]], [4, 4])
    assert figures.tokens_per_s(case, [early, late]) == pytest.approx(2.0)
    with pytest.raises(AssertionError, match="before the last began"):
        figures.decode_window([[1.0, 2.0], [3.0, 4.0]])


def test_prefill_counts_the_prompt_and_a_mix_both_ways(bench):
    figures, work = bench("engine_figures"), bench("engine_work")
    prefill = work.Case("prefill 4", "prefill", [[1, 2, 3, 4]], [1], 3)
    assert figures.tokens_per_s(prefill, [[0.5]]) == pytest.approx(8)
    mixed = work.Case("mix of 2", "mix", [[1, 2, 3], [4]], [2, 4])
    assert figures.tokens_per_s(mixed, [[0.1, 0.2], [0.1, 0.2, 0.3, 2.0]]) == pytest.approx(5)
    found = figures.figures([prefill], [[[[0.5]], [[1.0]], [[4.0]]]])
    assert found == {"prefill 4": pytest.approx(4)}, "the median of the repeats"


def test_agreement_ends_at_the_first_difference_of_a_request(bench):
    agreement = bench("engine_figures").agreement
    ours = [[[1, 2, 3, 4], [5, 6]], [[7, 8]]]
    assert agreement(ours, ours) == 1
    assert agreement(ours, [[[1, 9, 3, 4], [5, 6]], [[0, 8]]]) == pytest.approx(3 / 8)


def test_ratios_are_within_a_round_and_failures_are_said(bench):
    figures, work = bench("engine_figures"), bench("engine_work")
    case = work.Case("decode 1", "decode", [[1]], [2])
    ours = figures.Outcome("baton", "Baton", 4.0, 1.0, [{"decode 1": 50.0}, {"decode 1": 10.0}])
    peer = figures.Outcome("peer", "Peer", 1.0, 1.0, [{"decode 1": 25.0}, {"decode 1": 20.0}])
    lost = figures.Outcome("lost", error="it ended")
    ratios = figures.ratio_table([ours, lost, peer], [case]).splitlines()
    assert ratios[-1] == "| peer | 1.25 (0.50 to 2.00) |"
    assert len(ratios) == 3
    limits = figures.Limits(bytes_per_s=4000.0, weights_per_token=10)
    table = figures.speed_table([ours, lost, peer], [case], limits)
    assert "| Baton | 30.0 (10.0 to 50.0) · 33.33 ms | 30 (10 to 50) % | 1.0 |" in table
    assert "| lost | it ended |" in table


def test_the_mix_has_the_tokens_that_it_says_it_has(bench):
    work = bench("engine_work")
    lengths = work.mix()
    assert len(lengths) == 32
    assert [sum(column) for column in zip(*lengths, strict=True)] == [9196, 2710]
    assert min(map(min, lengths)) >= 1
    assert lengths == work.mix()
    assert sum(given for given, _ in work.mix(8)) == 2299
    rng = random.Random(0)
    for total in (5, 17, 400):
        found = work.scaled([rng.random() + 0.01 for _ in range(5)], total)
        assert sum(found) == total
        assert min(found) >= 1


def test_cases_are_the_same_for_everybody(bench):
    work = bench("engine_work")
    size = work.Size({2: (16, 4)}, {32: 3}, 2)
    found = work.cases(size, vocabulary=50)
    assert [case.fields() for case in found] == [c.fields() for c in work.cases(size, 50)]
    decode, prefill, mixed = found
    assert [len(prompt) for prompt in decode.prompts] == [16, 16]
    assert decode.prompts[0] != decode.prompts[1]
    assert (prefill.name, prefill.repeat, prefill.outputs) == ("prefill 32", 3, [1])
    assert mixed.name == "mix of 2"
    assert all(1 <= token < 50 for case in found for prompt in case.prompts for token in prompt)


def test_sizes_of_checkpoints(bench):
    shapes = bench("checkpoints").SHAPES
    sizes = {name: round(shape.parameters / 1e6) for name, shape in shapes.items()}
    assert sizes == {"tiny": 16, "110m": 113, "1b": 1104}


def test_a_checkpoint_has_the_size_that_its_shape_says(bench, tmp_path, monkeypatch):
    checkpoints = bench("checkpoints")
    shape = checkpoints.Shape(64, 2, 96, 4, 2, 512)
    monkeypatch.setitem(checkpoints.SHAPES, "small", shape)
    path = checkpoints.checkpoint("small", tmp_path)
    tensors = pytest.importorskip("safetensors.torch").load_file(path / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == shape.parameters
    matrices = [t for n, t in tensors.items() if t.ndim == 2 and "embed" not in n]
    assert sum(tensor.numel() for tensor in matrices) == shape.weights_per_token
    made = (path / "model.safetensors").stat().st_mtime_ns
    assert checkpoints.checkpoint("small", tmp_path) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == made, "made once"


def test_baton_runs_a_job_and_errors_come_back(bench, tmp_path):
    adapters, checkpoints = bench("engine_adapter"), bench("checkpoints")
    adapter = adapters.Adapter("baton", sys.executable, 1, tmp_path / "log")
    case = {"prompts": [[1, 2, 3], [4] * 40], "outputs": [5, 2], "repeat": 2}
    job = {"checkpoint": str(checkpoints.TOKENIZER_FROM), "converted": str(tmp_path / "wide")}
    job |= {"engine": "baton", "precision": "float32", "threads": 1, "cases": [case]}
    try:
        with pytest.raises(adapters.AdapterError, match="nothing is loaded"):
            adapter.ask(100, action="run")
        adapter.ask(100, action="convert", **job)
        assert "Baton" in adapter.ask(100, action="load", **job)["label"]
        [[first, second]] = adapter.ask(100, action="run")["runs"]
    finally:
        adapter.close()
    assert [len(tokens) for tokens in first["tokens"]] == [5, 2]
    assert first["tokens"] == second["tokens"]
    for times in first["times"]:
        assert times == sorted(times)
        assert times[0] > 0


def test_an_adapter_that_ends_is_an_error(bench, tmp_path):
    adapters = bench("engine_adapter")
    nothing = shutil.which("false")
    assert nothing is not None
    adapter = adapters.Adapter("baton", nothing, 1, tmp_path / "log")
    try:
        with pytest.raises(adapters.AdapterError, match="it ended"):
            adapter.ask(100, action="run")
    finally:
        adapter.close()


def test_peers_are_named_with_an_interpreter(bench):
    engine = bench("engine")
    assert engine._peers(f"vllm={sys.executable}") == {"vllm": sys.executable}
    for wrong in ("vllm", "vllm=/nowhere/python", f"other={sys.executable}"):
        with pytest.raises(argparse.ArgumentTypeError, match="NAME=INTERPRETER"):
            engine._peers(wrong)
