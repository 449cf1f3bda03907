"""The bundled model before its training: its vocabulary, its tokenizer and its shape."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from depass_lightning.tasks.synthetic import corpus

SPECIAL = ("<s>", "</s>", "<unk>", "<pad>")
CONTEXT = 128


def untrained() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the model with random weights (from torch's current seed) and its tokenizer."""
    tokenizer = build_tokenizer()
    bos, eos, _, pad = range(len(SPECIAL))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return LlamaForCausalLM(config), tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words; a word carries its leading space, a punctuation mark stands alone.

    A word at the very beginning gets a leading space too, so that "Mary" and " Mary" are the same token.
    """
    marks = [word for word in corpus.vocabulary() if not word.isalnum()]
    words = [f"▁{word}" for word in corpus.vocabulary() if word.isalnum()]
    ids = {token: number for number, token in enumerate((*SPECIAL, *marks, *words))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation("isolated")]
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["<s>"])]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
