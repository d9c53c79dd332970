"""The report in a browser: at desktop and phone width, light and dark.

Skips without Chromium or Playwright, which the requirements do not hold.
"""

import shutil

import pytest
from report_inputs import make_split, make_sweep

import evaluate

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update")
WIDTHS = {"desktop": (1280, 800), "phone": (360, 800)}

# Each element with text of its own whose contrast with what lies behind it is below 4.5 (WCAG 2.2, 1.4.3).
FAINT = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(own => own / 255)
    .map(own => own <= 0.04045 ? own / 12.92 : ((own + 0.055) / 1.055) ** 2.4)
    .reduce((sum, own, place) => sum + own * [0.2126, 0.7152, 0.0722][place], 0);
  const ground = node => {
    const cell = node.matches('svg g > text') && node.previousElementSibling;
    if (cell) return rgb(getComputedStyle(cell).fill);
    for (let own = node; own; own = own.parentElement) {
      const color = rgb(getComputedStyle(own).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
  };
  const found = [];
  let seen = 0;
  for (const node of document.body.querySelectorAll('*')) {
    const has_text = [...node.childNodes].some(own => own.nodeType === 3 && own.textContent.trim());
    if (!has_text || node.matches('title, desc') || !node.checkVisibility()) continue;
    const style = getComputedStyle(node);
    const ink = node.namespaceURI.endsWith('svg') ? style.fill : style.color;
    const levels = [rgb(ink), ground(node)].map(light);
    const ratio = (Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05);
    seen += 1;
    if (ratio < 4.5) found.push(`${node.tagName} ${node.className} ${node.textContent}: ${ratio}`);
  }
  return [seen, found];
}"""
UNNAMED = """() => [...document.querySelectorAll('img, svg')].filter(node => node.tagName === 'IMG'
  ? !node.alt : !node.getAttribute('aria-labelledby').split(' ').every(own => document.getElementById(own)))
  .map(node => node.outerHTML.slice(0, 99))"""
# Sizes in px of the smallest texts of drawings, as they are shown.
SMALLEST = """() => Math.min(...[...document.querySelectorAll('svg')].filter(node => node.checkVisibility())
  .flatMap(node => [...node.querySelectorAll('text')].map(own => parseFloat(getComputedStyle(own).fontSize)
  * node.getBoundingClientRect().width / node.viewBox.baseVal.width)))"""
# Texts that leave their drawing.
CUT = """() => [...document.querySelectorAll('svg text')].filter(node => {
  if (!node.checkVisibility()) return false;
  const box = node.getBBox(), all = node.ownerSVGElement.viewBox.baseVal;
  return box.x < -0.5 || box.x + box.width > all.width + 0.5 || box.y + box.height > all.height + 0.5;
}).map(node => node.textContent)"""
BROKEN = "() => [...document.images].filter(node => !node.complete || !node.naturalWidth).length"
TOO_WIDE = """() => [...document.querySelectorAll('body *')].filter(node => !node.closest('.scroll *, .skip')
  && node.checkVisibility() && node.getBoundingClientRect().right > innerWidth + 0.5)
  .map(node => `${node.tagName} ${node.className}`)"""


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    experts = ["a_very_long_name_of_an_expert_that_nobody_would_break_into_words"]
    experts += [f"clip_l14_{place}" for place in range(8)]
    splits = [
        make_split(folder, "val", experts=experts),
        make_split(folder, "val_hard_" + "x" * 60, rows=60, seed=1),
    ]
    make_sweep(folder / "out" / "sweep.json")
    evaluate.main(["--predictions", *map(str, splits), "--leaderboard", "--out", str(folder / "out")])
    return folder / "out" / "report.html"


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield found
        found.close()


@pytest.fixture
def open_page(browser, page_path):
    """Return a function that opens the report; messages and requests are in `.said` and `.asked`."""
    pages = []

    def opened(width="desktop", theme="light"):
        size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
        page = browser.new_page(viewport=size, color_scheme=theme, reduced_motion="reduce")
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(page_path.as_uri())
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_can_be_read(open_page, page_path, width, theme):
    page = open_page(width, theme)
    page.evaluate("() => document.querySelectorAll('details').forEach(node => node.open = true)")
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(TOO_WIDE) == []
    assert page.evaluate(UNNAMED) == []
    assert page.evaluate(BROKEN) == 0 and page.locator("img").count() > 4
    assert page.evaluate(SMALLEST) >= 9
    assert page.evaluate(CUT) == []
    seen, faint = page.evaluate(FAINT)
    assert faint == [] and seen > 500
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert (min(map(int, ground[4:-1].split(","))) < 50) == (theme == "dark")
    assert page.said == []
    assert [url for url in page.asked if not url.startswith("data:")] == [page_path.as_uri()]


def test_the_keyboard_reaches_the_results_the_choices_and_wide_tables(open_page):
    page = open_page("phone")
    page.keyboard.press("Tab")
    skip = page.locator(".skip")
    assert skip.evaluate("node => node === document.activeElement && node.getBoundingClientRect().left >= 0")
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "main"
    linear, log = page.locator("#split-1-roc"), page.locator("#split-1-roc-log")
    assert linear.is_visible() and not log.is_visible()
    page.locator("#split-1-axis-linear").focus()
    page.keyboard.press("ArrowRight")
    assert log.is_visible() and not linear.is_visible()
    region = page.locator("#split-1 .scroll").first
    region.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("node => node.scrollLeft > 0", arg=region.element_handle())


def test_print_is_white_and_has_both_roc_curves(open_page):
    page = open_page("desktop", "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("#split-1-roc").is_visible() and page.locator("#split-1-roc-log").is_visible()
    assert not page.locator("nav").is_visible()
    assert (
        page.locator(".card").first.evaluate("node => getComputedStyle(node).backgroundColor")
        == "rgb(255, 255, 255)"
    )
    assert page.locator("h1").evaluate("node => getComputedStyle(node).color") == "rgb(27, 31, 36)"
