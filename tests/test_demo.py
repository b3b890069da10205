"""The demo on a small stand-in for the groceries, and how progress looks without a terminal."""

import io

import polars as pl
import pytest
from rich.console import Console

from tiglon import demo
from tiglon.data.sources import Source
from tiglon.data.synthetic import synthetic
from tiglon.recipes import Reporter, override
from tiglon.terminal import Terminal


class Listener(Reporter):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def shop(monkeypatch, tiny):
    """Baskets of up to five lines; one product that nobody bought, and a few that few did."""
    source = synthetic(50, 60, 40, seed=2, clusters=6).source()
    baskets = source.interactions.with_columns(
        timestamp=pl.col("timestamp").rank("ordinal").over("user_id").cast(pl.Int64) // 6
    )
    products = source.items.rename({"title": "product_type", "category": "department"}).with_columns(
        pl.col("product_type") + " [/x]", manufacturer_id=pl.lit("69")
    )
    unsold = pl.DataFrame({"item_id": [999], "product_type": ["dust"]})
    products = pl.concat([products, unsold], how="diagonal")
    stand_in = Source(baskets, products, "Simulated, as the note says.")
    monkeypatch.setattr(demo, "complete_journey", lambda: stand_in)
    real = demo.recipe
    monkeypatch.setattr(demo, "recipe", lambda events, items: override(real(events, items), tiny))
    return stand_in


def run(out, listener):
    text = io.StringIO()
    bundle = demo.run(out, 1.0, listener, Console(file=text, width=100))
    return bundle, text.getvalue()


def test_the_demo_shows_the_way_and_a_second_one_reuses_it(shop, tmp_path):
    listener = Listener()
    bundle, shown = run(tmp_path / "demo", listener)
    said = "\n".join(listener.lines)
    assert "Simulated, as the note says." in said
    buyers = shop.interactions.group_by("item_id").agg(pl.col("user_id").n_unique())
    kept = buyers.filter(pl.col("user_id") >= demo.HOUSEHOLDS)
    assert f"61 products, {len(buyers)} of them bought; kept: the {len(kept)} that at least 10" in said
    assert len(bundle.items) == len(kept)
    assert bundle.text.template == "{product_type}. {department}"

    assert [name for name in ("popularity", "repeats", "tiger") if name in shown] == [
        "popularity",
        "repeats",
        "tiger",
    ]
    household, basket = demo._household(bundle)
    assert 5 <= len(basket) <= 10
    assert f"Household {household} bought last:" in shown
    for item in basket:
        assert bundle.items.table.filter(pl.col("item_id") == item)["product_type"][0] in shown
    assert f"tiglon recommend {tmp_path / 'demo'} --user {household} --k 10" in shown

    again = Listener()
    second, shown_again = run(tmp_path / "demo", again)
    assert again.lines == [
        f"{tmp_path / 'demo'} is there from an earlier run and is reused; delete it to begin anew"
    ]
    assert second.version == bundle.version
    assert shown_again == shown


def test_without_a_terminal_progress_is_a_line_a_task():
    text = io.StringIO()
    terminal = Terminal(Console(file=text, width=40, highlight=False))
    terminal.say("a fact that is longer than the forty columns of this console")
    for task in ("training", "testing"):
        for done in range(11):
            terminal.share(task, done / 10, "so far")
    assert text.getvalue().splitlines() == [
        "a fact that is longer than the forty columns of this console",
        "training 100% so far",
        "testing 100% so far",
    ]


def test_square_brackets_and_colons_are_letters():
    for terminal in (False, True):
        text = io.StringIO()
        shown = Terminal(Console(file=text, width=120, force_terminal=terminal))
        shown.say('text "{[/title]} :apple:" of [bold] in runs/[/x]')
        shown.share("testing [/a]", 0.5, "[red] so far")
        shown.share("testing [/a]", 1.0, "[red] so far")
        for said in ('text "{[/title]} :apple:" of [bold] in runs/[/x]', "testing [/a]", "[red] so far"):
            assert said in text.getvalue()


def test_on_a_terminal_progress_is_a_bar():
    text = io.StringIO()
    terminal = Terminal(Console(file=text, width=120, force_terminal=True))
    terminal.share("training", 0.5, "so far")
    terminal.share("training", 1.0, "done")
    assert "training" in text.getvalue()
    assert "100%" in text.getvalue()
    assert terminal._bars is None
