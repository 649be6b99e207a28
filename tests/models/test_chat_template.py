"""Templates of checkpoints: tools, variables, continued messages; as transformers renders them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from baton.core.errors import InvalidConfig, InvalidRequest
from baton.models.chat_template import ChatOptions, ChatTemplate, find_templates
from baton.models.tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am "}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TRIMMED = TEMPLATE.replace("m.content", "m.content | trim")


@pytest.fixture
def copy(tmp_path: Path, demo_model_dir: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_dir / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("template", [TEMPLATE, TRIMMED])
@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"add_generation_prompt": True, "tools": [TOOL]},
        {"add_generation_prompt": True, "mood": "well"},
    ],
)
def test_as_transformers(copy: Path, template: str, options: dict[str, Any]) -> None:
    (copy / "chat_template.jinja").write_text(template)
    theirs = AutoTokenizer.from_pretrained(copy).apply_chat_template(
        CHAT, tokenize=False, **options
    )
    variables = {name: options.pop(name) for name in ("mood",) if name in options}
    rendered = ChatTemplate(template, {}).render(CHAT, ChatOptions(**options, variables=variables))
    assert rendered == theirs


def test_a_message_that_is_not_shown_cannot_be_continued() -> None:
    for source in ("{{ messages[0].content }}", "{{ messages[1].content | upper }}"):
        with pytest.raises(InvalidRequest) as refused:
            ChatTemplate(source, {}).render(CHAT, ChatOptions(False, continue_final_message=True))
        assert refused.value.field == "continue_final_message"


def test_generation_tags_have_no_effect() -> None:
    source = "a{% generation %}b{{ messages[0].content }}{% endgeneration %}c"
    assert ChatTemplate(source, {}).render(CHAT) == "abhic"
    with pytest.raises(InvalidConfig, match="chat_template"):
        ChatTemplate("{% generation %}", {})


def test_a_variable_cannot_stand_for_a_special_token_or_the_messages() -> None:
    template = ChatTemplate("{{ bos_token }}{{ messages | length }}", {"bos_token": "<s>"})
    assert (
        template.render(CHAT, ChatOptions(variables={"bos_token": "x", "messages": []})) == "<s>2"
    )


def test_what_a_template_knows() -> None:
    template = ChatTemplate("{% if tools %}{% endif %}{% set x = 1 %}{{ x }}{{ mood }}", {})
    assert template.variables == {"tools", "mood"}
    assert template.takes_tools
    assert not template.takes_tool_calls


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ messages[9].x }}", "{{ '\ud800' }}"])
def test_whatever_goes_wrong_is_the_requests_fault(source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template accepts"):
        ChatTemplate(source, {}).render(CHAT)


def test_a_template_for_tools_is_used_where_there_are_any(copy: Path) -> None:
    more = copy / "additional_chat_templates"
    more.mkdir()
    (copy / "chat_template.jinja").write_text("plain")
    (more / "tool_use.jinja").write_text("{{ tools[0].function.name }} there")
    tokenizer = load_tokenizer(copy)
    for options, text in ((ChatOptions(), "plain"), (ChatOptions(tools=[TOOL]), "f there")):
        assert tokenizer.decode(tokenizer.apply_chat_template(CHAT, options)) == text


def test_named_templates_of_the_config(tmp_path: Path) -> None:
    rows = [{"name": name, "template": name} for name in ("rag", "tool_use", "default")]
    found = find_templates(tmp_path, {"chat_template": rows})
    assert found == {"default": "default", "tool_use": "tool_use"}
    assert find_templates(tmp_path, {}) == {}
    with pytest.raises(InvalidConfig, match="chat_template"):
        find_templates(tmp_path, json.loads('{"chat_template": 5}'))
