"""Vocabularies: token ids and the text that they stand for.

Two kinds behind one interface: a model file's bytes say which it is. Knows no tensors, no models
and no data sets.

    base                 what every vocabulary can do
    sentence_piece       SentencePiece models, as Llama 1 and 2 have, and as are trained here
    sentence_piece_file  such models made from what other files say of the same vocabulary
    pre_tokenizers       how byte-level BPE cuts a text into words: the ways that are known
    byte_bpe             byte-level BPE: Llama 3's, SmolLM's, Qwen's, GPT-2's
    files                vocabularies in files of either kind
    symbols              own symbols: one token each, wherever they stand
    training             vocabularies of either kind, trained on text
    lost                 what of a text does not come back from its tokens
"""
