"""From files of text to token ids.

Knows no model. A data set of `utils.py` is what comes out.

    reading      finding text files, decoding them, reading them as documents
    labelled     sentences with labels and the scores of predictions
    chat         dialogues and the template that they are written in
    splits       the train, dev and test files, and where predictions on them go
    encoder      documents to token ids
    token_cache  the token ids of a corpus on disk
    stream       tokens as a stream, and what is held out of it
    sources      several sources of a text, by which it is weighed and measured
    duplicates   documents that are there more than once
    corpus       the text of a pretraining, held out and cut
    vocabulary   which vocabulary a pretraining takes
"""
