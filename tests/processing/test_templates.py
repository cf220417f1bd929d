"""Chat templates: found where transformers finds them, rendered as it renders them, and unable to do harm."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.processing_utils import ProcessorMixin

from gp_jax import GlimpseError
from gp_jax.processing import templates
from gp_jax.processing.llava import LlavaProcessor
from gp_jax.processing.qwen import Processor
from gp_jax.processing.templates import Template, find_template
from gp_jax.tiny import make_checkpoint

pytestmark = pytest.mark.quick

QWEN = (  # Qwen2.5-VL's own, less its videos
    "{% set image_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>"
    "system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture "
    "{{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}{# Render all images "
    "first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{# Render all "
    "text next #}{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
OTHERS = """
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- macro shown(one) %}{{ one.text | default('', true) | trim }}{% endmacro %}
{{ bos_token }}{{ eos_token is defined }} {{ dict(a=1) | tojson(indent=2) }} {{ messages | tojson }} {{ strftime_now('%Y') }}
{% for message in messages %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% set kept = namespace(text='') %}
    {%- for part in message.content %}{% set kept.text = kept.text ~ shown(part) %}{% endfor %}
    {{ message.role | title }}: {{ kept.text }} {{ 'é <b>' | e }}
    {% generation %}{% set kept = 5 %}{{ kept }}{% endgeneration %}{{ kept.text | length }}
{% endfor %}
"""
TURNS = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is <b>there</b>, é 😀?\n"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": " a cat"}]},
    {"role": "user", "content": [{"type": "text", "text": "And where?"}]},
]
PLAIN = [{"role": "user", "content": "Who?"}]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def processor(vlm, text: str, kind: type = Processor) -> Processor:
    return kind(vlm.config, vlm.processor.tokenizer, vlm.processor.image_processor, Template(text, Path("chat_template.jinja")))


@pytest.mark.parametrize("messages", [TURNS, PLAIN, TURNS[1:2]])
@pytest.mark.parametrize("template", [QWEN, LLAVA, OTHERS])
def test_rendered_as_transformers_renders(vlm, template, messages):
    if messages is PLAIN and template != QWEN:
        messages = [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}]
    tokenizer = vlm.processor.tokenizer
    expected = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert Template(template, Path("x")).render(messages, tokenizer.special_tokens_map) == expected


NAMED = [{"name": "default", "template": "of the list"}, {"name": "tool_use", "template": "other"}]
PLACES = {  # files, and what transformers' processor takes, or its tokenizer where that one has nothing
    "tokenizer": ({"tokenizer_config.json": {"chat_template": "of the tokenizer"}}, None, "of the tokenizer"),
    "tokenizer, by name": ({"tokenizer_config.json": {"chat_template": NAMED}}, None, "of the list"),
    "jinja": ({"tokenizer_config.json": {"chat_template": "t"}, "chat_template.jinja": "of jinja"}, "of jinja", None),
    "by name": ({"chat_template.jinja": "of jinja", "additional_chat_templates/tools.jinja": "tools"}, "of jinja", None),
    "default by name": (
        {"additional_chat_templates/default.jinja": "named", "additional_chat_templates/tools.jinja": "tools"},
        "named",
        None,
    ),
    "json": ({"chat_template.jinja": "of jinja", "chat_template.json": {"chat_template": "of json"}}, "of json", None),
    "processor": (
        {"chat_template.json": {"chat_template": "j"}, "processor_config.json": {"chat_template": "of the processor"}},
        "of the processor",
        None,
    ),
    "processor without": ({"chat_template.jinja": "of jinja", "processor_config.json": {"chat_template": None}}, "of jinja", None),
}


@pytest.mark.parametrize(("files", "theirs", "own"), PLACES.values(), ids=PLACES)
def test_found_where_transformers_finds_it(tmp_path, files, theirs, own):
    (tmp_path / "additional_chat_templates").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    found = ProcessorMixin.get_processor_dict(tmp_path)[0].get("chat_template")
    found = found.get("default") if isinstance(found, dict) else found
    assert found == theirs
    ours = find_template(tmp_path)
    assert ours.text == (theirs or own) and (tmp_path / ours.file).is_file()


def test_no_template(tmp_path):
    assert find_template(tmp_path) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": {"chat_template": 5}}, "tokenizer_config.json: chat_template must be a text"),
        ({"tokenizer_config.json": {"chat_template": [1]}}, "tokenizer_config.json: chat_template must be a text"),
        ({"tokenizer_config.json": {"chat_template": NAMED[1:]}}, "none of the chat templates is called default .*tool_use"),
        ({"tokenizer_config.json": {"chat_template": []}}, "none of the chat templates is called default"),
        ({"processor_config.json": {"chat_template": {"a": "b"}}}, "processor_config.json: none of the chat templates"),
        ({"chat_template.json": {}}, "chat_template.json: chat_template must be a text"),
        ({"chat_template.json": "{"}, "chat_template.json: is not valid JSON"),
        ({"chat_template.json": {"chat_template": "a"}, "additional_chat_templates/b.jinja": "b"}, "chat_template.json: does not go with"),
        ({"additional_chat_templates/b.jinja": "b"}, "additional_chat_templates: none of the chat templates is called default"),
        ({"chat_template.jinja": "x" * (templates.MAX_TEMPLATE + 1)}, "chat_template.jinja: is larger than 1024 KiB"),
        ({"chat_template.jinja/x": ""}, "chat_template.jinja: is a folder, not a file"),
    ],
)
def test_damaged_files_are_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(GlimpseError, match=message):
        find_template(tmp_path)


def test_a_template_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(GlimpseError, match="chat_template.jinja: is not a regular file"):
        find_template(tmp_path)


TIME, MEMORY = "takes more than 1 s of computing", "needs more than 160 MiB of memory"
ZOO = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": TIME,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": TIME,
    "{{ 'x' * 10**10 }}": MEMORY,
    "{{ 'x' | center(10**10) }}": MEMORY,
    "{{ '%10000000000d' % 1 }}": MEMORY,
    "{{ '{:10000000000}'.format(1) }}": MEMORY,
    "{{ range(99999) | join(range(9999) | join) }}": MEMORY,
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}": MEMORY,
    "{% for i in range(50000) %}" + "x" * 100 + "{% endfor %}": "has more than 262[0-9]* characters",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}": "RecursionError",
    "{{ " + "(" * 50000 + " }}": "RecursionError",
    "{{ raise_exception('no\\nway') }}": r"TemplateError: no way\)",
    "{{ messages[7].content }}": "UndefinedError",
    "{% if %}": "TemplateSyntaxError",
    "{{ lipsum.__globals__['os'].system('true') }}": "SecurityError",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ namespace(__init__=5) }}": "SecurityError",
    "{{ messages.append(5) }}": "SecurityError",
    "{{ dict.mro() }}": "UndefinedError",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ range(10**9) }}": "OverflowError",
}


@pytest.mark.parametrize(("template", "message"), ZOO.items(), ids=[template[:40] for template in ZOO])
def test_what_a_template_may_not_do(template, message):
    start = time.monotonic()
    with pytest.raises(GlimpseError, match=f"x.jinja: the chat template fails .*{message}") as error:
        Template(template, Path("x.jinja")).render(PLAIN, {})
    assert len(str(error.value).splitlines()) == 1 and time.monotonic() - start < 20  # a busy machine


def test_the_process_is_told_nothing_and_starts_again(monkeypatch):
    monkeypatch.setenv("SECRET", "of the parent")
    one = Template("{{ messages[0].content }}", Path("x"))
    assert one.render(PLAIN, {}) == "Who?"
    first = templates._worker._process
    environment = Path(f"/proc/{first.pid}/environ")
    assert not environment.exists() or b"of the parent" not in environment.read_bytes()
    first.kill()
    first.wait()
    assert one.render(PLAIN, {}) == "Who?" and templates._worker._process is not first
    templates._forked()  # as in a child: another process, whatever becomes of this one's
    assert one.render(PLAIN, {}) == "Who?" and templates._worker._process is not first


@pytest.mark.parametrize("kind", [Processor, LlavaProcessor])
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", "the chat template fails .TemplateError: no."),
        ("Who?", "makes 0 placeholders <|image_pad|> of 1 image"),
        ("<|image_pad|><|image_pad|>Who?", "makes 2 placeholders <|image_pad|> of 1 image"),
        ("<|image_pad|>", "leaves out the question 'Who"),
    ],
)
def test_every_family_notices_a_template_that_loses_something(vlm, kind, template, message):
    with pytest.raises(GlimpseError, match="chat_template.jinja: .*" + message.replace("|", r"\|")):
        processor(vlm, template, kind).chat(1, "Who?")


def test_templates_may_change_spaces_and_capitals(vlm):
    text = processor(vlm, "<|image_pad|>{{ (messages[0].content | last).text | trim | upper }}").chat(1, " Who is \n there? ")
    assert text == "<|image_pad|>WHO IS \n THERE?"


def test_a_tokenizer_without_a_token_for_pictures(vlm):
    other = Processor(replace(vlm.config, image_token_id=5), vlm.processor.tokenizer, vlm.processor.image_processor, vlm.processor.template)
    assert "Who?" in other.chat(0, "Who?")
    none = replace(vlm.config, image_token_id=10**6)
    with pytest.raises(GlimpseError, match="no text becomes its image token 1000000"):
        Processor(none, vlm.processor.tokenizer, vlm.processor.image_processor, vlm.processor.template).chat(1, "Who?")


@pytest.mark.parametrize("kind", [Processor, LlavaProcessor])
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (5, "messages must be a list"),
        ([], "messages must be a list"),
        ("Who?", "messages must be a list"),
        ([5], r"messages\[0\] must have a role"),
        ([{"role": 5, "content": "x"}], r"messages\[0\] must have a role"),
        ([PLAIN[0], {"role": "user"}], r"messages\[1\] must have a role"),
        ([{"role": "user", "content": {"type": "text"}}], "must have a role, and as content"),
        ([{"role": "user", "content": [{"type": "video"}]}], "neither text nor image: {'type': 'video'}"),
        ([{"role": "user", "content": [{"type": "text"}]}], "neither text nor image"),
        ([{"role": "user", "content": [5]}], "neither text nor image: 5"),
        ([{"role": "user", "content": "half \ud83d"}], r"messages\[0\] is not valid text"),
        ([{"role": "user", "content": [{"type": "text", "text": "x" * (1 << 21)}]}], r"messages\[0\] is longer than 512 KiB"),
    ],
)
def test_other_messages_are_refused(vlm, kind, messages, message):
    with pytest.raises(GlimpseError, match=message):
        processor(vlm, QWEN, kind).render(messages)


def test_system_messages_are_checked_too(vlm):
    with pytest.raises(GlimpseError, match=r"messages\[0\] is not valid text"):
        vlm.processor.chat(0, "Who?", system="half \ud83d")
    with pytest.raises(GlimpseError, match=r"messages\[0\] must have a role"):
        vlm.processor.chat(0, "Who?", system=5)


def test_a_process_that_is_not_ready_in_time_answers_nothing_later(monkeypatch):
    """That it is ready would be taken for its first answer."""
    worker, one = templates.Worker(), {"template": "Who?", "variables": {}}
    monkeypatch.setattr(templates, "START", 0.0)
    with pytest.raises(GlimpseError, match="does not start"):
        worker.ask(one)
    assert worker._process is None
    monkeypatch.undo()
    assert worker.ask(one) == {"text": "Who?"}
    worker.close()
