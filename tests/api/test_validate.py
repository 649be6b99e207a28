import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.api.validate import Call, chat_call, completion_call
from baton.core.errors import InvalidRequest, UnknownModel
from baton.core.tenants import Tenant

MAX = 256  # of the served model in conftest.py


def test_defaults_of_a_completion(served_model):
    call = completion_call({"prompt": "hello", "model": "demo"}, served_model)
    (request,) = call.requests
    generate = request.generate
    assert generate.prompt == tuple(served_model.tokenizer.encode("hello"))
    assert (generate.max_tokens, request.stop, call.stream, call.include_usage) == (
        16,
        (),
        False,
        False,
    )
    sampling = generate.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 0, 1.0)
    assert generate.stop_token_ids == served_model.tokenizer.eos_token_ids != ()
    assert call.call_id == generate.request_id
    assert call.call_id.startswith("cmpl-")


def test_every_value_arrives(served_model):
    body = {
        "prompt": [5, 6, 7],
        "max_tokens": 9,
        "temperature": 0,
        "top_k": 3,
        "top_p": 0.5,
        "seed": 2**63 - 1,
        "stop": ["a", "bc"],
        "ignore_eos": True,
        "priority": -10,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    call = completion_call(body, served_model)
    (request,) = call.requests
    generate = request.generate
    assert generate.prompt == (5, 6, 7)
    assert generate.max_tokens == 9
    assert generate.sampling.temperature == 0.0
    assert generate.sampling.top_k == 3
    assert generate.sampling.top_p == 0.5
    assert generate.sampling.seed == 2**63 - 1
    assert request.stop == ("a", "bc")
    assert generate.stop_token_ids == ()
    assert generate.priority == -10
    assert call.stream
    assert call.include_usage


def test_a_whole_number_may_be_written_with_a_point(served_model):
    body = {"prompt": [5.0, 6], "max_tokens": 9.0, "seed": 1e15, "stop_token_ids": [7.0]}
    (request,) = completion_call(body, served_model).requests
    assert request.generate.prompt == (5, 6)
    assert (request.generate.max_tokens, request.generate.sampling.seed) == (9, 10**15)
    whole = (
        *request.generate.prompt,
        request.generate.max_tokens,
        *request.generate.stop_token_ids,
    )
    assert {type(value) for value in whole} == {int}


def test_a_seed_is_drawn_each_time(served_model):
    seeds = {
        completion_call({"prompt": "a"}, served_model).requests[0].generate.sampling.seed
        for _ in range(20)
    }
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("prompt", "count"), [("a", 1), (["a", "b"], 2), ([1, 2], 1), ([[1, 2], [3]], 2)]
)
def test_forms_of_prompt(served_model, prompt, count):
    call = completion_call({"prompt": prompt}, served_model)
    ids = [request.generate.request_id for request in call.requests]
    assert len(set(ids)) == count
    assert all(request_id.startswith(call.call_id) for request_id in ids)


def test_chat(served_model):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "tool_calls": [], "refusal": None},
        {"role": "user", "content": "d", "name": "eva"},
    ]
    call = chat_call({"messages": messages}, served_model)
    (request,) = call.requests
    plain = [{"role": m["role"], "content": m["content"]} for m in messages]
    plain[1]["content"] = "ab"
    expected = served_model.tokenizer.apply_chat_template(plain)
    assert list(request.generate.prompt) == expected
    assert request.generate.max_tokens == MAX - len(expected)
    assert call.call_id.startswith("chatcmpl-")


def test_chat_prefers_max_completion_tokens(served_model):
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9}
    assert chat_call(body, served_model).requests[0].generate.max_tokens == 9
    body["max_completion_tokens"] = 5
    assert chat_call(body, served_model).requests[0].generate.max_tokens == 5


BAD_VALUES = [
    ("prompt", ["", [], None, 5, 1.5, True, {}, [[]], [""], [None], [{}], ["a", 1], [1, "a"]]),
    ("prompt", [[[1], "a"], [[1], [None]], [-1], [10**9], [1.5], [True], [2**70], "\ud800"]),
    ("prompt", [[1] * MAX, "word " * 5000, ["a"] * 129]),
    ("max_tokens", [0, -1, MAX, 2**64, 1.5, "5", True, [], {}]),
    ("temperature", [-0.1, 2.1, math.nan, math.inf, -math.inf, 10**400, "1", True, []]),
    ("top_p", [0, 0.0, -1, 1.1, math.nan, "1", False, {}]),
    ("top_k", [-1, 2**31, 10**30, 0.5, "1", True]),
    ("seed", [-1, 2**63, 2**64, 10**400, 1.5, "1", True, [], {}]),
    ("stop", ["", [""], [{}], [None], {}, 5, ["a"] * 5, "x" * 257, ["a", 1], [["a"]], "\udfff"]),
    ("stream", [1, 0, "true", [], {}]),
    ("ignore_eos", [1, "yes"]),
    ("priority", [-11, 11, 0.5, "1", True]),
    ("stream_options", [{}, {"include_usage": True}, 1, "x", []]),
    ("model", [1, [], {}, True]),
    ("n", [0, 129, "1", 1.5, True, []]),
    ("logprobs", [-1, 21, True, "1", 1.5]),
    ("logit_bias", [[], 1, {"x": 1}, {"-1": 1}, {"1.0": 1}, {"": 1}, {"\u0661": 1}]),
    ("logit_bias", [{"1": 101}, {"1": -100.1}, {"1": math.nan}, {"1": "5"}, {"1": True}]),
    (
        "logit_bias",
        [{"4096": 1}, {"9" * 5000: 1}, {"1": 1, "01": 2}, {str(i): 1 for i in range(1025)}],
    ),
    ("presence_penalty", [2.1, -2.1, "0", False, math.nan]),
    ("frequency_penalty", [2.1, -2.1, "0", False, math.inf]),
    ("repetition_penalty", [0, 0.001, -1, 101, math.nan, "1", True]),
    ("min_p", [-0.1, 1.1, math.nan, "0", True]),
    ("typical_p", [0, 0.0, -1, 1.1, math.nan, "1", False]),
    ("bad_words", ["x", {}, [1], [""], [None], ["x" * 257], ["x"] * 129, ["\ud800"]]),
    ("min_tokens", [-1, 17, 2**64, 1.5, "1", True]),
    ("stop_token_ids", [5, "5", {}, [-1], [4096], [1.5], [True], ["1"], [None], [1] * 129]),
    ("echo", ["x", 1]),
    ("best_of", [2]),
    ("suffix", ["x"]),
    ("tools", [[{"type": "function"}], []]),
    ("no_such_field", [1, "", [], {}, False]),
]


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD_VALUES for value in values]
)
def test_a_bad_value_is_refused_by_name(served_model, field, value):
    body = {"prompt": "hello", field: value}
    with pytest.raises(InvalidRequest) as refused:
        completion_call(body, served_model)
    assert refused.value.field.startswith(field)
    assert refused.value.allowed
    assert len(refused.value.message) < 600


BAD_CHAT = [
    ("messages", [None, [], {}, "hi", 5, [None], ["hi"], [{}], [{"role": "user"}]]),
    ("messages", [[{"role": "tool", "content": "x"}], [{"role": [], "content": "x"}]]),
    ("messages", [[{"role": "user", "content": 5}], [{"role": "user", "content": "\ud800"}]]),
    ("messages", [[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]]),
    ("messages", [[{"role": "user", "content": [{"type": "text", "text": 5}]}]]),
    ("messages", [[{"role": "user", "content": ["x"]}]]),
    ("messages", [[{"role": "user", "content": "x", "extra": 1}]]),
    ("messages", [[{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]]),
    ("messages", [[{"role": "user", "content": "word " * 5000}]]),
    ("tools", [[{"type": "function", "function": {"name": "f"}}], {}, 1]),
    ("response_format", [{"type": "xml"}, "text", {"type": "json_schema"}, {}]),
    ("logprobs", [0, 1, "x"]),
    ("top_logprobs", [3, 21, -1, True, 1.5, "1"]),
    ("max_completion_tokens", [0, MAX, "1"]),
    ("prompt", ["x"]),
]


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD_CHAT for value in values]
)
def test_a_bad_chat_value_is_refused_by_name(served_model, field, value):
    body = {"messages": [{"role": "user", "content": "hi"}], field: value}
    with pytest.raises(InvalidRequest) as refused:
        chat_call(body, served_model)
    assert refused.value.field.startswith(field)


def sampling_of(served_model, check=completion_call, **body):
    base = {"prompt": "hello"} if check is completion_call else {"messages": CHAT}
    return check(base | body, served_model).requests[0].generate.sampling


CHAT = [{"role": "user", "content": "hi"}]


def test_every_sampling_value_arrives(served_model):
    body = {
        "min_p": 0.1,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "logit_bias": {"5": 3, "7": -100.0, "8": 0},
        "min_tokens": 4,
    }
    for check in (completion_call, chat_call):
        sampling = sampling_of(served_model, check, **body)
        assert sampling.logit_bias == ((5, 3.0), (7, -100.0))
        assert {n: getattr(sampling, n) for n in body if n != "logit_bias"} == {
            n: body[n] for n in body if n != "logit_bias"
        }
    assert sampling_of(served_model).plain


def test_logprobs_of_either_endpoint(served_model):
    assert sampling_of(served_model).logprobs is None
    assert sampling_of(served_model, logprobs=0).logprobs == 0
    assert sampling_of(served_model, logprobs=20).logprobs == 20
    for body, expected in (
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 5}, 5),
    ):
        assert sampling_of(served_model, chat_call, **body).logprobs == expected
    with pytest.raises(InvalidRequest, match="top_logprobs: 2"):
        sampling_of(served_model, chat_call, logprobs=False, top_logprobs=2)


def test_bad_words_are_tokenised_with_and_without_a_space(served_model):
    encode = served_model.tokenizer.encode
    words = sampling_of(served_model, bad_words=["return", " self", "return"]).bad_words
    assert set(words) == {tuple(encode(t)) for t in ("return", " return", " self")}
    assert len(words) == 3


def test_stop_tokens_are_the_models_and_the_users(served_model):
    eos = served_model.tokenizer.eos_token_ids

    def stops(**body):
        call = completion_call({"prompt": "a"} | body, served_model)
        return call.requests[0].generate.stop_token_ids

    assert stops(stop_token_ids=[9, 8, 9, eos[0]]) == (*eos, 9, 8)
    assert stops(stop_token_ids=[9], ignore_eos=True) == (9,)


def test_each_of_n_choices_has_its_own_seed_made_of_the_requests(served_model):
    def seeds(**body):
        call = completion_call({"prompt": "a", "seed": 5} | body, served_model)
        assert len({r.generate.request_id for r in call.requests}) == len(call.requests)
        return [r.generate.sampling.seed for r in call.requests]

    assert seeds() == [5]
    four = seeds(n=4)
    assert four[0] == 5
    assert len(set(four)) == 4
    assert four == seeds(n=4)[:4] == seeds(n=6)[:4], "they depend on nothing but seed and index"
    assert set(four[1:]).isdisjoint(seeds(n=4, seed=6)[1:])
    assert all(0 <= seed < 2**63 for seed in seeds(n=128))


def test_choices_are_in_the_order_of_their_prompts(served_model):
    call = completion_call({"prompt": [[1], [2, 3]], "n": 3, "best_of": 3}, served_model)
    assert [len(r.generate.prompt) for r in call.requests] == [1, 1, 1, 2, 2, 2]
    assert call.choices_per_prompt == 3
    with pytest.raises(InvalidRequest, match=r"n: 65 .* at most 64 for 2 prompts"):
        completion_call({"prompt": ["a", "b"], "n": 65}, served_model)


@pytest.mark.parametrize("value", [None, [], "x", 5, True])
def test_a_body_that_is_no_object_is_refused(served_model, value):
    for check in (completion_call, chat_call):
        with pytest.raises(InvalidRequest, match="JSON object"):
            check(value, served_model)


def test_defaults_said_aloud_are_allowed(served_model):
    body = {
        "prompt": "a",
        "n": 1,
        "best_of": 1,
        "echo": False,
        "logprobs": None,
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "suffix": None,
        "stop": None,
        "user": "somebody",
        "stream_options": None,
    }
    assert len(completion_call(body, served_model).requests) == 1


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=40),
    st.lists(st.integers(1, 300), max_size=10),
)
def test_an_echo_and_the_output_make_the_text_of_both(served_model, prompt, output):
    """Also where a character begins in the one and ends in the other: these are mostly bytes."""
    tokens = served_model.tokenizer
    (request,) = completion_call({"prompt": prompt, "echo": True}, served_model).requests
    detokenizer = request.detokenizer(tokens)
    shown = [detokenizer.push([token]) for token in output]
    both = "".join([request.echo, *shown, detokenizer.flush()])
    assert both == tokens.decode([*prompt, *output])


def test_unknown_model_names_the_one_that_is_served(served_model):
    with pytest.raises(UnknownModel) as refused:
        completion_call({"prompt": "a", "model": "gpt-4"}, served_model)
    assert refused.value.allowed == "demo"


def test_prompt_and_output_together_fit_exactly(served_model):
    prompt = [1] * 200
    call = completion_call({"prompt": prompt, "max_tokens": 56}, served_model)
    assert call.requests[0].generate.max_tokens == 56
    with pytest.raises(InvalidRequest, match=r"max_tokens: 57 .* 1 to 56.*200 tokens.*256"):
        completion_call({"prompt": prompt, "max_tokens": 57}, served_model)
    tight = completion_call({"prompt": [1] * 250}, served_model)
    assert tight.requests[0].generate.max_tokens == 6, "a default never makes a request invalid"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(2**62, 2**65)
    | st.floats()
    | st.text(max_size=5)
    | st.characters(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = (
    "prompt messages max_tokens temperature top_p top_k seed stop stream stream_options "
    "n logit_bias bad_words stop_token_ids logprobs top_logprobs min_tokens min_p typical_p "
    "repetition_penalty presence_penalty frequency_penalty model tools response_format ignore_eos x"
)
field_names = st.sampled_from(FIELDS.split())


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(field_names, json_values, max_size=5), st.booleans(), st.booleans())
def test_whatever_comes_is_valid_or_invalid_but_never_a_crash(
    served_model, body, chat, otherwise_valid
):
    if otherwise_valid:
        good = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
        body = good | {k: v for k, v in body.items() if k not in ("prompt", "messages")}
    try:
        call = (chat_call if chat else completion_call)(body, served_model)
    except InvalidRequest:
        return
    check_valid(call, served_model)


def check_valid(call: Call, model) -> None:
    for request in call.requests:
        generate = request.generate
        assert len(generate.prompt) >= 1
        assert all(0 <= token < model.tokenizer.vocab_size for token in generate.prompt)
        assert generate.max_tokens >= 1
        assert len(generate.prompt) + generate.max_tokens <= model.max_model_len
        assert 0 <= generate.sampling.temperature <= 2
        assert 0 < generate.sampling.top_p <= 1
        assert 0 <= generate.sampling.top_k <= model.tokenizer.vocab_size
        assert 0 <= generate.sampling.seed < 2**63
        assert 0 <= generate.sampling.min_p <= 1
        assert 0 < generate.sampling.typical_p <= 1
        assert 0.01 <= generate.sampling.repetition_penalty <= 100
        assert 0 <= generate.sampling.min_tokens <= generate.max_tokens
        assert all(generate.sampling.bad_words)


def test_limits_of_the_tenant(served_model):
    tenant = Tenant(
        name="acme", max_prompt_tokens=3, max_output_tokens=4, priority_min=1, priority_max=5
    )
    model = replace(served_model, tenant=tenant)
    generate = completion_call({"prompt": [3, 4, 5]}, model).requests[0].generate
    assert (generate.tenant, generate.max_tokens, generate.priority) == ("acme", 4, 1)
    chat = {"messages": [{"role": "user", "content": "a"}]}
    free = replace(served_model, tenant=Tenant(name="acme", max_output_tokens=4))
    assert chat_call(chat, free).requests[0].generate.max_tokens == 4
    for fields, words in (
        ({"prompt": [3] * 4}, "prompt: '4 tokens' is not allowed; allowed: at most 3 tokens"),
        ({"max_tokens": 5}, "max_tokens: 5 is not allowed; allowed: 1 to 4 for acme"),
        ({"priority": 0}, "priority: 0 is not allowed; allowed: a whole number from 1 to 5"),
        ({"prompt": [[3], [3] * 4]}, "prompt: '4 tokens'"),
    ):
        with pytest.raises(InvalidRequest, match=re.escape(words)):
            completion_call({"prompt": [3]} | fields, model)
