"""Small tokenizers, built in memory, and chat templates after the families in use."""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|endoftext|>",
]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the user asks the assistant: what is a good answer?",
    "user assistant system model User: Assistant: [INST] [/INST] <think> </think> thinking about the question",
    "def answer(question):\n    return 'hello world'\n\n\nhello there, how are you today?  \n \n   spaces",
    "你好，世界。今天的天气怎么样？我们去看电影吧。低秩适应是一种微调方法。",
] * 4

TEMPLATES = {
    # SmolLM2: a system prompt of its own when the first message is not one
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "generation tags": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Llama 3: writes BOS itself, trims
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    # Mistral, Llama 2: knows no generation prompt, wants roles to alternate, a space belongs to the answer
    "mistral": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
        "{{ bos_token }}{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}{% else %}"
        "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    # Gemma: the assistant is called model, no system role
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'"
        " + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    # Qwen 3: thinking is kept in the last answer only
    "qwen3": (
        "{% for message in messages %}{% set content = message['content'] %}{% if message['role'] == 'assistant' %}"
        "{% if '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% else %}{% set thought = '' %}{% endif %}"
        "{% if loop.last %}{% set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{% endif %}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # writes no end-of-turn token, and its prompt ends in a space
    "bare": (
        "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    ),
    # Phi 3: a second token closes the whole conversation
    "phi3": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
    ),
    # DeepSeek R1: asks for thinking that its answers do not show
    "r1": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ '<|assistant|>' + message['content'].split('</think>')[-1] + '<|endoftext|>' }}{% else %}"
        "{{ '<|user|>' + message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    ),
}
# Where the generation prompt is a beginning of the answer as it is rendered.
PROMPTED = [name for name in TEMPLATES if name != "r1"]
NEEDS_USER_FIRST = ("mistral", "gemma")
NO_SYSTEM = ("gemma",)


def byte_level(
    template: str | None = None, bos: bool = False, pad: str = "</s>", eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in GPT-2 and all that came after; `bos` puts one before every text."""
    return _wrapped(_byte_level().to_str(), template, bos, pad, eos)


def framed() -> PreTrainedTokenizerFast:
    """For encoders: `<s>` text `</s>`, or `<s>` a `</s>` b `</s>` told apart as BERT does; it has a mask."""
    tokenizer = byte_level()
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<|endoftext|>",
        mask_token="<unk>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def metaspace(template: str | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
    """BPE that puts `▁` for spaces and one before the text, as in Llama 2."""
    return _wrapped(_metaspace().to_str(), template, bos, "</s>", "</s>")


def words(template: str | None = None) -> PreTrainedTokenizerFast:
    """Whole words split at white space, which is thrown away; what it does not know is `<unk>`."""
    known = sorted(
        {word for line in CORPUS for word in pre_tokenizers.Whitespace().pre_tokenize_str(line) for word in word[:1]}
    )
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *known])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return _wrapped(core.to_str(), template, False, "</s>", "</s>")


@cache
def _byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=520, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    return core


@cache
def _metaspace() -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    core.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()]
    )
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=620,
            special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
            show_progress=False,
        ),
    )
    return core


def _wrapped(core: str, template: str | None, bos: bool, pad: str, eos: str | None) -> PreTrainedTokenizerFast:
    own = Tokenizer.from_str(core)
    if bos:
        own.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", own.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own,
        bos_token="<s>",
        eos_token=eos,
        unk_token="<unk>",
        pad_token=pad,
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.chat_template = template
    return tokenizer
