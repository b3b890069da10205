"""The console, in a real browser before a real server."""

import json
import re
from pathlib import Path

import polars as pl
import pytest

import tiglon.serving

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")

WEB = Path(tiglon.serving.__file__).parent / "web"
CHROMIUM = Path("/usr/bin/chromium")
SCRIPT = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script>'
PATIENCE = 20_000  # milliseconds

in_a_browser = pytest.mark.skipif(
    not CHROMIUM.exists(), reason="Chromium is not installed (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def own_server(bundle_path, served, tmp_path_factory):
    """A server whose users and items these tests change. One item's text is a script."""
    folder = tmp_path_factory.mktemp("console")
    with served(bundle_path, folder, "--state", str(folder / "state")) as running:
        running.post("/v1/items", {"add": [{"item_id": 900, "title": SCRIPT, "category": SCRIPT}]})
        yield running


@pytest.fixture(scope="module")
def tab(own_server):
    with playwright.sync_playwright() as started:
        # Chromium as root, as in containers, has no sandbox; all that it opens here is ours.
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 800})
        tab.set_default_timeout(PATIENCE)
        tab.base = f"http://127.0.0.1:{own_server.port}"
        tab.wrong = []
        tab.on("console", lambda said: said.type in ("error", "warning") and tab.wrong.append(said.text))
        tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
        tab.on("request", lambda r: r.url.startswith((tab.base, "blob:")) or tab.wrong.append(r.url))
        yield tab
        browser.close()


@pytest.fixture
def page(tab):
    """The console, opened anew. Whatever a test does there, no error is logged and nobody else is asked."""
    tab.goto("about:blank")
    tab.goto(tab.base + "/console/")
    yield tab
    tab.unroute_all()
    wrong, tab.wrong = tab.wrong, []
    assert wrong == []
    assert tab.evaluate("window.harmed") is None


def look(page, user):
    page.get_by_label("User id").first.fill(str(user))
    page.get_by_role("button", name="Recommend", exact=True).click()
    page.locator("#answers li, #who-trouble p").first.wait_for()


def names(page, selector="#answers > ol"):
    return page.locator(f"{selector} .item .name").all_inner_texts()


def open_view(page, name):
    page.get_by_role("link", name=name).click()


@in_a_browser
def test_a_user_is_found_with_a_life_and_reasons(page, own_server):
    life = own_server.get("/v1/users/7")["events"]
    answer = own_server.post("/v1/recommend", {"user_id": 7, "explain": True})

    look(page, 7)

    assert page.locator("#life-title").inner_text() == f"User 7, {len(life)} behaviours"
    assert page.locator("#line circle.dot").count() == len(life)
    ids = [text.split(" ")[0] for text in page.locator("#answers .what .id").all_inner_texts()]
    assert ids == [str(item["item_id"]) for item in answer["items"]]
    page.locator("#answers summary").first.click()
    why = page.locator("#answers .why").first
    for source in answer["items"][0]["reasons"]["sources"]:
        assert source["name"] in why.inner_text()


@in_a_browser
def test_the_time_line_is_walked_by_keys(page, own_server):
    life = own_server.get("/v1/users/8")["events"]
    look(page, 8)
    slider = page.get_by_role("slider")

    slider.press("Home")

    assert slider.get_attribute("aria-valuenow") == "1"
    assert f"\n{life[0]['item_id']} ·" in page.locator("#picked").inner_text()
    slider.press("ArrowRight")
    assert slider.get_attribute("aria-valuenow") == "2"


@in_a_browser
def test_what_is_tried_shows_what_would_change_and_is_not_stored(page, own_server):
    before = own_server.get("/v1/users/9")["events"]
    look(page, 9)
    page.locator("#answers button", has_text="Try").last.click()
    page.locator(".sides").wait_for()
    page.locator("#events button").first.click()
    page.locator("#edits li").nth(1).wait_for()

    assert page.locator(".sides .side").count() == 2
    assert page.locator("#edits").inner_text().startswith("without")
    assert page.locator("circle.gone").count() == 1
    assert re.search(
        r"\d+ new, \d+ gone, \d+ moved|Nothing changed", page.locator("#answers .changes").inner_text()
    )

    page.get_by_role("button", name="Undo all").click()
    page.locator(".sides").wait_for(state="detached")
    assert own_server.get("/v1/users/9")["events"] == before


@in_a_browser
def test_an_event_that_is_stored_changes_the_list(page, own_server):
    before = len(own_server.get("/v1/users/10")["events"])
    page.get_by_label("Seen items").select_option("hide")
    look(page, 10)
    first = page.locator("#answers .what .id").first.inner_text().split(" ")[0]
    top = names(page)[0]

    page.get_by_label("They take the item").fill(first)
    page.get_by_role("button", name="Store").click()
    page.locator(".sides").wait_for()

    assert top not in names(page, ".side:last-child")  # it is seen now
    assert page.locator(".side:first-child .is-gone .name").first.inner_text() == top
    assert "gone" in page.locator("#said").inner_text()
    after = own_server.get("/v1/users/10")["events"]
    assert len(after) == before + 1
    assert after[-1]["item_id"] == int(first)
    assert page.locator("#life-title").inner_text() == f"User 10, {before + 1} behaviours"


@in_a_browser
def test_a_history_is_typed(page):
    page.get_by_text("History", exact=True).click()
    page.get_by_label("Item ids, oldest first").fill("3, 5 8")
    page.get_by_role("button", name="Recommend", exact=True).click()
    page.locator("#answers li").first.wait_for()

    assert page.locator("#life-title").inner_text() == "A history of 3 items"
    assert page.locator("#store").is_disabled()


@in_a_browser
def test_a_stranger_gets_what_strangers_get_and_that_is_said(page):
    look(page, "nobody")

    assert "Nothing is known of this user" in page.locator("#line").inner_text()
    assert page.locator("#provenance .degraded").count() >= 1


@in_a_browser
def test_the_tree_is_walked_down_to_texts_and_a_script_in_them_is_words(page, own_server):
    root = own_server.get("/v1/tree")
    open_view(page, "Semantic IDs")
    page.locator(".column .node").first.wait_for()
    assert page.locator(".column .node").count() == len(root["children"])

    node, prefix = root, []
    while node["children"]:
        code = next(c["code"] for c in node["children"] if holds(own_server, [*prefix, c["code"]], 900))
        prefix.append(code)
        place = page.locator(f'.node[data-at="{",".join(map(str, prefix))}"]')
        place.focus()
        if len(prefix) == root["depth"]:
            break
        place.press("ArrowRight")
        page.locator(".column").nth(len(prefix)).wait_for()
        node = own_server.get("/v1/tree?" + "&".join(f"prefix={c}" for c in prefix))

    assert "onerror" in place.inner_text()
    assert page.locator("main img").count() == 0
    place.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.at") == ",".join(map(str, prefix[:-1]))


def holds(server, prefix, item):
    """Whether an item's ID begins with a prefix."""
    node = server.get("/v1/tree?" + "&".join(f"prefix={code}" for code in prefix))
    if len(prefix) == node["depth"] - 1:
        return any(child["items"][0]["item_id"] == item for child in node["children"])
    if len(prefix) == node["depth"]:
        parent = server.get("/v1/tree?" + "&".join(f"prefix={code}" for code in prefix[:-1]))
        return any(
            c["code"] == prefix[-1] and any(i["item_id"] == item for i in c["items"])
            for c in parent["children"]
        )
    return any(holds(server, [*prefix, child["code"]], item) for child in node["children"])


@in_a_browser
def test_where_a_beam_went_is_drawn_and_marked_in_the_tree(page, own_server):
    beam = own_server.post("/v1/beam", {"user_id": 7, "k": 15})
    open_view(page, "Semantic IDs")
    page.locator("#beam-user").fill("7")
    page.locator("#beam-form button").click()
    page.locator(".beam-depth").first.wait_for()

    assert page.locator(".beam-depth").count() == len(beam["depths"])
    best = beam["depths"][0][0]["prefix"]
    assert page.locator(f'.node[data-at="{best[0]}"] .kept').inner_text().startswith("beam 1 ·")


@in_a_browser
def test_two_answers_are_compared_saved_and_opened(page, tmp_path):
    look(page, 7)
    page.get_by_role("button", name="Keep to compare").click()
    look(page, 11)
    page.locator("#life-title", has_text="User 11").wait_for()
    page.get_by_role("button", name="Keep to compare").click()
    open_view(page, "Compare")

    assert page.locator("#compare-lists .side").count() == 2
    assert page.locator("#compare-table").inner_text().count(bundle_of(page)) == 2

    with page.expect_download() as saved:
        page.locator("#save-a").click()
    file = tmp_path / "answer.json"
    saved.value.save_as(file)
    page.get_by_label("Open a saved answer").set_input_files(file)
    page.locator("#compare-b option").nth(2).wait_for(state="attached")
    page.locator("#compare-a").select_option("0")
    assert page.locator("#compare-sum").inner_text().startswith("Nothing changed · 100% in both")

    file.write_text('{"not": "one"}')
    page.get_by_label("Open a saved answer").set_input_files(file)
    page.locator("#compare-trouble", has_text="is no saved answer").wait_for()


def bundle_of(page):
    return page.locator("#bundle").inner_text().removeprefix("bundle ")


@in_a_browser
def test_health_counts_what_was_asked(page):
    look(page, 7)
    open_view(page, "Health")
    page.locator("#by-route td", has_text="/v1/recommend").wait_for()

    assert page.locator("#health-now dd").count() == 6
    assert page.locator("#by-source li .number").count() >= 1


@in_a_browser
def test_the_servers_own_words_are_shown(page):
    refusal = {
        "error": "overloaded",
        "what": "66 requests are inside",
        "rule": "A worker takes 66",
        "fix": "Wait",
    }
    page.route("**/v1/recommend", lambda route: route.fulfill(status=503, body=json.dumps(refusal)))
    look(page, 7)

    said = page.locator("#who-trouble").inner_text()
    assert said == "66 requests are inside. A worker takes 66. Wait."
    assert [w for w in page.wrong if "503" in w] == page.wrong  # the browser's own line about it
    page.wrong.clear()


@in_a_browser
def test_a_server_with_keys_is_given_one(page):
    def guarded(route):
        if route.request.headers.get("authorization") == "Bearer right":
            return route.fallback()
        return route.fulfill(status=401, body='{"error": "unauthorized", "what": "no key"}')

    page.route("**/v1/users/*", guarded)
    look(page, 7)
    page.locator("#key-dialog").get_by_label("Key").fill("right")
    page.get_by_role("button", name="Use").click()
    page.get_by_role("button", name="Recommend", exact=True).click()
    page.locator("#answers li").first.wait_for()

    assert page.evaluate("localStorage.length") == 0
    page.wrong.clear()  # the browser's own line about 401


@in_a_browser
def test_items_have_names_and_lanes_where_the_server_tells_them(page, world_tables):
    category = dict(pl.read_parquet(world_tables / "items.parquet").select("item_id", "category").iter_rows())

    def look_up(route):
        asked = route.request.post_data_json["item_ids"]
        told = {"text": SCRIPT, "code": [1, 2]}
        items = [told | {"item_id": i, "columns": {"category": category.get(i)}} for i in asked]
        route.fulfill(json={"items": items})

    page.route("**/v1/lookup", look_up)
    page.route("**/v1/find", lambda route: route.fulfill(json={"users": [7, 70], "items": []}))
    page.reload()
    look(page, 7)

    assert set(names(page)) == {SCRIPT}
    assert page.locator("#column option").first.inner_text() == "category"
    page.locator("#users option").first.wait_for(state="attached")  # it is asked when typing has paused
    assert page.locator("#users option").count() == 2
    assert page.locator("main img").count() == 0


@in_a_browser
def test_ids_keep_their_kind_and_all_of_their_digits(page):
    kept = page.evaluate(
        """async () => {
            const api = await import("./api.js");
            const text = '{"a":9223372036854775807,"b":-3,"c":"5","d":0.25}';
            return [api.write(api.read(text)) === text,
                    typeof api.id("5"), typeof api.id('"5"'), api.typed("5"), api.typed(5), api.typed("x"),
                    api.typed(api.id("9223372036854775807"))];
        }"""
    )

    assert kept == [True, "number", "string", '"5"', "5", "x", "9223372036854775807"]


@in_a_browser
def test_it_fits_a_phone_and_every_control_has_a_name(page):
    page.set_viewport_size({"width": 360, "height": 740})
    look(page, 7)
    for view in ("person", "ids", "compare", "health"):
        page.evaluate("view => { location.hash = view }", view)
        page.locator(f"#{view}").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 360, view
        nameless = page.evaluate(
            """[...document.querySelectorAll("button, a, input, select, [role=slider], section")]
                .filter((each) => !(each.labels?.length || each.ariaLabel || each.textContent.trim()
                                    || each.getAttribute("aria-labelledby")))
                .map((each) => each.outerHTML)"""
        )
        assert nameless == [], view
    page.set_viewport_size({"width": 1200, "height": 800})


def test_nothing_that_the_server_says_can_become_markup():
    for file in WEB.glob("*.js"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(", text
        ), file
    page = (WEB / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|<script(?![^>]* src=)|\sstyle=|\son\w+=|https?://", page)


def test_colours_can_be_told_from_their_ground():
    """WCAG's contrast of 4.5 for words, in both schemes."""
    light, dark = (
        (WEB / "console.css").read_text(encoding="utf-8").split("@media (prefers-color-scheme: dark)")[:2]
    )
    schemes = [dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in (light, dark)]
    on_ground = ["ink", "soft", "accent", "good", "bad", "move"]
    pairs = [(word, ground) for word in on_ground for ground in ("paper", "panel")]
    pairs += [
        ("on-accent", "accent"),
        ("good", "good-faint"),
        ("bad", "bad-faint"),
        ("accent", "accent-faint"),
    ]
    for colours in schemes:
        for word, ground in pairs:
            assert contrast(colours[word], colours[ground]) >= 4.5, (word, ground)


def contrast(a, b):
    bright, dim = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
