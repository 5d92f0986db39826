"""A row of each task, and lm-eval 0.4.13's prompts, continuations and gold choice for it."""

ROWS = {
    "hellaswag": (
        {
            "activity_label": "Baking",
            "ctx_a": "[header] How to bake [title] Mix.",
            "ctx_b": "then we",
            "endings": ["stop. [step] Go.", "run."],
            "label": "1",
        },
        # two spaces around the removed brackets become one
        (["Baking: How to bake. Mix. Then we"] * 2, [" stop. Go.", " run."], 1),
    ),
    "piqa": (
        {"goal": "Boil water", "sol1": "Heat it.", "sol2": "Cool it.", "label": 0},
        (["Question: Boil water\nAnswer:"] * 2, [" Heat it.", " Cool it."], 0),
    ),
    "boolq": (
        {"passage": "Ice floats.", "question": "does ice float", "label": 1},
        (["Ice floats.\nQuestion: does ice float?\nAnswer:"] * 2, [" no", " yes"], 1),
    ),
    "copa": (
        {"premise": "It rained. ", "question": "effect", "choice1": "He got wet.", "choice2": "It ended.", "label": 0},
        (["It rained therefore"] * 2, ["  he got wet.", "  it ended."], 0),
    ),
    "winogrande": (
        {"sentence": "Ann saw Bo and _ ran.", "option1": "Ann", "option2": "Bo", "answer": "2"},
        (["Ann saw Bo and Ann", "Ann saw Bo and Bo"], [" ran."] * 2, 1),
    ),
    "wsc273": (
        {
            "text": "The cup hit the pan and his lid broke.",
            "pronoun": "his",
            "pronoun_loc": 24,
            "options": ["The cup", "Bob"],
            "label": 0,
        },
        (
            ["The cup hit the pan and the cup's", "The cup hit the pan and Bob's"],
            ["  lid broke."] * 2,
            0,
        ),
    ),
    "arc_easy": (
        {"question": "What melts?", "choices": {"text": ["ice", "iron"], "label": ["1", "2"]}, "answerKey": "2"},
        (["Question: What melts?\nAnswer:"] * 2, [" ice", " iron"], 1),
    ),
    "openbookqa": (
        {"question_stem": "Fish live in", "choices": {"text": ["water", "air"], "label": ["A", "B"]}, "answerKey": "A"},
        (["Fish live in"] * 2, [" water", " air"], 0),
    ),
    "storycloze": (
        {f"input_sentence_{n}": f"S{n}." for n in range(1, 5)}
        | {"sentence_quiz1": "Good.", "sentence_quiz2": "Bad.", "answer_right_ending": 2},
        (["S1. S2. S3. S4."] * 2, [" Good.", " Bad."], 1),
    ),
    "lambada_openai": ({"text": "I see a\n\nblack cat"}, (["I see a\n\nblack"], [" cat"], 0)),
}


VARIED = {
    "hellaswag": "activity_label",
    "piqa": "goal",
    "boolq": "passage",
    "copa": "premise",
    "winogrande": "sentence",
    "arc_easy": "question",
    "openbookqa": "question_stem",
    "storycloze": "input_sentence_1",
    "lambada_openai": "text",
}


def variants(name: str, count: int = 5) -> list[dict]:
    """Returns rows that differ in a word at their start (Winograd's, which count positions, at the end)."""
    row, _ = ROWS[name]
    if name == "wsc273":
        return [{**row, "text": f"{row['text']} {n} ends"} for n in range(count)]
    field = VARIED[name]
    return [{**row, field: f"No. {n} {row[field]}"} for n in range(count)]
