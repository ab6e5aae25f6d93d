"""The page in Chromium: search, cards, permalinks and keys work, nothing is asked of the network, nothing complains.

`make test-browser` installs what is needed and runs these; screenshots of each panel go to VINDEX_SCREENSHOTS.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vindex
from tests.conftest import build_quietly
from tests.vindex.report.records import written
from tests.vindex.test_responses import add_made_up
from vindex.console import visible
from vindex.demo import CHECKPOINT

pytestmark = pytest.mark.browser
SWITCHES = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
DISTURBED = "model.layers.2.mlp.gate_proj.weight"
PANELS = ("masthead", "explore", "layers", "constants", "gate3", "gates", "trace", "beside")


@pytest.fixture(scope="session")
def report(tmp_path_factory) -> Path:
    """A report of the atlas with every panel, beside a vindex of the atlas with one weight disturbed."""
    directory = tmp_path_factory.mktemp("browser")
    build_quietly(CHECKPOINT, directory / "atlas.vindex", features=128)
    build_quietly(disturbed(directory / "disturbed"), directory / "disturbed.vindex", features=64)
    add_made_up(vindex.open(directory / "atlas.vindex"))
    v, other = vindex.open(directory / "atlas.vindex"), vindex.open(directory / "disturbed.vindex")
    return vindex.write_report(v, directory / "report.html", **written(v, directory), against=other)


def disturbed(directory: Path) -> Path:
    """The atlas with noise on one gate_proj."""
    shutil.copytree(CHECKPOINT, directory)
    file = directory / "model.safetensors"
    weights = load_file(file)
    weights[DISTURBED] += 0.02 * torch.randn(weights[DISTURBED].shape, generator=torch.Generator().manual_seed(0))
    save_file(weights, file, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    path = os.environ.get("VINDEX_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.fail("no Chromium on PATH: `make test-browser` installs Debian's, or set VINDEX_CHROMIUM")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=SWITCHES.split())
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, report):
    """The report, opened. Whatever it asks of the network, and whatever it complains of, fails the test."""
    context = chromium.new_context(viewport={"width": 1100, "height": 800})
    page, heard = context.new_page(), []
    page.on("request", lambda request: heard.append(request.url))
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.goto(report.as_uri())
    yield page
    context.close()
    assert [line for line in heard if not line.startswith(report.as_uri())] == []


def hits(page, query: str) -> list[str]:
    page.fill("#search", query)
    page.wait_for_function("query => document.getElementById('hits').dataset.query === query", arg=query)
    return page.locator("#hits a").all_inner_texts()


def test_search_finds_paris_and_a_hit_opens_its_card(page, report):
    v = vindex.open(report.parent / "atlas.vindex")
    found = hits(page, " Paris")
    assert len([hit for hit in found if "response" not in hit]) == len(v.search("Paris"))
    assert all("Paris" in hit for hit in found)
    page.locator("#hits a").first.click()
    place = re.search(r"#L(\d+)F(\d+)", page.url)
    card = page.inner_text("#card")
    feature = v.feature(int(place[1]), int(place[2]))
    assert f"Layer {place[1]}, direction {place[2]}" in card and "␣Paris" in card
    assert all(token.piece.strip() in card for token in feature.reads if token.piece.isascii() and token.piece.strip())
    assert "Reading +, the FFN writes" in card and "response R²" in card
    best = v.snippets(int(place[1]), int(place[2]))[0]
    shown = page.locator(".snippets li").first
    assert shown.locator("mark").inner_text() == best.token.strip()
    assert "".join((best.before, best.token, best.after)).strip() in shown.inner_text()
    assert f"vindex feature atlas.vindex {place[1]} {place[2]}" in card


def test_the_page_begins_with_poles_of_tokens_that_training_met(page, report):
    said = page.inner_text("#card")
    assert "Left out: 14 poles of which half the tokens or more were never met in training" in said
    assert "␣foggy" in said and page.locator("#card .never").count() == 0
    page.goto("about:blank")
    page.goto(f"{report.as_uri()}#L0F90")
    assert page.locator("#card .pole.reads:not(.against) .never").count() == 10
    assert "In italics: tokens that training never met" in page.inner_text("#card")


def test_search_takes_spaces_case_and_places(page):
    assert hits(page, "Paris") == hits(page, " Paris")
    assert any("Paris" in hit for hit in hits(page, "paris"))
    assert [hit.strip() for hit in hits(page, "L2F7")] == ["L2F7"]
    assert hits(page, "␣Paris") == hits(page, " Paris")
    assert hits(page, "no such token") == []
    assert "No pole of any direction holds that" in page.inner_text("#found")


def test_a_card_spells_tokens_as_the_terminal_does(page):
    """Nothing invisible stays so, and nothing turns the text beside it around."""
    pieces = [
        " Paris",
        "a\n\n",
        "\\n",
        "\u202egnp.",
        "b\u200b\ufeff",
        "\xa0\xad",
        "\x00\t",
        "\U000e0041",
        "é日本🙂",
        '"q"',
    ]
    assert page.evaluate("pieces => pieces.map(shown)", pieces) == [visible(piece) for piece in pieces]
    assert page.evaluate("prose('a\\u202eb\\n می\\u200cخواهم')") == "a\\u202eb⏎ می\u200cخواهم"


def test_one_pole_holds_and_more_hold(page):
    held = "matches(token)[0].reduce((sum, at) => sum + holders.starts[at + 1] - holders.starts[at], 0)"
    seldom = page.evaluate(f"data.strings.find(token => /^[a-z]{{3,}}$/.test(token) && {held} === 1)")
    hits(page, seldom)
    assert page.inner_text("#found").startswith(f"1 pole holds “{seldom}”")
    hits(page, "Paris")
    assert re.match(r"\d\d+ poles hold “Paris”", page.inner_text("#found"))


def test_search_finds_a_token_as_its_card_spells_it(page):
    assert any("\\n" in hit for hit in hits(page, "\\n"))


@pytest.mark.parametrize(
    "link, title", [("L1F95", "Layer 1, direction 95"), ("L3", "Layer 3"), ("L2F7w", "direction 7")]
)
def test_a_permalink_opens_its_card(page, report, link, title):
    page.goto("about:blank")
    page.goto(f"{report.as_uri()}#{link}")
    assert title in page.inner_text("#card h3")
    assert page.locator(".small[aria-current]").count() == 1
    assert page.locator("#card details[open]").count() == link.endswith("w")
    page.reload()
    assert title in page.inner_text("#card h3")


def test_a_direction_that_moved_leads_to_its_card(page):
    link = page.locator("#beside a").first
    name = link.inner_text()
    assert name.startswith("L2F")
    link.click()
    page.locator("#card h3", has_text="Layer 2").wait_for()
    assert page.url.endswith("#" + name)


def test_back_at_the_start_the_first_card_stands_again(page, report):
    page.evaluate("location.hash = '#L1F95'")
    page.wait_for_function("document.getElementById('card').innerText.includes('Layer 1, direction 95')")
    page.evaluate("location.hash = '#gates'")
    assert "Layer 1, direction 95" in page.inner_text("#card")
    page.evaluate("history.go(-2)")
    page.wait_for_function(
        "document.getElementById('card').innerText.includes('Most coherent directions')", timeout=5000
    )
    assert page.url == report.as_uri() and page.locator(".small[aria-current]").count() == 0


def test_links_that_lead_nowhere_open_no_card(page, report):
    for link in ("L99F1", "L1F999", "L1E2F3", "%F", "gate3"):
        page.goto("about:blank")
        page.goto(f"{report.as_uri()}#{link}")
        assert "Most coherent directions" in page.inner_text("#card")


def test_everything_is_within_reach_of_the_keyboard(page):
    page.keyboard.press("/")
    page.keyboard.type(" Paris")
    page.wait_for_selector('#hits[data-query=" Paris"] a')
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    second = page.locator("#hits a b").nth(1).inner_text()
    page.keyboard.press("Enter")
    page.wait_for_url(f"**#{second}*")
    assert page.evaluate("document.activeElement.id") == "card"
    page.keyboard.press("j")
    page.wait_for_url(lambda url: f"#{second}" not in url)
    page.keyboard.press("k")
    page.wait_for_url(f"**#{second}")
    page.get_by_role("slider", name="Layer").focus()
    page.keyboard.press("Home")
    assert page.locator(".traced:visible").count() == 1 and "Layer 0" in page.inner_text(".traced.shown")
    page.keyboard.press("ArrowRight")
    assert "Layer 1" in page.inner_text(".traced.shown") and "RESPONSE" in page.inner_text(".traced.shown")


def test_in_print_the_panels_stay_and_the_search_goes(page):
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("#form").is_visible() and page.locator("#gate3 svg").first.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 250, 247)"


def test_text_is_legible_in_light_and_dark(page):
    """WCAG AA: 4.5 to 1 for ink and quiet text on paper, cards and washes."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours = page.evaluate(
            "Object.fromEntries(['paper', 'card', 'wash', 'ink', 'soft', 'c0', 'good', 'bad'].map(name => "
            "[name, getComputedStyle(document.documentElement).getPropertyValue('--' + name)]))"
        )
        for below in ("paper", "card", "wash"):
            for above in ("ink", "soft", "c0", "good", "bad"):
                assert contrast(colours[above], colours[below]) >= 4.5, (scheme, above, below)


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    digits = colour.strip().removeprefix("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_narrow_window_scrolls_only_down(page):
    page.set_viewport_size({"width": 380, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("#trace .traced.shown .t .tokens").first.bounding_box()["width"] > 100  # on lines of their own


def test_the_first_paint_takes_less_than_two_seconds(page):
    page.screenshot()
    assert page.evaluate("performance.getEntriesByType('paint')[0].startTime") < 2000


def test_a_screenshot_of_each_panel(page, tmp_path):
    directory = Path(os.environ.get("VINDEX_SCREENSHOTS") or tmp_path)
    for name in PANELS:
        picture = directory / f"{name}.png"
        page.locator("header.masthead" if name == "masthead" else f"#{name}").screenshot(path=picture)
        assert picture.stat().st_size > 5000
