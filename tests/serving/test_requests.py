"""Bodies that are refused, each with what is wrong and what to do; options of the server that are."""

import asyncio
import dataclasses
import json
import socket
from types import SimpleNamespace

import pytest

from dfactory.cli import main
from dfactory.errors import ConfigError, DataError
from dfactory.serving.answers import Answer, News, ProgressQueue, overlap
from dfactory.serving.requests import Reader
from dfactory.types import FinishReason
from dfactory.vocabulary import Vocabulary
from tests.serving.conftest import MODEL


@pytest.fixture(scope="module")
def reader(pipeline) -> Reader:
    return Reader("small", pipeline, longest=100)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prompt": None}, "no prompt: give one of prompt, messages, prompt_ids"),
        ({"prompt_ids": [1]}, "prompt and prompt_ids: give one of"),
        ({"prompt": 3}, "prompt is int 3: it must be text"),
        ({"prompt": ""}, "prompt 0 is empty"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"prompt": None, "prompt_ids": [1.5]}, "prompt_ids must be a list of integers"),
        ({"prompt": None, "prompt_ids": [True]}, "prompt_ids must be a list of integers"),
        ({"prompt": None, "prompt_ids": [2048]}, "prompt 0 holds ids outside the model's vocabulary of 2048"),
        ({"prompt": None, "prompt_ids": [10**30]}, "prompt 0 holds ids outside"),
        ({"prompt": None, "messages": "hi"}, "messages"),
        ({"prompt": None, "messages": [{"role": "boss", "content": "x"}]}, r"messages\[0\].role is str 'boss'"),
        ({"prompt": None, "messages": [{"role": "assistant", "content": "x"}]}, "a turn is answered, not continued"),
        ({"max_new_tokns": 5}, r"unknown field max_new_tokns: did you mean max_new_tokens\?"),
        ({"block_size": 4}, "unknown field block_size"),
        ({"max_new_tokens": "5"}, "max_new_tokens in the request: it must be int, is str"),
        ({"max_new_tokens": True}, "max_new_tokens in the request: it must be int, is bool"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 in the request: it must be at least 1"),
        ({"max_new_tokens": 101}, "the server takes 100 together: lower max_new_tokens to"),
        ({"prompt": "word " * 200}, "the server takes 100 tokens for prompt and answer"),
        ({"threshold": 2}, "threshold 2 in the request: it must be at most 1"),
        ({"temperature": 1e-30}, "temperature 1e-30: it must be 0, or 0.01 to 100"),
        ({"temperature": 1e999}, "not a JSON value|temperature inf"),
        ({"seed": 2**64}, "seed 18446744073709551616 in the request: it must be at most"),
        ({"acceptance": "${oc.env:HOME}"}, r"acceptance \$\{oc.env:HOME\} in the request: it must be one of"),
        ({"rule": "entropy"}, r"rule entropy in the request: .* did you mean entropy_bound\?"),
        ({"rule": "entropy_bound", "steps": 4}, r"steps in the request belongs to decode\.rule threshold, and this is"),
        ({"steps": 99}, "steps 99 > block_size 8.* in the request"),
        ({"stop": [""]}, "stop must be text"),
        ({"stop": 5}, "stop must be text"),
        ({"stream": "yes"}, "stream is str: it must be bool"),
        ({"model": "other"}, "there is no model other"),
    ],
    ids=str,
)
def test_what_generate_refuses(reader, fields, message):
    with pytest.raises((DataError, ConfigError), match=message):
        reader.native(json.dumps({"prompt": "x"} | fields).encode())


def test_a_request_has_a_rule_of_its_own(reader):
    """Whatever the keys of the server's rule are."""
    body = {"prompt": "x", "rule": "entropy_bound", "entropy_bound": 0.5}
    assert reader.native(json.dumps(body).encode()).rules.rule.shown == "entropy_bound 0.5"
    assert reader.completions(json.dumps(body).encode()).rules.rule.shown == "entropy_bound 0.5"


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"7", b'{"prompt": NaN}', b"\xff\xfe", b"[" * 100_000], ids=range(7)
)
def test_what_is_no_body(reader, text):
    with pytest.raises(DataError, match="the body is"):
        reader.native(text)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": []}, "prompt 0 is empty"),
        ({"prompt": ["a", 5]}, "prompt must be a list of integers"),
        ({"n": 200}, "1 prompts with n 200: a request has 1 to 128 answers"),
        ({"n": 0}, "with n 0"),
        ({"echo": True}, "echo True is not supported: a block-diffusion model has no left-to-right probability"),
        ({"logprobs": 1}, "dfactory eval --elbo-pairs"),
        ({"presence_penalty": 0.5}, "there are no penalties"),
        ({"max_tokens": 5, "max_new_tokens": 6}, "max_tokens 5 and another limit 6: give one"),
        ({"stream_options": 3}, "stream_options is int"),
    ],
    ids=str,
)
def test_what_completions_refuses(reader, fields, message):
    with pytest.raises(DataError, match=message):
        reader.completions(json.dumps({"prompt": "x"} | fields).encode())


def test_what_asks_for_nothing_is_taken(reader):
    body = {"prompt": "x", "logprobs": None, "echo": False, "best_of": 1, "presence_penalty": 0, "user": "me"}
    plain = reader.completions(json.dumps(body | {"seed": 1, "logit_bias": {}}).encode())
    assert plain == reader.completions(b'{"prompt": "x", "seed": 1, "n": null}')
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "tool_choice": "auto"}
    assert reader.chat(json.dumps(chat).encode()).prompts == [
        reader.vocabulary.encoder.encode_prompt([{"role": "user", "content": "hi"}])
    ]


def test_an_answer_has_the_room_that_is_left(reader):
    """100 tokens in blocks of 8 are 96; 40 is what the server decodes unless told otherwise."""
    assert reader.native(b'{"prompt": "x"}').rules.max_new_tokens == 40
    prompt = [5] * 90
    assert reader.native(json.dumps({"prompt_ids": prompt}).encode()).rules.max_new_tokens == 6
    with pytest.raises(DataError, match="lower max_new_tokens to 6"):
        reader.native(json.dumps({"prompt_ids": prompt, "max_new_tokens": 7}).encode())


class Letters:
    """A vocabulary of letters; 9 is half a character."""

    beginning = Vocabulary.beginning

    def text(self, ids: list[int]) -> str:
        return "".join("\ufffd" if token == 9 else chr(97 + token) for token in ids)


def news(added: list[int], whole: list[int] | None = None) -> News:
    rollout = SimpleNamespace(output_ids=whole, finish_reason=FinishReason.LENGTH) if whole is not None else None
    return News(1, added, rollout)


def test_text_leaves_when_it_is_sure():
    answer = Answer(Letters(), ("cd", "xyz"), 1)
    steps = [news([0, 1]), news([2]), news([4, 9])]
    assert [answer.add(step) for step in steps] == ["ab", "", "ce"]
    assert answer.add(news([], [0, 1, 2, 4, 9, 23])) == "\ufffdx"
    assert answer.finish_reason == "length"


def test_a_stop_text_ends_an_answer_where_it_begins():
    answer = Answer(Letters(), ("cd", "d"), 1)
    assert answer.add(news([0, 1, 2])) == "ab"
    assert answer.add(news([3, 4])) == ""
    assert (answer.text, answer.finish_reason) == ("ab", "stop")


def test_what_a_stop_text_begins_with_is_held_back_whatever_their_lengths():
    for text, stop in (("aaab", "aab"), ("aaa", "aab"), ("a", "ab" * 500), ("abab", "ababc"), ("x", "y"), ("", "ab")):
        expected = max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        assert overlap(text, stop) == expected, (text, stop)


def test_news_leave_out_what_finishes_no_block():
    """Of four forwards two finish a block of two; a request that wants whole answers gets only the last one."""

    async def collect(by_block: bool) -> list[News]:
        queue = ProgressQueue(1, by_block=by_block)
        for ids, settled in (([5], 0), ([5, 6], 2), ([5, 6, 7], 2), ([5, 6, 7, 8], 4)):
            rollout = SimpleNamespace(output_ids=ids) if settled == 4 else None
            queue.report(0, SimpleNamespace(forwards=len(ids), token_ids=ids, settled=settled, rollout=rollout))
        return [(await queue.next())[1] for _ in range(1 + by_block)]

    blocks = asyncio.run(collect(by_block=True))
    assert [(part.forwards, part.added_ids) for part in blocks] == [(2, [5, 6]), (4, [7, 8])]
    (last,) = asyncio.run(collect(by_block=False))
    assert (last.forwards, last.rollout.output_ids) == (4, [5, 6, 7, 8])


# --- options of the server ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: set DFACTORY_SERVE_TOKEN or --token-file"),
        (["--token-file", "nowhere"], "--token-file nowhere does not exist"),
        (["--max-length", "4"], "--max-length 4: it must be from 8, one block, to 2048"),
        (["--max-length", "9999"], "--max-length 9999"),
        (["decode.treshold=1"], "did you mean threshold?"),
    ],
)
def test_options_that_cannot_be(capsys, monkeypatch, words, message):
    monkeypatch.delenv("DFACTORY_SERVE_TOKEN", raising=False)
    assert main(["serve", *MODEL, "--port", "0", "decode.block_size=8", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("token", ["", "short", "with a space in it, long", "umlaut-ä-and-long-enough"])
def test_tokens_that_cannot_be(tmp_path, capsys, token):
    (tmp_path / "token").write_text(token)
    assert main(["serve", *MODEL, "--token-file", str(tmp_path / "token")]) == 2
    told = capsys.readouterr().err
    assert "a token has at least 16 printable ASCII characters" in told
    assert not token or token not in told


def test_a_port_that_is_taken(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", *MODEL, "--port", str(port), "decode.block_size=8"]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}" in capsys.readouterr().err


def test_keys_of_a_request_lie_over_those_of_the_server(reader):
    rules = reader.native(b'{"prompt": "x", "threshold": 0.7, "editing_threshold": 0.5, "seed": 4}').rules
    keys = dataclasses.replace(reader.pipeline.keys, threshold=0.7, editing_threshold=0.5, seed=4)
    assert rules == reader.vocabulary.rules(keys)


@pytest.mark.parametrize("words", [["--port", "70000"], ["--request-timeout", "nan"], ["--drain-timeout", "-1"]])
def test_numbers_that_cannot_be(words):
    with pytest.raises(SystemExit) as ended:
        main(["serve", *MODEL, *words])
    assert ended.value.code == 2
