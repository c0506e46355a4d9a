"""What is trained, and the loop.

The floor above all others: nothing of this package imports from it.

    session        before and after the loop
    run            where a run is and when it ends
    task           what a task is
    next_token     predicting tokens, and the loss on held-out ones
    chat_training  training on dialogues
    classifying    a classifier's batches and predictions
    train_step     one optimizer step
    training       the train loop
    ahead          batches made in a thread
    fitting        shape, batch and schedule for --minutes
    deadline       keeping a run to its --minutes
"""
