"""A headless Chromium, and what the report of `kandinsky-exp compare` shows in it. Skips loudly where there is none."""

import shutil
from pathlib import Path

import pytest

selenium = pytest.importorskip("selenium", reason="LOUD: no selenium, no page is tested in a browser")
from selenium.webdriver import Chrome, ChromeOptions  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-quic", "--disable-background-networking", "--no-first-run",
         "--window-size=1400,1000", "--enable-unsafe-swiftshader")  # fmt: skip
PATIENCE = 60.0  # seconds


def started(profile: Path, *flags: str) -> Chrome:
    if BROWSER is None or DRIVER is None:
        pytest.skip("LOUD: no chromium or chromedriver, no page is tested in a browser")
    options = ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, *flags, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options=options, service=Service(DRIVER))


def wait(browser: Chrome, condition: str, *arguments: object) -> None:
    """Until a condition in JavaScript, of these `arguments`, is true."""
    script = f"return {condition}"
    WebDriverWait(browser, PATIENCE).until(lambda _: browser.execute_script(script, *arguments), condition)


def open_report(browser: Chrome, address: str) -> None:
    browser.get(address)
    wait(browser, "document.documentElement.dataset.ready === 'true'")


def errors(browser: Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def names(browser: Chrome) -> list[str]:
    return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, ".runs tbody th")]


def head(browser: Chrome, name: str) -> WebElement:
    found = browser.find_elements(By.CSS_SELECTOR, ".runs thead th")
    return next(one for one in found if one.text.startswith(name))


def shown(browser: Chrome) -> dict[str, tuple[str, str, str]]:
    """(image, caption, classes) by cell."""
    found = browser.find_elements(By.CSS_SELECTOR, ".grid figure")
    return {
        str(one.get_attribute("data-cell")): (
            one.find_element(By.TAG_NAME, "img").get_attribute("src") or "",
            one.find_element(By.TAG_NAME, "figcaption").text,
            one.get_attribute("class") or "",
        )
        for one in found
    }


__all__ = ["By", "Chrome", "Keys", "WebElement", "errors", "head", "names", "open_report", "shown", "started", "wait"]
