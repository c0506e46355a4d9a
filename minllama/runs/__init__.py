"""A run on the disk: what a training leaves there, and what it will need.

Knows nothing of how a step is made.

    run_folder   its files' names, its lock, which checkpoint to resume
    checkpoints  a run's state on the disk: read, written, tried again, pruned
    metrics      a line per step: metrics.jsonl, TensorBoard
    comparison   several runs as a table, a CSV file and a page
    telemetry    GPU, environment, profile
    report       report.html
    plan         steps, memory, disk and time by arithmetic
    advice       what a finished run's figures say
"""
