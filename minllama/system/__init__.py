"""What any program needs: errors, whole files, locks, signals.

Knows nothing of models, text or flags; imports neither torch nor any other folder.

    errors      how a command ends early
    files       written whole or not at all, read up to a size
    locks       files that one process at a time holds
    signals     Ctrl-C and the like as a flag that loops read
    encodings   which encoding a text may have
    kinds       what a file is that is no text, by its first bytes
    unpacking   .gz, .bz2, .xz and .zst as the bytes in them
    arrow_messages  what an Arrow file claims, checked before it is read
    parquet_pages   what a parquet file's pages claim, likewise
    tables      parquet and Arrow as rows
    json_lines  JSON objects, one per line or in a list
    peek        what a file of records is about, by its first one
    packages    what only some uses need, and what to install for them
"""
