"""What figures.py writes into docs/see.md: models with encoders beside their twins."""

from blocks import EPYC, result, row, table

SEEDS = ("", "-seed1")


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
