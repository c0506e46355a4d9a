"""What makes the Llama of `llama.py` fast, smaller, or trainable in part.

Knows tensors alone: no files, no text, no flags.

    kernels     attention and the loss, by what is fastest where
    generation  key/value caches, sampling, packed weights
    lora        low-rank adapters, and folding them in
"""
