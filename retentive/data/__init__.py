"""Text in, batches of token ids out: `prepare` makes the folder, `packed` reads it.

    prepare    sources of text -> a packed folder, in one call: what `retentive data` does
    sources    files, folders, Hugging Face data sets -> named documents
    formats    what is in a file: text, HTML (by `html`), JSON, tables, parquet, compressed or not
    chats      files of conversations -> messages, checked
    media      what a message holds beside text: rows of numbers, and the placeholders that stand for them
    tokenizer  text <-> ids: bytes, any tokenizer.json, a tiktoken file; trains a byte-level BPE
    split      which documents are held out
    pack       documents -> a folder of memory-mappable token shards that carries its tokenizer
    packed     that folder, opened once: its meta, its tokenizer, its text as batches
    mixture    several such folders as one, their rows mixed by weights
    shards     the token shards of a split as one stream
    loader     a stream -> batches, each a pure function of (seed, step); this, `packed` and `mixture` need torch
    templates  a conversation -> the ids that a model reads, or is taught

Nothing is imported here: each part costs only what it needs (`from retentive.data.pack import load_meta`).
"""
