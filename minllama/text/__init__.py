"""From files of text to token ids.

Knows no model. A data set of `utils.py` is what comes out.

    reading      text files found, decoded, and read as documents
    labelled     `label ||| sentence` files and the scores of predictions
    chat         dialogues and the template that they are written in
    splits       the files train, dev and test, and those written for them
    encoder      documents to token ids
    token_cache  the token ids of a corpus on disk
    duplicates   documents that come twice
    corpus       the text of a pretraining, held out and cut
    vocabulary   which vocabulary a pretraining takes
"""
