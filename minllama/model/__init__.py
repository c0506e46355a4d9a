"""The shape of the Llama of `llama.py`, and what makes it fast, smaller, or trainable in part.

Knows tensors alone: no files, no text, no flags.

    shape       what the computation depends on beside the weights
    kernels     attention, norms and the loss, by what is fastest where
    generation  key/value caches, sampling, the loop that continues texts
    packing     weights in fewer bytes and products, for generation
    lora        low-rank adapters, and folding them in
"""
