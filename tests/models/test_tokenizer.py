"""The tokenizer gives what transformers' AutoTokenizer gives, without importing transformers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from baton.core.errors import InvalidConfig, InvalidRequest
from baton.models.chat_template import ChatOptions
from baton.models.tokenizer import load_tokenizer

TEXTS = (
    "",
    " ",
    "def read(path):\n    return open(path)\n",
    "naïve café · 日本語 🙂 \U0001f468‍\U0001f469",
    "  two\t\tspaces \r\n\r\n end ",
    "before<|endoftext|>after",
    "can't , won't . don't !",
)
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Write a stack.\nIn Python."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "x = 1"},
        {"role": "user", "content": "again <b>&</b> é"},
    ],
)
TEMPLATE = """\
{%- if messages[0]['role'] == 'assistant' %}{{ raise_exception('not you') }}{% endif %}
{{ bos_token }}{% for message in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    <{{ message['role'] }}> {{ message | tojson }} {{ message.content | trim }}
{% endfor %}
{%- set ns = namespace(last='') %}{% for m in messages %}{% set ns.last = m.role %}{% endfor %}
{{- ns.last }}{{ strftime_now('%Y') | length }}{{ tools is none }}
{%- if add_generation_prompt %}<assistant>{{ eos_token }}{% endif %}"""


@pytest.fixture
def copy(tmp_path: Path, demo_model_dir: Path) -> Path:
    return Path(shutil.copytree(demo_model_dir, tmp_path / "copy"))


def configure(folder: Path, **changes: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_and_decodes_as_transformers(demo_model_dir: Path, text: str) -> None:
    ours, theirs = load_tokenizer(demo_model_dir), AutoTokenizer.from_pretrained(demo_model_dir)
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text


def test_half_a_character_is_a_replacement_character(demo_model_dir: Path) -> None:
    tokenizer = load_tokenizer(demo_model_dir)
    ids = tokenizer.encode("🙂")
    assert len(ids) > 1
    assert tokenizer.decode(ids) == "🙂"
    assert set(tokenizer.decode(ids[:-1])) == {"\N{REPLACEMENT CHARACTER}"}


def test_knows_its_vocabulary_and_its_ends(demo_model_dir: Path) -> None:
    tokenizer = load_tokenizer(demo_model_dir)
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids) == (4096, (0,))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_chats_as_transformers(
    copy: Path, chat: list[dict[str, str]], prompt: bool, template: str | None
) -> None:
    if template:
        (copy / "chat_template.jinja").write_text(template)
    ours, theirs = load_tokenizer(copy), AutoTokenizer.from_pretrained(copy)
    expected = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
    found = ours.apply_chat_template(chat, ChatOptions(add_generation_prompt=prompt))
    assert found == expected
    assert len(found) > 5


@pytest.mark.parametrize(
    "form", [TEMPLATE, [{"name": "x", "template": "no"}, {"name": "default", "template": TEMPLATE}]]
)
def test_the_template_may_stand_in_the_config(copy: Path, form: object) -> None:
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    expected = load_tokenizer(copy).apply_chat_template(CHATS[0])
    (copy / "chat_template.jinja").unlink()
    configure(copy, chat_template=form, bos_token={"content": "<|endoftext|>", "lstrip": False})
    assert load_tokenizer(copy).apply_chat_template(CHATS[0]) == expected


def test_without_a_template_a_chat_is_refused(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequest, match="no chat template"):
        load_tokenizer(copy).apply_chat_template(CHATS[0])


@pytest.mark.parametrize(
    "chat", [[{"role": "assistant", "content": "I begin"}], [{"content": "nobody says"}], []]
)
def test_what_the_template_refuses_is_refused(copy: Path, chat: list[dict[str, str]]) -> None:
    (copy / "chat_template.jinja").write_text(TEMPLATE + "{{ messages[0].role + '' }}")
    with pytest.raises(InvalidRequest, match="messages"):
        load_tokenizer(copy).apply_chat_template(chat)


@pytest.mark.parametrize("source", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_templates_run_in_a_sandbox(copy: Path, source: str) -> None:
    (copy / "chat_template.jinja").write_text(source)
    with pytest.raises(InvalidRequest, match=r"unsafe|not safely callable"):
        load_tokenizer(copy).apply_chat_template(CHATS[0])


def test_a_broken_template_is_refused_at_load(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(InvalidConfig, match="chat_template"):
        load_tokenizer(copy)


def test_bos_comes_before_texts_but_not_before_chats(copy: Path) -> None:
    file = str(copy / "tokenizer.json")
    backend = Backend.from_file(file)
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.save(file)
    ours, theirs = load_tokenizer(copy), AutoTokenizer.from_pretrained(copy)
    assert ours.encode("x = 1") == theirs.encode("x = 1")
    assert ours.encode("x = 1")[0] == 0
    chat = theirs.apply_chat_template(CHATS[0], add_generation_prompt=True, return_dict=False)
    assert ours.apply_chat_template(CHATS[0]) == chat
    assert chat[0] != 0


def test_truncation_and_padding_in_the_file_are_not_applied(copy: Path) -> None:
    file = str(copy / "tokenizer.json")
    backend = Backend.from_file(file)
    backend.enable_truncation(3)
    backend.enable_padding(length=64, pad_id=0, pad_token="<|endoftext|>")
    backend.save(file)
    text = "a long line of text that is not cut"
    assert load_tokenizer(copy).decode(load_tokenizer(copy).encode(text)) == text


def test_refuses_by_name(copy: Path, tiny_llama_dir: Path) -> None:
    configuration = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(configuration | {"vocab_size": 4095}))
    with pytest.raises(InvalidConfig, match=r"tokenizer\.json.*4096.*4095"):
        load_tokenizer(copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidConfig, match=r"tokenizer\.json"):
        load_tokenizer(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InvalidConfig, match=r"model_dir.*tokenizer\.json"):
        load_tokenizer(copy)
    assert load_tokenizer(tiny_llama_dir).vocab_size == 4096


def test_neither_transformers_nor_torch_is_imported() -> None:
    code = "import sys, baton.models.tokenizer; print({'torch', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
