"""Errors, whole files, locks, signals: what any program needs.

Knows nothing of models, text or flags, and imports neither torch nor anything of this project's.

    errors      how a command ends early
    units       sizes and durations for people
    files       written whole or not at all, read with a bound
    locks       files that one process holds
    signals     Ctrl-C and its like as a request that loops read
    encodings   which encoding a text may have
    json_lines  JSON objects, one a line or in a list
    packages    what only some uses need, and what to install for them
"""
