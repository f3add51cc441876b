"""What a user sees the morning after a sweep: MLflow's own pages and the report, in a real browser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlflow.server
import pytest
from browsing import By, Chrome, Keys, errors, head, names, open_report, shown, started, wait
from commands import start_server
from mlflow_server import Server
from running import PROMPTS, SMALL, history, prepare, runs

from kandinsky_exp import cli
from kandinsky_exp.tracking.store import artifact_root
from kandinsky_exp.verbs import ui

pytestmark = pytest.mark.slow
JOBS = ["lr=0.001 snr=null", "lr=0.001 snr=5", "lr=0.003 snr=null", "lr=0.003 snr=5"]
VARIED = ["optimizer.lr=1e-3,3e-3", "model.snr_gamma=null,5"]
ROW = ".ag-row a[href*='/runs/']"  # a run's name in the table
CARD = "[data-testid='experiment-view-compare-runs-card']"  # a chart


class Shown(NamedTuple):
    """A sweep, and where it is shown."""

    root: Path
    parent: Any
    children: dict[str, Any]
    address: str

    def page(self, path: str) -> str:
        return f"{self.address.partition('/runs?')[0]}{path}"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    made = started(tmp_path_factory.mktemp("browser"))
    made.set_window_size(1600, 1400)
    yield made
    made.quit()


@pytest.fixture(scope="module")
def sweep(browser: Chrome, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """Four jobs, and MLflow as `kandinsky-exp ui` starts it. Where there is no browser there is no sweep."""
    root = tmp_path_factory.mktemp("sweep") / "outputs"
    prepare(root, [], encoded=True)
    start_server()
    cli.main(["--multirun", "model=prior", *SMALL, PROMPTS, f"output_root={root}", "name=rates", *VARIED])
    found = runs(root)
    (parent,) = (run for run in found if run.data.tags.get("sweep") == "rates")
    children = {run.info.run_name: run for run in found if run is not parent}
    mlartifacts = artifact_root(root)
    server = Server(root, {mlflow.server.ARTIFACT_ROOT_ENV_VAR: mlartifacts.as_uri(),
                           mlflow.server.ARTIFACTS_DESTINATION_ENV_VAR: str(mlartifacts),
                           "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(ui.allowed_hosts("127.0.0.1"))})  # fmt: skip
    server.start()
    yield Shown(root, parent, children, ui.page(server.uri, parent.info.experiment_id))
    server.stop()


def visit(browser: Chrome, address: str) -> None:
    """A page as one sees it who was never there: MLflow keeps what was chosen in the browser."""
    browser.get(address)
    browser.execute_script("localStorage.clear()")
    browser.get("about:blank")
    browser.get(address)


def rows(browser: Chrome) -> list[str]:
    return [
        str(link)
        for link in browser.execute_script(f'return [...document.querySelectorAll("{ROW}")].map(a => a.innerText)')
    ]


def charts(browser: Chrome, sweep: Shown, search: str) -> None:
    """The page that `kandinsky-exp ui` names, with those charts whose metric is searched, and all images."""
    visit(browser, sweep.address)
    wait(browser, "document.querySelector('[role=searchbox]')")
    browser.find_element(By.CSS_SELECTOR, "[role=searchbox]").send_keys(search)
    cards = f"[...document.querySelectorAll(\"{CARD}\")].map(one => one.innerText.split('\\n')[0])"
    wait(browser, f"{cards}.includes(arguments[0]) && {cards}.every(one => one.startsWith('validation/'))", search)


def card(browser: Chrome, title: str) -> Any:
    """The chart of that title, in sight: MLflow draws what is."""
    script = f'return [...document.querySelectorAll("{CARD}")].find(c => c.innerText.startsWith(arguments[0]))'
    found = browser.execute_script(script, title)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    return found


def test_the_page_shows_the_losses_of_all_jobs_and_the_best_one_first(browser: Chrome, sweep: Shown) -> None:
    charts(browser, sweep, "validation/loss")
    losses = {name: history(sweep.root, run.info.run_id, "validation/loss") for name, run in sweep.children.items()}
    assert set(losses) == set(JOBS)
    wait(browser, f'document.querySelectorAll("{ROW}").length === 5')
    assert rows(browser) == [*sorted(JOBS, key=lambda name: losses[name][4]), "rates"]

    chart = card(browser, "validation/loss")
    drawn = "[...document.querySelectorAll('.js-plotly-plot')].flatMap(one => one.data)"
    wait(browser, f"new Set({drawn}.map(line => line.name)).size === 4")
    lines = browser.execute_script(f"return {drawn}.map(line => [line.name, [...line.x], [...line.y]])")
    assert {name: dict(zip(steps, values, strict=True)) for name, steps, values in lines} == losses
    assert len(chart.find_elements(By.CSS_SELECTOR, ".scatterlayer path.js-line")) >= 4
    assert all(f"{name} (validation/loss)" in chart.text for name in JOBS)


def test_the_images_of_all_jobs_at_the_last_step(browser: Chrome, sweep: Shown) -> None:
    charts(browser, sweep, "validation/loss")
    for key in ("validation/00", "validation/01"):
        chart = card(browser, key)
        slider = chart.find_element(By.CSS_SELECTOR, "[role=slider]")
        for step in ("2", "4"):
            slider.send_keys(Keys.ARROW_RIGHT)
            wait(browser, "arguments[0].getAttribute('aria-valuenow') === arguments[1]", slider, step)
        file = f"images%2F{key.replace('/', '~')}%2Bstep%2B4%2B"
        loaded = f"[...arguments[0].querySelectorAll(\"img[src*='{file}']\")].filter(one => one.naturalWidth > 0)"
        wait(browser, f"{loaded}.length === 4", chart)
        sources = browser.execute_script(f"return {loaded}.map(one => one.src)", chart)
        assert all(run.info.run_id in "".join(sources) for run in sweep.children.values())
        assert all(name in chart.text for name in JOBS)


def test_an_image_grid_can_be_without_the_parameters(browser: Chrome, sweep: Shown) -> None:
    """As docs/tracking.md says: MLflow writes all parameters above each image, until they are switched off."""
    charts(browser, sweep, "validation/loss")
    chart = card(browser, "validation/00")
    wait(browser, "arguments[0].innerText.includes('optimizer.lr=0.003')", chart)
    chart.find_element(By.CSS_SELECTOR, "[data-testid$='card-menu']").click()
    for button in ("[data-testid$='card-edit']", "[role=dialog] [role=switch]", "[data-testid$='modal-confirm']"):
        wait(browser, f'document.querySelector("{button}")')
        browser.find_element(By.CSS_SELECTOR, button).click()
    wait(browser, "!document.querySelector('[role=dialog]')")
    chart = card(browser, "validation/00")
    wait(browser, "!arguments[0].innerText.includes('optimizer')", chart)
    assert {line for line in chart.text.splitlines() if "=" in line} == set(JOBS)


def test_the_table_has_the_jobs_under_their_sweep(browser: Chrome, sweep: Shown) -> None:
    visit(browser, sweep.page("/runs?workflowType=machine_learning"))
    wait(browser, f'document.querySelector("{ROW}")')
    assert rows(browser) == ["rates"]
    browser.find_element(By.CSS_SELECTOR, ".ag-row button").click()
    wait(browser, f'document.querySelectorAll("{ROW}").length === 5')
    assert rows(browser) == ["rates", *reversed(JOBS)]  # MLflow's order: what started last is first


def test_a_run_says_how_it_was_made_and_where_the_report_is(browser: Chrome, sweep: Shown) -> None:
    visit(browser, sweep.page(f"/runs/{sweep.children['lr=0.003 snr=5'].info.run_id}"))
    wait(browser, "document.body.innerText.includes('kandinsky-exp train')")
    text = browser.find_element(By.TAG_NAME, "body").text
    assert "optimizer.lr=0.003" in text
    assert "model.snr_gamma=5" in text
    link = f"a[href*='/runs/{sweep.parent.info.run_id}/artifacts/compare/report.html']"
    wait(browser, f'document.querySelector("{link}")')
    browser.get(str(browser.find_element(By.CSS_SELECTOR, link).get_attribute("href")))
    wait(browser, "document.querySelector('iframe')")
    browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
    wait(browser, "document.documentElement.dataset.ready === 'true'")
    assert sorted(names(browser)) == sorted(JOBS)
    browser.switch_to.default_content()


def test_the_report_of_the_sweep_sorts_and_slides(browser: Chrome, sweep: Shown) -> None:
    browser.get_log("browser")  # what MLflow's pages said
    open_report(browser, (sweep.root / "rates" / "report" / "report.html").as_uri())
    button = head(browser, "best val. loss").find_element(By.TAG_NAME, "button")
    best = {
        name: min(history(sweep.root, run.info.run_id, "validation/loss").values())
        for name, run in sweep.children.items()
    }
    button.click()
    assert names(browser) == sorted(JOBS, key=best.__getitem__)
    button.click()
    assert names(browser) == sorted(JOBS, key=best.__getitem__, reverse=True)
    last = shown(browser)
    assert len(last) == 8
    slider = browser.find_element(By.ID, "step")
    assert slider.get_attribute("aria-valuetext") == "step 4"
    slider.send_keys(Keys.HOME)
    first = shown(browser)
    assert all(first[cell][0] != last[cell][0] for cell in last)
    wait(browser, "[...document.querySelectorAll('.grid img')].every(one => one.naturalWidth > 0)")
    assert errors(browser) == []
