"""Templates are programs of strangers: each of these ends at once in a BadRow that names the template, and honest ones
render as transformers does."""

import resource
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dfactory.data.chat import ChatEncoder, special_ids
from dfactory.data.fields import BadRow, Conversation, Fault
from tests.data.conftest import MARKED_TEMPLATE, PLAIN_TEMPLATE

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
DOUBLED = "{% set x = 'aaaaaaaa' %}" + "{% set x = OP %}" * 60 + "{{ x | length }}"
MACRO = "{% macro f(n) %}BODY{% endmacro %}{{ f(200) }}"
HOSTILE = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops in loops, filtered": "{% for a in range(9999) if a %}{% for b in range(9999) if b < 0 %}{% endfor %}{% endfor %}",
    "a loop too long": "{% for a in range(10**9) %}{% endfor %}",
    "power of powers": "{{ 2**(2**33) }}",
    "powers in a loop": "{% set n = namespace(x=3) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "lorem ipsum": "{{ lipsum(n=10**6) }}",
    "a text times": "{{ 'a' * 10**9 }}",
    "times a text": "{{ 10**9 * 'a' }}",
    "a list times": "{{ ([0] * 10**9) | length }}",
    "constants": "{{ 'a' * 1000000000 }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "indent": "{{ ('a\n' * 99999) | indent(99999) }}",
    "tojson": "{{ ([0] * 99999) | tojson(indent=99999) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "expandtabs": "{{ ('\t' * 99999).expandtabs(99999) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'a' * 99999) }}",
    "replace, a filter": "{{ ('a' * 99999) | replace('a', 'a' * 99999) }}",
    "join": "{{ ('a' * 999999).join(['b'] * 99999) }}",
    "join, a filter": "{{ (['b'] * 99999) | join('a' * 999999) }}",
    "join, lazily": "{{ range(99999) | map('string') | join('a' * 999999) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format of a width": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format over and over": "{{ ('{0}' * 99999).format('a' * 999999) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent of a width": "{{ '%*d' % (1000000000, 1) }}",
    "percent, a filter": "{{ '%1000000000d' | format(1) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "doubled by ~": DOUBLED.replace("OP", "x ~ x"),
    "doubled by +": DOUBLED.replace("OP", "x + x"),
    "a list doubled": DOUBLED.replace("'aaaaaaaa'", "[1]").replace("OP", "x + x"),
    "a list of itself": DOUBLED.replace("OP", "[x, x]").replace("x | length", "x"),
    "a list of itself, as JSON": DOUBLED.replace("OP", "[x, x]").replace("x | length", "x | tojson"),
    "recursion": MACRO.replace("BODY", "{{ f(n) }}"),
    "recursion of two": MACRO.replace("BODY", "{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}").replace("200", "60"),
    "a recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a wide recursive loop": "{% for a in 'ab' recursive %}{% for b in range(9) %}{{ loop(range(99999)) }}{% endfor %}"
    "{% endfor %}",
    "a caller": "{% macro f() %}{{ caller() }}{% endmacro %}{% for a in range(99999) %}{% for b in range(99) %}"
    "{% call f() %}" + "x" * 999 + "{% endcall %}{% endfor %}{% endfor %}",
    "text of the template": "{% set x %}{% for a in range(99999) %}" + "x" * 99999 + "{% endfor %}{% endset %}{{ x }}",
    "a macro's text": "{% macro f() %}" + "x" * 99999 + "{% endmacro %}{% set n = namespace(x=[]) %}"
    "{% for a in range(99999) %}{% set n.x = n.x + [f()] %}{% endfor %}",
    "search in a loop": "{% set x = 'a' * 9999999 %}{% for a in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}",
    "slices in a loop": "{% set x = 'a' * 9999999 %}{% for a in range(99999) %}{% set y = x[::-1] %}{% endfor %}",
    "filters in a loop": "{% set x = 'a' * 9999999 %}{% for a in range(99999) %}{% set y = x | upper %}{% endfor %}",
    "lists in a loop": "{% for a in range(99999) %}{% set y = range(99999) | list %}{% endfor %}",
    "chance": "{{ ['a', 'b'] | random }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long template": "{{ 1 }}" * 99999,
    "division": "{{ 1 / 0 }}",
    "a missing key": "{{ '%(a)s' % {} }}",
    "no function": "{{ messages[0].content.nothing() }}",
    "no such index": "{{ messages[9].content | upper }}{{ messages.index(9) }}",
    "syntax": "{% for %}",
    "another file": "{% include '/etc/passwd' %}",
    "the interpreter": "{{ ''.__class__.__mro__ }}{{ self.__init__.__globals__ }}",
    "on real data alone": "{% if messages[0].content == 'hi' %}{{ 'a' * 10**9 }}{% endif %}",
}  # fmt: skip


@pytest.mark.parametrize("end", [PLAIN_TEMPLATE, MARKED_TEMPLATE], ids=["plain", "marked"])
@pytest.mark.parametrize("begin", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_refused_at_once(begin, end, tokenizer):
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    encoder = ChatEncoder(tokenizer, begin + end, template_origin="evil/chat.jinja")
    (bad,) = encoder.encode_records([Conversation(TURNS)])
    assert isinstance(bad, BadRow), "rendered"
    assert bad.fault is Fault.TEMPLATE
    assert "the chat template evil/chat.jinja" in str(bad)
    special_ids(tokenizer, chat_template=begin + end)
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 400 << 10  # KiB


def test_the_tokenizers_own_template_is_named_by_its_directory(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "evil")
    (tmp_path / "evil" / "chat_template.jinja").write_text("{{ 'a' * 10**9 }}")
    hostile = type(tokenizer).from_pretrained(tmp_path / "evil")
    with pytest.raises(BadRow, match=r"the chat template of .*/evil"):
        ChatEncoder(hostile).encode_prompt(TURNS[:1])


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
}
LONG = [{"role": role, "content": f"{role} {n} <b>&\n" * 40} for n in range(30) for role in ("user", "assistant")]
HONEST = (
    TURNS,
    [{"role": "system", "content": " s "}, *TURNS, *TURNS],
    [TURNS[0], CALL, {"role": "tool", "content": "1"}, TURNS[1]],
    LONG,
)


def trl_templates():
    module = pytest.importorskip("trl.chat_template_utils")
    return {name: value for name, value in vars(module).items() if name.endswith("template") and isinstance(value, str)}


@pytest.mark.parametrize("messages", HONEST, ids=["short", "system", "tools", "long"])
def test_honest_templates_render_as_transformers_does(messages, tokenizer):
    """trl's templates of a dozen families among them."""
    from dfactory.data.rendering import render

    same = 0
    dated = [
        name for name, template in trl_templates().items() if "strftime_now" in template
    ]  # the clock is pinned here
    for name, template in {**trl_templates(), "marked": MARKED_TEMPLATE, "plain": PLAIN_TEMPLATE}.items():
        for tools in (None, [TOOL]) if name not in dated else ():
            for more in (False, True):
                options = {"add_generation_prompt": more, "bos_token": "<s>", "eos_token": "</s>"}
                spans = "generation" in template and not more
                try:
                    expected = render_jinja_template(
                        [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=spans, **options
                    )
                except Exception:  # it wants other conversations
                    continue
                options.pop("add_generation_prompt")
                got = render(template, messages, tools, add_generation_prompt=more, spans=spans, variables=options)
                assert (got.text, got.spans) == (expected[0][0], expected[1][0] if spans else []), name
                same += 1
    assert same >= 20


def test_a_conversation_of_four_megabytes_renders(tokenizer):
    messages = [{"role": role, "content": "word " * 8000} for _ in range(50) for role in ("user", "assistant")]
    assert len(ChatEncoder(tokenizer).encode_messages(messages)[0]) > 3_000_000


def test_renderings_in_threads_have_budgets_of_their_own(tokenizer):
    from concurrent.futures import ThreadPoolExecutor

    encoder = ChatEncoder(tokenizer)
    with ThreadPoolExecutor(8) as pool:
        prompts = list(pool.map(lambda n: encoder.encode_prompt([{"role": "user", "content": f"{n}"}]), range(200)))
    assert [tokenizer.decode(ids).split("HUMAN</role>")[1].split("<|role_end")[0] for ids in prompts] == [
        str(n) for n in range(200)
    ]
