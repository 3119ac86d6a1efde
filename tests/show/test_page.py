"""The page as people use it, in a real browser: needs Chromium (Debian's package), else skipped."""

import json
import threading
import urllib.parse

import pyarrow.parquet
import pytest

import gradindex
from gradindex.results import Result
from search.serve import listening
from search.serve.guard import host_names
from search.show import html, wording
from support.documents import small_documents
from support.indexes import SMALL
from support.needed import CHROMIUM, needs_chromium
from support.waiting import HANG

pytestmark = needs_chromium
MILLISECONDS = 1000 * HANG
HOSTILE = [
    '<script>alert("text")</script>', "<img src=x onerror=alert(1)>", '"><svg onload=alert(2)>',
    "</textarea></title></style><script>alert(3)</script>", "javascript:alert(4)",
    "'; alert(5); //", "{{ 7 * 7 }}{% raw %}", "&lt;b&gt; &amp; &#x3C;",
    "\x1b[2J\x1b]0;owned\x07", "\u202eevil\u202c \u2066x\u2069", "a\u200bb\ufeffc", "\x00\x08\x7f",
    "</p><iframe src='//example.org'></iframe>", "<a href='//example.org'>x</a>",
    "<meta http-equiv=refresh content='0;url=//example.org'>", "😀 é 日本語",
]


@pytest.fixture(scope="module")
def address(model_folder, tmp_path_factory):
    """A served index whose every text, id, field and file name wishes us ill."""
    folder = tmp_path_factory.mktemp("hostile")
    data = folder / "\"><img src=x onerror=alert('file')>\u202e.jsonl"
    rows = []
    for number, document in enumerate(small_documents()):
        bad = HOSTILE[number % len(HOSTILE)]
        rows.append({"text": f"{document['text']} {bad}", "url": f"{number} {bad}",
                     "place": bad, bad: bad})
    rows.append({**rows[2], "text": rows[2]["text"] + " Or so.", "url": "alike"})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gradindex.build(model_folder, data, out=folder / "an.index",
                    **{**SMALL, "seq_len": 60, "batch_tokens": 240, "modules": "all"})
    searcher = gradindex.open(folder / "an.index")
    listener = listening.listen("127.0.0.1", None)
    port = listener.getsockname()[1]
    running = listening.make_server(searcher, host_names("127.0.0.1", port), None)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(HANG)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"],
                                        timeout=MILLISECONDS)
        yield chromium
        chromium.close()


class Visit:
    """A page, and everything that must not happen on it."""

    def __init__(self, browser, address, **options):
        self.address = address
        self.bad: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(accept_downloads=True, **options)
        self.context.set_default_timeout(MILLISECONDS)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.page.on("dialog", lambda one: (self.bad.append(f"dialog {one.message}"),
                                            one.dismiss()))
        self.page.on("pageerror", lambda one: self.bad.append(f"error {one}"))
        self.page.on("console", lambda one: self.bad.append(f"{one.type}: {one.text}")
                     if one.type in ("error", "warning") else None)
        self.page.on("request", lambda one: self.requests.append(one.url))

    def search(self, prompt="The apple number", completion=" 3 grows by the river.", **more):
        """Type a query and wait until it is exact."""
        self.page.goto(self.address + "/")
        self.page.fill("#prompt", prompt)
        self.page.fill("#completion", completion)
        if more:
            self.page.locator("form.ask summary").click()
        for name, value in more.items():
            self.page.fill(f"[name={name}]", value)
        self.page.click("button.go")
        self.wait()

    def wait(self):
        self.page.wait_for_selector("main[data-state=done]")
        self.page.wait_for_load_state()  # its script has run

    def answer(self):
        """The JSON of the result that is shown."""
        job = self.page.get_attribute("main", "data-job")
        return self.page.request.get(f"{self.address}/api/result/{job}",
                                     timeout=MILLISECONDS).text()

    def result(self):
        return Result.from_json(self.answer())

    def hits(self):
        return self.page.locator(".hit:visible")

    def close(self):
        outside = [one for one in self.requests if not one.startswith(
            (self.address, "data:", "blob:", "file:"))]
        assert not self.bad and not outside
        self.context.close()


@pytest.fixture
def visit(browser, address):
    made = Visit(browser, address)
    yield made
    made.close()


def text_of(hit):
    return hit.locator(".text").first.inner_text()


def test_a_search_from_typing_to_exact_results(visit):
    visit.search()
    page = visit.page
    result = visit.result()
    assert result.query.prompt == "The apple number" and result.rescored == result.sequences
    assert page.locator(".recall").inner_text() == \
        f"recall: complete, all {result.sequences} sequences were rescored exactly."
    cards = page.locator(".hit")
    assert cards.count() == len(result) == 20
    assert [float(cards.nth(rank).get_attribute("data-influence")) for rank in range(20)] == \
        [hit.influence for hit in result]
    assert not page.locator(".approximate").count()
    first = result[0]
    start, end = wording.window(first)
    assert text_of(cards.first) == "…" * (start > 0) + html.visible_lines(
        "".join(first.tokens[start:end])) + "…" * (end < len(first.tokens))
    tinted = cards.first.locator(".text").first.locator("span[title]")
    strongest = max(range(len(first.tokens)), key=lambda place: abs(first.token_influence[place]))
    assert wording.number(first.token_influence[strongest]) in [
        tinted.nth(place).get_attribute("title") for place in range(tinted.count())]
    # another tab, the same address: the same answer at once
    other = visit.context.new_page()
    other.goto(page.url)
    if other.locator("button.go", has_text="Search now").count():
        other.click("button.go")
    other.wait_for_selector("main[data-state=done]")
    assert other.locator(".hit").first.get_attribute("data-id") == str(first.id)


def test_what_comes_after_the_end_changes_nothing(visit):
    """The hits of a search under way, asked for before its end, may come after the last page."""
    visit.search(prompt="The pear number")
    page = visit.page
    done = page.url

    def under_way(route):
        met = route.fetch()
        route.fulfill(response=met, body=met.text().replace(
            'data-state="done"', 'data-state="running"').replace('class="hits', 'class="no-hits'))

    page.route(done, under_way, times=1)
    page.add_init_script("""
        window.EventSource = class extends EventTarget {
          constructor() { super(); window.events = this; }
          close() {}
        };
        const send = XMLHttpRequest.prototype.send;
        let first = true;
        XMLHttpRequest.prototype.send = function (...what) {
          if (!first) return send.apply(this, what);
          first = false;
          window.release = () => new Promise((arrived) => {
            this.addEventListener("loadend", () => setTimeout(arrived));
            send.apply(this, what);
          });
        };
    """)
    page.reload()
    page.evaluate("""() => {
        document.body.append(document.createElement("progress"));
        const say = (name, data) => window.events.dispatchEvent(
          new MessageEvent(name, { data: JSON.stringify(data) }));
        say("stage", { step: 1, found: {}, hits: 20 });
        say("end", null);
    }""")
    page.wait_for_selector("main[data-state=done]")
    before = page.locator("#answer").inner_html()
    assert page.locator("#answer .hit").count() == 20
    page.evaluate("window.release()")
    assert page.locator("#answer").inner_html() == before


def test_layers_are_summed_again_and_kept_in_the_address(visit):
    visit.search()
    page = visit.page
    page.fill("[name=first]", "1")
    cards = page.locator(".hit")
    shown = []
    for rank in range(cards.count()):
        layers = [float(one) for one in cards.nth(rank).get_attribute("data-layers").split()]
        value = sum(layers[1:])
        shown.append(value)
        assert cards.nth(rank).locator(".influence").inner_text() == wording.number(value)
    assert shown == sorted(shown, reverse=True)
    assert "layers 1 to 2" in page.inner_text(".filters .shown") and page.url.endswith("#first=1")
    order = [cards.nth(rank).get_attribute("data-id") for rank in range(cards.count())]
    page.reload()
    visit.wait()
    page.wait_for_function("document.querySelector('.filters .shown').textContent !== ''")
    assert [cards.nth(rank).get_attribute("data-id") for rank in range(cards.count())] == order


def test_a_shared_link_opens_where_nobody_asked_before(visit):
    """Its layers, and its opened map, are kept while the search is under way; layer 0 is one."""
    page = visit.page
    link = visit.address + "/search?" + urllib.parse.urlencode(
        {"prompt": "The quince number", "completion": " 7 grows", "k": "9"})
    page.goto(link + "#last=0")
    visit.wait()
    page.wait_for_selector(".filters .shown:has-text('layers')")
    assert "layers 0 to 0" in page.inner_text(".filters .shown") and page.url.endswith("#last=0")
    cards = page.locator(".hit")
    shown = [float(one.get_attribute("data-layers").split()[0]) for one in cards.all()]
    assert shown == sorted(shown, reverse=True) and len(shown) == 9
    first = [hit for hit in visit.result() if hit.near is None][-1].id  # which isn't folded
    page.goto(visit.address)
    page.goto(f"{link}&shortlist=all#hit={first}&map=1")  # another search
    visit.wait()
    page.wait_for_selector(f"#h{first} .map")


def test_filters_folding_and_keys(visit):
    visit.search(k="40")
    page = visit.page
    total = page.locator(".hit").count()
    visible = visit.hits().count()
    page.fill("[name=text]", "market")
    assert 0 < visit.hits().count() < visible
    assert all("market" in visit.hits().nth(place).inner_text().lower()
               for place in range(visit.hits().count()))
    page.fill("[name=text]", "")
    folded = page.locator(".hit.folded").count()
    assert folded and visible == total - folded
    page.uncheck("[name=fold]")
    assert visit.hits().count() == total
    page.check("[name=fold]")
    page.locator(".unfold").first.click()
    assert visit.hits().count() > visible
    page.locator("body").click(position={"x": 5, "y": 5})
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.dataset.id") == \
        visit.hits().nth(1).get_attribute("data-id")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_the_map_of_a_hit(visit):
    visit.search(completion=" 3 grows by the hill.")
    page = visit.page
    result = visit.result()
    page.locator(".to-map").first.click()
    page.wait_for_selector(".map")
    columns = page.locator(".map .c")
    assert columns.count() == len(result[0].tokens)
    top = max(abs(value) for row in result[0].token_layer_influence for value in row)
    for place, row in enumerate(result[0].token_layer_influence):
        assert columns.nth(place).locator("rect").count() == sum(
            bool(wording.shade(value, top)) for value in row)


def test_tokens_can_be_chosen(visit):
    visit.search()
    page = visit.page
    labels = page.locator(".scored label")
    count = labels.count()
    labels.nth(0).click()
    page.click("button.go")
    page.wait_for_url("**score_on=**")
    visit.wait()
    result = visit.result()
    assert result.query.scored == count - 1
    assert [labels.nth(place).locator("input").is_checked() for place in range(count)] == \
        [False] + [True] * (count - 1)


def test_two_completions_side_by_side(visit):
    visit.search(compare=" 5 grows by the market.", k="5")
    page = visit.page
    both = json.loads(visit.answer())
    rows = page.locator("table tbody tr")
    assert rows.count() == len(both["influence"])
    first, second = (Result.from_json(json.dumps(one)) for one in both["results"])
    for result, place in ((first, 0), (second, 1)):
        for hit in result:
            assert both["influence"][str(hit.id)][place] == hit.influence
    differences = sorted((a - b for a, b in both["influence"].values()), reverse=True)
    assert [rows.nth(place).locator("td").nth(2).inner_text() for place in range(rows.count())] \
        == [wording.number(one) for one in differences]


def test_totals_by_field(visit):
    visit.page.goto(visit.address + "/")
    visit.page.fill("#prompt", "The apple number")
    visit.page.fill("#completion", " 3 grows by the river.")
    visit.page.locator("form.ask summary").click()
    visit.page.select_option("[name=group_by]", "place")
    visit.page.click("button.go")
    visit.wait()
    result, rows = visit.result(), visit.page.locator(".groups tbody tr")
    assert rows.count() == min(20, len(result.groups)) > 1
    for place in range(rows.count()):
        group, cells = result.groups[place], rows.nth(place).locator("td")
        assert cells.nth(0).inner_text() == html.visible_lines(group.value)
        assert cells.nth(1).inner_text() == wording.standard_errors(group)
        assert cells.nth(2).inner_text() == wording.number(group.influence)
        assert cells.nth(3).inner_text() == wording.unsigned(group.standard_error)
        assert cells.nth(6).inner_text().split() == [str(one) for one in group.hits[:8]] + \
            ["…"] * (len(group.hits) > 8)


def test_downloads_open_again(visit, tmp_path):
    visit.search()
    page = visit.page
    files = {}
    for form in ("JSON", "CSV", "PARQUET", "HTML"):
        with page.expect_download() as waiting:
            page.click(f".tabs a:text-is('{form}')")
        files[form] = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(files[form])
    result = Result.from_json(files["JSON"].read_text())
    table = pyarrow.parquet.read_table(files["PARQUET"])
    assert table["influence"].to_pylist() == [hit.influence for hit in result]
    assert table["token_influence"].to_pylist() == [hit.token_influence for hit in result]
    assert len(files["CSV"].read_text().splitlines()) > len(result)
    # what was exported from the command line's file is the same document
    assert html.document(result) == files["HTML"].read_text()
    page.goto(files["HTML"].as_uri())
    assert page.locator(".hit").count() == len(result)
    page.fill("[name=first]", "1")
    assert "layers 1 to 2" in page.inner_text(".filters .shown")
    page.locator(".mapped summary").first.click()
    assert page.locator(".map:visible").count() == 1


def test_without_javascript(browser, address):
    visit = Visit(browser, address, java_script_enabled=False)
    page = visit.page
    page.goto(address + "/")
    page.fill("#prompt", "The pear number")
    page.fill("#completion", " 1 grows by the river.")
    page.click("button.go")
    visit.wait()  # the page looks again by itself
    assert page.locator(".hit").count() == 20 and not page.locator(".approximate").count()
    assert page.locator(".filters").is_hidden()
    page.locator("details.all summary").first.click()
    page.click("a:text-is('Opponents')")
    page.wait_for_selector(".tabs [aria-current]:text-is('Opponents')")
    visit.wait()
    assert page.inner_text(".tabs [aria-current]") == "Opponents"
    shown = [float(one.get_attribute("data-influence")) for one in page.locator(".hit").all()]
    assert shown == sorted(shown) and len(shown) == 20
    page.locator(".to-map").first.click()
    page.wait_for_selector(".map .c")
    assert page.locator(".map .c").count()
    visit.close()


def test_a_link_from_elsewhere_waits_for_a_click(visit):
    page = visit.page
    link = visit.address + "/search?" + urllib.parse.urlencode(
        {"prompt": "The lime", "completion": " number 4"})
    page.set_content(f"<a id=x href='{link}'>x</a>")
    page.click("#x")
    page.wait_for_selector("text=opened from elsewhere")
    assert not page.locator(".hit").count()
    page.click("button.go")
    visit.wait()
    assert page.locator(".hit").count()


def test_hostile_text_stays_text(visit):
    for bad in HOSTILE:
        visit.page.goto(visit.address + "/")
        visit.page.fill("#prompt", bad.replace("\x00", ""))  # which no key types
        visit.page.fill("#completion", " grows")
        visit.page.click("button.go")
        visit.page.wait_for_selector("main[data-state=done], .failed")
        assert visit.page.input_value("#prompt") == bad.replace("\x00", "")
    visit.search(k="40")
    shown = visit.page.inner_text("body")
    assert all(one in shown for one in ("<img src=x onerror=alert(1)>", "{{ 7 * 7 }}",
                                        r"\x1b[2J", r"\u202eevil", "&lt;b&gt;"))
    assert not visit.page.locator("main img, main iframe, main script, main svg[onload]").count()
    for name in ("\u202e", "\x1b", "\u200b", "\x00"):
        assert name not in visit.page.content()


def test_accessible(visit):
    from axe_playwright_python.sync_playwright import Axe

    def serious():
        found = Axe().run(visit.page).response["violations"]
        return [(one["id"], one["impact"], one["nodes"][0]["html"][:200]) for one in found
                if one["impact"] in ("serious", "critical")]

    for scheme in ("light", "dark"):
        visit.page.emulate_media(color_scheme=scheme)
        visit.page.goto(visit.address + "/")
        assert serious() == []
        visit.search()
        visit.page.locator(".to-map").first.click()
        visit.page.wait_for_selector(".map")
        assert serious() == []
        visit.search(compare=" 5 grows by the market.", k="5")
        assert serious() == []
