"""The website, as people meet it: written by its command, opened from the disk in a headless Chromium."""

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import curves
import stats
import website
import words
from entry import sources_of

ROOT = Path(__file__).resolve().parent.parent

ATTACK = "\"'><img src=x onerror=hit=1><script>hit=2</script><b"
ROWS = json.loads((ROOT / "records/published.json").read_text())["records"]
PUBLISHED = Counter(row["track"] for row in ROWS)
README = f"""# {ATTACK}

<script>hit=3</script> <img src=x onerror=hit=4> [link](javascript:hit=5) [data](data:text/html,hit)
![pixel](https://evil.example/x.png)
[fine](https://example.org/) and **bold**

<iframe srcdoc="<script>parent.hit=6</script>"></iframe>

| a | b |
| - | - |
| 1 | {ATTACK} |
"""

def run(root, directory, ok=True):
    command = [sys.executable, root / "records/website.py", directory]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (0 if ok else 2), done.stdout + done.stderr
    return done.stdout if ok else done.stderr

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository with the real entries and one that means harm, nano #99."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "records", root / "records", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data", root / "data", ignore=shutil.ignore_patterns("__pycache__", "fineweb*"))
    evil = root / "records/nano/99_evil"
    shutil.copytree(root / "records/nano/09_preset", evil)
    record = json.loads((evil / "record.json").read_text())
    record |= {"number": 99, "slug": "evil", "kind": "negative", "title": ATTACK}
    record["contributors"] = [ATTACK, "e" * 60]
    for result in record["runs"]:
        result["config"][ATTACK] = ATTACK
        result["machine"]["name"] = ATTACK
    (evil / "README.md").write_text(README)
    rows = [{"kind": "step", "loss": 9 - 0.01 * at, "seconds": at + 1.0, "at": at} for at in range(500)]
    rows.append({"kind": "eval", "loss": 4.0625, "at": 500})
    metrics = "".join(f"{json.dumps(row)}\n" for row in rows)
    packed = gzip.compress(metrics.encode())
    (evil / "metrics_seed42.jsonl.gz").write_bytes(packed)
    first = record["runs"][0]
    first |= {"metrics": "metrics_seed42.jsonl.gz", "metrics_sha256": hashlib.sha256(packed).hexdigest()}
    first["config"]["</span></code></pre>"] = ATTACK
    (evil / "record.json").write_text(json.dumps(record))
    return root

@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    directory = tmp_path_factory.mktemp("site") / "site"
    run(root, directory)
    return directory


# ---- What is read ------------------------------------------------------------------------------------------

def test_the_sources_of_a_log_are_told_from_its_lines():
    def embedded(name, source):
        digest = hashlib.sha256(source).hexdigest()
        return f"source {name} {len(source)} bytes sha256 {digest}\n".encode() + source + b"\n"

    text = "step       1/9  train 8.0000  1.0 s\n"
    train, harness = "loss = 'ü'\nsource harness.py 3 bytes\n".encode(), b"x"
    one = embedded("train_gpt.py", train)
    two = one + embedded("harness.py", harness)
    assert sources_of(one + text.encode(), "it") == ({"train_gpt.py": train}, text)
    assert sources_of(two + text.encode(), "it") == ({"train_gpt.py": train, "harness.py": harness}, text)

def test_the_steps_that_a_resumed_run_repeats_count_once():
    text = """start  val 8.3 before training
step       1/3  train 8.0000  1.0 s
step       2/3  train 7.0000  2.0 s
epoch    1/2  step     2  train 7.0000  val 7.1000  2.6 bpb  0.1 min  6,107 tok/s
step       3/3  train 6.0000  3.0 s
epoch    2/2  step     3  train 6.0000  val 6.1000  2.3 bpb  0.1 min  6,107 tok/s
resume at step 2, after 0.0 minutes of training
step       3/3  train 6.5000  2.9 s
epoch    2/2  step     3  train 6.5000  val 6.2000  2.3 bpb  0.1 min  6,107 tok/s
member   1/2  val 6.2000  the 1 members so far 6.2000
step       1/3  train 5.0000  4.0 s
step       2/3  train nan  5.0 s
"""
    curve = curves.of_log(text)
    assert curve["step"] == [(1.0, 8.0), (2.0, 7.0), (2.9, 6.5), (4.0, 5.0)]
    assert curve["ensemble"] == [(3, 6.2)]
    assert curve["eval"][0] == (2, 7.1) and curve["eval"][-1] == (3, 6.2)

@given(st.lists(st.floats(0, 12), max_size=2000))
def test_a_thinned_curve_keeps_its_mean_and_its_length(losses):
    steps = [(at + 1.0, loss) for at, loss in enumerate(losses)]
    thin = website.thinned({"step": steps, "eval": [], "ensemble": []})
    assert len(thin["step"]) == min(len(losses), website.POINTS)
    if losses:
        assert thin["step"][-1] == len(losses) == thin["seconds"][-1]
        weights = np.diff([0, *thin["step"]])
        assert np.average(thin["train"], weights=weights) == pytest.approx(np.mean(losses), abs=1e-4)

def test_documents_are_known_by_how_they_begin(capsys):
    entry = website.history("nano")[8]
    data = entry.runs[0]["data"]
    texts = words.beginnings(data)
    assert len(texts) == entry.docs["val_tokens"].size
    assert all(0 < len(text) <= words.BEGINNING for text in texts)
    assert sum(" the " in text for text in texts) > 100
    assert words.beginnings(data | {"val": "0" * 64}) == words.beginnings(data | {"name": "none"}) == []
    with mock.patch.dict(sys.modules, {"prepare": None}):
        assert re.fullmatch(r"[\d ]+", words.beginnings(data)[0])
    assert "no tokenizer" in capsys.readouterr().err


# ---- What is written ---------------------------------------------------------------------------------------

class Links(HTMLParser):
    """[(tag, address)] of a page."""

    def __init__(self, text):
        super().__init__()
        self.found, self.tags = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.found += [(tag, value) for name, value in attributes if name in ("href", "src", "action")]

def test_pages_load_nothing_from_elsewhere_and_their_links_lead_somewhere(site):
    pages = sorted(site.glob("*.html"))
    assert len(pages) == 2 + len(list((ROOT / "records").glob("*/[0-9]*/record.json"))) + 1
    for page in pages:
        links = Links(page.read_text())
        assert not links.tags & {"img", "iframe", "style", "object", "base"}
        for tag, address in links.found:
            if tag == "a" and re.match("https?:", address):
                continue
            path = address.split("#")[0]
            assert (site / path).is_file() if path else address == "#main", f"{page.name}: {tag} {address}"
        assert page.stat().st_size < 150_000
    assert all(path.stat().st_size < 60_000 for path in (site / "data").iterdir())
    assert "MIT" in (site / "assets/uPlot.LICENSE").read_text()

def test_a_site_is_written_over_an_earlier_one_and_over_nothing_else(root, site, tmp_path):
    again, foreign = tmp_path / "site", tmp_path / "thesis"
    shutil.copytree(site, again)
    (again / "nano-98.html").write_text("an entry that is gone")
    assert "index.html" in run(root, again)
    assert {path.name for path in again.iterdir()} == {path.name for path in site.iterdir()}
    foreign.mkdir()
    (foreign / "index.html").write_text("years of work")
    refusal = f"error: {foreign} is not empty and holds no site; name a new folder\n"
    assert run(root, foreign, ok=False) == refusal
    (tmp_path / "file").touch()
    assert run(root, tmp_path / "file/site", ok=False).count("\n") == 1
    assert (foreign / "index.html").read_text() == "years of work"
    assert {path.name for path in tmp_path.iterdir()} == {"site", "thesis", "file"}

def test_runs_of_ones_own_are_compared_beside_the_entries(tmp_path):
    """A run folder as it was before it was filed as nano/9."""
    entry, run = ROOT / "records/nano/09_preset", tmp_path / "runs/mine"
    record = json.loads((entry / "record.json").read_text())
    result = record["runs"][0]
    (run / "checkpoints").mkdir(parents=True)
    for member in result["members"]:
        digest = {"checkpoint": member["checkpoint"], "sha256": "0" * 64}
        (run / "checkpoints" / member["checkpoint"]).with_suffix(".json").write_text(json.dumps(digest))
    shutil.copy(entry / result["log"], run / "log.txt")
    with np.load(entry / "doc_losses.npz") as docs:
        np.savez(run / "doc_losses.npz", **{k: v[0] if k.endswith("_loss") else v for k, v in docs.items()})
    rows = curves.of_log(sources_of((run / "log.txt").read_bytes(), "it")[1])["step"]
    lines = [{"kind": "step", "at": at, "seconds": s, "loss": loss} for at, (s, loss) in enumerate(rows)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    filed = ("log", "log_sha256", "metrics", "metrics_sha256", "checkpoints")
    (run / "result.json").write_text(json.dumps({k: v for k, v in result.items() if k not in filed}))
    texts, opened = website.files([run]), re.compile(r"slowrun.put\(\S+, (.*)\);\n")
    assert '<option value="run-mine">mine: a run of nano</option>' in texts["compare.html"]
    own, of_entry = (json.loads(opened.fullmatch(texts[f"data/{name}.js"])[1])
                     for name in ("run-mine", "nano-09"))
    assert own["runs"][0]["train"] == of_entry["runs"][0]["train"]
    assert own["documents"]["tokens"] == of_entry["documents"]["tokens"]
    assert own["name"] == "mine" and own["val"] == pytest.approx(result["val_loss"], abs=1e-5)
    assert "run-mine.html" not in texts


# ---- What a browser shows ----------------------------------------------------------------------------------

browsers = pytest.mark.slow

@pytest.fixture(scope="module")
def browser():
    reason = "no playwright here: ./run.sh test installs it"
    api = pytest.importorskip("playwright.sync_api", reason=reason)
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium to open the site in: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()

@pytest.fixture
def open_page(browser, site):
    """open_page(address, **options) -> the page; the test fails at the first complaint of the console."""
    complaints, contexts = [], []

    def local(address):
        return address.startswith(site.as_uri())

    def open_page(address, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: local(request.url) or complaints.append(request.url))
        page.goto(f"{site.as_uri()}/{address}")
        return page

    open_page.complaints = complaints
    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []

def column(page, name):
    return [text.strip() for text in page.locator(f"#leaderboard tbody tr:visible .{name}").all_inner_texts()]

@browsers
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_pages_open_and_fit(open_page, site, width, scheme):
    page = open_page("index.html", width, color_scheme=scheme)
    for name in ("index", "compare", "nano-01", "nano-10", "nano-99", "nano_unlimited-01"):
        path = site / f"{name}.html"
        page.goto(path.as_uri())
        chart = {"index.html": None, "compare.html": "#scatter canvas"}.get(path.name, "#curve canvas")
        if chart:
            page.wait_for_selector(chart)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name
        controls = "[...document.querySelectorAll('button, select, input, a, summary')]"
        assert page.evaluate(f"{controls}.every(e => e.textContent.trim() || e.labels?.length)")
        tables = "[...document.querySelectorAll('table:not(.prose *)')]"
        assert page.evaluate(f"{tables}.every(t => t.caption?.textContent)")

@browsers
def test_the_leaderboard_sorts_by_mouse_and_by_keyboard(open_page):
    page = open_page("index.html")
    head = page.locator("#leaderboard th", has_text="Val loss")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    losses = [float(loss) for loss in column(page, "loss")]
    assert losses == sorted(losses) and len(losses) > 60
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert [float(loss) for loss in column(page, "loss")] == sorted(losses, reverse=True)
    gain = page.locator("#leaderboard th", has_text="Gain").get_by_role("button")
    for _ in range(2):  # what has no gain stands last, up and down
        gain.click()
        gains = column(page, "gain")
        known = gains.index("–")
        assert known > 5 and set(gains[known:]) == {"–"}
    assert float(gains[0].split()[0]) == pytest.approx(0.451, abs=1e-4)
    assert page.locator("[aria-sort]").count() == 1

@browsers
def test_the_leaderboard_filters_and_its_address_says_how(open_page):
    page = open_page("index.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.get_by_label("nano", exact=True).focus()
    assert page.locator("input:focus + span").evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    page.keyboard.press("Space")
    rows = page.locator("#leaderboard tbody tr:visible")
    assert set(rows.evaluate_all("rows => rows.map(row => row.dataset.track)")) == {"nano"}
    assert page.url.endswith("#nano")
    page.get_by_label("limited", exact=True).check(force=True)
    page.get_by_text(f"0 filed here, {PUBLISHED['limited']} published", exact=False).wait_for()
    page.get_by_label("published elsewhere").uncheck()
    assert column(page, "loss") == []
    page.go_back()
    page.get_by_text("11 filed here, 0 published", exact=False).wait_for()
    linked = open_page("index.html#tiny")
    assert len(column(linked, "loss")) == PUBLISHED["tiny"]

@browsers
def test_without_a_script_the_leaderboard_and_the_entries_can_be_read(open_page):
    page = open_page("index.html", java_script_enabled=False)
    assert len(column(page, "loss")) > 60 and not page.locator(".filters").is_visible()
    page.get_by_role("link", name="the nano preset").click()
    assert "z = 76.6" in page.inner_text("main")

@browsers
def test_two_entries_are_compared_as_the_leaderboard_would(open_page):
    page = open_page("compare.html#nano-09,nano-08")
    new, old = (website.history("nano")[number - 1] for number in (9, 8))
    gain, se = stats.paired_gain(new.split("val"), old.split("val"))
    page.wait_for_selector("#scatter canvas")
    assert f"A gains +{gain:.4f} ± {1.96 * se:.4f}" in page.inner_text("#verdict")
    assert "epochs" in page.inner_text("#differences") and page.locator("#moved tbody tr").count() == 10
    counted = """() => {
      const c = document.querySelector("#curve canvas"), style = getComputedStyle(document.documentElement);
      const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
      return ["--accent", "--ink"].map((name) => {
        const [r, g, b] = style.getPropertyValue(name).match(/[0-9a-f]{2}/g).map((hex) => parseInt(hex, 16));
        let n = 0;
        for (let i = 0; i < d.length; i += 4)
          n += d[i + 3] > 250 && Math.hypot(d[i] - r, d[i + 1] - g, d[i + 2] - b) < 20;
        return n;
      });
    }"""
    assert min(page.evaluate(counted)) > 300  # pixels of A's colour and of B's

    page.focus("#scatter .canvas")
    page.keyboard.press("ArrowRight")
    said = page.inner_text("#scatter output")
    tokens = new.split("val").tokens
    moved = [(one.split("val").loss.mean(0) / np.maximum(tokens, 1)) for one in (old, new)]
    best = int(np.argmax(moved[0] - moved[1]))
    assert said.startswith(f"Document {best}, {tokens[best]} tokens") and re.search(r"“\w.* …”", said)
    box = page.locator("#scatter .u-over").bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + box["height"] - 5)  # the corner of the easiest document
    easiest = int(np.nanargmin(np.where(tokens > 0, moved[1], np.nan)))
    assert page.inner_text("#scatter output").startswith(f"Document {easiest},")

    page.focus("#curve .canvas")
    page.keyboard.press("End")
    assert "step 853," in page.inner_text("#curve output")
    page.get_by_label("minutes of training").check()
    page.wait_for_selector("#curve .canvas[aria-label*='against minutes']")

    page.get_by_role("button", name="Swap A and B").click()
    page.wait_for_function("document.querySelector('#verdict').textContent.includes('A gains −0.4510')")
    page.get_by_label("A", exact=True).select_option("nano_unlimited-02")
    page.wait_for_function("location.hash === '#nano_unlimited-02,nano-09'")
    page.wait_for_selector("#curve .legend >> text=the members so far")

@browsers
def test_an_entry_that_means_harm_is_inert(open_page):
    page = open_page("index.html")
    assert page.get_by_role("link", name=ATTACK).get_attribute("href") == "nano-99.html"
    page.get_by_role("link", name=ATTACK).click()
    page.wait_for_selector("#curve canvas")
    assert page.inner_text("h1") == ATTACK and ATTACK in page.inner_text(".diff")
    assert page.locator("main :is(script, img, iframe, b)").count() == 0
    assert page.locator(".prose a").evaluate_all("links => links.map(l => l.href)") == [
        "https://evil.example/x.png", "https://example.org/"]
    assert page.locator(".prose strong").inner_text() == "bold"
    assert "500 steps" in page.inner_text("#curve figcaption")  # of its metrics, not of its log
    page.goto(page.url.replace("nano-99.html", "compare.html#nano-99,nano-09"))
    page.wait_for_selector("#scatter canvas")
    assert ATTACK in page.inner_text("#differences")
    assert page.locator("main :is(script, img, iframe, b)").count() == 0
    for address in ("compare.html#../x,nano-09", "compare.html#<img src=x onerror=hit=1>",
                    "index.html#%22<b>"):
        page = open_page(address)
        page.wait_for_load_state()
        assert page.evaluate("typeof hit") == "undefined"

@browsers
def test_the_policy_stops_what_the_escaping_would_miss(open_page):
    page = open_page("nano-99.html")
    page.wait_for_selector("#curve canvas")
    injected = "<p onclick=hit=1 id=p>p</p><img src=x onerror=hit=1>"
    page.evaluate("html => document.querySelector('main').innerHTML = html", injected)
    page.evaluate("document.body.append(document.createElement('script'))")
    page.evaluate("document.querySelector('body > script').textContent = 'hit=1'")
    page.click("#p")
    assert page.evaluate("typeof hit") == "undefined"
    assert any("Content Security Policy" in text for text in open_page.complaints)
    open_page.complaints.clear()
