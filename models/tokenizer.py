"""The seam over the checkpoint's tokenizer: text to ids, ids to text, chats to ids.

It reads tokenizer.json with the `tokenizers` library itself. transformers wraps the same library
and gives the same ids, but importing it takes two seconds.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from baton.core.errors import InvalidConfig, InvalidRequest
from baton.models.chat_template import (
    DEFAULT,
    ChatOptions,
    ChatTemplate,
    Message,
    find_templates,
)
from baton.models.config_file import read_json
from baton.models.spec import read_spec
from baton.models.token_bytes import TokenBytes

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """The tokenizer of one checkpoint; made by `load_tokenizer`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_token_ids: tuple[int, ...],
        chat_template: ChatTemplate | None,
        tool_template: ChatTemplate | None = None,
    ) -> None:
        """`tool_template` renders chats with tools, where the checkpoint has one for them."""
        self._backend = backend
        self._eos_token_ids = eos_token_ids
        self._chat_template = chat_template
        self._tool_template = tool_template or chat_template
        self._token_bytes = TokenBytes(backend)

    def __repr__(self) -> str:
        chat = "chat" if self._chat_template else "no chat"
        return f"<Tokenizer of {self.vocab_size} tokens, {chat}>"

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens by which the model ends a text."""
        return self._eos_token_ids

    @property
    def definition(self) -> str:
        """All of it as tokenizer.json would have it, for libraries that read that."""
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, with those that the tokenizer puts before or after a text."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that are no character become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that one token stands for, perhaps only a part of a character."""
        return self._token_bytes(token)

    @property
    def chat_template(self) -> ChatTemplate | None:
        """What renders chats without tools; None if the model has no chat template."""
        return self._chat_template

    @property
    def tool_template(self) -> ChatTemplate | None:
        """What renders chats with tools; the same one in most checkpoints."""
        return self._tool_template

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        options: ChatOptions = DEFAULT,
        *,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Return the ids of a chat, written as the model was trained to read it.

        Raises InvalidRequest if the model has no chat template, or if the template refuses the
        messages.
        """
        template = self._chat_template if options.tools is None else self._tool_template
        if template is None:
            allowed = "a text completion: this model has no chat template"
            raise InvalidRequest("messages", list(messages), allowed)
        text = template.render(messages, options)
        return self.encode(text, add_special_tokens=add_special_tokens)


def load_tokenizer(model_dir: Path) -> Tokenizer:
    """Load tokenizer.json and, where they are there, the files beside it.

    Raises InvalidConfig that names the file or field: tokenizer.json is missing or damaged, or
    has more tokens than the model.
    """
    spec = read_spec(model_dir)
    read_json(model_dir, "tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more precise
        where = str(model_dir / "tokenizer.json")
        raise InvalidConfig("tokenizer.json", where, f"a tokenizer ({error})") from None
    config = _optional_json(model_dir, "tokenizer_config.json")
    special_tokens = _special_tokens(_optional_json(model_dir, "special_tokens_map.json") | config)
    backend.no_truncation()
    backend.no_padding()
    size = backend.get_vocab_size(with_added_tokens=True)
    if size > spec.vocab_size:
        allowed = f"up to {spec.vocab_size} tokens, as config.json: vocab_size says"
        raise InvalidConfig("tokenizer.json", size, allowed)
    templates = {
        name: ChatTemplate(source, special_tokens)
        for name, source in find_templates(model_dir, config).items()
    }
    return Tokenizer(
        backend, spec.eos_token_ids, templates.get("default"), templates.get("tool_use")
    )


def _optional_json(model_dir: Path, name: str) -> dict[str, Any]:
    return read_json(model_dir, name) if (model_dir / name).is_file() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the named special tokens; each is written as a text or as an object with `content`."""
    found = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found
