"""The command line and what a terminal shows.

Knows flags by their table in `config.py`, and nothing of what they are for.

    command_line    argparse with one-line errors; flags from a dataclass; output that cannot fail
    suggestions     what unknown flags may have meant
    contradictions  flags that contradict each other
    config_file     flags in a TOML file; a run's record as a command line
    scripts         the commands as programs, of pip install
    chinese         labels, results and the commonest errors in Chinese
    console         progress bars, status lines at the terminal's width, sizes and durations
"""
