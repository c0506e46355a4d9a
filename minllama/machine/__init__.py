"""What computes: the device, its random numbers, several processes of one run.

Knows tensors, and nothing of models, text or flags.

    device        device, dtype, memory, allocator, compiler
    gpus          GPUs by their data sheets; the rate that MFU is measured against
    random_state  seeding, saving and restoring every generator
    ranks         several processes as one run
    sharding      DDP, FSDP2, and tensors in shards
"""
