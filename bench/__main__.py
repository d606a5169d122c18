"""Runs the contenders in rounds, each alone on the machine, and writes results and page: `make bench`.

Everything once, the closed loop at 1 and 32 clients in five rounds for ours and the three fastest others: about two
hours, of two CPUs with nothing else to do. Every measurement is appended to build/bench/results.jsonl at once, and the
same command goes on where it was stopped, as long as the commit and the machine are the same.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import cases, contenders, report, results
from bench.contenders import HOME, Contender
from bench.prepare import identity, photographs, prepare
from bench.visit import Visit, pay

IN_QUICK = ("limit", "ours", "Flask, ONNX Runtime", "LitServe, ONNX Runtime")
FASTEST = 3
WARM_UP, QUICK_WARM_UP = 12, 6  # seconds of 32 clients; a JVM takes a thousand calls to become fast
ROUNDS = 5


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ours, the limit and two contenders; five minutes")
    parser.add_argument("--data", type=Path, help="a folder of photographs; drawings where there is none")
    parser.add_argument("--only", help="contenders, separated by ';': " + "; ".join(c.name for c in contenders.ALL))
    parser.add_argument("--rounds", type=int, help="of the closed loop at 1 and 32 clients for those in --only")
    parser.add_argument("--results", type=Path, default=HOME / "results.jsonl", help="records are appended to it")
    args = parser.parse_args(arguments)
    names = tuple(name.strip() for name in args.only.split(";")) if args.only else IN_QUICK if args.quick else ()
    chosen = choose(names)
    HOME.mkdir(parents=True, exist_ok=True)
    photos = photographs(args.data)
    broken = prepare(chosen)
    book = results.Book(args.results, identity(chosen, photos, args.quick, args.rounds))
    for name, reason in broken.items():
        book.add(name, 0, "start", {"error": reason})
    able = [c for c in chosen if c.name not in broken]
    for visit in plan(able, args.quick, args.rounds, bool(names), book):
        pay(visit, photos, book, warm_up=QUICK_WARM_UP if args.quick else WARM_UP)
        report.write(book, HOME)
    book.finish()
    print(f"\n{report.text(book)}\n\n{HOME / 'report.html'}\n{HOME / 'report.json'}", flush=True)


def choose(names: Sequence[str]) -> list[Contender]:
    """By name; all where none is given. Raises SystemExit naming those there are."""
    known = {contender.name: contender for contender in contenders.ALL}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"bench: there is no contender {unknown[0]!r}: there are {'; '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())


def plan(
    able: Sequence[Contender], quick: bool, rounds: int | None, named: bool, book: results.Book
) -> Iterator[Visit]:
    """Every visit, in the order in which they are paid; made as it goes, since the later rounds are for the fastest."""
    if quick or rounds:
        loads = cases.QUICK if quick else cases.REPEATED
        for number in range(1, (rounds or 3) + 1):
            for contender in shuffled(able, number):
                yield Visit(number, contender, loads)
        return
    for contender in shuffled(able, 1):
        yield Visit(1, contender, cases.EVERY if contender.server else cases.REPEATED)
    best = able if named else fastest(able, book)
    for number in range(2, ROUNDS + 1):
        for contender in shuffled(best, number):
            yield Visit(number, contender, cases.REPEATED)
    for contender in able:
        if contender.name == "ours":
            yield Visit(1, contender, (cases.SOAK,))


def fastest(able: Sequence[Contender], book: results.Book) -> list[Contender]:
    """Ours, the limits, and the others that were fastest at 32 clients in the first round."""
    ours = [c for c in able if c.ours or not c.server]
    speed = {c.name: max(book.values(c.name, cases.MANY.name, "images_per_s")[:1], default=0.0) for c in able}
    others = sorted((c for c in able if c not in ours and not c.full), key=lambda c: -speed[c.name])
    return ours + others[:FASTEST]


def shuffled(able: Sequence[Contender], number: int) -> list[Contender]:
    """Another order each round, the same whenever the run is continued."""
    return random.Random(number).sample(list(able), len(able))


if __name__ == "__main__":
    main()
