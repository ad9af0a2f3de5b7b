"""The chat page in headless Chromium, against a real server, with and without an API key.

What a real model cannot be made to answer (HTML, errors in mid-stream) is played inside the browser, by `fake_answers`.
PAGE_SCREENSHOTS=<folder> keeps pictures.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from support.chat_models import make_chat_model
from support.needs import need
from support.processes import build
from support.serving import ServerProcess

need("selenium", "llguidance", "starlette", "uvicorn", "pydantic", "prometheus_client")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
LONG = "Count from 1 to 1000, one number after the other."


@pytest.fixture(scope="module")
def browser():
    for name, found in {"chromium": CHROMIUM, "chromedriver": CHROMEDRIVER}.items():
        if found is None:
            pytest.skip(f"needs {name}")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def engine(browser, tmp_path_factory):
    directory = tmp_path_factory.mktemp("page")
    # Without an end, so that there is time to stop an answer.
    model = make_chat_model(directory / "model", end=None, max_position_embeddings=4096)
    done = build("--model", model, "--p", 1, "--max-seq-len", 4096, "--output", directory / "engine")
    assert done.returncode == 0, done.stderr
    return directory / "engine"


@pytest.fixture(scope="module")
def server(engine):
    yield from running(engine, None)


@pytest.fixture(scope="module")
def locked_server(engine):
    yield from running(engine, "the-key")


def running(engine, key):
    server = ServerProcess(1, engine, "--device", "cpu", "--model-name", "tiny", api_key=key)
    yield server
    assert server.stop() == 0, server.output


class Page:
    def __init__(self, driver, server):
        self.driver, self.server = driver, server

    def load(self, key=None):
        """A fresh page, whose tab already holds the key if one is given."""
        address = self.server.url + "/"
        self.driver.get(address)
        self.js("sessionStorage.clear()")
        if key:
            self.js("sessionStorage.setItem('cqil-trt.api-key', arguments[0])", key)
        self.driver.get(address)
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)  # forget what came before
        if key or not self.server.api_key:
            self.wait(lambda: " · " in self.driver.title)

    def js(self, script, *values):
        return self.driver.execute_script(script, *values)

    def wait(self, condition, seconds=30):
        return WebDriverWait(self.driver, seconds, poll_frequency=0.03).until(lambda _: condition())

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        """Of the last such element; empty if there is none."""
        return self.js("return [...document.querySelectorAll(arguments[0])].at(-1)?.textContent ?? ''", selector)

    def keys(self, *keys):
        """Typed at whatever has the focus, as a person without a mouse does."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def shifted(self, key):
        ActionChains(self.driver).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()

    def set(self, name, value):
        self.js("document.querySelector(`[name=${arguments[0]}]`).value = arguments[1]", name, value)

    def ask(self, text, tokens=24):
        self.set("max_tokens", tokens)
        self.js("document.getElementById('input').focus()")
        self.keys(text, Keys.ENTER)

    def busy(self):
        return self.one("#log").get_attribute("aria-busy") == "true"

    def answered(self, turns=1):
        self.wait(lambda: len(self.all(".meta, .error")) == turns and not self.busy())
        return self.text(".answer")

    def focused(self):
        return self.js("return document.activeElement.id")

    def requests(self):
        """Bodies that the page has posted since the last look."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        posts = [e["params"]["request"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [json.loads(post["postData"]) for post in posts if post["method"] == "POST"]

    def fake_answers(self, *answers):
        """The next posts get these: dicts of status and error, or lists of texts, each as the network gives it."""
        self.js(
            """
            const answers = arguments[0], real = window.fetch;
            window.posted = [];
            window.fetch = async (address, options) => {
              if (options.method !== "POST" || !answers.length) return real(address, options);
              window.posted.push([address, JSON.parse(options.body)]);
              const answer = answers.shift();
              const { status, error } = answer;
              if (error) return Response.json({ error: { message: error } }, { status });
              const encoder = new TextEncoder();
              const bytes = answer.map((piece) => piece.big ? encoder.encode(piece) : new Uint8Array(piece));
              return new Response(new ReadableStream({
                async pull(controller) {
                  await new Promise((done) => setTimeout(done, 30));
                  bytes.length ? controller.enqueue(bytes.shift()) : controller.close();
                },
              }));
            };
            """,
            list(answers),
        )

    def phone(self, width=360, height=640):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def scheme(self, name):
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def picture(self, name):
        folder = os.environ.get("PAGE_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


@pytest.fixture
def page(browser, server):
    yield from shown(browser, server)


@pytest.fixture
def locked_page(browser, locked_server):
    yield from shown(browser, locked_server)


def shown(browser, server):
    page = Page(browser, server)
    page.load(server.api_key)
    yield page
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})


def chunk(text="", finish=None, **more):
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": finish}], **more}) + "\n\n"


END = chunk(finish="stop") + 'data: {"choices":[],"usage":{"completion_tokens":5}}\n\ndata: [DONE]\n\n'


def said(body):
    """All that a request tells the model, whether as chat or as plain text."""
    return body["prompt"] if "prompt" in body else "\n".join(message["content"] for message in body["messages"])


def test_loads_under_its_policy_without_complaints(page):
    assert page.driver.title.startswith("cqil-trt · ")
    assert page.text("#model") and page.text("#model") in page.driver.title
    assert page.focused() == "input"
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_text_streams_and_is_measured(page):
    # Watched inside the page, so that a fast server is not missed between two looks.
    page.js("""
        window.lengths = new Set();
        new MutationObserver(() => window.lengths.add(document.querySelector(".answer").textContent.length))
          .observe(document.getElementById("log"), { subtree: true, childList: true, characterData: true });
    """)
    page.ask(LONG, tokens=120)
    answer = page.answered()
    assert len([n for n in page.js("return [...window.lengths]") if 0 < n < len(answer)]) >= 2
    assert re.fullmatch(r"\d+ ms to first token", page.text(".ttft"))
    assert re.fullmatch(r"\d+\.\d tokens/s", page.text(".speed"))
    assert re.fullmatch(r"\d+ tokens?", page.text(".tokens"))
    assert re.fullmatch(r"finish: (stop|length)", page.text(".finish"))
    body = page.requests()[-1]  # the last, as a model without a chat template is asked twice
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True} and body["max_tokens"] == 120


def test_second_turn_sends_the_history_and_the_settings(page):
    page.ask("My name is Ada.")
    first = page.answered()
    page.set("system", "Be brief.")
    page.set("temperature", "0.5")
    page.set("top_p", "0.9")
    page.set("seed", "7")
    page.requests()
    page.ask("What is my name?")
    page.answered(2)
    body = page.requests()[-1]
    assert (body["temperature"], body["top_p"], body["seed"]) == (0.5, 0.9, 7)
    for text in ("My name is Ada.", first.strip(), "What is my name?"):
        assert text in said(body)
    if "messages" in body:
        assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    page.one("#new").click()
    assert page.all(".turn") == [] and page.focused() == "input"
    page.ask("Again.")
    page.answered()
    assert "Ada" not in said(page.requests()[-1])


def test_escape_stops_and_keeps_the_partial_text(page):
    page.ask(LONG, tokens=3900)
    page.wait(lambda: len(page.text(".answer .text")) > 20)
    page.keys(Keys.ESCAPE)
    answer = page.answered()
    assert page.text(".finish") == "finish: stopped"
    assert len(answer) > 20 and not page.one("#stop").is_displayed() and page.focused() == "input"
    page.ask("Go on.")
    page.answered(2)
    assert answer.strip() in said(page.requests()[-1])


def test_asks_for_the_api_key(locked_page):
    page = locked_page
    page.load()
    page.wait(lambda: page.one("dialog").is_displayed())
    page.keys("wrong-key", Keys.ENTER)
    page.wait(lambda: "did not accept" in page.text("#key-why") and page.one("dialog").is_displayed())
    page.picture("key")
    page.keys(Keys.ESCAPE)
    page.wait(lambda: "no model" in page.text("#model"))
    page.ask("Hello")
    page.wait(lambda: page.one("dialog").is_displayed())
    page.keys(page.server.api_key, Keys.ENTER)
    assert page.answered() and not page.all(".error") and " · " in page.driver.title
    kept = page.js("return [sessionStorage['cqil-trt.api-key'], localStorage.length, document.cookie]")
    assert kept == [page.server.api_key, 0, ""]


def test_unreachable_server_is_told_and_retried(page):
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*completions*"]})
    page.ask("Hello")
    page.answered()
    assert "No connection to the server" in page.text(".error p")
    page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
    page.one(".error button").click()
    page.wait(lambda: page.all(".meta"))
    assert not page.all(".error") and len(page.all(".turn")) == 1 and page.focused() == "input"


def test_errors_of_the_server_are_told_and_retried(page):
    page.fake_answers(
        {"status": 503, "error": "The queue is full."},
        [chunk("Half an ans"), 'data: {"error":{"message":"The engine ran out of memory."}}\n\n'],
        [chunk("Half an ans")],
        [chunk("Whole.") + END],
    )
    page.ask("Hello")
    page.answered()
    assert page.text(".error p") == "The queue is full. (HTTP 503)"
    page.one(".error button").click()
    page.wait(lambda: page.text(".error p") == "The engine ran out of memory.")
    assert page.text(".answer") == "Half an ans"
    page.picture("error")
    page.one(".error button").click()
    page.wait(lambda: "before the answer was complete" in page.text(".error p"))
    page.one(".error button").click()
    page.wait(lambda: page.text(".finish") == "finish: stop")
    assert page.text(".answer") == "Whole." and not page.all(".error") and len(page.all(".turn")) == 1


def test_model_without_a_chat_template_continues_plain_text(page):
    choice = {"text": " upon a time", "finish_reason": "stop"}
    answer = json.dumps({"choices": [choice], "usage": {"completion_tokens": 3}})
    text = f"data: {answer}\r\n\r\ndata: [DONE]\r\n\r\n"
    page.fake_answers({"status": 400, "error": "messages: this model has no chat template"}, [text], [text])
    page.ask("Once")
    assert page.answered() == " upon a time"
    assert "no chat template" in page.text("#note") and page.one("#note").is_displayed()
    page.ask("There")
    page.answered(2)
    posted = page.js("return window.posted")
    assert [address for address, _ in posted] == ["v1/chat/completions", "v1/completions", "v1/completions"]
    assert posted[2][1]["prompt"] == "Once upon a time\nThere"
    page.picture("plain-text")


def test_answer_stopped_before_any_text_is_left_out_of_the_history(page):
    page.fake_answers([chunk()] * 1000)
    page.ask("Never mind")
    page.wait(lambda: page.js("return window.posted.length"))
    page.one("#stop").click()
    assert page.answered() == "No text." and page.focused() == "input"
    page.requests()
    page.ask("Hello")
    page.answered(2)
    assert "Never mind" not in said(page.requests()[-1])


def test_one_of_several_models_is_chosen(page):
    page.js("""
        const real = window.fetch;
        window.fetch = (address, options) => address === "v1/models"
          ? Promise.resolve(Response.json({ data: [{ id: "first" }, { id: "second" }] })) : real(address, options);
        return loadModels();
    """)
    page.fake_answers([chunk("Yes.") + END])
    page.one("#toggle").click()
    page.one("#models").send_keys("second")
    page.ask("Hello")
    page.answered()
    assert page.driver.title == "cqil-trt · second" and page.js("return window.posted[0][1].model") == "second"


def test_html_is_text_and_code_is_a_block(page):
    evil = "<img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
    code = "for x in range(3):\n    print('<b>')  # é"
    whole = chunk(f"{evil}\n```python\n{code}\n```\nDone: **bold** &amp; 🙂") + END
    whole = whole.replace("\\ud83d\\ude42", "🙂").encode()
    page.fake_answers([list(whole[at : at + 37]) for at in range(0, len(whole), 37)])  # cut inside lines and characters
    page.ask("<i>Show</i> code")
    page.answered()
    assert page.text(".user") == "<i>Show</i> code"
    texts = [block.get_property("textContent") for block in page.all(".answer > *")]
    assert texts == [evil, code, "Done: **bold** &amp; 🙂"]
    assert [block.tag_name for block in page.all(".answer > *")] == ["div", "pre", "div"]
    assert not page.all(".answer img, .answer script") and "hacked" not in page.driver.title


def test_scrolls_along_only_for_a_reader_at_the_bottom(page):
    lines = [chunk(f"line {n}\nand\nmore\n") for n in range(50)]
    page.fake_answers(lines + [END], lines + [END])
    at_bottom = "const m = document.querySelector('main'); return m.scrollHeight - m.scrollTop - m.clientHeight < 2"
    page.ask("Talk")
    page.answered()
    assert page.js(at_bottom)
    page.ask("More")
    page.wait(lambda: "line 15\n" in page.text(".answer"))
    page.js("document.querySelector('main').scrollTop = 40")
    page.answered(2)
    assert page.js("return document.querySelector('main').scrollTop") == 40


def test_fits_a_phone(page):
    page.phone()
    page.scheme("dark")
    long = "A_long_name." * 30 + "\n```\n" + "x = 1; " * 40 + "\n```\n" + "words and more words " * 60
    page.fake_answers([chunk(long) + END])
    page.ask("w" * 200)
    page.answered()
    fits = """
        const main = document.querySelector("main");
        return [innerWidth, document.documentElement.scrollWidth, main.scrollWidth <= innerWidth];
    """
    assert page.js(fits) == [360, 360, True]
    page.one("#toggle").click()
    assert page.js(fits) == [360, 360, True]
    page.picture("phone-settings")
    page.phone(height=300)  # what a keyboard on the screen leaves
    for selector in ("#input", "#send", "#toggle"):
        box = page.js("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", selector)
        assert 0 <= box["left"] and box["right"] <= 360 and 0 <= box["top"] and box["bottom"] <= 300, selector


def test_works_by_keyboard_alone(page):
    page.set("max_tokens", 24)
    page.keys("one")
    page.shifted(Keys.ENTER)
    page.keys("two")
    assert page.one("#input").get_property("value") == "one\ntwo"
    page.keys(Keys.ENTER)
    page.answered()
    assert (
        page.text(".user") == "one\ntwo"
        and page.one("#input").get_property("value") == ""
        and page.focused() == "input"
    )

    def back_to(target):
        for _ in range(12):
            if page.focused() == target:
                return
            page.shifted(Keys.TAB)
        raise AssertionError(f"{target} is not reached with Shift+Tab")

    back_to("toggle")
    assert page.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keys(Keys.ENTER)
    assert page.one("#settings").is_displayed() and page.one("#toggle").get_attribute("aria-expanded") == "true"
    page.keys(Keys.TAB, Keys.TAB, Keys.TAB, "9", Keys.TAB)  # system prompt, then an impossible temperature
    page.js("document.getElementById('input').focus()")
    page.keys("three", Keys.ENTER)
    assert page.js("return document.activeElement.name") == "temperature" and len(page.all(".turn")) == 1
    page.keys(Keys.BACKSPACE)
    back_to("new")
    page.keys(Keys.SPACE)
    assert not page.all(".turn") and page.focused() == "input"


def test_every_control_has_a_name(page):
    unnamed = page.js("""
        return [...document.querySelectorAll("input, textarea, select, button")]
          .filter((e) => !e.labels?.length && !e.textContent.trim() && !e.ariaLabel).map((e) => e.outerHTML);
    """)
    assert unnamed == []
    assert page.one("#log").get_attribute("aria-live") == "polite"
