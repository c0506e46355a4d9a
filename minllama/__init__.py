"""The parts of MinLlama that the course script never had: a room to a theme.

A module imports only modules that are listed above it:

    errors, units        messages for the user; sizes and durations
    command_line         argparse with one-line errors; flags from a dataclass
    suggestions          a command line's unknown flags, and what they may have meant
    encodings            which encoding a text may have
    contradictions       flags that contradict each other
    files, locks         files written whole or not at all; files that one process holds
    config_file          flags in a TOML file; a run's record as the command it was
    console              progress bars; status lines at the terminal's width
    (config)             the model's shape, presets, every flag
    signals              Ctrl-C, SIGTERM, a closed terminal
    json_lines, text     JSON in text files; text files as documents
    (tokenizer)          SentencePiece, training a vocabulary
    tokens               documents to token ids; the token cache
    labelled, chat       labelled files and scores; dialogues and their template
    (utils)              the data sets and the order of their batches
    pt_file              .pt files with a checksum, read without running code
    checkpoint           a run's state, in one file or in shards
    gguf                 llama.cpp's files: values, tensors, vocabularies
    formats, generation  reading other programs' files; caches, sampling, packed weights
    kernels              attention and the loss, by what is fastest where
    (llama, optimizer)   the model; AdamW, Muon, schedules
    ranks, sharding      several processes; DDP, FSDP2 and shards
    models, adapters     which model to use, and its vocabulary; LoRA
    export               writing other programs' files
    prompting, streaming zero-shot scoring; text shown as it comes
    evaluation           bits per byte; minimal pairs
    conversation         questions and answers in the terminal
    random_state, device random numbers; device, dtype, memory, compiler
    gpus                 GPUs by their data sheets; the rate that MFU is measured against
    run_folder, saving   a run's folder and lock; writing its files while it trains
    advice               what a finished run's figures say
    deadline, ahead      keeping a run to its --minutes; a step's batches while the last one runs
    plan, record         the arithmetic of a run; what it puts on record
    report, recording    a run as a page, report.html; where its records go while it trains
    session              before and after the loop
    copies               documents that come twice
    corpus, vocabulary   the text of a pretraining, and the vocabulary
    task, run            what is trained; a run, where it is and when it ends
    train_step, training one optimizer step; the train loop
    classifying          a classifier's batches and predictions
    fitting              shape, batch and schedule for --minutes
    next_token           predicting tokens as a task, and the loss on held-out ones
    chat_training        training on dialogues
    (run_llama, check_model_precision)

The modules in parentheses are the user's, at the top of the repository.
"""

import os

# Threads that wait for others soon sleep: beside other work a spinning one holds the core that the
# others need, and one that sleeps at once wakes too late where there is none. GNU's OpenMP counts
# its turns. It reads these when torch is first imported, which is later.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
