"""A tokenizer built as Qwen2's is, small."""

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from squeeze_jax.data.chat import SPECIAL_TOKENS

PROMPT = "a small critter running on the beach at night, with a blue flag, on the left"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_like() -> Tokenizer:
    """A tokenizer built as Qwen2's: NFC, its splitting rule, byte-level BPE, special tokens added on top."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    # The words of the special tokens are in the corpus, so that merges towards them exist.
    tokenizer.train_from_iterator([PROMPT, "user\n system\n <IMG_CONTEXT> <|im_end|> IMG_CONTEXT im_end"] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    tokenizer.add_tokens(["<tool_call>"])
    return tokenizer
