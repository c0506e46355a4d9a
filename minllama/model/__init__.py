"""What makes the Llama of `llama.py` fast, smaller, or trainable in part.

Knows tensors alone: no files, no text, no flags.

    kernels     attention, norms and the loss, by what is fastest where
    generation  key/value caches, sampling, the loop that continues texts
    packing     weights in fewer bytes and products, for generation
    lora        low-rank adapters, and folding them in
"""
