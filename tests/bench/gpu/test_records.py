"""The file of results is read as it was left, cut short or not."""

from bench.gpu.records import Records, cases, figures, is_complete


def test_what_is_added_is_read_again(tmp_path):
    records = Records(tmp_path / "found.jsonl")
    assert records.read() == []
    records.add("decode", case="batch 1", figures={"step_s": 0.5})
    records.add("decode", ended="complete")
    again = Records(tmp_path / "found.jsonl").read()
    assert figures(again, "decode") == {"batch 1": {"step_s": 0.5}}
    assert is_complete(again, "decode")
    assert not is_complete(again, "prefill")


def test_a_line_that_its_writer_did_not_finish_is_left_out(tmp_path):
    path = tmp_path / "found.jsonl"
    records = Records(path)
    records.add("decode", case="batch 1", figures={})
    path.write_text(path.read_text() + '{"stage": "decode", "ca')
    assert list(cases(records.read(), "decode")) == ["batch 1"]


def test_a_line_after_one_that_was_cut_short_is_whole(tmp_path):
    path = tmp_path / "found.jsonl"
    path.write_text('{"stage": "decode", "ca')
    records = Records(path)
    records.add("decode", case="batch 1", figures={})
    assert list(cases(records.read(), "decode")) == ["batch 1"]


def test_the_last_line_of_a_case_counts(tmp_path):
    records = Records(tmp_path / "found.jsonl")
    records.add("decode", case="batch 1", error="OutOfMemoryError: ")
    records.add("decode", ended="complete")
    assert not is_complete(records.read(), "decode"), "what failed is tried again"
    records.add("decode", case="batch 1", figures={"step_s": 1.0})
    assert is_complete(records.read(), "decode")
    assert figures(records.read(), "decode")["batch 1"] == {"step_s": 1.0}
    records.add("decode", ended="killed after 9 s")
    assert not is_complete(records.read(), "decode")
