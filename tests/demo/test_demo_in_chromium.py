"""The demo in a real browser. tests/demo/run_in_chromium.sh installs what this needs, and runs it."""

import os
import shutil
import zipfile
from dataclasses import replace

import pytest
from PIL import Image

import golden_data as golden
from ddt_fast.config import DataConfig, SamplingConfig
from ddt_fast.model.reference import DDT
from ddt_fast.model.weights import save_model
from pipeline_cases import LATENT_MODEL
from sample_jobs import small_autoencoder

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("chromium is not installed: tests/demo/run_in_chromium.sh", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: tests/demo/run_in_chromium.sh")
pytest.importorskip("gradio", reason='gradio is not installed: pip install ".[demo]" in the checkout')

from demo_cases import held, models, served, wait_until  # noqa: E402

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PIXELS = """image => {
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext('2d').drawImage(image, 0, 0);
    return [image.naturalWidth, Array.from(canvas.getContext('2d').getImageData(0, 0, 8, 8).data)];
}"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The digits, and an untrained model with ImageNet's classes."""
    folder = tmp_path_factory.mktemp("latent")
    config = replace(golden.model(LATENT_MODEL).config, num_classes=1000)
    data = DataConfig("latents", 64, small_autoencoder(folder / "vae"))
    save_model(DDT(config), folder / "model", data, SamplingConfig(num_steps=6))
    loaded = models(folder / "model")
    with served({"digits": loaded.pop("digits"), **loaded}, folder) as demo:
        yield demo


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, demo):
    """A function that opens the page anew, as another user would; none may ask any other machine for anything."""
    contexts, elsewhere = [], []

    def watch(request):
        if not request.url.startswith((demo.page.local_url, "data:", "blob:")):
            elsewhere.append(request.url)

    def new_page():
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 880}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("request", watch)
        page.goto(demo.page.local_url)
        page.wait_for_selector("#generate-run")
        return page

    yield new_page
    for context in contexts:
        context.close()
    assert elsewhere == []


def pictures(page, gallery: str, count: int):
    """The images of a gallery, when they are there and loaded."""
    images = page.locator(f"#{gallery} img")
    page.wait_for_function(
        f"() => {{ const all = [...document.querySelectorAll('#{gallery} img')];"
        f" return all.length === {count} && all.every(image => image.complete && image.naturalWidth) }}"
    )
    return images


def set_number(page, field: str, value: str) -> None:
    page.locator(f"#{field} input[type=number]").fill(value)
    page.keyboard.press("Tab")


def choose_class(page, text: str) -> None:
    page.locator("#classes input").fill(text)
    page.keyboard.press("Enter")


def captions(page, gallery: str) -> list[str]:
    return page.locator(f"#{gallery} .caption-label").all_inner_texts()


def test_digits_are_generated_seen_and_downloaded(opened, tmp_path):
    page = opened()
    choose_class(page, "7")
    set_number(page, "num_images", "3")
    set_number(page, "seed", "40")
    page.click("#generate-run")
    images = pictures(page, "images", 3)
    assert captions(page, "images") == ["7 · seed 40", "7 · seed 41", "7 · seed 42"]
    page.wait_for_selector("#generate-status strong")
    assert "img/s" in page.inner_text("#generate-status")

    # Small, as they were drawn, and shown large with hard edges.
    width, values = images.nth(1).evaluate(PIXELS)
    assert width == 8
    assert images.nth(1).bounding_box()["width"] > 80
    assert images.nth(1).evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        picture = Image.open(archive.open("00001_class_7_seed_41.png")).convert("RGBA")
    assert list(picture.tobytes()) == values
    assert len(set(values)) > 10, "a digit has many shades"


def test_wrong_input_is_answered_in_the_page_and_the_next_request_served(opened):
    page = opened()
    choose_class(page, "unicorn")
    page.click("#generate-run")
    page.get_by_text("Class 'unicorn' is unknown").wait_for()
    page.locator("#classes button[aria-label*='emove'], #classes .token-remove").first.click()
    for field, value, message in (
        ("num_images", "1000000", "Images is 1000000; allowed: a whole number, 1 to 12"),
        ("guidance_low", "2", "Guided from t is 2; allowed: 0 to 1"),
    ):
        before = page.locator(f"#{field} input[type=number]").input_value()
        set_number(page, field, value)
        page.click("#generate-run")
        page.get_by_text(message).wait_for()
        set_number(page, field, before)
    assert page.locator("#images img").count() == 0, "a refused request draws nothing"
    set_number(page, "num_images", "2")
    page.click("#generate-run")
    pictures(page, "images", 2)


def test_pages_wait_and_get_their_own_images(opened, demo):
    pages = [opened() for _ in range(2)]
    with held(demo):
        for seed, page in enumerate(pages):
            set_number(page, "num_images", "1")
            set_number(page, "seed", str(seed))
            page.click("#generate-run")
            page.wait_for_function("() => document.querySelector('#generate-status').innerText.includes('waiting')")
    for seed, page in enumerate(pages):
        pictures(page, "images", 1)
        assert captions(page, "images") == [f"0 · seed {seed}"]


def test_another_model_brings_its_classes_and_settings(opened, demo):
    page = opened()
    page.locator("#model input").click()
    page.get_by_role("option", name=list(demo.models)[1]).click()
    page.wait_for_function("() => document.querySelector('#num_steps input').value === '6'")
    page.locator("#classes input").fill("golden r")
    page.get_by_role("option", name="207 · golden retriever").click()
    page.keyboard.press("Escape")
    page.click("#generate-run")
    images = pictures(page, "images", 4)
    assert captions(page, "images")[0] == "golden retriever · seed 0"
    assert images.first.evaluate("image => [image.naturalWidth, getComputedStyle(image).imageRendering]") == [
        64,
        "auto",
    ]
    choose_class(page, "golden retreiver")
    page.click("#generate-run")
    page.get_by_text("nearest: 207 'golden retriever'").wait_for()


def test_refresh_1_and_k_stand_side_by_side(opened):
    """The picture of the documentation, written where DDT_DEMO_SCREENSHOT says, if it does."""
    page = opened()
    page.get_by_role("tab", name="Compare").click()
    page.click("#compare-run")
    page.get_by_text("Refresh K is 1").wait_for()
    for field, value in (("seed", "20"), ("num_images", "9"), ("refresh_every", "4")):
        set_number(page, field, value)
    page.click("#compare-run")
    for gallery in ("fresh", "kept", "difference"):
        pictures(page, gallery, 9)
    page.locator("#kept").get_by_text("Refresh 4").wait_for()
    page.wait_for_selector("#compare-table td")
    table = page.inner_text("#compare-table")
    for row in ("time", "img/s", "encoder runs", "times as fast", "relative L2 difference"):
        assert row in table
    page.wait_for_timeout(500)
    assert len(page.screenshot(path=os.environ.get("DDT_DEMO_SCREENSHOT"))) < 300_000


def test_a_trajectory_is_a_strip_from_noise_to_image(opened):
    page = opened()
    page.get_by_role("tab", name="Trajectory").click()
    set_number(page, "num_images", "2")
    set_number(page, "frames", "5")
    page.click("#trajectory-run")
    states, predictions = pictures(page, "states", 10), pictures(page, "predictions", 10)
    assert captions(page, "states")[:5] == ["t 0.00", "t 0.24", "t 0.48", "t 0.76", "t 1.00"]
    assert states.nth(4).evaluate(PIXELS) == predictions.nth(4).evaluate(PIXELS)
    assert states.nth(0).evaluate(PIXELS) != states.nth(4).evaluate(PIXELS)


def test_stop_ends_a_request(opened, demo):
    page = opened()
    with held(demo):
        page.click("#generate-run")
        page.wait_for_selector("#generate-status progress")
        page.click("#generate-stop")
        wait_until(lambda: len(demo.reports) == 0)
        page.wait_for_function("() => document.querySelector('#generate-status').innerText.includes('Stopped')")
        assert page.locator("#images img").count() == 0
    set_number(page, "num_images", "1")
    page.click("#generate-run")
    pictures(page, "images", 1)
    assert captions(page, "images") == ["0 · seed 0"]


def test_a_random_seed_is_another_one(opened):
    page, seed = opened(), "0"
    for _ in range(2):
        page.get_by_role("button", name="Random").click()
        page.wait_for_function("before => document.querySelector('#seed input').value !== before", arg=seed)
        seed = page.input_value("#seed input")
        assert 0 < int(seed) < 2**31
