"""What becomes of the fields that clients send and that Baton does not act on.

A field that promises no effect on the text is ignored. One that would change the text is refused,
unless it has the value that changes nothing: an answer that silently lacks what was asked for is
worse than an error. A field that is in no table is refused as well, as OpenAI does.
"""

Allowed = dict[str, tuple[object, ...]]
"""The values, by field, with which a field may be there."""

IGNORED = (
    "session",
    "user",
    "safety_identifier",
    "metadata",
    # Hints for speed: the text is the same without.
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
)

_BOTH: Allowed = {
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "cache_salt": (),
}
"""vLLM's."""

COMPLETION: Allowed = {**_BOTH, "suffix": ("",)}

CHAT: Allowed = {
    **_BOTH,
    "echo": (False,),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "include_reasoning": (True,),
    "documents": ([],),
    # A program from a stranger; the checkpoint has its own.
    "chat_template": (),
}

STREAM: Allowed = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}
"""Of `stream_options`."""

ASSISTANT: Allowed = dict.fromkeys(("refusal", "audio", "annotations", "function_call"), ([],))
"""A client sends back the assistant messages that it got, with their empty fields."""
