"""The page of a report in a browser without a window: what is clicked answers, nothing is asked of
anyone. Needs Chromium and the extra ``browser``."""

from __future__ import annotations

import shutil

import pytest
from helpers.pages import page_of, stored_records

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: the extra browser")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}")
    with api.sync_playwright() as driver:
        # As root, as in a container, Chromium starts without its sandbox only.
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory, methods):
    root = tmp_path_factory.mktemp("browser")
    return page_of(root, stored_records(root), methods)[0]


@pytest.fixture
def show(browser, path):
    """Opens the page; at the end of the test nothing has been asked for, and nothing has failed."""
    problems: list[str] = []
    contexts = []

    def heard(message):
        if message.type in ("error", "warning"):
            problems.append(message.text)

    def asked(request):
        if not request.url.startswith(("file:", "blob:", "data:")):
            problems.append(request.url)

    def opened(**look):
        contexts.append(browser.new_context(**look))
        page = contexts[-1].new_page()
        page.set_default_timeout(300_000)  # of a machine that has other things to do
        page.on("console", heard)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", asked)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready=yes]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


def column(page, number: int) -> list[str]:
    return page.locator(f"#numbers-table tbody td:nth-child({number})").all_inner_texts()


@pytest.mark.slow
def test_a_heading_sorts_by_number(show):
    page = show()
    heading = page.locator("#numbers-table thead th").filter(has_text="Value")
    heading.click()
    heading.click()
    shown = [float(text.replace("−", "-")) for text in column(page, 8)]
    assert shown == sorted(shown, reverse=True)
    assert len(set(shown)) > 1


@pytest.mark.slow
def test_lists_filter(show):
    page = show()
    assert set(column(page, 2)) != {"sc_lora"}
    pane = page.locator(".dtsp-searchPane").filter(has=page.get_by_placeholder("Method"))
    pane.locator("button.dtsp-collapseButton").click()
    pane.get_by_text("sc_lora", exact=True).click()
    assert set(column(page, 2)) == {"sc_lora"}
    names = [p.get_attribute("placeholder") for p in page.locator(".dtsp-paneInputButton").all()]
    assert {"Method", "Intervention", "Domain", "Seed"} <= set(names)


def methods_in_charts(page) -> list[set[str]]:
    """Of every chart, the methods that have a point."""
    return page.evaluate(
        """() => Bokeh.documents.map((chart) => [...new Set(chart.roots().flatMap((root) =>
            [...root.references()].filter((model) => model.type === "ColumnDataSource")
                .flatMap((model) => [...model.get_column("method")])))])"""
    )


@pytest.mark.slow
def test_lists_filter_charts_too(show):
    page = show()
    before = methods_in_charts(page)
    assert all(len(chart) > 1 for chart in before)
    pane = page.locator(".dtsp-searchPane").filter(has=page.get_by_placeholder("Method"))
    pane.locator("button.dtsp-collapseButton").click()
    pane.get_by_text("sc_lora", exact=True).click()
    assert [len(chart) for chart in methods_in_charts(page)] == [1, 1]
    page.get_by_text("Clear All").click()
    assert methods_in_charts(page) == before


@pytest.mark.slow
def test_claims_sort_with_all_their_lines(show):
    page = show()
    names = page.locator("#claims-table tbody td:first-child")

    def claims() -> list[list[str]]:
        found: list[list[str]] = []
        for text in names.all_inner_texts():
            found += [[]] if not text.startswith("…") else []
            found[-1].append(text)
        return found

    before = claims()
    assert any(len(lines) > 1 for lines in before)
    heading = page.locator("#claims-table thead th").filter(has_text="Claim")
    heading.click()
    heading.click()
    assert claims() == before[::-1]


@pytest.mark.slow
def test_a_number_a_row_and_a_claim_lead_to_artifacts(show):
    page = show()
    dialog = page.locator("#dialog")
    page.locator("#numbers-table tbody button").first.click()
    for said in ("Fingerprint", "Machine", "Versions", "Seconds", "Configuration", "Built from"):
        assert said in dialog.inner_text()
    dialog.locator("[data-shows]").first.click()  # upstream
    assert "Fingerprint" in dialog.inner_text()
    dialog.get_by_text("Close").click()
    assert not dialog.is_visible()
    for opener in ("#table-scale tbody tr:nth-child(2) button", "#claims tbody button >> nth=0"):
        page.locator(opener).click()
        dialog.locator("ul [data-shows]").first.click()
        assert "Fingerprint" in dialog.inner_text()
        dialog.get_by_text("Close").click()


@pytest.mark.slow
def test_charts_are_drawn_and_figures_grow(show):
    page = show()
    assert page.locator(".chart .bk-Figure").count() == 2
    small = page.locator("figure img").first.bounding_box()["width"]
    page.locator("figure > button").first.click()
    assert page.locator(".zoomed img").first.bounding_box()["width"] > 1.5 * small


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_scrolls_down_only(show, scheme):
    page = show(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    paper = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
