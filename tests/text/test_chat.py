"""Rendered prompts equal those of transformers, for published templates and for what templates in general use."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from moe_prefill.errors import ModelError, RowError, UsageError
from moe_prefill.text import ChatTemplate, Tokenizer, chat
from tests.text.tokenizers_for_tests import WITH_CHAT, real, real_directory, write_small

MADE = {
    "brackets": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}{{ '[INST] ' + system + message['content'].strip() + ' [/INST]' }}{% endfor %}"
    ),
    "blocks": (
        "{%- set ns = namespace(found=false) %}\n{% for message in messages %}\n"
        "    {%- if message.role == 'system' %}\n    "
        "{%- set ns.found = true %}\n{% continue %}\n    {%- endif %}\n<|{{ message.role }}|>\n"
        "{{ message.content | trim }}{{ eos_token }}\n{%- endfor %}\n"
        "{% if add_generation_prompt %}\n<|assistant|>\n{% if enable_thinking is defined and not enable_thinking %}\n"
        "<think></think>\n{% endif %}{% endif %}{% if tools is none and documents is none %}!{% endif %}{{ ns.found }}"
    ),
    "json": "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ unknown_variable }}|{{ unk_token }}",
    "macro": (
        "{%- macro say(role, text) -%}<{{ role }}>{{ text }}</{{ role }}>{%- endmacro -%}"
        "{% for m in messages %}{{ say(m.role, m.content) }}{% if loop.index > 5 %}{% break %}{% endif %}{% endfor %}"
    ),
    "generation": (
        "{% for m in messages %}{% if m.role == 'user' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    ),
}
MESSAGES = ['Is this spam? <b>"Win" & win</b> é 日本', "  spaces \n around \n"]
SYSTEMS = [None, "You are terse."]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("user", MESSAGES)
@pytest.mark.parametrize("name", WITH_CHAT)
def test_published_templates(name: str, user: str, system: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(real_directory(name))
    tokenizer = real(name)
    rendered = ChatTemplate.of(tokenizer.chat_template, tokenizer.special_tokens).render(user, system)
    messages = _messages(user, system)
    assert rendered == _reference(reference, messages)
    expected = reference.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert tokenizer.encode(rendered, add_special_tokens=False).tolist() == expected


def test_thinking_is_off_where_the_template_knows_it() -> None:
    tokenizer = real("qwen3")
    rendered = ChatTemplate.of(tokenizer.chat_template, tokenizer.special_tokens).render("x")
    assert rendered.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("user", MESSAGES)
@pytest.mark.parametrize("made", sorted(MADE))
def test_what_templates_use(made: str, user: str, system: str | None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_small(tmp_path, chat_template=MADE[made])
    tokenizer = Tokenizer.from_directory(tmp_path)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    rendered = ChatTemplate.of(tokenizer.chat_template, tokenizer.special_tokens).render(user, system)
    assert rendered == _reference(reference, _messages(user, system))


def test_the_day_is_fixed_for_a_job() -> None:
    template = "Today: {{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate.of(template, {}, "2024-07-26").render("x") == "Today: 26 Jul 2024"
    assert ChatTemplate(template, {}, today=datetime.datetime(2024, 1, 2)).reads_date
    assert not ChatTemplate("{{ messages }}", {}).reads_date
    with pytest.raises(UsageError, match="is no date"):
        ChatTemplate.of(template, {}, "yesterday")


def test_where_templates_are_found(tmp_path: Path) -> None:
    write_small(tmp_path)
    assert Tokenizer.from_directory(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    assert Tokenizer.from_directory(tmp_path).chat_template == "from json"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "from config"}]
    write_small(tmp_path, chat_template=named)
    assert Tokenizer.from_directory(tmp_path).chat_template == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert Tokenizer.from_directory(tmp_path).chat_template == "from file"
    (tmp_path / "chat_template.jinja").unlink()
    write_small(tmp_path, chat_template=named[:1])
    with pytest.raises(ModelError, match="'default' is needed"):
        Tokenizer.from_directory(tmp_path)


def test_what_cannot_be_rendered_is_named() -> None:
    with pytest.raises(ModelError, match="has no chat template"):
        ChatTemplate.of(None, {})
    with pytest.raises(ModelError, match="cannot be parsed"):
        ChatTemplate("{% if %}", {})
    with pytest.raises(RowError, match="roles must alternate") as caught:
        ChatTemplate("{{ raise_exception('roles must alternate') }}", {}).render("x")
    assert caught.value.code == "chat_template"
    with pytest.raises(RowError, match="unsafe"):
        ChatTemplate("{{ messages.append.__globals__ }}", {}).render("x")


@pytest.mark.parametrize(
    "runaway",
    [
        "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{{ (9 ** 999999) ** 999 }}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ messages[0].content.ljust(10 ** 11) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
    ids=["loops", "one operation", "memory", "memory of a method", "recursion"],
)
def test_a_template_that_runs_away_is_stopped_and_the_next_one_renders(runaway: str) -> None:
    good = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises((RowError, ModelError)):
        ChatTemplate(runaway, {}).render("x")
    assert good.render("é") == "é"


def test_the_process_that_renders_may_be_lost() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    process = chat._renderer._process
    assert process is not None
    process.kill()
    process.wait()
    assert template.render("x") == "x"


def _messages(user: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": user}]


def _reference(tokenizer: object, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(  # type: ignore[attr-defined,no-any-return]
        messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
