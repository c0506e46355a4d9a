"""Model files, of this program and of others.

Every format is one module, which reads it, says what is in it, and writes it. All of them take
hostile files: they run no code, and check sizes before they allocate.

    pt_file       the container of .pt files: a checksum, no code
    stored_model  what every format reads into, and checks
    vocabularies  which vocabularies other programs can hold, and how that is tried
    pt_model      models in .pt files, of this program, the original and llama2.c
    llama2c       llama2.c's .bin files
    gguf          llama.cpp's and Ollama's files
    gguf_vocabulary  the vocabulary in them
    hugging_face  the folders of `transformers`
    hugging_face_vocabulary  tokenizer.json and what is beside it
    litgpt        the folders of litgpt
    peft          adapters to a folder of `transformers`
    model_file    the table of formats; reading any of them
    export        writing any of them
    find_model    which model a command means, and its vocabulary
    vocabulary_fit  whether that vocabulary fits a text, and which model's does
"""
