"""What figures.py writes into docs/see.md and docs/listen.md: models with encoders beside their twins."""

from statistics import mean

from blocks import EPYC, SEEDS, SPEAKERS, ZEN4, by_seed, heard, result, row, table


def seen(what: str, head: str, asked: dict[tuple[str, str], str], digits: int) -> str:
    """A table of the tasks and metrics that are asked, and their words: percent by seed, and the ends of intervals."""
    rows = result(what, EPYC)["rows"]

    def percent(value: float) -> str:
        return f"{100 * value:.{digits}f}"

    def line(task: str, metric: str, words: str) -> str:
        cells = [words]
        for model in ("retnet", "twin"):
            of_seeds = [row(rows, model=model + seed, task=task, metric=metric) for seed in SEEDS]
            low, high = min(r["interval"][0] for r in of_seeds), max(r["interval"][1] for r in of_seeds)
            values = ", ".join(percent(r["value"]) for r in of_seeds)
            cells.append(f"{values} ({percent(low)} to {percent(high)})")
        cells[0] += f"; {of_seeds[0]['n']:,}"
        return " | ".join(cells)

    return table(f"{head} | RetNet | twin", *(line(*key, words) for key, words in asked.items()))


def seen_digits() -> str:
    asked = {
        ("answers:test", "exact"): "a picture, the question after it",
        ("answers:before", "exact"): "the question before it",
        ("answers:around", "exact"): "before and after it",
        ("answers:shuffled", "exact"): "another's picture in its place (chance: 10)",
    }
    for of in (8, 16):
        for k, name in ((1, "first"), (of // 2, f"{of // 2}th"), (of, "last")):
            asked[f"answers:row{of}-{k}", "exact"] = f"the {name} of {of} pictures"
    return seen("seen-digits-1m", "right answers about handwritten digits, %", asked, 1)


def seen_rate() -> str:
    """What half the rate does to the twin."""
    rows = result("seen-digits-half-rate-1m", ZEN4)["rows"]

    def right(task: str) -> str:
        return by_seed(rows, "twin", f"answers:{task}", "exact")

    def learnt(seed: str) -> int:
        places = (row(rows, model="twin" + seed, task=f"answers:row16-{k}", metric="exact") for k in range(1, 17))
        return sum(r["value"] > 0.85 for r in places)

    return (
        "**The rate of the recipes, the same for both, was chosen with RetNet, and that makes a difference.** At half "
        f"of it (`--lr 2e-3`) the twin is right about {right('test')} % of single pictures, {right('row8-1')} of the "
        f"first and {right('row8-8')} of the last of eight, and has learnt {learnt('')} and {learnt('-seed1')} of "
        "sixteen places (right in more than 85 %). RetNet was not trained at half the rate, nor either at others, "
        "nor with emoji."
    )


def seen_emoji() -> str:
    asked = {
        ("naming:kin", "first"): "its name before all others, where the emoji has other pictures",
        ("naming:kin", "first10"): "among the first ten",
        ("answers:kin", "exact"): "its name, written and not chosen from the list",
        ("naming:kin", "found"): "the picture before all others, from its name",
        ("naming:new", "first10"): "its name among the first ten, where there is no other picture of it",
        ("naming:new", "found10"): "the picture among the first ten, from its name",
    }
    return seen("seen-emoji-1m", "held-out pictures of emoji, 1,910 names, %", asked, 0)


def heard_digits() -> str:
    """Words that are wrong: of each speaker who was held out, and of what else the same models were asked."""

    def line(words: str, *speakers: str, task: str | None = None) -> str:
        """Means by seed over the speakers who were held out, all if none is named."""
        cells = [words]
        for model in ("retnet", "twin"):
            rows = heard(model, speakers or list(SPEAKERS), task)
            values = ", ".join(f"{100 * mean(r['value'] for r in of_seed):.1f}" for of_seed in rows)
            ends = [100 * end for of_seed in rows for r in of_seed for end in r["interval"]]
            cells.append(f"{values} ({min(ends):.1f} to {max(ends):.1f})")
        return " | ".join(cells)

    return table(
        "spoken digits, % of words wrong | RetNet | twin",
        *(line(f"{speaker}, held out", speaker) for speaker in SPEAKERS),
        line(f"mean of these {len(SPEAKERS)}"),
        line("another recording of speakers who were trained on", task="known"),
        line("the last of five in turns", task="turns5"),
        line("the last of fifty in turns", task="turns50"),
        line("five in one sound", task="row5"),
        line("fifty in one sound", task="row50"),
    )


def heard_rate() -> str:
    """What half the rate does to both, with one of the speakers held out."""
    rows = result("heard-lucas-half-rate-1m", ZEN4)["rows"]

    def wrong(model: str, task: str) -> str:
        return by_seed(rows, model, f"transcription:{task}", "wer")

    return (
        "The rate of the recipe, the same for both, was chosen with RetNet. At half of it (`--lr 2e-3`), with lucas "
        f"held out, RetNet errs in {wrong('retnet', 'lucas')} % of his words and the twin in "
        f"{wrong('twin', 'lucas')}; of the last of fifty in turns in {wrong('retnet', 'turns50')} and "
        f"{wrong('twin', 'turns50')}. Other rates, and the other speakers at this one, were not tried."
    )
