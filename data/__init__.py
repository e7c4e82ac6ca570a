"""Where the tokens come from: `shards` (the file format, the deterministic training stream, validation), `fineweb`
(download), `tokenize_text` (any text to shards), `local_text` (the embedded default: this Python's own library, byte by
byte) and `files` (atomic writing, one builder at a time). Submodules are imported by name: `import data.shards` needs
no network library and no tokenizer."""
