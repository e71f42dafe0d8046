"""The page in a real browser: chat, player, heat map, side by side, templates, keyboard, phone; it asks nobody else."""

import json

import pytest

from dfactory.serving.pages import Page
from tests.browser import PHONE, browsing, tab
from tests.commands.test_browser import HALF, TEXTS
from tests.serving.conftest import TOKEN

NAMELESS = """() => [...document.querySelectorAll('input, select, textarea, button')]
    .filter(e => !e.labels?.length && !e.getAttribute('aria-label') && !e.textContent.trim()).map(e => e.outerHTML)"""
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser():
    with browsing() as browser:
        yield browser


def ask(page, question: str, answers: int = 1) -> None:
    """Ask, and wait until so many answers of the page are complete."""
    page.get_by_label("Question").fill(question)
    page.keyboard.press("Enter")
    page.locator(".player:visible").nth(answers - 1).wait_for()
    page.locator("#send:enabled").wait_for()


def test_chat_player_heat_map_and_keyboard(server, browser):
    with tab(browser, server.url) as (page, said, asked):
        page.get_by_label("threshold", exact=True).fill("0.9")
        page.get_by_label("max_new_tokens").fill("24")
        page.get_by_label("max_new_tokens").blur()
        ask(page, "hello")
        answer = page.get_by_role("article", name="small, threshold 0.9")
        forwards = int(answer.get_by_role("slider", name="forward").get_attribute("max"))
        assert forwards > 2
        assert answer.locator(".numbers").inner_text().startswith(f"forward {forwards}, 24 tokens, ")
        assert "a second, threshold 0.9" in answer.locator(".numbers").inner_text()
        written = answer.locator(".tokens").inner_text()

        answer.get_by_role("button", name="One forward back").click()
        assert answer.locator(".masked").count() + answer.locator(".drafted").count() > 0
        answer.get_by_role("button", name="Play").click()
        answer.locator(f".numbers:has-text('forward {forwards}, ')").wait_for()
        assert answer.locator(".tokens").inner_text() == written

        page.get_by_label("Show tokens by").select_option("order")
        numbers = [int(one.get_attribute("data-number")) for one in answer.locator(".t[data-number]").all()]
        assert (min(numbers), max(numbers), len(numbers) >= 24) == (1, forwards, True)
        page.get_by_label("Show tokens by").select_option("confidence")
        assert all(0 <= int(one.get_attribute("data-number")) <= 100 for one in answer.locator(".t[data-number]").all())

        answer.get_by_role("group", name="small, threshold 0.9").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        about = page.evaluate("() => document.activeElement.getAttribute('aria-label')")
        assert about.startswith("token 2 of ")
        assert "probability" in about
        assert answer.get_by_role("status").inner_text() == about
        assert "24 tokens in" in page.locator("#announced").inner_text()
        assert said == []
        paths = {address.removeprefix(server.url).partition("?")[0] for address in asked}
        assert paths == Page("page").paths | {"/about", "/denoise"}


def test_side_by_side_templates_and_stop_on_a_phone(server, browser):
    with tab(browser, server.url, viewport=PHONE) as (page, said, _):
        page.get_by_label("Compare two").check()
        right = page.get_by_role("group", name="Decoding Right")
        right.get_by_label("Decoding rule").select_option("left_to_right")
        assert right.get_by_label("tokens_per_step").input_value() == "1"
        page.get_by_label("Fill in a template").check()
        page.get_by_label("Template of the answer").fill("Monday ")
        page.get_by_role("button", name="Insert a blank").click()
        page.keyboard.type(" Friday")
        ask(page, "hello", answers=2)
        for answer in page.get_by_role("article").all():
            text = "".join(answer.locator(".t:not(.after)").all_inner_texts())
            assert text.startswith("Monday ")
            assert text.removesuffix("·").endswith(" Friday")
            assert answer.locator(".given").count() > 2
        assert "left_to_right 1" in page.get_by_role("article").nth(1).inner_text()
        assert page.evaluate(NAMELESS) == []
        assert page.evaluate(OVERFLOW) == 0

        page.get_by_label("Chat").check()
        page.get_by_label("Wait after each forward").fill("5")
        page.get_by_label("Question").fill("again")
        page.keyboard.press("Enter")
        page.locator(".turn").nth(1).locator(".t").first.wait_for()
        page.keyboard.press("Escape")
        page.locator("#send:enabled").wait_for()
        assert page.locator(".turn").nth(1).locator(".numbers").first.inner_text() == "stopped"
        server.wait_for("dfactory_slots_busy", 0)
        assert said == []


def test_nothing_of_a_model_runs_on_the_page(server, browser, tmp_path):
    """Each text as a token of a trace that is opened, and as its title."""
    texts = [text for text in TEXTS if HALF not in text]
    cells = [[place, "committed", text, 0.5] for place, text in enumerate(texts)]
    done = {"text": "", "output_tokens": 9, "forwards": 1, "finish_reason": texts[0], "seed": texts[1]}
    history = {"edits": [], "step": [0] * len(texts)}
    event = {"forward": 1, "tokens": 1, "seconds": 1, "rule": texts[0], "length": len(texts), "cells": cells}
    file = tmp_path / "trace.json"
    file.write_text(
        json.dumps({"turn": texts[0], "title": texts[1], "events": [event | {"done": done | {"history": history}}]})
    )
    with tab(browser, server.url) as (page, said, _):
        page.get_by_label("Open a trace").set_input_files(file)
        page.get_by_role("button", name="One forward on").click()
        page.locator(".turn .t").nth(3).hover()
        assert page.locator(".turn .t").count() == len(texts)
        assert page.evaluate("() => document.documentElement.hasAttribute('data-ran')") is False
        assert page.locator(".turn script, .turn img, .turn svg, .turn iframe").count() == 0
        broken = tmp_path / "broken.json"
        broken.write_text('{"turn": 3}')
        page.get_by_label("Open a trace").set_input_files(broken)
        assert "broken.json: this file is no trace" in page.get_by_role("alert").inner_text()
        assert said == []


def test_two_models_of_a_server_that_asks_for_a_token(guarded, browser):
    with tab(browser, guarded.url) as (page, _, _):
        page.get_by_role("textbox", name="Token").fill(TOKEN[::-1])
        page.keyboard.press("Enter")
        page.get_by_text("This token is not the server's.").wait_for()
        page.get_by_role("textbox", name="Token").fill(TOKEN)
        page.keyboard.press("Enter")
        page.get_by_label("Compare two").check()
        ask(page, "hello", answers=2)
        assert "16 tokens" in page.get_by_role("article", name="small, threshold 0.001").inner_text()
        assert "16 tokens" in page.get_by_role("article", name="tiny, threshold 0.001").inner_text()
