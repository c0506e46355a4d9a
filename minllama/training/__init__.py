"""What is trained, and the loop.

The floor above all others: nothing of this package imports from it.

    loop            the train loop and one optimizer step of it
    run             where a run is, when it ends, and its state
    setup           before the loop: opening a run, its plan
    results         after the loop: what a run left, and what its model is for
    identity        what a resumed run must share with its first one
    task            what a task is; predicting next tokens
    pretraining     the task on text
    old_text        what a model was trained on before: whether it forgets it
    classification  the task on labelled sentences; a classifier's predictions
    chat_tuning     the task on dialogues
    fitting         shape, batch and schedule for --minutes
    deadline        keeping a run to its --minutes
"""
