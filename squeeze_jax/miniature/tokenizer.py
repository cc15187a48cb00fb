"""The demo's own tokenizer: whole words where it knows them, bytes where it does not.

A byte-level BPE without merges: a word of the vocabulary is one token, any other text is spelled in
UTF-8 bytes, so everything can be written and nothing needs a download. It is saved as the same
`tokenizer.json` that real MLLMs have.
"""

from collections import Counter
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from squeeze_jax.data.chat import SPECIAL_TOKENS

PAD = "<|endoftext|>"


def build_demo_tokenizer(texts: Iterable[str], vocab_size: int = 640) -> Tokenizer:
    """A tokenizer whose tokens are 256 bytes, the commonest words of `texts` and the chat's special
    tokens.

    Every word is there twice, with the space before it and without. Upper case is folded and
    accents are composed (NFC). Ids: bytes first, then words in alphabetical order, then special
    tokens, `<IMG_CONTEXT>` last.
    """
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words: Counter[str] = Counter()
    for text in texts:
        for piece, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text)):
            words[piece.removeprefix("Ġ")] += 1
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = (vocab_size - len(alphabet) - len(SPECIAL_TOKENS) - 1) // 2
    known = sorted(
        word
        for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0]))[:room]
        if word
    )
    tokens = dict.fromkeys([*alphabet, *(form for word in known for form in (word, "Ġ" + word))])
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[],
            ignore_merges=True,
        )
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD, *SPECIAL_TOKENS])
    return tokenizer
