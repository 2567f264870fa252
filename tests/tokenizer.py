"""A tokenizer with a token a byte, for tests that look at what a model reads."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END = 256


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with a token a byte, whose id is the byte, and END."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    printable = [b for b in range(256) if chr(b) in alphabet]
    others = [b for b in range(256) if b not in printable]
    characters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=characters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer
