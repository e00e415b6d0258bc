"""The page "Attack it yourself": its arithmetic is PyTorch's, and a reader can use it.

The arithmetic is compared in headless Chromium, with the two scripts and nothing else; then the
page of the built book is driven there with the network off.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page
from torch import Tensor

from book import zoo as shelf
from defenses import attacks, models, zoo
from defenses.attacks.losses import LOSSES
from defenses.data import to_float
from tests import test_book

playwright, browser, site = test_book.playwright, test_book.browser, test_book.site

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "book" / "static"
NAMES = zoo.NAMES["mnist"]
TORCH_LOSS = {"exact": "ce", "textbook": "ce_textbook"}

pytestmark = pytest.mark.slow
every_network = pytest.mark.parametrize("name", NAMES)


# The arithmetic.


@pytest.fixture(scope="module")
def engine(browser: Browser) -> Iterator[Page]:
    """A blank page that knows the networks and the layers."""
    tab = browser.new_context(offline=True).new_page()
    tab.add_script_tag(content=shelf.script())
    tab.add_script_tag(content=(STATIC / "layers.js").read_text())
    tab.evaluate("""() => {
      globalThis.L = laboratory();
      globalThis.NETS = Object.fromEntries(Object.entries(ZOO.networks).map(
        ([name, { layers }]) => [name, L.network(layers)]));
    }""")
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def cases() -> tuple[Tensor, Tensor]:
    """The ten digits, as they are and under noise."""
    images, labels = zoo.images("mnist")
    x = to_float(images).contiguous()
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    return torch.cat([x, (x + 0.6 * noise).clamp(0, 1)]), labels.repeat(2)


def in_torch(name: str, x: Tensor, y: Tensor, loss: str, loud: bool) -> list[Tensor]:
    """Logits, loss and its gradient, image by image."""
    x = x.clone().requires_grad_()
    logits = models.pretrained(name)(x) * (100 if loud else 1)
    value = LOSSES[TORCH_LOSS[loss]](logits, y)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return [logits.detach(), value.detach(), gradient.flatten(1)]


def in_chromium(tab: Page, name: str, x: Tensor, y: Tensor, loss: str, loud: bool) -> list[Tensor]:
    found = tab.evaluate(
        """([name, images, labels, settings]) => images.map((image, i) => {
          const x = Float32Array.from(image), all = L.gradient(NETS[name], x, labels[i], settings);
          return [[...all.logits], all.value, [...all.gradient]];
        })""",
        [name, x.flatten(1).tolist(), y.tolist(), {"loss": loss, "loud": loud}],
    )
    return [torch.tensor(part) for part in zip(*found, strict=True)]


def close(found: Tensor, expected: Tensor, scale: Tensor) -> bool:
    """Whether they agree to 1e-4 of each image's own scale."""
    error = (found - expected).abs().flatten(1).amax(1)
    return bool((error <= 1e-4 * scale).all())


@every_network
@pytest.mark.parametrize("loud", [False, True])
def test_exact_loss_is_pytorchs(
    engine: Page, cases: tuple[Tensor, Tensor], name: str, loud: bool
) -> None:
    z, value, g = in_torch(name, *cases, "exact", loud)
    found_z, found_value, found_g = in_chromium(engine, name, *cases, "exact", loud)
    largest = z.abs().amax(1)
    assert close(found_z, z, largest)
    assert close(found_value[:, None], value[:, None], largest)
    assert close(found_g, g, g.abs().amax(1))
    assert (g.abs().amax(1) > 0).all()


@every_network
@pytest.mark.parametrize("loud", [False, True])
def test_textbook_loss_is_pytorchs_and_dies_where_it_does(
    engine: Page, cases: tuple[Tensor, Tensor], name: str, loud: bool
) -> None:
    z, value, g = in_torch(name, *cases, "textbook", loud)
    _, found_value, found_g = in_chromium(engine, name, *cases, "textbook", loud)
    _, m, exact = in_torch(name, *cases, "exact", loud)
    assert close(found_value[:, None], value[:, None], z.abs().amax(1))
    # What is left of a gradient after rounding is compared with what rounding works on.
    assert close(found_g, g, exact.abs().amax(1))
    dead, found_dead = (x.eq(0).all(1) for x in (g, found_g))
    sure = (m < -110) | (m > -80)  # between them a float is too small to be the same everywhere
    assert torch.equal(dead[sure], found_dead[sure])
    assert dead[m < -110].all() and not dead[m > -80].any()
    assert (m < -110).sum() >= (10 if loud else 0)


@every_network
def test_one_step_is_the_modules(engine: Page, cases: tuple[Tensor, Tensor], name: str) -> None:
    x, y = cases
    expected = attacks.fgsm(models.pretrained(name), x, y, eps=0.3).flatten(1)
    g = in_torch(name, x, y, "exact", False)[2].abs()
    found = engine.evaluate(
        """([name, images, labels, settings]) => images.map((image, i) =>
          [...L.attack(NETS[name], Float32Array.from(image), labels[i], settings).image])""",
        [name, x.flatten(1).tolist(), y.tolist(), attack("FGSM", 0.3)],
    )
    sure = g.eq(0) | (g > 1e-4 * g.amax(1, keepdim=True))  # others may round to either sign
    assert sure.float().mean() > 0.5
    assert (torch.tensor(found) - expected).abs()[sure].max() < 1e-6


def attack(name: str, eps: float, steps: int = 40, **more: Any) -> dict[str, Any]:
    settings = {"attack": name, "eps": eps, "steps": steps, "loss": "exact", "loud": False}
    return settings | more


def held(tab: Page, name: str, settings: dict[str, Any]) -> int:
    """How many of the ten digits a network still reads."""
    return tab.evaluate(
        """([name, settings]) => ZOO.images.filter(({ label, pixels }) => {
          const image = Float32Array.from(atob(pixels), c => c.charCodeAt(0) / 255);
          const found = L.attack(NETS[name], image, label, settings);
          if (found.image.some((v, i) => !(v >= 0 && v <= 1) ||
            Math.abs(v - image[i]) > settings.eps + 1e-6)) throw "outside of the box";
          return found.answer === label;
        }).length""",
        [name, settings],
    )


def test_what_the_folds_say_of_all_ten_digits(engine: Page) -> None:
    textbook: dict[str, Any] = {"loss": "textbook"}
    assert held(engine, "none", attack("FGSM", 0.3, **textbook, loud=True)) == 10
    assert held(engine, "none", attack("FGSM", 0.3, loud=True)) == 0
    assert held(engine, "one random step", attack("FGSM", 0.3)) == 10
    assert held(engine, "one random step", attack("PGD", 0.3)) == 0
    assert held(engine, "prototypes", attack("FGSM", 0.3, **textbook)) > 6
    assert held(engine, "prototypes", attack("FGSM", 0.3)) == 0
    assert held(engine, "PGD", attack("PGD", 0.3, 100)) == 10
    assert held(engine, "PGD", attack("PGD", 0.5, 100)) == 0


# The page.


@pytest.fixture(params=[390, 1280])
def page(
    request: pytest.FixtureRequest, browser: Browser, site: Path
) -> Iterator[tuple[Page, int]]:
    """The page at the width of a phone or a desktop, without a network; nothing may go wrong."""
    tab, trouble = test_book.watched(browser, request.param)
    tab.goto((site / "book" / "attack.html").as_uri())
    tab.wait_for_selector(".lab")
    rest(tab)
    yield tab, request.param
    assert trouble == []
    tab.close()


def rest(tab: Page) -> str:
    """Wait until the page has computed; return what it says."""
    tab.wait_for_function("!document.querySelector('.lab').hasAttribute('aria-busy')")
    return tab.locator(".lab-answer").inner_text()


def test_every_experiment_comes_out(page: tuple[Page, int]) -> None:
    tab, _ = page
    assert len(tab.workers) == 1, "the page itself computes nothing, so it never stalls"
    experiments = tab.evaluate("EXPERIMENTS")
    buttons = tab.locator(".lab-set-up")
    assert buttons.count() == len(experiments) == tab.locator("#what-to-try > section").count()
    for i, (settings, fate) in enumerate(experiments):
        buttons.nth(i).click()
        assert f"says {settings['digit']}" in rest(tab), "it is read correctly to begin with"
        assert tab.locator(".lab-task").inner_text().strip()
        tab.locator(f"[value={fate}]").click()
        assert f"it {fate}. You guessed right" in rest(tab)
        blind = settings["loss"] == "textbook"
        assert ("exactly 0 at all 784 pixels" in rest(tab)) == blind
        if blind:  # as its fold says, the exact loss takes the same digit
            tab.locator("[name=loss]").select_option("exact")
            tab.locator("[value=holds]").click()
            assert "it falls. You guessed otherwise" in rest(tab)


def test_a_reader_with_a_keyboard_only(page: tuple[Page, int]) -> None:
    tab, _ = page
    tab.locator("[name=digit]:checked").focus()
    tab.keyboard.press("ArrowRight")
    assert "says 4" in rest(tab)
    tab.keyboard.press("Tab")  # the network
    tab.keyboard.press("End")
    assert tab.locator("[name=network]").input_value() == NAMES[-1]
    for _ in range(3):  # attack, loss, ε
        tab.keyboard.press("Tab")
    before = float(tab.locator("[name=eps]").input_value())
    tab.keyboard.press("ArrowRight")
    assert float(tab.locator("[name=eps]").input_value()) == pytest.approx(before + 0.01)
    tab.keyboard.press("Tab")  # steps are off: one step has one
    assert tab.evaluate("document.activeElement.name") == "loud"
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    assert "After one step of ε = 0.21 it says 4" in rest(tab)
    assert "You guessed right, 1 of 1" in rest(tab)


def test_a_digit_drawn_with_the_keyboard(page: tuple[Page, int]) -> None:
    tab, _ = page
    tab.locator("[name=digit]:checked").focus()
    for _ in range(3):  # from 3 to the left: 2, 1, 0; once more: around to "draw one"
        tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("[name=digit]:checked").input_value() == "draw"
    tab.keyboard.press("Tab")
    for key in [*["ArrowUp"] * 8, "Space", *["ArrowDown"] * 16]:
        tab.keyboard.press(key)
    assert tab.locator(".lab-draw [role=status]").inner_text() == "The pen is down."
    tab.locator("[name=label]").select_option("1")
    assert "says 1" in rest(tab)


def test_a_digit_drawn_with_the_mouse_is_attacked(page: tuple[Page, int]) -> None:
    tab, _ = page
    tab.locator("[name=digit][value=draw]").check()
    tab.locator("[name=label]").select_option("7")
    assert "The paper is empty" in rest(tab)
    assert tab.locator("[value=falls]").is_disabled()
    tab.locator(".lab-draw canvas").scroll_into_view_if_needed()
    box = tab.locator(".lab-draw canvas").bounding_box()
    assert box is not None
    for i, (x, y) in enumerate([(3, 4), (16, 4), (8, 19)]):  # off the middle: it is centered
        tab.mouse.move(box["x"] + x * box["width"] / 28, box["y"] + y * box["height"] / 28, steps=5)
        if i == 0:
            tab.mouse.down()
    tab.mouse.up()
    assert "says 7" in rest(tab)
    tab.locator("[name=attack]").select_option("PGD")
    tab.locator("[name=eps]").fill("0.3")
    tab.locator("[value=falls]").click()
    assert "After 40 steps of ε = 0.30 it says" in rest(tab)
    assert "it falls. You guessed right" in rest(tab)
    tab.locator("[name=clear]").click()
    pixels = "c => c.getContext('2d').getImageData(0, 0, 28, 28).data.filter((v, i) => i % 4 < 3)"
    assert tab.locator(".lab-draw canvas").evaluate(f"c => ({pixels})(c).every(v => v === 0)")


def test_what_is_seen_is_also_said(page: tuple[Page, int]) -> None:
    tab, width = page
    tab.locator("[value=falls]").click()
    rest(tab)
    pictures = tab.locator(".lab-pictures canvas, .lab-path svg").all()
    assert len(pictures) == 4
    for picture in pictures:
        assert picture.get_attribute("role") == "img"
        assert len(picture.get_attribute("aria-label") or "") > 10
    assert "reads as 8" in (pictures[2].get_attribute("aria-label") or "")
    unnamed = """() => [...document.querySelectorAll('.lab :is(select, input, button, [tabindex])')]
      .filter(e => !(e.labels && e.labels.length) && !e.textContent.trim())
      .filter(e => !e.getAttribute('aria-label')).map(e => e.outerHTML)"""
    assert tab.evaluate(unnamed) == []
    assert tab.locator(".lab-answer").get_attribute("aria-live") == "polite"
    after = tab.locator("tbody td:nth-child(3)").all_inner_texts()
    shares = [float(share.rstrip("%")) for share in after if "%" in share]
    assert sum(shares) == pytest.approx(100, abs=0.6)
    edges = "[...document.querySelectorAll('.lab *')].map(e => e.getBoundingClientRect().right)"
    assert max(tab.evaluate(edges)) <= width


def test_without_javascript_there_is_a_sentence_and_a_picture(browser: Browser, site: Path) -> None:
    tab = browser.new_context(java_script_enabled=False, offline=True).new_page()
    tab.goto((site / "book" / "attack.html").as_uri())
    still = tab.locator(".cell.tag_still")
    assert "needs JavaScript" in still.inner_text()
    pictures = still.locator("img")
    assert pictures.count() == 3
    for picture in pictures.all():
        assert picture.is_visible()
        assert "reads as" in (picture.get_attribute("alt") or "")
