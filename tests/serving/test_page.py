"""The page in a real browser, in front of a real gateway and model server."""

import base64
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Error, FilePayload, Page, Route, expect, sync_playwright

from bundle.golden import draw

DOG = Path(__file__).parents[3] / "shared/data/photos/dog/0207_n02099601_golden_retriever.JPEG"
TIMEOUT_MS = 30_000  # for the browser and the model server together on two busy cores


def drawing(number: int = 0) -> FilePayload:
    png = io.BytesIO()
    Image.fromarray(draw(number + 1, 480, 640)[number]).save(png, "PNG")
    return {"name": f"drawing-{number}.png", "mimeType": "image/png", "buffer": png.getvalue()}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("neither chromium nor google-chrome is installed")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    expect.set_options(timeout=TIMEOUT_MS)
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=arguments) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, gateway: Any, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page, opened. Fails the test on console errors (CSP's too) and on requests to another host."""
    faults: list[str] = []
    with browser.new_context(**getattr(request, "param", {"viewport": {"width": 1000, "height": 700}})) as context:
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        own = (f"{gateway.url}/", f"blob:{gateway.url}/", "data:")

        def console(message: ConsoleMessage) -> None:
            # The browser logs every refusal of the server; of a picture it is none of the page's faults.
            if message.type == "error" and "/predict" not in message.location["url"]:
                faults.append(message.text)

        page.on("console", console)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(own) else faults.append(request.url))
        response = page.goto(gateway.url)
        assert response
        assert "default-src 'none'" in response.headers["content-security-policy"]
        expect(page.get_by_text("knows 119 answers")).to_be_visible()
        yield page
    assert not faults


def choose(page: Page, file: FilePayload | Path) -> None:
    page.get_by_label("Choose a picture").set_input_files(file)


def expect_answer(page: Page, label: str) -> None:
    expect(page.get_by_role("status").get_by_role("heading")).to_have_text(label)
    expect(page.get_by_role("alert")).to_be_empty()
    expect(page.get_by_role("listitem")).to_have_count(5)
    expect(page.get_by_text("Answered by dog-breeds")).to_be_visible()
    expect(page.get_by_role("img", name="The picture")).to_be_visible()
    assert page.evaluate("document.querySelector('img').naturalWidth") > 0


def test_chosen_file(page: Page, tmp_path: Path) -> None:
    choose(page, drawing(8))
    expect_answer(page, "not a dog")
    page.evaluate("Promise.all(document.getAnimations().map(({ finished }) => finished))")
    page.screenshot(path=os.environ.get("SCREENSHOT") or tmp_path / "page.png")


def test_photograph(page: Page) -> None:
    if not DOG.exists():
        pytest.skip(f"{DOG} is not there")
    choose(page, DOG)
    expect_answer(page, "golden retriever")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"Dear diary", "these 10 bytes are not a picture"),
        (b"\0\0\0\x18ftypheic" + bytes(99), "HEIC and AVIF are not supported"),
    ],
)
def test_refused_file(page: Page, data: bytes, sentence: str) -> None:
    choose(page, drawing())
    expect_answer(page, "not a dog")
    choose(page, {"name": "dog.jpg", "mimeType": "image/jpeg", "buffer": data})
    expect(page.get_by_role("alert")).to_contain_text(sentence)
    expect(page.get_by_text("dog.jpg cannot be shown here")).to_be_visible()
    expect(page.get_by_role("listitem")).to_have_count(0)
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()  # the same file would be refused again
    choose(page, drawing())
    expect_answer(page, "not a dog")


SEND = """(element, [kind, content]) => {
  const files = new DataTransfer();
  const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt());
  if (content) files.items.add(new File([bytes], "image.png", { type: "image/png" }));
  const options = { bubbles: true, cancelable: true, dataTransfer: files, clipboardData: files };
  element.dispatchEvent(kind === "paste" ? new ClipboardEvent(kind, options) : new DragEvent(kind, options));
}"""


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_dropped_and_pasted(page: Page, kind: str) -> None:
    page.get_by_role("heading", name="Kennel").evaluate(SEND, [kind, ""])
    expect(page.get_by_role("alert")).to_contain_text("There is no picture in that")
    page.get_by_role("heading", name="Kennel").evaluate(SEND, [kind, base64.b64encode(drawing()["buffer"]).decode()])
    expect_answer(page, "not a dog")


def test_keyboard(page: Page) -> None:
    with page.expect_file_chooser() as chooser:  # from the start: it takes a moment to be in force
        page.keyboard.press("Tab")  # past the model
        page.keyboard.press("Tab")
        expect(page.get_by_label("Choose a picture")).to_be_focused()
        page.keyboard.press("Enter")
    chooser.value.set_files(drawing())
    expect_answer(page, "not a dog")


@pytest.mark.parametrize(
    "page",
    [{"viewport": {"width": w, "height": 844}, "has_touch": True, "is_mobile": True} for w in (390, 320)],
    indirect=True,
)
def test_phone(page: Page) -> None:
    expect(page.get_by_text("Take a photo")).to_be_visible()
    choose(page, drawing())
    expect_answer(page, "not a dog")
    # Not innerWidth: a phone widens it to what does not fit.
    assert page.viewport_size
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]


def test_try_again(page: Page) -> None:
    busy = {"status": 503, "detail": "every worker is busy"}
    page.route("**/predict?*", lambda route: route.fulfill(status=503, json=busy, headers={"Retry-After": "2"}))
    choose(page, drawing())
    expect(page.get_by_role("alert")).to_have_text("every worker is busy")
    expect(page.get_by_role("button", name="Try again in 2 s")).to_be_disabled()
    page.unroute_all()
    page.route("**/predict?*", lambda route: route.abort("connectionrefused"))
    page.get_by_role("button", name="Try again", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
    page.unroute_all()
    page.get_by_role("button", name="Try again", exact=True).click()
    expect_answer(page, "not a dog")


def test_late_answer_to_an_earlier_picture_is_not_shown(page: Page) -> None:
    held: list[Route] = []
    page.route("**/predict?*", lambda route: route.continue_() if held else held.append(route))
    with page.expect_request("**/predict?*"):
        choose(page, drawing(1))
    choose(page, drawing(2))
    expect_answer(page, "not a dog")
    with suppress(Error):  # the page may have hung up
        held[0].fulfill(status=503, json={"detail": "late"})
    expect(page.get_by_role("img", name="drawing-2.png")).to_be_visible()
    expect_answer(page, "not a dog")


def test_model_selector(page: Page) -> None:
    models = [{"name": "dog-breeds", "ready": True, "classes": ["a", "b"]}, {"name": "flowers", "ready": False}]
    page.route("**/v1/models", lambda route: route.fulfill(json={"models": models}))
    page.reload()
    choose(page, drawing())
    expect_answer(page, "not a dog")
    with page.expect_request("**/predict?*model=flowers"):
        page.get_by_label("Model").select_option("flowers (not ready)")


def test_one_model_leaves_nothing_to_choose(page: Page) -> None:
    page.route("**/v1/models", lambda route: route.fulfill(json={"models": [{"name": "dog-breeds", "ready": True}]}))
    page.reload()
    choose(page, drawing())
    expect_answer(page, "not a dog")
    expect(page.get_by_label("Model")).to_be_hidden()
