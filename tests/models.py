"""Tiny models of many architectures, built from configs with a fixed seed; no file, no network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCAB = 97
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Architecture:
    """How to build one, what its input looks like, and names that pick a few of its layers."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    targets: tuple[str, ...]
    causal: bool = False
    extra: dict[str, object] = field(default_factory=dict)


def words(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {"input_ids": torch.randint(3, VOCAB, (rows, 11), generator=generator)}


def pictures(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(rows))}


def pairs(rows: int) -> dict[str, Tensor]:
    return words(rows) | {"decoder_input_ids": words(rows + 50)["input_ids"][:rows, :7]}


def causal(config: hf.PreTrainedConfig) -> Callable[[], nn.Module]:
    return lambda: hf.AutoModelForCausalLM.from_config(copy.deepcopy(config))  # models keep theirs, and may change it


class SmallUNet(nn.Module):
    """Convolutions down and up with attention between: the layers a diffusion UNet is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2, padding_mode="reflect")
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.up = nn.Conv2d(8, 3, 1)
        self.line = nn.Conv1d(3, 3, 3, padding=1)
        self.volume = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = torch.tanh(self.dilated(torch.tanh(self.down(pixel_values))))
        flat = x.flatten(2).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(self.to_q(flat), self.to_k(flat), self.to_v(flat))
        y = self.up(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))
        return self.volume(self.line(y.flatten(2)).unflatten(2, y.shape[2:]).unsqueeze(1)).flatten(1)


class EverySite(nn.Module):
    """One layer of every kind that can be adapted, each fed by the one before it; rows stay apart throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, 12)
        self.linear = nn.Linear(12, 16)
        self.across = Conv1D(18, 16)  # transformers' linear layer, which stores [I, O]
        self.line = nn.Conv1d(18, 6, 3, padding=1)
        self.plane = nn.Conv2d(1, 5, (3, 2), stride=(1, 2), padding=1, bias=False)
        self.volume = nn.Conv3d(1, 4, (2, 3, 3), padding=1)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.across(torch.tanh(self.linear(self.words(input_ids)))))
        x = torch.tanh(self.plane(torch.tanh(self.line(x.transpose(1, 2))).unsqueeze(1)))
        return self.volume(x.unsqueeze(1)).flatten(1)


def every_site(dtype: torch.dtype = torch.float32) -> nn.Module:
    """An `EverySite` with weights drawn with seed 0; it takes `words`."""
    torch.manual_seed(0)
    return EverySite().to(dtype).eval()


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(causal(hf.LlamaConfig(**LLAMA)), words, ("q_proj", "down_proj"), True),
    "llama-tied": Architecture(
        causal(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)), words, ("v_proj", "lm_head", "embed_tokens"), True
    ),
    "qwen2": Architecture(causal(hf.Qwen2Config(**LLAMA)), words, ("k_proj", "up_proj"), True),
    "qwen3": Architecture(causal(hf.Qwen3Config(**LLAMA, head_dim=16)), words, ("o_proj", "gate_proj"), True),
    "mistral": Architecture(causal(hf.MistralConfig(**LLAMA, sliding_window=6)), words, ("q_proj",), True),
    "gemma2": Architecture(
        causal(hf.Gemma2Config(**LLAMA, head_dim=8, sliding_window=6, query_pre_attn_scalar=8)),
        words,
        ("v_proj",),
        True,
    ),
    "gemma3": Architecture(
        causal(hf.Gemma3TextConfig(**LLAMA, head_dim=8, sliding_window=6, query_pre_attn_scalar=8)),
        words,
        ("q_proj", "embed_tokens"),
        True,
    ),
    "phi3": Architecture(causal(hf.Phi3Config(**LLAMA)), words, ("qkv_proj", "gate_up_proj"), True),
    "gpt2": Architecture(
        causal(
            hf.GPT2Config(
                vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
            )
        ),
        words,
        ("c_attn", "c_fc", "wte"),
        True,
    ),
    "gpt-neox": Architecture(
        causal(hf.GPTNeoXConfig(**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})),
        words,
        ("query_key_value", "dense_4h_to_h"),
        True,
    ),
    "opt": Architecture(
        causal(
            hf.OPTConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=128,
                word_embed_proj_dim=32,
            )
        ),
        words,
        ("q_proj", "fc1"),
        True,
    ),
    "olmo2": Architecture(causal(hf.Olmo2Config(**LLAMA)), words, ("q_proj", "up_proj"), True),
    "granite": Architecture(causal(hf.GraniteConfig(**LLAMA, logits_scaling=4.0)), words, ("q_proj",), True),
    "mixtral": Architecture(
        causal(hf.MixtralConfig(**LLAMA, num_local_experts=3, num_experts_per_tok=2)), words, ("q_proj", "o_proj"), True
    ),
    "bert": Architecture(lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)), words, ("query", "dense")),
    "roberta": Architecture(
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**BERT)), words, ("key", "intermediate.dense")
    ),
    "distilbert": Architecture(
        lambda: hf.DistilBertModel(
            hf.DistilBertConfig(
                vocab_size=VOCAB, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=128
            )
        ),
        words,
        ("q_lin", "lin1"),
    ),
    "t5": Architecture(
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
            )
        ),
        pairs,
        ("q", "wo", "shared"),
    ),
    "bart": Architecture(
        lambda: hf.BartForConditionalGeneration(
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
            )
        ),
        pairs,
        ("v_proj", "fc2"),
    ),
    "vit": Architecture(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=16,
                patch_size=4,
                num_labels=5,
            )
        ),
        pictures,
        ("q_proj", "projection"),
    ),
    "unet": Architecture(SmallUNet, pictures, ("down", "dilated", "to_q", "up", "line", "volume")),
}
CAUSAL = [name for name, architecture in ARCHITECTURES.items() if architecture.causal]


def _classes(config: hf.PreTrainedConfig) -> Callable[[], nn.Module]:
    return lambda: hf.AutoModelForSequenceClassification.from_config(copy.deepcopy(config))


def _masked(config: hf.PreTrainedConfig) -> Callable[[], nn.Module]:
    return lambda: hf.AutoModelForMaskedLM.from_config(copy.deepcopy(config))


_DISTILBERT = {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
_ALBERT = {**BERT, "embedding_size": 16}

# Architectures by what they are trained for, beside causal language models; the layers that `targets` names.
TASKS: dict[str, dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]]] = {
    "masked-lm": {
        "bert": (_masked(hf.BertConfig(**BERT)), ("query", "dense")),
        "roberta": (_masked(hf.RobertaConfig(**{**BERT, "pad_token_id": 1})), ("key", "intermediate.dense")),
        "distilbert": (_masked(hf.DistilBertConfig(**_DISTILBERT)), ("q_lin", "lin1")),
        "albert": (_masked(hf.AlbertConfig(**_ALBERT)), ("query", "ffn")),
    },
    "seq2seq": {
        "t5": (ARCHITECTURES["t5"].build, ("q", "wo")),
        "bart": (ARCHITECTURES["bart"].build, ("v_proj", "fc2")),
    },
    "sequence-classification": {
        "bert": (_classes(hf.BertConfig(**BERT, num_labels=3)), ("query", "dense")),
        "roberta": (_classes(hf.RobertaConfig(**{**BERT, "pad_token_id": 1}, num_labels=3)), ("key", "value")),
        "distilbert": (_classes(hf.DistilBertConfig(**_DISTILBERT, num_labels=3)), ("q_lin", "lin1")),
        "albert": (_classes(hf.AlbertConfig(**_ALBERT, num_labels=3)), ("query", "ffn")),
        "llama": (_classes(hf.LlamaConfig(**LLAMA, num_labels=3)), ("q_proj", "down_proj")),
        "gpt2": (
            _classes(hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, num_labels=3)),
            ("c_attn", "c_fc"),
        ),
    },
    "image-classification": {"vit": (ARCHITECTURES["vit"].build, ("q_proj", "projection"))},
}
TASK_MODELS = [(task, name) for task, models in TASKS.items() for name in models]


def tiny(name: str, dtype: torch.dtype = torch.float32, task: str | None = None) -> nn.Module:
    """The architecture's model, weights drawn with seed 0 and large enough to matter, in evaluation mode."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build() if task is None else TASKS[task][name][0]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype).eval()


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs)
    return out if isinstance(out, Tensor) else out[0]
