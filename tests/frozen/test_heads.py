"""Classifiers out of checkpoints: a head that is there is kept, one that is not begins fresh."""

import json

import pytest
import torch
import transformers as hf

from rankwise.errors import ModelError, SpecError
from rankwise.frozen.load import load_base, read_outline
from rankwise.tasks import TASKS
from tests.data.chat import framed
from tests.jobs.tasks import write_base
from tests.models import BERT, LLAMA, VOCAB

NAMES = ("bad", "good", "neutral")
MASKED = {
    "bert": (hf.BertForMaskedLM, hf.BertConfig(**BERT), ("bert.pooler", "classifier")),
    "bert-pooled": (hf.BertModel, hf.BertConfig(**BERT), ("classifier",)),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(**BERT), ("classifier",)),
    "albert": (hf.AlbertForMaskedLM, hf.AlbertConfig(**BERT, embedding_size=16), ("albert.pooler", "classifier")),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA), ("score",)),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        hf.DistilBertConfig(vocab_size=VOCAB, dim=32, hidden_dim=48, n_layers=2, n_heads=4),
        ("pre_classifier", "classifier"),
    ),
    "bart": (
        hf.BartForConditionalGeneration,
        hf.BartConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
        ),
        ("classification_head",),
    ),
}


def written(folder, model):
    model.save_pretrained(folder)
    framed().save_pretrained(folder)
    return folder


def loaded(folder, **settings):
    wanted = {"task": "sequence-classification", "classes": NAMES, "dtype": "float32", "device": "cpu"}
    return load_base(folder, **{**wanted, **settings})


@pytest.mark.parametrize("name", MASKED)
def test_a_checkpoint_without_the_head_gets_a_fresh_one_and_keeps_all_else(name, tmp_path):
    build, config, fresh = MASKED[name]
    model = build(config)
    base = loaded(written(tmp_path, model))
    assert (base.fresh, base.classes) == (fresh, NAMES)
    assert base.model.config.num_labels == 3
    assert base.model.config.id2label == dict(enumerate(NAMES))
    kept, own = model.state_dict(), base.model.state_dict()
    prefix = "" if build is hf.BertModel else f"{base.model.base_model_prefix}."
    there = [path for path in own if not path.startswith(tuple(f"{one}." for one in fresh))]
    same = {path: path if prefix else path.removeprefix("bert.") for path in there}
    assert all(torch.equal(own[path], kept[other]) for path, other in same.items())
    assert all(tensor.isfinite().all() for tensor in own.values())


def test_a_fresh_head_follows_from_the_seed_and_leaves_chance_alone(tmp_path):
    folder = written(tmp_path, hf.BertModel(hf.BertConfig(**BERT)))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (loaded(folder, seed=seed).model.classifier.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_head_for_the_very_same_classes_is_kept(tmp_path):
    model = hf.BertForSequenceClassification(
        hf.BertConfig(**BERT, id2label=dict(enumerate(("BAD", "GOOD", "NEUTRAL"))))
    )
    base = loaded(written(tmp_path, model))
    assert base.fresh == ()
    assert torch.equal(base.model.classifier.weight, model.classifier.weight)
    assert loaded(tmp_path, classes=()).classes == ("BAD", "GOOD", "NEUTRAL")


@pytest.mark.parametrize("names", [("x", "y"), ("LABEL_0", "LABEL_1", "LABEL_2")])
def test_a_head_for_other_classes_is_trained_anew(tmp_path, names):
    model = hf.BertForSequenceClassification(hf.BertConfig(**BERT, id2label=dict(enumerate(names))))
    base = loaded(written(tmp_path, model))
    assert base.fresh == ("classifier",)
    assert base.model.classifier.weight.shape == (3, 32)
    assert torch.equal(base.model.bert.pooler.dense.weight, model.bert.pooler.dense.weight)


def test_nothing_but_the_head_may_be_missing(tmp_path):
    model = hf.BertForMaskedLM(hf.BertConfig(**BERT))
    written(tmp_path, model)
    weights = {
        path: tensor for path, tensor in model.state_dict().items() if "layer.1.attention.self.query" not in path
    }
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelError) as caught:
        loaded(tmp_path)
    assert "bert.encoder.layer.1.attention.self.query.weight: missing" in str(caught.value)
    assert "classifier" not in str(caught.value)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    with pytest.raises(ModelError, match=r"\(48, 32\) in the file, \(50, 32\) in the model"):
        loaded(tmp_path)


@pytest.mark.parametrize("task", ["masked-lm", "seq2seq", "causal-lm"])
def test_a_language_models_head_is_never_made_up(tmp_path, task):
    folder = written(tmp_path, hf.BertModel(hf.BertConfig(**BERT)))
    with pytest.raises(ModelError):
        loaded(folder, task=task, classes=())


def test_a_model_that_knows_no_padding_is_told_the_tokenizers(tmp_path):
    folder = written(tmp_path, hf.LlamaForCausalLM(hf.LlamaConfig(**{**LLAMA, "pad_token_id": None})))
    assert loaded(folder).model.config.pad_token_id == framed().pad_token_id


def test_no_such_task_names_the_nearest(tmp_path):
    with pytest.raises(SpecError, match="did you mean 'seq2seq'"):
        load_base(tmp_path, task="seq2sec")


@pytest.mark.parametrize("size", [16, (16, 12)])
def test_a_model_of_pictures_without_a_processor_gets_the_plainest(tmp_path, size):
    config = hf.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=size,
        patch_size=4,
        num_channels=1,
    )
    hf.ViTModel(config).save_pretrained(tmp_path)
    base = loaded(tmp_path, task="image-classification")
    height, width = (size, size) if isinstance(size, int) else size
    assert dict(base.tokenizer.size) == {"height": height, "width": width}
    assert base.tokenizer.image_mean == (0.5,)
    assert base.fresh == ("classifier",)
    hf.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    assert dict(loaded(tmp_path, task="image-classification").tokenizer.size) == {"height": 8, "width": 8}


def test_a_broken_processor_is_not_replaced(tmp_path):
    hf.ViTModel(
        hf.ViTConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    ).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelError, match="image processor cannot be loaded"):
        loaded(tmp_path, task="image-classification")


@pytest.mark.parametrize(
    ("family", "task", "way_out"),
    [
        ("llama", "seq2seq", "--task causal-lm"),
        ("t5", "causal-lm", "--task seq2seq"),
        ("bert", "image-classification", "--task masked-lm"),
        ("vit", "sequence-classification", "made for the task"),
    ],
)
def test_a_model_of_another_task_is_refused_and_what_it_was_made_for_is_said(tmp_path, family, task, way_out):
    with pytest.raises(ModelError, match=f"no model for {task} in the family '{family}'") as refused:
        loaded(write_base(tmp_path, family), task=task)
    assert way_out in refused.value.hint


def test_an_outline_is_of_what_the_checkpoint_was_made_for(tmp_path):
    hf.BertForSequenceClassification(hf.BertConfig(**BERT)).save_pretrained(tmp_path / "classes")
    hf.ViTModel(hf.ViTConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4)).save_pretrained(
        tmp_path / "vit"
    )
    assert type(read_outline(tmp_path / "classes")) is hf.BertForSequenceClassification
    assert type(read_outline(tmp_path / "classes", "masked-lm")) is hf.BertForMaskedLM
    assert type(read_outline(tmp_path / "vit")) is hf.ViTModel
    assert type(read_outline(tmp_path / "vit", "image-classification")) is hf.ViTForImageClassification


def test_the_names_of_tasks_are_those_of_transformers_and_of_peft():
    from peft import TaskType

    assert all(hasattr(hf, task.loads) and hasattr(hf, task.reads) for task in TASKS.values())
    assert {task.peft for task in TASKS.values()} - {None} <= {one.value for one in TaskType}
