"""`python analyze.py serve=true`: the ask page's calls, its guards, and the page in a browser."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch

from depass_lightning import Contrast, DePass
from depass_lightning.commands.ask import AskedModel
from depass_lightning.commands.serve import fragment
from depass_lightning.errors import DePassError
from depass_lightning.reports.numbers import signed
from tests.commands.test_analyze import run
from tests.reports.browser import Browser
from tests.reports.test_page import data_of

PROMPT = "When Mary and John went to the store, John gave a drink to"
TOKEN = "a-token"
PORT = 4711

HAS_SERVER = all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn"))
served = pytest.mark.skipif(not HAS_SERVER, reason="the extra [serve] is not installed")


@pytest.fixture(scope="module")
def depass() -> DePass:
    return DePass.from_pretrained("tiny")


@pytest.fixture(scope="module")
def answers(depass: DePass) -> AskedModel:
    return AskedModel(depass, "tiny")


def asked(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "target": " Mary", "foil": " John", **fields}


def test_the_scores_are_those_of_the_library(answers: AskedModel, depass: DePass) -> None:
    result = answers.scores(asked())
    (prompt,) = result["data"]["prompts"]
    expected = depass.attribute(PROMPT, Contrast(" Mary", " John"), rule="auto")
    scores = torch.tensor(prompt["views"]["tokens"]["scores"])
    torch.testing.assert_close(scores, expected.scores, rtol=1e-4, atol=1e-6)
    assert prompt["value"] == pytest.approx(expected.value, rel=1e-4)
    assert result["settings"]["rule"] == "half"
    first = result["next"][0]
    assert (first["text"], first["id"]) == (" Mary", expected.target_ids[0])
    with torch.no_grad():
        logits = depass.model(input_ids=torch.tensor([expected.token_ids])).logits[0, -1]
    assert first["probability"] == pytest.approx(float(logits.softmax(-1).max()), rel=1e-4)


def test_a_token_is_chosen_by_its_id(answers: AskedModel, depass: DePass) -> None:
    ids = depass.attribute(PROMPT, Contrast(" Mary", " John"), rule="half").target_ids
    by_id = answers.scores(asked(target=ids[0], foil=ids[1]))["data"]["prompts"][0]
    assert by_id["views"] == answers.scores(asked())["data"]["prompts"][0]["views"]
    mixed = answers.scores(asked(foil=ids[1]))["data"]["prompts"][0]
    assert mixed["target"] == "' Mary' − ' John'"
    assert answers.scores(asked(target=None, foil=None))["data"]["prompts"][0]["target"] == "' Mary'"


def test_the_change_is_that_of_the_shorter_prompt(answers: AskedModel, depass: DePass) -> None:
    whole = depass.attribute(PROMPT, Contrast(" Mary", " John"), rule="half")
    change = answers.change(asked(edits=[{"start": 4, "end": 5}, {"start": 2, "end": 3}]))
    ids = [token for place, token in enumerate(whole.token_ids) if place not in (2, 4)]
    with torch.no_grad():
        logits = depass.model(input_ids=torch.tensor([ids])).logits[0, -1]
    after = float(logits[whole.target_ids[0]] - logits[whole.target_ids[1]])
    assert change["after"] == pytest.approx(after, rel=1e-4)
    assert change["real"] == pytest.approx(after - whole.value, rel=1e-4)
    assert change["predicted"] == pytest.approx(-float(whole.scores[2] + whole.scores[4]), rel=1e-4)
    untouched = answers.change(asked())
    assert untouched["real"] == pytest.approx(0, abs=1e-4)


def test_a_word_is_replaced_with_its_space(answers: AskedModel, depass: DePass) -> None:
    change = answers.change(asked(edits=[{"start": 2, "end": 3, "text": "Anna"}]))
    other = depass.attribute(PROMPT.replace("Mary", "Anna"), Contrast(" Mary", " John"), rule="half")
    assert change["after"] == pytest.approx(other.value, rel=1e-4)
    assert change["predicted"] is None
    assert change["next"][0]["text"] == " Anna"
    assert answers.change(asked(source="heads", edits=[{"start": 2, "end": 3}]))["predicted"] is None


def test_the_saved_page_is_the_offline_page(answers: AskedModel) -> None:
    page = answers.page(asked(layers=True))
    assert data_of(page) == json.loads(json.dumps(answers.scores(asked(layers=True))["data"]))
    (prompt,) = data_of(page)["prompts"]
    assert prompt["layers"][-1] == pytest.approx(prompt["views"]["tokens"]["scores"], abs=1e-4)
    assert len(prompt["likely"]) == len(prompt["tokens"])
    assert answers.scores(asked())["data"]["prompts"][0]["layers"] == []
    assert "What tiny relies on" in page


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "  "}, "empty"),
        ({"prompt": None}, "give a prompt or a conversation"),
        ({"messages": []}, "give a prompt or a conversation"),
        ({"prompt": "word " * 5000}, "more than the model's context"),
        ({"target": None}, "give the answer, too"),
        ({"foil": " Mary"}, "the same"),
        ({"target": 10**9, "foil": None}, "vocabulary"),
        ({"rule": "unknown"}, "rule: Input should be"),
        ({"other": 1}, "other: "),
        ({"prompt": None, "messages": [{"role": "user", "content": "hi"}], "foil": None}, "chat template"),
    ],
)
def test_a_wrong_question_is_refused(answers: AskedModel, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DePassError, match=message):
        answers.scores(asked(**fields))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([{"start": 0, "end": 15}], "keep at least one token"),
        ([{"start": 3, "end": 99}], "not a part of the prompt"),
        ([{"start": 1, "end": 3}, {"start": 2, "end": 4}], "not a part of the prompt"),
    ],
)
def test_edits_are_parts_of_the_prompt(
    answers: AskedModel, edits: list[dict[str, int]], message: str
) -> None:
    with pytest.raises(DePassError, match=message):
        answers.change(asked(edits=edits))


def requested(app: Any, path: str, body: bytes = b"", **changes: Any) -> tuple[int, dict[str, str], bytes]:
    """Drive the application with one request, and return the status, the headers and the body."""
    headers = {"host": f"127.0.0.1:{PORT}", "x-depass-token": TOKEN, **changes.pop("headers", {})}
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in headers.items() if value],
        **changes,
    }
    sent: list[dict[str, Any]] = []
    events = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if events:
            return events.pop()
        await asyncio.sleep(60)  # the client waits
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start, *parts = sent
    fields = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], fields, b"".join(part.get("body", b"") for part in parts)


@pytest.fixture
def app(answers: AskedModel) -> Any:
    pytest.importorskip("starlette")
    from depass_lightning.commands.ask_app import ask_app

    return ask_app(answers, TOKEN, PORT)


@served
def test_the_page_and_its_calls_need_the_token_and_this_host(app: Any) -> None:
    question = json.dumps(asked()).encode()
    status, headers, body = requested(app, "/scores", question)
    assert (status, json.loads(body)["settings"]["rule"]) == (200, "half")
    assert headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert not any(name.startswith("access-control") for name in headers)
    for wrong in (
        {"x-depass-token": "wrong"},
        {"x-depass-token": ""},
        {"host": "evil.example:4711"},
        {"host": f"127.0.0.1:{PORT + 1}"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
    ):
        status, _, body = requested(app, "/scores", question, headers=wrong)
        assert status == 403, wrong
        assert "prompts" not in body.decode()
    page = {"headers": {"x-depass-token": ""}, "method": "GET"}
    assert requested(app, "/", **page)[0] == 403
    assert requested(app, "/?token=wrong", **page)[0] == 403
    status, _, body = requested(app, f"/?token={TOKEN}", **page)
    assert status == 200
    assert TOKEN not in body.decode()


@served
def test_errors_are_their_text_alone(app: Any, answers: AskedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for body, message in (
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b" " * 2_000_001, "shorten the prompt"),
        (json.dumps(asked(prompt="")).encode(), "empty"),
    ):
        status, _, answer = requested(app, "/scores", body)
        assert status == 400
        assert message in json.loads(answer)["error"]
    monkeypatch.setattr(answers, "attribution", lambda question: 1 / 0)
    status, _, answer = requested(app, "/scores", json.dumps(asked()).encode())
    assert status == 500
    assert "zero" not in answer.decode()


@served
def test_requests_take_turns_and_those_of_closed_pages_are_dropped() -> None:
    from starlette.requests import Request

    from depass_lightning.commands.ask_app import CLOSED, Calls

    running, release, begun = [], threading.Event(), threading.Event()

    def work(question: dict[str, Any]) -> dict[str, Any]:
        running.append(question["n"])
        begun.set()
        assert release.wait(30)
        return question

    def request(n: int, closed: bool) -> Request:
        events = [{"type": "http.request", "body": json.dumps({"n": n}).encode(), "more_body": False}]

        async def receive() -> dict[str, Any]:
            if events:
                return events.pop()
            if closed:
                return {"type": "http.disconnect"}
            await asyncio.sleep(60)
            raise AssertionError

        return Request({"type": "http", "method": "POST", "headers": []}, receive)

    async def all_three() -> list[int]:
        calls = Calls()
        first = asyncio.create_task(calls.answer(work, request(1, False)))
        await asyncio.to_thread(begun.wait, 30)
        others = [asyncio.create_task(calls.answer(work, request(n, n == 2))) for n in (2, 3)]
        await asyncio.sleep(0)
        assert running == [1]
        release.set()
        return [response.status_code for response in await asyncio.gather(first, *others)]

    assert asyncio.run(all_three()) == [200, CLOSED, 200]
    assert running == [1, 3]


def test_the_prompt_of_the_command_line_is_in_the_address() -> None:
    from omegaconf import OmegaConf

    assert fragment(OmegaConf.create({"task": {}})) == ""
    rows = [{"prompt": "a & b", "target": " c"}]
    assert fragment(OmegaConf.create({"task": {"rows": rows}})) == "#prompt=a%20%26%20b&target=%20c"
    rows = [{"messages": [{"role": "user", "content": "x"}]}]
    assert fragment(OmegaConf.create({"task": {"rows": rows}})).startswith("#messages=%5B%7B%22role")


def test_a_missing_extra_is_named(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else known(name, *rest)
    )
    assert run(tmp_path, "serve=true") == 1
    assert "serve=true needs uvicorn; install the extra" in capsys.readouterr().err


@pytest.fixture
def address(answers: AskedModel) -> Iterator[str]:
    """The page's address at a server that runs in a thread."""
    uvicorn = pytest.importorskip("uvicorn")
    from depass_lightning.commands.ask_app import ask_app

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        app = ask_app(answers, TOKEN, port)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}/?token={TOKEN}"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.mark.filterwarnings("ignore:.*tokenizer does not know")  # the page shows it, too
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium")
def test_a_prompt_is_typed_and_its_words_are_clicked(
    address: str, answers: AskedModel, tmp_path: Path
) -> None:
    expected = answers.scores({"prompt": PROMPT})
    with Browser(tmp_path, address) as browser:
        browser.until("document.activeElement?.id === 'prompt'")
        browser.type(PROMPT)
        browser.until("document.querySelectorAll('.piece').length === 15")
        assert browser.evaluate("document.querySelector('.equation').textContent").startswith("' Mary' = ")
        shown = "[...document.querySelectorAll('.token')].map((chip) => chip.firstChild.data)"
        assert browser.evaluate(shown) == [token["text"].strip() for token in expected["next"]]

        over = "new PointerEvent('pointerover', {bubbles: true})"
        browser.evaluate(f"document.querySelectorAll('.piece')[14].dispatchEvent({over})")
        assert "next token: Mary" in browser.evaluate("document.getElementById('tip').textContent")
        browser.evaluate("document.getElementById('layers').click()")
        browser.until("document.querySelectorAll('.layers .matrix-band').length === 4")

        browser.evaluate("document.querySelectorAll('.versus')[1].click()")
        browser.until("document.querySelector('.equation').textContent.includes('−')")
        browser.evaluate("document.querySelectorAll('.piece')[2].click()")
        browser.until("document.querySelector('.compared')")
        ids = [token["id"] for token in expected["next"][:2]]
        change = answers.change(
            {"prompt": PROMPT, "target": ids[0], "foil": ids[1], "edits": [{"start": 2, "end": 3}]}
        )
        numbers = browser.evaluate("[...document.querySelectorAll('.compared dd')].map((d) => d.textContent)")
        assert numbers == [signed(change["predicted"]), signed(change["real"])]
        assert browser.evaluate("document.querySelector('.piece.removed').textContent") == "Mary"

        state = browser.evaluate("location.hash")
        assert "edits=" in state
        assert "layers=true" in state
        browser.evaluate("location.hash = ''")
        browser.evaluate(f"location.hash = {json.dumps(state)}")
        browser.until("document.querySelector('.compared') && document.querySelector('.piece.removed')")
        browser.evaluate(f"location.hash = {json.dumps(state.replace('%22%22', '%22Anna%22'))}")
        browser.until("document.querySelector('.after')?.textContent.includes('a word in its place')")
        browser.evaluate("location.hash = 'prompt=Mary%20and%20John&source=heads'")
        browser.until("document.querySelector('.change-panel')?.textContent.includes('choose a source')")
        hostile = quote("<img src=x onerror=alert(1)></script>")
        browser.evaluate(f"location.hash = 'prompt={hostile}'")
        browser.until("document.querySelector('.prompt').textContent.includes('onerror')")
        assert browser.evaluate("document.querySelector('img')") is None
        browser.evaluate(f"location.hash = 'prompt=' + '{'word%20' * 3000}'")
        assert "more than the model's context" in browser.until(
            "document.getElementById('error').textContent"
        )
