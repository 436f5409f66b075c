"""The pages, read as a browser reads them: no report, id or path adds an element or an attribute."""

import shutil

import html5lib
import numpy as np
import pytest
from PIL import Image

from modules.evaluation.bootstrap import Difference
from modules.inference.prediction import WrittenReport
from modules.pages.comparison import Comparison, ReportPair, ScoreLine, to_html
from modules.pages.findings import Finding, Findings
from modules.pages.prediction_page import PageStudy, render_page
from modules.pages.studies import Sample
from modules.runtime.errors import InputError, run_entry_point
from tests.pages.test_html_report import PAYLOADS, page

# What a text of ours may stand in: everything else about an element is the template's own.
TEXT_ATTRIBUTES = {"alt", "aria-label", "title"}
OURS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "header",
    "h1",
    "h2",
    "h3",
    "h4",
    "p",
    "strong",
    "main",
    "section",
    "ul",
    "li",
    "ol",
    "span",
    "div",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "details",
    "summary",
    "img",
    "mark",
    "input",
    "label",
    "article",
    "figure",
    "figcaption",
    "footer",
    "br",
    "script",
    "button",
    "canvas",
    "nav",
    "a",
    "b",
    "select",
    "option",
    "svg",
    "g",
    "line",
    "path",
    "circle",
    "rect",
    "text",
}


def structure(text):
    """Every element in order, with its place, its attributes and their values but for texts."""
    found = []

    def walk(element, depth):
        if isinstance(element.tag, str):
            tag = element.tag.rpartition("}")[2]  # without HTML's or SVG's namespace
            values = {name: "text" if name in TEXT_ATTRIBUTES else value for name, value in element.attrib.items()}
            found.append((depth, tag, values))
        else:
            found.append((depth, "comment", {}))
        for child in element:
            walk(child, depth + 1)

    walk(html5lib.parse(text, treebuilder="etree"), 0)
    return found


def require_harmless(text, plain):
    """The elements of ``text`` are those of ``plain``, which has words in the place of payloads, and fetch nothing."""
    found = structure(text)
    assert found == structure(plain)
    assert {tag for _, tag, _ in found} <= OURS
    for _, tag, values in found:
        assert not [name for name in values if name.startswith("on")] and "style" not in values
        assert values.get("href", "#").startswith("#")  # a place of the page itself
        assert not {"xlink:href", "srcset", "action", "formaction", "background", "data", "ping", "http-equiv"} & {
            name for name in values if tag != "meta"
        }
        assert values.get("src", "data:image/").startswith("data:image/")
    [policy] = [values["content"] for _, _, values in found if values.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["base-uri"] == rules["form-action"] == "'none'"
    assert all(
        source == "data:" or source == "'none'" or source.startswith("'sha256-")
        for sources in rules.values()
        for source in sources.split()
    )


@pytest.mark.thorough
def test_report_page(tmp_path):
    plain = page(tmp_path / "plain.html", "plain", history=[])
    assert plain.structure
    for number, payload in enumerate(PAYLOADS):
        page(tmp_path / f"{number}.html", payload, history=[])
        require_harmless((tmp_path / f"{number}.html").read_text(), (tmp_path / "plain.html").read_text())


def comparison(texts):
    line = ScoreLine("BLEU_4", 0.1, 0.2, Difference(0.1, 0.05, 0.15, 0.01, 0.01), 0.01)
    pairs = [ReportPair(i + 1, f"{text} .", f"{text} . a .", f"{text} . b .", 0.1, 0.2) for i, text in enumerate(texts)]
    return to_html(
        Comparison(
            (texts[0], texts[-1]),
            True,
            [(text, text, text) for text in texts],
            list(texts),
            [line],
            "BLEU_4",
            len(texts),
            0,
            pairs,
            pairs,
        )
    )


def predictions(texts):
    image = Image.new("L", (4, 4))
    studies = [
        PageStudy.of(
            text, [image], WrittenReport([text, "."], [-0.1, -2.0], None, np.full((2, 1, 2, 2), 0.25)), [(0.5, text)]
        )
        for text in texts
    ]
    return render_page(studies, title=texts[0], checkpoint=texts[-1])


@pytest.mark.parametrize("make", [comparison, predictions])
def test_other_pages(make):
    require_harmless(make(PAYLOADS), make(["plain"] * len(PAYLOADS)))


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_in_a_browser_nothing_runs_and_the_page_works(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    films = [Image.new("L", (40, 30), 90)]
    texts = [text.replace("\0", "") for text in PAYLOADS]
    findings = Findings((Finding("Edema"),), (), ()), Findings((), (Finding("Fracture"),), ())
    page(
        tmp_path / "report.html",
        PAYLOADS[0],
        samples=[
            Sample(text, films, (text,), text, f"{text} . clear .", (), findings[i == 7], {"ROUGE_L": float(i)})
            for i, text in enumerate(texts)
        ],
    )
    (tmp_path / "predictions.html").write_text(predictions(texts))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name in ("report.html", "predictions.html"):
            tab = browser.new_page()
            said, fetched = [], []
            tab.on("console", lambda message, said=said: said.append(message.text))
            tab.on("dialog", lambda dialog, said=said: (said.append(dialog.message), dialog.dismiss()))
            tab.on("request", lambda request, fetched=fetched: fetched.append(request.url))
            tab.goto((tmp_path / name).as_uri())
            assert not said
            assert [url for url in fetched if not url.startswith("data:")] == [(tmp_path / name).as_uri()]
            # The style sheet, which the policy allows by its hash, is in force, and the images are there.
            assert "Times" not in tab.evaluate("getComputedStyle(document.body).fontFamily")
            assert tab.evaluate("[...document.images].every(image => image.loading == 'lazy' || image.naturalWidth)")
            if name == "report.html":
                shown = "[...document.querySelectorAll('article')].filter(each => each.offsetHeight).length"
                before = tab.evaluate(shown)
                # Sorting and filtering need no script.
                first = (
                    "[...document.querySelectorAll('.sample')].sort((a, b) => a.offsetTop - b.offsetTop)[0].innerText"
                )
                lists = tab.locator("select")
                lists.nth(0).select_option(label="worst ROUGE-L first")
                assert "ROUGE-L 0.000" in tab.evaluate(first)
                lists.nth(0).select_option(label="best ROUGE-L first")
                assert f"ROUGE-L {len(texts) - 1:.3f}" in tab.evaluate(first)
                lists.nth(3).select_option(label="missed")
                assert before == len(texts) + 1 and tab.evaluate(shown) == 2  # with the one that opens the page
                lists.nth(2).focus()  # the classes
                tab.keyboard.press("ArrowDown")
                assert tab.evaluate(shown) == 1
                tab.locator(".hit").first.hover()
                assert tab.evaluate("getComputedStyle(document.querySelector('.readout')).visibility") == "visible"
            # What the policy is there for: a script that got in would not run.
            tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.owned = 1\">')")
            tab.wait_for_timeout(300)
            assert not tab.evaluate("window.owned") and any("Content Security Policy" in text for text in said)
        browser.close()


@pytest.mark.parametrize(
    "page_text", ["<p onclick=x>", "<img src=//evil.example>", "<a href=x>", "<iframe>", "<!-- -->"]
)
def test_the_check_sees_offences(page_text):
    policy = (
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; base-uri 'none'; form-action 'none'\">"
    )
    require_harmless(policy + "<p>", policy + "<p>")
    with pytest.raises(AssertionError):
        require_harmless(policy + page_text, policy + "<p>")
    with pytest.raises((AssertionError, KeyError)):
        require_harmless(policy + page_text, policy + page_text)


def test_a_terminal_is_told_nothing_by_a_hostile_name(capsys):
    def main():
        raise InputError("id \x1b]0;owned\x07\x1b[2J\x9b31m twice\r\nnext\u202e")

    with pytest.raises(SystemExit):
        run_entry_point(main)
    assert capsys.readouterr().err == "error: id ]0;owned[2J31m twice next\n"
