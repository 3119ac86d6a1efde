"""Pairs, policies and references for tests of what a reference is asked."""

import json
from dataclasses import replace

import peft
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from gradindex.model.network import LanguageModel
from gradindex.progress import Progress
from gradindex.storage import layout
from indexer.ask_reference import ask_reference, read_records
from indexer.read.ingest import Run
from support.task_models import FAMILIES, answers, policy, save, tokenizer_of_texts

SMALL = {"bits": 512, "fit_sequences": 24, "batch_tokens": 64, "segment_size": 4, "seq_len": 12,
         "task": "preference", "beta": 0.2}


def tokenizer():
    """One that puts no token around a text, as most of causal models."""
    made = tokenizer_of_texts()
    made.eos_token = "[SEP]"
    made.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    return made


def other_network(seed=3, dtype=torch.float32, **changes):
    """A causal language model with other random weights than `policy`."""
    torch.manual_seed(seed)
    network = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{**FAMILIES["gpt2"][1], **changes}))
    return network.to(dtype).eval().requires_grad_(False)


def bare(count=20):
    """Pairs without what a reference says of them; two are longer than a sequence."""
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")}
            for row in answers(count)]
    for row in rows[3:5]:
        row["chosen"] += " the plot of the film was not very good"
    return rows


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums_by_hand(network, prompt, answer, length=SMALL["seq_len"]):
    """Σ log p of an answer's tokens, one softmax after the other."""
    read = tokenizer()
    asked = read(prompt)["input_ids"]
    tokens = (asked + read(f"{answer}[SEP]")["input_ids"])[:length]
    logits = network(torch.tensor([tokens])).logits[0].double()
    return sum(float(logits[at - 1].log_softmax(-1)[tokens[at]])
               for at in range(len(asked), len(tokens)))


def offsets(index):
    return [record.offset for record in index.snapshot.records(range(len(index)))]


class Said(Progress):
    """What was said, in a list."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def offsets_of(request, folder):
    """The offsets of a request's records, of which a build would fit and encode nothing yet."""
    (folder / layout.SEGMENTS).mkdir(parents=True)
    run = Run(folder, 0, 0, 0, SMALL["segment_size"])
    count = read_records(request.corpus, run, Progress()).sequences
    run = replace(run, count=count)
    model = LanguageModel.load(request.source)
    ask_reference(run, request.reference, request.source, model, request.plan, Progress())
    return [record.offset for record in run.records(list(range(count)))]


def adapted(network, seed=5):
    """A PeftModel whose adapter matters."""
    wrapped = peft.get_peft_model(network, peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True,
        task_type="CAUSAL_LM"), autocast_adapter_dtype=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return wrapped.eval()


def told(**changes):
    rows = [dict(row) for row in bare(4)]
    for row in rows[changes.pop("first", 0):]:
        row |= changes
    return rows


def save_both(folder):
    """The folders of a policy and of its reference."""
    return (save(folder / "policy", policy(torch.float32), tokenizer()),
            save(folder / "reference", other_network(), tokenizer()))
