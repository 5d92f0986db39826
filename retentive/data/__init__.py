"""Text in, batches of token ids out. `command` is `retentive data`; the rest is

    tokenizer  text <-> ids: bytes, any tokenizer.json, a tiktoken file; trains a byte-level BPE
    sources    files, folders, compressed or not, parquet, Hugging Face data sets -> named documents
    pack       documents -> a folder of memory-mappable token shards that carries its tokenizer
    packed     that folder, opened once: its meta, its tokenizer, its text as batches
    shards     the token shards of a split as one stream
    loader     a stream -> batches, each a pure function of (seed, step); this and `packed` need torch

Nothing is imported here: each part costs only what it needs (`from retentive.data.pack import load_meta`).
"""
