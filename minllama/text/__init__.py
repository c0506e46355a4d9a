"""From files of text to token ids.

Knows no model. A data set of `utils.py` is what comes out.

    find_files   the files that names, folders and globs mean
    reading      a file's bytes as text: unpacked, decoded, in blocks or lines
    records      files of records: JSON, CSV, parquet, Arrow
    documents    files as documents: what a pretraining reads
    labelled     sentences with labels and the scores of predictions
    dialogues    dialogues in every form that files have them in
    jinja_sandbox   chat templates of strangers, kept from doing anything but render
    jinja_template  other programs' chat templates, as token ids
    chat         the template that dialogues are written in, and their token ids
    splits       the train, dev and test files, and where predictions on them go
    encoder      documents to token ids
    token_cache  the token ids of a corpus on disk
    stream       tokens as a stream, and what is held out of it
    sources      several sources of a text, by which it is weighed and measured
    spelling     token ids as bytes, and hashes of spans of them
    duplicates   documents that are there more than once
    copies       how much of a text stands word for word in another
    compression  what gzip and xz need for a text
    corpus       the text of a pretraining, held out and cut
    vocabulary   which vocabulary a pretraining takes
"""
