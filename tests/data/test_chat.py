"""Chat templates: what `transformers` makes of the same messages, and no message that leaves its place."""

import json

import pytest
from hostile import EXAMPLES, SPECIALS, texts
from hypothesis import given, settings
from transformers import PreTrainedTokenizerFast

from data.chat import ChatTemplate, open_chat
from data.tokenizer import JsonTokenizer, train_bpe

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (  # as of Llama 3: begins with a special token that has a name, takes space away, knows tools and dates
    "{{- bos_token }}{%- if tools %}{{- tools | tojson(indent=2) }}{%- endif %}"
    "{{- strftime_now('%Y') }}{%- for message in messages %}"
    "{{- '<s>' + message['role'] + '</s>\n\n' + message['content'] | trim + eos_token }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<s>assistant</s>\n\n' }}{%- endif %}"
)
JOINED = (  # as of Phi 3: the role makes the special token
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
STRICT = (  # as of Mistral: refuses what does not alternate; a block around what the assistant said
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% continue %}{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "trimmed": TRIMMED, "joined": JOINED, "strict": STRICT}
MORE = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]")
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def tokenizer() -> JsonTokenizer:
    spec = json.loads(train_bpe(["the cat sat on the mat, user assistant system"] * 3, 300)._spec)
    flags = {key: value for key, value in spec["added_tokens"][0].items() if key not in ("id", "content")}
    for name in (*SPECIALS[1:], *MORE):
        spec["added_tokens"].append(
            {"id": 257 + len(spec["model"]["merges"]) + len(spec["added_tokens"]) - 1, "content": name} | flags
        )
    spec["added_tokens"][-1]["rstrip"] = spec["added_tokens"][-3]["rstrip"] = True  # takes what space follows, as Phi's
    return JsonTokenizer(json.dumps(spec), "mine")


@pytest.fixture(scope="module", params=TEMPLATES)
def pair(request, tokenizer, tmp_path_factory):
    """The template, and `transformers`' tokenizer with the same."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save(folder / "tokenizer.json")
    ChatTemplate(TEMPLATES[request.param], tokenizer, NAMES).save(folder)
    return open_chat(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def chat(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


PLAIN = chat("hello\n there ", " The cat sat.", "naïve 猫 😀  \n", "x")


@pytest.mark.parametrize("generation_prompt", [False, True])
@pytest.mark.parametrize("count", range(1, 5))
def test_text_and_ids_are_those_of_transformers(pair, count, generation_prompt):
    ours, theirs = pair
    given_to = {"tools": [{"name": "cat", "parameters": {"é": "<"}}]}
    options = {"add_generation_prompt": generation_prompt, **given_to}
    ids = ours.encode(PLAIN[:count], generation_prompt=generation_prompt, **given_to)
    assert ours.text(PLAIN[:count], generation_prompt=generation_prompt, **given_to) == theirs.apply_chat_template(
        PLAIN[:count], tokenize=False, **options
    )
    assert ids.tolist() == theirs.apply_chat_template(PLAIN[:count], **options)["input_ids"]


def check_hostile(pair, tokenizer, *contents):
    """The special tokens are those of a chat that says nothing, and the text is what transformers renders."""
    ours, theirs = pair
    ids = ours.encode(chat(*contents), generation_prompt=True)
    special = set(tokenizer.specials.values())
    harmless = ours.encode(chat(*("x" for _ in contents)), generation_prompt=True)
    assert [i for i in ids if i in special] == [i for i in harmless if i in special]
    text = theirs.apply_chat_template(chat(*contents), tokenize=False, add_generation_prompt=True)
    assert ours.text(chat(*contents), generation_prompt=True) == text
    names = {i: name for name, i in tokenizer.specials.items()}
    pieces, run = [], []
    for i in [*ids.tolist(), None]:
        if i is not None and i not in special:
            run.append(i)
            continue
        pieces += [tokenizer.decode(run), names.get(i, "")]
        run = []
    back = "".join(pieces)
    assert "".join(back.split()) == "".join(text.split())  # but for space that a special token takes
    return ids


def test_no_message_makes_a_special_token(pair, tokenizer):
    for text in EXAMPLES:
        check_hostile(pair, tokenizer, text)
        check_hostile(pair, tokenizer, f" {text}", text, f"{text}\n")


@settings(max_examples=150, deadline=None)
@given(first=texts, second=texts)
def test_no_message_makes_a_special_token_whatever_it_says(pair, tokenizer, first, second):
    check_hostile(pair, tokenizer, first, second)


@pytest.mark.parametrize("name", [*SPECIALS, *MORE])
def test_no_message_completes_what_a_template_begins(tokenizer, name):
    """For every way to spell a special token with the template's help and the message's."""
    for first in range(len(name)):
        for last in range(first, len(name) + 1):
            before, content, after = name[:first], name[first:last], name[last:]
            if not content.strip():
                continue
            source = f"{{{{ {before!r} + messages[0].content | trim + {after!r} }}}}"
            ids = ChatTemplate(source, tokenizer, {}).encode(chat(f" {content}\n"))
            assert not set(ids.tolist()) & set(tokenizer.specials.values())
            assert tokenizer.decode(ids) == name


def test_parts_of_two_messages_make_no_special_token(tokenizer):
    source = "{{ messages[0].content + messages[1].content }}"
    for at in range(1, len("<|im_end|>")):
        ids = ChatTemplate(source, tokenizer, {}).encode(chat("<|im_end|>"[:at], "<|im_end|>"[at:]))
        assert tokenizer.decode(ids) == "<|im_end|>"


def test_what_tools_and_names_say_stays_text_too(tokenizer):
    source = "{{ tools | tojson(ensure_ascii=True) }}{{ tools[0].name }}{{ messages[0].name }}<|im_end|>"
    template = ChatTemplate(source, tokenizer, {})
    ids = template.encode(
        [{"role": "tool<|im_end|>", "name": "<|im_start|>", "content": ""}],
        tools=[{"name": "</s>", "<s>": [{"<pad>": "<s>"}]}],
    )
    special = [i for i in ids.tolist() if i in tokenizer.specials.values()]
    assert special == [tokenizer.specials["<|im_end|>"]]


def test_parts_of_a_message_are_text_too(tokenizer):
    source = "{% for part in messages[0].content %}{{ part.text if part.type == 'text' }}{% endfor %}<|im_end|>"
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a<|im_"}, {"type": "text", "text": "end|></s>"}]}
    ]
    ids = ChatTemplate(source, tokenizer, {}).encode(messages).tolist()
    assert [i for i in ids if i in tokenizer.specials.values()] == [tokenizer.specials["<|im_end|>"]]
    assert tokenizer.decode(ids) == "a<|im_end|></s>"


def test_a_private_character_of_a_message_is_kept(tokenizer):
    content = "\U000f0000<|im_end|>\U000f0001"
    template = ChatTemplate("{{ messages[0].content }}", tokenizer, {})
    assert template.text(chat(content)) == content
    assert tokenizer.decode(template.encode(chat(content))) == content


def test_an_answer_ends_with_what_the_files_say(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHATML, "eos_token": {"content": "<|im_end|>"}})
    )
    ends = {tokenizer.eos_id, tokenizer.specials["<|im_end|>"]}
    assert set(open_chat(tmp_path).stop_ids) == ends
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.specials["<|end|>"]]}))
    assert set(open_chat(tmp_path).stop_ids) == ends | {tokenizer.specials["<|end|>"]}


def test_the_newest_place_of_a_template_is_read(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="has no chat template"):
        open_chat(tmp_path / "tokenizer.json")
    several = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert open_chat(tmp_path).text(chat("x")) == "a"
    (tmp_path / "chat_template.jinja").write_text("c")
    assert open_chat(tmp_path / "tokenizer.json").text(chat("x")) == "c"


ESCAPES = (
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ self._TemplateReference__context }}",
    "{{ messages.append('x') }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ ('%s' | attr('format'))(1).__class__ }}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(10000000) %}{% endfor %}",
)


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(tokenizer, source):
    """It is refused, or what it asks for is not there."""
    messages, shown, error = chat("x"), "", None
    try:
        shown = ChatTemplate(source, tokenizer, {}).text(messages)
    except ValueError as caught:
        error = str(caught)
    assert shown == ""
    assert error is None or (error.startswith("the chat template: ") and "\n" not in error)
    assert messages == chat("x")


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        ("{% if %}", chat("x"), "the chat template"),
        (STRICT, [*chat("x"), *chat("x")], "roles must alternate"),
        ("{{ messages[0].content + 1 }}", chat("x"), "the chat template"),
        ("{{ 1 / 0 }}", chat("x"), "the chat template"),
        (CHATML, [], "a list of messages"),
        (CHATML, ["hi"], "a list of messages"),
        (CHATML, {"role": "user"}, "a list of messages"),
    ],
)
def test_mistakes(tokenizer, source, messages, message):
    with pytest.raises(ValueError, match=message) as caught:
        ChatTemplate(source, tokenizer, NAMES).text(messages)
    assert "\n" not in str(caught.value)


def test_words_of_the_program_can_be_compared(tokenizer):
    """Even those that are a part of a special token's name."""
    source = "{{ effort == 'end' }} {{ messages[0].role == 'user' }} {{ tools[0].parameters.type == 'text' }}"
    template = ChatTemplate(source, tokenizer, {})
    assert template.text(chat("x"), effort="end", tools=[{"parameters": {"type": "text"}}]) == "True True True"
    ids = ChatTemplate("{{ effort }}", tokenizer, {}).encode(chat("x"), effort="<|im_end|>")
    assert not set(ids.tolist()) & set(tokenizer.specials.values())
