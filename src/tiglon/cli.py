"""The command line: argument parsing only. Every command is a call that you could write.

Exit status 0, 1 where something is wrong with what was given (one message on stderr), 2 for wrong usage.
Facts and progress go to stderr, answers to stdout.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from rich.console import Console

from tiglon.errors import ConfigError, TiglonError, did_you_mean

app = typer.Typer(
    help="From a click log to recommendations.", no_args_is_help=True, pretty_exceptions_enable=False
)
data = typer.Typer(help="Public data sets, and verdicts on your own tables.", no_args_is_help=True)
ids = typer.Typer(help="The semantic IDs of a bundle.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(ids, name="ids")

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="Folder that `tiglon train` wrote.")]
SourcePath = Annotated[
    Path,
    typer.Argument(metavar="BUNDLE", help="Folder that `tiglon train` wrote, or a home of published ones."),
]
InteractionsPath = Annotated[
    Path, typer.Option("--interactions", help="user_id, item_id, timestamp, …: .parquet, .csv or .jsonl.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
K = Annotated[int, typer.Option("--k", help="How many items.")]
Reranker = Annotated[
    str | None,
    typer.Option(
        "--reranker",
        metavar="URL",
        help="OpenAI-compatible endpoint whose model orders the first 20; key: $TIGLON_LLM_KEY.",
    ),
]
RerankerModel = Annotated[
    str | None, typer.Option("--reranker-model", metavar="NAME", help="As the endpoint names it.")
]
RerankerSeconds = Annotated[float, typer.Option(help="That an answer waits for the model at most.")]
RerankerText = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help='What it reads of an item: title, or "{title} ({brand})".'),
]

# Modules that load torch are imported where they are needed, so that --help answers at once.


def main() -> None:
    """`tiglon`: errors of Tiglon are one clean message, and half of the cores are left to others.

    The networks are small: a second thread gains a third on an idle machine, and on a busy one, where each
    parallel region waits for the scheduler, costs nine tenths. OMP_NUM_THREADS decides otherwise.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    try:
        app()
    except TiglonError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:
            print("Stopped. A training goes on when the same command is given again.", file=sys.stderr)
        raise


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the bundle goes.")] = Path("demo/complete-journey"),
    minutes: Annotated[float, typer.Option(help="Training time.")] = 5.0,
) -> None:
    """The whole funnel on real data, then how to go on. At most ten minutes on two cores."""
    from tiglon import demo
    from tiglon.terminal import Terminal

    _require_minutes(minutes)
    demo.run(out, minutes, Terminal(), _stdout())


@app.command()
def doctor() -> None:
    """Is this machine fit, what is slow, what is missing."""
    from tiglon.doctor import examine

    _verdicts(examine())


@data.command("get")
def data_get(
    name: Annotated[str | None, typer.Argument(help="A public set; without one they are listed.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; by default the name.")] = None,
) -> None:
    """Fetch a public set, showing size, terms and checksum, and write it as two tables."""
    from tiglon.data.sources import SOURCES, fetch

    if name is None:
        for known, remote in SOURCES.items():
            sizes = ", ".join(file.size or "size not stated" for file in remote.files)
            print(f"{known:<24}{sizes or 'nothing to fetch'}")
        return
    folder = out or Path(name)
    raw = fetch(name, folder / "raw", echo=_say)
    SOURCES[name].save(raw, folder / "tables")
    tables = quote(str(folder / "tables"))
    _say(
        f"Written. Go on: tiglon train --interactions {tables}/interactions.parquet "
        f"--items {tables}/items.parquet --out {name}-bundle"
    )


@data.command("inspect")
def data_inspect(
    interactions: Annotated[Path, typer.Argument(metavar="INTERACTIONS", help="The log.")],
    items: Annotated[Path | None, typer.Option(help="The item table.")] = None,
) -> None:
    """What is in your tables: a verdict a line."""
    from tiglon.data.inspect import inspect

    _verdicts(inspect(interactions, items))


@data.command("validate")
def data_validate(
    interactions: Annotated[Path, typer.Argument(metavar="INTERACTIONS", help="The log.")],
    items: Annotated[Path | None, typer.Option(help="The item table.")] = None,
) -> None:
    """The same, with exit status 1 where a verdict is fatal."""
    from tiglon.data.inspect import inspect, is_valid

    verdicts = inspect(interactions, items)
    _verdicts([v for v in verdicts if v.level != "ok"])
    if not is_valid(verdicts):
        raise typer.Exit(1)
    print("valid")


@app.command()
def train(
    interactions: InteractionsPath,
    items: Annotated[Path, typer.Option(help="item_id and any columns of text.")],
    out: Annotated[Path | None, typer.Option(help="Where the bundle, or the ranker, goes.")] = None,
    into: Annotated[
        Path | None, typer.Option(help="In place of --out: a bundle or a home that gets the ranker.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="A retriever: tiger, tiger_paper. A ranker: twin, din, sim_soft, …")
    ] = "tiger",
    minutes: Annotated[float | None, typer.Option(help="Stop training, annealed, after so long.")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle at --out.")] = False,
) -> None:
    """Two tables to a bundle: IDs, TIGER and other networks, baselines, evaluation; or to a ranker, by a ranker's recipe.

    A ranker stands alone (--out) or orders what a bundle finds (--into). Killed, it goes on when given again.
    """
    from tiglon import recipes
    from tiglon.terminal import Terminal, metrics_table

    _require_minutes(minutes)
    title = "Test: the last moment of each user"
    if into is not None:
        if out is not None or recipe not in recipes.RANKING_RECIPES:
            raise ConfigError(
                f"--into with {'--out' if out is not None else f'the recipe {recipe}'}",
                rule="--into names the bundle that a ranker joins",
                fix="Give --out alone, or a ranker's recipe, such as --recipe twin",
            )
        from tiglon.evaluation.ranking import table

        bundle, found = recipes.add_ranker(
            interactions,
            items,
            into,
            recipes.RANKING_RECIPES[recipe],
            minutes=minutes,
            changes=_changes(change or []),
            reporter=Terminal(),
        )
        _stdout().print(table(found, title=title))
        _stdout().print(metrics_table(bundle.metrics, title))
        _say(f"{into}, version {bundle.version}. Go on: tiglon serve {quote(str(into))}")
        return
    if out is None:
        raise typer.BadParameter("give --out, or --into for a ranker")
    if recipe in recipes.RANKING_RECIPES:
        from tiglon.evaluation.ranking import table

        ranker, found = recipes.train_ranker(
            interactions,
            items,
            out,
            recipes.RANKING_RECIPES[recipe],
            minutes=minutes,
            changes=_changes(change or []),
            overwrite=overwrite,
            reporter=Terminal(),
        )
        _stdout().print(table(found, title=title))
        _say(f"{out}, version {ranker.version}. Go on: tiglon evaluate {quote(str(out))}")
        return
    known = [*recipes.RECIPES, *recipes.RANKING_RECIPES]
    if recipe not in recipes.RECIPES:
        raise ConfigError(f"no recipe named '{recipe}'", fix=did_you_mean(recipe, known))
    bundle = recipes.train(
        interactions,
        items,
        out,
        recipes.RECIPES[recipe],
        minutes=minutes,
        changes=_changes(change or []),
        overwrite=overwrite,
        reporter=Terminal(),
    )
    _stdout().print(metrics_table(bundle.metrics, title))
    user = str(bundle.histories.users.raw[0])
    named = f"--user{'=' if user.startswith('-') else ' '}{quote(user)}"
    _say(f"{out}, version {bundle.version}. Go on: tiglon recommend {quote(str(out))} {named}")


@app.command()
def evaluate(
    bundle: SourcePath,
    split: Annotated[str, typer.Option(help="test or validation.")] = "test",
    exclude_seen: Annotated[
        bool | None, typer.Option("--exclude-seen/--include-seen", help="Default: as the bundle was made.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a bundle's retrievers, or a ranker, on the users that it stores."""
    from tiglon.evaluation.protocol import to_json
    from tiglon.ranking.model import is_ranker
    from tiglon.serving.bundle import Bundle
    from tiglon.serving.publish import bundle_folder
    from tiglon.terminal import Terminal, metrics_table

    if split not in ("test", "validation"):
        raise ConfigError(f"split '{split}'", rule="It is test or validation")
    if is_ranker(bundle):
        if exclude_seen is not None:
            raise ConfigError(
                f"{'--exclude-seen' if exclude_seen else '--include-seen'} with {bundle}, which is a ranker",
                rule="A ranker orders the candidates that it is given, seen or not",
                fix="Leave it out",
            )
        _evaluate_ranker(bundle, split, as_json)
        return
    terminal = Terminal()
    rows = Bundle.load(bundle_folder(bundle)).evaluate(
        split,  # type: ignore[arg-type]
        exclude_seen=exclude_seen,
        progress=lambda name, done, users: terminal.share(f"testing {name}", done / users),
    )
    found = to_json(rows, split)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        mode = "hidden" if rows[0].exclude_seen else "shown"
        _stdout().print(metrics_table(found, f"{split.capitalize()}, seen items {mode}"))


@app.command()
def probe(
    rankers: Annotated[
        list[Path], typer.Argument(metavar="RANKER …", help="Rankers, or bundles or homes that have one.")
    ],
    feature: Annotated[
        list[str] | None, typer.Option("--feature", help="Of the user or the context; default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """How much a ranker listens to who asks: what turning over a feature, such as "new user", moves.

    Before and after: name a ranker trained with gate_by alone, then one with a gate.
    """
    from tiglon.ranking.probe import probe, stored_requests
    from tiglon.recipes import load_ranker
    from tiglon.terminal import probe_table

    found = []
    for path in rankers:
        ranker = load_ranker(path)
        found += [(str(path), moved) for moved in probe(ranker, stored_requests(ranker), feature)]
    if as_json:
        print(json.dumps({"rows": [{"ranker": path, **moved._asdict()} for path, moved in found]}, indent=1))
    else:
        _stdout().print(probe_table(found))


@app.command()
def cluster(
    ranker: Annotated[
        Path, typer.Argument(metavar="RANKER", help="That `train --recipe twin_v2 --out` wrote.")
    ],
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="A number that divides a life, such as completion.")
    ] = None,
    groups: Annotated[int, typer.Option(help="Into so many parts.")] = 5,
    until: Annotated[
        int | None, typer.Option(metavar="TIME", help="Behaviours before; default: all.")
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="By what the search compares.")] = False,
    threads: Annotated[int, typer.Option(help="Users at once.")] = 1,
) -> None:
    """Put virtual items in the place of long lives (TWIN V2, offline). Killed, it goes on when given again."""
    from tiglon.recipes import cluster_ranker
    from tiglon.terminal import Terminal

    cluster_ranker(ranker, by, groups, until=until, by_keys=keys, threads=threads, reporter=Terminal())
    _say(f"{ranker} answers on clustered lives from now on")


@app.command()
def recommend(
    bundle: SourcePath,
    user: Annotated[str | None, typer.Option(help="A user id of the log.")] = None,
    history: Annotated[
        str | None,
        typer.Option(
            help="Item ids instead, oldest first: a,b,c. Blanks around them are taken off; ids with a comma need "
            'Python or HTTP. "": nothing yet.'
        ),
    ] = None,
    k: K = 10,
    exclude_seen: Annotated[
        bool | None, typer.Option("--exclude-seen/--include-seen", help="Default: as the bundle was made.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say who found each item.")] = False,
    reranker: Reranker = None,
    reranker_model: RerankerModel = None,
    reranker_seconds: RerankerSeconds = 2.0,
    reranker_text: RerankerText = None,
    as_json: Json = False,
) -> None:
    """The k best items for a user, or for a history. A user without a history gets what is popular."""
    from tiglon.serving.bundle import Bundle, matching_id
    from tiglon.serving.engine import Engine
    from tiglon.serving.messages import MOST_BATCH, MOST_ITEMS, RecommendRequest
    from tiglon.serving.publish import bundle_folder
    from tiglon.terminal import recommendation_table

    if (user is None) == (history is None):
        raise typer.BadParameter("give either --user or --history")
    if not 1 <= k <= MOST_ITEMS:
        raise ConfigError(f"k of {k}", rule=f"k is a whole number of 1 … {MOST_ITEMS}")
    asks = _reranking(reranker, reranker_model, reranker_seconds, reranker_text)
    loaded = Bundle.load(bundle_folder(bundle))
    who = None if user is None else matching_id(loaded.histories.users, user)
    given = None
    if history is not None:
        parts = [part.strip() for part in history.split(",")] if history.strip() else []
        if len(parts) > MOST_BATCH:
            raise ConfigError(f"a history of {len(parts):,} items", rule=f"It has at most {MOST_BATCH:,}")
        given = [matching_id(loaded.items.vocabulary, part) for part in parts]
        unknown = [i for i, d in zip(given, loaded.items.vocabulary.encode(given), strict=True) if d < 0]
        if unknown:
            _say(f"not in the catalogue, and skipped: {', '.join(map(str, unknown))}")
            given = [i for i in given if i not in unknown]
    engine = Engine(
        loaded,
        reranker=None if asks is None else asks.reranker(),
        reranker_text=None if asks is None else asks.text,
    )
    answer = engine.recommend(
        RecommendRequest(user_id=who, history=given, k=k, exclude_seen=exclude_seen, explain=explain)
    )
    for line in answer.degraded:
        _say(line)
    if as_json:
        print(json.dumps({"user_id": who, **answer.model_dump(exclude_none=True)}, ensure_ascii=False))
        return
    _stdout().print(recommendation_table(loaded, answer.items))
    for item in answer.items:
        if item.reasons is not None:
            found = ", ".join(f"{s.name} (place {s.rank})" for s in item.reasons.sources)
            print(f"{item.item_id}: {found or 'popular'}")


@app.command()
def describe(
    items: Annotated[Path, typer.Argument(metavar="ITEMS", help="item_id and any columns of text.")],
    endpoint: Annotated[
        str, typer.Option(metavar="URL", help="OpenAI-compatible, up to the version; key: $TIGLON_LLM_KEY.")
    ],
    model: Annotated[str, typer.Option(metavar="NAME", help="As the endpoint names it.")],
    out: Annotated[Path, typer.Option(metavar="FILE.parquet", help="The table with the new column.")],
    column: Annotated[str, typer.Option(help="Its name.")] = "knowledge",
    cache: Annotated[
        Path | None, typer.Option(help="Folder of answers, each paid for once; default: beside FILE.")
    ] = None,
    prices: Annotated[
        tuple[float, float], typer.Option(help="Of a million tokens, of prompts and of answers.")
    ] = (0.0, 0.0),
) -> None:
    """What a language model knows of items, as a column of text. Killed, it goes on when given again."""
    from tiglon.data.events import read_items
    from tiglon.llm.cache import Cached
    from tiglon.llm.client import Endpoint, Usage, key_of_environment
    from tiglon.llm.knowledge import require_free, with_knowledge
    from tiglon.terminal import Terminal

    if out.suffix != ".parquet":
        raise ConfigError(f"--out {out}", rule="The table is written as .parquet")
    asked = Endpoint(endpoint, model, key=key_of_environment(), usage=Usage(*prices))
    terminal, given = Terminal(), read_items(items)
    require_free(out, given, column)
    known = with_knowledge(
        given,
        Cached(asked, cache or out.with_name(f"{out.stem}-answers")),
        column=column,
        report=lambda share: terminal.share("asking", share),
    )
    known.save(out)
    usage = known.usage
    _say(
        f"{usage.calls:,} calls, {usage.cached:,} answers remembered, {usage.prompt_tokens:,} tokens asked and "
        f"{usage.completion_tokens:,} answered in {usage.seconds:,.0f} s, cost {usage.cost:,.4f}"
    )
    if known.failed:
        _say(
            f"{known.failed:,} items have none; the same command asks for those with words again, and for no other"
        )
    _say(f"{out} has the column '{column}'")


@app.command()
def serve(
    source: Annotated[
        Path,
        typer.Argument(metavar="BUNDLE", help="A bundle, or a home of published ones (docs/serving.md)."),
    ],
    host: Annotated[str, typer.Option(help="Beyond this machine only with --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(help="Processes.")] = 1,
    threads: Annotated[int, typer.Option(help="Requests that a process answers at once.")] = 2,
    waiting: Annotated[int, typer.Option(help="Requests that may wait; others get 503.")] = 64,
    keys: Annotated[Path | None, typer.Option(help="Who may ask: a file of `tiglon key`.")] = None,
    state: Annotated[
        str | None, typer.Option(help="Folder of what users do, or redis://…; default: beside the bundle.")
    ] = None,
    budget_ms: Annotated[int | None, typer.Option(help="Time of a request that names none.")] = None,
    reranker: Reranker = None,
    reranker_model: RerankerModel = None,
    reranker_seconds: RerankerSeconds = 2.0,
    reranker_text: RerankerText = None,
) -> None:
    """Answer over HTTP, with a console at /console."""
    from tiglon.serving.bundle import require_bundle
    from tiglon.serving.desk import Settings
    from tiglon.serving.publish import bundle_folder
    from tiglon.serving.server import serve as run

    require_bundle(bundle_folder(source))
    asks = _reranking(reranker, reranker_model, reranker_seconds, reranker_text)
    settings = Settings(keys=keys, threads=threads, waiting=waiting, budget_ms=budget_ms, reranking=asks)
    run(source, host, port, workers=workers, state=state, settings=settings)


HomePath = Annotated[Path, typer.Argument(metavar="HOME", help="Folder of published bundles.")]


@app.command()
def publish(bundle: SourcePath, home: HomePath) -> None:
    """Let a bundle answer: a copy of it in a home, whose servers take it up by themselves."""
    from tiglon.serving.publish import publish as run

    _say(f"{home} answers with version {run(bundle, home).name}")


@app.command()
def rollback(home: HomePath) -> None:
    """Let the bundle before the current one answer again."""
    from tiglon.serving.publish import rollback as run

    _say(f"{home} answers with version {run(home).name}")


@app.command()
def prune(
    home: HomePath,
    keep: Annotated[int, typer.Option(help="The current bundle and so many less one before it stay.")] = 3,
) -> None:
    """Delete old bundles of a home; print their versions."""
    from tiglon.serving.publish import prune as run

    for version in run(home, keep):
        print(version)


@app.command()
def key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="For `tiglon serve --keys`; made if missing.")],
    name: Annotated[str, typer.Option(help="Whose key; it stands in the log.")],
    write: Annotated[bool, typer.Option("--write", help="It may also change events, items, users.")] = False,
    per_minute: Annotated[
        int | None, typer.Option(help="Requests that it may send; default: no limit.")
    ] = None,
) -> None:
    """Make an API key and print it, this once. The file keeps its hash; delete an entry to withdraw a key."""
    from tiglon.serving.security import add_key

    print(add_key(file, name, frozenset({"read", "write"} if write else {"read"}), per_minute))
    _say(f"{file} knows it as '{name}'. Send it as: Authorization: Bearer KEY")


@ids.command("report")
def ids_report(
    bundle: SourcePath,
    plot: Annotated[Path | None, typer.Option(help="Also draw it: FILE.png.")] = None,
) -> None:
    """How good the semantic IDs are: usage, entropy, collisions, what a shared prefix means."""
    from tiglon.serving.bundle import Bundle
    from tiglon.serving.publish import bundle_folder

    report = Bundle.load(bundle_folder(bundle)).id_report()
    if plot is not None:
        report.plot(plot)
    print(report.table(), end="")
    if plot is not None:
        _say(f"drawn: {plot}")


@ids.command("update")
def ids_update(
    bundle: BundlePath,
    items: Annotated[Path, typer.Option(help="A table with the new items.")],
) -> None:
    """Give new items IDs by the frozen tokenizer; old IDs and the network stay as they are."""
    from tiglon.data.events import read_table
    from tiglon.serving.bundle import Bundle, revise

    given = read_table(items)
    old, new = revise(bundle, lambda one: one.add_items(items))
    added = len(new.items) - len(old.items)
    if known := given.height - added:
        _say(f"{known:,} of the items are known, and were left as they are")
    if ignored := [name for name in given.columns if name not in old.items.table.columns]:
        _say(f"ignored, as the bundle's items have no such columns: {', '.join(ignored)}")
    if not added:
        _say("no item of the table is new; the bundle stays as it is")
        return
    _say(f"{added:,} new items; version {old.version} became {Bundle.load(bundle).version}")


def _evaluate_ranker(folder: Path, split: str, as_json: bool) -> None:
    from tiglon.evaluation.ranking import table, to_json
    from tiglon.ranking.model import LifelongRanker

    ranker = LifelongRanker.load(folder)
    found = ranker.evaluate(ranker.requests(folder, split))
    if as_json:
        print(json.dumps(to_json(found, split), indent=1))
    else:
        _stdout().print(table(found, title=f"{split.capitalize()}, {folder}"))


def _reranking(url: str | None, model: str | None, seconds: float, text: str | None) -> Any:
    """A `serving.reranking.Reranking`, or None without a URL."""
    from tiglon.serving.reranking import Reranking

    if url is None and model is None and text is None:
        return None
    if url is None or model is None:
        raise typer.BadParameter("--reranker and --reranker-model go together")
    return Reranking(url, model, seconds, text)


def _changes(given: list[str]) -> dict[str, str]:
    for change in given:
        if "=" not in change:
            raise typer.BadParameter(f"--set {change}: write KEY=VALUE, such as train.lr=0.002")
    return {key: value for key, _, value in (change.partition("=") for change in given)}


def _require_minutes(minutes: float | None) -> None:
    if minutes is not None and not 0 < minutes < math.inf:
        raise ConfigError(f"--minutes {minutes:g}", rule="Training takes some minutes, more than 0")


def _stdout() -> Console:
    """Wide where no window sets the width."""
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
    return Console(highlight=False, width=wide)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _verdicts(verdicts: list[Any]) -> None:
    for verdict in verdicts:
        print(verdict)


if __name__ == "__main__":
    main()
