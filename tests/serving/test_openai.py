"""What OpenAI's own client and its users send: the streaming helper, fields that ask for nothing, histories as they come
back from an earlier answer. A field that would change the answer is refused by its name.
"""

import json

import pytest

from dfactory.data.chat import ChatEncoder
from dfactory.errors import ConfigError, DataError
from dfactory.inference import Pipeline
from dfactory.serving.requests import Reader

openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'dfactory[dev]'")

CHAT = [{"role": "user", "content": "Sort the letters: XRL"}]
ASK = {"model": "small", "messages": CHAT, "max_tokens": 24}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def reader(pipeline) -> Reader:
    return Reader("small", pipeline, longest=200)


def test_the_streaming_helper_builds_the_whole_answer(client):
    sampled = ASK | {"n": 2, "temperature": 1.0, "seed": 3}
    ends = [choice.message.content[12:15] for choice in client.chat.completions.create(**sampled).choices]
    whole = client.chat.completions.create(**sampled, stop=ends)
    with client.chat.completions.stream(**sampled, stop=ends, stream_options={"include_usage": True}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert [choice.message.role for choice in final.choices] == ["assistant", "assistant"]
    assert [choice.message.content for choice in final.choices] == [choice.message.content for choice in whole.choices]
    assert [choice.finish_reason for choice in final.choices] == ["stop", "stop"]
    assert final.usage == whole.usage
    assert kinds.count("content.done") == 2


def test_the_role_is_said_once_and_every_chunk_but_the_last_has_no_usage(client):
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    assert deltas[-1].content is None  # the last one says why it ends, and nothing else
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(deltas) - 1) + ["length"]
    plain = list(client.chat.completions.create(**ASK, stream=True))
    assert not any("usage" in chunk.model_fields_set for chunk in plain)


HARMLESS = {
    "metadata": {"team": "a"},
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {"mode": "auto"},
    "safety_identifier": "abc",
    "user": "me",
    "store": True,
    "parallel_tool_calls": False,
    "modalities": ["text"],
    "prediction": {"type": "content", "content": "maybe this"},
    "verbosity": "medium",
    "reasoning_effort": "none",
    "response_format": {"type": "text"},
    "tool_choice": "none",
    "tools": [],
    "functions": [],
    "function_call": "none",
    "logprobs": False,
    "logit_bias": {},
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "add_generation_prompt": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "chat_template_kwargs": {"enable_thinking": False},
    "stop": [],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_field_that_asks_for_nothing_changes_nothing(reader, name):
    body = {"messages": CHAT, "seed": 1}
    plain = reader.chat(json.dumps(body).encode())
    given = reader.chat(json.dumps(body | {name: HARMLESS[name]}).encode())
    assert (given.prompts, given.rules, given.stop) == (plain.prompts, plain.rules, plain.stop)
    assert reader.chat(json.dumps(body | {name: None}).encode()) == plain


def test_null_is_as_if_left_out_whatever_its_name(reader):
    plain = reader.chat(json.dumps({"messages": CHAT, "seed": 1}).encode())
    assert reader.chat(json.dumps({"messages": CHAT, "seed": 1, "something_new": None}).encode()) == plain


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("modalities", ["text", "audio"], "answers are text"),
        ("audio", {"voice": "alloy", "format": "wav"}, "answers are text"),
        ("verbosity", "low", "verbosity low is not supported"),
        ("reasoning_effort", "high", "reasoning_effort high is not supported"),
        ("response_format", {"type": "json_object"}, "answers are plain text"),
        ("tool_choice", "required", "calls come back as text"),
        ("functions", [{"name": "f"}], "give tools"),
        ("web_search_options", {}, "web_search_options"),
        ("moderation", {"model": "m"}, "moderation"),
        ("repetition_penalty", 1.1, "there are no penalties"),
        ("min_p", 0.1, "min_p 0.1 is not supported"),
        ("ignore_eos", True, "ignore_eos True is not supported"),
        ("logit_bias", {"5": -100}, "there are no biases"),
        ("stream_options", {"include_usge": True}, "stream_options.include_usge"),
        ("chat_template_kwargs", {"enable_thinking": True}, "the chat template does not read enable_thinking"),
        ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs.messages"),
        ("chat_template_kwargs", {"bos_token": "x"}, "chat_template_kwargs.bos_token"),
        ("something_new", 1, "unknown field something_new"),
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_by_name(reader, name, value, message):
    with pytest.raises(DataError, match=message):
        reader.chat(json.dumps({"messages": CHAT, name: value}).encode())


def test_the_client_sends_all_of_it(client):
    """Not only our reader: the client's own fields, over HTTP."""
    plain = client.chat.completions.create(**ASK).choices[0].message.content
    own = {
        name: HARMLESS[name] for name in ("metadata", "service_tier", "prompt_cache_key", "safety_identifier", "store")
    }
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    assert client.chat.completions.create(**ASK, **own, extra_body=extra).choices[0].message.content == plain
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        client.chat.completions.create(**ASK, reasoning_effort="high")


def test_the_developer_is_the_system(reader):
    turns = [{"role": "developer", "content": "Be brief."}, *CHAT]
    system = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert reader.chat(json.dumps({"messages": turns}).encode()).prompts == (
        reader.chat(json.dumps({"messages": system}).encode()).prompts
    )


@pytest.mark.parametrize("content", ["", "  ", None])
def test_an_empty_answer_may_stand_in_the_history(reader, content):
    history = [*CHAT, {"role": "assistant", "content": content}, {"role": "user", "content": "again"}]
    (prompt,) = reader.chat(json.dumps({"messages": history}).encode()).prompts
    texts = [CHAT[0]["content"], content or "", "again"]
    roles = ("HUMAN", "ASSISTANT", "HUMAN")
    turns = "".join(f"<role>{role}</role>{text}<|role_end|>" for role, text in zip(roles, texts, strict=True))
    assert reader.vocabulary.tokenizer.decode(prompt) == f"{turns}<role>ASSISTANT</role>"


def test_an_answer_goes_back_as_it_came(client):
    message = client.chat.completions.create(**ASK).choices[0].message
    for back in (message, message.model_dump()):  # nulls and all
        again = client.chat.completions.create(
            model="small", messages=[*CHAT, back, {"role": "user", "content": "more"}], max_tokens=8
        )
        assert again.usage.completion_tokens == 8


def test_temperatures_next_to_zero_are_greedy(client, reader):
    greedy = client.chat.completions.create(**ASK, temperature=0)
    for temperature in (0.001, 1e-8):
        answer = client.chat.completions.create(**ASK, temperature=temperature)
        assert answer.choices[0].message.content == greedy.choices[0].message.content
        assert answer.usage.forwards == greedy.usage.forwards
    with pytest.raises(DataError, match=r"temperature 1e\+30: it must be 0, or 0.01 to 100"):
        reader.chat(json.dumps({"messages": CHAT, "temperature": 1e30}).encode())
    with pytest.raises(ConfigError, match="temperature -1"):
        reader.chat(json.dumps({"messages": CHAT, "temperature": -1}).encode())


def test_a_negative_seed_is_a_seed(reader):
    seeds = {reader.chat(json.dumps({"messages": CHAT, "seed": seed}).encode()).rules.seed for seed in (-1, -2, 0, 1)}
    assert len(seeds) == 4


def test_what_the_template_reads_is_given_to_it(pipeline):
    template = pipeline.vocabulary.tokenizer.chat_template + "{{- 'thinking' if enable_thinking else 'plain' -}}"
    encoder = ChatEncoder(pipeline.vocabulary.tokenizer, template, pipeline.vocabulary.special)
    vocabulary = pipeline.vocabulary._replace(encoder=encoder)
    reader = Reader("small", Pipeline.of(pipeline.policy, vocabulary, pipeline.keys), longest=200)
    ends = {True: "thinking", False: "plain"}
    for value, end in ends.items():
        for read in (reader.chat, reader.native):
            body = {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": value}}
            (prompt,) = read(json.dumps(body).encode()).prompts
            assert pipeline.vocabulary.tokenizer.decode(prompt).endswith(f"</role>{end}")
