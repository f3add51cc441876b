"""The report of `kandinsky-exp compare` in a real browser, from a file, without a network."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import By, Chrome, Keys, WebElement, errors, head, names, open_report, shown, started, wait
from PIL import Image

from kandinsky_exp.reports import report
from kandinsky_exp.reports.images import ImageGrid, Row
from kandinsky_exp.reports.run_data import Run, Scores

pytestmark = pytest.mark.slow
EVIL = """</script><script>document.title="stolen"</script>, 'q' & $x^2$ %{x} <b>"""


def webp(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def run(index: int, name: str, rate: float | None, score: float | None, status: str = "FINISHED") -> Run:
    curves = {} if score is None else {
        "train/loss": [(step, score + 1 / (step + 1)) for step in range(0, 100, 5)],
        "train/loss_t0": [(0, score), (50, score / 2)],
        "validation/loss": [(0, score + 1), (50, score)],
    }  # fmt: skip
    params = {} if rate is None else {"optimizer.lr": f"{rate:g}", "model.snr_gamma": ("null", "5.0")[index % 2]}
    return Run(f"{index:032x}", name, status, "decoder", params, curves, Scores(best=score, last=score, seconds=3.0))


RUNS = [
    run(0, "nine", 9e-5, 9.0),
    run(1, EVIL, 1e-4, 10.5),
    run(2, "early", 1e-3, 0.25),
    run(3, "nothing", None, None, "FAILED"),
]
ALBUM = ImageGrid(
    rows=[Row("validation/00", EVIL), Row("validation/01", "a dog")],
    steps=[0, 50, 100],
    images=[webp(colour) for colour in ("white", "red", "blue")],
    cells={(0, 0): {0: 0, 50: 1, 100: 2}, (0, 1): {0: 0, 100: 2}, (0, 2): {0: 0, 50: 1}, (1, 0): {50: 1}},
    notes=["<i>a note</i>"],
)


def opened(folder: Path, *flags: str) -> Chrome:
    file = folder / "report.html"
    file.write_text(report.page(EVIL, RUNS, ALBUM), "utf-8")
    browser = started(folder / "profile", *flags)
    try:
        open_report(browser, file.as_uri())
    except BaseException:
        browser.quit()
        raise
    return browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    made = opened(tmp_path_factory.mktemp("browser"))
    yield made
    made.quit()


def visible(browser: Chrome, plot: str) -> list[Any]:
    """Indices of the runs that a figure shows."""
    script = f"return document.getElementById('plot-{plot}').data.filter(t => t.visible === true).map(t => t.meta)"
    return sorted(set(browser.execute_script(script)))


def box(browser: Chrome, run: int) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, f".runs input[value='{run}']")


def test_it_opens_without_an_error_and_without_a_network(browser: Chrome) -> None:
    assert errors(browser) == []
    assert browser.title == EVIL
    assert browser.find_element(By.TAG_NAME, "h1").text == EVIL
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert [name for name in fetched if not name.startswith(("data:", "blob:"))] == []
    for plot in ("train", "validation", "quarters", "parallel", "scatter"):
        assert browser.find_elements(By.CSS_SELECTOR, f"#plot-{plot} svg.main-svg"), plot
    legend = [one.text for one in browser.find_elements(By.CSS_SELECTOR, "#plot-train .legendtext")]
    assert legend == ["nine", EVIL[:39] + "…", "early"]
    assert "<i>a note</i>" in [note.text for note in browser.find_elements(By.CLASS_NAME, "note")]


def test_a_click_on_a_heading_sorts_and_what_is_missing_comes_last(browser: Chrome) -> None:
    button = head(browser, "best val. loss").find_element(By.TAG_NAME, "button")
    button.click()
    assert names(browser) == ["early", "nine", EVIL, "nothing"]
    assert head(browser, "best val. loss").get_attribute("aria-sort") == "ascending"
    button.click()
    assert names(browser) == [EVIL, "nine", "early", "nothing"]
    assert head(browser, "best val. loss").get_attribute("aria-sort") == "descending"
    head(browser, "lr").find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert names(browser) == ["nine", EVIL, "early", "nothing"], "9e-5 is less than 1e-4"
    sorts = [one.get_attribute("aria-sort") for one in browser.find_elements(By.CSS_SELECTOR, ".runs thead th")]
    assert sorted(filter(None, sorts), key=len) == ["none"] * (len(sorts) - 1) + ["ascending"]


def test_the_slider_changes_the_images(browser: Chrome) -> None:
    slider = browser.find_element(By.ID, "step")
    assert slider.get_attribute("aria-valuetext") == "step 100"
    last = shown(browser)
    assert last["0,0"][1:] == ("", "")
    assert last["0,2"][1:] == ("step 50", "earlier")
    assert last["1,1"] == ("", "–", "none")
    slider.send_keys(Keys.ARROW_LEFT)
    assert browser.find_element(By.ID, "step-shown").text == "step 50"
    middle = shown(browser)
    assert middle["0,0"][0] == last["0,2"][0] != last["0,0"][0]
    assert middle["0,1"][1:] == ("step 0", "earlier")
    slider.send_keys(Keys.HOME)
    first = shown(browser)
    assert len({first[cell][0] for cell in ("0,0", "0,1", "0,2")}) == 1
    assert first["1,0"] == ("", "–", "none"), "nothing of a later step"
    image = browser.find_element(By.CSS_SELECTOR, ".grid figure[data-cell='0,0'] img")
    wait(browser, "document.querySelector('.grid img').naturalWidth === 32")
    assert image.get_attribute("alt") == f"{EVIL}, nine, step 0"
    slider.send_keys(Keys.END)
    assert shown(browser) == last


def test_a_run_is_hidden_everywhere(browser: Chrome) -> None:
    box(browser, 1).click()
    for plot in ("train", "validation", "quarters", "scatter"):
        assert visible(browser, plot) == [0, 2], plot
    script = "return document.getElementById('plot-parallel').data[0].line.color.length"
    assert browser.execute_script(script) == 2
    columns = browser.find_elements(By.CSS_SELECTOR, ".grid thead th[data-run]")
    assert [column.is_displayed() for column in columns] == [True, False, True]
    box(browser, 1).click()
    assert visible(browser, "train") == [0, 1, 2]
    toggle = browser.find_elements(By.CSS_SELECTOR, "#plot-validation .legendtoggle")[2]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", toggle)
    toggle.click()
    wait(browser, "!document.querySelector('.runs input[value=\"2\"]').checked")
    assert visible(browser, "train") == [0, 1]
    box(browser, 2).click()
    assert errors(browser) == []


def test_losses_are_logarithmic_at_a_click(browser: Chrome) -> None:
    script = "return ['train', 'quarters', 'scatter'].map(n => document.getElementById('plot-' + n).layout.yaxis.type)"
    before = browser.execute_script(script)
    browser.find_element(By.ID, "log").click()
    assert browser.find_element(By.ID, "log").get_attribute("aria-pressed") == "true"
    assert browser.execute_script(script) == ["log", "log", before[2]]
    browser.find_element(By.ID, "log").click()
    assert browser.execute_script(script) == before


def test_each_hyper_parameter_has_its_scatter(browser: Chrome) -> None:
    choice = browser.find_element(By.ID, "parameter")
    assert [option.text for option in choice.find_elements(By.TAG_NAME, "option")] == ["lr", "snr"]
    choice.send_keys("snr")
    title = "document.getElementById('plot-scatter').layout.title.text"
    wait(browser, f"{title} === 'snr against best validation loss'")
    assert errors(browser) == []


def test_it_is_dark_where_the_reader_wants_it_dark(browser: Chrome) -> None:
    def colours() -> list[str]:
        script = "document.getElementById('plot-train')._fullLayout"
        return [
            str(browser.execute_script("return getComputedStyle(document.body).backgroundColor")),
            str(browser.execute_script(f"return {script}.paper_bgcolor")),
            str(browser.execute_script(f"return {script}.font.color")),
        ]

    light = colours()
    wanted = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", wanted)
    wait(browser, f"document.getElementById('plot-train')._fullLayout.paper_bgcolor !== '{light[1]}'")
    dark = colours()
    assert not set(light) & set(dark)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_browser_without_webgl_has_all_but_the_parallel_coordinates(tmp_path: Path) -> None:
    browser = opened(tmp_path, "--disable-3d-apis")
    try:
        assert "it has no WebGL" in browser.find_element(By.ID, "plot-parallel").text
        assert browser.find_elements(By.CSS_SELECTOR, "#plot-scatter svg.main-svg")
        assert errors(browser) == []
    finally:
        browser.quit()
