"""report.html: a whole page that holds all there is, needs nothing else, and leads to each run."""

import base64
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from mltools.figures import Figure
from mltools.report import write_html
from mltools.results import RunFolder
from mltools.tables import Row, Table

SETTINGS = {
    "experiment": {"name": "x", "network": {"hidden": [8, 8], "dropout": 0.0}, "prealigned": False},
    "dataset": "tiny",
    "epochs": 3,
    "batch_size": 8,
    "feedback_placement": "every-layer",
}
HOSTILE = "<b>&\"'x"


class Page(HTMLParser):
    """Tables as lists of lines of cells, links as text to address, images; tags must match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.images, self.titles = [], [], {}, [], []
        self.captions, self.tables = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "a":
            self.address = attributes["href"]
        elif tag == "img":
            self.images.append(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += text
        if "a" in self.open:
            self.links[self.address] = text
        if "title" in self.open:
            self.titles.append(text)
        if self.open and self.open[-1] in ("caption", "figcaption"):
            self.captions.append(text)

    def table(self, caption):
        captions = [text for text in self.captions if text != "A figure's caption"]
        return self.tables[captions.index(caption)]


def run(path, epochs, settings=None, environment=None, seconds=1.5, diverged=False, log=True):
    folder = RunFolder(path)
    environment = {"torch": "2", "device": "cpu"} if environment is None else environment
    seed = int(path.name.split("-")[1])
    folder.start({**SETTINGS, **(settings or {}), "seed": seed}, environment)
    folder.write_metrics(
        [
            {
                "epoch": epoch,
                "train_loss": None if diverged and epoch == epochs else 1.25,
                "train_accuracy": 50 + epoch / 8,
                "test_loss": 1.5,
                "test_accuracy": 40 + epoch / 8,
                "seconds": seconds,
            }
            for epoch in range(1, epochs + 1)
        ]
    )
    if log:
        folder.log("a line")
    return folder


@pytest.fixture
def page(tmp_path):
    """A page with everything on it: its folder and what it parses to."""
    folder = tmp_path / "results"
    other = {**SETTINGS["experiment"], "network": {"hidden": [4], "dropout": 0.0}}
    runs = {
        "fc": [
            run(folder / "fc/seed-0", 3),
            run(folder / "fc/seed-1", 2, diverged=True),
            run(folder / "fc/seed-2", 1, environment={"torch": "3", "device": "cpu"}),
            RunFolder(folder / "fc/seed-3"),
        ],
        "100% a#b": [
            run(
                folder / "100% a#b/seed-0", 3, settings={"experiment": other},
                environment={"retrieved": True}, seconds=None, log=False,
            ),
            run(tmp_path / "elsewhere/seed-1", 3, settings={"experiment": other}),
        ],
    }  # fmt: skip
    rows = [
        Row("fc", (41.0, 0.5), (51.0, None), {"act1": (0.25, 0.125)}, "fc/seed-0", 2, "1 diverged"),
        Row(HOSTILE, (40.0, None), (50.0, None), seeds=1),
    ]
    tables = [Table(f"One {HOSTILE}", rows, ["act1"]), Table("Two", rows[:1], [])]
    png = tmp_path / "figure.png"
    png.write_bytes(b"\x89PNG not really")
    figures = [Figure(png, f"alt {HOSTILE}", "A figure's caption", 3.4)]
    write_html(folder, f"Title {HOSTILE}", tables, figures, runs)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return folder, tables, text, Page(text)


def test_every_cell_of_the_tables_is_there_as_it_is(page):
    _, tables, text, parsed = page
    for table in tables:
        assert parsed.table(table.title) == table.cells()
    assert HOSTILE not in text and parsed.titles == [f"Title {HOSTILE}"]
    assert text.startswith("<!DOCTYPE html>")


def test_figures_are_in_the_page_with_their_words(page):
    folder, _, _, parsed = page
    (image,) = parsed.images
    kind, data = image["src"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == (folder.parent / "figure.png").read_bytes()
    assert image["alt"] == f"alt {HOSTILE}" and "A figure's caption" in parsed.captions


def test_the_page_needs_nothing_else(page):
    _, _, text, parsed = page
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    assert "url(" not in text and "@import" not in text and "http" not in text
    sources = [attributes["src"] for _, attributes in parsed.tags if "src" in attributes]
    assert all(source.startswith("data:") for source in sources)


def test_every_run_is_listed_with_its_state_and_its_last_numbers(page):
    header, *lines = page[3].table("Every run, after its last epoch so far")
    assert header[:4] == ["run", "state", "test accuracy (%)", "train accuracy (%)"]
    assert header[4:] == ["test loss", "train loss", "seconds", "log"]
    assert lines == [
        ["fc/seed-0", "finished", "40.38", "50.38", "1.5000", "1.2500", "4.5", "log"],
        ["fc/seed-1", "diverged in epoch 2", "40.25", "50.25", "1.5000", "", "3.0", "log"],
        ["fc/seed-2", "epoch 1 of 3", "40.12", "50.12", "1.5000", "1.2500", "1.5", "log"],
        ["fc/seed-3", "not run", "", "", "", "", "", ""],
        ["100% a#b/seed-0", "finished, out of a log", "40.38", "50.38", "1.5000", "1.2500", "", ""],
        ["100% a#b/seed-1", "finished", "40.38", "50.38", "1.5000", "1.2500", "4.5", ""],
    ]


def test_links_lead_to_what_is_below_the_page_and_nowhere_else(page):
    folder, _, _, parsed = page
    runs = {text: address for address, text in parsed.links.items() if text != "log"}
    assert list(runs) == ["fc/seed-0", "fc/seed-1", "fc/seed-2", "100% a#b/seed-0"]
    for text, address in runs.items():
        assert (folder / unquote(address)).samefile(folder / text) and "#" not in address
    logs = [address for address, text in parsed.links.items() if text == "log"]
    assert logs == [f"fc/seed-{seed}/log.txt" for seed in range(3)]
    assert all((folder / address).is_file() for address in logs)


def test_settings_are_told_once_where_all_rows_have_them_in_common(page):
    common = dict(page[3].table("Common to all rows"))
    assert common == {
        "setting": "value", "dropout": "0.0", "prealigned": "no", "dataset": "tiny", "epochs": "3",
        "batch size": "8", "feedback placement": "every-layer",
    }  # fmt: skip
    assert page[3].table("Different between rows") == [
        ["experiment", "hidden"], ["fc", "8, 8"], ["100% a#b", "4"]
    ]  # fmt: skip


def test_versions_that_differ_say_how_many_runs_have_them(page):
    assert page[3].table("Versions and devices") == [
        ["of the runs", "value"],
        ["torch", "2 (3 runs), 3 (1 run)"],
        ["device", "cpu (4 runs)"],
        ["retrieved", "yes (1 run)"],
    ]


def test_results_without_versions_or_without_any_run_make_a_page(tmp_path):
    for runs in ({"fc": [run(tmp_path / "fc/seed-0", 3, environment={})]}, {"fc": []}):
        write_html(tmp_path, "t", [Table("none", [Row("fc", note="1 not finished")], [])], [], runs)
        parsed = Page((tmp_path / "report.html").read_text())
        assert "Versions and devices" not in parsed.captions and not parsed.images
        assert len(parsed.table("Every run, after its last epoch so far")) == 1 + len(runs["fc"])
