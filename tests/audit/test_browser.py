"""The report in a real browser: it answers to its slider, shows its pictures, and asks the network for nothing."""

import json
import shutil

import pytest
import torch

from lightning_iet.audit import make_findings
from lightning_iet.audit.pairs import Review, apply_review, pair_rows
from lightning_iet.audit.report import write_report
from lightning_iet.audit.report.page import parts_of_limits

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
By = pytest.importorskip("selenium.webdriver.common.by").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
Wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait
Intercepted = pytest.importorskip("selenium.common.exceptions").ElementClickInterceptedException
pytestmark = [
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
    ),
    # What small images look like in the page: test_report.py.
    pytest.mark.parametrize("audited", [10], ids=["large"], indirect=True, scope="session"),
]

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1280,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def page(browser, audited, membership, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(audited, make_findings(audited, membership=membership), folder, pairs=20)
    browser.get_log("performance")
    browser.get((folder / "report.html").as_uri())
    return browser


def text(page, name):
    return page.find_element(By.ID, name).text


def visible(page):
    return [card for card in page.find_elements(By.CSS_SELECTOR, "#gallery > li") if card.is_displayed()]


def press(page, *keys):
    page.find_element(By.ID, "threshold").send_keys(*keys)


def click(page, element):
    """Bring an element into view at once and click it; a browser that has not yet drawn the place is given time."""

    def clicked(page):
        page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()
        return True

    Wait(page, 60, ignored_exceptions=[Intercepted]).until(clicked)


def count(audited, threshold, measure="score"):
    copies = audited.copies["generated"]
    values = {"score": parts_of_limits(audited, copies), **copies.ratios}[measure]
    return int((values < torch.tensor(threshold)).sum())


def test_the_slider_moves_the_count_of_all_images(page, audited):
    named = len(page.find_elements(By.CSS_SELECTOR, '#gallery > [data-named="1"]'))
    assert named == min(20, int(audited.evidence.named.sum()))
    press(page, Keys.HOME)
    assert (text(page, "threshold-value"), text(page, "count-generated")) == ("0.00", "0")
    assert len(visible(page)) == named  # copies that are named stay
    for _ in range(5):
        press(page, Keys.ARROW_RIGHT)
    assert text(page, "threshold-value") == "0.10"
    assert text(page, "count-generated") == str(count(audited, 0.1))
    assert len(visible(page)) == max(named, count(audited, 0.1))
    press(page, Keys.END)
    assert text(page, "threshold-value") == "3.00"
    assert text(page, "count-generated") == str(count(audited, 3.0))
    held_out = parts_of_limits(audited, audited.copies["held_out"])
    assert text(page, "count-held_out") == str(int((held_out < 3).sum()))
    assert page.find_element(By.ID, "threshold").get_attribute("aria-valuetext") == "3.00"


def test_another_measure_brings_its_own_counts_and_histogram(page, audited):
    def charts():
        return [chart.is_displayed() for chart in page.find_elements(By.CSS_SELECTOR, "svg.histogram")]

    page.find_element(By.CSS_SELECTOR, "input[value=mean]").click()
    assert text(page, "threshold-value") == "0.15"
    assert text(page, "count-generated") == str(count(audited, 0.15, "mean"))
    assert charts() == [False, False, False, True]
    page.find_element(By.CSS_SELECTOR, "input[value=distinct]").click()
    assert text(page, "threshold-value") == "0.33"
    assert charts() == [False, True, False, False]


def test_the_gallery_is_filtered_and_sorted(page, audited):
    page.find_element(By.CSS_SELECTOR, "#show option[value=all]").click()
    total = len(page.find_elements(By.CSS_SELECTOR, "#gallery > li"))
    assert len(visible(page)) == total
    page.find_element(By.CSS_SELECTOR, "#sort option[value=index]").click()
    order = [int(card.get_attribute("data-index")) for card in visible(page)]
    assert order == sorted(order)
    page.find_element(By.CSS_SELECTOR, "#sort option[value=ratio]").click()
    ratios = [float(card.get_attribute("data-distinct")) for card in visible(page)]
    assert ratios == sorted(ratios)
    field = page.find_element(By.ID, "filter")
    field.send_keys("2.PNG")
    names = [card.get_attribute("data-names") for card in visible(page)]
    assert names
    assert all("2.png" in name for name in names)
    assert text(page, "shown").startswith(f"{len(names)} pair")
    field.clear()
    field.send_keys(Keys.SPACE, Keys.BACKSPACE)
    assert len(visible(page)) == total


def test_a_click_shows_a_pair_side_by_side_with_its_difference(page):
    button = page.find_element(By.CSS_SELECTOR, "button.images")
    click(page, button)
    dialog = page.find_element(By.ID, "large")
    assert dialog.is_displayed()
    shown = [image for image in dialog.find_elements(By.TAG_NAME, "img") if image.is_displayed()]
    assert [image.get_attribute("src") for image in shown] == [
        image.get_attribute("src") for image in button.find_elements(By.TAG_NAME, "img")
    ]
    assert len(shown) == 4
    assert visible(page)[0].get_attribute("data-source") in text(page, "large-names")
    dialog.find_element(By.TAG_NAME, "button").click()
    assert not dialog.is_displayed()


def test_a_review_is_saved_for_the_next_audit(page):
    """What would be downloaded is caught on its way, and read as the next audit reads it."""
    page.execute_script(
        "URL.createObjectURL = (blob) => { blob.text().then((text) => { window.saved = text; }); return '#'; };"
        "HTMLAnchorElement.prototype.click = () => {};"
    )
    save = page.find_element(By.ID, "save")
    assert not save.is_enabled()
    first, second, third = visible(page)[:3]
    for card, decision in ((first, "confirmed"), (second, "dismissed"), (third, "dismissed"), (third, "dismissed")):
        button = card.find_element(By.CSS_SELECTOR, f"button[value={decision}]")
        click(page, button)
    assert first.find_element(By.CSS_SELECTOR, "[aria-pressed=true]").get_attribute("value") == "confirmed"
    click(page, save)
    saved = page.execute_async_script("setTimeout(() => arguments[0](window.saved), 200)")
    decided = {pair["sha256"]: pair["decision"] for pair in json.loads(saved)["pairs"]}
    hashes = [card.get_attribute("data-sha256") for card in (first, second)]
    assert decided == dict(zip(hashes, ("confirmed", "dismissed"), strict=True))  # the third was taken back


def test_pictures_load(page):
    widths = page.execute_script("return [...document.images].map(image => image.naturalWidth)")
    assert len(widths) > 40
    assert min(widths) > 0


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_hangs_over_the_edge(page, width):
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_no_text_sticks_out_of_its_card_on_paper(page):
    metrics = {"width": 660, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    beyond = """
        const card = document.querySelector('#gallery .pair');
        card.querySelector('.ratio .quiet').textContent = 'mirrored, turned by right angles, other colours';
        const edge = card.getBoundingClientRect().right;
        return [...card.querySelectorAll('p, span')].filter(one => one.getBoundingClientRect().right > edge).length"""
    assert page.execute_script(beyond) == 0
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_curve_of_the_gap_is_there(page):
    curve = page.find_element(By.CSS_SELECTOR, "svg.curve")
    assert curve.is_displayed()
    assert curve.size["width"] > 300
    assert "95 percent" in curve.get_attribute("aria-label")


def test_every_control_is_reached_by_keyboard(page):
    page.execute_script(
        "document.body.focus(); window.scrollTo(0, 0); window.reached = [];"
        "document.addEventListener('focusin', event => reached.push("
        "event.target.id || event.target.getAttribute('name') || event.target.className));"
    )
    controls = page.find_elements(By.CSS_SELECTOR, "a, button, input, select, summary, [tabindex]")
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB * len(controls))
    reached = set(page.execute_script("return reached"))
    assert {"skip", "measure", "threshold", "show", "sort", "filter"} <= reached


def test_text_stands_out_in_light_and_dark(page):
    """A contrast of at least 4.5, as WCAG asks for text."""
    for scheme in ("light", "dark"):
        page.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        for selector in ("h1", ".quiet", ".rates .generated", ".rates .control", ".pair .names", "nav a"):
            colour = page.execute_script(f"return getComputedStyle(document.querySelector('{selector}')).color")
            paper = page.execute_script("return getComputedStyle(document.body).backgroundColor")
            assert contrast(colour, paper) >= 4.5, (scheme, selector)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(one, other):
    dark, light = sorted(luminance(colour) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_it_prints(page):
    pdf = page.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert len(pdf) > 10_000


def test_no_errors_and_no_requests(page):
    """Behind the others, so that it sees what they did."""
    assert page.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    ours = ("data:", "file:", "chrome:")  # the browser's own first page may still load, and no page may ask for such
    assert [url for url in asked if not url.startswith(ours)] == []
    files = {url.partition("#")[0] for url in asked if url.startswith("file:")}
    assert files == {page.current_url.partition("#")[0]}  # a browser may ask for the page itself twice


def test_earlier_decisions_are_shown_and_saved_with_new_ones(browser, audited, tmp_path):
    """Last, for it leaves the page of the other tests."""
    rows = pair_rows(audited)
    decided = {(row["sha256"], row["source_sha256"]) for row in (rows[0], rows[40])}
    reviewed = apply_review(audited, Review(confirmed=frozenset(decided)))
    (tmp_path / "report").mkdir()
    write_report(reviewed, make_findings(reviewed), tmp_path / "report", pairs=20)
    browser.get((tmp_path / "report" / "report.html").as_uri())
    browser.execute_script(
        "URL.createObjectURL = (blob) => { blob.text().then((text) => { window.saved = text; }); return '#'; };"
        "HTMLAnchorElement.prototype.click = () => {};"
    )
    pressed = browser.find_elements(By.CSS_SELECTOR, "[aria-pressed=true]")
    assert [button.get_attribute("value") for button in pressed].count("confirmed") >= 1
    new = next(card for card in visible(browser) if not card.find_elements(By.CSS_SELECTOR, "[aria-pressed=true]"))
    click(browser, new.find_element(By.CSS_SELECTOR, "button[value=dismissed]"))
    click(browser, browser.find_element(By.ID, "save"))
    saved = json.loads(browser.execute_async_script("setTimeout(() => arguments[0](window.saved), 200)"))["pairs"]
    new_pair = new.get_attribute("data-sha256"), new.get_attribute("data-source-sha256")
    assert {(pair["sha256"], pair["source_sha256"]) for pair in saved} == decided | {new_pair}
