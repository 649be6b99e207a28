"""/tokenize and /detokenize, in vLLM's shapes: the bodies are checked as those of a generation."""

from baton.api import known_fields
from baton.api.fields import Fields, check_text
from baton.api.tool_fields import read_tools
from baton.api.validate import ServedModel, check_model, read_chat, read_tokens
from baton.core.errors import InvalidRequest


def tokenize_call(body: object, model: ServedModel) -> dict[str, object]:
    """Return the tokens of a `prompt`, or of a chat's `messages`: exactly what would be sent on."""
    fields = Fields(body)
    check_model(fields, model)
    with_strings = fields.flag("return_token_strs", False)
    if (messages := fields.take("messages")) is not None:
        chat = Fields({**fields.rest(), "messages": messages})
        chat.only(known_fields.CHAT)
        tools = read_tools(chat, model.tokenizer.tool_template, model.tool_format)
        tokens = read_chat(chat, model, tools)
        chat.done()
    else:
        prompt = fields.take("prompt")
        if prompt is None:
            raise InvalidRequest("prompt", None, "a string; or messages")
        special = fields.flag("add_special_tokens", True)
        fields.done()
        text = check_text("prompt", prompt)
        tokens = model.tokenizer.encode(text, add_special_tokens=special)
    told: dict[str, object] = {
        "count": len(tokens),
        "max_model_len": model.max_model_len,
        "tokens": tokens,
        "token_strs": None,
    }
    if with_strings:
        tell = model.tokenizer.token_bytes
        told["token_strs"] = [tell(token).decode(errors="replace") for token in tokens]
    return told


def detokenize_call(body: object, model: ServedModel) -> dict[str, object]:
    """Return the text of `tokens`, special ones included."""
    fields = Fields(body)
    check_model(fields, model)
    tokens = read_tokens("tokens", fields.take("tokens"), model)
    fields.done()
    return {"prompt": model.tokenizer.decode(tokens, skip_special_tokens=False)}
