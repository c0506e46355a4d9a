"""Decoding, ours and other programs': what compare.py measures of it."""

from __future__ import annotations

import time

from programs import hugging_face_model, our_model

NEW_TOKENS = 100  # of a decoding run


def decoded_tokens_per_second(who: str, shape: str) -> float:
    """Speed of greedy decoding after a prompt of 8 tokens in float32, reading it included."""
    import torch

    prompt = list(range(10, 18))
    if who == "ours":
        from llama import Sampling, generate_tokens

        model = our_model(shape).eval()
        model.lay_out_for_decoding()

        def decode(count: int) -> None:
            greedy = Sampling(temperature=0)
            list(generate_tokens(model, [prompt], max_new_tokens=count, sampling=greedy))
    else:
        model = hugging_face_model(shape).eval()

        def decode(count: int) -> None:
            ids = torch.tensor([prompt])
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )

    decode(8)
    start = time.perf_counter()
    decode(NEW_TOKENS)
    return NEW_TOKENS / (time.perf_counter() - start)
