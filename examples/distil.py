"""Distil an indexer for SmolLM2-135M-Instruct from its own dense attention, on texts that are at hand.

    python examples/distil.py --output smollm2-135m-indexer.safetensors

The texts are documentation of installed packages, their descriptions and licences, with numbers to be found
again hidden in some of them.
A run that was stopped goes on where it was, if it is given a --folder.
"""

import argparse
import ast
import importlib.metadata
import importlib.util
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

PACKAGES = "torch", "numpy", "transformers"  # whose documentation is read, beside the standard library's
LENGTHS = 2048, 4096, 4096, 8192  # of the texts, in turn
THINGS = "pass key", "secret number", "access code", "serial number", "door code", "phone extension"
PLACES = "the library", "the blue house", "room seven", "the old mill", "Anna's desk", "the north gate"


def documentation(seed: int = 0) -> Iterator[str]:
    """The docstrings of a module, of modules in a random order; at most some thousand words each."""
    folders = [Path(sysconfig.get_path("stdlib"))]
    folders += [Path(spec.origin).parent for name in PACKAGES if (spec := importlib.util.find_spec(name))]
    left_out = {"site-packages", "test", "tests"}
    files = [
        file
        for folder in folders
        for file in sorted(folder.rglob("*.py"))
        if not left_out & {*file.relative_to(folder).parts}
    ]
    random.Random(seed).shuffle(files)
    for file in files:
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        text = "\n\n".join(text for text in found if text)
        if len(text) > 2000:
            yield text[:20000]


def descriptions(seed: int = 0) -> Iterator[str]:
    """Descriptions and licences of the installed packages in a random order, but for the GNU licences, with
    which the demo's indexer is judged."""
    made = []
    for distribution in importlib.metadata.distributions():
        made.append(distribution.metadata.get_payload())
        licences = (file for file in distribution.files or () if file.name.startswith(("LICENSE", "COPYING")))
        made += [file.locate().read_text("utf-8", "ignore") for file in licences if file.locate().exists()]
    made = sorted({text[:20000] for text in made if len(text) > 2000 and "GNU" not in text})
    random.Random(seed).shuffle(made)
    yield from made


def passages(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Facts to hide in a text, each with the question that asks for it and the answer."""
    names = rng.sample([f"{thing} of {place}" for thing in THINGS for place in PLACES], count)
    made = []
    for name in names:
        number = str(rng.randrange(10 ** rng.randrange(3, 7), 10**7))
        fact = rng.choice(
            ["The {0} is {1}.", "Note that the {0} is {1}. Keep it in mind.", "{1} is the {0}."]
        )
        question = rng.choice(["What is the {0}? The {0} is {1}.", "Q: Which number is the {0}?\nA: {1}"])
        made.append((fact.format(name, number), question.format(name, number)))
    return made


def training_texts(tokenizer, source: Iterator[str], count: int, seed: int = 0) -> list[Tensor]:
    """Token ids ``[tokens]`` of texts whose lengths are LENGTHS in turn.

    Two of three hide some passages, and end with questions for them and the answers.
    """
    rng = random.Random(seed)
    texts = []
    for number in range(count):
        length = LENGTHS[number % len(LENGTHS)]
        facts = passages(rng, 6) if number % 3 else []
        end = tokenizer("\n\n" + "\n".join(question for _, question in facts)).input_ids if facts else []
        body: list[int] = []
        while len(body) < length:
            body += tokenizer(next(source) + "\n\n\n").input_ids
        hidden = [tokenizer(f"\n\n{fact}\n\n").input_ids for fact, _ in facts]
        del body[length - len(end) - sum(map(len, hidden)) :]
        for ids in hidden:
            at = rng.randrange(len(body))
            body[at:at] = ids
        texts.append(torch.tensor(body + end))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("smollm2-135m-indexer.safetensors"))
    parser.add_argument("--folder", type=Path, help="where a run that is stopped goes on (default: none)")
    parser.add_argument("--texts", type=int, default=32, help="how many (default 32)")
    parser.add_argument("--steps", type=int, default=2000, help="for each layer (default 2000)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    options = parser.parse_args()

    import sparse_attn.integrations.transformers as sa
    from real_model import load_model

    if options.threads:
        torch.set_num_threads(options.threads)
    tokenizer, model = load_model()
    texts = training_texts(tokenizer, documentation(), options.texts // 2)
    texts += training_texts(tokenizer, descriptions(), options.texts - options.texts // 2, seed=1)
    size = {"index_n_heads": 4, "index_head_dim": 64, "index_rope_dim": 16}
    indexers = sa.distill(model.to(options.device), texts, **size, steps=options.steps, folder=options.folder)
    sa.save_indexer(indexers, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
