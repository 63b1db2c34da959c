"""From a published model's folder to a model that answers: tuned on made-up conversations, asked
with conversations that it has not seen."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

import train
from dtron.data.chat_template import template_beside
from dtron.mesh import Layout
from dtron.model.lora import with_lora
from dtron.runtime.exit import run_cli
from dtron.runtime.export_run import export_run
from dtron.runtime.generation import Sampling, generate
from dtron.runtime.open_model import open_model
from dtron.training.pipeline import one_stage
from tests.helpers.train_cli import enter

transformers = pytest.importorskip("transformers")

NAMES = ["ada", "bob", "cem", "dan", "eva", "fei", "gil", "hal", "ivy", "jon", "kim", "leo"]
LETTERS = [f"{x}!" for x in "abcdefghij"]
WORDS = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "\n"]
WORDS += ["what", "comes", "after", "?", "says", "to", ",", ".", *NAMES, *LETTERS]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} \n {{ m['content'] }} <|im_end|> \n "
    "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant \n {% endif %}"
)


def conversations(answer: str) -> tuple[list[dict], list[dict]]:
    """Conversations to learn, and others to be asked. An answer needs a name of the question and
    the letter after the question's letter."""
    rows = []
    for (name, other), i in itertools.product(itertools.permutations(NAMES, 2), range(9)):
        asks = f"{name} says to {other} , what comes after {LETTERS[i]} ?"
        says = answer.format(name=name, other=other, letter=LETTERS[i + 1])
        rows.append([{"role": "user", "content": asks}, {"role": "assistant", "content": says}])
    random.Random(0).shuffle(rows)
    return [{"messages": row} for row in rows[100:]], [{"messages": row} for row in rows[:100]]


def published(at: Path) -> Path:
    """A folder as transformers saves it, of a Llama with random weights."""
    at.mkdir()
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    pieces = pre_tokenizers.Split(Regex(" "), "removed"), pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*pieces])
    tokenizer.add_special_tokens([AddedToken(word) for word in WORDS[1:3]])
    tokenizer.save(str(at / "tokenizer.json"))
    entries = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    entries |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (at / "tokenizer_config.json").write_text(json.dumps(entries))
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(at)
    return at


def tune(source: Path, run_dir: Path, rows: list[dict], steps: int, *flags: str) -> None:
    chats = run_dir.with_suffix(".jsonl")
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [f"--init-from={source}", f"--data.path={chats}", "--data.chat", "--data.seq-len=64"]
    argv += ["--batch=32", f"--steps={steps}", "--optim.warmup=10", "--optim.lr=1e-2"]
    argv += ["--eval-every=0", "--sample-tokens=0", "--save-every=1000", "--device=cpu"]
    assert run_cli(train.main, [*argv, f"--run-dir={run_dir}", *flags]) == 0


def exact(folder: Path, rows: list[dict], tokenizer: Path) -> int:
    """The number of conversations whose answer is right, to the last word."""
    opened, layout = open_model(str(folder)), Layout()
    pipe = one_stage(opened.model, 1, layout)
    pipe = replace(pipe, specs=tuple(with_lora(s, opened.lora) for s in pipe.specs))
    weights = opened.load(pipe.spec, layout, torch.float32, "cpu")
    encoder, template = Tokenizer.from_file(str(tokenizer)), template_beside(tokenizer)
    questions = [template.render(row["messages"][:1], prompt=True).text for row in rows]
    prompts = [encoder.encode(text).ids for text in questions]
    texts = generate(weights, prompts, 8, opened.model, pipe, Sampling(0), "cpu", {2})
    answers = [encoder.encode(row["messages"][1]["content"] + " <|im_end|>").ids for row in rows]
    return sum(
        ids[len(prompt) :] == answer
        for ids, prompt, answer in zip(texts, prompts, answers, strict=True)
    )


def test_a_model_learns_to_answer_and_an_update_changes_the_answer(tmp_path, monkeypatch):
    """All weights learn the first way to answer, and a low-rank update learns another one."""
    enter(tmp_path, monkeypatch)
    source = published(tmp_path / "published")
    tokenizer = source / "tokenizer.json"
    used, held = conversations("{other} , {letter} .")
    tune(source, tmp_path / "run", used, 450)
    assert exact(tmp_path / "run", held, tokenizer) > 90
    export_run(tmp_path / "run", tmp_path / "tuned", dtype=torch.float32)
    used, held = conversations("{letter} , says {name} .")
    assert exact(tmp_path / "tuned", held, tokenizer) == 0
    tune(tmp_path / "tuned", tmp_path / "update", used, 300, "--lora.rank=8")
    assert exact(tmp_path / "update", held, tokenizer) > 90
