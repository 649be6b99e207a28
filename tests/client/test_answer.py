from baton.client.answer import Chunk, Timing, completion_of
from baton.core.clock import ManualClock


def chunk(text: str, tokens: int, index: int = 0, finish: str = "") -> Chunk:
    end = (7, 5, 3) if finish else (0, 0, 0)
    return Chunk("r", text, tuple(range(tokens)), finish, *end, index=index)


def test_chunks_of_several_choices_are_put_together():
    timing = Timing(ManualClock())
    chunks = [chunk("a", 1), chunk("x", 1, 1), chunk("b", 2, 0, "stop"), chunk("y", 1, 1, "length")]
    whole = completion_of(chunks, timing)
    assert whole.text == "ab"
    assert [choice.text for choice in whole.choices] == ["ab", "xy"]
    assert [choice.finish_reason for choice in whole.choices] == ["stop", "length"]
    assert whole.choices[0].token_ids == (0, 0, 1)
    assert (whole.prompt_tokens, whole.completion_tokens) == (7, 10)


def test_timing_counts_from_sending_and_from_the_first_token():
    clock = ManualClock()
    timing = Timing(clock)
    assert (timing.ttft_s, timing.tpot_s) == (None, None)
    clock.advance(2.0)
    timing.came(chunk("", 0))
    assert timing.ttft_s is None
    timing.came(chunk("a", 3))
    assert (timing.ttft_s, timing.tpot_s) == (2.0, None)
    clock.advance(1.0)
    timing.came(chunk("b", 1))
    clock.advance(1.0)
    timing.came(chunk("c", 3))
    assert (timing.ttft_s, timing.tpot_s) == (2.0, 0.5)
