"""Make kronfluence_tasks.safetensors: exact EK-FAC scores of a classifier and a reward model.

kronfluence 1.0.1 is run in float64 on tiny random BERT models, as `make_golden.py` says, which also
says how it is installed; it takes half a minute:

    OMP_NUM_THREADS=1 python tests/golden/make_golden_tasks.py

Cases, N = 12 training rows and Q = 3 queries each:

    classifier   BERT, three classes, texts of unlike lengths padded on the right, with their mask
    reward       BERT, one output, pairs of texts without padding; the loss is −log σ(r(c) − r(r))

Keys, each after "<case>/": `weights/<name>` float32; `tokens` and `query_tokens` int64 [N, T] and
[Q, T] (of pairs [N, 2, T], chosen first), `mask` and `query_mask` int64 of the same shape, `labels`
and `query_labels` int64 (of the classifier); `pairwise` float64 [Q, N], `per_module/<module>`,
`lambda_mean/<module>`. The curvature is fitted on the data's own labels; damping and signs are
those of `make_golden.py`. The metadata names config and modules.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.task import Task
from kronfluence.utils.common.factor_arguments import pytest_factor_arguments
from kronfluence.utils.common.score_arguments import pytest_score_arguments
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification

OUT = Path(__file__).with_name("kronfluence_tasks.safetensors")
N, Q, T, VOCAB = 12, 3, 10, 50
MODULES = [f"bert.encoder.layer.{layer}.{name}" for layer in range(2) for name in (
    "attention.self.query", "attention.self.key", "attention.self.value",
    "attention.output.dense", "intermediate.dense", "output.dense")] + [
    "bert.pooler.dense", "classifier"]
CONFIG = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2,
          "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16,
          "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}


class Labels(Task):
    def loss(self, batch, model):
        logits = model(input_ids=batch["tokens"], attention_mask=batch["mask"]).logits
        return F.cross_entropy(logits, batch["labels"], reduction="sum")

    def compute_train_loss(self, batch, model, sample=False):
        assert not sample  # the data's own labels
        return self.loss(batch, model)

    def compute_measurement(self, batch, model):
        return self.loss(batch, model)

    def get_influence_tracked_modules(self):
        return MODULES

    def get_attention_mask(self, batch):
        return batch["mask"] if batch["mask"].ndim == 2 else None


class Pairs(Labels):
    # Without it kronfluence 1.0.1 keeps the score of a shared module's last run alone; with it, it
    # adds the scores of a batch to those of the batch before, so there is to be but one.
    enable_post_process_per_sample_gradient = True

    def post_process_per_sample_gradient(self, module_name, gradient):
        return gradient

    def loss(self, batch, model):
        one, other = (model(input_ids=batch["tokens"][:, side]).logits[:, 0] for side in (0, 1))
        return -F.logsigmoid(one - other).sum()


def run(model, task, train, query, shared):
    model = prepare_model(model, task)
    out = {}
    factor_args, score_args = pytest_factor_arguments("ekfac"), pytest_score_arguments(
        damping_factor=None)
    factor_args.has_shared_parameters = shared
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("golden", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.fit_all_factors("ekfac", train, per_device_batch_size=4, factor_args=factor_args)
        for name, wanted in (("all", False), ("module", True)):
            score_args.compute_per_module_scores = wanted
            analyzer.compute_pairwise_scores(
                name, "ekfac", query, train, per_device_query_batch_size=Q,
                per_device_train_batch_size=N, score_args=score_args)
            for module, value in analyzer.load_pairwise_scores(name).items():
                out["pairwise" if name == "all" else f"per_module/{module}"] = value
        fitted = analyzer.load_lambda_matrices("ekfac")
        for name in MODULES:
            out[f"lambda_mean/{name}"] = fitted["lambda_matrix"][name].mean() / N
    return out


def make_case(case):
    generator = torch.Generator().manual_seed(3)
    classes = 3 if case == "classifier" else 1
    model = BertForSequenceClassification(BertConfig(**CONFIG, num_labels=classes)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            is_norm_scale = "LayerNorm.weight" in name
            parameter.copy_(values + 1 if is_norm_scale else values)
    out = {f"weights/{name}": value.clone() for name, value in model.state_dict().items()}
    model.double()
    rows = {}
    for prefix, count in (("", N), ("query_", Q)):
        shape = (count, T) if case == "classifier" else (count, 2, T)
        tokens = torch.randint(1, VOCAB, shape, generator=generator)
        mask = torch.ones_like(tokens)
        if case == "classifier":
            for row in range(count):
                mask[row, 4 + (3 * row) % (T - 3):] = 0
        tokens = tokens * mask
        labels = torch.randint(max(2, classes), (count,), generator=generator)
        out |= {f"{prefix}tokens": tokens, f"{prefix}mask": mask, f"{prefix}labels": labels}
        rows[prefix] = [{"tokens": t, "mask": m, "labels": y}
                        for t, m, y in zip(tokens, mask, labels, strict=True)]
    task = Labels() if case == "classifier" else Pairs()
    return out | run(model, task, rows[""], rows["query_"], shared=case == "reward")


def main():
    tensors = {}
    packages = ("kronfluence", "torch", "transformers", "safetensors", "accelerate", "numpy")
    metadata = {"versions": json.dumps({package: version(package) for package in packages}),
                "config": json.dumps(CONFIG), "modules": json.dumps(MODULES)}
    for case in ("classifier", "reward"):
        for key, value in make_case(case).items():
            tensors[f"{case}/{key}"] = value.contiguous()
    save_file(tensors, OUT, metadata)
    print(f"{OUT.name}: {len(tensors)} tensors, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
