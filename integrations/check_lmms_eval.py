"""Let lmms-eval's own evaluator ask the demo model: `check_lmms_eval.py CHECKOUT`.

Owns   three small tasks about pictures whose shapes are known, and what they are held to.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

QUESTION = "How many shapes are there?"
CHOICES = ["There is one shape.", "There are two shapes.", "There are three shapes.",
           "There are four shapes."]  # fmt: skip
PICTURES = Path(__file__).parents[1] / "examples" / "images"
NAMES = ("one", "two", "three", "four")
METRICS = ("exact_match,none", "acc,none", "rounds,none")
# What all tasks have; `tasks.py` beside them holds FUNCTIONS.
SHARED = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {records}}}}}
test_split: test
doc_to_visual: !function tasks.show
"""
TASKS = {
    "shapes_said": """
output_type: generate_until
doc_to_text: !function tasks.ask
doc_to_target: "answer"
generation_kwargs: {max_new_tokens: 64, until: ["###"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "shapes_chosen": """
output_type: multiple_choice
doc_to_text: !function tasks.ask
doc_to_target: "number"
doc_to_choice: "choices"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "shapes_in_rounds": """
output_type: generate_until_multi_round
doc_to_text: !function tasks.ask_on
doc_to_target: "answer"
generation_kwargs: {max_new_tokens: 64}
process_results: !function tasks.keep
metric_list: [{metric: rounds, aggregation: mean, higher_is_better: true}]
""",
}
FUNCTIONS = '''
from PIL import Image


def show(doc):
    return [Image.open(doc["picture"])]


def ask(doc):
    return doc["question"]


def ask_on(doc, previous_output=None, round_idx=None, previous_round_info=None, **_):
    """A second round about the first picture, knowing the first answer."""
    if round_idx is None:
        return doc["question"]
    if round_idx == 1:
        return show(doc), f"Describe this image. {previous_output[0]}", False, previous_output, 7
    assert previous_round_info == 7
    return None, None, True, previous_output, None


def keep(doc, results):
    return {"rounds": len(results[0])}
'''


def write_tasks(folder: Path) -> None:
    """The tasks, as lmms-eval reads them."""
    records = [
        {"picture": str(PICTURES / f"{name}.png"), "question": QUESTION, "choices": CHOICES,
         "number": number, "answer": CHOICES[number]}
        for number, name in enumerate(NAMES)
    ]  # fmt: skip
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "records.jsonl").write_text(lines, encoding="utf-8")
    (folder / "tasks.py").write_text(FUNCTIONS, encoding="utf-8")
    for name, task in TASKS.items():
        text = f"task: {name}\n{SHARED.format(records=folder / 'records.jsonl')}{task}"
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def evaluate(folder: Path) -> dict[str, Any]:
    """What lmms-eval's evaluator makes of the tasks: its results, and a sample a document."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest
    from lmms_eval.tasks import TaskManager

    name, settings = "minigpt4-runtime", "model=demo,dtype=float32"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest(name, "lmms_eval_model.MiniGPT4Runtime"))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, Any] = simple_evaluate(
        name, settings, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0
    )
    return found


def compare(found: Mapping[str, Any]) -> None:
    """Hold what the evaluator got to this runtime's own answers and scores, and print both."""
    from minigpt4_runtime import MiniGPT4, SamplingParams, image

    model = MiniGPT4.load("demo", dtype="float32")
    lab, sampling = model.lab(), SamplingParams(max_new_tokens=64)
    counts = [len(lab.ids_of(choice)) for choice in CHOICES]
    for number, name in enumerate(NAMES):
        picture = PICTURES / f"{name}.png"
        said, chosen, rounds = (found["samples"][task][number]["resps"] for task in TASKS)
        first = model.describe(picture, QUESTION, sampling).text
        second = model.describe(picture, f"Describe this image. {first}", sampling).text
        assert said == [[first]], (said, first)
        assert rounds == [[[first, second]]], (rounds, first, second)
        prompt = lab.prompt([{"role": "user", "content": [image(picture), QUESTION]}])
        losses = [-x / n for x, n in zip(lab.score(prompt, CHOICES).tolist(), counts, strict=True)]
        given = [loss for ((loss, _),) in chosen]
        apart = max(abs(one - other) for one, other in zip(losses, given, strict=True))
        assert apart < 1e-4, (losses, given)
        assert [is_said for ((_, is_said),) in chosen] == [first == each for each in CHOICES]
        print(f"{name}: said {first!r} as describe does; losses {apart:.0e} from lab.score's")  # noqa: T201
    for task, results in found["results"].items():
        numbers = {key: float(value) for key, value in results.items() if key in METRICS}
        print(task, numbers)  # noqa: T201 - what it is for.


def main(checkout: Path) -> None:
    """Evaluate, and compare with what the runtime says without lmms-eval."""
    sys.path.insert(0, str(checkout))
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        write_tasks(Path(folder))
        compare(evaluate(Path(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
