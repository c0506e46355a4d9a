"""What a trained model is used for: text, answers, scores.

Knows nothing of training.

    prompting     zero-shot classification by a question's answer
    streaming     text shown as its tokens come
    conversation  questions and answers in the terminal
    evaluation    bits per byte; minimal pairs
    repeating    whether a model repeats itself, and what helps
    copying       what of it stands in a text word for word
"""
