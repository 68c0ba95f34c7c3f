"""Cut the miniature's study to the hours that there are, by the speed of this machine, and write it.

    python examples/miniature/plan.py --hours 12 --seeds 3 --output runs/miniature-data/plan.yaml

``--study small.yaml --scale 0.3`` is for a smaller parent. Comparisons are left out in a fixed order (``CUTS``)
until the rest fits. All that is left out can be made later: a plan with more hours is the same study, grown. Every
claim of study.yaml keeps the comparisons that test it. With ``--scale`` all token counts shrink, and with them the
study's name: that is another study.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_prune import screen
from megatron_prune.artifacts import write_bytes
from megatron_prune.data import indexed
from megatron_prune.errors import EXIT_REFUSED, DataError, MegatronPruneError, UsageError
from megatron_prune.study import estimate, outlook, schema, study_file, throughput, validate
from megatron_prune.study.evidence import Ledger
from megatron_prune.study.prunings import Places, learning_samples, prunings

STUDY = Path(__file__).with_name("study.yaml")
Content = dict[str, Any]

OTHERS = ["minitron-depth", "sheared-llama", "random-depth", "random-width", "wanda"]  # they carry no claim
B05, B15, B25, B125, B250 = range(5)  # the places of the budgets in study.yaml, by percent of the parent's tokens
# What is left out, in this order. ``budgets`` are places; ``seeds`` is "not the first".
CUTS: tuple[tuple[str, list[Content]], ...] = (
    ("the methods that carry no claim have one seed", [{"methods": OTHERS, "seeds": "not the first"}]),
    ("they are not compared at equal total tokens", [{"methods": OTHERS, "settings": ["equal-total"]}]),
    (
        "random masks are there for claim (g) alone: at a half, after 0.25 of the parent's tokens",
        [
            {"methods": ["random-masks"], "ratios": [0.625, 0.75, 0.875]},
            {"methods": ["random-masks"], "budgets": [B05, B15, B125, B250]},
            {"methods": ["random-masks"], "settings": ["equal-total"]},
        ],
    ),
    ("2:4 is there for claim (f) alone: at equal training, after 0.25 of the parent's tokens",
     [{"patterns": ["2:4"], "settings": ["equal-total"]}, {"patterns": ["2:4"], "budgets": [B05, B15, B125, B250]}]),
    ("equal total tokens are compared after 0.25 and 2.5 of the parent's tokens",
     [{"settings": ["equal-total"], "budgets": [B05, B15, B125]}]),
    ("sparse models are compared with dense scratch for claim (f) alone",
     [{"against": "dense", "methods": ["sparsegpt", "wanda", "random-masks"], "budgets": [B05, B15, B125, B250]},
      {"against": "dense", "methods": ["sparsegpt", "wanda", "random-masks"], "ratios": [0.625, 0.75, 0.875]}]),
    ("the methods that carry no claim are left out", [{"methods": OTHERS}]),
    ("0.15 and 1.25 of the parent's tokens are left out: a slope has three points", [{"budgets": [B15, B125]}]),
    ("62.5% is left out: a slope has three points", [{"ratios": [0.625]}]),
    ("equal total tokens are compared after 2.5 of the parent's tokens alone",
     [{"settings": ["equal-total"], "budgets": [B25]}]),
)  # fmt: skip
LEAST_SEEDS = 2  # one seed has no interval, and no claim could be tested


def read(*, seeds: int, scale: float = 1.0, rate: float | None = None, study: Path = STUDY) -> Content:
    """A study with so many seeds, its token counts scaled to whole batches, and the rate that was chosen."""
    content = study_file.read(study).content
    content["seeds"] = list(range(1, seeds + 1))
    if rate is not None:
        content["recipe"] = content["recipe"] | {"lr": rate}
    if scale == 1:
        return content
    batch = content["recipe"]["global_batch_size"] * content["data"]["seq_length"]

    def scaled(tokens: int) -> int:
        return max(1, round(tokens * scale / batch)) * batch

    def everywhere(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: scaled(one) if key == "tokens" and isinstance(one, int)
                else [scaled(each) for each in one] if key == "budgets" else everywhere(one)
                for key, one in value.items()
            }  # fmt: skip
        return [everywhere(one) for one in value] if isinstance(value, list) else value

    content = everywhere(content)
    windows = max(16, min(content["evaluation"]["windows"], round(5120 * scale)))
    content["evaluation"] = content["evaluation"] | {"windows": windows}
    return content | {"name": f"{content['name']}-x{scale:g}"}


def needed(content: Content) -> int:
    """The tokens of the stream that the study's longest run ends at, or what masks are learned on after it."""
    study = schema.from_mapping(content, where=content["name"])
    found = outlook.look(study, Places(Path("runs") / study.name), planned=True)
    ends = [one.samples.end for one in found.estimated_grid(study).cells]
    ends += [learning_samples(study, found.lay, one).end for one in prunings(study) if one.method.tokens]
    return max(ends) * study.data.seq_length


def with_epochs(content: Content, corpus: int) -> tuple[Content, str]:
    """The study on as many epochs of a corpus of so many tokens as it needs, and what is repeated, in words. UsageError
    if the parent's own text were repeated."""
    sequence = content["data"]["seq_length"]
    once = (corpus - 1) // sequence * sequence
    whole, parent = needed(content), content["parent"]["pretrain"]["tokens"]
    if parent > once:
        raise UsageError("--scale", got=f"a parent of {parent:,} tokens", expected=f"at most {once:,}, which there are",
                         why="the parent's text is not to be repeated", do="add packages to packages.txt")  # fmt: skip
    epochs = -(-whole // once)
    told = f"{once:,} tokens of text, of which a parent reads {parent:,} once; the longest run ends at {whole:,}, "
    told += f"{whole / once:.2f} epochs" + (": what follows the first is text seen before" if epochs > 1 else "")
    return content | {"data": content["data"] | {"epochs": epochs}}, told


def cut(content: Content, cuts: int) -> Content:
    """The study without what the first ``cuts`` of ``CUTS`` leave out."""
    left: list[Content] = []
    for _, entries in CUTS[:cuts]:
        for entry in entries:
            made = dict(entry)
            if "budgets" in made:
                made["budgets"] = [content["budgets"][place] for place in made["budgets"]]
            if "seeds" in made:
                made["seeds"] = content["seeds"][1:]
            if made.get("seeds") != []:
                left.append(made)
    return content | {"leave_out": [*content["leave_out"], *left]}


def steps(seeds: int) -> Iterator[tuple[int, int, str]]:
    """Seeds, number of cuts, and what the last cut does, from the whole study to the least."""
    yield seeds, 0, "all of study.yaml"
    for number, (what, _) in enumerate(CUTS, 1):
        yield seeds, number, what
    for fewer in range(seeds - 1, LEAST_SEEDS - 1, -1):
        yield fewer, len(CUTS), f"{fewer} seeds: intervals are wider, and three seeds were asked for"


def look(study: schema.StudyConfig) -> outlook.Outlook:
    """What is known of a study whose corpora are there; checked as `study plan` does."""
    return validate.check(study, Places(Path("runs") / study.name), planned=True)


def hours(content: Content, prices: estimate.Prices) -> float:
    """How long a study takes."""
    study = schema.from_mapping(content, where=content["name"])
    return spent(list(estimate.of_study(study, look(study))), prices)


def spent(cells: Sequence[estimate.Estimate], prices: estimate.Prices) -> float:
    """Hours of these cells, those of most work first, as the runner starts them."""
    known = {one.cell: prices.seconds(one, 1) or 0.0 for one in cells}

    def turn(one: estimate.Estimate) -> tuple[bool, float]:
        compared = one.cell.startswith(("pruned-", "scratch-"))
        return compared, -known[one.cell] if compared else 0.0

    return estimate.makespan(sorted(cells, key=turn), known, prices.gpus) / 3600


def fit(content: Content, asked: float | None, prices: estimate.Prices) -> tuple[Content, float, list[str]]:
    """The largest study within ``asked`` hours (None: all of it), its hours, and what each step would have taken."""
    told: list[str] = []
    took = 0.0
    for seeds, cuts, what in steps(len(content["seeds"])):
        made = cut(content | {"seeds": content["seeds"][:seeds]}, cuts)
        took = hours(made, prices)
        told.append(f"{took:7.1f} h, {seeds} seeds: {what}")
        if asked is None or took <= asked:
            return made, took, told
    raise UsageError(
        "--hours", got=f"{asked:g}", expected=f"at least {took:.1f} on this machine",
        why="with less some claim could not be tested",
        do="give more (the study may be killed and continued), or --scale",
    )  # fmt: skip


def best_rate(ledger: Path, study: Path) -> tuple[float, dict[float, float]]:
    """The rate whose dense scratch run has the lowest validation loss in the ledger of rate.yaml, and all losses."""
    lines = Ledger(ledger).read()
    losses = {line["lr"]: line["validation_loss"] for cell, line in lines.items() if cell.startswith("scratch-")}
    rates = schema.load(study).recipe.rates
    if set(losses) != set(rates):
        raise DataError(f"{ledger}: expected scratch runs at {rates}, got {sorted(losses)}: run {study} to its end")
    best = min(losses, key=losses.__getitem__)
    return best, losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=STUDY, help="study.yaml by default; or small.yaml")
    parser.add_argument("--hours", type=float, help="that the whole study may take, killed and continued or not")
    parser.add_argument("--seeds", type=int, default=3, help="3 by default")
    parser.add_argument("--scale", type=float, default=1.0, help="of all token counts")
    parser.add_argument("--rate", type=float, help="learning rate, from rate.yaml")
    parser.add_argument("--all", action="store_true", help="print the hours of every step of the cuts for 1 to N seeds")
    parser.add_argument("--output", type=Path, required=True, metavar="STUDY.yaml")
    parser.add_argument("--choose-rate", type=Path, metavar="LEDGER", help="write the best rate of --study rate.yaml")
    options = parser.parse_args()
    screen.show_missing(False)
    try:
        if options.choose_rate is not None:
            best, losses = best_rate(options.choose_rate, options.study)
            print("validation loss by rate: " + ", ".join(f"{rate:g} {losses[rate]:.4f}" for rate in sorted(losses)))
            if best in (min(losses), max(losses)):
                print(
                    f"{best:g} is at an end of the rates that were tried: add one to {options.study} and run it again"
                )
            write_bytes(options.output, f"{best:g}\n".encode())
            return 0
        if options.seeds < 1:
            raise UsageError("--seeds", got=options.seeds, expected="at least 1")
        content = read(seeds=options.seeds, scale=options.scale, rate=options.rate, study=options.study)
        described: Any = indexed.sidecar(content["data"]["train"][0])
        content, told_of_text = with_epochs(content, described["tokens"])
        print(told_of_text)
        study = schema.from_mapping(content, where=content["name"])
        prices = throughput.measure(study, look(study), study.launch.parallel_cells)
        speed = {flops: round(study.recipe.global_batch_size * study.data.seq_length / seconds)
                 for flops, seconds in prices.seconds_of_step.items()}  # fmt: skip
        print(f"tokens per second of one of {prices.gpus} runs, largest shape first: "
              f"{', '.join(f'{speed[flops]:,}' for flops in sorted(speed, reverse=True))}; "
              f"{prices.around:.1f} s around each run")  # fmt: skip
        if options.all:
            for seeds in range(1, options.seeds + 1):
                for number in range(len(CUTS) + 1):
                    made = cut(content | {"seeds": content["seeds"][:seeds]}, number)
                    what = CUTS[number - 1][0] if number else "all of study.yaml"
                    print(f"{hours(made, prices):7.1f} h, {seeds} seeds: {what}")
        made, took, told = fit(content, options.hours, prices)
    except MegatronPruneError as error:
        print(f"plan.py: {error}", file=sys.stderr)
        return EXIT_REFUSED
    for line in told:
        print(line)
    head = f"# Written by examples/miniature/plan.py: about {took:.1f} hours on this machine.\n"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(options.output, (head + yaml.safe_dump(made, sort_keys=False)).encode())
    print(f"wrote {options.output}: {made['name']}, {len(made['seeds'])} seeds, about {took:.1f} hours")
    return 0


if __name__ == "__main__":
    sys.exit(main())
