"""What a person does on the chat page, done in headless Chromium: compare doses, vote blind, look back, take the record home.

The model is tiny and random; what the page shows is compared with the forward-hook model's own replies and projections.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import window_on

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.xdist_group("browser")]

PROMPT = "Will you miss me?"
STEERED = (0, 2)  # panels at λ = -1 and +1
# All that the page holds but the model's own words, of which a random model's may be anything, and the list of keys.
WITHOUT_REPLIES = """() => {
  const body = document.body.cloneNode(true);
  body.querySelectorAll("script, .text, #status, #keys, #settings").forEach((one) => one.remove());
  return body.innerHTML;
}"""


@pytest.fixture(scope="module")
def model(random_causal_lm: Any, byte_tokenizer: Any) -> Any:
    """The forward-hook model, on weights of its own that equal the engine's."""
    from relseek_resources.models import SteeredModel

    return SteeredModel(random_causal_lm("llama"), byte_tokenizer)


@pytest.fixture(scope="module")
def engine(random_causal_lm: Any, byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from relseek_resources.models import SteeredModel
    from relseek_resources.serving.engine import Engine
    from tests.serving.sockets import two_vectors

    found = Engine(SteeredModel(random_causal_lm("llama"), byte_tokenizer), two_vectors(tmp_path_factory.mktemp("vectors")), name="tiny")
    yield found
    found.close()


@pytest.fixture(scope="module")
def url(engine: Any) -> Iterator[str]:
    from relseek_resources.serving import chat
    from relseek_resources.serving.guard import Settings
    from relseek_resources.serving.server import create_app
    from tests.serving.sockets import listening

    with listening(create_app(engine, Settings(rate=0), chat.routes())) as found:
        yield found


class Chat:
    """The page in a window of its own, with the settings that make replies short and sure."""

    def __init__(self, page: Any, url: str, *, tokens: int = 24) -> None:
        from playwright.sync_api import expect

        self.page, self.expect = page, expect
        self.faults: list[str] = []
        page.on("console", lambda message: self.faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.goto(url)
        expect(page.locator(".panel")).to_have_count(3)
        page.click("#settings-button")
        page.fill("#temperature", "0")
        page.fill("#max-tokens", str(tokens))
        page.click("#settings-button")

    def say(self, text: str = PROMPT, *, wait: bool = True) -> None:
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")
        if wait:
            self.rest()

    def rest(self) -> None:
        """Until nothing is being written."""
        self.expect(self.page.locator("#stop")).to_be_hidden()
        self.expect(self.page.locator(".going")).to_have_count(0)

    def panel(self, place: int) -> Any:
        return self.page.locator(".panel").nth(place)

    def texts(self, place: int) -> list[str]:
        return self.panel(place).locator(".message .text").evaluate_all("found => found.map(one => one.textContent)")

    def export(self) -> list[dict[str, Any]]:
        with self.page.expect_download() as download:
            self.page.click("#export")
        return [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]


class Held:
    """Requests to `where` that wait until they are let go."""

    def __init__(self, page: Any, where: str) -> None:
        self.waiting: list[Any] = []
        self.open = False
        page.route(where, self.take)

    def take(self, route: Any) -> None:
        if self.open:
            route.continue_()
        else:
            self.waiting.append(route)

    def let_go(self) -> None:
        self.open = True
        for route in self.waiting:
            route.continue_()


@pytest.fixture
def chat(browser: Any, url: str, screenshots: Path, request: pytest.FixtureRequest) -> Iterator[Chat]:
    with window_on(browser, screenshots, request, url) as page:
        found = Chat(page, url)
        yield found
    assert not found.faults, found.faults


def reference(model: Any, engine: Any, dose: float, *turns: str, name: str = "warm") -> str:
    from relseek_resources.models import Add, Sampling

    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]
    vector = engine.vectors.by_name[name]
    with model.intervene([Add(vector.at(vector.home[0]), vector.home[0], dose)]):
        return model.generate([messages], Sampling(temperature=0, max_new_tokens=24), seeds=[0])[0].text


def streamed(text: str, ended: str | None, *more: Any) -> dict[str, Any]:
    """A server's answer that streams `text`, says how it ended, and closes."""
    deltas = [({"content": text}, None), ({}, ended)] if text else [({}, ended)]
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]} for delta, reason in deltas]
    return {"content_type": "text/event-stream", "body": "".join(f"data: {json.dumps(one)}\n\n" for one in (*events, *more))}


def test_requests_say_which_content_which_blocks_and_which_conversation(browser, url, engine, model):
    """The default vector works after the blocks that the server declares for it, as `custom.steer_multiplier` does."""
    from relseek_resources.models import Add, Sampling

    default = engine.vectors.default
    engine.vectors.default = {"vector": "warm", "layers": [2]}
    context = browser.new_context(viewport={"width": 1400, "height": 900}, locale="en-GB")
    context.set_default_timeout(60_000)
    try:
        chat = Chat(context.new_page(), url)
        asked: list[Any] = []
        chat.page.on("request", lambda request: asked.append(request) if request.url.endswith("/completions") else None)
        chat.say()
        chat.say("And now?")
        lines = chat.export()
        replies = {turn["multiplier"]: turn["reply"] for turn in lines[:3]}
        warm = engine.vectors.by_name["warm"]
        for dose in (-1, 1):
            with model.intervene([Add(warm.at(2), 2, dose)]):
                wanted = model.generate([[{"role": "user", "content": PROMPT}]], Sampling(temperature=0, max_new_tokens=24), seeds=[0])[0].text
            assert replies[dose] == wanted
        assert {tuple(turn["layers"]) for turn in lines} == {(2,)}
        steering = [json.loads(body["vllm_xargs"]["relseek"])[0] for body in (one.post_data_json for one in asked) if "vllm_xargs" in body]
        assert len(steering) == 4 and all((one["sha256"], one["layers"]) == (warm.sha256, [2]) for one in steering)
        sessions = [one.headers["x-session-id"] for one in asked]
        assert len(sessions) == 6 and sorted(sessions[:3]) == sorted(sessions[3:]) and len(set(sessions)) == 3
    finally:
        engine.vectors.default = default
        context.close()


# --- side by side -------------------------------------------------------------------------------------------------------


def test_three_panels_answer_one_prompt_streaming_each_at_its_own_dose(chat, model, engine):
    chat.page.click("#settings-button")
    chat.page.fill("#max-tokens", "400")
    chat.page.click("#settings-button")
    chat.say(wait=False)
    for place in STEERED:  # both are at it at once; the unsteered reply ends by itself after a tenth of a second
        chat.expect(chat.panel(place).locator(".going .text", has_text=re.compile("."))).to_have_count(1)
    assert chat.panel(0).locator(".going").count() == 1
    early = [len(chat.texts(place)[1]) for place in STEERED]
    chat.rest()
    assert all(before < len(chat.texts(place)[1]) for place, before in zip(STEERED, early, strict=True))
    for place, dose in enumerate((-1.0, 0.0, 1.0)):
        said, reply = chat.texts(place)
        assert said == PROMPT and reply.startswith(reference(model, engine, dose, PROMPT))


def test_the_slider_moves_by_quarters_within_the_servers_range_and_the_next_reply_follows_it(chat, model, engine):
    slider = chat.panel(2).locator(".slider")
    assert [slider.get_attribute(name) for name in ("min", "max", "step")] == ["-2", "2", "0.25"]
    slider.focus()
    for _ in range(2):
        chat.page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "λ +1.50"
    chat.panel(0).locator("select").select_option("cold")
    chat.say()
    assert chat.texts(2)[1] == reference(model, engine, 1.5, PROMPT)
    assert chat.texts(0)[1] == reference(model, engine, -1.0, PROMPT, name="cold")


def test_nothing_is_sent_while_a_panel_replies_and_the_page_says_so(chat):
    replies = Held(chat.page, "**/v1/chat/completions")
    hint, send = chat.page.locator("#hint"), chat.page.locator("#send")
    chat.say(wait=False)
    chat.expect(hint).to_have_text("3 panels are still replying: wait, or stop them")
    while len(replies.waiting) < 3:
        chat.page.wait_for_timeout(50)
    first, second, third = replies.waiting
    first.continue_()
    chat.expect(hint).to_have_text("2 panels are still replying: wait, or stop them")
    second.continue_()
    chat.expect(hint).to_have_text(re.compile(r"^Panel \d is still replying: wait, or stop it$"))
    reason = hint.inner_text()
    assert send.is_disabled() and send.get_attribute("aria-describedby") == "hint" and hint.bounding_box()["width"] > 100
    chat.say("And now?", wait=False)
    assert chat.page.input_value("#message") == "And now?" and reason in chat.page.locator("#status").inner_text()
    assert [len(chat.texts(place)) for place in range(3)] == [2, 2, 2]
    chat.page.select_option("#to", label=next(f"Panel {place}" for place in (1, 2, 3) if f"Panel {place} " not in reason))
    assert send.is_enabled()
    third.continue_()
    chat.rest()
    chat.page.select_option("#to", label="all panels")
    assert send.is_enabled() and hint.bounding_box()["width"] == 1


@pytest.mark.parametrize("field", ["temperature", "max-tokens"])
def test_a_setting_that_requests_need_cannot_be_left_empty(chat, field):
    chat.page.click("#settings-button")
    chat.page.fill(f"#{field}", "")
    chat.page.press(f"#{field}", "Tab")
    assert chat.page.locator(f"#{field}:invalid").count() == 1
    chat.say()
    assert [(turn["fault"], turn["temperature"], turn["max_tokens"]) for turn in chat.export()] == [(None, 0, 24)] * 3


def test_one_panel_can_be_spoken_to_alone(chat):
    chat.page.select_option("#to", label="Panel 2")
    chat.say()
    assert [len(chat.texts(place)) for place in range(3)] == [0, 2, 0]


def test_each_replys_projection_is_the_models_own_as_it_was_steered(chat, model, engine):
    from relseek_resources.models import Add

    chat.say()
    chat.say("And now?")
    chat.expect(chat.page.locator(".figures", has_text="projection")).to_have_count(6)
    chat.expect(chat.page.locator(".drift")).to_have_count(3)
    vector = engine.vectors.by_name["warm"].at(1)
    for turn in chat.export():
        asked, reply = turn["messages"], turn["reply"]
        with model.intervene([Add(vector, 1, turn["multiplier"])]):
            steered = float(model.projections([asked], vector, [1], [reply])[0, 0])
        assert turn["projection"] == pytest.approx(steered, abs=1e-3)
        assert turn["projection_unsteered"] == pytest.approx(float(model.projections([asked], vector, [1], [reply])[0, 0]), abs=1e-3)
        assert turn["projection_layer"] == 1


def test_a_projection_that_comes_late_takes_nothing_out_of_the_hand(chat):
    """An edit that is half written and a dose that is being moved outlive it; figures and drift are there all the same."""
    measured = Held(chat.page, "**/v1/relseek/projection")
    chat.say()
    chat.say("And now?")
    for place in (0, 1):
        chat.panel(place).get_by_role("button", name="Edit").first.click()
        chat.panel(place).get_by_label("Edit your message").fill(f"half written {place}")
    slider = chat.panel(2).locator(".slider")
    box = slider.bounding_box()
    chat.page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)  # where λ = 1 is
    chat.page.mouse.down()
    assert chat.page.locator(".figures", has_text="projection").count() == 0 and len(measured.waiting) == 1
    measured.let_go()
    chat.expect(chat.page.locator(".figures", has_text="projection")).to_have_count(6)
    chat.expect(chat.page.locator(".drift")).to_have_count(3)
    assert [chat.panel(place).get_by_label("Edit your message").input_value() for place in (0, 1)] == ["half written 0", "half written 1"]
    chat.page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    chat.page.mouse.up()
    assert slider.get_attribute("aria-valuetext") == "λ +2.00"


def test_a_reply_that_ends_leaves_the_dose_in_the_hand(chat):
    replies = Held(chat.page, "**/v1/chat/completions")
    chat.say(wait=False)
    chat.expect(chat.page.locator(".going")).to_have_count(3)
    slider = chat.panel(2).locator(".slider")
    box = slider.bounding_box()
    chat.page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    chat.page.mouse.down()
    replies.let_go()
    chat.rest()
    chat.page.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2)
    chat.page.mouse.up()
    assert slider.get_attribute("aria-valuetext") == "λ −2.00"


# --- going back ---------------------------------------------------------------------------------------------------------


def test_regenerating_keeps_the_earlier_version_to_return_to(chat):
    chat.page.click("#settings-button")
    chat.page.fill("#temperature", "1")
    chat.page.click("#settings-button")
    chat.say()
    first = chat.texts(0)[1]
    chat.panel(0).get_by_role("button", name="Regenerate").click()
    chat.rest()
    second = chat.texts(0)[1]
    assert second != first and chat.panel(0).locator(".which").inner_text() == "2/2"
    chat.panel(0).get_by_role("button", name="Earlier version").click()
    assert chat.texts(0)[1] == first
    assert [turn["reply"] for turn in chat.export() if turn["shown"]].count(first) == 1


def test_an_edited_message_is_answered_anew_beside_what_was_said(chat, model, engine):
    chat.say()
    chat.say("And now?")
    before = chat.texts(1)
    chat.panel(1).get_by_role("button", name="Edit").first.click()
    box = chat.panel(1).get_by_label("Edit your message")
    box.fill("Do you like me?")
    box.press("Enter")
    chat.rest()
    assert chat.texts(1) == ["Do you like me?", reference(model, engine, 0.0, "Do you like me?")]
    chat.panel(1).get_by_role("button", name="Earlier version").click()
    assert chat.texts(1) == before


def test_a_branch_goes_on_in_a_panel_of_its_own(chat, model, engine):
    chat.say()
    chat.panel(2).get_by_role("button", name="Branch").click()
    chat.expect(chat.page.locator(".panel")).to_have_count(4)
    assert chat.texts(3) == chat.texts(2)
    chat.page.select_option("#to", label="Panel 4")
    chat.say("And now?")
    assert len(chat.texts(2)) == 2
    assert chat.texts(3)[3] == reference(model, engine, 1.0, PROMPT, chat.texts(3)[1], "And now?")


def test_a_reply_can_be_stopped_and_counts_as_far_as_it_went(chat):
    chat.page.click("#settings-button")
    chat.page.fill("#max-tokens", "800")
    chat.page.click("#settings-button")
    chat.say(wait=False)
    for place in STEERED:
        chat.expect(chat.panel(place).locator(".going .text", has_text=re.compile("."))).to_have_count(1)
    chat.page.keyboard.press("Escape")
    chat.rest()
    found = {turn["multiplier"]: turn for turn in chat.export()}
    assert all(found[dose]["fault"] == "stopped" and len(found[dose]["reply"]) > 0 for dose in (-1.0, 1.0))
    assert found[0.0]["fault"] in (None, "stopped") and len(found[0.0]["reply"]) > 0


@pytest.mark.parametrize("ended", [None, "abort"])
def test_a_reply_without_an_end_of_its_own_is_no_whole_one(chat, ended):
    """The connection closes without `[DONE]`, as that of a router whose replica has gone."""
    chat.page.route("**/v1/chat/completions", lambda route: route.fulfill(**streamed("Half a", ended)))
    chat.say()
    assert chat.texts(0)[1] == "Half a" and "the reply broke off" in chat.panel(0).locator(".fault").inner_text()
    assert all("the reply broke off" in turn["fault"] and turn["finish_reason"] == ended for turn in chat.export())
    assert chat.page.locator(".figures", has_text="projection").count() == 0


# --- blind --------------------------------------------------------------------------------------------------------------


def test_a_fault_in_a_blind_comparison_tells_neither_vector_nor_dose_and_no_vote_follows_it(chat):
    words = "vector 'warm' has the sha256 0123; the stream is not finite under this steering; use smaller doses"
    error = {"error": {"message": words}}

    def faulty(route: Any) -> None:
        steered = "vllm_xargs" in route.request.post_data_json
        route.fulfill(**streamed("", None, error)) if steered else route.continue_()

    def told() -> str:
        return chat.page.evaluate("document.body.innerText + document.getElementById('status').textContent")

    chat.page.click("#blind")
    chat.page.route("**/v1/chat/completions", faulty)
    chat.page.route("**/v1/relseek/projection", lambda route: route.fulfill(status=400, json=error))
    chat.say()
    chat.expect(chat.page.locator("#notice-text")).to_have_text("A projection could not be measured.")
    faults = chat.page.locator(".fault")
    assert faults.count() == 2 and len(set(faults.all_inner_texts())) == 1 and "Regenerate it" in faults.first.inner_text()
    assert not re.search("warm|sha256|finite|smaller", told())
    assert chat.page.locator("#blindbar form").count() == 0

    chat.page.unroute("**/v1/chat/completions")
    chat.say("And now?")  # not before the replies are whole
    assert [len(chat.texts(place)) for place in range(3)] == [2, 2, 2] and "regenerate it first" in chat.page.locator("#notice-text").inner_text()
    for _ in range(2):
        panel = chat.page.locator(".panel", has=chat.page.locator(".fault")).first
        panel.get_by_role("button", name="Regenerate").click()
        chat.rest()
    chat.expect(chat.page.locator("#blindbar form")).to_be_visible()
    chat.page.check("#blindbar input[value=A]")
    chat.page.get_by_role("button", name="Vote and reveal").click()
    assert all(len(one["turns"]) == 1 for one in chat.export()[-1]["candidates"])
    chat.faults = [one for one in chat.faults if "400" not in one]  # the browser reports refused measurements itself


def test_a_turn_that_fails_each_time_is_dropped_in_all_panels_and_the_turns_before_it_can_be_voted_on(chat):
    def faulty(route: Any) -> None:
        asked = route.request.post_data_json
        failing = "vllm_xargs" in asked and asked["messages"][-1]["content"] == "Too long"
        route.fulfill(**streamed("", None, {"error": {"message": "the context is full"}})) if failing else route.continue_()

    chat.page.route("**/v1/chat/completions", faulty)
    button, vote_button = (chat.page.get_by_role("button", name=name) for name in ("Drop the last turn in all panels", "Vote and reveal"))
    chat.page.click("#blind")
    chat.say("Too long")
    button.click()
    assert [chat.texts(place) for place in range(3)] == [[], [], []] and vote_button.count() == 0
    chat.say()
    assert vote_button.is_enabled() and button.count() == 0
    chat.say("Too long")
    chat.page.keyboard.press("Alt+Shift+KeyR")
    chat.rest()
    chat.expect(chat.page.locator(".fault")).to_have_count(2)
    assert vote_button.is_disabled() and "did not come to its end" in chat.page.locator("#blindbar").inner_text()
    chat.page.keyboard.press("Alt+Shift+KeyV")
    chat.page.keyboard.press("Enter")
    assert [chat.texts(place)[0] for place in range(3)] == [PROMPT] * 3 and {len(chat.texts(place)) for place in range(3)} == {2}
    chat.page.check("#blindbar input[value=A]")
    vote_button.click()
    *turns, vote = chat.export()
    assert vote["prompts"] == [PROMPT] and all(len(one["turns"]) == 1 for one in vote["candidates"])
    failed = [turn for turn in turns if turn["messages"][-1]["content"] == "Too long"]
    assert len(failed) == 9 and not any(turn["shown"] or turn["vote"] for turn in failed)


def test_a_blind_edit_goes_to_all_panels_and_no_vote_compares_replies_to_different_messages(chat):
    chat.page.click("#blind")
    chat.say()
    chat.say("And now?")
    chat.panel(1).get_by_role("button", name="Edit").last.click()
    chat.panel(1).get_by_label("Edit your message").fill("And then?")
    chat.panel(1).get_by_role("button", name="Send the edited message to all").click()
    chat.rest()
    assert [chat.texts(place)[::2] for place in range(3)] == [[PROMPT, "And then?"]] * 3
    vote, bar = chat.page.get_by_role("button", name="Vote and reveal"), chat.page.locator("#blindbar")
    chat.page.check("#blindbar input[value=A]")
    chat.panel(2).get_by_role("button", name="Earlier version").click()
    assert vote.is_disabled() and "replies to the same messages" in bar.inner_text()
    chat.page.evaluate("vote('A', '')")
    chat.say("Go on")
    assert chat.page.evaluate("state.votes.length") == 0 and "the same messages" in chat.page.locator("#notice-text").inner_text()
    chat.panel(2).get_by_role("button", name="Later version").click()
    assert vote.is_enabled() and "the same messages" not in bar.inner_text()
    vote.click()
    *turns, voted = chat.export()
    compared = [turn for turn in turns if turn["messages"][-1]["content"] == "And then?"]
    assert voted["prompts"] == [PROMPT, "And then?"] and len({turn["seed"] for turn in compared}) == 1
    assert sorted(turn["turn"] for turn in compared) == sorted(one["turns"][1] for one in voted["candidates"])


def test_votes_are_counted_apart_for_each_vector(chat):
    chat.panel(1).get_by_role("button", name="Remove").click()
    chat.panel(0).locator("select").select_option("cold")
    for place in (0, 1):
        chat.panel(place).locator(".slider").press("End")
    for name in ("cold", "warm"):
        chat.page.click("#blind") if name == "cold" else chat.page.get_by_role("button", name="Next blind round").click()
        chat.say()
        place = chat.page.evaluate("name => shownPanels().findIndex((panel) => panel.vector === name)", name)
        chat.page.check(f"#blindbar input[value={'AB'[place]}]")
        chat.page.get_by_role("button", name="Vote and reveal").click()
    chat.expect(chat.page.locator(".votes")).to_have_text("2 votes so far: 1 for λ +2.00, cold; 1 for λ +2.00, warm")


def test_a_dose_that_ends_at_once_can_be_voted_on(chat):
    def silent(route: Any) -> None:
        steered = "vllm_xargs" in route.request.post_data_json
        route.continue_() if steered else route.fulfill(**streamed("", "stop"))

    chat.page.route("**/v1/chat/completions", silent)
    chat.page.click("#blind")
    chat.say()
    assert chat.page.get_by_text("an empty reply", exact=True).locator("visible=true").count() == 1
    chat.expect(chat.page.locator("#blindbar form")).to_be_visible()
    chat.page.check("#blindbar input[value=tie]")
    chat.page.get_by_role("button", name="Vote and reveal").click()
    lines = chat.export()
    assert [line["fault"] for line in lines[:3]] == [None] * 3 and lines[-1]["choice"] == "tie"
    assert sorted(one["multiplier"] for one in lines[-1]["candidates"]) == [-1, 0, 1]


def test_no_vote_is_taken_while_a_reply_is_being_written(chat):
    """What is half filled in waits for it."""
    chat.page.click("#blind")
    chat.say()
    chat.page.check("#blindbar input[value=B]")
    chat.page.get_by_label("Why (optional)").fill("warmer")
    replies = Held(chat.page, "**/v1/chat/completions")
    chat.say("And now?", wait=False)
    chat.expect(chat.page.locator(".going")).to_have_count(3)
    button = chat.page.get_by_role("button", name="Vote and reveal")
    assert button.is_disabled() and chat.page.locator(".wait").is_visible()
    chat.page.evaluate("vote('B', '')")
    assert chat.page.evaluate("state.votes.length") == 0 and chat.panel(0).locator("h2").inner_text() == "Panel A"
    replies.let_go()
    chat.rest()
    chat.expect(button).to_be_enabled()
    assert chat.page.locator(".wait").is_hidden()
    button.click()
    vote = chat.export()[-1]
    assert (vote["choice"], vote["comment"], vote["prompts"]) == ("B", "warmer", [PROMPT, "And now?"])
    assert all(len(one["turns"]) == 2 for one in vote["candidates"])


def test_a_blind_vote_shows_no_dose_before_it_and_every_dose_after_it(chat):
    orders = set()
    for round_number in range(6):
        chat.page.click("#blind") if round_number == 0 else chat.page.get_by_role("button", name="Next blind round").click()
        chat.say()
        chat.expect(chat.page.locator("#blindbar form")).to_be_visible()
        shown = chat.page.evaluate(WITHOUT_REPLIES)
        assert "Panel C" in shown and not re.search(r"[−+-]1\.00|λ [−+\d]|warm|projection [\d−]|first after", shown)
        assert chat.page.locator(".slider").count() == 0 and chat.page.locator("#export").is_disabled()
        assert [chat.panel(place).locator("h2").inner_text() for place in range(3)] == ["Panel A", "Panel B", "Panel C"]
        chat.page.check("#blindbar input[value=B]")
        chat.page.get_by_role("button", name="Vote and reveal").click()
        titles = [chat.panel(place).locator("h2").inner_text() for place in range(3)]
        assert sorted(re.search(r"λ (\S+),", title)[1] for title in titles) == ["+1.00", "0.00", "−1.00"]
        orders.add(tuple(titles))
        vote = chat.export()[-1]
        assert vote["kind"] == "vote" and vote["choice"] == "B" and vote["prompts"] == [PROMPT]
        chosen = next(one for one in vote["candidates"] if one["label"] == "B")
        assert f"{abs(chosen['multiplier']):.2f}" in titles[1] and vote["panel"] == chosen["panel"]
    assert len(orders) > 1  # six times the same of six orders: 1 in 7,776
    assert sum(turn.get("vote") == "chosen" for turn in chat.export()) == 6
    assert "6 votes so far" in chat.page.locator("#blindbar").inner_text()


def test_leaving_unvoted_tells_nothing(chat):
    chat.page.click("#blind")
    chat.say()
    chat.page.click("#blind")
    assert [chat.texts(place) for place in range(3)] == [[], [], []]


# --- the record ---------------------------------------------------------------------------------------------------------


def test_the_export_holds_every_turn_with_what_made_it(chat, engine):
    chat.page.click("#settings-button")
    chat.page.fill("#system", "Be brief.")
    chat.page.fill("#seed", "11")
    chat.page.click("#settings-button")
    chat.say()
    chat.page.click("#anew")
    chat.say("Another")
    turns = chat.export()
    assert [turn["multiplier"] for turn in turns] == [-1, 0, 1, -1, 0, 1]
    assert {turn["vector_sha256"] for turn in turns} == {engine.vectors.by_name["warm"].sha256} and {turn["seed"] for turn in turns} == {11}
    assert turns[0]["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    assert all(turn["seconds"] >= turn["seconds_to_first_token"] > 0 and turn["tokens"] and turn["model"] == "tiny" for turn in turns)
    assert len({turn["conversation"] for turn in turns}) == 2 and len({turn["session"] for turn in turns}) == 1
    assert [turn["shown"] for turn in turns] == [False] * 3 + [True] * 3


def test_two_windows_know_nothing_of_each_other_and_a_reload_loses_nothing(chat, browser, url):
    chat.say("my secret")
    said = [chat.texts(place) for place in range(3)]
    context = browser.new_context()
    other = Chat(context.new_page(), url)
    other.say()
    assert "my secret" not in json.dumps(other.export())
    context.close()
    chat.page.reload()
    chat.expect(chat.page.locator(".message")).to_have_count(6)
    assert [chat.texts(place) for place in range(3)] == said


@pytest.mark.parametrize("how", ["reload", "restored"])
def test_a_reply_that_its_tabs_end_cuts_off_is_kept_as_far_as_it_had_come(chat, url, how):
    """Chromium fails requests before a reload; other browsers, and the end of a tab that is restored later, leave them as they are."""
    chat.page.click("#settings-button")
    chat.page.fill("#max-tokens", "800")
    chat.page.click("#settings-button")
    chat.page.select_option("#to", label="Panel 3")
    chat.say(wait=False)
    chat.expect(chat.page.locator(".going .text", has_text=re.compile("."))).to_have_count(1)
    if how == "reload":
        chat.page.reload()
        found = chat
    else:
        kept = chat.page.evaluate("() => { dispatchEvent(new Event('pagehide')); return JSON.stringify({ ...sessionStorage }); }")
        chat.page.keyboard.press("Escape")
        chat.rest()
        page = chat.page.context.new_page()
        page.add_init_script(f"Object.assign(sessionStorage, {kept})")
        found = Chat(page, url)
    found.expect(found.page.locator(".fault", has_text="broken off" if how == "restored" else re.compile("."))).to_have_count(1)
    [turn] = found.export()
    assert turn["fault"] and turn["shown"] and turn["seconds"] is not None
    assert turn["reply"] and turn["reply"] == found.texts(2)[1]


def test_a_duplicated_tab_goes_on_with_a_session_of_its_own(chat, url):
    """A window that a page opens begins with a copy of the page's storage, as a duplicated tab does."""
    chat.say()
    chat.expect(chat.page.locator(".figures", has_text="projection")).to_have_count(3)
    replies = Held(chat.page, "**/v1/chat/completions")
    chat.say("And now?", wait=False)
    with chat.page.expect_popup() as opened:
        chat.page.evaluate("void window.open(location.href)")
    other = Chat(opened.value, url)
    other.expect(other.page.locator(".fault", has_text="broken off")).to_have_count(3)
    other.say("There")
    replies.let_go()
    chat.rest()
    chat.page.reload()
    chat.expect(chat.page.locator(".panel")).to_have_count(3)
    chat.say("Here")
    here, there = chat.export(), other.export()
    assert here[:3] == there[:3] and len({turn["session"] for turn in here}) == 1
    assert len({turn["session"] for turn in there[3:]}) == 1 and there[3]["session"] != here[0]["session"]
    assert [turn["fault"] for turn in here] == [None] * 9 and [turn["fault"] for turn in there] == [None] * 3 + ["broken off"] * 3 + [None] * 3
    assert not other.faults


def test_markup_in_a_message_is_text(chat):
    chat.say("<img src=x onerror=alert(1)><b>bold</b>")
    assert chat.texts(0)[0] == "<img src=x onerror=alert(1)><b>bold</b>"
    assert chat.page.locator(".log b, .log img").count() == 0


# --- for everybody ------------------------------------------------------------------------------------------------------


def test_everything_can_be_done_with_the_keyboard(chat):
    keys = chat.page.keyboard
    chat.page.focus("#message")
    keys.type("Hello")
    keys.press("Shift+Enter")
    keys.type("again")
    keys.press("Enter")
    chat.rest()
    assert chat.texts(0)[0] == "Hello\nagain"
    focused = "document.activeElement.id || document.activeElement.className"
    assert chat.page.evaluate(focused) == "message"  # the replies have not taken the focus away
    keys.press("Alt+Shift+Digit2")
    assert chat.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Dose λ of Panel 2"
    keys.press("Alt+Shift+KeyP")
    chat.expect(chat.page.locator(".panel")).to_have_count(4)
    keys.press("Alt+Shift+KeyR")
    chat.rest()
    chat.expect(chat.page.locator(".which", has_text="2/2")).to_have_count(3)
    keys.press("Alt+Shift+KeyB")
    keys.type("Blind?")
    keys.press("Enter")
    chat.rest()
    chat.expect(chat.page.locator("#blindbar form")).to_be_visible()
    keys.press("Alt+Shift+KeyV")
    keys.press("ArrowRight")  # from no choice to the second radio button, or from the first to it
    keys.press("Enter")
    chat.expect(chat.page.locator("h2", has_text="λ")).to_have_count(4)
    assert chat.page.evaluate("document.activeElement.textContent") == "Next blind round"
    with chat.page.expect_download():
        keys.press("Alt+Shift+KeyX")


def listen(chat: Chat) -> None:
    """Gather what is announced in `window.heard`."""
    chat.page.evaluate(
        """() => { window.heard = []; new MutationObserver((changes) => changes.forEach((change) => change.addedNodes.forEach((node) =>
            window.heard.push(node.textContent)))).observe(document.getElementById('status'), { childList: true }); }"""
    )


def test_a_screen_reader_hears_a_reply_once_and_whole(chat):
    listen(chat)
    chat.say()
    heard = chat.page.evaluate("window.heard")
    assert heard[0] == "3 panels are replying"
    assert sorted(heard[1:]) == sorted(f"Panel {place + 1} replied: {chat.texts(place)[1]}" for place in range(3))
    live = chat.page.locator("[aria-live], [role=status], [role=log], [role=alert]")
    assert live.count() == 1 and live.get_attribute("id") == "status"  # what grows token by token is in no live region
    assert live.get_attribute("aria-atomic") == "false"  # or each line would be read with all those before it
    assert live.get_attribute("aria-relevant") == "additions"


def test_a_replying_panel_that_is_removed_is_said_to_be_removed_alone(chat):
    listen(chat)
    replies = Held(chat.page, "**/v1/chat/completions")
    chat.say(wait=False)
    chat.panel(1).get_by_role("button", name="Remove").click()
    chat.expect(chat.page.locator(".going")).to_have_count(2)
    chat.page.wait_for_function("state.records.some((record) => record.fault === 'stopped')")
    assert chat.page.evaluate("window.heard") == ["3 panels are replying", "Panel 2 removed; what it said stays in the export"]
    replies.let_go()
    chat.rest()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(chat, scheme, screenshots):
    from axe_playwright_python.sync_playwright import Axe

    axe = Axe()
    chat.page.emulate_media(color_scheme=scheme)

    def faults() -> list[tuple[str, Any]]:
        found = axe.run(chat.page).response["violations"]
        return [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found if one["impact"] in ("serious", "critical")]

    found = faults()
    replies = Held(chat.page, "**/v1/chat/completions")
    chat.say(wait=False)
    chat.expect(chat.page.locator("#hint")).to_contain_text("still replying")
    found += faults()
    replies.let_go()
    chat.rest()
    chat.say("And now?")
    chat.panel(0).get_by_role("button", name="Regenerate").last.click()
    chat.rest()
    chat.page.click("#settings-button")
    chat.page.click("#keys-button")
    chat.panel(1).get_by_role("button", name="Edit").first.click()
    found += faults()
    chat.page.screenshot(path=screenshots / f"chat_{scheme}.png")
    chat.page.click("#settings-button")
    chat.page.click("#keys-button")
    chat.page.click("#blind")
    found += faults()
    chat.say()
    chat.expect(chat.page.locator("#blindbar form")).to_be_visible()
    found += faults()
    chat.page.route("**/v1/chat/completions", lambda route: route.fulfill(**streamed("Half a", None)))
    chat.say("And now?")
    found += faults()
    chat.page.get_by_role("button", name="Drop the last turn").click()
    chat.page.check("#blindbar input[value=tie]")
    chat.page.get_by_role("button", name="Vote and reveal").click()
    found += faults()
    chat.page.set_viewport_size({"width": 400, "height": 800})
    found += faults()
    assert chat.page.evaluate("document.documentElement.scrollWidth <= 400")
    assert not found


# --- servers that differ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("route", "status"), [("vectors", 429), ("vectors", 503), ("projection", 503)])
def test_a_passing_fault_changes_no_dose_and_can_be_tried_again(chat, route, status):
    slider = chat.panel(2).locator(".slider")
    slider.focus()
    for _ in range(2):
        chat.page.keyboard.press("ArrowRight")
    chat.say()
    said = [chat.texts(place) for place in range(3)]
    where = f"**/v1/relseek/{route}"
    chat.page.route(where, lambda asked: asked.fulfill(status=status, json={"error": {"message": "busy for now"}}))
    chat.page.reload()
    chat.expect(chat.page.locator("#notice-text")).to_contain_text("busy for now")
    chat.say("Is anybody there?")
    assert chat.page.locator("#add").is_disabled() and chat.page.input_value("#message") == "Is anybody there?"
    kept = json.loads(chat.page.evaluate("sessionStorage.getItem('relseek-chat')"))["panels"]
    assert [(panel["vector"], panel["multiplier"]) for panel in kept] == [("warm", -1), ("warm", 0), ("warm", 1.5)]
    chat.page.unroute(where)
    chat.page.get_by_role("button", name="Try again").click()
    chat.expect(chat.page.locator(".panel")).to_have_count(3)
    assert chat.page.locator("#notice").is_hidden() and chat.page.locator("#measure").is_enabled()
    assert slider.get_attribute("aria-valuetext") == "λ +1.50" and [chat.texts(place) for place in range(3)] == said
    chat.faults = [one for one in chat.faults if str(status) not in one]  # the browser reports the refusal itself


def test_a_slider_reaches_zero_whatever_the_servers_limit(chat):
    """A limit of 1.6 is no whole number of steps: the slider ends at 1.5, and each place on it is the dose that stands beside it."""

    def limited(route: Any) -> None:
        answer = route.fetch()
        offered = answer.json()
        offered["limits"]["multiplier"] = 1.6
        route.fulfill(response=answer, json=offered)

    chat.panel(2).locator(".slider").press("End")
    chat.page.route("**/v1/relseek/vectors", limited)
    chat.page.reload()
    slider = chat.panel(0).locator(".slider")
    for _ in range(4):
        slider.press("ArrowRight")
    assert (slider.input_value(), slider.get_attribute("aria-valuetext")) == ("0", "λ 0.00")
    slider.press("Home")
    assert (slider.input_value(), slider.get_attribute("aria-valuetext")) == ("-1.5", "λ −1.50")
    beyond = chat.panel(2).locator(".slider")
    assert (beyond.input_value(), beyond.get_attribute("aria-valuetext")) == ("1.5", "λ +1.50")
    assert chat.panel(0).locator(".ends span").all_inner_texts() == ["−1.5", "0", "+1.5"]


def test_an_engine_that_cannot_measure_projections_is_said_to(browser, engine):
    from relseek_resources.serving import chat as routes
    from relseek_resources.serving.guard import Settings
    from relseek_resources.serving.server import create_app
    from tests.serving.sockets import listening

    context = browser.new_context()
    with listening(create_app(engine, Settings(rate=0), routes.page_routes())) as url:
        found = Chat(context.new_page(), url)
        found.say()
        found.page.click("#settings-button")
        assert found.page.locator("#measure").is_disabled() and "cannot measure projections" in found.page.locator("#settings").inner_text()
        assert found.page.locator(".figures", has_text="projection").count() == 0
    context.close()


def test_a_server_with_a_key_asks_for_it(browser, engine):
    from playwright.sync_api import expect

    from relseek_resources.serving import chat as routes
    from relseek_resources.serving.guard import Settings
    from relseek_resources.serving.server import create_app
    from tests.serving.sockets import listening

    context = browser.new_context()
    with listening(create_app(engine, Settings(keys=("sesame",), rate=0), routes.routes())) as url:
        page = context.new_page()
        page.goto(url)
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        expect(page.locator("#notice-text")).to_contain_text("needs a key")
        page.fill("#key", "sesame")
        page.press("#key", "Enter")
        expect(page.locator(".panel")).to_have_count(3)
        assert page.locator("#door").is_hidden() and page.locator("#notice").is_hidden()
        page.click("#settings-button")  # the same replies each time: a drawn one may be empty, and then has no projection
        page.fill("#temperature", "0")
        page.fill("#max-tokens", "24")
        page.click("#settings-button")
        page.fill("#message", PROMPT)
        page.press("#message", "Enter")
        expect(page.locator(".figures", has_text="projection")).to_have_count(3)
    context.close()
