"""``dtron eval``: the numbers of lm-evaluation-harness's own Hugging Face model, on any mesh."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import train
from dtron.__main__ import main
from dtron.distributed.mesh_shape import MeshShape
from dtron.distributed.simulated_ranks import simulated
from dtron.errors import UserError
from dtron.hf import Source
from dtron.mesh import Layout
from dtron.model.batch import make_batch
from dtron.model.transformer import declare_model, predict
from dtron.runtime.exit import run_cli
from dtron.runtime.scoring import Scorer, Text
from dtron.training.pipeline import one_stage
from tests.helpers.hf_models import folder, model
from tests.helpers.texts import words
from tests.helpers.train_cli import enter
from tests.helpers.values import ONE

pytest.importorskip("lm_eval")
WORDS = [f"w{i}" for i in range(60)]


def text(seed: int, n: int) -> str:
    g = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(60, (n,), generator=g).tolist())


@pytest.fixture(scope="module")
def at(tmp_path_factory) -> Path:
    """A folder with a model, and tasks with their data."""
    at = tmp_path_factory.mktemp("eval")
    shutil.copytree(folder("llama"), at / "model")
    words({w: i for i, w in enumerate(WORDS)} | {"</s>": 60}, at / "model" / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (at / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    rows = [
        {
            "question": text(i, 3 + i),
            "choices": [text(10 * i + j, 2 + j) for j in range(3)],
            "answer": i % 3,
            "passage": text(100 + i, 40),
        }
        for i in range(6)
    ]
    (at / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{test: {at}/rows.jsonl}}
test_split: test
num_fewshot: 0
"""
    tasks = {
        "choices": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]""",
        "passages": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{passage}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]""",
        "answers": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["w3"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}, {metric: bleu}]""",
    }
    for name, body in tasks.items():
        (at / f"{name}.yaml").write_text(f"task: dtron_{name}{shared}{body}\n")
    return at


def theirs(at: Path, names: list[str]) -> dict:
    """The results of the harness's own model on the same folder."""
    import transformers
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = transformers.AutoTokenizer.from_pretrained(at / "model")
    lm = HFLM(pretrained=model("llama"), tokenizer=tokenizer, batch_size=2, device="cpu")
    manager = TaskManager(include_path=str(at))
    done = simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0)
    return done["results"]


def test_the_results_are_those_of_the_harness_with_transformers(at, tmp_path, capsys):
    out = tmp_path / "out.json"
    files = ",".join(str(at / f"{name}.yaml") for name in ("choices", "passages", "answers"))
    args = ["eval", "--from", str(at / "model"), "--tasks", files, "--json", str(out)]
    assert main([*args, "--device", "cpu"]) == 0
    found = json.loads(out.read_text())["tasks"]
    names = [f"dtron_{name}" for name in ("choices", "passages", "answers")]
    want = theirs(at, names)
    for name in names:
        assert found[name]
        for metric, (value, _) in found[name].items():
            assert math.isclose(value, want[name][f"{metric},none"], rel_tol=1e-4), metric
    assert "acc_norm" in capsys.readouterr().out


def test_tasks_of_a_run(at, tmp_path, monkeypatch, capsys):
    """The metrics of the last step are those of the run's export."""
    enter(tmp_path, monkeypatch)
    (tmp_path / "text.txt").write_text(text(1, 3000))
    task = at / "choices.yaml"
    argv = [f"--init-from={at}/model", "--data.path=text.txt", f"--eval-tasks={task}"]
    argv += ["--steps=2", "--batch=4", "--data.seq-len=16", "--device=cpu", "--run-dir=run"]
    assert run_cli(train.main, [*argv, "--save-every=2", "--simulate", "--mesh=dp=2,tp=2"]) == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert "dtron_choices.acc" in capsys.readouterr().out
    args = ["eval", "--from", "run", "--tasks", str(task), "--json", "out.json", "--device", "cpu"]
    assert main(args) == 0
    found = json.loads((tmp_path / "out.json").read_text())["tasks"]["dtron_choices"]
    for name, (value, _) in found.items():
        assert math.isclose(last[f"tasks.dtron_choices.{name}"], value, rel_tol=1e-5)


TEXTS = [Text([5, 7, 9, 3, 2], 3), Text([1, 2], 1), Text([8, 8, 8, 4, 1, 9, 30], 6)]


def wanted(source: Source) -> list[tuple[float, bool]]:
    params = source.load(declare_model(source.model), ONE, torch.float64)
    found = []
    for tokens, n in TEXTS:
        logits = predict(params, make_batch(torch.tensor([tokens]), ONE), source.model, ONE)
        logs, targets = logits.log_softmax(-1)[-n:], torch.tensor(tokens[-n:])
        greedy = bool((logits[-n:].argmax(-1) == targets).all())
        found.append((logs.gather(1, targets[:, None]).sum().item(), greedy))
    return found


@pytest.mark.parametrize("mesh", ["", "dp=2,tp=2", "cp=2", "dp=2,cp=2,tp=2"])
def test_scores_on_a_mesh(mesh):
    """Rows have other lengths, and there are fewer than ranks."""
    source = Source(folder("llama"))
    shape = MeshShape.parse(mesh)
    with simulated(shape) as device_mesh:
        layout = Layout(device_mesh)
        pipe = one_stage(source.model, 1, layout)
        params = source.load(pipe.spec, layout, torch.float64)
        found = Scorer(params, source.model, pipe, "cpu")(TEXTS)
    for got, (log, greedy) in zip(found, wanted(source), strict=True):
        assert math.isclose(got.log_probability, log, rel_tol=1e-9) and got.greedy == greedy


def test_a_greedy_text_is_greedy():
    source = Source(folder("llama"))
    params = source.load(declare_model(source.model), ONE, torch.float64)
    tokens = [5, 7]
    for _ in range(4):
        batch = make_batch(torch.tensor([[*tokens, 0]]), ONE)
        tokens.append(int(predict(params, batch, source.model, ONE)[-1].argmax()))
    pipe = one_stage(source.model, 1, ONE)
    score = Scorer((params,), source.model, pipe, "cpu")
    right, wrong = score([Text(tokens, 4), Text([*tokens[:-1], (tokens[-1] + 1) % 60], 4)])
    assert right.greedy and not wrong.greedy


def test_the_perplexity_of_a_text(at, tmp_path):
    """The text is longer than the model's context."""
    file, out = tmp_path / "a.txt", tmp_path / "out.json"
    file.write_text(text(0, 300))
    args = ["eval", "--from", str(at / "model"), "--text", str(file), "--json", str(out)]
    assert main([*args, "--device", "cpu"]) == 0
    found = json.loads(out.read_text())["text"]
    source = Source(at / "model")
    params = source.load(declare_model(source.model), ONE)
    ids = [60, *(WORDS.index(w) for w in text(0, 300).split())]
    context, nats = source.model.context, 0.0
    assert len(ids) > context
    for i in range(0, len(ids) - 1, context):
        window = torch.tensor([ids[i : i + context + 1]])
        logits = predict(params, make_batch(window, ONE), source.model, ONE)
        nats -= logits.log_softmax(-1).gather(1, window[0, 1:, None]).sum().item()
    assert found["tokens"] == 300 and found["bytes"] == len(text(0, 300))
    assert math.isclose(found["perplexity"], math.exp(nats / 300), rel_tol=1e-4)
    assert math.isclose(found["bits_per_byte"], nats / found["bytes"] / math.log(2), rel_tol=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "has nothing to do"),
        (["--tasks", "arc_eazy"], "--tasks arc_eazy: is unknown; did you mean arc_easy"),
        (["--tasks", "none.yaml"], "--tasks none.yaml: is no file"),
        (["--text", "none.txt"], "--text none.txt: cannot be read"),
        (["--tasks", "arc_easy", "--limit", "0"], "--limit 0"),
    ],
)
def test_refused(at, args, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(["eval", "--from", str(at / "model"), *args, "--device", "cpu"])
