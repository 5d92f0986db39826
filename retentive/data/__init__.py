"""From text to batches of token ids: `prepare` writes a packed folder, `packed` reads it.

    prepare    sources of text -> a packed folder, in one call: what `retentive data` does
    sources    files, folders, Hugging Face data sets -> named documents
    formats    reads files: text, HTML (by `html`), JSON, tables, parquet, compressed or not
    chats      files of conversations -> checked messages
    media      pictures and sound in a message: rows of numbers, and the placeholder tokens for them
    archives   members of archives and rows of arrays, named like files
    tokenizer  text <-> ids: bytes, any tokenizer.json, a tiktoken file; trains a byte-level BPE
    split      chooses the held-out documents
    pack       documents -> a folder of memory-mappable token shards with its tokenizer
    packed     opens that folder: its meta, its tokenizer, its text as batches
    mixture    several such folders as one, their rows mixed by weights
    shards     the token shards of a split as one stream
    loader     a stream -> batches, each a pure function of (seed, step); this, `packed` and `mixture` need torch
    templates  a conversation -> token ids, by a chat template
    sandbox    runs chat templates, which are programs from the internet
    tools      the notation of tool calls in a chat template

Nothing is imported here, so each part costs only what it needs (`from retentive.data.pack import load_meta`).
"""
