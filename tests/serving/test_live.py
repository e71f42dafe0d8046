"""/denoise and the page's files over HTTP, without a browser: events add up to the answer, and who may ask."""

import json
import urllib.request

import pytest

from dfactory.decoding.keys import DecodeKeys
from dfactory.serving.fields import DECODE_FIELDS
from dfactory.serving.pages import Page
from dfactory.serving.pieces import Pieces
from tests.serving.conftest import TOKEN

BODY = {"prompt": "one two three", "max_new_tokens": 20, "threshold": 0.9, "seed": 5}


def events_of(server, body: dict, path: str = "/denoise", known: dict | None = None):
    """The events of a stream, as they come; `known`: headers that show a token."""
    headers = {"Content-Type": "application/json"} | (known or {})
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        for line in response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


def cells_after(events: list[dict]) -> list[list]:
    """[state, text, probability] of each place, as a page puts the events together."""
    cells: list = []
    for event in events:
        cells = (cells + [None] * event["length"])[: event["length"]]
        for place, *cell in event["cells"]:
            cells[place] = cell
    return cells


def test_events_add_up_to_the_answer(server, pipeline):
    encoded = pipeline.vocabulary.encoder.encode_text("one two three")
    answer = pipeline.over({"threshold": 0.9, "max_new_tokens": 20}).generate([encoded])[0]
    opening, *events = events_of(server, BODY)
    assert opening["prompt_tokens"] == len(encoded)
    assert [event["forward"] for event in events] == list(range(1, answer.forwards + 1))
    done = events[-1]["done"]
    assert (done["text"], done["forwards"], done["seed"]) == (answer.text, answer.forwards, 5)
    assert done["history"]["step"] == answer.rollout.commit_step
    cells = cells_after(events)
    assert [round(cell[2], 2) for cell in cells] == pytest.approx(
        [min(1.0, 2.718281828**logprob) for logprob in answer.rollout.commit_logprob], abs=0.006
    )
    assert "".join(text for _, text, _ in cells[: done["output_tokens"]]).replace("·", "") == done["text"]
    written = {place: event["forward"] for event in events for place, state, *_ in event["cells"] if state == "fresh"}
    assert [written[place] - 1 for place in range(len(cells))] == answer.rollout.commit_step
    assert any(state == "masked" for event in events for _, state, *_ in event["cells"])


def test_a_template_is_filled_in(server, pipeline):
    """Over both endpoints and by the Pipeline; the text of the template stands, and is told apart."""
    body = BODY | {"template": ["Monday ", 3, " Friday"]}
    opening, *events = events_of(server, body)
    cells = cells_after(events)
    assert "".join(cells[place][1] for place in opening["given"][: len("Monday ")]).startswith("Monday ")
    assert {cells[place][0] for place in opening["given"]} == {"given"}
    text = events[-1]["done"]["text"]
    assert text.startswith("Monday ")
    assert text.endswith(" Friday")
    assert server.ask("/generate", body).body["text"] == text
    assert pipeline.infill("one two three", body["template"], threshold=0.9).text == text


@pytest.mark.parametrize(
    "template, message",
    [
        ("Monday", "template must be a list of texts"),
        (["a", True], "template must be a list of texts"),
        (["Monday"], "a template without a blank"),
        (["Monday", 1000], "shorten"),
        (["Monday", 10**12, -(10**12)], "shorten"),
        (["Monday", -1], "a blank of -1 tokens"),
        (["a" * 9000, 3], "template has more than 8192 characters"),
    ],
)
def test_templates_that_cannot_be(server, template, message):
    reply = server.ask("/generate", BODY | {"template": template})
    assert reply.status == 400
    assert message in reply.message


def test_the_rules_of_a_running_answer_change(server):
    """One token a forward at first; then all at once."""
    stream = events_of(server, BODY | {"threshold": 1.0, "max_new_tokens": 200})
    opening, first = next(stream), next(stream)
    path = f"/denoise/{opening['id']}"
    assert first["rule"] == "threshold 1"
    refused = server.ask(path, {"max_new_tokens": 3})
    assert (refused.status, refused.message) == (400, "max_new_tokens cannot change during an answer: leave it out")
    refused = server.ask(path, {"temperature": 1e-30})
    assert "temperature 1e-30: it must be 0" in refused.message
    assert server.ask(path, {"threshold": 0.001}).body == {"rule": "threshold 0.001"}
    last = list(stream)[-1]
    assert last["rule"] == "threshold 0.001"
    assert last["done"]["output_tokens"] == 200
    assert last["done"]["forwards"] < 150
    assert server.ask(path, {"threshold": 0.5}).status == 404


def test_a_client_that_leaves_frees_its_slot(server):
    stream = events_of(server, BODY | {"threshold": 1.0, "max_new_tokens": 200})
    next(stream)
    stream.close()
    server.wait_for("dfactory_slots_busy", 0)


def test_the_form_knows_every_key(server):
    about = server.ask("/about").body
    assert [model["name"] for model in about["models"]] == ["small"]
    assert about["models"][0]["keys"]["threshold"] == 0.001
    assert {key["name"] for key in about["keys"]} == set(DECODE_FIELDS)
    by_name = {key["name"]: key for key in about["keys"]}
    assert by_name["threshold"] | {"help": ""} == {
        "name": "threshold",
        "type": "float",
        "optional": False,
        "default": DecodeKeys.threshold,
        "help": "",
        "rules": ["threshold"],
        "choices": [],
        "low": 0.0,
        "high": 1.0,
    }
    assert (by_name["top_k"]["type"], by_name["top_k"]["optional"], by_name["top_k"]["rules"]) == ("int", True, None)
    assert by_name["stop_token_ids"]["type"] == "list"
    renoising = {rule["name"] for rule in about["rules"]} - set(about["models"][0]["rules"])
    assert renoising == {"renoise"}


def test_the_page_asks_nobody_else(server):
    """Its files come with a policy that lets it ask this server only, and name no other."""
    for path in Page("page").paths:
        with urllib.request.urlopen(server.url + path, timeout=60) as response:
            text, headers = response.read().decode(), response.headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "://" not in text
        assert "innerHTML" not in text
        assert " style=" not in text


def test_who_may_ask_and_a_second_model(server, guarded):
    for path in ("/", "/about"):
        assert server.ask(path, headers={"Host": "evil.example"}).status == 403
    assert server.ask("/denoise", BODY, headers={"Content-Type": "text/plain"}).status == 415
    assert server.ask("/denoise?model=other", BODY).status == 404
    with urllib.request.urlopen(guarded.url, timeout=60) as page:
        assert b"<!doctype html>" in page.read()
    assert guarded.ask("/about").status == guarded.ask("/denoise", BODY).status == 401
    known = {"Authorization": f"Bearer {TOKEN}"}
    about = guarded.ask("/about", headers=known)
    assert [model["name"] for model in about.body["models"]] == ["small", "tiny"]
    opening, *_, last = events_of(guarded, BODY, "/denoise?model=tiny", known)
    assert (opening["model"], last["done"]["output_tokens"]) == ("tiny", 20)
    assert guarded.number("dfactory_slots", known) == 2
    assert guarded.ask("/v1/models", headers=known).body["data"][0]["id"] == "small"


def test_a_character_of_several_tokens_stands_at_the_first(pipeline):
    pieces, encode = Pieces(pipeline.vocabulary), pipeline.vocabulary.encoder.encode_text
    ids = encode("a 日本 b")
    texts = pieces.texts(ids)
    assert "".join(texts) == "a 日本 b"
    assert "" in texts
    assert pieces.texts([encode(" b")[0], None, encode("c")[0]])[1] == ""
    assert pieces.texts([pipeline.vocabulary.special.eos]) == ["·"]


def test_edits_are_seen(server):
    """In the cells as they happen, and in the trace with what they replaced."""
    body = BODY | {"threshold": 0.001, "editing_threshold": 0.0, "max_post_steps": 2}
    _, *events = events_of(server, body)
    edits = events[-1]["done"]["history"]["edits"]
    assert edits
    seen = {place for event in events for place, state, *_ in event["cells"] if state == "edited"}
    assert seen == {place for place, *_ in edits}
    place, _, before, after = edits[-1]
    assert before != after
    assert [state for state, *_ in cells_after(events)][place] == "edited"
