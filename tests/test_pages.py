"""What the pages show is run: their Python as it stands, but for a smaller training, and their commands' options."""

import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import typer

from tiglon import cli, recipes

DOCS = Path(__file__).parents[1] / "docs"
SMALL = {"train.epochs": "1", "train.evaluations": "1", "unit.heads": "1", "network.hidden": "8"}


def snippets(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def run(code):
    exec(compile(code, "page", "exec"), {})


@pytest.mark.parametrize("page", ["crossing.md", "gates.md", "lifelong.md"])
def test_crosses_and_gates(page, tmp_path, monkeypatch, capsys):
    real = recipes.train_ranker
    monkeypatch.setattr(recipes, "train_ranker", lambda *given: real(*given, changes=SMALL))
    monkeypatch.chdir(tmp_path)
    for code in snippets(page):
        run(code)
    assert capsys.readouterr().out


def test_language_models(endpoint, bundle_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundle_path, "runs/first")
    pl.DataFrame({"item_id": [1], "title": ["milk"]}).write_parquet("items.parquet")
    knowledge, pointwise = (
        code.replace("http://localhost:8080/v1", endpoint.url) for code in snippets("language_models.md")
    )
    endpoint.say = lambda body: "White."
    run(knowledge)
    assert "White." in capsys.readouterr().out

    def yes(body):
        chance = 1 / (1 + len(body["messages"][0]["content"]))
        tokens = [{"token": "Yes", "logprob": np.log(chance)}, {"token": "No", "logprob": np.log(1 - chance)}]
        return {"choices": [{"logprobs": {"content": [{"top_logprobs": tokens}]}}]}

    endpoint.say = yes
    run(pointwise)
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize(
    "page", ["crossing.md", "gates.md", "language_models.md", "lifelong.md", "multitask.md"]
)
def test_commands_have_the_options_that_pages_give_them(page):
    known = typer.main.get_command(cli.app).commands
    lines = re.findall(r"^    tiglon (\w+)(.*(?:\n {5,}.*)*)", (DOCS / page).read_text("utf-8"), re.MULTILINE)
    assert lines
    for command, rest in lines:
        options = {option for parameter in known[command].params for option in parameter.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options, (command, rest)
