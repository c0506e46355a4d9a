"""Model files, of this program and of others.

Every reader takes hostile files: it runs no code, and checks sizes before it allocates.

    pt_file  .pt files with a checksum, read without running code
    formats  reading any of them
    gguf     llama.cpp's files
    export   writing other programs' files
    models   which model a command means, and its vocabulary
"""
