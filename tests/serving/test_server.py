"""A real server, asked by OpenAI's own client and by hand: what it answers is what the decoder says alone."""

import http.client
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlparse

import psutil
import pytest

from tests.serving.conftest import serving

openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'dfactory[dev]'")

CHAT = [{"role": "user", "content": "Sort the letters: XRL"}]


def alone(pipeline, prompt_ids: list[int], noise_id: int = 0, **keys):
    """(text, rollout) of the same decoding without a server."""
    (answer,) = pipeline.generate([prompt_ids], noise_ids=[noise_id], **keys)
    return answer.text, answer.rollout


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_generate(server, pipeline):
    text, rollout = alone(pipeline, pipeline.vocabulary.encoder.encode_text("one two three"), max_new_tokens=20)
    reply = server.ask("/generate", {"prompt": "one two three", "max_new_tokens": 20, "seed": 5})
    assert reply.status == 200
    assert reply.body == {
        "text": text,
        "output_ids": rollout.output_ids,
        "finish_reason": rollout.finish_reason.value,
        "prompt_tokens": len(rollout.prompt_ids),
        "output_tokens": 20,
        "forwards": rollout.forwards,
        "tokens_per_forward": rollout.tokens_per_forward,
        "seed": 5,
    }
    ids = server.ask("/generate", {"prompt_ids": rollout.prompt_ids, "max_new_tokens": 20, "threshold": 1.0})
    assert ids.body["forwards"] >= 20  # one token a forward


def test_openai_chat(client, pipeline):
    text, rollout = alone(pipeline, pipeline.vocabulary.encoder.encode_prompt(CHAT), max_new_tokens=24)
    answer = client.chat.completions.create(model="small", messages=CHAT, max_tokens=24, temperature=0)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(rollout.prompt_ids), 24)
    assert answer.usage.forwards == rollout.forwards
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "dfactory"


def test_openai_chat_streams_by_block(client, pipeline):
    prompt = pipeline.vocabulary.encoder.encode_prompt(CHAT)
    text, _ = alone(pipeline, prompt, max_new_tokens=40)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model="small", messages=CHAT, max_tokens=40, **options))
    parts = [chunk.choices[0].delta.content for chunk in chunks[:-2]]
    assert "".join(parts) == text
    assert 3 <= len(parts) <= 6  # 40 tokens in blocks of 8
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * len(parts) + ["length"]
    assert chunks[-1].usage.completion_tokens == 40


def test_openai_completions(client, pipeline):
    """Several prompts, several answers each, text or ids; a sampled answer depends on its seed and its number only."""
    encode = pipeline.vocabulary.encoder.encode_text
    sampled = {"max_new_tokens": 16, "temperature": 1.0, "seed": 3}
    ask = {"model": "small", "max_tokens": 16, "temperature": 1.0, "seed": 3}
    both = client.completions.create(prompt=["a b", "c"], n=2, **ask)
    expected = [alone(pipeline, encode(prompt), noise, **sampled)[0] for prompt in ("a b", "c") for noise in (0, 1)]
    assert [choice.text for choice in both.choices] == expected
    assert both.usage.prompt_tokens == len(encode("a b")) + len(encode("c"))
    assert client.completions.create(prompt=[encode("c"), encode("a b")], **ask).choices[1].text == expected[0]
    assert client.completions.create(prompt=encode("c"), **ask).choices[0].text == expected[2]
    loose = {"model": "small", "max_tokens": 16, "temperature": 1.0, "prompt": "c"}
    assert len({client.completions.create(**loose).choices[0].text for _ in range(3)}) > 1
    decoded = client.completions.create(prompt="c", extra_body={"threshold": 1.0}, model="small", max_tokens=16)
    assert decoded.usage.forwards == decoded.usage.completion_tokens + -(16 + len(encode("c"))) % 8


def test_stop_texts_end_an_answer(client, server, pipeline):
    text, _ = alone(pipeline, pipeline.vocabulary.encoder.encode_text("go"), max_new_tokens=40)
    stop = text[12:15]
    expected = text[: text.index(stop)]
    whole = client.completions.create(model="small", prompt="go", max_tokens=40, stop=[stop, "never there"])
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "stop")
    chunks = client.completions.create(model="small", prompt="go", max_tokens=40, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    server.wait_for("dfactory_slots_busy", 0)


def test_answers_that_are_decoded_together_are_those_of_each_alone(server, pipeline):
    """Nine requests with rules of their own, in three slots."""
    bodies = [
        {"prompt": "word " * (i + 1), "max_new_tokens": 10 + 5 * i, "threshold": 0.001 if i % 2 else 0.5}
        | ({"temperature": 1.0, "seed": i} if i % 3 == 0 else {})
        for i in range(9)
    ]
    before = server.number("dfactory_forwards_total")
    with ThreadPoolExecutor(9) as pool:
        replies = list(pool.map(lambda body: server.ask("/generate", body), bodies))
    for body, reply in zip(bodies, replies, strict=True):
        keys = {name: value for name, value in body.items() if name != "prompt"}
        text, rollout = alone(pipeline, pipeline.vocabulary.encoder.encode_text(body["prompt"]), **keys)
        assert (reply.body["text"], reply.body["forwards"]) == (text, rollout.forwards)
    assert server.number("dfactory_forwards_total") - before < sum(reply.body["forwards"] for reply in replies)


def test_openai_client_hears_errors(client):
    with pytest.raises(openai.NotFoundError, match="there is no model other: this server has small"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="logprobs 1 is not supported: a block-diffusion model"):
        client.completions.create(model="small", prompt="x", logprobs=1)
    with pytest.raises(openai.BadRequestError, match=r"unknown field treshold: did you mean threshold\?"):
        client.completions.create(model="small", prompt="x", extra_body={"treshold": 1})
    with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        client.completions.create(model="small", prompt="x", max_tokens=300)


@pytest.mark.parametrize(
    "path, body, headers, status, message",
    [
        ("/generate", "{", {}, 400, "the body is not JSON"),
        ("/generate", {"prompt": "x"}, {"Content-Type": "text/plain"}, 415, "application/json"),
        ("/generate", {"prompt": "x"}, {"Host": "evil.example"}, 403, "not this machine's own name"),
        ("/generate", None, {}, 405, "Method Not Allowed"),
        ("/nowhere", None, {}, 404, "Not Found"),
        ("/generate", '"' + "x" * (9 * 2**20) + '"', {}, 413, "Request Entity Too Large"),
    ],
)
def test_requests_that_are_refused(server, path, body, headers, status, message):
    reply = server.ask(path, body, headers)
    assert (reply.status, message in reply.message) == (status, True), reply


def test_a_client_that_hangs_up_frees_its_slot(server):
    given_up = server.number("dfactory_given_up_total")
    for stream in (False, True):
        connection = http.client.HTTPConnection(urlparse(server.url).netloc, timeout=60)
        body = f'{{"prompt": "x", "max_new_tokens": 240, "threshold": 1.0, "stream": {str(stream).lower()}}}'
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        server.wait_for("dfactory_slots_busy", 1)
        connection.sock.close()
        connection.close()
        server.wait_for("dfactory_slots_busy", 0)
    assert server.number("dfactory_given_up_total") == given_up + 2
    assert server.number('dfactory_requests_total{route="/generate",status="499"}') == 2
    assert "Traceback" not in server.log.read_text()


# --- servers of their own ----------------------------------------------------------------------------------------------

LONG = {"prompt": "x", "max_new_tokens": 1990, "threshold": 1.0}  # seconds of decoding


@pytest.mark.slow
def test_a_full_queue_a_timeout_and_draining(tmp_path):
    words = ("--max-queue", "1", "--request-timeout", "3", "--drain-timeout", "90")
    with serving(tmp_path, *words, batch_size=1) as server, ThreadPoolExecutor(2) as pool:
        held = pool.submit(server.ask, "/generate", LONG)
        server.wait_for("dfactory_slots_busy", 1)
        waits = pool.submit(server.ask, "/generate", LONG)
        server.wait_for("dfactory_waiting", 1)
        refused = server.ask("/generate", {"prompt": "x"})
        assert refused.status == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert "1 requests are waiting already" in refused.message
        assert [reply.result().status for reply in (held, waits)] == [504, 504]
        assert "no answer within 3 s" in held.result().message
        server.wait_for("dfactory_slots_busy", 0)

        last = pool.submit(server.ask, "/generate", {"prompt": "x", "max_new_tokens": 50, "threshold": 1.0})
        late = []
        asking = threading.Thread(target=lambda: late.append(ask_until_it_drains(server)))
        asking.start()
        server.wait_for("dfactory_slots_busy", 1)
        server.process.send_signal(signal.SIGTERM)
        assert last.result().status == 200
        assert last.result().body["output_tokens"] == 50
        assert server.process.wait(60) == 0
        asking.join(60)
        assert late == [503]
        assert "draining: 1 running, 0 waiting" in server.log.read_text()


def ask_until_it_drains(server) -> int | None:
    """The first status of /health that is not 200, as long as somebody answers."""
    while True:
        try:
            status = server.ask("/health").status
        except OSError:
            return None
        if status != 200:
            return status
        time.sleep(0.005)


def test_it_listens_on_this_machine_only_and_knows_no_files(server):
    listening = psutil.Process(server.process.pid).net_connections("inet")
    assert {one.laddr.ip for one in listening if not one.raddr} == {"127.0.0.1"}
    paths = ("/../../../etc/passwd", "//etc/passwd", "/v1/models/..%2F..%2Fetc%2Fpasswd", "/v1/models/%2e%2e/%2e%2e/x")
    for path in (*paths, "/static/x", "/v1/models/small%00"):
        assert server.ask(path).status == 404, path
    for name in ("../small", "/etc", "small/../small", "~"):
        body = {"model": name, "messages": CHAT}
        assert server.ask("/v1/chat/completions", body).status == 404, name


@pytest.mark.slow
def test_a_token(tmp_path):
    """Bound to every address, with a token that neither the log nor an answer tells."""
    token = "correct-horse-battery-staple"
    body = {"prompt": "x", "max_new_tokens": 8}
    with serving(tmp_path, "--host", "0.0.0.0", token=token) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {token}"}):
            refused = server.ask("/generate", body, headers)
            assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert token not in str(refused)
        assert server.ask("/metrics").status == 401
        assert server.ask("/health").body == {"status": "ok"}
        assert server.ask("/generate", body, {"Authorization": f"Bearer {token}"}).status == 200
        assert server.number("dfactory_answers_total", {"Authorization": f"Bearer {token}"}) == 1
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=token, max_retries=0) as client:
            assert client.completions.create(model="small", prompt="x", max_tokens=8).choices[0].finish_reason
        stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert token not in server.log.read_text()
