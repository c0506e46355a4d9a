"""A run on the disk: what a training leaves there, and what it will need.

Knows nothing of how a step is made.

    run_folder  its files' names, its lock, which checkpoint to resume or delete
    checkpoints  a run's state on the disk: read, written, tried again
    record      metrics, GPU telemetry, environment, profile
    recording   where a run's records go
    report      report.html
    plan        steps, memory, disk and time by arithmetic
    advice      what a finished run's figures say
"""
