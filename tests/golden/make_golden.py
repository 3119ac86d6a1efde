"""Make kronfluence.safetensors: exact EK-FAC scores from the reference implementation.

kronfluence 1.0.1 is run in float64 on tiny random GPT-2 and GPT-NeoX models.  The tests only read
the resulting file; kronfluence is needed only to make it again.  The committed file was made on a
CPU with torch 2.13.0, transformers 5.23.0, safetensors 0.8.0 and kronfluence 1.0.1:

    pip install torch==2.13.0
    pip install transformers==5.23.0 safetensors==0.8.0 numpy
    pip install accelerate einops einconv opt_einsum tqdm
    pip install --no-deps kronfluence==1.0.1      # its torchvision requirement is never imported
    OMP_NUM_THREADS=1 python tests/golden/make_golden.py

It takes half a minute.  Another run gives equal tensors, but not an equal file: safetensors writes
the metadata in no fixed order.

Cases (each is complete in itself, weights included):

    gpt2         GPT-2, eager attention, train loss on every token
    gpt2_masked  the same model and tokens, train loss without the first 4 labels (fit and scores)
    neox         GPT-NeoX, sdpa attention, train loss on every token
    neox_masked  the same model and tokens, train loss without the first 4 labels (fit and scores)
    neox_eager   neox with eager attention

All is float64, with two exceptions inside transformers' GPT-NeoX: the rotary cos and sin come from
float32, and so does the softmax of its eager attention (hence sdpa above).  Other machines, thread
counts or batches may round these differently, which moves scores by about 1e-7 of the largest, and
one module's by about 1e-6.

Keys, each after "<case>/", with N = 12 training sequences, Q = 3 queries and T = 12 tokens:

    weights/<name>                float32, the Hugging Face state dict (Conv1D weights [in, out])
    tokens, labels                int64 [N, T]; labels are not shifted, -100 is ignored
    query_tokens, query_labels    int64 [Q, T]; the first 6 labels are -100
    pairwise                      float64 [Q, N], summed over modules
    per_token                     float64 [Q, N, T], summed over modules
    per_module/<module>           float64 [Q, N]
    per_module_token/<module>     float64 [Q, N, T]
    lambda_mean/<module>          float64 [], mean of Lambda / N; the damping is 0.1 times this
    trace_A/<module>              float64 [], trace of sum(a a^T) / (N T), bias column included
    trace_S/<module>              float64 [], trace of sum(d d^T) / (N T)

The metadata holds "conventions", "versions" (JSON) and, for each case, "<case>" (JSON): the model
type, its config's keywords, the attention implementation and the tracked modules in order.
GPT-NeoX's output head is lm_head here, as in transformers 5.23; 5.0 still called it embed_out.
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
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

OUT = Path(__file__).with_name("kronfluence.safetensors")
N, Q, T, VOCAB = 12, 3, 12, 61
PROMPT = 6  # leading query labels set to -100
IGNORED = 4  # leading training labels set to -100 in the masked cases

CONVENTIONS = """\
The loss is the sum over tokens of the shifted cross entropy, labels -100 ignored, on both sides:
the measurement of a query is its loss on the completion labels.  score(q, z) = sum over modules of
<(H + damping)^-1 grad loss(q), grad loss(z)>: no minus sign, no division by N.  Each loss is minus
a log probability and the two minus signs cancel, so the score made from two log-probability
gradients has the same sign and value: positive means that training on z raises the query's log
probability.  Empirical Fisher (the data's own labels).  A = sum a a^T / (N T) and
S = sum d d^T / (N T), where d is the gradient of the summed loss at the module's output; every
position counts, the last one and those without a label included; no attention mask.  The bias is a
column of ones appended to a, so it is the last column of the (out, in + 1) gradient.  Lambda = mean
over sequences of (Q_S^T G Q_A)^2 with G the gradient of the sequence's summed loss.  The damping is
0.1 mean(Lambda) per module.  Entry t of a per-token score uses a_t and d_t of the training
sequence: t is the input position, not that of the label it predicts."""

MODELS = {
    "gpt2": {
        "model_type": "gpt2",
        "config": dict(
            n_layer=2,
            n_embd=16,
            n_head=2,
            vocab_size=VOCAB,
            n_positions=32,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        ),
        "modules": [
            f"transformer.h.{i}.{name}"
            for i in range(2)
            for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ],
        "seed": 1,
    },
    "neox": {
        "model_type": "gpt_neox",
        "config": dict(
            num_hidden_layers=2,
            hidden_size=16,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=VOCAB,
            max_position_embeddings=32,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
        ),
        "modules": [
            f"gpt_neox.layers.{i}.{name}"
            for i in range(2)
            for name in (
                "attention.query_key_value",
                "attention.dense",
                "mlp.dense_h_to_4h",
                "mlp.dense_4h_to_h",
            )
        ],
        "seed": 2,
    },
}
CASES = {  # case: (model, attention, ignored training labels)
    "gpt2": ("gpt2", "eager", 0),
    "gpt2_masked": ("gpt2", "eager", IGNORED),
    "neox": ("neox", "sdpa", 0),
    "neox_masked": ("neox", "sdpa", IGNORED),
    "neox_eager": ("neox", "eager", 0),
}


def random_weights(model, generator):
    """Fill every parameter, biases and layer norms included, with float32 normal numbers."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            is_norm_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(values + 1 if is_norm_scale else values)


def conv1d_to_linear(module):
    """Replace every Conv1D below module by the equal nn.Linear, which kronfluence can track."""
    for name, child in module.named_children():
        if isinstance(child, Conv1D):
            linear = nn.Linear(child.nx, child.nf, dtype=child.weight.dtype)
            linear.weight.data = child.weight.data.t().contiguous()
            linear.bias.data = child.bias.data.clone()
            setattr(module, name, linear)
        else:
            conv1d_to_linear(child)


def summed_loss(model, batch):
    logits = model(input_ids=batch["tokens"], use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
        ignore_index=-100,
        reduction="sum",
    )


class LanguageModelTask(Task):
    def __init__(self, modules):
        self.modules = modules

    def compute_train_loss(self, batch, model, sample=False):
        assert not sample  # empirical Fisher
        return summed_loss(model, batch)

    def compute_measurement(self, batch, model):
        return summed_loss(model, batch)

    def get_influence_tracked_modules(self):
        return self.modules


def run_kronfluence(model, modules, train, query):
    """Scores and summaries of the factors, as a dict of tensors."""
    task = LanguageModelTask(modules)
    conv1d_to_linear(model)
    model = prepare_model(model, task)
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("golden", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.fit_all_factors(
            "ekfac", train, per_device_batch_size=4, factor_args=pytest_factor_arguments("ekfac")
        )

        def scores(name, **flags):
            args = pytest_score_arguments(damping_factor=None)
            for flag, value in flags.items():
                setattr(args, flag, value)
            analyzer.compute_pairwise_scores(
                name,
                "ekfac",
                query,
                train,
                per_device_query_batch_size=Q,
                per_device_train_batch_size=4,
                score_args=args,
            )
            return analyzer.load_pairwise_scores(name)

        out["pairwise"] = scores("pairwise")["all_modules"]
        out["per_token"] = scores("token", compute_per_token_scores=True)["all_modules"]
        for name, value in scores("module", compute_per_module_scores=True).items():
            out[f"per_module/{name}"] = value
        for name, value in scores(
            "both", compute_per_module_scores=True, compute_per_token_scores=True
        ).items():
            out[f"per_module_token/{name}"] = value

        covariance = analyzer.load_covariance_matrices("ekfac")
        eigen = analyzer.load_eigendecomposition("ekfac")
        fitted = analyzer.load_lambda_matrices("ekfac")
        for factors in (covariance, eigen, fitted):
            for kind, tensors in factors.items():
                dtype = torch.int64 if kind.startswith("num_") else torch.float64
                assert all(tensor.dtype == dtype for tensor in tensors.values())
        for name in modules:
            assert covariance["num_activation_covariance_processed"][name].item() == N * T
            assert covariance["num_gradient_covariance_processed"][name].item() == N * T
            assert fitted["num_lambda_processed"][name].item() == N
            out[f"lambda_mean/{name}"] = fitted["lambda_matrix"][name].mean() / N
            out[f"trace_A/{name}"] = covariance["activation_covariance"][name].trace() / (N * T)
            out[f"trace_S/{name}"] = covariance["gradient_covariance"][name].trace() / (N * T)
    assert all(tensor.dtype == torch.float64 for tensor in out.values())
    return out


def make_case(model_name, attention, ignored):
    spec = MODELS[model_name]
    generator = torch.Generator().manual_seed(spec["seed"])
    config = AutoConfig.for_model(spec["model_type"], **spec["config"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    random_weights(model, generator)
    out = {f"weights/{name}": value.clone() for name, value in model.state_dict().items()}
    model.double()

    tokens = torch.randint(VOCAB, (N, T), generator=generator)
    query_tokens = torch.randint(VOCAB, (Q, T), generator=generator)
    labels, query_labels = tokens.clone(), query_tokens.clone()
    labels[:, :ignored] = -100
    query_labels[:, :PROMPT] = -100
    out.update(tokens=tokens, labels=labels, query_tokens=query_tokens, query_labels=query_labels)

    train = [{"tokens": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
    query = [{"tokens": t, "labels": y} for t, y in zip(query_tokens, query_labels, strict=True)]
    out.update(run_kronfluence(model, spec["modules"], train, query))
    return out


def main():
    packages = ("kronfluence", "torch", "transformers", "safetensors", "accelerate", "numpy")
    metadata = {
        "conventions": " ".join(CONVENTIONS.split()),
        "versions": json.dumps({package: version(package) for package in packages}),
    }
    tensors = {}
    for case, (model_name, attention, ignored) in CASES.items():
        for key, value in make_case(model_name, attention, ignored).items():
            tensors[f"{case}/{key}"] = value.contiguous()
        spec = MODELS[model_name]
        metadata[case] = json.dumps(
            {
                "model_type": spec["model_type"],
                "config": spec["config"],
                "attn_implementation": attention,
                "modules": spec["modules"],
            }
        )
    save_file(tensors, OUT, metadata)
    print(f"{OUT.name}: {len(tensors)} tensors, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
